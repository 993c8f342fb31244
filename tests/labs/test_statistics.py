from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from fastlm.labs.statistics import auroc, bootstrap, calibration, calibration_error, distinct_n, spread


def test_auroc_is_sklearns_with_ties() -> None:
    generator = np.random.default_rng()
    for _ in range(20):
        scores = generator.integers(0, 6, 50).astype(float).tolist()
        positive = (generator.random(50) < 0.3).tolist()
        if 0 < sum(positive) < 50:
            assert auroc(scores, positive) == pytest.approx(roc_auc_score(positive, scores))
    assert math.isnan(auroc([1.0], [True]))


def test_bootstrap_covers_the_true_mean_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    intervals = [bootstrap(generator.normal(3.0, 1.0, 60).tolist(), seed=i) for i in range(200)]
    covered = sum(i.low <= 3.0 <= i.high for i in intervals)
    assert 178 <= covered <= 198  # 95 % of 200, four standard deviations below and almost three above


def test_calibration_error_of_a_known_table() -> None:
    # Guo et al. 2017, equation 3: two bins of 3 and 1 answers that miss by 0.6 - 1/3 and 0.95 - 1.
    bins = calibration([0.55, 0.55, 0.55, 0.95], [True, False, False, True])
    assert [(b.count, b.accuracy) for b in bins] == [(3, pytest.approx(1 / 3)), (1, 1.0)]
    assert calibration_error(bins) == pytest.approx(0.75 * (0.55 - 1 / 3) + 0.25 * 0.05)
    assert calibration([1.0], [True])[0].count == 1


def test_spread_is_of_a_sample() -> None:
    assert spread([1.0, 2.0, 3.0]).deviation == pytest.approx(1.0)
    assert spread([5.0]).deviation == 0.0
    with pytest.raises(ValueError, match="no values"):
        spread([])


def test_distinct_n_counts_over_all_texts() -> None:
    assert distinct_n([[1, 2, 1, 2]], 2) == pytest.approx(2 / 3)
    assert distinct_n([["a", "b"], ["a", "b"]], 2) == 0.5
    assert math.isnan(distinct_n([["a"]], 2))
