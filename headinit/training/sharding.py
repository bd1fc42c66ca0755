"""A model whose tensors lie in pieces on several processes, as accelerate's FSDP (version 2) cuts it.

The loop trains a copy in pieces and gives its best weights back to the model it was called with, which stays whole on
the CPU meanwhile. Whatever looks at a tensor as a whole asks for it here, and every process has to ask together.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from headinit.errors import TrainingError

if TYPE_CHECKING:
    from accelerate import Accelerator


def check_sharding(accelerator: Accelerator) -> None:
    """See that a launcher that asks for FSDP gets it.

    Raises:
        TrainingError: accelerate does not cut models on this device.
    """
    from accelerate.utils import DistributedType, parse_flag_from_env

    asked = accelerator.num_processes > 1 and parse_flag_from_env("ACCELERATE_USE_FSDP")
    if asked and accelerator.distributed_type != DistributedType.FSDP:
        raise TrainingError(
            f"accelerate is configured for FSDP, which it has for GPUs only, and these are {accelerator.num_processes} "
            f"processes on {accelerator.device.type} ({accelerator.distributed_type}). Leave FSDP out."
        )


def in_pieces(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """A copy of a model in pieces on all processes, cut where accelerate's configuration says.

    The model itself goes to the CPU. The parameters of the copy are new ones: make the optimizer from them.
    """
    model.cpu().to(memory_format=torch.contiguous_format)
    shards = copy.deepcopy(model)
    accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False  # every process has the weights already
    # accelerate wants to exchange the parameters of an optimizer, and cuts nothing without one.
    stand_in = torch.optim.SGD([p for p in shards.parameters() if p.requires_grad], lr=0.0)
    shards, _ = accelerator.prepare(shards, stand_in)
    return shards


def put_together(tensor: Tensor) -> Tensor:
    """The whole of a tensor that lies in pieces; any other tensor as it is.

    Example:
        >>> put_together(torch.ones(2)).tolist()
        [1.0, 1.0]
    """
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def own_piece(tensor: Tensor) -> Tensor:
    """What this process has of a tensor; all of one that is not in pieces.

    Example:
        >>> own_piece(torch.ones(2)).tolist()
        [1.0, 1.0]
    """
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@torch.no_grad()
def copy_values(target: Tensor, values: Tensor) -> Tensor:
    """Copy a whole tensor into one that may lie in pieces, and return that.

    Example:
        >>> copy_values(torch.zeros(2), torch.ones(2)).tolist()
        [1.0, 1.0]
    """
    if hasattr(target, "full_tensor"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(target, DTensor)
        values = distribute_tensor(values.to(target.device, target.dtype), target.device_mesh, target.placements)
    return target.copy_(values)


def let_go(model: nn.Module) -> None:
    """Drop what a forward pass has put together, so that the parameters are the pieces again."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
