"""Comparing runs honestly: choose on validation, report test once, pair by seed and split, correct for many tests.

scipy does the sampling. Degenerate input has a defined answer: values without variance have an interval of width 0 and
p = 1; one value has no interval (None) and p = 1.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from headinit.analysis.metrics import HIGHER_IS_BETTER
from headinit.analysis.results import RunRow
from headinit.errors import DataError, unknown_name
from headinit.seeding import derived_seed

LEVEL = 0.95
"""Confidence level of every interval."""

ALPHA = 0.05
RESAMPLES = 9999

VERDICTS = ("Behind", "Likely behind", "Level", "Not told apart")
"""How a scheme can stand to the best one."""

Unit = tuple[int, int]
"""What two schemes share in a paired comparison: (split seed, seed)."""

Block = tuple[str, str, int | None]
"""Runs that are compared with each other: (data, freeze, per_class)."""


@dataclass(frozen=True)
class Interval:
    """A statistic and its confidence interval; the bounds are None where one value alone is known."""

    estimate: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class PairedComparison:
    """Two schemes on the runs that they share.

    Attributes:
        first, second: the schemes.
        pairs: number n of shared (split seed, seed) pairs.
        difference: mean of first - second, with its BCa interval.
        ahead: number of pairs in which `first` has the higher value.
        unanimous: whether all differences have the same sign, none being 0.
        p_value: two-sided permutation test on the signs of the differences (exact up to 13 pairs).
        adjusted_p: after Holm's correction over all pairs of schemes of the block.
    """

    first: str
    second: str
    pairs: int
    difference: Interval
    ahead: int
    unanimous: bool
    p_value: float
    adjusted_p: float


@dataclass(frozen=True)
class SchemeSummary:
    """One scheme of a block, at the learning rate (and weight decay) that has the best mean on validation.

    Attributes:
        init, lr, weight_decay: the scheme and the setting that validation chose.
        runs: runs of that setting; `failed` of them are at or below the majority class, or did not finish.
        failed_anywhere, runs_anywhere: the same over every setting that was tried.
        mean, std, iqm: of the runs that did not fail: mean with interval, standard deviation (ddof 1; 0.0 for one run),
            interquartile mean with interval. None if all failed.
        validation: mean on validation, which chose the setting; it is optimistic.
        scores: reported score per (split seed, seed), failed runs included; a run without a score counts as the worst
            of its block.
        steps_to_90, steps_to_99, seconds_to_90, seconds_to_99: median over the runs of when validation first reaches
            that share of the best value of the block; None if more than half of the runs never do.
        area: mean normalised area under the learning curve.
        seconds: mean wall-clock seconds of a run.
        init_loss, feature_gradient: means at the start.
        best_of: expected best validation value of n settings tried, n = 1, 2, ...
        backbone_lr: learning rate of the pretrained layers; None where none trained.
    """

    init: str
    lr: float
    weight_decay: float
    runs: int
    failed: int
    runs_anywhere: int
    failed_anywhere: int
    mean: Interval | None
    std: float | None
    iqm: Interval | None
    validation: float
    scores: Mapping[Unit, float]
    steps_to_90: float | None
    steps_to_99: float | None
    seconds_to_90: float | None
    seconds_to_99: float | None
    area: float | None
    seconds: float
    init_loss: float | None
    feature_gradient: float | None
    best_of: tuple[float, ...]
    backbone_lr: float | None = None

    @property
    def standing(self) -> float:
        """Mean of the reported score over all runs, failed ones included: what the schemes are ordered by."""
        return float(np.mean(list(self.scores.values())))


@dataclass(frozen=True)
class BlockAnalysis:
    """All that the statistics say about one block.

    Attributes:
        data, freeze, per_class: what the runs of the block share.
        metric: name of the metric; `split` is ``"test"``, or ``"val"`` where a run has no test score.
        summaries: the schemes, best first (by the mean over all runs, failed ones included).
        comparisons: every pair of schemes that shares runs.
    """

    data: str
    freeze: str
    per_class: int | None
    metric: str
    split: str
    summaries: tuple[SchemeSummary, ...]
    comparisons: tuple[PairedComparison, ...]

    @property
    def title(self) -> str:
        """What the block is, for headings."""
        parts = [self.data or "data", f"freeze={self.freeze}"]
        return ", ".join([*parts, *([f"{self.per_class} per class"] if self.per_class else [])])


@dataclass(frozen=True)
class Ranking:
    """Schemes ranked over data sets (Demsar 2006).

    Attributes:
        mean_ranks: scheme -> mean rank (1 is best), best first; ties share the mean of their ranks.
        data: the data sets on which every scheme was run.
        friedman_p: p of Friedman's test that all schemes are level (Wilcoxon's signed-rank test for two schemes).
        critical_difference: Nemenyi's: mean ranks that differ by less cannot be told apart.
        cliques: maximal groups of schemes that cannot be told apart.
    """

    mean_ranks: Mapping[str, float]
    data: tuple[str, ...]
    friedman_p: float
    critical_difference: float
    cliques: tuple[tuple[str, ...], ...]


def interquartile_mean(values: Sequence[float] | np.ndarray, axis: int = -1) -> Any:
    """Mean without the lowest and the highest quarter (floor(n/4) values each), as in Agarwal et al. 2021.

    Example:
        >>> float(interquartile_mean([0.0, 0.9, 0.91, 0.92, 1.0]))
        0.91
    """
    from scipy import stats

    return stats.trim_mean(np.asarray(values, dtype=np.float64), 0.25, axis=axis)


_STATISTICS: dict[str, Callable[..., Any]] = {"mean": np.mean, "iqm": interquartile_mean}


def bootstrap_interval(values: Sequence[float], statistic: str = "mean", seed: int = 0) -> Interval:
    """Bias-corrected and accelerated (BCa) 95 % bootstrap interval (Efron 1987), 9,999 resamples.

    Args:
        values: n >= 1 finite numbers.
        statistic: ``"mean"`` or ``"iqm"``.
        seed: of the resampling; the same seed gives the same interval.

    Raises:
        DataError: there is no value, or one is not finite.

    Example:
        >>> found = bootstrap_interval([0.90, 0.92, 0.91, 0.95, 0.93])
        >>> round(found.estimate, 3), 0.90 < found.low < 0.922 < found.high < 0.95
        (0.922, True)
        >>> bootstrap_interval([0.5, 0.5, 0.5]), bootstrap_interval([0.5])
        (Interval(estimate=0.5, low=0.5, high=0.5), Interval(estimate=0.5, low=None, high=None))
    """
    sample = _finite_values(values)
    if statistic not in _STATISTICS:
        raise unknown_name("statistic", statistic, _STATISTICS)
    return _bootstrap_interval(tuple(sample.tolist()), statistic, seed)


@functools.lru_cache(maxsize=4096)  # a report asks for the interval of its table in each of its parts
def _bootstrap_interval(values: tuple[float, ...], statistic: str, seed: int) -> Interval:
    from scipy import stats

    sample, measure = np.array(values), _STATISTICS[statistic]
    estimate = float(measure(sample, axis=-1))
    if len(sample) == 1:
        return Interval(estimate, None, None)
    if np.ptp(sample) == 0:
        return Interval(float(sample[0]), float(sample[0]), float(sample[0]))
    generator = np.random.default_rng(derived_seed(seed, "bootstrap"))
    options: dict[str, Any] = {"confidence_level": LEVEL, "n_resamples": RESAMPLES, "vectorized": True, "axis": -1}
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        result = stats.bootstrap((sample,), measure, method="BCa", random_state=generator, **options)
        if not np.isfinite(result.confidence_interval).all():  # the jackknife or the resamples have no variance
            result = stats.bootstrap(
                (sample,), measure, method="percentile", bootstrap_result=result, **{**options, "n_resamples": 0}
            )
    low, high = result.confidence_interval
    return Interval(estimate, float(low), float(high))


def paired_permutation_test(first: Sequence[float], second: Sequence[float], seed: int = 0) -> float:
    """Two-sided p of "the paired differences have mean 0": the share of sign flips with at least this mean difference.

    All 2^n sign flips are tried up to n = 13, otherwise 9,999 at random. With n pairs p cannot be less than 2 / 2^n.

    Raises:
        DataError: the lengths differ, nothing is given, or a value is not finite.

    Example:
        >>> paired_permutation_test([3.0, 4.0, 5.0], [1.0, 1.0, 1.0])
        0.25
    """
    from scipy import stats

    if len(first) != len(second):
        raise DataError(f"A paired test needs as many values on both sides; found {len(first)} and {len(second)}.")
    differences = _finite_values(first) - _finite_values(second)
    if len(differences) == 1 or not differences.any():
        return 1.0  # one pair has two sign flips, both as far from 0
    result = stats.permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        random_state=np.random.default_rng(derived_seed(seed, "permutation")),
    )
    return min(1.0, float(result.pvalue))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979): adjusted p values in the given order.

    Example:
        >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
        [0.03, 0.06, 0.06]
    """
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, (len(p_values) - rank) * p_values[index])
        adjusted[index] = min(1.0, running)
    return adjusted


