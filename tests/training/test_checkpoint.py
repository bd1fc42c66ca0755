from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from headinit.analysis.results import METRICS_FILE
from headinit.errors import CheckpointError
from headinit.training import checkpoint as checkpoint_module
from headinit.training.checkpoint import CURRENT, PREVIOUS, read_checkpoint, run_lock, stop_on_sigterm, write_checkpoint
from headinit.training.finetune import finetune
from headinit.training.recipe import Recipe

from .killable import RECIPE, build, data, fingerprint, run

POLICIES = ("all", "none", 1, "lp_ft", "gradual")
ROOT = Path(__file__).resolve().parents[2]


class Killed(BaseException):
    """Stands for SIGKILL inside one process: nothing catches it."""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def uninterrupted() -> dict[object, str]:
    torch.set_num_threads(1)
    results = {}
    for policy in POLICIES:
        model = build(policy)
        results[policy] = fingerprint(model, run(model, None, policy=policy))
    return results


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(3))
def test_resumed_runs_are_bit_identical(
    policy: str | int, seed: int, tmp_path: Path, uninterrupted: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raise at random optimizer steps, evaluations and writes, as often as it takes, and call again."""
    from headinit.training.finetune import _Run

    dice = random.Random(f"{policy}/{seed}")
    until = [dice.randrange(1, 9)]

    def fragile(name: str) -> None:
        original = getattr(_Run, name)

        def wrapper(self: _Run, *args: object) -> object:
            until[0] -= 1
            if until[0] == 0:
                raise Killed
            return original(self, *args)

        monkeypatch.setattr(_Run, name, wrapper)

    for name in ("step", "_apply", "evaluate", "save"):
        fragile(name)
    kills = 0
    while True:
        model = build(policy)
        try:
            outcome = run(model, str(tmp_path), policy=policy, save_every_steps=dice.choice([1, 2, None]))
            break
        except Killed:
            kills += 1
            # Later attempts may run longer, so that runs that save once an epoch come to an end.
            until[0] = dice.randrange(1, 9 + 10 * kills)
    assert kills > 0
    assert fingerprint(model, outcome) == uninterrupted[policy]


def _start(folder: Path, policy: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.training.killable", str(folder), policy]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def _wait_for(text: str, process: subprocess.Popen) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(text):
            return
    pytest.fail(f"The process ended with {process.wait()} before it wrote {text!r}.")


def test_killed_and_terminated_processes_go_on(tmp_path: Path, uninterrupted: dict) -> None:
    first = _start(tmp_path, "none")
    _wait_for("evaluated 1", first)
    first.kill()
    first.communicate()
    assert first.returncode == -signal.SIGKILL
    killed = read_checkpoint(tmp_path)
    assert killed is not None

    second = _start(tmp_path, "none")
    _wait_for("evaluated 2", second)
    second.send_signal(signal.SIGTERM)
    second.communicate()
    assert second.returncode == 143
    assert read_checkpoint(tmp_path)[1]["steps"] > killed[1]["steps"]  # type: ignore[index]

    model = build("none")
    assert fingerprint(model, run(model, str(tmp_path))) == uninterrupted["none"]


def _run_and_tell(folder: Path, policy: str | int, result: Path) -> None:
    from headinit.experiment import _metrics_writer

    torch.set_num_threads(1)
    model = build(policy)
    options: dict = {"save_every_steps": 2, "on_evaluation": _metrics_writer(folder)}
    outcome = run(model, str(folder / "checkpoint"), policy=policy, pause=0.005, **options)
    result.write_text(fingerprint(model, outcome))


def _kill_until_finished(folder: Path, policy: str | int, dice: random.Random, growth: float) -> int:
    """Kill a run at random moments until it ends by itself; returns how often. `folder`.result has its fingerprint."""
    kills = 0
    for attempt in range(60):
        process = multiprocessing.get_context("fork").Process(
            target=_run_and_tell, args=(folder, policy, folder.with_suffix(".result"))
        )
        process.start()
        # Later attempts may run longer: on a busy machine even the start takes a while.
        process.join(timeout=dice.uniform(0.02, 0.2 + growth * attempt))
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
    return kills


needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="needs fork, so that importing takes no time")


@needs_fork
def test_sigkill_at_random_moments(tmp_path: Path, uninterrupted: dict) -> None:
    assert _kill_until_finished(tmp_path / "run", "none", random.Random("none"), growth=0.1) > 0
    assert (tmp_path / "run.result").read_text() == uninterrupted["none"]


@needs_fork
@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_sigkill_at_many_random_moments(policy: str | int, tmp_path: Path, uninterrupted: dict) -> None:
    """Weights, history, best epoch and the bytes of metrics.jsonl; a run that has ended is followed by another."""
    _run_and_tell(tmp_path / "whole", policy, tmp_path / "whole.result")
    expected = (tmp_path / "whole" / METRICS_FILE).read_bytes()
    dice, kills, runs = random.Random(f"twenty/{policy}"), 0, 0
    while kills < int(os.environ.get("HEADINIT_KILLS", "4")):
        folder = tmp_path / f"run{runs}"
        kills += _kill_until_finished(folder, policy, dice, growth=0.03)
        assert folder.with_suffix(".result").read_text() == uninterrupted[policy]
        assert (folder / METRICS_FILE).read_bytes() == expected
        runs += 1


def test_sigterm_saves_the_very_step(tmp_path: Path, uninterrupted: dict) -> None:
    model = build("none")
    with pytest.raises(SystemExit) as caught:
        run(model, str(tmp_path), on_evaluation=lambda row: os.kill(os.getpid(), signal.SIGTERM))
    assert caught.value.code == 143
    assert read_checkpoint(tmp_path)[1]["steps"] == 1  # type: ignore[index]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    model = build("none")
    assert fingerprint(model, run(model, str(tmp_path))) == uninterrupted["none"]


@pytest.mark.skipif(not hasattr(signal, "SIGUSR2"), reason="no such signal here")
def test_a_warning_of_the_queue_is_handed_on_after_saving(tmp_path: Path, uninterrupted: dict) -> None:
    """As under submitit, whose handler of SIGUSR2 puts the job in the queue again and ends the process."""
    told: list[int] = []

    def requeue(number: int, frame: object) -> None:
        assert (tmp_path / CURRENT).is_file()
        told.append(number)
        raise SystemExit(255)

    earlier = signal.signal(signal.SIGUSR2, requeue)
    try:
        with pytest.raises(SystemExit) as caught:
            run(build("none"), str(tmp_path), on_evaluation=lambda row: os.kill(os.getpid(), signal.SIGUSR2))
        assert signal.getsignal(signal.SIGUSR2) is requeue
    finally:
        signal.signal(signal.SIGUSR2, earlier)
    assert (caught.value.code, told) == (255, [signal.SIGUSR2])
    model = build("none")
    assert fingerprint(model, run(model, str(tmp_path))) == uninterrupted["none"]


def test_a_finished_run_is_read_not_repeated(tmp_path: Path, uninterrupted: dict) -> None:
    first = build(1)
    outcome = run(first, str(tmp_path))
    second = build(1)
    calls: list[dict] = []
    again = run(second, str(tmp_path), on_evaluation=calls.append)
    assert calls == []
    assert (again.history, again.seconds) == (outcome.history, outcome.seconds)
    assert fingerprint(second, again) == uninterrupted[1]


def test_another_run_is_refused_with_what_differs(tmp_path: Path) -> None:
    run(build("none"), str(tmp_path))
    before = (tmp_path / CURRENT).read_bytes()
    for change, told in (
        ({"recipe": replace(RECIPE, lr=1e-3)}, "lr: 0.03 there, 0.001 now"),
        ({"recipe": replace(RECIPE, epochs=9)}, "epochs: 4 there, 9 now"),
    ):
        with pytest.raises(CheckpointError, match=told):
            run(build("none"), str(tmp_path), **change)
    with pytest.raises(CheckpointError, match="frozen part"):
        run(build("all"), str(tmp_path))
    with pytest.raises(CheckpointError, match="training data"):
        finetune(build("none"), data(count=40), data(count=30), RECIPE, folder=tmp_path, cpu=True)
    changed = build("all")
    changed[0][0].weight.data += 1  # other pretrained weights
    run(build("all"), str(tmp_path / "all"))
    with pytest.raises(CheckpointError, match="frozen part"):
        run(changed, str(tmp_path / "all"))
    assert (tmp_path / CURRENT).read_bytes() == before


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_checkpoint_cut_short_falls_back_to_the_one_before(tmp_path: Path, share: float, uninterrupted: dict) -> None:
    run(build("none"), str(tmp_path))
    current = tmp_path / CURRENT
    content = current.read_bytes()
    current.write_bytes(content[: int(share * len(content))])
    model = build("none")
    with pytest.warns(UserWarning, match="Damaged checkpoint"):
        outcome = run(model, str(tmp_path))
    assert fingerprint(model, outcome) == uninterrupted["none"]
    assert current.read_bytes()[:100]


def test_two_damaged_checkpoints_are_an_error(tmp_path: Path) -> None:
    for name in (CURRENT, PREVIOUS):
        (tmp_path / name).write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match=r"Every checkpoint is damaged: .*Delete the folder"):
        run(build("none"), str(tmp_path))


def test_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_module, "FORMAT", 99)
    write_checkpoint(tmp_path, {"w": torch.ones(1)}, {}, {})
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="has checkpoint format 99"):
        read_checkpoint(tmp_path)


def test_killed_between_the_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, {"w": torch.zeros(1)}, {"n": 1}, {})
    replace_file = os.replace

    def dies(source: object, target: object) -> None:
        if str(target).endswith(CURRENT):
            raise Killed
        replace_file(source, target)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(Killed):
        write_checkpoint(tmp_path, {"w": torch.ones(1)}, {"n": 2}, {})
    monkeypatch.undo()
    assert not (tmp_path / CURRENT).exists()
    assert read_checkpoint(tmp_path)[1] == {"n": 1}  # type: ignore[index]
    write_checkpoint(tmp_path, {"w": torch.ones(1)}, {"n": 2}, {})
    assert read_checkpoint(tmp_path)[1] == {"n": 2}  # type: ignore[index]


def test_a_full_disk_keeps_the_checkpoint_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, {"w": torch.zeros(1)}, {"n": 1}, {})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "_flush", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*The checkpoint of before is still there"):
        write_checkpoint(tmp_path, {"w": torch.ones(1)}, {"n": 2}, {})
    assert read_checkpoint(tmp_path)[1] == {"n": 1}  # type: ignore[index]
    assert not (tmp_path / checkpoint_module.UNFINISHED).exists()


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_file_system_that_takes_no_more(tmp_path: Path) -> None:
    import resource

    write_checkpoint(tmp_path, {"w": torch.zeros(1)}, {"n": 1}, {})
    earlier = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, earlier[1]))
    try:
        with pytest.raises(CheckpointError, match="Cannot write a checkpoint"):
            write_checkpoint(tmp_path, {"w": torch.zeros(100_000)}, {"n": 2}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, earlier)
    assert read_checkpoint(tmp_path)[1] == {"n": 1}  # type: ignore[index]
    assert sorted(path.name for path in tmp_path.iterdir()) == [CURRENT]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="Cannot write"):
        run(build("none"), str(tmp_path / "file" / "run"))


def test_two_processes_on_one_folder(tmp_path: Path) -> None:
    with (
        run_lock(tmp_path),
        pytest.raises(CheckpointError, match=rf"in use by process {os.getpid()} on "),
        run_lock(tmp_path),
    ):
        pass
    with run_lock(tmp_path):  # and free again, with the file still there
        pass
    (tmp_path / "lock").write_text("process 1 on another-machine\n")  # left over by a killed run
    with run_lock(tmp_path):
        pass


def test_the_lock_is_given_back_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is damaged"):
        _damaged(tmp_path)
    with run_lock(tmp_path):
        pass


def _damaged(folder: Path) -> None:
    (folder / CURRENT).write_bytes(b"")
    run(build("none"), str(folder))


def test_sigterm_handler_is_put_back() -> None:
    mine = lambda *_: None  # noqa: E731
    earlier = signal.signal(signal.SIGTERM, mine)
    try:
        with stop_on_sigterm() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.asked
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, earlier)


def test_state_of_every_kind_comes_back(tmp_path: Path) -> None:
    shared = torch.randn(4, 3)
    tensors = {
        "a": shared,
        "b": shared[1:],
        "c": shared.t(),
        "bf16": torch.ones(3, dtype=torch.bfloat16),
        "empty": torch.zeros(0),
        "scalar": torch.tensor(3.0),
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    }
    write_checkpoint(tmp_path, tensors, {"f": 0.1 + 0.2, "none": None}, {"tuple": (1, 2)})
    found, state = read_checkpoint(tmp_path, {"tuple": (1, 2)})  # type: ignore[misc]
    assert state == {"f": 0.1 + 0.2, "none": None}
    torch.testing.assert_close(found, tensors, rtol=0, atol=0)


def test_channels_last_momentum_resumes_to_the_same_bits(tmp_path: Path) -> None:
    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
        )

    x, y = torch.randn(6, 3, 9, 9), torch.arange(6) % 3
    train = [(x[:3], y[:3]), (x[3:], y[3:])]
    for optimizer in ("adamw", "sgd"):
        recipe = Recipe(epochs=3, lr=0.01, optimizer=optimizer, monitor="nll")
        whole = network()
        finetune(whole, train, train, recipe, cpu=True)
        folder = tmp_path / optimizer
        with pytest.raises(Killed):
            finetune(network(), train, train, recipe, folder=folder, on_evaluation=_die_at(2), cpu=True)
        resumed = network()
        finetune(resumed, train, train, recipe, folder=folder, cpu=True)
        torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


def _die_at(epoch: int) -> Callable[[dict], None]:
    def check(row: dict) -> None:
        if row["epoch"] == epoch:
            raise Killed

    return check
