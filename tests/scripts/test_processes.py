"""Several processes of one run, as torchrun and accelerate start them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import headinit
from headinit.errors import TrainingError
from headinit.processes import join_processes

from ..training.two_processes import train

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "scripts" / "finetune.py")
RUN = (
    "model=timm",
    "model.name=test_vit",
    "model.pretrained=false",
    "model.image_size=32",
    "init=ridge",
    "freeze=none",
    "trainer.epochs=2",
    "trainer.workers=0",
    "trainer.progress=false",
    "data=imagefolder",
)

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "PYTHONPATH": str(ROOT),
}


def launched(command: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_two_processes_equal_one_with_the_doubled_batch(tmp_path: Path, picture_folder: Path) -> None:
    """Features in shares, a scheme computed from them, training, evaluation, one result; and found again."""
    run = [SCRIPT, *RUN, f"data.root={picture_folder}"]
    torchrun = [*TORCHRUN, *run, "trainer.batch_size=8"]
    two = launched(torchrun, tmp_path)
    assert two.returncode == 0, two.stderr[-3000:]
    assert two.stdout.count("best epoch") == 1  # only the first process prints
    one = launched([*run, "trainer.batch_size=16", "trainer.cache=null"], tmp_path)
    assert one.returncode == 0, one.stderr[-3000:]
    (folder,) = tmp_path.glob("outputs/*-2_processes")
    (other,) = (path.parent for path in tmp_path.glob("outputs/*/result.json") if path.parent != folder)
    theirs, ours = (json.loads((path / "result.json").read_text()) for path in (folder, other))
    assert theirs["config"]["trainer"]["processes"] == 2
    assert (theirs["steps"], theirs["best_epoch"]) == (ours["steps"], ours["best_epoch"])
    for part in ("init", "val", "test"):
        for name, value in ours[part].items():
            if isinstance(value, float):
                assert theirs[part][name] == pytest.approx(value, rel=1e-3, abs=1e-5), (part, name)
    lines = [[json.loads(line) for line in (path / "metrics.jsonl").open()] for path in (folder, other)]
    assert [line["epoch"] for line in lines[0]] == [0, 1, 2]
    for row, expected in zip(*lines, strict=True):
        assert row["train_loss"] == (expected["train_loss"] and pytest.approx(expected["train_loss"], rel=1e-4))
        assert row["nll"] == pytest.approx(expected["nll"], rel=1e-3)
    again = launched(torchrun, tmp_path)
    assert again.returncode == 0, again.stderr[-3000:]
    assert again.stdout.count("has finished before") == 1


@pytest.mark.slow
@pytest.mark.parametrize("phases", ["lp_ft", "gradual"])
def test_phases_on_two_processes_equal_one_with_the_doubled_batch(phases: str) -> None:
    done = launched([*TORCHRUN, "-m", "tests.training.two_processes", "8", phases], ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(json.loads(done.stdout.split("RESULT")[1].splitlines()[0]), *train(16, phases))


def assert_same(two: dict[str, Any], model: nn.Module, one: dict[str, Any]) -> None:
    """What two processes found, and one, to rounding."""
    assert two["steps"] == one["steps"]
    for theirs, ours in zip(two["history"], one["history"], strict=True):
        values = [[row[key] or 0.0 for key in ours if key != "phase"] for row in (theirs, ours)]
        assert values[0] == pytest.approx(values[1], rel=1e-4, abs=1e-6)
    weights = {name: torch.tensor(value) for name, value in two["weights"].items()}
    torch.testing.assert_close(weights, dict(model.state_dict()), rtol=1e-4, atol=1e-6, check_dtype=False)


@pytest.mark.slow
def test_accelerate_launch_and_sigterm_to_one_process(tmp_path: Path) -> None:
    """Two processes equal one with the doubled batch. The second is asked to end: both save, leave, and go on."""
    module = ["-m", "tests.training.two_processes", "8"]
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", *module]
    whole = launched(launcher, ROOT)
    assert whole.returncode == 0, whole.stderr[-3000:]
    run = {"HEADINIT_TEST_FOLDER": str(tmp_path / "run"), "HEADINIT_TEST_STOP": "1"}
    stopped = launched(launcher, ROOT, **run)
    assert stopped.returncode != 0
    assert "RESULT" not in stopped.stdout
    assert (tmp_path / "run" / "checkpoint.safetensors").is_file()
    resumed = launched(launcher, ROOT, **{**run, "HEADINIT_TEST_STOP": ""})
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    told = [json.loads(done.stdout.split("RESULT")[1].splitlines()[0]) for done in (whole, resumed)]
    assert told[0] == told[1]  # to the same bits
    assert_same(told[0], *train(16))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ("freeze=none", "trainer.accumulation=2", "trainer.clip_norm=0.5"),
        ("freeze=stages", "freeze.stages=2", "trainer.ema=0.9", "optim=sgd"),
        ("freeze=lp_ft",),
    ],
    ids=lambda settings: settings[0],
)
def test_a_model_in_pieces_equals_a_whole_one(tmp_path: Path, picture_folder: Path, settings: tuple[str, ...]) -> None:
    """FSDP through accelerate's configuration: curves, test scores and the saved model of a whole one."""
    run = [SCRIPT, *RUN, f"data.root={picture_folder}", *settings]
    cut = {**FSDP, "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "Block"}
    pieces = launched([*TORCHRUN, "-m", "tests.training.in_pieces", *run, "trainer.batch_size=8"], tmp_path, **cut)
    assert pieces.returncode == 0, pieces.stderr[-3000:]
    whole = launched([*run, "trainer.batch_size=16"], tmp_path)
    assert whole.returncode == 0, whole.stderr[-3000:]
    (folder,) = tmp_path.glob("outputs/*-2_processes")
    (other,) = (path.parent for path in tmp_path.glob("outputs/*/result.json") if path.parent != folder)
    theirs, ours = (json.loads((path / "result.json").read_text()) for path in (folder, other))
    assert theirs["best_epoch"] == ours["best_epoch"]
    assert theirs["test"]["nll"] == pytest.approx(ours["test"]["nll"], rel=1e-3)
    assert theirs["frozen_digest"]["before"] == theirs["frozen_digest"]["after"] == ours["frozen_digest"]["after"]
    rows = [[json.loads(line) for line in (path / "metrics.jsonl").open()] for path in (folder, other)]
    for row, expected in zip(*rows, strict=True):
        assert [row[key] or 0 for key in ("train_loss", "nll")] == [
            pytest.approx(expected[key] or 0, rel=1e-3) for key in ("train_loss", "nll")
        ]
    saved = [headinit.load(path / "model").state_dict() for path in (folder, other)]
    torch.testing.assert_close(saved[0], saved[1], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_model_in_pieces_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    command = [*TORCHRUN, "-m", "tests.training.in_pieces", "tests.training.two_processes", "8"]
    cut = {**FSDP, "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP", "FSDP_MIN_NUM_PARAMS": "10"}
    whole = launched(command, ROOT, **cut)
    assert whole.returncode == 0, whole.stderr[-3000:]
    cut["HEADINIT_TEST_FOLDER"] = str(tmp_path / "run")
    stopped = launched(command, ROOT, HEADINIT_TEST_STOP="1", **cut)
    assert stopped.returncode != 0
    assert "RESULT" not in stopped.stdout
    resumed = launched(command, ROOT, **cut)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    told = [json.loads(done.stdout.split("RESULT")[1].splitlines()[0]) for done in (whole, resumed)]
    assert told[0] == told[1]
    assert_same(told[0], *train(16))


@pytest.mark.slow
def test_fsdp_that_would_not_be_done_is_refused() -> None:
    done = launched([*TORCHRUN, "-m", "tests.training.two_processes", "8"], ROOT, **FSDP)
    assert done.returncode != 0
    assert "for GPUs only, and these are 2 processes on cpu" in done.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, r"configured for DeepSpeed.*fsdp_version: 2"),
        ({"ACCELERATE_USE_FSDP": "true"}, r"first version of FSDP.*fsdp_version: 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "first version of FSDP"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            "Leave fsdp_activation_checkpointing out",
        ),
    ],
)
def test_other_ways_to_cut_a_model_are_refused_with_what_to_do(
    settings: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in settings.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(TrainingError, match=message):
        join_processes()
