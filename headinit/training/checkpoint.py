"""Checkpoints for runs that may be killed at any moment: one file, replaced atomically, the one before it kept."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headinit.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows: no lock there, everything else works
    fcntl = None  # type: ignore[assignment]

FORMAT = 1
CURRENT, PREVIOUS, UNFINISHED, LOCK = (
    "checkpoint.safetensors",
    "checkpoint.previous.safetensors",
    "checkpoint.unfinished",
    "lock",
)


def write_checkpoint(
    folder: str | os.PathLike[str], tensors: Mapping[str, Tensor], state: Mapping[str, Any], identity: Mapping[str, Any]
) -> Path:
    """Write a checkpoint; at every moment the folder holds a complete one.

    Tensors and state travel in one safetensors file (the state as JSON in its header), so they cannot come apart. It is
    written beside the old one, flushed to the disk and renamed; the old one stays as the previous checkpoint.

    Args:
        folder: made if absent.
        tensors: by name.
        state: JSON values.
        identity: JSON values that must be equal for a run to go on from here; see `read_checkpoint`.

    Raises:
        CheckpointError: the folder cannot be written (full, read-only); the checkpoint that was there is still there.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> path = write_checkpoint(folder, {"w": torch.ones(2)}, {"epoch": 3}, {"lr": 0.1})
        >>> read_checkpoint(folder, {"lr": 0.1})[1]
        {'epoch': 3}
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder = Path(folder)
    unfinished, current = folder / UNFINISHED, folder / CURRENT
    header = {"format": str(FORMAT), "state": json.dumps(dict(state)), "identity": json.dumps(dict(identity))}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(_separate(tensors), unfinished, metadata=header)
        _flush(unfinished)
        if current.exists():
            os.replace(current, folder / PREVIOUS)
        os.replace(unfinished, current)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        _remove(unfinished)
        kept = "The checkpoint of before is still there." if current.exists() else "There was no checkpoint before."
        raise CheckpointError(
            f"Cannot write a checkpoint to {folder}: {error}. {kept} Make room or choose another folder, and repeat "
            "the command to go on."
        ) from error
    return current


def read_checkpoint(
    folder: str | os.PathLike[str], identity: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest complete checkpoint: tensors and state; None if the folder has none.

    A damaged file (cut in half, say) is set aside with a warning and the previous one is taken.

    Args:
        folder: where `write_checkpoint` wrote.
        identity: what this run is; None takes any checkpoint.

    Raises:
        CheckpointError: all checkpoints there are damaged, or they are of another run (the message lists what differs).

    Example:
        >>> read_checkpoint("no/such/folder") is None
        True
    """
    damaged = []
    for name in (CURRENT, PREVIOUS):
        path = Path(folder) / name
        if not path.exists():
            continue
        try:
            tensors, state, found = _read(path)
        except (OSError, ValueError, KeyError) as error:
            damaged.append(f"{path} ({error})")
            continue
        if damaged:
            warnings.warn(f"Damaged checkpoint {damaged[0]}: going on from {path.name}.", stacklevel=2)
            _remove(Path(folder) / CURRENT)  # or the next write would keep it and drop the good one
        if identity is not None:
            _check_identity(found, identity, path)
        return tensors, state
    if damaged:
        raise CheckpointError(
            f"Every checkpoint is damaged: {'; '.join(damaged)}. Delete the folder {folder} to start this run afresh."
        )
    return None


@contextmanager
def run_lock(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Keep a second process out of a run's folder.

    The operating system drops the lock with the process, so a killed run leaves nothing to clean up.

    Raises:
        CheckpointError: another process has the folder, or it cannot be written.

    Example:
        >>> import tempfile
        >>> with run_lock(tempfile.mkdtemp()):
        ...     pass
    """
    path = Path(folder) / LOCK
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = open(path, "a+")  # noqa: SIM115  (held open as long as the lock)
    except OSError as error:
        raise CheckpointError(f"Cannot write to the run folder {folder}: {error}. Choose another one.") from error
    with handle:
        if fcntl is not None:
            _lock_file(handle, folder)
        handle.seek(0)
        handle.truncate()
        handle.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        handle.flush()
        yield


class StopRequest:
    """Whether the process was asked to end: set by the signal, read by the loop."""

    def __init__(self) -> None:
        self.asked = False
        self.hand_on: Callable[[], Any] = lambda: None
        """What to do once everything is saved: whoever else wanted to know of the signal is told."""

    def __call__(self, *_: Any) -> None:
        """Called by Python when the signal arrives."""
        self.asked = True


@contextmanager
def stop_on_sigterm() -> Iterator[StopRequest]:
    """Turn SIGTERM (preemption, a Slurm time-out) into a request that a loop can follow after saving.

    Where SIGUSR2 has a handler, it is taken as such a request too, and handed on after saving: submitit's puts a job
    that runs out of time in the queue again. The earlier handlers are put back. Outside the main thread, where Python
    takes no signals, nothing is installed.

    Example:
        >>> with stop_on_sigterm() as stop:
        ...     stop.asked
        False
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    warning = getattr(signal, "SIGUSR2", None)  # not on Windows
    requeue = None if warning is None else signal.getsignal(warning)

    def warned(*arguments: Any) -> None:
        stop()
        stop.hand_on = lambda: requeue(*arguments)  # type: ignore[operator,misc]

    earlier = signal.signal(signal.SIGTERM, stop)
    if warning is not None and callable(requeue):
        signal.signal(warning, warned)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, earlier if earlier is not None else signal.SIG_DFL)
        if warning is not None and callable(requeue):
            signal.signal(warning, requeue)


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU that share no memory, as safetensors wants them."""
    result, seen = {}, set()
    for name, tensor in tensors.items():
        values = tensor.detach().cpu().contiguous()
        storage = values.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != values.numel() * values.element_size():
            values = values.clone()
        seen.add(values.untyped_storage().data_ptr())
        result[name] = values
    return result


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != str(FORMAT):
                raise CheckpointError(
                    f"{path} has checkpoint format {header.get('format')}, this version of headinit reads {FORMAT}. "
                    "Finish the run with the version that began it, or delete the folder."
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except SafetensorError as error:
        raise ValueError(error) from error
    return tensors, json.loads(header["state"]), json.loads(header["identity"])


def _check_identity(found: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    now = json.loads(json.dumps(dict(wanted)))  # tuples become lists, as they did in the file
    differing = [key for key in sorted({*found, *now}) if found.get(key) != now.get(key)]
    if differing:
        listed = "; ".join(f"{key}: {_shown(found.get(key))} there, {_shown(now.get(key))} now" for key in differing)
        raise CheckpointError(
            f"{path} is of another run and cannot be continued. What differs: {listed}. "
            "Give the same settings, or choose another folder."
        )


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _lock_file(handle: Any, folder: str | os.PathLike[str]) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.seek(0)
        owner = handle.read().strip() or "another process"
        raise CheckpointError(
            f"The run folder {folder} is in use by {owner}. Wait for it to end, or choose another folder."
        ) from None
    except OSError:  # a file system without locks
        warnings.warn(f"{folder} is on a file system without locks: make sure that one process uses it.", stacklevel=3)


def _flush(path: Path) -> None:
    """Have the operating system put a file, or the names in a folder, on the disk."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        warnings.warn(f"Cannot remove {path}.", stacklevel=2)


def as_cpu_copy(tensor: Tensor) -> Tensor:
    """A copy that later training steps do not reach.

    Example:
        >>> as_cpu_copy(torch.ones(1)).item()
        1.0
    """
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
