"""Random numbers with a purpose: no function of headinit draws from, or disturbs, the global generators."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derived_seed(seed: int, purpose: str) -> int:
    """A 63-bit seed that depends on `seed` and `purpose` alone, the same on every machine and rank.

    Example:
        >>> derived_seed(0, "head") == derived_seed(0, "head"), derived_seed(0, "head") == derived_seed(0, "order")
        (True, False)
    """
    digest = hashlib.sha256(f"{int(seed)}\x00{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator_for(seed: int, purpose: str) -> torch.Generator:
    """A CPU generator for one purpose, independent of whatever else has drawn random numbers.

    Args:
        seed: the user's seed.
        purpose: what the numbers are for, such as ``"head/classifier"`` or ``"order/epoch3"``.

    Example:
        >>> torch.rand(1, generator=generator_for(0, "head")).shape
        torch.Size([1])
    """
    return torch.Generator().manual_seed(derived_seed(seed, purpose))


@contextmanager
def global_generators_kept(seed: int | None = None) -> Iterator[None]:
    """Run a block and put the global generators of Python, NumPy and torch back as they were.

    Args:
        seed: if given, the global generators are seeded with it inside the block (for libraries, such as dropout
            layers, that can only draw from them).
    """
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    try:
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            # torch.manual_seed would also queue a seed, with a formatted traceback, for every device that is not there.
            torch.default_generator.manual_seed(seed)
            if cuda_states is not None:
                torch.cuda.manual_seed_all(seed)
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)
