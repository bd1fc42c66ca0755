"""Published baselines as `conf/baseline/` states them: recipe, number and spread, row by row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from headinit.errors import ConfigError, unknown_name

FOLDER = "baseline"
KINDS = ("runs", "linear_protocol")
"""Kinds of job that rows describe. A file of another kind is one job as a whole, see `Baseline.kind`."""


@dataclass(frozen=True)
class Published:
    """A number that others have measured, in percent.

    Attributes:
        metric: the part of the data and the metric, such as ``"val.accuracy"``.
        value: their mean, median or single value; the middle of `bounds` where only those are known.
        std, median, maximum: over their seeds, where they say.
        bounds: smallest and largest of their values, or of several reports.
        range_only: whether `bounds` is all that is known; any value between them agrees.
        statistic: what `value` is: ``"mean"`` or ``"median"``.
        seeds: how many runs it sums up.
    """

    metric: str
    value: float
    std: float | None = None
    median: float | None = None
    maximum: float | None = None
    bounds: tuple[float, float] | None = None
    range_only: bool = False
    statistic: str = "mean"
    seeds: int = 1

    @property
    def text(self) -> str:
        """For tables.

        Example:
            >>> Published("val.accuracy", 57.69, std=1.1, seeds=5).text
            'accuracy 57.69 ± 1.1 (5 seeds)'
        """
        part, _, name = self.metric.partition(".")
        where = "" if part == "val" else f"{part} "
        bounds = "" if self.bounds is None else f"{self.bounds[0]:g} to {self.bounds[1]:g}"
        number = bounds if self.range_only else f"{self.value:g}"
        spread = f" ± {self.std:g}" if self.std is not None else ""
        more = [bounds] if bounds and not self.range_only else []
        more += [f"{self.seeds} seed{'s' if self.seeds > 1 else ''}"]
        more += ["median"] if self.statistic == "median" else []
        more += [f"median {self.median:g}"] if self.median is not None else []
        more += [f"max {self.maximum:g}"] if self.maximum is not None else []
        return f"{where}{name} {number}{spread} ({', '.join(more)})"


@dataclass(frozen=True)
class Search:
    """Hyper-parameters that the recipe chooses on validation data.

    Attributes:
        grid: settings and the values each may take; every combination is run.
        by: what chooses, such as ``"val.accuracy"``.
        refit: run the chosen combination again on training and validation data together.
    """

    grid: Mapping[str, Sequence[Any]]
    by: str
    refit: bool = False


@dataclass(frozen=True)
class Row:
    """One published row.

    Attributes:
        name: ``"FILE/ROW"``, as on the command line.
        kind: ``"runs"`` or ``"linear_protocol"``.
        title, source: of the publication.
        settings: the recipe, as arguments of `scripts/finetune.py`.
        published: the numbers.
        seeds: how many runs the publication sums up, and a reproduction makes.
        search: hyper-parameters that the recipe searches for.
        margin: difference in points that does not matter.
        confidence: of the intervals.
        examples: number of training and validation examples (and of test ones) of the data; None where not pinned.
        files: what to put where, for weights and data that no library fetches by name.
        notes: where this recipe is known to differ from the published one.
        needs: settings that the user must give, because no library fetches what they name.
        unsupported: why headinit cannot run it; None where it can.
    """

    name: str
    kind: str
    title: str
    source: str
    settings: tuple[str, ...]
    published: tuple[Published, ...]
    seeds: int = 1
    search: Search | None = None
    margin: float = 1.0
    confidence: float = 0.95
    examples: tuple[int, ...] | None = None
    files: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    unsupported: str | None = None

    @property
    def family(self) -> str:
        """The file that the row stands in."""
        return self.name.partition("/")[0]


@dataclass(frozen=True)
class Baseline:
    """A file of `conf/baseline/`.

    Attributes:
        name: of the file.
        kind: ``"runs"`` or ``"linear_protocol"`` for published rows; anything else names a job of another kind, which
            reads the content itself.
        content: the file as it is.
        rows: the published rows; empty for another kind.
    """

    name: str
    kind: str
    content: Mapping[str, Any]
    rows: tuple[Row, ...]


def baseline_names(configurations: Path) -> tuple[str, ...]:
    """The files of `conf/baseline/`."""
    return tuple(sorted(path.stem for path in (configurations / FOLDER).glob("*.yaml")))


def read_baseline(configurations: Path, name: str) -> Baseline:
    """A file of `conf/baseline/`.

    Raises:
        ConfigError: no such file, or a row that says too little.
    """
    names = baseline_names(configurations)
    if name not in names:
        raise unknown_name("baseline", name, names)
    content = yaml.safe_load((configurations / FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    kind = content.get("kind", "runs")
    rows = _rows(name, content) if kind in KINDS else ()
    return Baseline(name, kind, content, rows)


def find_rows(configurations: Path, wanted: str) -> tuple[Row, ...]:
    """The rows of ``"all"``, of a file, or one row ``"FILE/ROW"``.

    Raises:
        ConfigError: no such file or row, or a file whose job is not made of rows.
    """
    if wanted == "all":
        return tuple(row for name in baseline_names(configurations) for row in read_baseline(configurations, name).rows)
    family, _, own = wanted.partition("/")
    baseline = read_baseline(configurations, family)
    if not baseline.rows:
        raise ConfigError(f"baseline={family} is a job of the kind {baseline.kind!r}, not a list of published rows.")
    rows = {row.name: row for row in baseline.rows}
    if not own:
        return baseline.rows
    if wanted not in rows:
        raise unknown_name(f"row of baseline={family}", own, [name.partition("/")[2] for name in rows])
    return (rows[wanted],)


def arguments_with(row: Row, overrides: Sequence[str]) -> tuple[str, ...]:
    """The recipe's arguments, then the user's; a group that the user chooses replaces all that the recipe sets in it.

    Example:
        >>> row = Row("a/b", "runs", "", "", ("model=resnet18", "model.pooling=mean", "optim.lr=1"), ())
        >>> arguments_with(row, ["model=minilm"])
        ('optim.lr=1', 'model=minilm')
    """
    chosen = {key for key, _, _ in (item.partition("=") for item in overrides) if "." not in key}

    def replaced(setting: str) -> bool:
        return setting.lstrip("+").partition("=")[0].partition(".")[0] in chosen

    return (*(setting for setting in row.settings if not replaced(setting)), *overrides)


_SINGLE = ("kind", "seeds", "search", "margin", "confidence", "examples", "metric", "unsupported")
_LISTS = ("settings", "files", "notes", "needs")
_KNOWN = {"title", "source", "recipes", "data", "averages", "published", *_SINGLE, *_LISTS}


def _rows(family: str, content: Mapping[str, Any]) -> tuple[Row, ...]:
    """Every recipe on every data set for which there is a number."""
    recipes, data = content.get("recipes") or {"": {}}, content.get("data") or {"": {}}
    table = content["published"]
    for scope in (content, *recipes.values(), *data.values()):
        for given in scope:
            if given not in _KNOWN:
                raise unknown_name(f"key of baseline {family}", given, _KNOWN)
    rows = []
    for recipe in recipes:
        cells = table[recipe] if recipe else table
        for chosen in data:
            number = cells.get(chosen) if chosen else cells
            if number is not None:
                name = "_".join(part for part in (recipe, chosen) if part)
                rows.append(_row(f"{family}/{name}", (content, recipes[recipe], data[chosen]), number))
    return tuple(rows)


def _row(name: str, scopes: Sequence[Mapping[str, Any]], number: Any) -> Row:
    """A row from its file, its recipe and its data; what is said last holds, lists add up."""
    values: dict[str, Any] = {key: value for scope in scopes for key, value in scope.items() if key in _SINGLE}
    lists = {key: tuple(_flattened(value for scope in scopes for value in scope.get(key, ()))) for key in _LISTS}
    several = isinstance(number, Mapping) and any("." in key for key in number)
    numbers = number if several else {values["metric"]: number}
    seeds, search = int(values.get("seeds", 1)), values.get("search")
    first = next(iter(numbers)).partition(".")[2]
    return Row(
        name=name,
        kind=values.get("kind", "runs"),
        title=scopes[0]["title"],
        source=scopes[0]["source"],
        published=tuple(_published(metric, found, seeds) for metric, found in numbers.items()),
        seeds=seeds,
        search=None
        if search is None
        else Search(search["grid"], search.get("by", f"val.{first}"), bool(search.get("refit"))),
        margin=float(values.get("margin", 1.0)),
        confidence=float(values.get("confidence", 0.95)),
        examples=tuple(values["examples"]) if values.get("examples") else None,
        unsupported=values.get("unsupported"),
        **lists,
    )


def _flattened(values: Iterable[Any]) -> Iterator[Any]:
    """Lists inside lists, as YAML's aliases leave them, as one."""
    for value in values:
        if isinstance(value, list):
            yield from _flattened(value)
        else:
            yield value


def _published(metric: str, number: Any, seeds: int) -> Published:
    if not isinstance(number, Mapping):
        return Published(metric, float(number), seeds=seeds)
    bounds = (float(number["low"]), float(number["high"])) if "low" in number else None
    statistic = "mean" if "mean" in number or "median" not in number else "median"
    value = number.get("mean", number.get("value"))
    if value is None:
        assert bounds is not None
        value = sum(bounds) / 2
    return Published(
        metric,
        float(value),
        std=number.get("std"),
        median=number.get("median") if statistic == "mean" else None,
        maximum=number.get("max"),
        bounds=bounds,
        range_only=bounds is not None and not {"mean", "value"} & set(number),
        statistic=number.get("statistic", statistic),
        seeds=int(number.get("seeds", seeds)),
    )