def compare_pairs(scores: Mapping[str, Mapping[Unit, float]], seed: int = 0) -> tuple[PairedComparison, ...]:
    """Every pair of schemes on the units that both have, with Holm's correction over the pairs.

    Args:
        scores: scheme -> {(split seed, seed): score}.

    Example:
        >>> a = {(0, s): 0.9 + 0.01 * s for s in range(6)}
        >>> b = {(0, s): 0.8 for s in range(6)}
        >>> found = compare_pairs({"ridge": a, "he": b})[0]
        >>> round(found.difference.estimate, 3), found.ahead, found.p_value
        (0.125, 6, 0.03125)
    """
    return _compared(scores, list(combinations(scores, 2)), seed)


def compare_with(
    reference: str, scores: Mapping[str, Mapping[Unit, float]], seed: int = 0
) -> tuple[PairedComparison, ...]:
    """Every scheme against one of them, with Holm's correction over these pairs alone.

    Many against one is the question of a study with a reference; it needs fewer pairs than all against all.

    Args:
        reference: a key of `scores`; the second of every pair.
        scores: scheme -> {(split seed, seed): score}.

    Example:
        >>> scores = {"torch": {(0, s): 0.8 for s in range(6)}, "ridge": {(0, s): 0.9 + s / 100 for s in range(6)}}
        >>> [(pair.first, pair.second, pair.adjusted_p) for pair in compare_with("torch", scores)]
        [('ridge', 'torch', 0.03125)]
    """
    if reference not in scores:
        raise unknown_name("reference scheme", reference, scores, DataError)
    return _compared(scores, [(scheme, reference) for scheme in scores if scheme != reference], seed)


