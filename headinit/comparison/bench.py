"""What the frozen cells of a comparison share: a model, its features, and how heads start on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from headinit import attach, schemes
from headinit.analysis.diagnostics import feature_gradient_of, linear_feature_gradient
from headinit.comparison.grid import Cell
from headinit.comparison.pool import FeaturePool
from headinit.config import Settings
from headinit.data.splits import DataSplits, with_subset
from headinit.experiment import START_EXAMPLES, Task
from headinit.features.extract import FeatureSet
from headinit.heads.locate import evaluating
from headinit.heads.record import record_of
from headinit.schemes.scheme import HeadShape, HeadWeights, Scheme
from headinit.training.recipe import Recipe


@dataclass
class Bench:
    """What frozen cells are trained on.

    Attributes:
        model: with a head attached, which is started anew for every start.
        identity: digest of all that the features depend on beside the data.
        splits_of: the data of a split seed, whole.
        pool: their features; a function, so that nothing is computed where every cell has finished.
        recipe, batch_size: how heads are trained; the rates are the cells' own.
        settings: where the data and the model have names: what an ordinary run needs.
        view_pools: features of augmented views of the training examples, a pool a view.
        on_features: whether a frozen cell needs no more than the features.
        subsets: splits by (split seed, examples per class), as far as they were asked for.
        leader: the linear head with the best validation metric of those that were trained here.
        latest: the setting that was asked for last.
    """

    model: nn.Module
    identity: str
    splits_of: Callable[[int], DataSplits]
    pool: Callable[[], FeaturePool]
    recipe: Recipe
    batch_size: int
    settings: Settings | None = None
    on_features: bool = True
    view_pools: Callable[[], Sequence[FeaturePool]] = tuple
    subsets: dict[tuple[int, int | None], DataSplits] = field(default_factory=dict)
    leader: Leader | None = None
    latest: Setting | None = None

    @property
    def head(self) -> nn.Module:
        """The head's module."""
        return self.model.get_submodule(record_of(self.model).sites[0].path)

    def data_of(self, split_seed: int, per_class: int | None) -> DataSplits:
        """The splits of a cell."""
        key = (split_seed, per_class)
        if key not in self.subsets:
            self.subsets[key] = with_subset(self.splits_of(split_seed), seed=split_seed, per_class=per_class)
        return self.subsets[key]

    def setting(self, split_seed: int, per_class: int | None) -> Setting:
        """The features of a cell; those of one setting at a time are kept."""
        if self.latest is None or (self.latest.split_seed, self.latest.per_class) != (split_seed, per_class):
            self.latest = Setting.of(self, split_seed, per_class)
        return self.latest


@dataclass(frozen=True)
class Leader:
    """The best linear head so far: its cell's key, its score (higher is better) and its weights."""

    key: str
    score: float
    weight: Tensor
    bias: Tensor | None


class _Memory:
    """A cache that copying leaves as it is."""

    def __init__(self) -> None:
        self.found: dict[Any, HeadWeights] = {}

    def __deepcopy__(self, memo: Any) -> _Memory:
        return self


class _Watched(torch.Generator):
    """A generator that notes whether its seed was read; whether numbers were drawn shows in its state."""

    asked = False

    def initial_seed(self) -> int:
        """The seed."""
        self.asked = True
        return super().initial_seed()


@dataclass(frozen=True)
class Remembered(Scheme):
    """A scheme that is computed once where it does not depend on the seed: a closed form for all seeds together."""

    scheme: Scheme
    memory: _Memory = field(default_factory=_Memory, compare=False)

    @property
    def needs_data(self) -> bool:  # type: ignore[override]
        """Whether the scheme does."""
        return self.scheme.needs_data

    @property
    def breaks_symmetry(self) -> bool:  # type: ignore[override]
        """Whether the scheme does."""
        return self.scheme.breaks_symmetry

    def __call__(self, shape: HeadShape, generator: torch.Generator, data: Any = None) -> HeadWeights:
        """The weights, remembered if neither the seed nor random numbers went into them."""
        key = (shape, id(data))
        if key in self.memory.found:
            return self.memory.found[key]
        watched = _Watched().manual_seed(generator.initial_seed())
        before = watched.get_state()
        assert isinstance(watched, _Watched)
        watched.asked = False
        weights = self.scheme(shape, watched, data)
        if not watched.asked and torch.equal(before, watched.get_state()):
            self.memory.found[key] = weights
        return weights


@dataclass
class Setting:
    """The data of one split seed and sample size, and how heads start on them.

    Regression targets are standardised in the features, as `headinit.experiment.run` does; `data` has them as they are.
    """

    bench: Bench
    split_seed: int
    per_class: int | None
    train: FeatureSet
    validation: FeatureSet
    test: FeatureSet | None
    data: DataSplits
    task: Task
    views: Sequence[FeatureSet] = ()
    started: dict[str, Scheme] = field(default_factory=dict)

    @classmethod
    def of(cls, bench: Bench, split_seed: int, per_class: int | None) -> Setting:
        """The setting of a cell with these."""
        data, pool = bench.data_of(split_seed, per_class), bench.pool()
        task = Task.of(data)
        learnt = data if task.scale is None else task.scale.standardised(data)
        test = None if learnt.test is None else pool.features_of(learnt.test)
        train, validation = pool.features_of(learnt.train), pool.features_of(learnt.validation)
        views = [view.features_of(learnt.train) for view in bench.view_pools()]
        return cls(bench, split_seed, per_class, train, validation, test, data, task, views)

    @property
    def majority(self) -> float | None:
        """Share of the most frequent class of the validation data."""
        if self.data.task != "single_label":
            return None
        return torch.bincount(self.validation.labels).max().item() / len(self.validation)

    def start(self, cell: Cell) -> nn.Module:
        """The model's head as this cell starts it (the module itself: copy it to keep it)."""
        scheme = self.started.setdefault(cell.label, Remembered(schemes.as_scheme(dict(cell.init))))
        scheme = scheme if scheme.needs_data or not isinstance(scheme, Remembered) else scheme.scheme
        attach.init_head(self.bench.model, scheme, data=self.train, seed=cell.seed)
        return self.bench.head

    def start_scores(self, head: nn.Module) -> dict[str, Any]:
        """Loss, gradient into the features and the rest of `start_diagnostics`, on the training data."""
        logits, labels = logits_on(head, self.train.features), self.train.labels
        first = slice(0, START_EXAMPLES)
        if self.task.name == "single_label" and type(head) is nn.Linear:
            gradient = linear_feature_gradient(logits[first], labels[first], head.weight)
        else:
            with evaluating(head), torch.enable_grad():
                gradient = feature_gradient_of(head, self.train.features[first], labels[first], self.task.loss)
        return {**self.task.start(logits, labels), "feature_gradient": gradient.mean().item()}


@torch.no_grad()
def logits_on(head: nn.Module, features: Tensor) -> Tensor:
    """Logits `(N, K)` of a head on features `(N, d)`, in evaluation mode."""
    with evaluating(head):
        return torch.cat([head(part) for part in features.split(4096)])
