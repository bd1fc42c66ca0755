"""Cells whose backbone is frozen: heads trained on features, those with the same order of examples in one bank."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from headinit.analysis.metrics import HIGHER_IS_BETTER
from headinit.analysis.results import RunRow, plain
from headinit.comparison.bench import Bench, Leader, Setting, logits_on
from headinit.comparison.grid import Cell
from headinit.comparison.store import CellStore
from headinit.data.loading import Batch, TensorBatches
from headinit.errors import TrainingError
from headinit.features.extract import FeatureSet
from headinit.heads.record import record_of
from headinit.training.finetune import finetune
from headinit.training.head_bank import TASKS as BANK_TASKS
from headinit.training.head_bank import BankEntry, head_logits, train_head_bank

FORMAT = 2
"""Part of every cell's key: raise it when results of an older version must not be taken over."""

_HOPELESS = re.compile(r"\b(nan|inf|infinite|has diverged|cannot learn)\b", re.IGNORECASE)

Listener = Callable[[Sequence[RunRow]], None]


def train_frozen_cells(bench: Bench, cells: Sequence[Cell], store: CellStore, listener: Listener) -> None:
    """Train the heads on features, those with the same order together."""
    keys = {id(cell): cell_key(bench, cell) for cell in cells}
    banked = type(bench.head) is nn.Linear and record_of(bench.model).task in BANK_TASKS

    def setting_of(cell: Cell) -> tuple[int, int | None]:
        return cell.split_seed, cell.per_class

    for (split_seed, per_class), group in itertools.groupby(cells, key=setting_of):
        own = list(group)
        if all(keys[id(cell)] in store.rows for cell in own):
            continue
        setting = bench.setting(split_seed, per_class)
        # A bank is all cells of one order, finished or not: its sums then do not depend on where a run was stopped.
        for _, chunk in itertools.groupby(own, key=lambda cell: (cell.seed, cell.order_seed)):
            together = list(chunk)
            missing = [cell for cell in together if keys[id(cell)] not in store.rows]
            if not missing:
                continue
            if banked:
                trained = train_bank(setting, together)
                rows = {keys[id(cell)]: trained[id(cell)][0] for cell in missing}
                for cell in together:
                    _lead(bench, keys[id(cell)], *trained[id(cell)])
                store.add(rows)
                listener(list(rows.values()))
            else:
                for cell in missing:
                    row = _train_alone(setting, cell)
                    store.add({keys[id(cell)]: row})
                    listener([row])


def _lead(bench: Bench, key: str, row: RunRow, weight: Tensor, bias: Tensor | None) -> None:
    """Remember a head that is better than all before it."""
    value = row.val.get(bench.recipe.monitor)
    if value is not None:
        score = value if HIGHER_IS_BETTER[bench.recipe.monitor] else -value
        if bench.leader is None or score > bench.leader.score:
            bench.leader = Leader(key, score, weight, bias)


def cell_key(bench: Bench, cell: Cell) -> str:
    """Digest of all that a frozen cell's result depends on."""
    data = bench.data_of(cell.split_seed, cell.per_class)
    record = record_of(bench.model)
    recipe = {k: v for k, v in dataclasses.asdict(bench.recipe).items() if k not in ("lr", "weight_decay", "seed")}
    facts = {
        "format": FORMAT,
        **{k: v for k, v in dataclasses.asdict(cell).items() if k != "label"},
        "features": bench.identity,
        "data": data.fingerprint,
        "head": [record.head, plain(record.head_options), record.pooling, record.task],
        "recipe": recipe,
        "batch_size": bench.batch_size,
    }
    return hashlib.sha256(json.dumps(plain(facts), sort_keys=True).encode()).hexdigest()


def has_diverged(error: TrainingError) -> bool:
    """Whether training stopped because it could not get anywhere: a result, and no mistake in the settings.

    A number was NaN or infinite, the loss went far above chance, or the head got no gradient.

    Example:
        >>> has_diverged(TrainingError("The loss is nan at step 3.")), has_diverged(TrainingError("No information."))
        (True, False)
    """
    return bool(_HOPELESS.search(str(error)))


Trained = dict[int, tuple[RunRow, Tensor, Tensor | None]]