def _compared(
    scores: Mapping[str, Mapping[Unit, float]], pairs: Sequence[tuple[str, str]], seed: int
) -> tuple[PairedComparison, ...]:
    """The named pairs on the units that both schemes have."""
    found = []
    for first, second in pairs:
        shared = sorted(scores[first].keys() & scores[second].keys())
        if shared:
            a, b = [scores[first][unit] for unit in shared], [scores[second][unit] for unit in shared]
            difference = bootstrap_interval(np.subtract(a, b).tolist(), seed=seed)
            signs = np.sign(np.subtract(a, b))
            ahead, unanimous = int((signs > 0).sum()), abs(signs.sum()) == len(signs)
            p = paired_permutation_test(a, b, seed)
            found.append((first, second, len(shared), difference, ahead, bool(unanimous), p))
    corrected = holm([entry[-1] for entry in found])
    return tuple(PairedComparison(*entry, adjusted_p=p) for entry, p in zip(found, corrected, strict=True))


def expected_best(values: Sequence[float], higher_is_better: bool = True) -> list[float]:
    """Expected best of n values drawn at random (with replacement), for n = 1 .. len(values) (Dodge et al. 2019).

    E[max of n] = sum_i v_(i) [(i/N)^n - ((i-1)/N)^n] over the sorted values.

    Example:
        >>> expected_best([0.0, 1.0])
        [0.5, 0.75]
    """
    ordered = np.sort(_finite_values(values))
    ordered = ordered if higher_is_better else ordered[::-1]
    below = np.arange(len(ordered) + 1) / len(ordered)
    return [float(ordered @ np.diff(below**n)) for n in range(1, len(ordered) + 1)]


def steps_to_reach(history: Sequence[tuple[int, float]], target: float) -> int | None:
    """The first step at which the curve is at or above a target; None if it never is.

    Example:
        >>> steps_to_reach([(10, 0.5), (20, 0.9), (30, 0.8)], 0.9 * 0.95)
        20
    """
    return next((int(step) for step, value in sorted(history) if value >= target), None)


