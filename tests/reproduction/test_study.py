"""The study's tables and tests on runs whose answers are known."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from headinit.analysis.results import RunRow
from headinit.comparison import plan_from
from headinit.config import composed
from headinit.errors import ConfigError, DataError
from headinit.reproduction.study import (
    Part,
    StudyRow,
    as_csv,
    missing_folders,
    parts_of,
    pooled_scores,
    ranking_of,
    run_study,
    summary_lines,
    write_tables,
)
from headinit.reproduction.study_text import questions_of, standing, study_text

CONF = Path(__file__).resolve().parents[2] / "conf"
STUDIES = sorted((CONF / "baseline").glob("study*.yaml"))
LIFT = {"torch": 0.0, "ridge": 0.1, "he": 0.0005}


def runs(stage: str, sets: dict[str, str], seeds: int, rates=(0.001, 0.01), share: str = "") -> list[StudyRow]:
    """Runs in which ridge is 10 points ahead of torch, he level with it, and the higher rate one point better."""
    found = []
    for number, (data, modality) in enumerate(sets.items()):
        part = Part(stage, data, share, modality, ())
        for init, lift in LIFT.items():
            for lr in rates:
                for seed in range(seeds):
                    score = 0.6 + 0.02 * number + lift + (0.01 if lr > 0.005 else 0.0) + 0.0001 * seed
                    row = RunRow(
                        init=init,
                        lr=lr,
                        seed=seed,
                        val={"accuracy": score},
                        test={"accuracy": score - 0.05, "nll": 1.0 - lift, "ece": 0.1},
                        history=((0, 0.2), (10, score)),
                        data=data,
                        freeze=stage,
                    )
                    found.append(StudyRow(part, row, drift=0.25 if stage == "finetuned" else None))
    return found


SETS = {"ants": "pictures", "words": "text", "things": "pictures"}


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_part_composes(path):
    study = yaml.safe_load(path.read_text(encoding="utf-8"))
    parts = parts_of(study, "data")
    assert {part.stage for part in parts} == set(study["stages"])
    assert len({part.name for part in parts}) == len(parts)
    for part in {(part.stage, part.data): part for part in parts}.values():
        settings, grid = plan_from(composed(CONF, part.overrides, "compare"))
        assert {init["name"] for init in grid.inits} >= {"torch", "ridge"} or part.stage == "lp_ft"
        assert [freeze["policy"] for freeze in grid.freezes] == [
            {"frozen": "all", "finetuned": "none"}.get(part.stage, part.stage)
        ]
        assert len(grid.seeds) >= 3 or len(grid.seeds) * len(grid.split_seeds) >= 10
        assert settings.data["root"] or settings.data["train_file"]


def test_a_set_that_names_another_stage_is_refused():
    with pytest.raises(ConfigError, match="trec has frozne"):
        parts_of({"stages": {"frozen": {}}, "sets": {"trec": {"frozne": []}}}, "")


def test_missing_data_are_named(tmp_path):
    study = yaml.safe_load((CONF / "baseline" / "study.yaml").read_text(encoding="utf-8"))
    (tmp_path / "trec").mkdir()
    missing = missing_folders(study, tmp_path)
    assert str(tmp_path / "hymenoptera") in missing
    assert str(tmp_path / "trec") not in missing
    request = SimpleNamespace(overrides=(f"data.root={tmp_path}",), check=True)
    with pytest.raises(DataError, match="hymenoptera"):
        run_study(SimpleNamespace(name="study", content=study), request)


def test_means_and_choice_of_the_rate():
    rows = runs("frozen", SETS, 5)
    lines = summary_lines(rows)
    assert len(lines) == 3 * 3 * 2
    line = next(entry for entry in lines if (entry["data"], entry["init"], entry["lr"]) == ("words", "ridge", 0.01))
    own = [entry.row for entry in rows if (entry.part.data, entry.row.init, entry.row.lr) == ("words", "ridge", 0.01)]
    scores = [row.test["accuracy"] for row in own]
    assert line["test_accuracy"] == pytest.approx(np.mean(scores))
    assert line["test_accuracy_std"] == pytest.approx(np.std(scores, ddof=1))
    assert (line["chosen"], line["start_val_accuracy"], line["steps_to_99"], line["runs"]) == (1, 0.2, 10, 5)
    assert {entry["lr"] for entry in lines if entry["chosen"]} == {0.01}
    torch_line = next(
        entry for entry in lines if (entry["data"], entry["init"], entry["lr"]) == ("words", "torch", 0.01)
    )
    assert torch_line["steps_to_99"] is None  # 10 points below the best


def test_scores_are_pooled_over_sets_and_ranked():
    rows = runs("frozen", SETS, 5)
    scores = pooled_scores(rows)
    assert {len(units) for units in scores.values()} == {15}
    differences = [scores["ridge"][unit] - scores["torch"][unit] for unit in scores["torch"]]
    assert differences == pytest.approx([0.1] * 15)
    low = pooled_scores(rows, lr=0.001)
    assert np.mean(list(low["he"].values())) == pytest.approx(np.mean(list(scores["he"].values())) - 0.01)
    ranking = ranking_of(rows)
    assert ranking is not None
    assert ranking.mean_ranks == {"ridge": 1.0, "he": 2.0, "torch": 3.0}
    assert ranking_of(runs("frozen", {"ants": "pictures"}, 5)) is None


def test_questions_verdicts_and_text(tmp_path):
    study = {
        "title": "Does it?",
        "reference": "torch",
        "stages": {name: {"title": name} for name in ("frozen", "finetuned", "lp_ft")},
    }
    probed = [
        StudyRow(
            row.part, row.row.__class__(**{**vars(row.row), "test": {"accuracy": row.row.test["accuracy"] + 0.03}})
        )
        for row in runs("lp_ft", SETS, 4)
        if row.row.init == "he"
    ]
    rows = [*runs("frozen", SETS, 5, share="10 %"), *runs("finetuned", SETS, 4), *probed]
    asked = {entry.name: entry for entry in questions_of(study, rows)}
    frozen = {pair.first: pair for pair in asked["frozen, 10 % of the labels: accuracy"].pairs}
    assert {name: standing(pair) for name, pair in frozen.items()} == {"ridge": "ahead", "he": "level"}
    loss = {pair.first: pair for pair in asked["frozen, 10 % of the labels: nll"].pairs}
    assert standing(loss["ridge"], higher_is_better=False) == "ahead"
    (pair,) = asked["lp_ft against fine-tuning at once, pictures, learning rate 0.01: accuracy"].pairs
    assert (pair.first, pair.second, pair.pairs) == ("lp_ft from he", "he", 8)
    assert pair.difference.estimate == pytest.approx(0.03)
    text = study_text("study", study, rows, list(asked.values()), 3600.0)
    assert "| ridge | 1.0 | 66.0 ± 0.0 | 68.0 ± 0.0 | 70.0 ± 0.0 |" in text
    assert "| he | +0.05 |" in text
    write_tables(rows, list(asked.values()), tmp_path)
    table = list(csv.DictReader((tmp_path / "comparison.csv").open(encoding="utf-8")))
    assert len(table) == 18 + 18 + 6
    assert {line["drift"] for line in table if line["stage"] == "finetuned"} == {"0.25"}
    tests = list(csv.DictReader(io.StringIO(as_csv([]))))
    assert tests == []
