from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

from fastlm.model import ModelConfig
from fastlm.training import TokenDataset, prepare


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Models as small as those here gain nothing from several threads, which would only wait for one another."""
    threads = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the processes that a test starts
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


KOREAN = "이 영화는 정말 재미있었다. 배우들의 연기도 훌륭했고 음악도 좋았다.\n다시 보고 싶은 작품이다.\n"


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 kB of English documentation and Korean sentences."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    english = "".join(str(topics[name]) for name in sorted(topics))[:75_000]
    pieces = (english[i : i + 2000] + KOREAN for i in range(0, len(english), 2000))
    path.write_text("".join(pieces), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def dataset(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    return prepare([text_file], tmp_path_factory.mktemp("prepared") / "data", vocab_size=400)


@pytest.fixture
def tiny(dataset: TokenDataset) -> ModelConfig:
    return ModelConfig(
        vocab_size=dataset.tokenizer.vocab_size,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        intermediate_size=64,
        context_length=32,
        qk_norm=True,
    )
