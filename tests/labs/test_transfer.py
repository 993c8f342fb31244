from __future__ import annotations

from pathlib import Path

import pytest

from fastlm.labs import find_idea, korean_base, run_lab, transfer
from fastlm.labs.statistics import Spread
from fastlm.labs.transfer import judge
from fastlm.labs.workbench import Workbench
from fastlm.training import PRESETS, transformer_config


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """A data directory with reviews that one word decides."""
    directory = tmp_path / "data"
    (directory / "nsmc").mkdir(parents=True)
    lines = [f"{i % 13}번째 영화 {'좋다' if i % 2 else '싫다'}" for i in range(600)]
    (directory / "nsmc" / "reviews.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = "".join(f"{line}\t{i % 2}\n" for i, line in enumerate(lines))
    for name in ("train", "valid"):
        (directory / "nsmc" / f"{name}.tsv").write_text("text\tlabel\n" + rows, encoding="utf-8")
    return directory


def test_each_way_trains_its_own_share_of_the_numbers(
    reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "SIZES", (8, 16))
    monkeypatch.setattr(transfer, "STEPS", 6)
    monkeypatch.setattr(transfer, "VALID", 40)
    monkeypatch.setattr(korean_base, "STEPS", 2)
    monkeypatch.setattr(korean_base, "VOCAB_SIZE", 300)
    lab = Workbench(tmp_path / "out", lang="en", data=reviews)
    result = run_lab(find_idea("transfer"), lab)
    assert not result.missing
    [table] = result.tables
    trained = {str(row[0]): row[1] for row in table.rows}
    tiny = PRESETS["tiny"]
    body = transformer_config(279, tiny)
    a_block = 4 * tiny.hidden_size * 2 * transfer.RANK  # q, k, v, o of a model without grouped heads
    assert body.num_kv_heads == body.num_heads
    lora = trained[f"from the base, LoRA {transfer.RANK}"]
    assert isinstance(lora, int)
    assert lora >= body.num_layers * a_block
    assert trained["from the base"] == trained["from scratch"] != lora
    assert len(result.findings) == 2
    assert (tmp_path / "out" / "transfer-accuracy.png").is_file()


def test_a_gap_within_the_deviations_is_no_lead(tmp_path: Path) -> None:
    lab = Workbench(tmp_path, lang="en", data=tmp_path)
    lab.begin(find_idea("transfer"))
    found = {"base": [Spread(70.0, 3.0, 3)], "scratch": [Spread(66.0, 2.0, 3)], "lora": [Spread(66.9, 0.1, 3)]}
    judge(lab, (200,), found, {"base": 1000, "scratch": 1000, "lora": 50})  # type: ignore[arg-type]
    ahead, close = lab.result.findings
    assert not ahead.holds
    assert "+4.0; 0 of 1" in ahead.statement
    assert not close.holds  # 3.1 points behind
    assert "5.0% of the numbers" in close.statement
