"""The text of a study: its tables, and what its tests say, in words that the plan fixed beforehand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from headinit.analysis.results import library_versions
from headinit.analysis.statistics import ALPHA, PairedComparison
from headinit.reproduction.study import Question, StudyRow, question, ranking_of, summary_lines

MARGIN = 0.005
"""Half a point of accuracy: a difference that does not matter."""


def questions_of(study: Mapping[str, Any], rows: Sequence[StudyRow]) -> list[Question]:
    """The tests that the plan names, each a family of its own: every scheme against the reference.

    Frozen heads: for each share of the labels, over all data sets, at the rate that validation chose. Fine-tuning: at
    each of the two rates. The probe before fine-tuning: on text, on pictures, against fine-tuning from the same start.
    """
    reference, found = study["reference"], []
    frozen = [row for row in rows if row.part.stage == "frozen"]
    for share in _in_order(row.part.share for row in frozen):
        own = [row for row in frozen if row.part.share == share]
        for metric in ("accuracy", "nll"):
            found.append(question(f"frozen, {share} of the labels: {metric}", own, reference, metric))
    tuned = [row for row in rows if row.part.stage == "finetuned"]
    for rate in sorted({row.row.lr for row in tuned}):
        for metric in ("accuracy", "nll"):
            found.append(question(f"fine-tuned at learning rate {rate:g}: {metric}", tuned, reference, metric, lr=rate))
    return found + _probe_first(rows)


def _probe_first(rows: Sequence[StudyRow]) -> list[Question]:
    """Probing first (lp_ft) against fine-tuning at once, from the same scheme, for each kind of data and rate."""
    first = [row for row in rows if row.part.stage == "lp_ft"]
    at_once = [row for row in rows if row.part.stage == "finetuned"]
    found = []
    for modality in _in_order(row.part.modality for row in first):
        for rate in sorted({row.row.lr for row in first}):
            for start in _in_order(row.row.init for row in first):
                wanted = (modality, rate, start)
                pair = [_side(row, f"lp_ft from {start}") for row in first if _facts(row) == wanted]
                sets = {row.part.data for row in pair}
                pair += [_side(row, start) for row in at_once if _facts(row) == wanted and row.part.data in sets]
                name = f"lp_ft against fine-tuning at once, {modality}, learning rate {rate:g}: accuracy"
                found.append(question(name, pair, start, lr=rate))
    return found


def _facts(row: StudyRow) -> tuple[str, float, str]:
    return row.part.modality, row.row.lr, row.row.init


def _side(row: StudyRow, label: str) -> StudyRow:
    """The run under another label, as if it belonged to the same comparison as the other side."""
    part = replace(row.part, stage="", overrides=())
    return replace(row, part=part, row=replace(row.row, init=label, freeze=""))


def study_text(
    name: str, study: Mapping[str, Any], rows: Sequence[StudyRow], questions: Sequence[Question], seconds: float
) -> str:
    """The study as Markdown.

    Args:
        name: of its file in `conf/baseline`, and of the folder of its tables.
        study: the design.
        rows: every run.
        questions: see `questions_of`.
        seconds: that the runs took.
    """
    lines = summary_lines(rows)
    versions = library_versions()
    text = [
        f"# {study['title']}",
        "",
        f"Made by `python scripts/reproduce.py baseline={name} data.root=FOLDER`; do not edit. The questions, the",
        f"tests and the rule of decision were written down before the runs: [the plan]({name}_plan.md). All means are",
        f"in [comparison.csv]({name}/comparison.csv), all tests in [tests.csv]({name}/tests.csv).",
        "",
        f"{len(rows):,} runs, {seconds / 3600:.1f} hours on this machine ({versions['platform']}, torch "
        f"{versions['torch']}). {sum(row.row.status != 'finished' for row in rows)} of them diverged.",
        "",
    ]
    for stage, plan in study["stages"].items():
        own = [row for row in rows if row.part.stage == stage]
        if own:
            text += [f"## {plan['title']}", "", *_picture(name, stage, own), *_stage(stage, own, lines), ""]
    text += ["## The tests", "", *_tests(study, questions)]
    return "\n".join(text).rstrip() + "\n"


def _picture(name: str, stage: str, rows: Sequence[StudyRow]) -> list[str]:
    """The pictures that `study_plots` makes of a stage."""
    if len({row.row.init for row in rows}) < 2:
        return []
    kind = {"frozen": "frozen", "finetuned": "fine-tuned"}.get(stage, stage)
    return [
        f"![Differences from the reference]({name}/differences_{kind}.png)",
        "",
        f"![Validation accuracy before the first step and at the best epoch]({name}/starts_{stage}.png)",
        "",
    ]


def _stage(stage: str, rows: Sequence[StudyRow], lines: Sequence[Mapping[str, Any]]) -> list[str]:
    own = [line for line in lines if line["stage"] == stage]
    if stage == "frozen":
        text: list[str] = []
        for share in _in_order(line["share"] for line in own):
            part = [row for row in rows if row.part.share == share]
            chosen = [line for line in own if line["share"] == share and line["chosen"]]
            text += [f"### {share} of the labels", "", *_scores(chosen, part, None), ""]
        return [*text, "### At the start, and on the way", "", *_starts(own)]
    text = []
    for rate in sorted({line["lr"] for line in own}):
        chosen = [line for line in own if line["lr"] == rate]
        text += [f"### Learning rate {rate:g} (backbone {rate / (20 if stage == 'lp_ft' else 10):g})", ""]
        text += [*_scores(chosen, rows, rate), "", *_details(chosen), ""]
    return text


def _scores(lines: Sequence[Mapping[str, Any]], rows: Sequence[StudyRow], rate: float | None) -> list[str]:
    """Mean test accuracy of each scheme on each set, best mean rank first."""
    ranking = ranking_of(rows, lr=rate)
    sets = _in_order(line["data"] for line in lines)
    values = {(line["init"], line["data"]): line for line in lines}
    schemes = _in_order(line["init"] for line in lines)
    if ranking is not None:
        schemes = [*ranking.mean_ranks, *(scheme for scheme in schemes if scheme not in ranking.mean_ranks)]
    rank = ranking.mean_ranks if ranking else {}
    table = _table(
        ["scheme", "mean rank", *sets],
        [
            [scheme, f"{rank[scheme]:.1f}" if scheme in rank else "", *(_score(values.get((scheme, s))) for s in sets)]
            for scheme in schemes
        ],
    )
    note = "Test accuracy in %, mean ± standard deviation over the runs."
    if ranking is not None:
        note += (
            f" Friedman p = {ranking.friedman_p:.2g} over {len(ranking.data)} sets; mean ranks that differ by less "
            f"than {ranking.critical_difference:.1f} cannot be told apart."
        )
    return [note, "", *table]


def _score(line: Mapping[str, Any] | None) -> str:
    if line is None or line["test_accuracy"] is None:
        return ""
    spread = "" if line["test_accuracy_std"] is None else f" ± {100 * line['test_accuracy_std']:.1f}"
    return f"{100 * line['test_accuracy']:.1f}{spread}"


def _starts(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Validation accuracy before the first step, and median steps to 99 % of the best, with all the labels."""
    shares = _in_order(line["share"] for line in lines)
    own = [line for line in lines if line["share"] == shares[-1] and line["chosen"]]
    sets = _in_order(line["data"] for line in own)
    cells = {(line["init"], line["data"]): line for line in own}

    def cell(scheme: str, name: str) -> str:
        line = cells.get((scheme, name))
        if line is None or line["start_val_accuracy"] is None:
            return ""
        steps = line["steps_to_99"]
        return f"{100 * line['start_val_accuracy']:.0f} / {'never' if steps is None else steps}"

    return [
        "Validation accuracy (%) before the first step / steps until validation is at 99 % of the best that any head",
        f"on the same split reached (median; `never`: more than half of the runs did not), {shares[-1]} of the labels.",
        "",
        *_table(
            ["scheme", *sets],
            [[scheme, *(cell(scheme, name) for name in sets)] for scheme in _in_order(line["init"] for line in own)],
        ),
    ]


