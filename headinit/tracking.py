"""Experiment trackers (TensorBoard, Weights & Biases, MLflow, trackio), through accelerate's own, if asked for.

`tracking` opens one for a run; `record_start`, `record_evaluation` and `record_result` write to the one that is open,
if any. A missing package is an error before the run begins; trouble that a tracker has later (a lost connection, a full
disk) is a warning, and the run goes on without it.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from headinit.errors import ConfigError, unknown_name

logger = logging.getLogger(__name__)

TRACKERS = ("none", "tensorboard", "wandb", "mlflow", "trackio")
"""What `tracker=` takes; each but the first is an extra of the same name."""

_OPTIONS = {
    "none": set(),
    "tensorboard": {"folder"},
    "wandb": {"project", "entity", "mode", "folder", "tags"},
    "mlflow": {"project", "uri", "artifacts"},
    "trackio": {"project", "space", "folder"},
}
_MLFLOW_RUN = "mlflow_run.txt"


def check_tracker(options: Mapping[str, Any]) -> None:
    """Whether a tracker can be used: its name, its options, its package (which is not imported).

    Raises:
        ConfigError: the name or an option is unknown, or the package is not installed.

    Example:
        >>> check_tracker({"name": "none"})
    """
    name = options.get("name") or "none"
    if name not in TRACKERS:
        raise unknown_name("tracker", name, TRACKERS)
    for option in options:
        if option != "name" and option not in _OPTIONS[name]:
            raise unknown_name(f"option of tracker={name}", option, _OPTIONS[name])
    if name != "none" and find_spec(name) is None:
        raise ConfigError(
            f"tracker={name} needs the package {name}, which is not installed here. Install it with "
            f"pip install 'headinit[{name}]', or leave the tracker out."
        )


@contextmanager
def tracking(options: Mapping[str, Any], folder: Path, config: Mapping[str, Any]) -> Iterator[None]:
    """Open the tracker that the options name for the run in a folder, and close it at the end.

    Args:
        options: ``name`` and the tracker's own options, as in `conf/tracker/`.
        folder: of the run; its name is the run's name.
        config: the settings of the run, which are stored first.

    Raises:
        ConfigError: as `check_tracker`.
    """
    check_tracker(options)
    name = options.get("name") or "none"
    if name == "none":
        yield
        return
    open_tracker = _OPENERS[name]
    run = _Run(name, None)
    run.attempt("begin", lambda: run.open(open_tracker(options, folder), config))
    token = _CURRENT.set(run)
    try:
        yield
    finally:
        _CURRENT.reset(token)
        run.attempt("end", lambda: run.tracker.finish())


def record_start(start: Mapping[str, Any]) -> None:
    """Store how the head starts: ``start/loss``, ``start/chance_loss``, ..."""
    _log({f"start/{key}": value for key, value in start.items()}, step=0)


def record_evaluation(row: Mapping[str, Any]) -> None:
    """Store one evaluation at its step: ``val/accuracy``, ``train/loss``, ``train/lr``, ..."""
    names = {"train_loss": "train/loss", "lr": "train/lr", "epoch": "epoch"}
    values = {names.get(key, f"val/{key}"): value for key, value in row.items() if key != "step"}
    _log(values, step=int(row["step"]))


def record_result(scores: Mapping[str, Mapping[str, Any] | None], step: int, files: Sequence[Path]) -> None:
    """Store the final scores of each split (``final/test/accuracy``, ...) and files, as `record_files` does."""
    values = {f"final/{split}/{key}": value for split, found in scores.items() for key, value in (found or {}).items()}
    _log(values, step=step)
    record_files(files)


def record_files(files: Sequence[Path]) -> None:
    """Store files as artifacts where the tracker takes them; those that are not there are left out."""
    run = _CURRENT.get()
    if run is not None:
        run.attempt("store files", lambda: run.store([path for path in files if path.is_file()]))


@dataclass
class _Run:
    """A tracker that is open, or None after trouble."""

    name: str
    tracker: Any

    def open(self, tracker: Any, config: Mapping[str, Any]) -> None:
        from accelerate import PartialState

        PartialState()  # accelerate's trackers ask it which process this is
        self.tracker = tracker
        tracker.start()
        tracker.store_init_configuration(flat(config))

    def attempt(self, what: str, action: Callable[[], Any]) -> None:
        """Do something, unless there was trouble before."""
        if self.tracker is None and what != "begin":
            return
        try:
            action()
        except Exception as error:  # whatever a foreign tracker raises, the run is worth more
            self.tracker = None
            logger.warning("tracker=%s could not %s, the run goes on without it: %s", self.name, what, error)

    def store(self, files: Sequence[Path]) -> None:
        """Artifacts; TensorBoard takes text instead, trackio has no place for files of a local run."""
        for path in files:
            if self.name == "wandb":
                self.tracker.tracker.save(str(path), base_path=str(path.parent), policy="now")
            elif self.name == "mlflow":
                self.tracker.log_artifact(str(path))
            elif self.name == "tensorboard" and path.suffix == ".json":
                text = path.read_text(encoding="utf-8")
                self.tracker.tracker.add_text(path.name, "    " + text.replace("\n", "\n    "))  # a block of code


_CURRENT: ContextVar[_Run | None] = ContextVar("tracker of the run", default=None)


def _log(values: Mapping[str, Any], step: int) -> None:
    run = _CURRENT.get()
    numbers = {
        key: float(value) for key, value in values.items() if isinstance(value, int | float) and math.isfinite(value)
    }
    if run is not None and numbers:
        run.attempt("log", lambda: run.tracker.log(numbers, step=step))


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names, lists and nulls as text: what every tracker takes.

    Example:
        >>> flat({"optim": {"lr": 0.1, "betas": [0.9, 0.99]}, "seed": 0})
        {'optim.lr': 0.1, 'optim.betas': '[0.9, 0.99]', 'seed': 0}
    """
    result: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return result


