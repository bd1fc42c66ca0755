"""What is written is strict, whole, and read back the same."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import headinit.analysis.results as results
from headinit.analysis.results import (
    RunRecord,
    RunRow,
    append_metrics,
    library_versions,
    plain,
    read_metrics,
    read_result,
    read_runs,
    rows_from,
    write_json,
    write_result,
)
from headinit.errors import CheckpointError, ConfigError, DataError


def record(**changes) -> RunRecord:
    values = {
        "config": {
            "init": {"name": "he", "gain": 1.0},
            "optim": {"lr": 0.01, "weight_decay": 0.1},
            "data": {"name": "digits", "per_class": 5},
            "freeze": {"policy": "stages", "stages": 2},
        },
        "seeds": {"head": 3, "order": 4, "split": 5},
        "init": {"loss": 2.5, "chance_loss": 2.3, "accuracy": 0.1, "logit_std": 0.5, "feature_gradient": 0.7},
        "val": {"accuracy": 0.9, "nll": 0.3},
        "test": {"accuracy": 0.85},
        "best_epoch": 7,
        "steps": 120,
        "seconds": {"extract": 1.5, "train": 2.5},
        "history": ((10, 0.5), (20, 0.9)),
        "class_names": ("zéro", "<b>one</b>"),
        "data": "digits",
    }
    return RunRecord(**{**values, **changes})


def test_round_trip(tmp_path: Path) -> None:
    path = write_result(tmp_path / "new" / "run", record())
    found = read_result(tmp_path / "new" / "run")
    assert found == record()
    assert found.folder == str(path.parent)
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]


def test_json_is_strict_and_values_are_converted(tmp_path: Path) -> None:
    value = {
        "tensor": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16),
        "scalar": np.float32(0.5),
        "array": np.arange(3),
        "infinite": [float("inf"), -np.inf],
        "path": Path("a") / "b",
        "set": {2, 1},
        "record": record().seeds,
        "dtype": torch.float16,
        "flag": np.bool_(True),
        1: None,
    }

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    text = write_json(tmp_path / "x.json", value).read_text()
    content = json.loads(text, parse_constant=refuse)
    assert content == {
        "tensor": [1.5, None],
        "scalar": 0.5,
        "array": [0, 1, 2],
        "infinite": [None, None],
        "path": os.path.join("a", "b"),
        "set": [1, 2],
        "record": {"head": 3, "order": 4, "split": 5},
        "dtype": "torch.float16",
        "flag": True,
        "1": None,
    }
    with pytest.raises(TypeError, match="function"):
        plain({"f": refuse})


def test_a_name_that_is_not_unicode_survives(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    write_result(tmp_path, record(class_names=(name,)))
    assert read_result(tmp_path).class_names == (name,)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_result(tmp_path, record())
    before = (tmp_path / "result.json").read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(results.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_result(tmp_path, record(steps=999))
    assert (tmp_path / "result.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_a_reader_never_sees_half_a_result(tmp_path: Path) -> None:
    names = tuple(f"class {k}" for k in range(5000))
    write_result(tmp_path, record(class_names=names))
    stop, faults = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            try:
                assert len(read_result(tmp_path).class_names) == 5000
            except Exception as error:
                faults.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for steps in range(30):
        write_result(tmp_path, record(class_names=names, steps=steps))
    stop.set()
    reader.join()
    assert not faults


def test_runs_are_read_beside_unfinished_and_damaged_ones(tmp_path: Path) -> None:
    write_result(tmp_path / "b", record(steps=2))
    write_result(tmp_path / "a" / "deep", record(steps=1))
    append_metrics(tmp_path / "running", {"step": 1})
    write_result(tmp_path / "b" / "model", record(steps=3))  # not a run of its own
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "result.json").write_text('{"format": 1, "conf')
    with pytest.warns(UserWarning, match=r"damaged.*result\.json") as caught:
        runs = read_runs(tmp_path)
    assert [run.steps for run in runs] == [1, 2]
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "Expecting value"),
        ("[]", "list"),
        ('{"format": 99}', "format is 99"),
        ('{"format": 1, "config": {}, "seeds": {}, "init": {}}', "val missing"),
        ('{"format": 1, "config": {}, "seeds": {}, "init": {}, "val": {}, "history": [1]}', "Repeat"),
    ],
)
def test_damaged_results_are_named(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(CheckpointError, match=words):
        read_result(tmp_path)


def test_missing_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No finished run"):
        read_result(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        read_runs(tmp_path / "nowhere")


def test_fields_of_a_later_minor_version_are_ignored(tmp_path: Path) -> None:
    path = write_result(tmp_path, record())
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "later": 1}))
    assert read_result(tmp_path) == record()


def test_metrics_lines_survive_a_kill_in_the_middle_of_one(tmp_path: Path) -> None:
    append_metrics(tmp_path, {"step": 1, "val": {"accuracy": np.float64(0.5), "nll": float("nan")}})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "va')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]
    append_metrics(tmp_path, {"step": 2})
    assert read_metrics(tmp_path) == [{"step": 1, "val": {"accuracy": 0.5, "nll": None}}, {"step": 2}]
    assert read_metrics(tmp_path / "nowhere") == []


def test_row_takes_its_factors_from_the_configuration() -> None:
    row = RunRow.from_record(record())
    assert (row.init, row.lr, row.weight_decay, row.seed, row.split_seed) == ("he", 0.01, 0.1, 3, 5)
    assert (row.freeze, row.per_class, row.data, row.best_epoch, row.steps) == ("stages(2)", 5, "digits", 7, 120)
    assert row.val["accuracy"] == 0.9
    assert row.test == {"accuracy": 0.85}
    assert row.history == ((10, 0.5), (20, 0.9))
    assert (row.init_loss, row.feature_gradient, row.seconds) == (2.5, 0.7, 4.0)
    assert row.backbone_lr is None
    layered = record(rates={"head": 1e-2, "backbone/00": 1e-5, "backbone/12": 1e-4})
    assert RunRow.from_record(layered).backbone_lr == 1e-4
    plain_names = RunRow.from_record(record(config={"init": "zeros", "optim": {"lr": 1}, "freeze": "none"}, test=None))
    assert (plain_names.init, plain_names.freeze, plain_names.test) == ("zeros", "none", {})
    with pytest.raises(ConfigError, match=r"optim\.lr"):
        RunRow.from_record(record(config={"init": "he"}))


def test_labels_show_what_differs() -> None:
    def run(init: dict, **groups: dict) -> RunRecord:
        return record(config={"init": init, "optim": {"lr": 1.0}, **groups})

    he = {"name": "he", "gain": 1}
    same = rows_from([run(he), run(he), run({"name": "ridge", "strength": 2})])
    assert [row.init for row in same] == ["he", "he", "ridge"]
    models = rows_from([run(he, model={"name": "a", "depth": 1}), run(he, model={"name": "b", "depth": 2})])
    assert [row.init for row in models] == ["he model=a", "he model=b"]
    sizes = rows_from([run(he, data={"name": "digits", "train_size": size, "per_class": None}) for size in (10, 20)])
    assert [(row.init, row.data) for row in sizes] == [("he", "digits train_size=10"), ("he", "digits train_size=20")]
    speed = rows_from([run(he, trainer={"workers": workers}) for workers in (0, 2)])
    assert [row.init for row in speed] == ["he", "he"]


def test_versions_name_the_libraries() -> None:
    versions = library_versions()
    assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"python", "numpy", "transformers", "headinit"} <= versions.keys()
