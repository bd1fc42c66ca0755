"""The command line, as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def finetune(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "finetune.py"), *arguments],
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


SMALL = (
    "model=timm",
    "model.name=test_resnet",
    "model.pretrained=false",
    "model.image_size=64",
    "trainer.epochs=1",
)


def test_a_repeated_command_finds_its_run(tmp_path: Path, picture_folder: Path) -> None:
    command = (*SMALL, "data=imagefolder", f"data.root={picture_folder}")
    first = finetune(*command, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "random" in first.stdout
    (result,) = tmp_path.glob("outputs/*/result.json")
    assert json.loads(result.read_text())["pretrained"] is False
    second = finetune(*command, cwd=tmp_path)
    assert second.returncode == 0
    assert "has finished before" in second.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["init=hee"], "Did you mean 'he'"),
        (["model=resnet51"], "Did you mean 'resnet50'"),
        (["optim.lrr=1"], "Did you mean 'lr'"),
        (["trainer.epochs=many"], "trainer.epochs"),
        (["model=minilm"], "data=pydocs"),
        (["data=imagefolder"], "data.root"),
        (["data=imagefolder", "data.root=nowhere"], "nowhere"),
        (["model=timm", "model.name=resnet1888"], "resnet18"),
    ],
)
def test_mistakes_end_with_one_message(tmp_path: Path, arguments: list[str], message: str) -> None:
    ended = finetune(*arguments, cwd=tmp_path)
    assert ended.returncode == 2, ended.stderr
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    assert "Traceback" in finetune("init=hee", "--debug", cwd=tmp_path).stderr
    assert "Traceback" in finetune("init=hee", cwd=tmp_path, HYDRA_FULL_ERROR="1").stderr
