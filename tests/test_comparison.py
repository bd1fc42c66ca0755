"""Comparisons: every cell is what a run of its own would give, nothing is lost by a kill, and what is written."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

import headinit
from headinit import schemes
from headinit.analysis.metrics import classification_metrics
from headinit.analysis.results import RunRow, plain
from headinit.comparison import Comparison, Grid, compare, compare_runs, compare_settings, plan_from
from headinit.comparison.bench import Remembered
from headinit.comparison.pool import FeaturePool, with_own_names
from headinit.comparison.store import CellStore
from headinit.config import settings_from
from headinit.data.loading import TensorBatches
from headinit.data.splits import DataSplits, Split, divide, take_per_class
from headinit.errors import ConfigError, DataError, HeadInitError, SchemeError
from headinit.experiment import run
from headinit.features.extract import FeatureSet
from headinit.schemes.scheme import HeadShape
from headinit.training.evaluation import predict
from headinit.training.finetune import finetune
from headinit.training.recipe import Recipe

from .comparison_to_kill import finished_cells, run_comparison

ROOT = Path(__file__).resolve().parent.parent
WIDTH, CLASSES = 6, 3


def make_features(size: int, seed: int) -> FeatureSet:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(size) % CLASSES
    centres = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(50))
    return FeatureSet(centres[labels] + torch.randn(size, WIDTH, generator=generator), labels, CLASSES)


def without_time(rows: Any) -> list[RunRow]:
    return [dataclasses.replace(row, seconds=0.0) for row in rows]


# --- what is compared -------------------------------------------------------------------------------------------------


def test_a_grid_is_every_combination_once() -> None:
    grid = Grid.of(
        inits=["he", "zeros"],
        lrs=[0.1, 0.01],
        seeds=[3, 5],
        order_seeds=[7, 7],
        split_seeds=[0, 1],
        weight_decays=[0.0, 0.1],
        per_class=[2, None],
        freezes=["all", 2, ["layer1.*"], {"policy": "none", "norm": "eval"}],
    )
    cells = grid.cells()
    assert len(cells) == 2 * 2 * 2 * 2 * 2 * 2 * 4
    assert len({json.dumps(plain(cell), sort_keys=True) for cell in cells}) == len(cells)
    assert {(cell.seed, cell.order_seed) for cell in cells} == {(3, 7), (5, 7)}
    policies = [dict(freeze) for freeze in grid.freezes]
    assert policies[1:3] == [{"policy": "stages", "stages": 2}, {"policy": "patterns", "patterns": ["layer1.*"]}]


def test_two_settings_of_one_scheme_are_told_apart() -> None:
    grid = Grid.of(inits=["he", {"name": "he", "mode": "fan_out"}, {"name": "bert", "std": 0.1}], lrs=0.1)
    assert grid.labels == ("he", "he mode=fan_out", "bert")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inits": []}, "inits is empty"),
        ({"inits": ["hee"]}, "Did you mean 'he'"),
        ({"inits": [{"name": "he", "mod": 1}]}, "Did you mean 'mode'"),
        ({"inits": ["he", "he"]}, "twice"),
        ({"lrs": [-1.0]}, "lr=-1"),
        ({"lrs": []}, "lrs is empty"),
        ({"seeds": [0, 0]}, "twice"),
        ({"seeds": [0.5]}, "whole numbers"),
        ({"seeds": 2, "order_seeds": [1]}, "one for each"),
        ({"weight_decays": -0.1}, "weight_decay=-0.1"),
    ],
)
def test_a_grid_refuses_what_makes_no_sense(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, SchemeError), match=message.replace("(", r"\(")):
        Grid.of(**{"inits": ["he"], "lrs": [0.1], **arguments})


def test_the_plan_of_a_configuration() -> None:
    config = {
        "model": {"name": "resnet50"},
        "data": {"name": "digits", "per_class": [5, None], "split_seed": [0, 1]},
        "head": {"name": "linear"},
        "init": {"name": "he", "gain": 7.0, "prior_bias": True, "logit_std": None},
        "inits": ["he", {"name": "normal", "std": 0.5}],
        "freezes": ["all", "stages"],
        "freeze": {"policy": "all", "stages": None},
        "optim": {"lr": [0.1, 0.2], "weight_decay": 0.01},
        "seeds": 2,
        "runs": None,
        "cache": "x",
    }
    settings, grid = plan_from(config)
    assert [dict(init) for init in grid.inits] == [
        {"name": "he", "prior_bias": True},
        {"name": "normal", "std": 0.5, "prior_bias": True},
    ]
    assert grid.per_class == (5, None)
    assert grid.split_seeds == (0, 1)
    assert dict(grid.freezes[1])["stages"] == 1
    assert settings.optim.weight_decay == 0.01
    assert len(grid.cells()) == 2 * 2 * 2 * 2 * 2 * 2


# --- every cell is a run of its own -----------------------------------------------------------------------------------


def train_alone(row: RunRow, data: dict[str, FeatureSet], recipe: Recipe, head: str = "linear") -> dict[str, Any]:
    """The same cell by the public functions: attach_head on a network, then finetune on batches of features."""
    model = headinit.attach_head(
        nn.Sequential(nn.Identity(), nn.Linear(WIDTH, CLASSES)), CLASSES, init=row.init, seed=row.seed, head=head,
        data=data["train"],
    )  # fmt: skip
    own = dataclasses.replace(recipe, lr=row.lr, weight_decay=row.weight_decay, seed=row.seed)
    train, validation, test = (
        TensorBatches(data[part].features, data[part].labels, 16, shuffle_seed=row.seed if part == "train" else None)
        for part in ("train", "val", "test")
    )
    outcome = finetune(model[1], train, validation, own, cpu=True)
    return {
        "val": classification_metrics(*predict(model[1], validation)),
        "test": classification_metrics(*predict(model[1], test)),
        "outcome": outcome,
    }


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_every_cell_is_what_a_run_alone_gives(head: str) -> None:
    data = {"train": make_features(60, 1), "val": make_features(45, 2), "test": make_features(45, 3)}
    recipe = Recipe(patience=3, label_smoothing=0.1)
    inits = ["he", "zeros", "torch", "orthogonal", "imprint", "ridge"] if head == "linear" else ["he", "zeros"]
    found = compare(
        data["train"],
        validation=data["val"],
        test=data["test"],
        inits=inits,
        lrs=[0.003, 0.1],
        weight_decays=[0.0, 0.1],
        seeds=2,
        epochs=4,
        batch_size=16,
        recipe=recipe,
        head=head,
        head_options={"hidden": [8]} if head == "mlp" else None,
    )
    assert len(found.rows) == len(inits) * 2 * 2 * 2
    options = {"head": head}
    if head == "mlp":
        return check_mlp_rows(found, data, dataclasses.replace(recipe, epochs=4))
    for row in found.rows:
        alone = train_alone(row, data, dataclasses.replace(recipe, epochs=4), **options)
        assert dict(row.val) == pytest.approx(alone["val"], abs=1e-4), row
        assert dict(row.test) == pytest.approx(alone["test"], abs=1e-4), row
        assert (row.best_epoch, row.steps) == (alone["outcome"].best_epoch, alone["outcome"].steps)
        expected = [(line["step"], line["accuracy"]) for line in alone["outcome"].history]
        assert list(row.history) == [(step, pytest.approx(value)) for step, value in expected]
        assert row.majority == pytest.approx(1 / 3)
    return None


def check_mlp_rows(found: Comparison, data: dict[str, FeatureSet], recipe: Recipe) -> None:
    for row in found.rows[:3]:
        model = headinit.attach_head(
            nn.Sequential(nn.Identity(), nn.Linear(WIDTH, CLASSES)), CLASSES, init=row.init, seed=row.seed, head="mlp",
            head_options={"hidden": [8]},
        )  # fmt: skip
        own = dataclasses.replace(recipe, lr=row.lr, weight_decay=row.weight_decay, seed=row.seed)
        train = TensorBatches(data["train"].features, data["train"].labels, 16, shuffle_seed=row.seed)
        held_out = TensorBatches(data["val"].features, data["val"].labels, 16)
        outcome = finetune(model[1], train, held_out, own, cpu=True)
        assert row.best_epoch == outcome.best_epoch
        assert dict(row.val) == pytest.approx(classification_metrics(*predict(model[1], held_out)), abs=1e-4)


def test_the_start_of_each_cell_is_the_public_one() -> None:
    data = make_features(60, 1)
    for init in ("he", "uniform", "etf", "lda", "probe"):
        found = compare(data, validation=data, inits=[init], lrs=0.1, seeds=1, epochs=0)
        model = headinit.attach_head(
            nn.Sequential(nn.Identity(), nn.Linear(WIDTH, CLASSES)), CLASSES, init=init, data=data
        )
        expected = nn.functional.cross_entropy(model(data.features), data.labels).item()
        assert found.rows[0].init_loss == pytest.approx(expected, rel=1e-5)
        assert found.rows[0].val["nll"] == pytest.approx(expected, rel=1e-5)


def test_splits_and_subsets_are_those_of_the_data_room() -> None:
    data = make_features(90, 1)
    found = compare(data, inits=["ridge"], lrs=0.1, seeds=1, split_seeds=[0, 4], per_class=[3, None], epochs=0)
    assert [(row.split_seed, row.per_class) for row in found.rows] == [(0, 3), (0, None), (4, 3), (4, None)]
    split = Split(range(90), data.labels, [str(i) for i in range(90)], "")
    for row in found.rows:
        train, validation = divide(split, 0.2, row.split_seed)
        if row.per_class is not None:
            train = take_per_class(train, row.per_class, ("0", "1", "2"), row.split_seed)
        own = FeatureSet(data.features[list(train.items)], train.labels, CLASSES)
        head = schemes.build("ridge")(HeadShape(WIDTH, CLASSES), torch.Generator().manual_seed(0), own)
        logits = data.features[list(validation.items)] @ head.weight.T + head.bias
        assert row.val["nll"] == pytest.approx(classification_metrics(logits, validation.labels)["nll"], rel=1e-3)


def test_a_head_that_diverges_is_a_failed_run() -> None:
    data = make_features(60, 1)
    recipe = Recipe(optimizer="sgd", clip_norm=None, warmup=0.0)
    found = compare(
        data, inits=["he"], lrs=[1e30, 0.1], weight_decays=0.01, seeds=2, epochs=12, recipe=recipe, test=data
    )
    assert [row.status for row in found.rows] == ["diverged", "finished"] * 2
    assert found.rows[0].val == {}
    assert found.best().lr == 0.1
    assert found.best().failed_anywhere == 2
    json.dumps(plain(found.rows), allow_nan=False)


@pytest.mark.parametrize("task", ["multi_label", "regression"])
def test_other_tasks(task: str) -> None:
    data = make_features(90, 1)
    one_hot = nn.functional.one_hot(data.labels, CLASSES).float()
    data = dataclasses.replace(data, labels=one_hot if task == "multi_label" else one_hot * 2 + data.features[:, :3])
    found = compare(data, inits=["zeros", "ridge"], lrs=0.01, seeds=2, epochs=3, task=task)
    assert found.metric in found.rows[0].val
    assert found.best().init == "ridge"
    assert "ridge" in found.table()


def test_closed_forms_are_computed_once_for_all_seeds_and_random_ones_are_not() -> None:
    calls = []

    class Counted(schemes.Scheme):
        needs_data = True

        def __init__(self, inner: schemes.Scheme) -> None:
            self.inner = inner

        def __call__(self, shape, generator, data=None):  # type: ignore[no-untyped-def]
            calls.append(generator.initial_seed() if False else 1)
            return self.inner(shape, generator, data)

    data = make_features(60, 1)
    for name, expected in (("ridge", 1), ("auto", 1), ("lsuv", 3), ("probe", 1)):
        calls.clear()
        scheme = Remembered(Counted(schemes.build(name)))
        heads = [
            scheme(HeadShape(WIDTH, CLASSES), torch.Generator().manual_seed(seed), data).weight for seed in range(3)
        ]
        assert len(calls) == expected, name
        direct = schemes.build(name)(HeadShape(WIDTH, CLASSES), torch.Generator().manual_seed(2), data).weight
        torch.testing.assert_close(heads[2], direct, rtol=0, atol=0)


# --- features once ----------------------------------------------------------------------------------------------------


def split_of(names: list[str]) -> Split:
    return Split(names, torch.tensor([int(name[1:]) % 2 for name in names]), names, "|".join(names))


def test_the_pool_reads_every_example_once_and_finds_it_again() -> None:
    read: list[str] = []

    def extract(split: Split) -> torch.Tensor:
        read.extend(split.items)
        return torch.tensor([[float(name[1:])] for name in split.items])

    parts = [split_of(["a3", "a1"]), split_of(["a2"]), split_of(["a1", "a4", "a2"])]
    pool = FeaturePool(parts, extract, 2)
    assert read == ["a3", "a1", "a2", "a4"]
    found = pool.features_of(parts[2])
    assert found.features.flatten().tolist() == [1.0, 4.0, 2.0]
    assert found.labels.tolist() == [1, 0, 0]


def test_names_that_repeat_in_the_test_split_are_told_apart() -> None:
    splits = DataSplits(split_of(["a1", "a2"]), split_of(["a3"]), split_of(["a1"]), ("x", "y"), "text", "demo")
    named = with_own_names(splits)
    assert named.test is not None
    assert named.test.names == ["test: a1"]
    with pytest.raises(DataError, match="names must differ"):
        with_own_names(dataclasses.replace(splits, validation=split_of(["a1"])))


# --- interrupted, repeated --------------------------------------------------------------------------------------------


def test_a_file_cut_anywhere_goes_on_to_the_same_rows(tmp_path: Path) -> None:
    whole = run_comparison(tmp_path / "whole")
    content = (tmp_path / "whole" / "cells.jsonl").read_bytes()
    assert content.count(b"\n") == len(whole) == 128
    generator = random.Random(0)
    for cut in (0, len(content) - 1, *(generator.randrange(len(content)) for _ in range(3))):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / "cells.jsonl").write_bytes(content[:cut])
        kept = content[:cut].count(b"\n")
        assert without_time(run_comparison(folder)) == without_time(whole)
        lines = (folder / "cells.jsonl").read_bytes()
        assert lines.splitlines()[:kept] == content.splitlines()[:kept]
        assert lines.count(b"\n") == 128


@pytest.mark.slow
def test_killed_at_twenty_moments_it_loses_nothing(tmp_path: Path) -> None:
    whole = run_comparison(None)
    generator = random.Random(1)
    delays = [f"{generator.uniform(0.0, 0.6):.3f}" for _ in range(20)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.comparison_to_kill", str(tmp_path), *delays],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    counts = [int(line) for line in done.stdout.split()]
    assert counts == sorted(counts)
    assert len(counts) == 20
    before = (tmp_path / "cells.jsonl").read_bytes().splitlines() if finished_cells(tmp_path) else []
    resumed = run_comparison(tmp_path)
    assert (tmp_path / "cells.jsonl").read_bytes().splitlines()[: len(before) - 1] == before[:-1]
    for row, expected in zip(without_time(resumed), without_time(whole), strict=True):
        assert dict(row.val) == pytest.approx(dict(expected.val), abs=1e-6)
        assert (row.best_epoch, row.init, row.lr) == (expected.best_epoch, expected.init, expected.lr)


def test_more_seeds_keep_the_cells_that_are_there(tmp_path: Path) -> None:
    data = make_features(60, 1)
    first = compare(data, inits=["he", "zeros"], lrs=0.1, seeds=2, epochs=2, folder=tmp_path)
    lines = (tmp_path / "cells.jsonl").read_text()
    second = compare(data, inits=["he", "zeros"], lrs=0.1, seeds=3, epochs=2, folder=tmp_path)
    assert (tmp_path / "cells.jsonl").read_text().startswith(lines)
    assert second.rows[:4] == first.rows
    assert len(CellStore(tmp_path).rows) == 6


@pytest.mark.parametrize("change", ["data", "epochs", "batch_size", "head", "recipe"])
def test_other_data_or_settings_take_nothing_over(tmp_path: Path, change: str) -> None:
    data = make_features(60, 1)
    options: dict[str, Any] = {"inits": ["he"], "lrs": 0.1, "seeds": 1, "epochs": 1, "folder": tmp_path}
    compare(data, **options)
    if change == "data":
        features = data.features.clone()
        features[7, 2] += 1e-3
        data = dataclasses.replace(data, features=features)
    changed = {
        "epochs": {"epochs": 2},
        "batch_size": {"batch_size": 8},
        "head": {"head": "mlp"},
        "recipe": {"recipe": Recipe(clip_norm=None)},
    }
    compare(data, **{**options, **changed.get(change, {})})
    assert len(CellStore(tmp_path).rows) == 2


# --- what is given and what is left -----------------------------------------------------------------------------------


def test_modules_with_batches_give_the_features_they_make() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 9))
    inputs, labels = torch.randn(60, 4), torch.arange(60) % CLASSES
    options: dict[str, Any] = {"inits": ["he", "ridge"], "lrs": 0.1, "seeds": 1, "epochs": 2}
    by_model = compare(model, (inputs, labels), test=(inputs, labels), **options)
    features = FeatureSet(model[:2](inputs).detach(), labels, CLASSES)
    by_features = compare(features, test=features, **options)
    for first, second in zip(by_model.rows, by_features.rows, strict=True):
        assert dict(first.test) == pytest.approx(dict(second.test), abs=1e-5)


def test_source_is_compared_where_the_model_has_a_classifier_of_its_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 9))
    inputs, labels = torch.randn(60, 4), torch.arange(60) % CLASSES
    options: dict[str, Any] = {"lrs": 0.1, "seeds": 1, "epochs": 0, "validation": (inputs, labels)}
    rows = compare(model, (inputs, labels), inits=["he", "source"], **options).rows
    row = next(row for row in rows if row.init == "source")
    attached = headinit.attach_head(model, CLASSES, init="source", data=(inputs, labels))
    with torch.no_grad():
        wanted = classification_metrics(attached(inputs), labels)
    assert dict(row.val) == pytest.approx({name: wanted[name] for name in row.val}, rel=1e-4)
    features = FeatureSet(torch.randn(60, WIDTH), labels, CLASSES)
    with pytest.raises(SchemeError, match="came without one"):
        compare(features, inits=["he", "source"], lrs=0.1, seeds=1, epochs=1)


def test_what_cannot_be_compared_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    data = make_features(30, 1)
    folder = tmp_path / "runs"
    with pytest.raises(ConfigError, match="model and data by their names"):
        compare(data, inits=["he"], freezes=["all", "none"], folder=folder)
    with pytest.raises(ConfigError, match="holds its labels"):
        compare(data, (data.features, data.labels), folder=folder)
    with pytest.raises(DataError, match="FeatureSet"):
        compare(data, validation=(data.features, data.labels), folder=folder)
    with pytest.raises(ConfigError, match="needs data"):
        compare(nn.Linear(2, 2), folder=folder)
    with pytest.raises(HeadInitError, match="Unknown"):
        compare("resnet50", "digitz", folder=folder)
    with pytest.raises(HeadInitError, match="per_class"):
        compare(data, per_class=1000, folder=folder)
    assert not folder.exists()


def test_the_outcome_is_written_and_shown(tmp_path: Path) -> None:
    data = make_features(90, 1)
    found = compare(data, test=make_features(60, 2), inits=["he", "zeros", "ridge"], lrs=[0.01, 0.1], seeds=2, epochs=3)
    found.save(tmp_path)
    assert {"comparison.csv", "comparison.json", "report.html", "plots"} <= {path.name for path in tmp_path.iterdir()}
    assert len((tmp_path / "comparison.csv").read_text().splitlines()) == 1 + 12
    assert len(json.loads((tmp_path / "comparison.json").read_text())["runs"]) == 12
    assert "ridge" in found.table()
    assert "Best:" in str(found)
    assert found.winner is not None
    assert found.winner.confusion.sum() == 60
    judged = max(found.rows, key=lambda row: row.val["accuracy"] or 0)
    assert found.winner.confusion.trace() / 60 == pytest.approx(judged.test["accuracy"])
    assert found.starts is not None
    assert set(found.starts.histograms) == {"he", "zeros", "ridge"}
    for kind in ("scores", "curves", "rates", "starts", "budget"):
        assert found.plot(kind).axes
    with pytest.raises(ConfigError, match="Unknown plot"):
        found.plot("pie")


def test_validation_chooses_and_test_reports() -> None:
    rows = [
        RunRow(init=init, lr=lr, seed=seed, val={"accuracy": val}, test={"accuracy": test})
        for init, lr, val, test in (("he", 0.1, 0.9, 0.5), ("he", 0.2, 0.8, 0.99), ("zeros", 0.1, 0.85, 0.95))
        for seed in range(2)
    ]
    best = Comparison(tuple(rows)).best()
    assert (best.init, best.lr, best.mean.estimate if best.mean else None) == ("he", 0.1, 0.5)


def test_the_global_generators_are_left_alone() -> None:
    state = torch.get_rng_state()
    compare(make_features(30, 1), inits=["he", "probe"], seeds=1, epochs=1)
    assert torch.equal(state, torch.get_rng_state())


# --- by names ---------------------------------------------------------------------------------------------------------

SMALL_MODEL = {"name": "timm/test_resnet", "pretrained": False, "image_size": 64}


def by_name(picture_folder: Path, folder: Path, **options: Any) -> Comparison:
    return compare(
        SMALL_MODEL,
        {"name": "imagefolder", "root": str(picture_folder), "modality": "image"},
        **{
            "inits": ["he", "zeros"],
            "lrs": 0.01,
            "seeds": 2,
            "epochs": 2,
            "folder": folder,
            "batch_size": 16,
            **options,
        },
    )


def test_frozen_cells_by_name_are_the_ordinary_runs(tmp_path: Path, picture_folder: Path) -> None:
    found = by_name(picture_folder, tmp_path / "comparison", weight_decays=0.05, seeds=[1])
    settings = {
        "model": SMALL_MODEL,
        "data": {"name": "imagefolder", "root": str(picture_folder)},
        "head": {"name": "linear"},
        "optim": {"lr": 0.01, "weight_decay": 0.05},
        "trainer": {"epochs": 2, "batch_size": 16, "workers": 0, "progress": False},
        "seed": 1,
        "order_seed": 1,
    }
    for init in ("he", "zeros"):
        record = run(settings_from({**settings, "init": {"name": init}}), tmp_path / init)
        (row,) = [row for row in found.rows if (row.init, row.seed) == (init, 1)]
        assert dict(row.val) == pytest.approx(dict(record.val), abs=1e-3)
        assert row.init_loss == pytest.approx(record.init["loss"], rel=1e-4)
        assert row.feature_gradient == pytest.approx(record.init["feature_gradient"], rel=1e-4, abs=1e-9)
        assert row.steps == record.steps


def test_other_freeze_policies_are_runs_that_are_skipped_when_done(tmp_path: Path, picture_folder: Path) -> None:
    schedule = {"policy": "lp_ft", "probe_epochs": 2}
    options: dict[str, Any] = {"freezes": ["all", "none", 1, schedule], "inits": ["he"], "seeds": 1}
    found = by_name(picture_folder, tmp_path, **options)
    assert [row.freeze for row in found.rows] == ["all", "none", "stages(1)", "lp_ft(probe_epochs=2)"]
    folders = sorted((tmp_path / "runs").iterdir())
    assert len(folders) == 3
    stamps = [(folder / "result.json").stat().st_mtime_ns for folder in folders]
    again = by_name(picture_folder, tmp_path, **options)
    assert again.rows == found.rows
    assert [(folder / "result.json").stat().st_mtime_ns for folder in folders] == stamps
    analysed = compare_runs(tmp_path)
    assert {row.freeze for row in analysed.rows} == {"none", "stages(1)", "lp_ft"}


@pytest.mark.slow
def test_runs_in_processes_of_their_own_have_the_same_results(tmp_path: Path, picture_folder: Path) -> None:
    settings, grid = plan_from(
        {
            "model": SMALL_MODEL,
            "data": {"name": "imagefolder", "root": str(picture_folder)},
            "head": {"name": "linear"},
            "inits": ["he", "zeros"],
            "freezes": ["none"],
            "seeds": 1,
            "trainer": {"epochs": 1, "batch_size": 16, "workers": 0, "progress": False},
        }
    )
    alone = compare_settings(settings, grid, tmp_path / "alone")
    shared = compare_settings(settings, grid, tmp_path / "shared", workers=2, keep_models=False)
    assert [dict(row.val) for row in shared.rows] == [
        pytest.approx(dict(row.val), rel=1e-4, abs=1e-6) for row in alone.rows
    ]
    kept = {path.name for folder in (tmp_path / "shared" / "runs").iterdir() for path in folder.iterdir()}
    assert kept >= {"result.json", "metrics.jsonl"}
    assert not kept & {"model", "checkpoint"}


def test_features_are_computed_once_for_all_splits(
    tmp_path: Path, picture_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    import headinit.comparison.study as study

    original = study.extract_features

    def counted(model: Any, batches: Any, **options: Any) -> FeatureSet:
        seen.append(len(batches.split))
        return original(model, batches, **options)

    monkeypatch.setattr(study, "extract_features", counted)
    options: dict[str, Any] = {"split_seeds": [0, 1, 2], "per_class": [4, None], "cache": tmp_path / "cache"}
    found = by_name(picture_folder, tmp_path / "a", **options)
    pictures = sum(1 for _ in picture_folder.rglob("*.png")) or sum(1 for _ in picture_folder.rglob("*.jpg"))
    assert seen == [pictures]
    assert len({row.split_seed for row in found.rows}) == 3
    by_name(picture_folder, tmp_path / "b", **options)
    assert len(list((tmp_path / "cache").glob("*/complete.json"))) == 1


def test_augmented_views_are_other_features(tmp_path: Path, picture_folder: Path) -> None:
    options: dict[str, Any] = {"inits": ["he"], "seeds": 1, "epochs": 3, "cache": tmp_path / "cache"}
    plain_rows = by_name(picture_folder, tmp_path / "a", **options).rows
    data = {"name": "imagefolder", "root": str(picture_folder), "modality": "image", "augmentation": "basic"}
    options |= {"lrs": 0.01, "batch_size": 16, "views": 2}
    found = compare(SMALL_MODEL, data, folder=tmp_path / "a", **options)
    assert not (tmp_path / "a" / "runs").exists()
    assert found.rows[0].init_loss == plain_rows[0].init_loss
    assert found.rows[0].val["nll"] != plain_rows[0].val["nll"]
    assert len(list((tmp_path / "cache").glob("*/complete.json"))) == 3
    with pytest.raises(ConfigError, match="augmented"):
        by_name(picture_folder, tmp_path / "b", views=2)


def test_runs_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        compare_runs(tmp_path / "none")
    with pytest.raises(DataError, match="No finished run"):
        compare_runs(tmp_path)


POOL = """
import os, sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from headinit.comparison.runs import prepare_worker
if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=prepare_worker, initargs=(1,))
    print(pool.submit(os.getpid).result(), flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_a_worker_does_not_outlive_a_killed_comparison(tmp_path: Path) -> None:
    script = tmp_path / "pool.py"
    script.write_text(POOL)
    parent = subprocess.Popen([sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = psutil.Process(int(parent.stdout.readline()))
    assert worker.ppid() == parent.pid
    parent.kill()
    parent.communicate()
    _, alive = psutil.wait_procs([worker], timeout=60)
    assert not alive
