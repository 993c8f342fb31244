"""The tables of features say what is so: every cell is run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastlm.errors import BackendError
from fastlm.ops import OPS, features
from fastlm.ops.feature_calls import FEATURES, Feature

PAGES = [Path(__file__).resolve().parents[2] / "docs" / language / "ops.md" for language in ("en", "ko")]
CELLS = [
    pytest.param(op, feature, backend, id=f"{op}, {feature.english}, {backend}")
    for op in FEATURES
    for feature in FEATURES[op]
    for backend in OPS[op].backends
    if backend in ("triton", "cpu")
]


def test_every_op_has_a_table():
    assert FEATURES.keys() == OPS.keys()


def test_the_pages_are_up_to_date(capsys):
    assert features.main(["--check", *map(str, PAGES)]) == 0, capsys.readouterr().err


def test_a_page_that_is_out_of_date_is_told_and_rewritten(tmp_path, capsys):
    page = tmp_path / "ops.md"
    page.write_text("a\n<!-- features -->\nold\n<!-- /features -->\nb\n")
    assert features.main(["--check", str(page)]) == 1
    assert "out of date" in capsys.readouterr().err
    assert "old" in page.read_text()
    assert features.main([str(page)]) == 0
    assert features.main(["--check", str(page)]) == 0
    assert page.read_text().startswith("a\n<!-- features -->\n**attention**")
    assert page.read_text().endswith("<!-- /features -->\nb\n")
    page.write_text("nothing")
    assert features.main(["--check", str(page)]) == 1
    assert "no <!-- features -->" in capsys.readouterr().err


def outcome(op: str, feature: Feature, backend: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    with features.forced(backend):
        return features.run(op, feature)


@pytest.mark.parametrize(("op", "feature", "backend"), CELLS)
def test_a_cell_is_what_happens(op: str, feature: Feature, backend: str):
    said = features.cell(op, feature, backend)
    if said == "fast":
        ours, plain = outcome(op, feature, backend), outcome(op, feature, "reference")
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=3e-2, atol=3e-2, equal_nan=True)
    elif said == "reference":
        with pytest.raises(BackendError):
            outcome(op, feature, backend)
        outcome(op, feature, "reference")
    else:
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            outcome(op, feature, "reference")
