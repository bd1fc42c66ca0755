"""The processes of one run (torchrun, accelerate launch): who is first, what all of them know.

Every function does the obvious thing where there is one process, so that callers need not ask. torch is imported where
it is needed: a command that only shows its help does without.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from headinit.errors import HeadInitError, TrainingError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

_UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context and sequence parallelism",
}


def join_processes() -> None:
    """Connect with the other processes that a launcher has started, if there are any; a second call does nothing.

    Raises:
        TrainingError: the launcher is set to DeepSpeed, Megatron-LM or another way that no loop here supports, to FSDP
            of its first version or to FSDP with activation checkpointing.

    Example:
        >>> join_processes(), process_index(), process_count()
        (None, 0, 1)
    """
    _refuse_unsupported()
    if launched_processes() == 1 or _connected():
        return
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    if not torch.accelerator.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "1"  # or accelerate takes the processes for strangers
    PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def _refuse_unsupported() -> None:
    def asks(variable: str) -> bool:
        return os.environ.get(variable, "").lower() in ("1", "true", "yes")

    for variable, name in _UNSUPPORTED.items():
        if asks(variable):
            raise TrainingError(
                f"accelerate is configured for {name}, and headinit trains whole models (MULTI_GPU or MULTI_CPU, which "
                "is DDP) or models that FSDP cuts (fsdp_version: 2). Use one of these, with trainer.precision=bf16, a "
                "smaller trainer.batch_size with trainer.accumulation, or a freeze policy where memory is short; or "
                "give the model of attach_head to a trainer that supports it (docs/clusters.md)."
            )
    if asks("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION", "1") != "2":
        raise TrainingError(
            "accelerate is configured for the first version of FSDP, and headinit trains with the second: put "
            "fsdp_version: 2 into its configuration (accelerate launch --fsdp_version 2)."
        )
    if asks("ACCELERATE_USE_FSDP") and asks("FSDP_ACTIVATION_CHECKPOINTING"):
        raise TrainingError(
            "accelerate is configured for FSDP with activation checkpointing, which renames the parameters. Leave "
            "fsdp_activation_checkpointing out, and where memory is short use a smaller trainer.batch_size with "
            "trainer.accumulation."
        )


def leave_processes() -> None:
    """End the connection, if there is one."""
    if _connected():
        _distributed().destroy_process_group()


def launched_processes() -> int:
    """How many processes the launcher says that it has started, connected or not.

    Example:
        >>> launched_processes()
        1
    """
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def process_count() -> int:
    """How many processes are connected."""
    return _distributed().get_world_size() if _connected() else 1


def process_index() -> int:
    """The number of this process; the first, 0, is the one that writes and prints."""
    return _distributed().get_rank() if _connected() else 0


def is_first() -> bool:
    """Whether this process writes and prints."""
    return process_index() == 0


def by_first(function: Callable[[], T]) -> T:
    """What `function` gives in the first process, in all of them; an error of headinit's there is raised in all.

    Example:
        >>> by_first(lambda: 1 + 1)
        2
    """
    if process_count() == 1:
        return function()
    told: list[Any] = [None, None]
    if is_first():
        try:
            told = [function(), None]
        except HeadInitError as error:
            told = [None, error]
    _distributed().broadcast_object_list(told, src=0)
    if told[1] is not None:
        raise told[1]
    return told[0]


def any_process(value: bool) -> bool:
    """Whether it holds in any of the processes.

    Example:
        >>> any_process(True)
        True
    """
    if process_count() == 1:
        return value
    import torch

    flag = torch.tensor(float(value), device=_device())
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag.item())


def gathered(values: list[T]) -> list[T]:
    """The lists of all processes as one, in the order of the processes.

    Example:
        >>> gathered([1, 2])
        [1, 2]
    """
    if process_count() == 1:
        return values
    lists: list[Any] = [None] * process_count()
    _distributed().all_gather_object(lists, values)
    return [value for part in lists for value in part]


def _connected() -> bool:
    if "torch" not in sys.modules:
        return False
    return _distributed().is_available() and _distributed().is_initialized()


def _distributed() -> Any:
    import torch

    return torch.distributed


def _device() -> torch.device:
    """Where collective operations take their tensors from."""
    import torch

    if torch.distributed.get_backend() == "gloo":
        return torch.device("cpu")
    return torch.accelerator.current_accelerator() or torch.device("cpu")