def train_bank(setting: Setting, cells: Sequence[Cell]) -> Trained:
    """Row, weight and bias of each cell, by `id`."""
    starts: dict[str, tuple[Tensor, Tensor | None, dict[str, Any]]] = {}
    for cell in cells:
        if cell.label not in starts:
            head = setting.start(cell)
            assert isinstance(head, nn.Linear)
            bias = None if head.bias is None else head.bias.detach().clone()
            starts[cell.label] = head.weight.detach().float().clone(), bias, setting.start_scores(head)
    entries = [
        BankEntry(*starts[cell.label][:2], lr=cell.lr, weight_decay=cell.weight_decay, order_seed=cell.order_seed)
        for cell in cells
    ]
    bench = setting.bench
    results = train_head_bank(
        setting.train,
        setting.validation,
        entries,
        bench.recipe,
        batch_size=bench.batch_size,
        task=setting.task.name,
        metrics=setting.task.metrics,
        views=setting.views,
    )
    found: Trained = {}
    for cell, result in zip(cells, results, strict=True):
        row = _row(
            setting,
            cell,
            starts[cell.label][2],
            logits_of=lambda features, r=result: head_logits(r.weight, r.bias, features),  # type: ignore[misc]
            history=result.history,
            best_epoch=result.best_epoch,
            steps=result.steps,
            seconds=result.seconds,
            status=result.status,
        )
        found[id(cell)] = row, result.weight, result.bias
    return found


def _train_alone(setting: Setting, cell: Cell) -> RunRow:
    """A head of another kind: the ordinary loop on the features."""
    bench = setting.bench
    head = copy.deepcopy(setting.start(cell))
    start = setting.start_scores(head)
    recipe = dataclasses.replace(bench.recipe, lr=cell.lr, weight_decay=cell.weight_decay, seed=cell.order_seed)
    batches = ViewBatches(setting.views or (setting.train,), bench.batch_size, cell.order_seed)
    held_out = TensorBatches(setting.validation.features, setting.validation.labels, bench.batch_size)
    try:
        outcome = finetune(
            head, batches, held_out, recipe, task=setting.task.name, evaluate_metrics=setting.task.metrics
        )
    except TrainingError as error:
        if not has_diverged(error):
            raise
        return _row(setting, cell, start, status="diverged")
    return _row(
        setting,
        cell,
        start,
        logits_of=lambda features: logits_on(head.cpu(), features),
        history=outcome.history,
        best_epoch=outcome.best_epoch,
        steps=outcome.steps,
        seconds=outcome.seconds,
    )


class ViewBatches(TensorBatches):
    """Batches of features of which every epoch takes another view of the same examples."""

    def __init__(self, views: Sequence[FeatureSet], batch_size: int, shuffle_seed: int) -> None:
        super().__init__(views[0].features, views[0].labels, batch_size, shuffle_seed=shuffle_seed)
        self.views = views

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, from batch `start` on."""
        features = self.views[epoch % len(self.views)].features
        for index in self.order(epoch)[start:]:
            yield Batch(features[index], self.labels[index], index)


def _row(
    setting: Setting,
    cell: Cell,
    start: Mapping[str, Any],
    *,
    logits_of: Callable[[Tensor], Tensor] | None = None,
    history: Sequence[Mapping[str, Any]] = (),
    best_epoch: int | None = None,
    steps: int = 0,
    seconds: float = 0.0,
    status: str = "finished",
) -> RunRow:
    scores: dict[str, dict[str, float]] = {"val": {}, "test": {}}
    if status == "finished" and logits_of is not None:
        try:
            for name, data in (("val", setting.validation), ("test", setting.test)):
                if data is not None:
                    scores[name] = setting.task.metrics(logits_of(data.features), data.labels)
        except TrainingError:  # logits that are not finite
            scores, status = {"val": {}, "test": {}}, "diverged"
    monitor = setting.bench.recipe.monitor
    return RunRow(
        init=cell.label,
        lr=cell.lr,
        weight_decay=cell.weight_decay,
        seed=cell.seed,
        split_seed=cell.split_seed,
        per_class=cell.per_class,
        data=setting.data.name,
        val=scores["val"],
        test=scores["test"],
        best_epoch=best_epoch,
        steps=steps,
        history=tuple((int(line["step"]), float(line[monitor])) for line in history),
        init_loss=start.get("loss"),
        feature_gradient=start.get("feature_gradient"),
        seconds=seconds,
        status=status,
        majority=setting.majority,
    )
