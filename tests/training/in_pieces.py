"""Runs a script or module on processes of which accelerate believes that they have GPUs, so that its FSDP cuts models.

``ACCELERATE_USE_FSDP=true FSDP_VERSION=2 python -m torch.distributed.run --nproc-per-node 2 -m tests.training.in_pieces
SCRIPT_OR_MODULE [ARGUMENT ...]``

accelerate has FSDP for GPUs only; what it calls, torch's `fully_shard`, works on any device, and finds CPUs here.
"""

from __future__ import annotations

import os
import runpy
import sys

from accelerate import PartialState
from accelerate.utils import DistributedType

if __name__ == "__main__":
    os.environ["ACCELERATE_USE_CPU"] = "1"
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    sys.argv = sys.argv[1:]
    if sys.argv[0].endswith(".py"):
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        runpy.run_module(sys.argv[0], run_name="__main__")
