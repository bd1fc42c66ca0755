"""The comparison from the command line, as a user runs it."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("model=timm", "model.name=test_resnet", "model.pretrained=false", "model.image_size=64", "trainer.epochs=2")


def script(name: str, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *arguments],
        cwd=cwd, env={**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", **environment}, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip


def rows_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "comparison.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_the_promised_command_line(tmp_path: Path, picture_folder: Path) -> None:
    data = ("data=imagefolder", f"data.root={picture_folder}")
    command = (*SMALL, *data, "init=[he,zeros,{name:normal,std:0.5}]", "optim.lr=[1e-3,1e-2]", "seeds=2")
    first = script("compare", *command, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    (folder,) = tmp_path.glob("outputs/compare-*")
    rows = rows_of(folder)
    assert len(rows) == 3 * 2 * 2
    assert {row["init"] for row in rows} == {"he", "zeros", "normal"}
    assert {float(row["lr"]) for row in rows} == {1e-3, 1e-2}
    assert {"comparison.json", "report.html", "cells.jsonl", "plots"} <= {path.name for path in folder.iterdir()}
    assert any((folder / "plots").glob("*.png"))
    assert "scheme" in first.stdout
    assert "report.html" in first.stdout
    # More of the same finds its finished cells and its features.
    lines = (folder / "cells.jsonl").read_text()
    second = script("compare", *command, "seeds=3", "init=[he,zeros]", cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    assert [path.name for path in tmp_path.glob("outputs/compare-*")] == [folder.name]
    assert (folder / "cells.jsonl").read_text().startswith(lines)
    assert len(rows_of(folder)) == 2 * 2 * 3
    assert len(list(tmp_path.glob("outputs/features/*/complete.json"))) == 1


def test_runs_of_finetune_are_analysed(tmp_path: Path, picture_folder: Path) -> None:
    data = ("data=imagefolder", f"data.root={picture_folder}")
    sweep = script("finetune", "-m", *SMALL, *data, "init=he,zeros", "seed=0,1", cwd=tmp_path)
    assert sweep.returncode == 0, sweep.stderr
    found = script("compare", "runs=outputs", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert len(rows_of(tmp_path / "outputs")) == 4
    content = json.loads((tmp_path / "outputs" / "comparison.json").read_text())
    assert {run["init"] for run in content["runs"]} == {"he", "zeros"}
    assert (tmp_path / "outputs" / "report.html").is_file()


def test_augmented_views_from_the_command_line(tmp_path: Path, picture_folder: Path) -> None:
    options = ("data=imagefolder", f"data.root={picture_folder}", "data.augmentation=basic", "views=2", "init=[he]")
    found = script("compare", *SMALL, *options, "optim.lr=[1e-2]", "seeds=1", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert len(list(tmp_path.glob("outputs/features/*/complete.json"))) == 3  # plain pictures, and two views of them
    assert not list(tmp_path.glob("outputs/compare-*/runs"))  # the head bank trained on them, the backbone ran no more


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["init=[he,zeroes]"], "Did you mean 'zeros'"),
        (["init=hee"], "Did you mean 'he'"),
        (["init.folds=3"], "option of one scheme"),
        (["optim.lr=[0.1,-1]"], "lr=-1"),
        (["seeds=0"], "seeds is empty"),
        (["freeze=[all,nothing]"], "nothing"),
        (["runs=nowhere"], "nowhere"),
        (["model=minilm"], "data=pydocs"),
        (["views=2"], "data.augmentation=basic"),
        (["init=[he,{name:he,reinit_top:1}]"], "give it to all"),
        (["data.per_class=[100000]"], "per_class"),
    ],
)
def test_a_mistake_is_one_message_and_leaves_nothing(tmp_path: Path, arguments: list[str], message: str) -> None:
    found = script("compare", *arguments, cwd=tmp_path)
    assert found.returncode == 2, found.stdout + found.stderr
    assert message in found.stderr
    assert "Traceback" not in found.stderr
    assert not any(tmp_path.iterdir())
