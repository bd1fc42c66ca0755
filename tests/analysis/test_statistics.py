"""Every statistic against an implementation of its own, written out in loops."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from scipy import stats

from headinit.analysis.results import RunRow
from headinit.analysis.statistics import (
    Interval,
    analyse,
    area_under_curve,
    bootstrap_interval,
    compare_pairs,
    conclusion,
    expected_best,
    has_failed,
    holm,
    interquartile_mean,
    pair_of,
    paired_permutation_test,
    pairs_needed,
    rank_over_data,
    rank_schemes,
    smallest_p,
    steps_to_reach,
    verdict,
)
from headinit.errors import DataError


def row(init: str = "he", lr: float = 0.1, seed: int = 0, val: float | None = 0.8, test: float | None = None, **more):
    scores = {} if test is None else {"accuracy": test}
    return RunRow(init=init, lr=lr, seed=seed, val={"accuracy": val}, test=scores, **more)


# Bootstrap


def exact_bca(values: list[float], statistic) -> tuple[float, float]:
    """Efron 1987 over ALL n^n resamples, so without sampling error."""
    n = len(values)
    resampled = np.sort([statistic(np.array(draw)) for draw in product(values, repeat=n)])
    estimate = statistic(np.array(values))
    below = np.mean(resampled < estimate) + np.mean(resampled == estimate) / 2
    z0 = stats.norm.ppf(below)
    jackknife = np.array([statistic(np.delete(values, i)) for i in range(n)])
    spread = jackknife.mean() - jackknife
    acceleration = (spread**3).sum() / (6 * (spread**2).sum() ** 1.5)
    bounds = []
    for z in (stats.norm.ppf(0.025), stats.norm.ppf(0.975)):
        level = stats.norm.cdf(z0 + (z0 + z) / (1 - acceleration * (z0 + z)))
        bounds.append(np.quantile(resampled, level))
    return bounds[0], bounds[1]


@pytest.mark.parametrize("values", [[0.91, 0.92, 0.95, 0.9, 0.97], [1.0, 2.0, 4.0, 8.0, 16.5, 3.0]])
def test_interval_agrees_with_efrons_formula_over_all_resamples(values: list[float]) -> None:
    found = bootstrap_interval(values)
    low, high = exact_bca(values, np.mean)
    assert found.estimate == pytest.approx(np.mean(values), abs=1e-15)
    assert found.low == pytest.approx(low, abs=0.02 * np.ptp(values))
    assert found.high == pytest.approx(high, abs=0.02 * np.ptp(values))


def test_interval_is_repeatable_and_has_its_coverage() -> None:
    generator = np.random.default_rng(0)
    assert bootstrap_interval([1.0, 2.0, 4.0], seed=3) == bootstrap_interval([1.0, 2.0, 4.0], seed=3)
    hits = 0
    for _ in range(60):
        found = bootstrap_interval(generator.normal(1.0, 1.0, 25).tolist())
        hits += found.low <= 1.0 <= found.high
    assert 50 <= hits <= 60  # 95 % of 60 is 57; at n = 25 BCa covers about 93 %


@pytest.mark.parametrize("statistic", ["mean", "iqm"])
@pytest.mark.parametrize(
    "values", [[0.5], [0.5, 0.5], [0.1, 0.9], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0, 0.0], [0.3] * 7, [1e-300, 1e300]]
)
def test_degenerate_samples_have_an_interval(values: list[float], statistic: str) -> None:
    found = bootstrap_interval(values, statistic)
    assert math.isfinite(found.estimate)
    if len(values) == 1:
        assert found == Interval(0.5, None, None)
    elif len(set(values)) == 1:
        assert (found.low, found.high) == (values[0], values[0])
    else:
        assert min(values) <= found.low <= found.high <= max(values)


def test_values_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(DataError, match="1 of 2"):
        bootstrap_interval([0.5, float("nan")])
    with pytest.raises(DataError, match="at least one"):
        bootstrap_interval([])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 10, 25])
def test_interquartile_mean_drops_a_quarter_on_each_side(count: int) -> None:
    values = np.random.default_rng(count).normal(size=count)
    kept = sorted(values.tolist())[count // 4 : count - count // 4]
    assert interquartile_mean(values) == pytest.approx(sum(kept) / len(kept), abs=1e-14)


# Tests


def exact_sign_flips(differences: list[float]) -> float:
    observed = sum(differences)
    flipped = [
        sum(s * d for s, d in zip(signs, differences, strict=True))
        for signs in product((1, -1), repeat=len(differences))
    ]
    slack = 1e-12 * max(map(abs, differences), default=1.0)
    above = sum(value >= observed - slack for value in flipped) / len(flipped)
    below = sum(value <= observed + slack for value in flipped) / len(flipped)
    return min(1.0, 2 * min(above, below))


@pytest.mark.parametrize("pairs", [1, 2, 3, 5, 8, 11])
@pytest.mark.parametrize("shift", [0.0, 0.5, 3.0])
def test_permutation_test_is_exact_when_small(pairs: int, shift: float) -> None:
    generator = np.random.default_rng(pairs)
    a, b = generator.normal(shift, 1, pairs).round(1), generator.normal(0, 1, pairs).round(1)  # ties
    assert paired_permutation_test(a, b) == pytest.approx(exact_sign_flips((a - b).tolist()), abs=1e-12)
    assert paired_permutation_test(b, a) == pytest.approx(paired_permutation_test(a, b), abs=1e-12)


def test_permutation_test_samples_when_large() -> None:
    generator = np.random.default_rng(1)
    a, b = generator.normal(0.35, 1, 40), generator.normal(0, 1, 40)
    p = paired_permutation_test(a, b)
    assert p == pytest.approx(stats.ttest_rel(a, b).pvalue, abs=0.02)  # close at n = 40
    assert paired_permutation_test(a, b) == p
    assert paired_permutation_test(a + 100, b) == pytest.approx(smallest_p(40))


def test_degenerate_pairs_have_a_p() -> None:
    assert paired_permutation_test([0.5], [0.1]) == 1.0
    assert paired_permutation_test([0.5, 0.6, 0.7], [0.5, 0.6, 0.7]) == 1.0
    assert paired_permutation_test([0.5, 0.5, 0.5], [0.4, 0.4, 0.4]) == 0.25
    with pytest.raises(DataError, match="3 and 2"):
        paired_permutation_test([1.0, 2.0, 3.0], [1.0, 2.0])
    with pytest.raises(DataError, match="finite"):
        paired_permutation_test([1.0, float("nan")], [1.0, 2.0])


@pytest.mark.parametrize("count", [0, 1, 2, 5, 20])
def test_holm_is_its_definition(count: int) -> None:
    p = np.random.default_rng(count).uniform(0, 0.2, count).round(2).tolist()
    ordered = sorted(p)
    adjusted = holm(p)
    for value, found in zip(p, adjusted, strict=True):
        rank = max(i for i, other in enumerate(ordered) if other <= value)
        wanted = max(min(1.0, (count - j) * ordered[j]) for j in range(rank + 1))
        assert found == pytest.approx(wanted, abs=1e-15)
    for alpha in (0.01, 0.05, 0.1):  # step down until the first that is not rejected
        rejected, live = set(), True
        for j, index in enumerate(np.argsort(p, kind="stable")):
            live = live and p[index] * (count - j) <= alpha
            if live:
                rejected.add(int(index))
        assert {i for i, value in enumerate(adjusted) if value <= alpha} == rejected


def test_attainable_p() -> None:
    for pairs in range(1, 14):
        assert smallest_p(pairs) == pytest.approx(paired_permutation_test([1.0] * pairs, [0.0] * pairs))
    needed = pairs_needed(45)
    assert smallest_p(needed) * 45 < 0.05 <= smallest_p(needed - 1) * 45
    assert pairs_needed(10**6) is None


def test_pairs_use_the_shared_units_alone() -> None:
    a = {(0, s): float(s) for s in range(5)}
    b = {(0, s): float(s) - 1 for s in range(3, 9)}
    c = {(7, 0): 1.0}
    (found,) = compare_pairs({"a": a, "b": b, "c": c})
    assert (found.first, found.second, found.pairs, found.ahead) == ("a", "b", 2, 2)
    assert found.difference == Interval(1.0, 1.0, 1.0)
    assert compare_pairs({"a": a}) == ()


# Ranking


@pytest.mark.parametrize(("count", "q"), [(2, 1.960), (3, 2.343), (4, 2.569), (5, 2.728), (7, 2.949), (10, 3.164)])
def test_critical_difference_agrees_with_demsars_table(count: int, q: float) -> None:
    scores = np.random.default_rng(0).normal(size=(12, count))
    ranking = rank_schemes([str(k) for k in range(count)], [str(n) for n in range(12)], scores)
    assert ranking.critical_difference == pytest.approx(q * math.sqrt(count * (count + 1) / 72), abs=2e-3)


def test_ranks_and_friedman_by_hand() -> None:
    scores = np.array(
        [[0.9, 0.8, 0.7, 0.7], [0.8, 0.9, 0.6, 0.5], [0.7, 0.7, 0.6, 0.5], [0.9, 0.85, 0.2, 0.4], [1, 0, 0, 0]]
    )
    ranks = np.array([[1, 2, 3.5, 3.5], [2, 1, 3, 4], [1.5, 1.5, 3, 4], [1, 2, 4, 3], [1, 3, 3, 3]])
    ranking = rank_schemes(list("abcd"), list("vwxyz"), scores)
    assert list(ranking.mean_ranks.values()) == pytest.approx(ranks.mean(axis=0))
    n, k = ranks.shape
    ties = sum(t**3 - t for line in ranks for t in np.unique(line, return_counts=True)[1])
    statistic = 12 / (n * k * (k + 1)) * (ranks.sum(axis=0) ** 2).sum() - 3 * n * (k + 1)
    statistic /= 1 - ties / (n * k * (k**2 - 1))
    assert ranking.friedman_p == pytest.approx(stats.chi2.sf(statistic, k - 1), rel=1e-9)


def test_cliques_are_maximal_runs_within_the_critical_difference() -> None:
    generator = np.random.default_rng(2)
    for _ in range(20):
        scores = generator.normal(size=(8, 6)) + generator.normal(size=6)
        ranking = rank_schemes(list("abcdef"), list("12345678"), scores)
        names, ranks = list(ranking.mean_ranks), list(ranking.mean_ranks.values())
        runs = {
            (i, j)
            for i in range(6)
            for j in range(i + 1, 6)
            if ranks[j] - ranks[i] < ranking.critical_difference + 1e-12
        }
        maximal = {(i, j) for i, j in runs if (i - 1, j) not in runs and (i, j + 1) not in runs}
        assert set(ranking.cliques) == {tuple(names[i : j + 1]) for i, j in maximal}


def test_ranking_of_ties_and_of_two() -> None:
    tied = rank_schemes(list("abc"), list("xyz"), np.ones((3, 3)))
    assert (tied.friedman_p, tied.cliques, set(tied.mean_ranks.values())) == (1.0, (("a", "b", "c"),), {2.0})
    two = rank_schemes(["a", "b"], list("uvwxyz"), np.array([[2.0, 1.0]] * 6))
    assert two.friedman_p == pytest.approx(2 / 2**6)
    assert two.cliques == ()


# Budgets and curves


@pytest.mark.parametrize("higher", [True, False])
def test_expected_best_is_the_mean_over_all_draws(higher: bool) -> None:
    values = [0.3, 0.9, 0.5, 0.5]
    pick = max if higher else min
    for n, found in enumerate(expected_best(values, higher), start=1):
        assert found == pytest.approx(np.mean([pick(draw) for draw in product(values, repeat=n)]), abs=1e-12)
    assert expected_best([0.7]) == [0.7]


def test_area_and_steps() -> None:
    history = [(30, 0.9), (0, 0.1), (10, 0.6), (10, 0.5)]
    assert area_under_curve(history) == pytest.approx((10 * (0.1 + 0.5) / 2 + 20 * (0.5 + 0.9) / 2) / 30)
    assert area_under_curve([(5, 0.4)]) == 0.4
    assert area_under_curve([]) is None
    assert steps_to_reach(history, 0.55) == 10
    assert steps_to_reach(history, 0.05) == 0
    assert steps_to_reach(history, 0.95) is None


# Whole comparisons


def grid(schemes: dict[str, float], seeds: int = 8, data: str = "digits", noise: float = 0.004, **more) -> list[RunRow]:
    """Runs at two learning rates; 0.1 is the better one on validation, 0.2 the better one on test."""
    generator = np.random.default_rng(0)
    rows = []
    for seed in range(seeds):
        shared = generator.normal(0, 0.01)
        for init, base in schemes.items():
            for lr in (0.1, 0.2):
                value = base + shared + generator.normal(0, noise)
                test = value + (0.005 if lr == 0.2 else 0.0)
                history = [(0, 0.1), (10, value * 0.95), (20, value)]
                rows.append(
                    row(
                        init, lr, seed, value - lr / 10, test, data=data, history=history, steps=20, seconds=4.0, **more
                    )
                )
    return rows


def test_the_setting_is_chosen_on_validation_and_reported_on_test() -> None:
    rows = grid({"he": 0.8, "ridge": 0.9})
    (block,) = analyse(rows)
    assert [(s.init, s.lr, s.runs, s.failed) for s in block.summaries] == [("ridge", 0.1, 8, 0), ("he", 0.1, 8, 0)]
    assert block.split == "test"
    for summary in block.summaries:
        chosen = [r.test["accuracy"] for r in rows if r.init == summary.init and r.lr == 0.1]
        assert summary.mean.estimate == pytest.approx(np.mean(chosen))
        assert summary.std == pytest.approx(np.std(chosen, ddof=1))
        trials = [
            np.mean([r.val["accuracy"] for r in rows if r.init == summary.init and r.lr == lr]) for lr in (0.1, 0.2)
        ]
        assert summary.best_of == pytest.approx(expected_best(trials))
    best = max(value for r in rows for _, value in r.history)
    reached = [steps_to_reach(r.history, 0.9 * best) for r in rows if r.init == "ridge" and r.lr == 0.1]
    assert block.summaries[0].steps_to_90 == sorted(reached)[3]
    assert block.summaries[0].seconds_to_90 == pytest.approx(sorted(reached)[3] * 4.0 / 20)
    assert block.summaries[1].steps_to_99 is None


def test_words_name_winner_level_and_losers() -> None:
    text = conclusion(grid({"he": 0.7, "ridge": 0.9, "lda": 0.9}, seeds=10, noise=0.0005))
    lines = text.splitlines()
    assert lines[0] == "digits, freeze=all: accuracy on test; each scheme at the setting that validation chose."
    assert lines[1].startswith(("Best: ridge at lr 0.1, 9", "Best: lda at lr 0.1, 9"))
    assert "Behind it (corrected p below 0.05): he (-20" in text
    assert "Level with it (the whole interval within 0.5 points)" in text
    assert "10 paired runs per pair of schemes, 3 tests" in text
    assert "nan" not in text.lower()


def test_too_few_seeds_are_said_to_be_too_few() -> None:
    text = conclusion(grid({"he": 0.7, "ridge": 0.9, "lda": 0.9}, seeds=5, noise=0.01))
    assert "Likely behind it (in every pair, yet not significant): he (-" in text
    assert "Not told apart from it" in text
    assert "Behind it" not in text
    assert (
        "With 5 no difference can be significant after that correction (its least p is 0.188); 7 pairs could." in text
    )
    assert pairs_needed(3) == 7


@pytest.mark.parametrize("seeds", [1, 2])
def test_one_or_two_runs_give_words_without_nan(seeds: int) -> None:
    text = conclusion(grid({"he": 0.7, "ridge": 0.9}, seeds=seeds))
    assert "nan" not in text.lower()
    assert ("one run, so no interval" in text) == (seeds == 1)


def test_identical_values_have_width_zero_and_are_level() -> None:
    rows = [row(init, seed=s, val=0.9, test=0.9) for init in ("a", "b") for s in range(5)]
    (block,) = analyse(rows)
    assert block.summaries[0].mean == Interval(0.9, 0.9, 0.9)
    assert block.summaries[0].std == 0.0
    assert block.comparisons[0].adjusted_p == 1.0
    assert verdict(block.comparisons[0]) == "Level"
    assert "vary split_seed" in conclusion(rows)


def test_one_scheme_alone() -> None:
    assert "nothing to compare" in conclusion([row(seed=s) for s in range(3)])


def test_failed_runs_are_counted_apart() -> None:
    rows = [row("he", seed=s, val=0.9, test=0.9, majority=0.3) for s in range(4)]
    rows += [row("he", seed=4, val=0.3, test=0.3, majority=0.3), row("he", seed=5, val=None, status="diverged")]
    rows += [row("ridge", seed=s, val=0.8, test=0.8, majority=0.3) for s in range(6)]
    (block,) = analyse(rows)
    by_name = {summary.init: summary for summary in block.summaries}
    assert (by_name["he"].runs, by_name["he"].failed) == (6, 2)
    assert by_name["he"].mean.estimate == pytest.approx(0.9)
    assert by_name["he"].scores[(0, 5)] == 0.3  # the worst of the block
    assert block.summaries[0].init == "ridge"  # the order counts the failures
    text = conclusion(rows)
    assert "he 2 of 6" in text
    assert pair_of(block, "ridge", "he").pairs == 6


def test_what_counts_as_failed() -> None:
    assert not has_failed(row(val=0.5))
    assert has_failed(row(val=0.5), majority=0.5)
    assert has_failed(row(val=0.5, majority=0.6))
    assert has_failed(row(val=float("nan")))
    assert has_failed(row(val=0.9, status="diverged"))
    assert has_failed(row(val=0.9), metric="mcc")


def test_all_failed_is_said_and_no_score_is_an_error() -> None:
    rows = [row(seed=s, val=0.1) for s in range(3)]
    assert "Every run failed" in conclusion(rows, majority={"": 0.2})
    with pytest.raises(DataError, match="none of 2 runs"):
        analyse([row(val=None), row(val=float("nan"))])
    with pytest.raises(DataError, match="none of 0 runs"):
        analyse([])


def test_without_test_scores_validation_is_named_as_such() -> None:
    rows = [row("he", seed=s, val=0.5 + s / 100) for s in range(3)]
    assert analyse(rows)[0].split == "val"
    assert "optimistic" in conclusion(rows)


def test_a_metric_where_less_is_better() -> None:
    rows = [
        RunRow(init=init, lr=lr, seed=s, val={"nll": base + lr}, test={"nll": base + s / 1000})
        for init, base in (("he", 0.9), ("ridge", 0.2))
        for lr in (0.1, 0.2)
        for s in range(6)
    ]
    (block,) = analyse(rows, "nll")
    assert [(s.init, s.lr) for s in block.summaries] == [("ridge", 0.1), ("he", 0.1)]
    assert "Best: ridge at lr 0.1, 0.20" in conclusion(rows, "nll")


def test_blocks_are_kept_apart_and_ranked_over_data() -> None:
    rows = []
    for data in ("digits", "trec", "flowers", "sst2", "pets", "cars"):
        rows += grid({"he": 0.7, "ridge": 0.9, "lda": 0.88}, seeds=3, data=data)
    analyses = analyse(rows)
    assert [block.data for block in analyses] == ["digits", "trec", "flowers", "sst2", "pets", "cars"]
    ranking = rank_over_data(analyses)
    assert list(ranking.mean_ranks) == ["ridge", "lda", "he"]
    assert ranking.mean_ranks["ridge"] == 1.0
    assert "critical difference" in conclusion(rows)
    assert rank_over_data(analyses[:1]) is None
    frozen_and_not = grid({"he": 0.7}) + grid({"he": 0.8}, freeze="none", per_class=5)
    assert [block.title for block in analyse(frozen_and_not)] == [
        "digits, freeze=all",
        "digits, freeze=none, 5 per class",
    ]


def test_different_shares_of_the_rate_are_said() -> None:
    def rows(init: str, share: float | None):
        return [
            row(init, lr, seed, val=0.8 + lr, test=0.8 + seed / 100, backbone_lr=None if share is None else share * lr)
            for lr in (0.01, 0.1)
            for seed in range(2)
        ]

    said = conclusion([*rows("he", 0.1), *rows("auto", 0.01), *rows("zeros", 0.1)])
    for init, share in (("he", "0.1"), ("zeros", "0.1"), ("auto", "0.01")):
        assert f"{init} {share}" in said
    assert "optim.backbone_share=0.1 compares the starts alone" in said
    for same in ((0.1, 0.1), (None, None)):
        assert "backbone_share" not in conclusion([*rows("he", same[0]), *rows("auto", same[1])])