def area_under_curve(history: Sequence[tuple[int, float]]) -> float | None:
    """Mean height of a learning curve (trapezoids over the steps); its value for one point, None without points.

    Example:
        >>> area_under_curve([(0, 0.0), (10, 1.0), (30, 1.0)])
        0.8333333333333334
    """
    if not history:
        return None
    steps, values = np.array(sorted(dict(history).items()), dtype=np.float64).T
    if len(steps) == 1:
        return float(values[0])
    return float(np.sum((values[1:] + values[:-1]) / 2 * np.diff(steps)) / (steps[-1] - steps[0]))


def has_failed(row: RunRow, metric: str = "accuracy", majority: float | None = None) -> bool:
    """Whether a run did not finish, has no score, or has an accuracy at or below the majority class.

    Args:
        row: the run.
        metric: the score that must be there.
        majority: share of the most frequent class, for rows that do not know it themselves.

    Example:
        >>> has_failed(RunRow(init="he", lr=1.0, seed=0, val={"accuracy": 0.1}, majority=0.1))
        True
    """
    if row.status != "finished" or not _is_number(row.val.get(metric)):
        return True
    floor, accuracy = row.majority if row.majority is not None else majority, row.val.get("accuracy")
    return _is_number(floor) and _is_number(accuracy) and accuracy <= floor + 1e-12  # type: ignore[operator]


def analyse(
    rows: Iterable[RunRow], metric: str = "accuracy", majority: Mapping[str, float] | None = None, seed: int = 0
) -> tuple[BlockAnalysis, ...]:
    """Choose each scheme's setting on validation and compare the schemes on test, within each block.

    Args:
        rows: the runs, of one or several data sets, freeze policies and sample sizes.
        metric: a name of `headinit.analysis.metrics.HIGHER_IS_BETTER`.
        majority: data set -> share of its most frequent class, for rows that do not know it themselves.
        seed: of the resampling.

    Raises:
        DataError: no run has a score.

    Example:
        >>> rows = [RunRow(init=name, lr=lr, seed=s, val={"accuracy": base - lr}, test={"accuracy": base})
        ...         for name, base in (("he", 0.8), ("ridge", 0.9)) for lr in (0.1, 0.2) for s in range(3)]
        >>> block = analyse(rows)[0]
        >>> [(found.init, found.lr, round(found.mean.estimate, 3)) for found in block.summaries]
        [('ridge', 0.1, 0.9), ('he', 0.1, 0.8)]
    """
    blocks: dict[Block, list[RunRow]] = {}
    for row in rows:
        blocks.setdefault((row.data, row.freeze, row.per_class), []).append(row)
    found = [
        _analyse_block(block, own, metric, (majority or {}).get(block[0]), seed)
        for block, own in blocks.items()
        if any(_is_number(row.val.get(metric)) for row in own)
    ]
    if not found:
        count = sum(map(len, blocks.values()))
        raise DataError(f"Nothing to compare: none of {count} runs has a validation {metric}. Run them first.")
    return tuple(found)


def rank_over_data(analyses: Sequence[BlockAnalysis], alpha: float = ALPHA) -> Ranking | None:
    """Rank the schemes over the blocks on which all of them were run (Friedman's test, Nemenyi's critical difference).

    Returns:
        None with fewer than two schemes or two such blocks.

    Example:
        >>> rank_over_data([]) is None
        True
    """
    complete = [block for block in analyses if all(summary.mean for summary in block.summaries)]
    schemes = sorted({summary.init for block in analyses for summary in block.summaries})
    tables = [{s.init: s.mean.estimate for s in block.summaries if s.mean} for block in complete]
    kept = [(block, table) for block, table in zip(complete, tables, strict=True) if table.keys() == set(schemes)]
    if len(kept) < 2 or len(schemes) < 2:
        return None
    sign = 1 if HIGHER_IS_BETTER.get(analyses[0].metric, True) else -1
    scores = np.array([[sign * table[scheme] for scheme in schemes] for _, table in kept])
    return rank_schemes(schemes, [block.title for block, _ in kept], scores, alpha)


