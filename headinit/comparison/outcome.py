"""Finished runs and what follows from them."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headinit.analysis import plots
from headinit.analysis.metrics import HIGHER_IS_BETTER
from headinit.analysis.report import Starts, Winner, comparison_table, write_comparison, write_report
from headinit.analysis.results import RunRow, read_runs, rows_from
from headinit.analysis.statistics import SchemeSummary, analyse, conclusion
from headinit.errors import ConfigError, DataError, unknown_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table


@dataclass(frozen=True)
class Comparison:
    """Finished runs and what follows from them.

    Attributes:
        rows: one per run.
        metric: the validation metric that chooses settings and epochs.
        starts: how the heads start, for the report.
        winner: the mistakes of the best head, for the report.
        configuration: what was compared, for the report.
        margin: difference of the metric that does not matter.

    Example:
        >>> runs = [RunRow(init=name, lr=0.1, seed=s, val={"accuracy": base}, test={"accuracy": base})
        ...         for name, base in (("he", 0.8), ("ridge", 0.9)) for s in range(3)]
        >>> Comparison(tuple(runs)).best().init
        'ridge'
    """

    rows: tuple[RunRow, ...]
    metric: str = "accuracy"
    starts: Starts | None = None
    winner: Winner | None = None
    configuration: Mapping[str, Any] | None = None
    margin: float = 0.005

    def best(self) -> SchemeSummary:
        """The scheme and setting with the best mean on validation; its test scores are in it.

        Of several data sets, freeze policies or sample sizes, the block with the best scheme is taken.
        """
        sign = 1 if HIGHER_IS_BETTER.get(self.metric, True) else -1
        found = [summary for block in analyse(self.rows, self.metric) for summary in block.summaries]
        return max(found, key=lambda summary: sign * summary.validation)

    def conclusion(self) -> str:
        """What the runs say, in words."""
        return conclusion(self.rows, self.metric, margin=self.margin)

    def rich_table(self) -> Table:
        """The table for a terminal."""
        return comparison_table(self.rows, metric=self.metric, margin=self.margin)

    def table(self, width: int = 140) -> str:
        """The schemes, best first, each at the setting that validation chose, as text."""
        from rich.console import Console

        console = Console(file=io.StringIO(), width=width)
        console.print(self.rich_table())
        return console.file.getvalue()  # type: ignore[attr-defined]

    def plot(self, kind: str = "scores", block: int = 0) -> Figure:
        """A figure: ``"scores"``, ``"curves"``, ``"rates"`` (scheme x learning rate), ``"starts"`` or ``"budget"``.

        Raises:
            ConfigError: another kind, or no such block.
        """
        blocks = analyse(self.rows, self.metric)
        if not 0 <= block < len(blocks):
            raise ConfigError(f"There are {len(blocks)} blocks, 0 to {len(blocks) - 1}; block={block} is none of them.")
        chosen = blocks[block]
        figures: dict[str, Callable[[], Figure]] = {
            "scores": lambda: plots.scheme_scores(chosen),
            "curves": lambda: plots.learning_curves(self.rows, chosen),
            "rates": lambda: plots.rate_heat_map(self.rows, chosen),
            "starts": lambda: plots.start_overview(chosen, self.starts.chance_loss if self.starts else None),
            "budget": lambda: plots.expected_best_curves(chosen),
        }
        if kind not in figures:
            raise unknown_name("plot", kind, figures)
        return figures[kind]()

    def report(self, path: str | os.PathLike[str], plot_folder: str | os.PathLike[str] | None = None) -> Path:
        """Write the report: one HTML file, pictures inside, that opens without a network."""
        return write_report(
            path,
            self.rows,
            metric=self.metric,
            margin=self.margin,
            starts=self.starts,
            winner=self.winner,
            configuration=self.configuration,
            plot_folder=plot_folder,
        )

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write comparison.csv, comparison.json, report.html and the plots (PNG) into a folder."""
        target = Path(folder)
        write_comparison(target, self.rows, metric=self.metric, margin=self.margin)
        self.report(target / "report.html", plot_folder=target / "plots")
        return target

    def __str__(self) -> str:
        return f"{self.table()}\n{self.conclusion()}"


def compare_runs(root: str | os.PathLike[str], *, metric: str | None = None, margin: float = 0.005) -> Comparison:
    """The comparison of runs that `finetune.py` (a Hydra multirun, say) has left in a folder, finished or not.

    Args:
        root: folder; runs may lie at any depth.
        metric: None for the one that chooses the best epoch in the runs.

    Raises:
        DataError: there is no such folder, or no finished run in it.
    """
    records = read_runs(root)
    if not records:
        raise DataError(f"No finished run in {root}: finetune.py leaves a result.json in each run's folder.")
    monitors = {(record.config.get("trainer") or {}).get("monitor") or "accuracy" for record in records}
    if metric is None and len(monitors) > 1:
        raise ConfigError(
            f"The runs in {root} chose by different metrics ({', '.join(sorted(monitors))}): give metric=."
        )
    return Comparison(tuple(rows_from(records)), metric or monitors.pop(), margin=margin)