# --- how each tracker is opened ---------------------------------------------------------------------------------------


def _tensorboard(options: Mapping[str, Any], folder: Path) -> Any:
    from accelerate.tracking import TensorBoardTracker

    # Its event files lie with the run; `tensorboard --logdir outputs` shows the runs by their folders.
    chosen = options.get("folder")
    return TensorBoardTracker(folder.name if chosen else "tensorboard", chosen or folder)


def _wandb(options: Mapping[str, Any], folder: Path) -> Any:
    from accelerate.tracking import WandBTracker

    where = Path(options.get("folder") or folder)
    where.mkdir(parents=True, exist_ok=True)
    return WandBTracker(
        options.get("project") or "headinit",
        name=folder.name,
        id=folder.name[-64:],  # a run that goes on is the same run
        resume=None if options.get("mode") == "offline" else "allow",
        entity=options.get("entity"),
        mode=options.get("mode") or "offline",
        dir=str(where),
        tags=options.get("tags"),
    )


def _mlflow(options: Mapping[str, Any], folder: Path) -> Any:
    import mlflow
    from accelerate.tracking import MLflowTracker

    if options.get("uri"):
        _make_parent(options["uri"])
        mlflow.set_tracking_uri(options["uri"])
    artifacts = options.get("artifacts")
    marker = folder / _MLFLOW_RUN
    tracker = _RememberingTracker(marker)
    known = marker.read_text().strip() if marker.is_file() else None
    tracker.inner = MLflowTracker(
        experiment_name=options.get("project") or "headinit",
        logging_dir=None if artifacts is None else Path(artifacts).resolve().as_uri(),
        run_id=known,
        run_name=folder.name,
    )
    return tracker


class _RememberingTracker:
    """accelerate's MLflow tracker that leaves the run's id in the run's folder: a run that goes on is the same run."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker
        self.inner: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def start(self) -> None:
        self.inner.start()
        self.marker.parent.mkdir(parents=True, exist_ok=True)
        self.marker.write_text(self.inner.tracker.info.run_id + "\n")


def _make_parent(uri: str) -> None:
    """The folder of an SQLite file, which SQLite does not make."""
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)


def _trackio(options: Mapping[str, Any], folder: Path) -> Any:
    if options.get("folder"):
        os.environ["TRACKIO_DIR"] = str(Path(options["folder"]).resolve())  # read when it is imported
    from accelerate.tracking import TrackioTracker

    return TrackioTracker(
        options.get("project") or "headinit", name=folder.name, space_id=options.get("space"), resume="allow"
    )


_OPENERS: dict[str, Callable[[Mapping[str, Any], Path], Any]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
}