def rank_schemes(schemes: Sequence[str], data: Sequence[str], scores: np.ndarray, alpha: float = ALPHA) -> Ranking:
    """Mean ranks with Friedman's test and Nemenyi's critical difference q sqrt(k (k + 1) / 6N) (Demsar 2006).

    Args:
        schemes: k names.
        data: N names.
        scores: `(N, k)`, higher is better.

    Example:
        >>> found = rank_schemes(["a", "b", "c"], list("uvwxyz"), np.array([[3.0, 2.0, 1.0]] * 6))
        >>> found.mean_ranks, found.cliques
        ({'a': 1.0, 'b': 2.0, 'c': 3.0}, (('a', 'b'), ('b', 'c')))
    """
    from scipy import stats

    ranks = stats.rankdata(-np.asarray(scores), axis=1).mean(axis=0)
    order = np.argsort(ranks, kind="stable")
    count = len(schemes)
    q = stats.studentized_range.ppf(1 - alpha, count, np.inf) / math.sqrt(2)
    critical = float(q * math.sqrt(count * (count + 1) / (6 * len(data))))
    groups: list[tuple[int, int]] = []
    for start in range(count):
        stop = max(i for i in range(start, count) if ranks[order[i]] - ranks[order[start]] < critical + 1e-12)
        if stop > start and (not groups or stop > groups[-1][1]):
            groups.append((start, stop))
    return Ranking(
        mean_ranks={schemes[i]: float(ranks[i]) for i in order},
        data=tuple(data),
        friedman_p=_friedman(np.asarray(scores)),
        critical_difference=critical,
        cliques=tuple(tuple(schemes[i] for i in order[start : stop + 1]) for start, stop in groups),
    )


def smallest_p(pairs: int) -> float:
    """The least p that a two-sided paired permutation test over n pairs can give: 2 / 2^n, or 1 / 10,000 by sampling.

    Example:
        >>> smallest_p(5), smallest_p(1)
        (0.0625, 1.0)
    """
    return min(1.0, max(2.0 / 2.0**pairs, 2.0 / (RESAMPLES + 1)))


def pairs_needed(comparisons: int, alpha: float = ALPHA) -> int | None:
    """The least number of pairs with which a difference can be significant after Holm's correction; None if none can.

    Example:
        >>> pairs_needed(1), pairs_needed(45)
        (6, 11)
    """
    return next((n for n in range(1, 64) if smallest_p(n) * max(1, comparisons) < alpha), None)


def conclusion(
    rows: Iterable[RunRow],
    metric: str = "accuracy",
    *,
    majority: Mapping[str, float] | None = None,
    margin: float = 0.005,
    seed: int = 0,
) -> str:
    """What the runs say, in words: which schemes win, which are level, at what learning rate, and how sure that is.

    A scheme is *level* with the best one where the whole interval of the difference lies within the margin, *behind*
    it where the corrected p is below 0.05, *likely behind* where it loses each of three or more pairs without reaching
    that p, and *not told apart* otherwise.

    Args:
        rows: the runs.
        metric, majority, seed: as for `analyse`.
        margin: difference that does not matter, in units of the metric.

    Example:
        >>> rows = [RunRow(init=name, lr=0.1, seed=s, val={"accuracy": base + s / 1000}, data="digits")
        ...         for name, base in (("he", 0.8), ("ridge", 0.9)) for s in range(6)]
        >>> print(conclusion(rows).splitlines()[2].split(",")[0])
        Behind it (corrected p below 0.05): he (-10.0 points
    """
    return conclude(analyse(rows, metric, majority, seed), margin)


def conclude(analyses: Sequence[BlockAnalysis], margin: float = 0.005) -> str:
    """The words of `conclusion` for analyses that are there already: a paragraph per block, and one over all."""
    paragraphs = [conclude_block(block, margin) for block in analyses]
    ranking = rank_over_data(analyses)
    if ranking is not None:
        paragraphs.append(conclude_ranking(ranking))
    return "\n\n".join(paragraphs)


