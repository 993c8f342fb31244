from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastlm.errors import CheckpointError
from fastlm.model import RNNConfig, RNNLanguageModel, Transformer, load_model, save_model
from fastlm.model.tensor_files import write_tensors
from tests.model.test_transformer import config, randomise


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_model(Transformer(config()), tmp_path)
    return tmp_path


def rewrite(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "lacks model.norm.weight"),
        (lambda t: t.update(extra=torch.zeros(1)), "holds extra"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(7)}), r"model.norm.weight is \(7,\)"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(48, dtype=torch.int64)}), "int64"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused_by_name(saved: Path, change, message: str) -> None:
    rewrite(saved / "model.safetensors", change)
    with pytest.raises(CheckpointError, match=message):
        load_model(saved)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, 0.5, -1])
def test_a_truncated_file_is_one_error_wherever_it_is_cut(saved: Path, keep: float) -> None:
    path = saved / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        load_model(saved)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"model_type": "llama"}', b"[" * 100_000])
def test_a_corrupt_config_is_one_error_that_names_the_file(saved: Path, content: bytes) -> None:
    (saved / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model(saved)


def test_a_config_of_absurd_size_is_refused_before_memory_is_taken(saved: Path) -> None:
    content = json.loads((saved / "config.json").read_text())
    for key in ("hidden_size", "num_hidden_layers", "max_position_embeddings", "vocab_size"):
        (saved / "config.json").write_text(json.dumps(content | {key: 10**12}))
        with pytest.raises(CheckpointError):
            load_model(saved)


def test_a_missing_directory_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json does not exist; give the directory of a trained model"):
        load_model(tmp_path / "nowhere")


def test_weights_are_readable_by_whom_the_umask_allows(saved: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((saved / "model.safetensors").stat().st_mode) == 0o666 & ~mask


def test_a_failed_write_leaves_the_earlier_file_whole(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (saved / "model.safetensors").read_bytes()
    full = OSError(28, "No space left on device")
    monkeypatch.setattr("fastlm.model.tensor_files.save_file", lambda *a, **k: (_ for _ in ()).throw(full))
    with pytest.raises(OSError, match="No space left"):
        write_tensors({"a": torch.zeros(3)}, saved / "model.safetensors")
    assert (saved / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in saved.iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_a_recurrent_model_is_saved_and_loaded_with_equal_logits(tmp_path: Path, cell: str) -> None:
    model = RNNLanguageModel(RNNConfig(61, 24, 2, 32, cell)).eval()
    randomise(model)
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    ids = torch.randint(61, (2, 9))
    with torch.no_grad():
        assert torch.equal(model(ids), again(ids))
