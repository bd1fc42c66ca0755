"""Exact evaluation: every example once, on however many processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from headinit.data.loading import Batches
from headinit.errors import DataError
from headinit.heads.record import call_model
from headinit.training.losses import IGNORED_LABEL, split_batch
from headinit.training.prefix import supplied


def predict(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    device: torch.device | None = None,
    rank: int = 0,
    processes: int = 1,
    together: bool = False,
    between: Callable[[], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits and labels of all examples, in the order of the batches, on the CPU.

    Args:
        model: run in evaluation mode; its mode is put back.
        batches: `Batches`, a DataLoader, or any iterable of ``(inputs, labels[, ...])``.
        device: where the model is; None to look.
        rank, processes: with several processes each computes every `processes`-th batch, and all get all results.
        together: every process has to run the model equally often, because it lies in pieces: one that has no batch
            left runs it on that of another, for nothing.
        between: called after each batch (with several processes, after each has done one, in all of them), for instance
            to stop on a signal.

    Returns:
        Logits `(N, K)` in float32 (float64 if the model is) and labels `(N,)`. Token logits `(N, T, K)` are padded to
        the longest batch with label -100.

    Raises:
        DataError: there is no example.

    Example:
        >>> logits, labels = predict(nn.Linear(2, 3), [(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))])
        >>> logits.shape, labels.shape
        (torch.Size([4, 3]), torch.Size([4]))
    """
    from accelerate.utils import gather_object, send_to_device

    device = device or next((p.device for p in model.parameters()), torch.device("cpu"))
    parts: list[tuple[int, Tensor, Tensor]] = []
    own = batches.epoch(0, share=(rank, processes)) if isinstance(batches, Batches) else batches

    def logits_of(inputs: Any) -> Tensor:
        with supplied(inputs) as given:
            logits = call_model(model, send_to_device(given, device))
        return (logits if logits.dtype == torch.float64 else logits.float()).cpu()

    index = -1
    # Pieces that are put together under inference mode could not be used by training.
    with torch.no_grad() if together else torch.inference_mode(), _evaluation_mode(model):
        for index, batch in enumerate(own):
            inputs, labels = split_batch(batch)
            if index % processes == rank:
                parts.append((index, logits_of(inputs), labels.cpu()))
            if between is not None and (index + 1) % processes == 0:
                between()
        if together and index >= 0 and index % processes < rank:
            logits_of(inputs)
    if processes > 1:
        parts = sorted(gather_object(parts), key=lambda part: part[0])
    if not parts:
        raise DataError("There is no example to evaluate on. Give a validation split with at least one example.")
    return _joined([logits for _, logits, _ in parts]), _joined([labels for _, _, labels in parts], IGNORED_LABEL)


def evaluate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    task: str = "single_label",
    metrics: Callable[[Tensor, Tensor], dict[str, float]] | None = None,
) -> dict[str, float]:
    """Metrics of a model over a data set.

    Args:
        model, batches: as for `predict`.
        task: chooses the metrics where none are given.
        metrics: ``(logits, labels) -> scores``.

    Example:
        >>> head = nn.Linear(2, 2)
        >>> evaluate(head, [(torch.randn(4, 2), torch.tensor([0, 1, 0, 1]))], metrics=lambda x, y: {"n": float(len(y))})
        {'n': 4.0}
    """
    from headinit.analysis.metrics import metrics_for

    return (metrics or metrics_for(task))(*predict(model, batches))


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _joined(parts: list[Tensor], fill: int = 0) -> Tensor:
    """Concatenate batches; sequences of different lengths are filled up at their ends."""
    if parts[0].ndim < 2 or len({part.shape[1:] for part in parts}) == 1:
        return torch.cat(parts)
    longest = max(part.shape[1] for part in parts)
    padded = [part.new_full((len(part), longest, *part.shape[2:]), fill) for part in parts]
    for target, part in zip(padded, parts, strict=True):
        target[:, : part.shape[1]] = part
    return torch.cat(padded)