def conclude_block(block: BlockAnalysis, margin: float = 0.005) -> str:
    """The sentences about one block: best scheme, those behind, level and not told apart, failures, how sure."""
    standing = [summary for summary in block.summaries if summary.mean is not None]
    where = "test" if block.split == "test" else "validation (there is no test score, so the values are optimistic)"
    lines = [f"{block.title}: {block.metric} on {where}; each scheme at the setting that validation chose."]
    if not standing:
        return "\n".join([*lines, "Every run failed: none is above the majority class."])
    best = standing[0]
    failed = f"; {best.failed} of {best.runs} runs failed and are not in this mean" if best.failed else ""
    lines.append(
        f"Best: {best.init} at {setting_text(best, block)}, {_interval_text(best.mean, block.metric)}{failed}."
    )
    groups: dict[str, list[str]] = {name: [] for name in VERDICTS}
    for summary in standing[1:]:
        pair = pair_of(block, best.init, summary.init)
        if pair is None:
            groups["Not told apart"].append(f"{summary.init} (no shared seeds)")
        else:
            standing_now = verdict(pair, margin)
            text = _pair_text(pair, best.init, block.metric)
            p = f", p = {_p_text(pair.adjusted_p)}" if standing_now in ("Behind", "Not told apart") else ""
            groups[standing_now].append(f"{summary.init} ({text}{p})")
    titles = {
        "Behind": "Behind it (corrected p below 0.05)",
        "Likely behind": "Likely behind it (in every pair, yet not significant)",
        "Level": f"Level with it (the whole interval within {_amount(margin, block.metric)})",
        "Not told apart": "Not told apart from it",
    }
    lines += [f"{titles[name]}: {'; '.join(entries)}." for name, entries in groups.items() if entries]
    lines += _failure_lines(block)
    lines += _sureness_lines(block, best) + _rate_lines(block)
    return "\n".join(lines)


def conclude_ranking(ranking: Ranking) -> str:
    """The sentences about the ranking over data sets."""
    ranks = ", ".join(f"{scheme} {rank:.2f}" for scheme, rank in ranking.mean_ranks.items())
    lines = [f"Mean ranks over {len(ranking.data)} settings (1 is best): {ranks}."]
    test = "Friedman's test" if len(ranking.mean_ranks) > 2 else "Wilcoxon's signed-rank test"
    if ranking.friedman_p >= ALPHA:
        lines.append(f"{test} does not tell the schemes apart (p = {_p_text(ranking.friedman_p)}).")
    else:
        groups = "; ".join(", ".join(group) for group in ranking.cliques) or "none"
        lines.append(
            f"{test}: the schemes differ (p = {_p_text(ranking.friedman_p)}); critical difference of mean ranks "
            f"{ranking.critical_difference:.2f}; not told apart: {groups}."
        )
    return "\n".join(lines)


def verdict(pair: PairedComparison, margin: float = 0.005, alpha: float = ALPHA) -> str:
    """How the lesser of two schemes stands: one of `VERDICTS`.

    Example:
        >>> seeds = {(0, s): 0.9 + s / 1000 for s in range(5)}
        >>> pairs = compare_pairs({"ridge": seeds, "he": {unit: v - 0.1 for unit, v in seeds.items()}, "ncm": seeds})
        >>> [verdict(pair) for pair in pairs]
        ['Likely behind', 'Level', 'Likely behind']
    """
    low, high = pair.difference.low, pair.difference.high
    if low is not None and high is not None and -margin <= low and high <= margin:
        return "Level"
    if pair.adjusted_p < alpha:
        return "Behind"
    return "Likely behind" if pair.pairs >= 3 and pair.unanimous else "Not told apart"


def pair_of(block: BlockAnalysis, first: str, second: str) -> PairedComparison | None:
    """The comparison of two schemes, in either order; None if they share no runs."""
    return next((pair for pair in block.comparisons if {pair.first, pair.second} == {first, second}), None)


def setting_text(summary: SchemeSummary, block: BlockAnalysis) -> str:
    """The setting that validation chose, in words: ``lr 0.01``, with the weight decay where schemes differ in it."""
    decays = {other.weight_decay for other in block.summaries}
    decay = f", weight decay {summary.weight_decay:g}" if len(decays) > 1 or summary.weight_decay else ""
    return f"lr {summary.lr:g}{decay}"


def is_share(metric: str) -> bool:
    """Whether a metric is a share of 1 that reads best in percent."""
    return metric in ("accuracy", "balanced_accuracy", "macro_f1", "micro_f1", "map", "entity_f1")