def _details(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """What else fine-tuning did, as means over the sets."""
    rows = []
    for scheme in _in_order(line["init"] for line in lines):
        own = [line for line in lines if line["init"] == scheme]
        values = [
            (100, "start_val_accuracy", ".1f"),
            (100, "test_accuracy", ".1f"),
            (1, "test_nll", ".3f"),
            (1, "test_ece", ".3f"),
            (1, "drift", ".3f"),
        ]
        rows.append([scheme, *(_average(own, key, factor, form) for factor, key, form in values)])
    heads = ["scheme", "validation at the start, %", "test, %", "test NLL", "test ECE", "feature drift"]
    return ["Means over the sets; the drift is the relative change of the features of validation examples.", "",
            *_table(heads, rows)]  # fmt: skip


def _average(lines: Sequence[Mapping[str, Any]], key: str, factor: float, form: str) -> str:
    known = [line[key] for line in lines if line[key] is not None]
    return format(factor * sum(known) / len(known), form) if known else ""


def _tests(study: Mapping[str, Any], questions: Iterable[Question]) -> list[str]:
    text = [
        "Each scheme against the reference, in pairs that share data, split, order and seed; 95 % BCa intervals,",
        "permutation tests, Holm's correction within each family. Differences of accuracy are in points.",
        "",
    ]
    for asked in questions:
        text += [f"### {asked.name}", ""]
        rows = []
        for pair in sorted(asked.pairs, key=lambda pair: -pair.difference.estimate):
            factor = 100 if asked.name.endswith("accuracy") else 1
            low, high = pair.difference.low, pair.difference.high
            interval = "" if low is None or high is None else f"{factor * low:+.2f} to {factor * high:+.2f}"
            rows.append(
                [
                    pair.first,
                    f"{factor * pair.difference.estimate:+.2f}",
                    interval,
                    f"{pair.ahead} of {pair.pairs}",
                    f"{pair.adjusted_p:.2g}",
                    standing(pair, higher_is_better=factor == 100),
                ]
            )
        against = asked.pairs[0].second if asked.pairs else study["reference"]
        text += [*_table([f"against {against}", "difference", "interval", "higher in", "p", ""], rows), ""]
    return text


def standing(pair: PairedComparison, higher_is_better: bool = True) -> str:
    """How a scheme stands to the reference, by the rule of the plan.

    ``level``: the interval lies within half a point (of accuracy) or within 0.005; ``ahead`` or ``behind``: corrected
    p below 0.05; else ``not told apart``.
    """
    low, high = pair.difference.low, pair.difference.high
    if low is not None and high is not None and low >= -MARGIN and high <= MARGIN:
        return "level"
    if pair.adjusted_p >= ALPHA:
        return "not told apart"
    return "ahead" if (pair.difference.estimate > 0) == higher_is_better else "behind"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _in_order(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
