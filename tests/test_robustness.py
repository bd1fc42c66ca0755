"""Disks that are full, folders that cannot be written, two processes in one folder: a clear end, and nothing lost."""

from __future__ import annotations

import logging
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn

from headinit import attach
from headinit.analysis.results import read_metrics, unfinished_runs
from headinit.config import Settings, settings_from
from headinit.errors import CheckpointError
from headinit.experiment import run
from headinit.features.cache import FeatureCache
from headinit.features.extract import extract_features
from headinit.training.checkpoint import CURRENT, run_lock
from headinit.training.finetune import _Run

ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writing beyond this size fails as it does on a full disk."""
    earlier = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, earlier[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, earlier)


@pytest.fixture
def settings(picture_folder: Path) -> Settings:
    small = ["model=timm", "model.name=test_resnet", "model.pretrained=false", "model.image_size=32", "freeze=none"]
    trainer = ["trainer.epochs=3", "trainer.progress=false", "trainer.workers=0", "trainer.cache=null"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        data = ["data=imagefolder", f"data.root={picture_folder}"]
        return settings_from(compose("finetune", overrides=[*small, *trainer, *data]))


@pytest.mark.parametrize(("room", "told"), [(20_000, "Cannot write a checkpoint"), (300, "Cannot write to")])
def test_a_run_whose_disk_fills_up_goes_on_where_it_stopped(
    settings: Settings, tmp_path: Path, room: int, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(settings, tmp_path / "whole")
    evaluations = []
    original = _Run.evaluate

    def evaluate(self: _Run, epoch: int, on_evaluation: object) -> None:
        evaluations.append(epoch)
        if epoch == 2 and len(evaluations) == 3:  # from here on, in the first attempt
            limit = files_of_at_most(room)
            limit.__enter__()
            limits.append(limit)
        original(self, epoch, on_evaluation)  # type: ignore[arg-type]

    limits: list = []
    monkeypatch.setattr(_Run, "evaluate", evaluate)
    try:
        with pytest.raises(CheckpointError, match=told):
            run(settings, tmp_path / "run")
    finally:
        limits[0].__exit__(None, None, None)
    assert unfinished_runs(tmp_path) == [tmp_path / "run"]
    assert (tmp_path / "run" / "checkpoint" / CURRENT).is_file()
    resumed = run(settings, tmp_path / "run")
    assert evaluations == [0, 1, 2, 2, 3]
    assert (resumed.val, resumed.history, resumed.best_epoch) == (whole.val, whole.history, whole.best_epoch)
    assert [line["epoch"] for line in read_metrics(tmp_path / "run")] == [0, 1, 2, 3]
    assert unfinished_runs(tmp_path) == []


def test_no_room_for_the_model_loses_no_training(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = attach.save

    def save(*arguments: object, **options: object) -> object:
        with files_of_at_most(20_000):
            return original(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(attach, "save", save)
    with pytest.raises(CheckpointError, match="Cannot write the model"):
        run(settings, tmp_path / "run")
    monkeypatch.undo()
    assert not (tmp_path / "run" / "model").exists()
    monkeypatch.setattr(_Run, "step", None)  # not called again
    assert run(settings, tmp_path / "run").best_epoch is not None


def test_two_processes_on_one_run_directory(settings: Settings, tmp_path: Path) -> None:
    with run_lock(tmp_path / "checkpoint"), pytest.raises(CheckpointError, match="is in use by process"):
        run(settings, tmp_path)
    assert run(settings, tmp_path).steps > 0


@pytest.mark.skipif(not Path("/sys").is_dir(), reason="needs a folder that not even the administrator can write to")
@pytest.mark.parametrize("where", ["/sys/headinit", "file/run"])
def test_a_folder_that_cannot_be_written_is_one_message(tmp_path: Path, where: str, picture_folder: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    command = ["data=imagefolder", f"data.root={picture_folder}", "model=timm", "model.name=test_resnet"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "finetune.py"), f"hydra.run.dir={where}", *command],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "hydra.run.dir=FOLDER" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not Path("/sys").is_dir(), reason="needs a folder that not even the administrator can write to")
def test_a_cache_that_cannot_be_written_is_done_without(caplog: pytest.LogCaptureFixture) -> None:
    model, data = nn.Sequential(nn.Flatten(), nn.Linear(6, 2)), (torch.ones(5, 2, 3), torch.tensor([0, 1, 0, 1, 1]))
    with caplog.at_level(logging.WARNING):
        found = extract_features(model, data, cache=FeatureCache("/sys/headinit"))
    assert torch.equal(found.features, extract_features(model, data).features)
    assert "going on without it" in caplog.text