def _finite_values(values: Sequence[float] | np.ndarray) -> np.ndarray:
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or not len(sample):
        raise DataError(f"A statistic needs a list of at least one value; found shape {sample.shape}.")
    if not np.isfinite(sample).all():
        raise DataError(
            f"A statistic needs finite values; {int((~np.isfinite(sample)).sum())} of {len(sample)} are NaN or "
            "infinite. Count these runs as failed instead."
        )
    return sample


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _analyse_block(block: Block, rows: list[RunRow], metric: str, majority: float | None, seed: int) -> BlockAnalysis:
    sign = 1.0 if HIGHER_IS_BETTER.get(metric, True) else -1.0
    schemes: dict[str, dict[tuple[float, float], list[RunRow]]] = {}
    for row in rows:
        schemes.setdefault(row.init, {}).setdefault((row.lr, row.weight_decay), []).append(row)
    worst = {split: _worst(rows, split, metric, sign) for split in ("val", "test")}
    chosen = {
        init: max(settings, key=lambda s: sign * np.mean([_score(r, "val", metric, worst) for r in settings[s]]))
        for init, settings in schemes.items()
    }
    selected = [row for init, setting in chosen.items() for row in schemes[init][setting]]
    finished = [row for row in selected if not has_failed(row, metric, majority)]
    split = "test" if finished and all(_is_number(row.test.get(metric)) for row in finished) else "val"
    best = max((value for row in rows for _, value in row.history), default=None)
    summaries = [
        _summarise(schemes[init], chosen[init], metric, split, worst, majority, best, seed) for init in schemes
    ]
    summaries.sort(key=lambda s: (s.mean is not None, sign * s.standing), reverse=True)
    comparisons = compare_pairs({summary.init: summary.scores for summary in summaries}, seed)
    return BlockAnalysis(*block, metric, split, tuple(summaries), comparisons)


def _worst(rows: Iterable[RunRow], split: str, metric: str, sign: float) -> float:
    found = [getattr(row, split).get(metric) for row in rows]
    return min((value for value in found if _is_number(value)), key=lambda value: sign * value, default=0.0)


def _score(row: RunRow, split: str, metric: str, worst: Mapping[str, float]) -> float:
    value = getattr(row, split).get(metric)
    return float(value) if _is_number(value) else worst[split]


def _summarise(
    settings: Mapping[tuple[float, float], list[RunRow]],
    chosen: tuple[float, float],
    metric: str,
    split: str,
    worst: Mapping[str, float],
    majority: float | None,
    best: float | None,
    seed: int,
) -> SchemeSummary:
    rows = settings[chosen]
    everything = [row for own in settings.values() for row in own]
    good = [row for row in rows if not has_failed(row, metric, majority)]
    values = [_score(row, split, metric, worst) for row in good]
    trials = [float(np.mean([_score(row, "val", metric, worst) for row in own])) for own in settings.values()]
    times = {share: _times_to(rows, None if best is None else share * best) for share in (0.9, 0.99)}
    return SchemeSummary(
        init=rows[0].init,
        lr=chosen[0],
        weight_decay=chosen[1],
        runs=len(rows),
        failed=len(rows) - len(good),
        runs_anywhere=len(everything),
        failed_anywhere=sum(has_failed(row, metric, majority) for row in everything),
        mean=bootstrap_interval(values, "mean", seed) if values else None,
        std=(float(np.std(values, ddof=1)) if len(values) > 1 else 0.0) if values else None,
        iqm=bootstrap_interval(values, "iqm", seed) if values else None,
        validation=float(np.mean([_score(row, "val", metric, worst) for row in rows])),
        scores={(row.split_seed, row.seed): _score(row, split, metric, worst) for row in rows},
        steps_to_90=times[0.9][0],
        steps_to_99=times[0.99][0],
        seconds_to_90=times[0.9][1],
        seconds_to_99=times[0.99][1],
        area=_mean_of(area_under_curve(row.history) for row in rows),
        seconds=float(np.mean([row.seconds for row in rows])),
        init_loss=_mean_of(row.init_loss for row in rows),
        feature_gradient=_mean_of(row.feature_gradient for row in rows),
        best_of=tuple(expected_best(trials, HIGHER_IS_BETTER.get(metric, True))),
        backbone_lr=max((row.backbone_lr for row in rows if row.backbone_lr is not None), default=None),
    )


