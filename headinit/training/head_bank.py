"""Many linear heads trained together on the same features: what they share is computed once.

Heads with the same order seed see the same batches, so the logits of all of them are one matrix product,
(H K, d) x (d, B), and so are the gradients. Each head is trained as `finetune` would train it alone: its own learning
rate, weight decay, label smoothing, clipping and early stop, its own best epoch.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from headinit.analysis.metrics import HIGHER_IS_BETTER, metrics_for
from headinit.data.loading import TensorBatches
from headinit.errors import ConfigError, DataError, TrainingError, unknown_name
from headinit.features.extract import FeatureSet
from headinit.training.recipe import Recipe

TASKS = ("single_label", "multi_label", "regression")

Metrics = Callable[[Tensor, Tensor], dict[str, float]]

MEMORY = 1 << 30
"""Bytes that weights, optimizer state and best weights of the heads trained together may take."""

# A block of gradients of this size is still in the cache when the optimizer reads it; the weights of a stack stay near.
_BLOCK_BYTES = 1 << 20
_STACK_BYTES = 2 << 20

_LOGIT_BYTES = 64 << 20

_NEGLIGIBLE = 1e-30
"""Probabilities below this one are taken for 0."""


@dataclass(frozen=True)
class BankEntry:
    """One head to train.

    Attributes:
        weight: `(K, d)` start.
        bias: `(K,)`, or None for a head without bias.
        lr: peak learning rate.
        weight_decay: of the weight; the bias is not decayed.
        order_seed: of the order of the examples; entries that share it see the same batches.
        label_smoothing: for single labels; None takes the recipe's.
    """

    weight: Tensor
    bias: Tensor | None
    lr: float
    weight_decay: float = 0.0
    order_seed: int = 0
    label_smoothing: float | None = None


@dataclass(frozen=True)
class BankResult:
    """What came of one head.

    Attributes:
        weight, bias: at the best epoch.
        best_epoch: the earliest with the best monitored metric; 0 is the start.
        history: a row per evaluation, as `TrainingOutcome.history`: ``epoch``, ``step``, ``train_loss``, ``lr`` and the
            validation metrics.
        steps: optimizer steps until it ended.
        seconds: its share of the wall-clock time of its bank.
        status: ``"finished"``, or ``"diverged"`` where the loss or a logit became NaN or infinite.
        stopped_early: whether patience ran out.
    """

    weight: Tensor
    bias: Tensor | None
    best_epoch: int
    history: list[dict[str, Any]]
    steps: int
    seconds: float
    status: str = "finished"
    stopped_early: bool = False


def train_head_bank(
    train: FeatureSet,
    validation: FeatureSet,
    entries: Sequence[BankEntry],
    recipe: Recipe,
    *,
    batch_size: int = 64,
    task: str = "single_label",
    metrics: Metrics | None = None,
    views: Sequence[FeatureSet] = (),
    memory: int = MEMORY,
) -> list[BankResult]:
    """Train linear heads on features in memory, each as if it were trained alone.

    Every step is that of `torch.optim` on one head (AdamW with bias correction and decoupled decay, or SGD with
    Nesterov momentum): in float64 it agrees with `finetune` to 1e-12. A head whose loss becomes NaN or infinite is
    taken out and marked; the others go on. Float64 features are trained in float64, all others in float32.

    Args:
        train: `(N, d)` features and their labels.
        validation: what chooses each head's best epoch.
        entries: the heads; all of one shape.
        recipe: what they share. Its `lr`, `weight_decay`, `precision` and `seed` are not read.
        batch_size: examples per batch.
        task: ``"single_label"``, ``"multi_label"`` or ``"regression"``.
        metrics: ``(outputs, labels) -> scores``; None for those of the task.
        views: features of augmented views of the training examples: epoch e trains on view (e - 1) mod k, in the place
            of `train`.
        memory: bytes that the heads trained at the same time may take; more heads are trained one bank after another.

    Returns:
        A result for each entry, in their order.

    Raises:
        DataError: shapes that do not fit, or non-finite features.
        TrainingError: the recipe monitors a metric that the task does not have.
        ConfigError: the recipe has what only `finetune` can do, see `beyond_bank`.

    Example:
        >>> x = torch.tensor([[-1.0], [1.0]] * 8)
        >>> data = FeatureSet(x, (x[:, 0] > 0).long(), 2)
        >>> heads = [BankEntry(torch.zeros(2, 1), torch.zeros(2), lr) for lr in (0.0, 0.1)]
        >>> [r.history[-1]["accuracy"] for r in train_head_bank(data, data, heads, Recipe(epochs=5))]
        [0.5, 1.0]
    """
    if reason := beyond_bank(recipe):
        raise ConfigError(f"Heads that train together cannot have {reason}: train each with finetune.")
    _check(train, validation, entries, task, views)
    examples = [_Examples.of(view, task) for view in views or (train,)]
    held_out = _Examples.of(validation, task)
    results: list[BankResult | None] = [None] * len(entries)
    for chosen in split_bank(entries, memory, recipe, examples[0].features.dtype):
        bank = _Bank(examples, held_out, [entries[i] for i in chosen], recipe, batch_size, task, metrics)
        for i, result in zip(chosen, bank.run(), strict=True):
            results[i] = result
    return results  # type: ignore[return-value]


def beyond_bank(recipe: Recipe) -> str | None:
    """What in a recipe only `finetune` can do, in words; None where a bank of heads can train by it.

    Example:
        >>> beyond_bank(Recipe(mixup=0.1)), beyond_bank(Recipe())
        ('mixup=0.1', None)
    """
    plain = Recipe()
    for setting in ("steps", "mixup", "select", "bias_correction"):
        if (value := getattr(recipe, setting)) != getattr(plain, setting):
            return f"{setting}={value}"
    return None


def split_bank(
    entries: Sequence[BankEntry], memory: int = MEMORY, recipe: Recipe | None = None, dtype: torch.dtype = torch.float32
) -> list[list[int]]:
    """Which entries are trained at the same time: as many as fit into `memory` bytes, at least one.

    Entries of one order stay together as far as they fit.

    Example:
        >>> heads = [BankEntry(torch.zeros(2, 8), None, 0.1, order_seed=s) for s in (0, 1, 0)]
        >>> split_bank(heads, memory=600), split_bank(heads, memory=1)
        ([[0, 2], [1]], [[0], [2], [1]])
    """
    if not entries:
        return []
    copies = 3 if recipe is not None and recipe.optimizer == "sgd" else 4  # weight, best weight, optimizer state
    size = copies * entries[0].weight.numel() * dtype.itemsize
    count = max(1, memory // size)
    order = sorted(range(len(entries)), key=lambda i: entries[i].order_seed)
    banks: list[list[int]] = []
    for seed in dict.fromkeys(entries[i].order_seed for i in order):
        mine = [i for i in order if entries[i].order_seed == seed]
        for start in range(0, len(mine), count):
            part = mine[start : start + count]
            if banks and len(banks[-1]) + len(part) <= count:
                banks[-1] += part
            else:
                banks.append(part)
    return banks


def head_logits(weight: Tensor, bias: Tensor | None, features: Tensor) -> Tensor:
    """Logits `(N, K)` of a linear head, in the precision it was trained in.

    Example:
        >>> head_logits(torch.eye(2), torch.ones(2), torch.zeros(1, 2)).tolist()
        [[1.0, 1.0]]
    """
    return F.linear(features.to(weight.dtype), weight, bias)


# --- one bank ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Examples:
    """Features and targets in the precision of training."""

    features: Tensor
    labels: Tensor

    @classmethod
    def of(cls, data: FeatureSet, task: str) -> _Examples:
        dtype = torch.float64 if data.features.dtype == torch.float64 else torch.float32
        labels = data.labels
        if task != "single_label":
            labels = labels.to(dtype).reshape(len(labels), -1)
        return cls(data.features.to(dtype), labels)


@dataclass
class _Progress:
    """One head on its way."""

    entry: BankEntry
    position: int
    history: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int = 0
    best_value: float = math.nan
    evaluations_since_best: int = 0
    steps: int = 0
    status: str = "finished"
    stopped_early: bool = False
    best: tuple[Tensor, Tensor | None] | None = None


class _Bank:
    """Heads of one or several orders that are trained at the same time."""

    def __init__(
        self,
        views: Sequence[_Examples],
        validation: _Examples,
        entries: Sequence[BankEntry],
        recipe: Recipe,
        batch_size: int,
        task: str,
        metrics: Metrics | None = None,
    ) -> None:
        self.views, self.validation, self.recipe, self.task = views, validation, recipe, task
        self.heads = [_Progress(entry, position) for position, entry in enumerate(entries)]
        self.batch_size = batch_size
        dtype, metrics = views[0].features.dtype, metrics or metrics_for(task)
        self.stacks = [_Stack(part, recipe, task, dtype, metrics) for part in _parts(self.heads)]
        self.steps_per_epoch = math.ceil(math.ceil(len(views[0].labels) / batch_size) / recipe.accumulation)
        self.total_steps = recipe.epochs * self.steps_per_epoch

    def run(self) -> list[BankResult]:
        """Train all heads to their ends, a stack on each core: stacks need not wait for each other."""
        began = time.perf_counter()
        threads = torch.get_num_threads()
        if threads == 1 or len(self.stacks) == 1:
            for stack in self.stacks:
                self._train(stack)
        else:
            try:
                with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                    list(pool.map(self._train, self.stacks))
            finally:
                torch.set_num_threads(threads)
        seconds = (time.perf_counter() - began) / len(self.heads)
        return [_result(head, seconds) for head in self.heads]

    @torch.no_grad()
    def _train(self, stack: _Stack) -> None:
        seed = stack.heads[0].entry.order_seed
        order = TensorBatches(self.views[0].features, self.views[0].labels, self.batch_size, shuffle_seed=seed)
        self._evaluate(stack, 0)
        for epoch in range(1, self.recipe.epochs + 1):
            if not stack.heads:
                break
            view = self.views[(epoch - 1) % len(self.views)]
            for index in self._steps(order, epoch):
                # index_select gathers whole rows, three times as fast as indexing.
                batch = view.features.index_select(0, index), view.labels.index_select(0, index)
                stack.step(*batch, self._factor(stack.steps))
            if epoch % self.recipe.evaluate_every == 0 or epoch == self.recipe.epochs:
                self._evaluate(stack, epoch)
        stack.finish()

    def _steps(self, order: TensorBatches, epoch: int) -> Iterator[Tensor]:
        """The examples of each optimizer step."""
        batches = order.order(epoch - 1)
        for start in range(0, len(batches), self.recipe.accumulation):
            yield torch.cat(batches[start : start + self.recipe.accumulation])

    def _factor(self, step: int) -> float:
        return self.recipe.rate_factor(step, self.total_steps, self.steps_per_epoch)

    def _evaluate(self, stack: _Stack, epoch: int) -> None:
        """Score all heads of an order, keep the weights of those at their best, let go of those that are done."""
        if not stack.heads:
            return
        scores = stack.score(self.validation, self.recipe.monitor)
        losses = stack.mean_losses()
        lr = self._factor(stack.steps - 1) if stack.steps else 0.0
        keep, better = [], []
        for slot, (head, found) in enumerate(zip(stack.heads, scores, strict=True)):
            if found is None:
                head.status = "diverged"
                continue
            loss = None if losses is None else losses[slot]
            row = {"epoch": epoch, "step": stack.steps, "train_loss": loss, "lr": head.entry.lr * lr, **found}
            head.history.append(row)
            if self._improves(head, row):
                better.append(slot)
            head.stopped_early = (
                self.recipe.patience is not None and head.evaluations_since_best >= self.recipe.patience
            )
            if not head.stopped_early:
                keep.append(slot)
        stack.keep_best(better)
        stack.keep(keep)

    def _improves(self, head: _Progress, row: dict[str, Any]) -> bool:
        value = row[self.recipe.monitor]
        first = math.isnan(head.best_value)
        higher = HIGHER_IS_BETTER[self.recipe.monitor]
        if not first and not (value > head.best_value if higher else value < head.best_value):
            head.evaluations_since_best += 1
            return False
        head.best_epoch, head.best_value, head.evaluations_since_best = row["epoch"], value, 0
        return True


class _Stack:
    """Heads of one order as stacked rows: head h is rows h K to (h + 1) K of one weight matrix.

    Those with equal learning rate and decay are neighbours: a block of them is one call of the fused optimizer.
    """

    def __init__(self, heads: list[_Progress], recipe: Recipe, task: str, dtype: torch.dtype, metrics: Metrics) -> None:
        self.heads, self.metrics = list(heads), metrics
        self.recipe, self.task, self.steps = recipe, task, 0
        entries = [head.entry for head in self.heads]
        self.classes, self.width = entries[0].weight.shape
        self.weight = torch.cat([entry.weight.to(dtype) for entry in entries])
        biases = [entry.bias for entry in entries]
        self.bias = None if biases[0] is None else torch.cat([bias.to(dtype) for bias in biases])  # type: ignore[union-attr]
        self.best_weight = torch.empty_like(self.weight)
        self.best_bias = None if self.bias is None else torch.empty_like(self.bias)
        states = 2 if recipe.optimizer == "adamw" else 1
        self.weight_state = [torch.zeros_like(self.weight) for _ in range(states)]
        self.bias_state = [] if self.bias is None else [torch.zeros_like(self.bias) for _ in range(states)]
        self._lay_out()

    def _lay_out(self) -> None:
        """What follows from which heads are there."""
        count, entries = len(self.heads), [head.entry for head in self.heads]
        smoothing = [self.recipe.label_smoothing if e.label_smoothing is None else e.label_smoothing for e in entries]
        self.smoothing = self.weight.new_tensor(smoothing)
        self.loss_sum = self.weight.new_zeros(count, dtype=torch.float64)
        self.examples = 0
        size = self.classes * self.width * self.weight.dtype.itemsize
        self.blocks = list(_blocks(entries, max(1, _BLOCK_BYTES // size)))
        largest = max((stop - start for start, stop in self.blocks), default=0)
        self.gradient = self.weight.new_empty(largest * self.classes, self.width)

    # --- training

    def step(self, features: Tensor, labels: Tensor, factor: float) -> None:
        """One optimizer step of every head on one batch: `(B, d)` features, learning rates times `factor`."""
        if not self.heads:
            return
        errors, losses = self._errors(self._logits(features), labels)
        if not bool(losses.isfinite().all()):
            errors = self._drop_diverged(errors, losses)
            if not self.heads:
                return
            losses = losses[losses.isfinite()]
        errors = errors.flatten(0, 1)
        for start, stop in self.blocks:
            rows = slice(start * self.classes, stop * self.classes)
            gradient = torch.mm(errors[rows], features, out=self.gradient[: rows.stop - rows.start])
            bias_gradient = None if self.bias is None else errors[rows].sum(1)
            if self.recipe.clip_norm is not None:
                self._clip(gradient, bias_gradient, stop - start)
            self._update(rows, gradient, bias_gradient, self.heads[start].entry, factor)
        self.loss_sum += losses.double() * len(labels)
        self.examples += len(labels)
        self.steps += 1

    def _logits(self, features: Tensor) -> Tensor:
        """Logits `(H, K, B)` of all heads: one product. With examples last, a softmax over K is fast."""
        products = self.weight @ features.T
        if self.bias is not None:
            products += self.bias[:, None]
        return products.unflatten(0, (len(self.heads), self.classes))

    def _errors(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient of the mean loss into the logits `(H, K, B)`, and the mean loss of each head `(H,)`."""
        if self.task == "single_label":
            return self._softmax_errors(logits, labels)
        targets = labels.T
        scale = 1.0 / labels.numel()
        if self.task == "regression":
            residuals = logits - targets
            return residuals * (2 * scale), residuals.square().sum((1, 2)) * scale
        loss = F.softplus(logits) - logits * targets
        return (logits.sigmoid() - targets) * scale, loss.sum((1, 2)) * scale

    def _softmax_errors(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(softmax - target) / B with target = (1 - s) one-hot + s / K."""
        log_probabilities = logits.log_softmax(1)
        rows = torch.arange(len(labels))
        kept = 1.0 - self.smoothing
        losses = -(log_probabilities[:, labels, rows].mean(1) * kept)
        smoothed = bool(self.smoothing.any())
        if smoothed:
            losses -= log_probabilities.mean((1, 2)) * self.smoothing
        # Probabilities too small for a normal float32 make the products that follow ten times as slow.
        errors = F.threshold_(log_probabilities.exp_(), _NEGLIGIBLE, 0.0)  # type: ignore[attr-defined]
        errors[:, labels, rows] -= kept[:, None]
        if smoothed:
            errors -= (self.smoothing / self.classes)[:, None, None]
        return errors.div_(len(labels)), losses

    def _clip(self, gradient: Tensor, bias_gradient: Tensor | None, count: int) -> None:
        """Scale each head's gradient to at most `clip_norm`, as `clip_grad_norm_` does for one head."""
        squares = torch.linalg.vector_norm(gradient.view(count, -1), dim=1).square()
        if bias_gradient is not None:
            squares += bias_gradient.view(count, -1).square().sum(1)
        scales = (self.recipe.clip_norm / (squares.sqrt() + 1e-6)).clamp_(max=1.0)  # type: ignore[operator]
        if bool((scales < 1).any()):
            gradient.view(count, self.classes, -1).mul_(scales[:, None, None])
            if bias_gradient is not None:
                bias_gradient.view(count, -1).mul_(scales[:, None])

    def _update(
        self, rows: slice, gradient: Tensor, bias_gradient: Tensor | None, entry: BankEntry, factor: float
    ) -> None:
        weights = [self.weight[rows]], [gradient], [[state[rows]] for state in self.weight_state]
        if bias_gradient is None:
            return self._optimize(*weights, entry.lr * factor, entry.weight_decay)
        assert self.bias is not None
        biases = [self.bias[rows]], [bias_gradient], [[state[rows]] for state in self.bias_state]
        if entry.weight_decay == 0:  # one call for both
            states = [a + b for a, b in zip(weights[2], biases[2], strict=True)]
            return self._optimize(weights[0] + biases[0], weights[1] + biases[1], states, entry.lr * factor, 0.0)
        self._optimize(*weights, entry.lr * factor, entry.weight_decay)
        self._optimize(*biases, entry.lr * factor, 0.0)
        return None

    def _optimize(
        self, parameters: list[Tensor], gradients: list[Tensor], states: list[list[Tensor]], lr: float, decay: float
    ) -> None:
        """torch's own fused optimizer step, on parts of the stack."""
        from torch.optim.adamw import adamw
        from torch.optim.sgd import sgd

        recipe = self.recipe
        if recipe.optimizer == "adamw":
            steps = [torch.tensor(float(self.steps)) for _ in parameters]
            adamw(
                parameters, gradients, states[0], states[1], [], steps, fused=True, amsgrad=False, maximize=False,
                beta1=recipe.betas[0], beta2=recipe.betas[1], lr=lr, weight_decay=decay, eps=recipe.eps,
            )  # fmt: skip
        else:
            buffers: list[Tensor | None] = list(states[0]) if recipe.momentum else [None] * len(parameters)
            sgd(
                parameters, gradients, buffers, fused=True, maximize=False, dampening=0.0,
                lr=lr, weight_decay=decay, momentum=recipe.momentum, nesterov=recipe.nesterov,
            )  # fmt: skip

    def _drop_diverged(self, errors: Tensor, losses: Tensor) -> Tensor:
        fine = losses.isfinite()
        for head, good in zip(self.heads, fine.tolist(), strict=True):
            if not good:
                head.status, head.steps = "diverged", self.steps
        self.keep(fine.nonzero().flatten().tolist())
        return errors[fine]

    # --- evaluation

    def mean_losses(self) -> list[float] | None:
        """Training loss of each head since the last call; None at the start."""
        if self.examples == 0:
            return None
        means = (self.loss_sum / self.examples).tolist()
        self.loss_sum.zero_()
        self.examples = 0
        return means

    def score(self, data: _Examples, monitor: str) -> list[dict[str, float] | None]:
        """Validation metrics of each head; None for a head with a logit that is NaN or infinite."""
        rows = max(1, _LOGIT_BYTES // (8 * len(self.heads) * self.classes))
        shared = self.task == "single_label" and monitor in ("accuracy", "nll")
        if not shared:
            logits = torch.cat([self._logits(part) for part in data.features.split(rows)], 2)
            return [self._scored_alone(head.T, data.labels, monitor) for head in logits]
        hits = torch.zeros(len(self.heads), dtype=torch.int64)
        total = torch.zeros(len(self.heads), dtype=torch.float64)
        fine = torch.ones(len(self.heads), dtype=torch.bool)
        for features, labels in zip(data.features.split(rows), data.labels.split(rows), strict=True):
            logits = self._logits(features)
            fine &= logits.isfinite().flatten(1).all(1)
            # Over neighbouring numbers argmax is three times as fast, the copy included.
            hits += (logits.transpose(1, 2).contiguous().argmax(2) == labels).sum(1)
            total -= logits.double().log_softmax(1)[:, labels, torch.arange(len(labels))].sum(1)
        size = len(data.labels)
        found = zip(hits.tolist(), total.tolist(), fine.tolist(), strict=True)
        return [{"accuracy": hit / size, "nll": loss / size} if good else None for hit, loss, good in found]

    def _scored_alone(self, logits: Tensor, labels: Tensor, monitor: str) -> dict[str, float] | None:
        if not bool(logits.isfinite().all()):
            return None
        scores = self.metrics(logits, labels)
        if monitor not in scores:
            raise TrainingError(f"The metric {monitor!r} that chooses the best epoch is none of {', '.join(scores)}.")
        return scores

    # --- which heads there are

    def keep_best(self, slots: list[int]) -> None:
        """Remember the weights of these heads as their best so far."""
        shape = (len(self.heads), self.classes)
        if len(slots) == len(self.heads):
            self.best_weight.copy_(self.weight)
        elif slots:
            self.best_weight.unflatten(0, shape)[slots] = self.weight.unflatten(0, shape)[slots]
        if self.bias is not None and self.best_bias is not None and slots:
            self.best_bias.unflatten(0, shape)[slots] = self.bias.unflatten(0, shape)[slots]

    def keep(self, slots: list[int]) -> None:
        """Let go of all other heads, with what they have reached."""
        if len(slots) == len(self.heads):
            return
        staying = set(slots)
        for slot, head in enumerate(self.heads):
            if slot not in staying:
                self._release(slot, head)
        rows = [row for slot in slots for row in range(slot * self.classes, (slot + 1) * self.classes)]
        index = torch.tensor(rows, dtype=torch.int64)
        self.weight, self.best_weight = self.weight[index], self.best_weight[index]
        self.weight_state = [state[index] for state in self.weight_state]
        if self.bias is not None and self.best_bias is not None:
            self.bias, self.best_bias = self.bias[index], self.best_bias[index]
            self.bias_state = [state[index] for state in self.bias_state]
        self.heads = [self.heads[slot] for slot in slots]
        losses, examples = self.loss_sum, self.examples
        self._lay_out()
        self.loss_sum, self.examples = losses[torch.tensor(slots, dtype=torch.int64)], examples

    def finish(self) -> None:
        """Give every head that is left its best weights."""
        for slot, head in enumerate(self.heads):
            self._release(slot, head)

    def _release(self, slot: int, head: _Progress) -> None:
        rows = slice(slot * self.classes, (slot + 1) * self.classes)
        head.steps = self.steps
        if not head.history:  # not even the start could be scored
            head.best = self.weight[rows].clone(), None if self.bias is None else self.bias[rows].clone()
            return
        head.best = self.best_weight[rows].clone(), None if self.best_bias is None else self.best_bias[rows].clone()


def _parts(heads: Sequence[_Progress]) -> list[list[_Progress]]:
    """The heads of each order, in parts of about equal size whose weights fit into a core's cache.

    What is computed together does not depend on the number of cores, so neither do the results.
    """
    size = heads[0].entry.weight.numel() * 4
    parts = []
    for seed in dict.fromkeys(head.entry.order_seed for head in heads):
        mine = sorted(
            (head for head in heads if head.entry.order_seed == seed),
            key=lambda head: (head.entry.lr, head.entry.weight_decay),
        )
        count = math.ceil(len(mine) * size / _STACK_BYTES)
        edges = [len(mine) * k // count for k in range(count + 1)]
        parts += [mine[start:stop] for start, stop in itertools.pairwise(edges) if stop > start]
    return parts


def _blocks(entries: Sequence[BankEntry], most: int) -> Iterator[tuple[int, int]]:
    """Runs of at most `most` neighbours with equal learning rate and decay, as (first, behind the last)."""
    start = 0
    for stop in range(1, len(entries) + 1):
        settings = (entries[start].lr, entries[start].weight_decay)
        ends = stop == len(entries) or (entries[stop].lr, entries[stop].weight_decay) != settings
        if ends or stop - start == most:
            yield start, stop
            start = stop


def _result(head: _Progress, seconds: float) -> BankResult:
    assert head.best is not None
    return BankResult(
        weight=head.best[0],
        bias=head.best[1],
        best_epoch=head.best_epoch,
        history=head.history,
        steps=head.steps,
        seconds=seconds,
        status=head.status,
        stopped_early=head.stopped_early,
    )


def _check(
    train: FeatureSet, validation: FeatureSet, entries: Sequence[BankEntry], task: str, views: Sequence[FeatureSet]
) -> None:
    if task not in TASKS:
        raise unknown_name("task of a head bank", task, TASKS)
    width = train.features.shape[1]
    if any(not torch.equal(view.labels, train.labels) for view in views):
        raise DataError("Every view must hold the training examples, in their order: the labels differ.")
    for what, data in (("training", train), ("validation", validation), *(("view", view) for view in views)):
        if len(data) == 0 or data.features.ndim != 2 or data.features.shape[1] != width:
            raise DataError(
                f"A head bank needs features (N, d): {what} features have shape {tuple(data.features.shape)}, the "
                f"training features {tuple(train.features.shape)}."
            )
        if not bool(data.features.isfinite().all()):
            raise DataError(f"{what.capitalize()} features hold NaN or infinity. Look at the data and at the weights.")
    shapes = {tuple(entry.weight.shape) for entry in entries}
    biased = {entry.bias is not None for entry in entries}
    wanted = (train.num_classes, width)
    if len(shapes | {wanted}) > 1 or len(biased) > 1:
        raise DataError(
            f"Heads of one bank must all be {wanted} with or all without a bias; found weights of shapes "
            f"{sorted(shapes)}. Train heads of other kinds in banks of their own."
        )
