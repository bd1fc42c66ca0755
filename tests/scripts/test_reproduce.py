"""Published baselines from the command line, as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = ("model=timm", "model.name=test_resnet", "model.pretrained=false", "model.image_size=64", "trainer.epochs=1")


def script(name: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {"HF_HUB_OFFLINE": "1", "HEADINIT_OFFLINE": "1", "TORCH_HOME": str(cwd), "HF_HOME": str(cwd)}
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *arguments],
        cwd=cwd, env={**os.environ, "COLUMNS": "200", **environment}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_a_stand_in_runs_to_its_end_and_claims_nothing(tmp_path: Path, picture_folder: Path) -> None:
    data = ("data=imagefolder", f"data.root={picture_folder}")
    command = ("baseline=pytorch_tutorial/fixed", "seeds=2", "table=table.md", *STAND_IN, *data)
    first = script("reproduce", *command, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "published  accuracy 95.42" in first.stdout
    assert "verdict    stand-in" in first.stdout
    assert "model.name=test_resnet in place of resnet18.IMAGENET1K_V1" in first.stdout
    (state,) = json.loads((tmp_path / "table.json").read_text())
    results = sorted(tmp_path.glob("outputs/reproduce/pytorch_tutorial-fixed/*/result.json"))
    values = [100 * json.loads(path.read_text())["val"]["accuracy"] for path in results]
    assert sorted(state["measured"]["val.accuracy"]) == sorted(values)
    assert len(values) == state["seeds"] == 2
    table = (tmp_path / "table.md").read_text()
    assert "0 of them run" in table
    assert "| pytorch_tutorial/fixed | accuracy 95.42 (1 seed) | never run<br>**stand-in**" in table
    # More runs of the same row find those that have finished; another machine's states are told apart.
    again = script("reproduce", *command, cwd=tmp_path)
    assert again.stdout.count("has finished before") == 2
    unnamed = script("reproduce", "states=table.json", "table=other.md", cwd=tmp_path)
    assert unnamed.returncode == 2
    assert "Say who ran" in unnamed.stderr
    named = script("reproduce", "states=table.json", "table=other.md", "by=Ada, 1 GPU", cwd=tmp_path)
    assert named.returncode == 0, named.stderr
    assert "run by Ada, 1 GPU" in (tmp_path / "other.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["baseline=pytorch_tutorial/fixed"], "resnet18-f37072fd.pth"),
        (["baseline=run_glue/rte", "check=true"], "0 of 1 rows can be run here"),
        (["baseline=run_gleu"], "Did you mean 'run_glue'"),
        (["baseline=run_glue/rte", "optim.lrr=1"], "lrr"),
        (["baseline=run_glue/rte", "seeds=many"], "seeds=many"),
        ([], "baseline=NAME"),
        (["run_glue"], "NAME=VALUE"),
    ],
)
def test_what_is_missing_or_wrong_is_one_message_and_exit_code_2(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    ended = script("reproduce", *arguments, cwd=tmp_path)
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert message in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".json", ".md", ".pth")]


def test_a_recipe_composes_into_an_ordinary_run(tmp_path: Path) -> None:
    own = ("data=digits", "data.train_size=40", "hydra.run.dir=run")
    ended = script("finetune", "baseline=pytorch_tutorial/fixed", *STAND_IN, *own, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    config = json.loads((tmp_path / "run" / "result.json").read_text())["config"]
    assert (config["trainer"]["batch_size"], config["schedule"]["step_epochs"]) == (4, 7)
    assert config["data"]["name"] == "digits"
    several = script("finetune", "baseline=pytorch_tutorial", cwd=tmp_path)
    assert several.returncode == 2
    assert "pytorch_tutorial/finetuned" in several.stderr
