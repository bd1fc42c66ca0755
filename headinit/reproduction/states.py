"""The state of every published row: run here, run elsewhere by whom and when, or never run; and its table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from headinit.analysis.results import write_json, write_text
from headinit.errors import ConfigError
from headinit.reproduction.baselines import Row
from headinit.reproduction.judgement import RULE


@dataclass(frozen=True)
class State:
    """One reproduction, or stand-in, that was run to its end.

    Attributes:
        row: its name.
        date: ISO date of the end.
        by: who ran it elsewhere; None where it was run on the machine that keeps the table.
        seeds: number of runs.
        differences: what was changed in the recipe; empty for a reproduction.
        measured: values of the runs by metric, in percent.
        verdicts: by metric.
        versions: of the libraries.
        seconds: wall-clock seconds of the runs, without those of a search.
    """

    row: str
    date: str
    by: str | None
    seeds: int
    differences: tuple[str, ...]
    measured: Mapping[str, Sequence[float]]
    verdicts: Mapping[str, str]
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def text(self) -> str:
        """For the table.

        Example:
            >>> State("a/b", "2026-01-02", None, 1, (), {"val.accuracy": [94.1]}, {"val.accuracy": "reproduced"}).text
            'run here on 2026-01-02: accuracy 94.10: reproduced'
        """
        who = "run here" if self.by is None else f"run by {self.by}"
        numbers = "; ".join(
            f"{metric.removeprefix('val.').replace('.', ' ')} {sum(values) / len(values):.2f}: {self.verdicts[metric]}"
            for metric, values in self.measured.items()
        )
        libraries = ", ".join(f"{name} {self.versions[name]}" for name in ("torch",) if name in self.versions)
        text = f"{who} on {self.date}{f' ({libraries})' if libraries else ''}: {numbers}"
        return f"**stand-in**, not this row: {'; '.join(self.differences)}; {text}" if self.differences else text


def read_states(path: Path) -> list[State]:
    """The states that a file keeps; none where there is no file.

    Raises:
        ConfigError: the file is damaged.
    """
    if not path.is_file():
        return []
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return [State(**{**entry, "differences": tuple(entry["differences"])}) for entry in entries]
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} is damaged ({error}): restore it, or delete it to begin anew.") from error


def with_state(states: Sequence[State], new: State) -> list[State]:
    """The states with a new one in the place of an older one of the same row, changes and person."""
    same = (new.row, new.differences, new.by)
    return [*(state for state in states if (state.row, state.differences, state.by) != same), new]


def write_states(path: Path, states: Sequence[State]) -> None:
    """Keep the states, sorted."""
    ordered = sorted(states, key=lambda state: (state.row, state.differences, state.by or ""))
    write_json(path, [asdict(state) for state in ordered])


def write_table(path: Path, rows: Sequence[Row], states: Sequence[State]) -> None:
    """`docs/baselines.md`: every row, its published number, and what has been run of it."""
    families: dict[str, list[Row]] = {}
    for row in rows:
        families.setdefault(row.family, []).append(row)
    reproduced = {state.row for state in states if not state.differences}
    lines = [
        "# Published baselines",
        "",
        "Written by `python scripts/reproduce.py`; do not edit. `python scripts/reproduce.py baseline=NAME` runs a row",
        "by its recipe (`conf/baseline/`), with the published number of seeds, and judges it.",
        "",
        f"{len(rows)} rows, {len(reproduced)} of them run. What has not been run claims nothing.",
        "",
        RULE,
    ]
    for family, members in families.items():
        lines += ["", f"## {family}: {members[0].title}", "", f"Source: {members[0].source}", ""]
        lines += [f"Known difference: {note}" for note in members[0].notes if all(note in m.notes for m in members)]
        lines += ["", "| row | published | state |", "|---|---|---|"]
        for row in members:
            published = "; ".join(number.text for number in row.published)
            lines.append(f"| {row.name} | {published} | {state_text(row, states)} |")
    write_text(path, "\n".join(lines) + "\n")


def state_text(row: Row, states: Sequence[State]) -> str:
    """What has been run of a row.

    Example:
        >>> state_text(Row("a/b", "runs", "", "", (), ()), [])
        'never run'
    """
    own = [state.text for state in states if state.row == row.name]
    if row.unsupported is not None:
        own.insert(0, f"cannot be run: {row.unsupported}")
    if not any(state.row == row.name and not state.differences for state in states) and row.unsupported is None:
        own.insert(0, "never run")
    return "<br>".join(own)
