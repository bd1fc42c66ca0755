"""Trackers, read back by their own packages. Those that are not installed skip; TensorBoard is a test dependency."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from headinit import tracking as tracking_module
from headinit.config import run_id, settings_from
from headinit.errors import ConfigError
from headinit.experiment import run
from headinit.tracking import TRACKERS, check_tracker, record_evaluation, record_result, record_start, tracking

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
CONFIG = {"optim": {"lr": 0.1, "betas": [0.9, 0.99]}, "seed": 3, "init": {"name": "he"}}


def story(options: dict[str, Any], folder: Path) -> None:
    """A small run, told to a tracker."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text('{"val": 1}')
    with tracking(options, folder, CONFIG):
        record_start({"loss": 2.5, "chance_loss": 2.3, "warnings": ["none"]})
        record_evaluation({"epoch": 0, "step": 0, "train_loss": None, "lr": 0.0, "accuracy": 0.1})
        record_evaluation({"epoch": 1, "step": 7, "train_loss": 1.5, "lr": 0.05, "accuracy": 0.6})
        record_result({"val": {"accuracy": 0.6}, "test": {"accuracy": 0.5}}, 7, [folder / "result.json", folder / "no"])


def events(folder: Path) -> Any:
    """All of TensorBoard's events of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    return found


def test_tensorboard_holds_curves_configuration_and_result(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    story({"name": "tensorboard", "folder": None}, tmp_path)
    found = events(tmp_path / "tensorboard")
    curve = found.Scalars("val/accuracy")
    assert [(point.step, round(point.value, 4)) for point in curve] == [(0, 0.1), (7, 0.6)]
    assert found.Scalars("train/loss")[0].value == pytest.approx(1.5)
    assert found.Scalars("start/loss")[0].value == pytest.approx(2.5)
    assert found.Scalars("final/test/accuracy")[0].value == pytest.approx(0.5)
    assert found.Tensors("result.json/text_summary")[0].tensor_proto.string_val[0].decode().strip() == '{"val": 1}'
    (stored,) = (tmp_path / "tensorboard").rglob("hparams.yml")
    assert "optim.lr: 0.1" in stored.read_text()


def test_a_whole_run_is_tracked_and_named_the_same(tmp_path: Path, picture_folder: Path) -> None:
    pytest.importorskip("tensorboard")
    small = ["model=timm", "model.name=test_resnet", "model.pretrained=false", "model.image_size=32"]
    data = ["data=imagefolder", f"data.root={picture_folder}", "trainer.cache=null", "trainer.workers=0"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        plain, tracked = (
            compose("finetune", overrides=[*small, *data, "trainer.epochs=2", "trainer.progress=false", tracker])
            for tracker in ("tracker=none", "tracker=tensorboard")
        )
    assert run_id(plain) == run_id(tracked)
    record = run(settings_from(tracked), tmp_path / "run")
    found = events(tmp_path / "run" / "tensorboard")
    assert [point.step for point in found.Scalars("val/accuracy")] == [step for step, _ in record.history]
    assert found.Scalars("final/val/nll")[0].value == pytest.approx(record.val["nll"], rel=1e-5)
    assert found.Scalars("start/chance_loss")[0].value == pytest.approx(record.init["chance_loss"], rel=1e-5)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["config"]["tracker"]["name"] == "tensorboard"


def story_elsewhere(options: dict[str, Any], folder: Path) -> None:
    """The same in a process of its own: some trackers read settings when they are imported, and write when it ends."""
    code = (
        "import json, sys; from pathlib import Path; from tests.test_tracking import story\n"
        "story(json.loads(sys.argv[1]), Path(sys.argv[2]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(options), str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "goes on without" not in done.stderr


def test_wandb_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="an extra of its own: pip install 'headinit[wandb]'")
    story_elsewhere({"name": "wandb", "project": "headinit", "mode": "offline"}, tmp_path / "some-run")
    (kept,) = (tmp_path / "some-run" / "wandb").glob("offline-run-*-some-run/run-some-run.wandb")
    content = kept.read_bytes()
    for text in (b"val/accuracy", b"start/loss", b"final/test/accuracy", b"optim.lr"):
        assert text in content, text
    assert list((tmp_path / "some-run" / "wandb").glob("offline-run-*/files/result.json"))


def test_mlflow_goes_on_with_the_same_run(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="an extra of its own: pip install 'headinit[mlflow]'")
    options = {
        "name": "mlflow",
        "project": "p",
        "uri": f"sqlite:///{tmp_path}/new/mlflow.db",
        "artifacts": str(tmp_path / "artifacts"),
    }
    story(options, tmp_path / "some-run")
    story(options, tmp_path / "some-run")
    client = mlflow.MlflowClient(options["uri"])
    (experiment,) = client.search_experiments(filter_string="name = 'p'")
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == ("some-run", "FINISHED")
    assert found.data.params["optim.lr"] == "0.1"
    assert {(point.step, point.value) for point in client.get_metric_history(found.info.run_id, "val/accuracy")} == {
        (0, 0.1),
        (7, 0.6),
    }
    assert [file.path for file in client.list_artifacts(found.info.run_id)] == ["result.json"]


def test_trackio(tmp_path: Path) -> None:
    pytest.importorskip("trackio", reason="an extra of its own: pip install 'headinit[trackio]'")
    folder = str(tmp_path / "kept")
    story_elsewhere({"name": "trackio", "project": "p", "space": None, "folder": folder}, tmp_path / "some-run")
    import sqlite3

    (database,) = (tmp_path / "kept").rglob("p*.db")
    rows = sqlite3.connect(database).execute("select step, metrics from metrics order by step, id").fetchall()
    assert any(step == 7 and json.loads(values).get("val/accuracy") == 0.6 for step, values in rows), rows


@pytest.mark.parametrize("name", [name for name in TRACKERS if name != "none"])
def test_a_missing_package_is_said_before_anything_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking_module, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=rf"pip install 'headinit\[{name}\]'"):
        check_tracker({"name": name})


def test_unknown_names_and_options() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'wandb'"):
        check_tracker({"name": "wandbb"})
    with pytest.raises(ConfigError, match="Did you mean 'folder'"):
        check_tracker({"name": "tensorboard", "foldr": 1})


@pytest.mark.parametrize("name", TRACKERS)
def test_every_tracker_has_its_file_with_known_options(name: str) -> None:
    from omegaconf import OmegaConf

    options = OmegaConf.to_container(OmegaConf.load(CONF / "tracker" / f"{name}.yaml"))
    assert isinstance(options, dict)
    assert options.pop("name") == name
    assert set(options) == tracking_module._OPTIONS[name]


@pytest.mark.parametrize("fails", ["start", "log", "finish"])
def test_a_tracker_in_trouble_does_not_end_the_run(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("tensorboard")
    from accelerate.tracking import TensorBoardTracker

    def broken(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TensorBoardTracker, fails, broken)
    with caplog.at_level(logging.WARNING, logger="headinit.tracking"):
        story({"name": "tensorboard"}, tmp_path)
    assert "goes on without it: [Errno 28]" in caplog.text
    assert len(caplog.records) == 1


def test_nothing_is_imported_unless_asked_for(tmp_path: Path) -> None:
    code = (
        "import sys; import headinit.experiment\n"
        "from headinit.tracking import tracking, record_start\n"
        "from pathlib import Path\n"
        "with tracking({'name': 'none'}, Path('.'), {}): record_start({'loss': 1.0})\n"
        "print([m for m in ('tensorboard', 'wandb', 'mlflow', 'trackio', 'accelerate.tracking') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
