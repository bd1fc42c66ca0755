"""Verdicts by their rule, against scipy's own tests."""

from __future__ import annotations

import pytest
from scipy import stats

from headinit.reproduction.baselines import Published
from headinit.reproduction.judgement import ROUNDING, judge

RUNS = [90.1, 90.4, 89.7, 90.0, 90.2]


@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_the_interval_is_welchs(confidence: float) -> None:
    published = Published("val.accuracy", 89.5, std=0.6, seeds=7)
    mean, std = sum(RUNS) / 5, stats.tstd(RUNS)
    found = judge(published, RUNS, confidence=confidence).interval
    reference = stats.ttest_ind_from_stats(mean, std, 5, 89.5, 0.6, 7, equal_var=False)
    # The interval of the test with statistic t: difference +- quantile * difference / t.
    a, b = std**2 / 5, 0.6**2 / 7
    freedom = (a + b) ** 2 / (a**2 / 4 + b**2 / 6)
    half = stats.t.ppf(0.5 + confidence / 2, freedom) * abs((mean - 89.5) / reference.statistic) + ROUNDING
    assert found == pytest.approx((mean - 89.5 - half, mean - 89.5 + half))


@pytest.mark.parametrize(
    ("published", "runs", "verdict"),
    [
        (Published("m", 90.0, std=0.3, seeds=5), RUNS, "reproduced"),
        (Published("m", 85.0, std=0.3, seeds=5), RUNS, "off"),
        (Published("m", 90.0, std=0.3, seeds=5), [80.0, 100.0], "cannot tell"),
        (Published("m", 90.0), [90.0], "cannot tell"),  # one against one: no spread at all
        (Published("m", 90.0), [90.0, 90.1, 89.9, 90.0], "reproduced"),
        (Published("m", 70.0, std=5.0, seeds=25), [90.0], "off"),  # their spread stands for ours
        (Published("m", 70.0, std=0.2, seeds=25), [70.1], "reproduced"),
        (Published("m", 66.5, bounds=(61.7, 71.4), range_only=True, seeds=5), [62.0, 62.1, 61.9], "reproduced"),
        (Published("m", 66.5, bounds=(61.7, 71.4), range_only=True, seeds=5), [50.0, 50.1, 49.9], "off"),
    ],
)
def test_verdicts(published: Published, runs: list[float], verdict: str) -> None:
    assert judge(published, runs).verdict == verdict


def test_a_wide_interval_around_zero_reproduces_nothing_until_the_margin_allows_it() -> None:
    published, runs = Published("m", 90.0), [89.0, 91.0, 90.0]
    assert judge(published, runs).verdict == "cannot tell"
    assert judge(published, runs, margin=10.0).verdict == "reproduced"


def test_a_median_is_compared_with_a_median() -> None:
    judgement = judge(Published("m", 90.0, statistic="median", seeds=5), [90.0, 90.1, 10.0, 89.9, 90.2])
    assert judgement.measured == 90.0
    assert judgement.difference == 0.0
