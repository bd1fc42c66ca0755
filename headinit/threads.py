"""How many threads a step is worth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

SMALL_STEP = 50_000_000
"""Multiplications in a step below which it runs on one thread."""


@contextmanager
def one_thread_if_small(multiplications: float) -> Iterator[None]:
    """A small step takes less time than threads take to wait for each other.

    Args:
        multiplications: in one step of what runs in the block, such as batch size x parameters of a linear head.

    Example:
        >>> with one_thread_if_small(32 * 2048):
        ...     torch.get_num_threads()
        1
    """
    threads = torch.get_num_threads()
    if multiplications < SMALL_STEP:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
