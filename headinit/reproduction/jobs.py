"""The runs of a published row: one a seed, after a search where the recipe has one; each an ordinary, resumable run."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from headinit.analysis.metrics import HIGHER_IS_BETTER
from headinit.analysis.results import library_versions, write_json
from headinit.config import Settings, as_mapping, composed_settings, run_id, settings_from
from headinit.errors import ConfigError
from headinit.experiment import run
from headinit.reproduction.baselines import Row, arguments_with
from headinit.reproduction.judgement import Judgement, judge
from headinit.reproduction.linear import run_linear_protocol
from headinit.reproduction.requirements import Requirements, differences
from headinit.reproduction.states import State

Scores = Mapping[str, Any]
"""``{"val": metrics, "test": metrics or None, "seconds": number}`` of one run."""


@dataclass(frozen=True)
class Reproduction:
    """What came of a row.

    Attributes:
        state: what the table keeps.
        judgements: for each published number, in order.
    """

    state: State
    judgements: tuple[Judgement, ...]


def check_row(
    row: Row, configurations: Path, overrides: Sequence[str], requirements: Requirements
) -> tuple[Settings, tuple[int, ...]]:
    """The settings of a row's first run and the sizes of its splits, if its weights and data are there.

    Raises:
        RequirementError: they are not.
        ConfigError: the overrides do not suit the recipe.
    """
    settings = composed_settings(configurations, arguments_with(row, overrides))
    chosen = any(override.startswith("data=") for override in overrides)
    return settings, requirements.check(row, settings, other_data=chosen)


def run_row(
    row: Row,
    configurations: Path,
    overrides: Sequence[str],
    folder: Path,
    *,
    seeds: int | None = None,
    by: str | None = None,
    console: Console | None = None,
) -> Reproduction:
    """Run a row by its recipe and judge it.

    Args:
        row: what to run.
        configurations: the folder `conf`.
        overrides: the user's own arguments: where data are, or what makes this a stand-in.
        folder: where the runs go, each in a folder of its own; finished ones are not repeated.
        seeds: how many; None for as many as the publication.
        by: who runs it, where that is not here.
        console: where runs report; None is the terminal.

    Raises:
        RequirementError: weights or data are not there; nothing has been written.
    """
    console = console or Console()
    count = row.seeds if seeds is None else seeds
    if count < 1:
        raise ConfigError(f"seeds={count}: at least one run is needed.")
    own = composed_settings(configurations, row.settings)
    asked, counts = check_row(row, configurations, overrides, Requirements())
    chosen = asked if row.search is None else _searched(row, asked, folder, console)
    scores = [
        _run(row, dataclasses.replace(chosen, seed=seed, order_seed=seed), folder, console) for seed in range(count)
    ]
    measured = {number.metric: [100 * _score(s, number.metric) for s in scores] for number in row.published}
    judgements = tuple(
        judge(number, measured[number.metric], margin=row.margin, confidence=row.confidence) for number in row.published
    )
    changed = differences(row, own, asked, counts)
    state = State(
        row=row.name,
        date=datetime.date.today().isoformat(),
        by=by,
        seeds=count,
        differences=changed,
        measured=measured,
        verdicts={
            number.metric: judgement.text if not changed else f"stand-in ({judgement.difference:+.2f})"
            for number, judgement in zip(row.published, judgements, strict=True)
        },
        versions=library_versions(),
        seconds=round(sum(float(s.get("seconds", 0.0)) for s in scores), 1),
    )
    return Reproduction(state, judgements)


def _searched(row: Row, settings: Settings, folder: Path, console: Console) -> Settings:
    """The settings with the values that validation data prefer; of equals the first."""
    assert row.search is not None
    names, values = list(row.search.grid), list(row.search.grid.values())
    sign = 1 if HIGHER_IS_BETTER[row.search.by.partition(".")[2]] else -1
    tried: list[tuple[float, Settings]] = []
    for combination in itertools.product(*values):
        candidate = _with(settings, dict(zip(names, combination, strict=True)))
        console.print(f"[bold]search[/bold] {dict(zip(names, combination, strict=True))}", highlight=False)
        tried.append((sign * _score(_run(row, candidate, folder / "search", console), row.search.by), candidate))
    best = max(tried, key=lambda pair: pair[0])[1]
    if not row.search.refit:
        return best
    return _with(best, {"data.join_validation": True, "trainer.select": "last"})


def _with(settings: Settings, values: Mapping[str, Any]) -> Settings:
    """Settings with some values changed, by their full names."""
    changed = as_mapping(settings)
    for name, value in values.items():
        group, _, key = name.partition(".")
        changed[group][key] = value
    return settings_from(changed)


def _run(row: Row, settings: Settings, folder: Path, console: Console) -> Scores:
    place = folder / row.name.replace("/", "-") / run_id(as_mapping(settings))
    if row.kind == "linear_protocol":
        return _linear(settings, place)
    record = run(settings, place, console)
    return {"val": record.val, "test": record.test, "seconds": sum(record.seconds.values())}


def _linear(settings: Settings, place: Path) -> Scores:
    path = place / "linear.json"
    if not path.is_file():
        began = time.perf_counter()
        scores = run_linear_protocol(settings) | {"seconds": time.perf_counter() - began}
        place.mkdir(parents=True, exist_ok=True)
        write_json(path, scores)
    return json.loads(path.read_text(encoding="utf-8"))


def _score(scores: Scores, metric: str) -> float:
    """One score; ``val.accuracy+f1`` is the mean of the two."""
    part, _, names = metric.partition(".")
    found = scores.get(part) or {}
    values = [found.get(name) for name in names.split("+")]
    if any(value is None for value in values):
        raise ConfigError(f"The published number is {metric}, and the run has no such score: it has {dict(found)}.")
    return sum(float(value or 0.0) for value in values) / len(values)
