"""Sweeps by Hydra's launchers, read by compare.py while they run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from headinit.analysis.results import read_runs, unfinished_runs
from headinit.command_line import cores_of_job

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "model=timm",
    "model.name=test_resnet",
    "model.pretrained=false",
    "model.image_size=32",
    "freeze=none",
    "trainer.epochs=2",
    "trainer.workers=0",
    "trainer.progress=false",
    "trainer.cache=null",
    "data=imagefolder",
)


def sweep(launcher: str, cwd: Path, data: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "scripts" / "finetune.py"), "-m", f"hydra/launcher={launcher}"]
    return subprocess.Popen(
        [*command, *SMALL, f"data.root={data}", "init=he,zeros", "seed=0,1", *arguments],
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "package", "options"),
    [
        ("local", "hydra_plugins.hydra_joblib_launcher", ["hydra.launcher.n_jobs=2"]),
        ("submitit_local", "hydra_plugins.hydra_submitit_launcher", ["hydra.launcher.timeout_min=5"]),
        ("ray", "hydra_plugins.hydra_ray_launcher", []),
    ],
)
def test_a_sweep_lands_in_one_folder_that_can_be_read_while_it_runs(
    launcher: str, package: str, options: list[str], tmp_path: Path, picture_folder: Path
) -> None:
    pytest.importorskip(package, reason="an extra of its own")
    running = sweep(launcher, tmp_path, picture_folder, *options)
    outputs, seen = tmp_path / "outputs", []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a half-written result would be skipped with a warning
        while running.poll() is None:
            if outputs.is_dir():
                seen.append((len(read_runs(outputs)), len(unfinished_runs(outputs))))
            time.sleep(0.02)
    assert running.returncode == 0, running.communicate()[0][-3000:]
    records = read_runs(outputs)
    assert {(record.config["init"]["name"], record.seeds["head"]) for record in records} == {
        (init, seed) for init in ("he", "zeros") for seed in (0, 1)
    }
    assert any(unfinished for _, unfinished in seen)
    assert unfinished_runs(outputs) == []


@pytest.mark.parametrize(
    ("launcher", "extra"), [("local", "joblib"), ("slurm", "slurm"), ("ray", "ray"), ("submitit_local", "slurm")]
)
def test_a_launcher_that_is_not_installed_is_said_with_its_extra(launcher: str, extra: str, tmp_path: Path) -> None:
    """The plugins are looked up in a package that is hidden here."""
    code = (
        "import sys, types, runpy\n"
        "sys.modules['hydra_plugins'] = types.ModuleType('hydra_plugins')\n"
        "sys.modules['hydra_plugins'].__path__ = []\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    script = str(ROOT / "scripts" / "finetune.py")
    done = subprocess.run(
        [sys.executable, "-c", code, script, "-m", f"hydra/launcher={launcher}", "init=he,zeros"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert f"pip install 'headinit[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("launcher", ["local", "slurm", "ray"])
def test_launcher_files_divide_the_cores(launcher: str) -> None:
    options = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "hydra" / "launcher" / f"{launcher}.yaml"))
    assert isinstance(options, dict)
    assert cores_of_job(options) == {"local": 1, "slurm": 4, "ray": 1}[launcher]


def test_cores_of_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    found = [cores_of_job({"n_jobs": jobs}) for jobs in (1, 2, 3, 8, 100, -1, -7)]
    assert found == [8, 4, 2, 1, 1, 1, 4]
