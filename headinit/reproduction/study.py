"""A study: many comparisons under one plan, their tables, and the tests that the plan names.

A part of the study is one comparison: a stage (frozen features, fine-tuning, ...) on one data set with one share of its
labels. Parts are run by `headinit.comparison`, so a study that was stopped goes on where it stood.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from headinit.analysis.results import RunRow, append_metrics, read_metrics, write_text
from headinit.analysis.statistics import (
    PairedComparison,
    Ranking,
    analyse,
    compare_with,
    rank_schemes,
    steps_to_reach,
)
from headinit.comparison import compare_settings, plan_from
from headinit.comparison.grid import cell_settings
from headinit.comparison.runs import run_folder
from headinit.config import composed
from headinit.errors import ConfigError, DataError
from headinit.features.cache import FeatureCache


@dataclass(frozen=True)
class Part:
    """One comparison of a study.

    Attributes:
        stage, data, share: which; `share` names the part of the labels, "" where there is one size only.
        modality: ``"pictures"`` or ``"text"``.
        overrides: of `conf/compare.yaml`.
    """

    stage: str
    data: str
    share: str
    modality: str
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        """The folder of the part.

        Example:
            >>> Part("frozen", "trec", "10 %", "text", ()).name
            'frozen/trec/10'
        """
        return "/".join(part for part in (self.stage, self.data, self.share.rstrip(" %")) if part)


def parts_of(study: Mapping[str, Any], root: str | Path) -> list[Part]:
    """The comparisons that a study consists of, in the order of its stages.

    Args:
        study: ``stages`` (name -> ``init``, ``overrides``, ``sizes``) and ``sets`` (name -> ``modality``, ``folder``,
            ``overrides``, and the overrides of each stage that it takes part in, under the stage's name).
        root: folder that holds the folders of the sets; ``{root}`` in an override stands for it.

    Raises:
        ConfigError: a set names a stage that is not there.

    Example:
        >>> stages = {"frozen": {"init": ["he", "ridge"], "overrides": ["seeds=2"], "sizes": {"all": None}}}
        >>> sets = {"trec": {"modality": "text", "overrides": ["data.root={root}/trec"], "frozen": []}}
        >>> parts_of({"stages": stages, "sets": sets}, "data")[0].overrides
        ('inits=[he,ridge]', 'seeds=2', 'data.root=data/trec')
    """
    stages, parts = study["stages"], []
    for name, entry in study["sets"].items():
        known = {"modality", "folder", "overrides", "sizes", *stages}
        if unknown := sorted(set(entry) - known):
            raise ConfigError(f"The study's set {name} has {', '.join(unknown)}: use {', '.join(sorted(known))}.")
    for stage, plan in stages.items():
        for name, entry in study["sets"].items():
            if stage not in entry:
                continue
            sizes = {**(plan.get("sizes") or {"": None}), **((entry.get("sizes") or {}) if plan.get("sizes") else {})}
            for share, size in sizes.items():
                overrides = [
                    f"inits=[{','.join(plan['init'])}]",
                    *plan["overrides"],
                    *entry["overrides"],
                    *entry[stage],
                ]
                overrides += [] if size is None else [f"data.train_size={size}"]
                filled = tuple(text.replace("{root}", str(root)) for text in overrides)
                parts.append(Part(stage, name, "" if size is None and not share else share, entry["modality"], filled))
    return parts


def missing_folders(study: Mapping[str, Any], root: str | Path) -> list[str]:
    """Folders of data that a study needs and that are not there."""
    wanted = {entry["folder"] for entry in study["sets"].values() if entry.get("folder")}
    return sorted(str(Path(root) / folder) for folder in wanted if not (Path(root) / folder).is_dir())


@dataclass(frozen=True)
class StudyRow:
    """A run of a study: the part that it belongs to, its row, and how far it moved the features.

    Attributes:
        drift: relative change of the features of validation examples by fine-tuning; None where it was not measured.
    """

    part: Part
    row: RunRow
    drift: float | None = None


def run_parts(
    study: Mapping[str, Any], parts: Sequence[Part], configurations: Path, folder: Path, console: Console
) -> list[StudyRow]:
    """Run what has not been run yet of these parts, and read the rest.

    Args:
        study: ``workers`` is the number of processes that share the fine-tuning runs.
        parts: see `parts_of`.
        configurations: the folder `conf`.
        folder: where cells, runs and features are kept.
        console: where to report.
    """
    rows: list[StudyRow] = []
    for number, part in enumerate(parts, 1):
        console.print(f"[bold]{number}/{len(parts)}[/bold] {part.name}", highlight=False)
        settings, grid = plan_from(composed(configurations, part.overrides, "compare"))
        target, began = folder / part.name, time.perf_counter()
        comparison = compare_settings(
            settings,
            grid,
            target,
            cache=FeatureCache(folder / "features"),
            workers=int(study.get("workers", 1)),
            keep_models=False,
            console=Console(quiet=True),
        )
        append_metrics(folder, {"part": part.name, "seconds": round(time.perf_counter() - began, 1)})
        label = f"{part.data} {part.share}".strip()
        for row, cell in zip(comparison.rows, grid.cells(), strict=True):
            drift = _drift(run_folder(cell_settings(settings, cell), target), row.best_epoch)
            rows.append(StudyRow(part, replace(row, data=label), drift))
    return rows


def _drift(folder: Path, epoch: int | None) -> float | None:
    """How far a fine-tuning run had moved the features at its best epoch."""
    for line in read_metrics(folder):
        if line.get("epoch") == epoch:
            return 0.0 if line.get("phase") == "probe" else line.get("feature_drift")
    return None


# --- tables -----------------------------------------------------------------------------------------------------------

_MEASURES = ("accuracy", "nll", "ece")


def summary_lines(rows: Iterable[StudyRow]) -> list[dict[str, Any]]:
    """A line per part, scheme and learning rate: means and standard deviations over the runs.

    ``steps_to_99`` is the median step at which validation accuracy first reaches 99 % of the best that any run on the
    same split of that part reached (empty if more than half never do); ``chosen`` marks the rate that validation chose.
    """
    groups: dict[tuple[Part, str, float], list[StudyRow]] = {}
    for row in rows:
        groups.setdefault((row.part, row.row.init, row.row.lr), []).append(row)
    best: dict[tuple[Part, int], float] = {}
    for entry in (entry for own in groups.values() for entry in own):
        split = entry.part, entry.row.split_seed
        best[split] = max([best.get(split, 0.0), *(value for _, value in entry.row.history)])
    chosen: dict[tuple[Part, str], tuple[float, float]] = {}
    for (part, init, lr), own in groups.items():
        score = _mean([entry.row.val.get("accuracy") for entry in own])
        if score is not None and score > chosen.get((part, init), (-1.0, lr))[0]:
            chosen[part, init] = (score, lr)
    return [
        _summary_line(part, init, lr, own, best, chosen.get((part, init), (0.0, None))[1] == lr)
        for (part, init, lr), own in groups.items()
    ]


def _summary_line(
    part: Part, init: str, lr: float, own: Sequence[StudyRow], best: Mapping[tuple[Part, int], float], chosen: bool
) -> dict[str, Any]:
    line: dict[str, Any] = {"stage": part.stage, "data": part.data, "share": part.share, "init": init, "lr": lr}
    line |= {"runs": len(own), "failed": sum(entry.row.status != "finished" for entry in own), "chosen": int(chosen)}
    line["val_accuracy"] = _mean([entry.row.val.get("accuracy") for entry in own])
    line["start_val_accuracy"] = _mean([entry.row.history[0][1] if entry.row.history else None for entry in own])
    for name in _MEASURES:
        line[f"test_{name}"] = _mean([entry.row.test.get(name) for entry in own])
    line["test_accuracy_std"] = _std([entry.row.test.get("accuracy") for entry in own])
    steps = sorted(_steps(entry.row, 0.99 * best[part, entry.row.split_seed]) for entry in own)
    middle = steps[(len(steps) - 1) // 2]
    line["steps_to_99"] = None if middle == float("inf") else int(middle)
    line["drift"] = _mean([entry.drift for entry in own])
    return line


def _steps(row: RunRow, target: float) -> float:
    found = steps_to_reach(row.history, target)
    return float("inf") if found is None else float(found)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _std(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.std(known, ddof=1)) if len(known) > 1 else None


@dataclass(frozen=True)
class Question:
    """A family of tests that are corrected together: every scheme against the reference.

    Attributes:
        name: what is asked.
        pairs: the answers.
    """

    name: str
    pairs: tuple[PairedComparison, ...]


Unit = tuple[int, int]


def pooled_scores(
    rows: Iterable[StudyRow], metric: str = "accuracy", *, lr: float | None = None
) -> dict[str, dict[Unit, float]]:
    """Test scores per scheme, of all data sets together: a unit is a run of one data set and one pair of seeds.

    Args:
        rows: runs of any number of parts.
        metric: a test metric.
        lr: this learning rate; None for the one that validation chose, for each part and scheme.

    Schemes that did not run on every part are left out.
    """
    parts: dict[Part, list[StudyRow]] = {}
    for row in rows:
        parts.setdefault(row.part, []).append(row)
    found: dict[str, dict[Unit, float]] = {}
    for number, own in enumerate(parts.values()):
        lines = own if lr is None else [row for row in own if row.row.lr == lr]
        (block,) = analyse([row.row for row in lines], "accuracy")
        chosen = {summary.init: summary.lr for summary in block.summaries}
        for entry in lines:
            if entry.row.lr == chosen.get(entry.row.init):
                value = entry.row.test.get(metric)
                if value is not None:
                    unit = (number * 1000 + entry.row.split_seed, entry.row.seed)
                    found.setdefault(entry.row.init, {})[unit] = value
    longest = max((len(units) for units in found.values()), default=0)
    return {scheme: units for scheme, units in found.items() if len(units) == longest}


def ranking_of(rows: Iterable[StudyRow], metric: str = "accuracy", *, lr: float | None = None) -> Ranking | None:
    """Schemes ranked over the parts by their mean test score; None with fewer than two of either."""
    scores = pooled_scores(rows, metric, lr=lr)
    sets = sorted({unit[0] // 1000 for units in scores.values() for unit in units})
    if len(sets) < 2 or len(scores) < 2:
        return None
    table = np.array(
        [
            [np.mean([v for unit, v in units.items() if unit[0] // 1000 == number]) for units in scores.values()]
            for number in sets
        ]
    )
    return rank_schemes(list(scores), [str(number) for number in sets], table)


def question(
    name: str, rows: Iterable[StudyRow], reference: str, metric: str = "accuracy", *, lr: float | None = None
) -> Question:
    """Every scheme against the reference over all the given parts."""
    return Question(name, compare_with(reference, pooled_scores(rows, metric, lr=lr)))


def as_csv(lines: Sequence[Mapping[str, Any]]) -> str:
    """A table with a header; numbers to six digits, what is not known left empty.

    Example:
        >>> as_csv([{"a": 1 / 3, "b": None}])
        'a,b\\n0.333333,\\n'
    """
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(dict.fromkeys(key for line in lines for key in line)), lineterminator="\n")
    writer.writeheader()
    for line in lines:
        writer.writerow({k: "" if v is None else f"{v:.6g}" if isinstance(v, float) else v for k, v in line.items()})
    return buffer.getvalue()


def pair_lines(questions: Iterable[Question]) -> list[dict[str, Any]]:
    """Every test of the study as a line of a table."""
    return [
        {
            "question": asked.name,
            "first": pair.first,
            "second": pair.second,
            "pairs": pair.pairs,
            "difference": pair.difference.estimate,
            "low": pair.difference.low,
            "high": pair.difference.high,
            "ahead": pair.ahead,
            "p": pair.p_value,
            "adjusted_p": pair.adjusted_p,
        }
        for asked in questions
        for pair in asked.pairs
    ]


def write_tables(rows: Sequence[StudyRow], questions: Sequence[Question], folder: Path) -> None:
    """Write ``comparison.csv`` (means by part, scheme and rate) and ``tests.csv`` (every test) into a folder."""
    write_text(folder / "comparison.csv", as_csv(summary_lines(rows)))
    write_text(folder / "tests.csv", as_csv(pair_lines(questions)))


# --- the whole --------------------------------------------------------------------------------------------------------


def run_study(baseline: Any, request: Any) -> int:
    """The job of ``baseline=study``: run the parts, write the tables and the text.

    Args:
        baseline: its ``content`` is the study, see `parts_of`.
        request: ``overrides`` may hold ``data.root=FOLDER`` and ``stages=[NAME,...]``; ``folder`` is where runs go,
            ``table`` a file of the folder for the text; ``check`` only looks whether the data are there.

    Returns:
        The exit code.

    Raises:
        DataError: data are missing; the message lists the folders.
        ConfigError: another override.
    """
    from headinit.reproduction.study_plots import write_pictures
    from headinit.reproduction.study_text import questions_of, study_text

    study, own = baseline.content, dict(text.partition("=")[::2] for text in request.overrides)
    if unknown := sorted(set(own) - {"data.root", "stages"}):
        raise ConfigError(f"baseline={baseline.name} takes data.root= and stages=[...], not {', '.join(unknown)}.")
    root = own.get("data.root")
    if root is None or (missing := missing_folders(study, root)):
        found = f"Missing: {', '.join(missing)}." if root else "Say where they are: data.root=FOLDER."
        raise DataError(f"{study['title']} needs data; the head of its file in conf/baseline lists them. {found}")
    console = Console(highlight=False, soft_wrap=True)
    stages = [name.strip() for name in own.get("stages", "").strip("[]").split(",") if name.strip()]
    parts = [part for part in parts_of(study, root) if not stages or part.stage in stages]
    if request.check:
        console.print(f"{baseline.name}: its data are here; {len(parts)} comparisons.")
        return 0
    folder = request.folder / baseline.name
    rows = run_parts(study, parts, request.configurations, folder, console)
    questions = questions_of(study, rows)
    docs = request.table.parent
    write_tables(rows, questions, docs / baseline.name)
    write_pictures(questions, summary_lines(rows), docs / baseline.name)
    seconds = sum(line["seconds"] for line in read_metrics(folder))
    write_text(docs / f"{baseline.name}.md", study_text(baseline.name, study, rows, questions, seconds))
    console.print(f"{docs / f'{baseline.name}.md'}, tables in {docs / baseline.name}")
    return 0