def _times_to(rows: Sequence[RunRow], target: float | None) -> tuple[float | None, float | None]:
    """Median steps and seconds to a target; seconds are the run's own, shared out over its steps."""
    if target is None:
        return None, None
    reached = [steps_to_reach(row.history, target) for row in rows]
    steps = [math.inf if step is None else float(step) for step in reached]
    seconds = [
        step * row.seconds / row.steps if row.steps and math.isfinite(step) else step
        for step, row in zip(steps, rows, strict=True)
    ]
    lower_medians = (sorted(values)[(len(values) - 1) // 2] for values in (steps, seconds))
    first, second = (value if math.isfinite(value) else None for value in lower_medians)
    return first, second


def _mean_of(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return float(np.mean(known)) if known else None


def _friedman(scores: np.ndarray) -> float:
    from scipy import stats

    if (np.ptp(scores, axis=1) == 0).all():
        return 1.0  # all tied everywhere
    if scores.shape[1] == 2:
        return float(stats.wilcoxon(scores[:, 0], scores[:, 1]).pvalue)
    return float(stats.friedmanchisquare(*scores.T).pvalue)


def _amount(value: float, metric: str) -> str:
    return f"{100 * value:.2g} points" if is_share(metric) else f"{value:.3g}"


def _interval_text(interval: Interval | None, metric: str) -> str:
    assert interval is not None
    scale, unit = (100.0, " %") if is_share(metric) else (1.0, "")
    digits = 1 if is_share(metric) else 3
    text = f"{scale * interval.estimate:.{digits}f}{unit}"
    if interval.low is None or interval.high is None:
        return f"{text} (one run, so no interval)"
    low, high = scale * interval.low, scale * interval.high
    return f"{text} (95 % interval {low:.{digits}f} to {high:.{digits}f})"


def _pair_text(pair: PairedComparison, best: str, metric: str) -> str:
    sign = -1.0 if pair.first == best else 1.0
    scale, unit = (100.0, " points") if is_share(metric) else (1.0, "")
    digits = 1 if is_share(metric) else 3
    estimate = round(sign * scale * pair.difference.estimate, digits) + 0.0  # no -0.0
    text = f"{estimate:+.{digits}f}{unit}"
    if pair.difference.low is not None and pair.difference.high is not None:
        ends = (pair.difference.low, pair.difference.high)
        bounds = sorted(round(sign * scale * bound, digits) + 0.0 for bound in ends)
        text += f", interval {bounds[0]:+.{digits}f} to {bounds[1]:+.{digits}f}"
    return text


def _p_text(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1g}"


def _failure_lines(block: BlockAnalysis) -> list[str]:
    failures = [
        f"{summary.init} {summary.failed_anywhere} of {summary.runs_anywhere}"
        for summary in block.summaries
        if summary.failed_anywhere
    ]
    if not failures:
        return []
    return [f"Failed runs (at or below the majority class, or not finished), all settings: {', '.join(failures)}."]


def _rate_lines(block: BlockAnalysis) -> list[str]:
    shares = {s.init: f"{s.backbone_lr / s.lr:.3g}" for s in block.summaries if s.backbone_lr is not None}
    if len(set(shares.values())) < 2:
        return []
    named = ", ".join(f"{init} {share}" for init, share in shares.items())
    return [
        f"The pretrained layers trained at different shares of the head's rate ({named}): optim.backbone_share=0.1 "
        "compares the starts alone."
    ]


def _sureness_lines(block: BlockAnalysis, best: SchemeSummary) -> list[str]:
    if not block.comparisons:
        return ["How sure: there is nothing to compare it with."]
    pairs = min(pair.pairs for pair in block.comparisons)
    tests = len(block.comparisons)
    lines = [
        f"How sure: {pairs} paired run{'s' if pairs != 1 else ''} per pair of schemes, {tests} "
        f"test{'s' if tests != 1 else ''}, Holm's correction."
    ]
    if smallest_p(pairs) * tests >= ALPHA:
        needed = pairs_needed(tests)
        advice = f"{needed} pairs could" if needed else "compare fewer schemes"
        lines.append(
            f"With {pairs} no difference can be significant after that correction (its least p is "
            f"{_p_text(min(1.0, smallest_p(pairs) * tests))}); {advice}."
        )
    if best.std == 0 and best.runs > 1:
        lines.append(
            f"{best.init} gives the same value for every seed; vary split_seed to see how much depends on the data."
        )
    return lines
