"""The closing table of a run: where the head started, where it ended, what it cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from headinit.analysis.results import RunRecord

if TYPE_CHECKING:
    from rich.table import Table


def run_summary(record: RunRecord, folder: Path | None = None) -> Table:
    """A table for a person's terminal.

    Args:
        record: a finished run.
        folder: where its files are.

    Example:
        >>> run_summary(RunRecord({}, {}, {"loss": 2.3, "chance_loss": 2.3}, {"accuracy": 0.9})).row_count
        2
    """
    from rich.table import Table

    table = Table(show_header=False, title=None, box=None, padding=(0, 2, 0, 0))
    for label, text in _lines(record, folder):
        table.add_row(f"[bold]{label}[/bold]", text)
    return table


def _lines(record: RunRecord, folder: Path | None) -> list[tuple[str, str]]:
    start = record.init
    lines = [
        (
            "start",
            f"loss {_number(start.get('loss'))} (chance {_number(start.get('chance_loss'))}), "
            + (f"accuracy {_percent(start['accuracy'])}, " if start.get("accuracy") is not None else "")
            + f"{'output' if record.task == 'regression' else 'logit'} std {_number(start.get('logit_std'))}, "
            f"gradient into the features {_number(start.get('feature_gradient'))}",
        ),
        ("end", f"validation: {_metrics(record.val)} (best epoch {record.best_epoch}, {record.steps} steps)"),
    ]
    if record.test is not None:
        lines.append(("", f"test: {_metrics(record.test)}"))
    counts = record.parameters
    if counts:
        unchanged = record.frozen_digest.get("before") == record.frozen_digest.get("after")
        held = "bit-identical after training" if unchanged else "CHANGED during training"
        lines.append(
            (
                "parameters",
                f"{counts['new']:,} new, {counts['trainable']:,} trainable, {counts['frozen']:,} frozen"
                + (f" ({held})" if counts["frozen"] else ""),
            )
        )
    if record.rates:
        lines.append(("rates", ", ".join(f"{name} {rate:.3g}" for name, rate in record.rates.items())))
    if record.seconds:
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in record.seconds.items())
        lines.append(("seconds", f"{phases}; {sum(record.seconds.values()):.1f} in all"))
    for warning in start.get("warnings") or ():  # type: ignore[union-attr]
        lines.append(("warning", f"[yellow]{warning}[/yellow]"))
    if not record.pretrained:
        lines.append(("warning", "[yellow]the backbone's weights were random, by request[/yellow]"))
    if folder is not None:
        lines.append(("result", str(folder)))
    return lines


def _metrics(values) -> str:
    names = {
        "accuracy": "accuracy",
        "entity_f1": "entity F1",
        "micro_f1": "micro-F1",
        "macro_f1": "macro-F1",
        "map": "mAP",
        "mcc": "MCC",
        "nll": "NLL",
        "ece": "ECE",
        "mae": "MAE",
        "r2": "R2",
        "pearson": "Pearson",
        "spearman": "Spearman",
    }
    shares = ("accuracy", "entity_f1", "micro_f1", "macro_f1", "map")
    shown = {key: values[key] for key in names if key in values} or dict(values)
    return ", ".join(
        f"{names.get(key, key)} {_percent(value) if key in shares else _number(value)}" for key, value in shown.items()
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"
