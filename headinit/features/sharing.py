"""Features extracted by several processes together: each runs the model over its share, all get all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import islice

from headinit.errors import HeadInitError
from headinit.features.cache import CacheEntry, FeatureBatch, ShardWriter
from headinit.processes import by_first, gathered, is_first

_ROUND = 16
"""Batches that each process runs between two exchanges: all that an interruption costs, where there is a cache."""

Stream = Callable[[int, int, str | None], Iterator[tuple[int, FeatureBatch]]]


def extract_together(stream: Stream, entry: CacheEntry | None) -> tuple[list[FeatureBatch], bool]:
    """The batches in their order, the same in every process, and whether all were in the cache of the first one.

    Args:
        stream: this process's numbered share of the batches from number `skip`, example `row` on, in a given precision.
        entry: of the cache; only the first process reads and writes it.

    Raises:
        HeadInitError: whatever went wrong in any of the processes.
    """

    def found() -> tuple[bool, list[FeatureBatch]]:
        return (entry.check(), [_own(part) for part in entry.shards()]) if entry is not None else (False, [])

    whole, parts = by_first(found)
    if whole:
        return parts, True
    batches, examples = sum(part.batches for part in parts), sum(part.examples for part in parts)
    mine = stream(batches, examples, parts[-1].precision if parts else None)
    with entry.locked() if entry is not None and is_first() else nullcontext(False) as writable:
        writer = ShardWriter(entry, batches) if entry is not None and writable else None
        while share := _exchanged(mine):
            parts += share
            for part in share if writer is not None else ():
                writer.add(part)  # type: ignore[union-attr]
        if writer is not None:
            writer.finish()
    return parts, False


def _exchanged(mine: Iterator[tuple[int, FeatureBatch]]) -> list[FeatureBatch]:
    """The next batches of all processes, in order; none when there are no more."""
    try:
        own: list = [(number, _own(part)) for number, part in islice(mine, _ROUND)]
    except HeadInitError as error:  # the others learn of it instead of waiting
        own = [(-1, error)]
    everyone = sorted(gathered(own), key=lambda numbered: numbered[0])
    if everyone and isinstance(everyone[0][1], HeadInitError):
        raise everyone[0][1]
    return [part for _, part in everyone]


def _own(part: FeatureBatch) -> FeatureBatch:
    """The batch without the larger tensors that its own may be views of: they would travel with it."""
    return dataclasses.replace(
        part, features=part.features.clone(), labels=part.labels.clone(), index=part.index.clone()
    )
