"""Activations by example, in memory or in a file that is mapped into it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MEMORY_SHARE = 0.5
"""Share of the free memory that activations may take; more goes to a file."""


class Rows:
    """Tensors for each example of a data set: added batch by batch, taken out in any order.

    Args:
        kinds: of each tensor: ``"fixed"`` `(B, ...)`, or ``"padded"`` `(B, L, ...)`, kept without its padding.
        budget: most bytes that may be added.
        folder: where to keep them in a file; None for in memory.

    Example:
        >>> rows = Rows(["fixed"])
        >>> rows.add(torch.tensor([7, 3]), [torch.eye(2)])
        >>> rows.finish()
        >>> rows.batch(torch.tensor([3, 7, 3]))[0].tolist()
        [[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]
    """

    def __init__(self, kinds: list[Any], budget: float = float("inf"), folder: Path | None = None) -> None:
        self.kinds, self.budget, self.bytes = kinds, budget, 0
        self.rows: list[dict[int, Tensor]] = [{} for _ in kinds]
        self.channels_last = [False for _ in kinds]
        self._file: Any = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.NamedTemporaryFile(dir=folder, prefix=".activations-", delete=False)  # noqa: SIM115
            self._places: list[tuple[int, int, int, Tensor]] = []

    @classmethod
    def placed(cls, kinds: list[Any], needed: int, budget: float, folder: Path | None) -> Rows:
        """In memory where `needed` bytes take at most half of what is free, else in a file."""
        import psutil

        fits = needed <= MEMORY_SHARE * psutil.virtual_memory().available
        return cls(kinds, budget, None if fits else folder or Path(tempfile.gettempdir()))

    def add(self, index: Tensor, tensors: list[Tensor], mask: Tensor | None = None) -> None:
        """Keep the rows of a batch.

        Args:
            index: `(B,)` which examples they are.
            tensors: one of each kind.
            mask: `(B, L)` bool, False where there is padding.

        Raises:
            ValueError: they take more than the budget, or rows that should be alike differ in shape.
            OSError: the disk is full.
        """
        for number, (tensor, kind) in enumerate(zip(tensors, self.kinds, strict=True)):
            if kind == "fixed" and tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
                self.channels_last[number] = not tensor.is_contiguous()
            whole = tensor.permute(0, 2, 3, 1) if self.channels_last[number] else tensor
            whole = whole.detach().to("cpu", copy=True).contiguous()
            for row, example in enumerate(index.tolist()):
                if example in self.rows[number]:
                    continue
                kept = whole[row] if kind == "fixed" or mask is None else whole[row][mask[row].cpu()]
                known = next(iter(self.rows[number].values()), kept)
                if known.shape[0 if kind == "fixed" else 1 :] != kept.shape[0 if kind == "fixed" else 1 :]:
                    raise ValueError(f"examples differ in shape, {tuple(known.shape)} and {tuple(kept.shape)}")
                self.rows[number][example] = self._placed(number, example, kept)
                self.bytes += kept.numel() * kept.element_size()
        if self.bytes > self.budget:
            raise ValueError(f"they take more than {self.budget / 1e9:.1f} GB")

    def __len__(self) -> int:
        """Examples that are kept."""
        return len(self.rows[0])

    def finish(self) -> None:
        """All rows are there: map the file, if there is one."""
        if self._file is None:
            return
        self._file.close()
        if self._places:
            mapped = torch.from_file(self._file.name, shared=False, size=self.bytes, dtype=torch.uint8)
            for number, example, start, like in self._places:
                size = like.numel() * like.element_size()
                self.rows[number][example] = mapped[start : start + size].view(like.dtype).view(like.shape)
        if os.name != "nt":
            os.unlink(self._file.name)  # the map keeps the content, and nothing is left behind

    def batch(self, index: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        """The rows of some examples: `(B, ...)`, or `(B, L, ...)` with zeros where `mask` says padding."""
        tensors = []
        for rows, kind, channels_last in zip(self.rows, self.kinds, self.channels_last, strict=True):
            chosen = [rows[example] for example in index.tolist()]
            if kind == "fixed" or mask is None:
                stacked = torch.stack(chosen)
                tensors.append(stacked.permute(0, 3, 1, 2) if channels_last else stacked)
            else:
                padded = chosen[0].new_zeros(*mask.shape, *chosen[0].shape[1:])
                padded[mask.cpu()] = torch.cat(chosen)
                tensors.append(padded)
        return tensors

    def _placed(self, number: int, example: int, kept: Tensor) -> Tensor:
        if self._file is None:
            return kept
        start = self._file.tell()
        self._file.write(kept.contiguous().view(torch.uint8).numpy().data)
        self._places.append((number, example, start, torch.empty_like(kept, device="meta")))
        return self._places[-1][3]
