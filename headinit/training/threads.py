"""How many threads a step is worth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

SMALL_STEP = 50_000_000
"""Multiplications in a step of the head below which it runs on one thread."""


@contextmanager
def one_thread_if_small(head: nn.Module, batch_size: int) -> Iterator[None]:
    """A step of a small head takes less time than threads take to wait for each other.

    Example:
        >>> with one_thread_if_small(nn.Linear(4, 2), batch_size=32):
        ...     torch.get_num_threads()
        1
    """
    threads = torch.get_num_threads()
    if batch_size * sum(parameter.numel() for parameter in head.parameters()) < SMALL_STEP:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
