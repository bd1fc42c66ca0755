"""Published against measured: the interval of the difference, and what it allows to say."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

from headinit.reproduction.baselines import Published

ROUNDING = 0.05
"""Published percentages are rounded, at best to a tenth of a point: half of that is known of them no better."""

RULE = (
    "The difference is measured minus published, in points, with its interval: Welch's t where both spreads are known; "
    "where the publication gives none, its number counts as a mean over its seeds with our spread; with one seed here, "
    "their spread stands for ours. Half a tenth is added on both sides for rounding. **Off by x**: the interval leaves "
    "out 0. **Reproduced**: it holds 0 and lies within the margin, the larger of the row's own (1 point) and two "
    "published standard deviations. **Cannot tell** with n seeds: everything else. A run with another backbone, other "
    "data or other settings than the recipe's is a **stand-in** and reproduces nothing."
)
"""The rule in words, as the table prints it."""


@dataclass(frozen=True)
class Judgement:
    """What a measurement says about a published number; all in percent.

    Attributes:
        verdict: ``"reproduced"``, ``"off"`` or ``"cannot tell"``.
        measured: mean (or median) of the runs.
        difference: measured minus published.
        interval: of the difference; None where no spread is known.
        seeds: number of runs.
    """

    verdict: str
    measured: float
    difference: float
    interval: tuple[float, float] | None
    seeds: int

    @property
    def text(self) -> str:
        """For people.

        Example:
            >>> Judgement("off", 90.0, -2.0, (-3.0, -1.0), 5).text
            'off by -2.00 [-3.00, -1.00]'
        """
        runs = f"{self.seeds} seed{'s' if self.seeds > 1 else ''}"
        if self.interval is None:
            return f"cannot tell with {runs} ({self.difference:+.2f})"
        bounds = f"[{self.interval[0]:+.2f}, {self.interval[1]:+.2f}]"
        if self.verdict == "off":
            return f"off by {self.difference:+.2f} {bounds}"
        told = self.verdict if self.verdict == "reproduced" else f"cannot tell with {runs}"
        return f"{told} ({self.difference:+.2f} {bounds})"


def judge(published: Published, values: Sequence[float], *, margin: float = 1.0, confidence: float = 0.95) -> Judgement:
    """What runs say about a published number, by the rule `RULE`.

    Args:
        published: the number and its spread.
        values: of the runs, one a seed, in percent.
        margin: points that do not matter.
        confidence: of the interval.

    Example:
        >>> judge(Published("val.accuracy", 90.0, std=0.4, seeds=5), [90.1, 90.3, 89.8, 90.0, 89.9]).verdict
        'reproduced'
        >>> judge(Published("val.accuracy", 90.0), [91.0]).text
        'cannot tell with 1 seed (+1.00)'
    """
    centre = statistics.median(values) if published.statistic == "median" else statistics.fmean(values)
    low, high = published.bounds if published.range_only and published.bounds else (published.value, published.value)
    difference = centre - min(max(centre, low), high)
    spread = _standard_error(published, values)
    if spread is None:
        return Judgement("cannot tell", centre, difference, None, len(values))
    error, freedom = spread
    half = float(stats.t.ppf(0.5 + confidence / 2, freedom)) * error + ROUNDING
    interval = (difference - half, difference + half)
    allowed = max(margin, 2 * published.std if published.std is not None else 0.0)
    verdict = "cannot tell"
    if not interval[0] <= 0.0 <= interval[1]:
        verdict = "off"
    elif -allowed <= interval[0] and interval[1] <= allowed:
        verdict = "reproduced"
    return Judgement(verdict, centre, difference, interval, len(values))


def _standard_error(published: Published, values: Sequence[float]) -> tuple[float, float] | None:
    """Standard error of the difference and its degrees of freedom; None where no spread is known."""
    ours, theirs = len(values), published.seeds
    # The median of a normal sample varies pi / 2 times as much as its mean.
    factor = math.pi / 2 if published.statistic == "median" else 1.0
    if ours >= 2:
        variance = statistics.variance(values)
        if published.std is None or theirs < 2:
            return math.sqrt(factor * variance * (1 / ours + 1 / theirs)), ours - 1
        first, second = variance / ours, published.std**2 / theirs
        freedom = (first + second) ** 2 / (first**2 / (ours - 1) + second**2 / (theirs - 1)) if first + second else 1.0
        return math.sqrt(factor * (first + second)), freedom
    if published.std is None or theirs < 2:
        return None
    return math.sqrt(factor * published.std**2 * (1 + 1 / theirs)), theirs - 1
