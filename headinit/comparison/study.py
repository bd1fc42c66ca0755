"""A whole comparison: data, model, features, cells, outcome."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headinit import attach, schemes
from headinit.analysis.metrics import primary_metric
from headinit.analysis.report import progress_table
from headinit.analysis.results import RunRow, plain
from headinit.comparison.bench import Bench
from headinit.comparison.details import report_details
from headinit.comparison.frozen import BANK_TASKS, Listener, cell_key, train_frozen_cells
from headinit.comparison.grid import Cell, Grid, cell_settings
from headinit.comparison.outcome import Comparison
from headinit.comparison.pool import FeaturePool, with_own_names
from headinit.comparison.runs import check_ordinary_cells, run_ordinary_cells
from headinit.comparison.store import CellStore
from headinit.config import Settings, as_mapping, settings_from
from headinit.data.loading import Batches
from headinit.data.splits import DataSplits, Split, divide
from headinit.errors import ConfigError, DataError
from headinit.experiment import (
    PLACEHOLDER,
    apply_freeze,
    attach_new_head,
    load_model,
    load_splits,
    recipe_of,
    trains_on_features,
)
from headinit.features.acceleration import copies_kept
from headinit.features.cache import FeatureCache, describe_setting, tensors_digest, weights_digest
from headinit.features.extract import FeatureSet, extract_features
from headinit.heads.locate import find_head
from headinit.heads.record import PretrainedHeads, keep_pretrained_heads, record_of
from headinit.seeding import global_generators_kept
from headinit.training.checkpoint import run_lock
from headinit.training.head_bank import beyond_bank
from headinit.training.recipe import Recipe

if TYPE_CHECKING:
    from rich.console import Console


def compare(
    model_or_features: Any,
    data: Any = None,
    *,
    inits: Sequence[str | Mapping[str, Any]] = ("he", "torch", "zeros", "ridge"),
    lrs: float | Sequence[float] = (1e-3, 1e-2),
    seeds: int | Sequence[int] = 5,
    weight_decays: float | Sequence[float] = 0.0,
    per_class: int | Sequence[int | None] | None = None,
    freezes: Any = "all",
    epochs: int = 20,
    validation: Any = None,
    test: Any = None,
    order_seeds: Sequence[int] | None = None,
    split_seeds: int | Sequence[int] = 0,
    batch_size: int = 64,
    recipe: Recipe | None = None,
    head: str = "linear",
    head_options: Mapping[str, Any] | None = None,
    task: str = "single_label",
    class_names: Sequence[str] | None = None,
    name: str = "data",
    views: int = 0,
    folder: str | os.PathLike[str] | None = None,
    cache: FeatureCache | str | os.PathLike[str] | None = None,
    margin: float = 0.005,
    workers: int = 1,
    progress: bool = False,
) -> Comparison:
    """Compare initialisations of a head on your data: every combination is a run, all of them on one pass.

    The learning rate and the best epoch are chosen on validation data, test data are reported once. Schemes share the
    order of the examples and the splits at each seed, so they are compared in pairs.

    Args:
        model_or_features: a catalog name (``"resnet50"``, or a mapping with ``"name"`` and options), an `nn.Module`
            with a head, or a `FeatureSet`.
        data: for a name: the name of a data set (``"digits"``) or a mapping with ``"name"`` and its options; for a
            module or a name also `(inputs, labels)` or an iterable of batches. None for a `FeatureSet`.
        inits: names of schemes, or mappings with ``"name"`` and options.
        lrs, weight_decays, per_class: values to try; `per_class` trains on that many examples of each class.
        seeds: of the head: a number of them, or a list. `order_seeds`, one for each, are of the order of the examples;
            None takes the same.
        split_seeds: of validation splits and subsets.
        freezes: freeze policies (`headinit.freeze`), ``"lp_ft"`` and ``"gradual"`` (`headinit.training.phases`); other
            than ``"all"`` needs model and data by name, and a folder.
        epochs, batch_size: of training. `recipe` sets all the rest; its epochs are replaced by `epochs`.
        validation: data that select, as `data` is given; or a share (None: a fifth) of the training data.
        test: data that are reported.
        head, head_options, task, class_names: as for `attach_head`.
        name: what to call data that have no name.
        views: for data by name that are augmented, see `compare_settings`.
        folder: where finished cells are kept, so that a comparison can be interrupted; None keeps nothing.
        cache: folder of features kept between comparisons.
        margin: difference of the metric that does not matter.
        workers: processes that share the runs which train more than a head.
        progress: show progress on the terminal.

    Raises:
        HeadInitError: of its kinds, what is wrong with the arguments; nothing has been written.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> labels = torch.arange(60) % 3
        >>> features = torch.eye(3)[labels] * 2 + torch.randn(60, 3, generator=generator)
        >>> result = compare(FeatureSet(features, labels, 3), inits=["zeros", "ridge"], lrs=0.1, seeds=2, epochs=3)
        >>> len(result.rows), result.best().init in ("zeros", "ridge")
        (4, True)
    """
    grid = Grid.of(
        inits=list(inits) if not isinstance(inits, (str, Mapping)) else inits,
        lrs=lrs,
        seeds=seeds,
        order_seeds=order_seeds,
        split_seeds=split_seeds,
        weight_decays=weight_decays,
        per_class=per_class,
        freezes=freezes,
    )
    given, recipe = recipe, dataclasses.replace(recipe or Recipe(monitor=primary_metric(task)), epochs=epochs)
    target = None if folder is None else Path(folder)
    store = cache if isinstance(cache, FeatureCache) or cache is None else FeatureCache(Path(cache))
    if isinstance(model_or_features, (str, Mapping)) and isinstance(data, (str, Mapping)):
        settings = _settings_for(
            _named(model_or_features), _named(data), recipe, batch_size, head, head_options, progress
        )
        if given is None:
            settings.trainer.monitor = None  # what the data are decides
        return compare_settings(
            settings, grid, target, cache=store, views=views, margin=margin, workers=workers, progress=progress
        )
    bench = _bench_in_memory(
        model_or_features, data, validation, test, grid, recipe, batch_size, head, head_options, task, class_names,
        name, store, progress,
    )  # fmt: skip
    configuration = {"grid": plain(grid), "recipe": plain(recipe), "data": name}
    return _compare(bench, grid.cells(), target, margin, configuration, progress, None)


def compare_settings(
    settings: Settings,
    grid: Grid,
    folder: Path | None = None,
    *,
    cache: FeatureCache | None = None,
    views: int = 0,
    margin: float = 0.005,
    workers: int = 1,
    keep_models: bool = True,
    progress: bool = False,
    console: Console | None = None,
) -> Comparison:
    """Compare by settings, as `scripts/compare.py` does.

    Args:
        settings: what all cells share.
        grid: in what they differ.
        folder: where finished cells and the ordinary runs are kept; a comparison that finds its cells there goes on.
        cache: where features are kept between comparisons.
        views: with data that are augmented: train frozen heads on the features of this many augmented views, a view an
            epoch in turn. 0 makes every cell on augmented data a run of its own, with other pictures in every epoch.
        margin: difference of the metric that does not matter.
        workers: processes that share the cells which are runs of their own; the cores are divided among them.
        keep_models: whether these runs keep their weights and checkpoints when they have finished.
        progress: show a bar while features are extracted and a table while heads are trained.
        console: where to; None is the terminal.

    Raises:
        HeadInitError: the input or the settings are wrong; nothing has been written.
    """
    cells = grid.cells()
    bench = _bench_of(settings, grid, cache, progress, views)
    configuration = {"settings": as_mapping(settings), "grid": plain(grid)}
    return _compare(bench, cells, folder, margin, configuration, progress, console, workers, keep_models)


def _compare(
    bench: Bench,
    cells: Sequence[Cell],
    folder: Path | None,
    margin: float,
    configuration: Mapping[str, Any],
    progress: bool,
    console: Console | None,
    workers: int = 1,
    keep_models: bool = True,
) -> Comparison:
    on_features = [cell for cell in cells if cell.frozen and bench.on_features]
    others = [cell for cell in cells if not (cell.frozen and bench.on_features)]
    if others:
        check_ordinary_cells(bench, others, folder)
    keys = [
        cell_key(bench, cell) for cell in on_features
    ]  # reads the data: what is wrong shows before a folder is made
    rows: list[RunRow] = []
    with run_lock(folder) if folder is not None else nullcontext():
        store = CellStore(folder)
        with _live_table(len(on_features), bench.recipe.monitor, progress and bool(on_features), console) as listener:
            finished = [store.rows[key] for key in keys if key in store.rows]
            if len(finished) < len(on_features):
                bench.pool()  # progress bars come before the table
                bench.view_pools()
            listener(finished)
            train_frozen_cells(bench, on_features, store, listener)
        rows += [store.rows[key] for key in keys]
        if folder is not None:
            rows += run_ordinary_cells(bench, others, store, folder, console, workers, keep_models)
        starts, winner = report_details(bench, on_features, rows) if on_features else (None, None)
    return Comparison(tuple(rows), bench.recipe.monitor, starts, winner, configuration, margin)


@contextmanager
def _live_table(expected: int, metric: str, shown: bool, console: Console | None) -> Iterator[Listener]:
    """A table on the terminal that follows the rows as they come."""
    from rich.console import Console
    from rich.live import Live

    console = console or Console()
    if not (shown and console.is_terminal):
        yield lambda rows: None
        return
    seen: list[RunRow] = []
    with Live(console=console, auto_refresh=False, transient=True) as live:

        def show(rows: Sequence[RunRow]) -> None:
            seen.extend(rows)
            if seen:
                live.update(progress_table(seen, metric=metric, expected=expected), refresh=True)

        yield show


def _bench_of(settings: Settings, grid: Grid, cache: FeatureCache | None, progress: bool, views: int) -> Bench:
    """Data, model and features by their names."""
    first = grid.cells()[0]
    augmentation = settings.data.get("augmentation", "none")
    if views and augmentation == "none":
        raise ConfigError(f"views={views} needs pictures that are augmented: set data.augmentation=basic, or views=0.")
    base = cell_settings(settings, dataclasses.replace(first, per_class=None, freeze={"policy": "all"}))
    plain_data = {**base.data, "augmentation": "none"} if views else base.data
    splits: dict[int, DataSplits] = {}

    def splits_of(seed: int) -> DataSplits:
        if seed not in splits:
            own = dataclasses.replace(base, data={**base.data, "split_seed": seed})
            splits[seed] = with_own_names(load_splits(own))
        return splits[seed]

    data = splits_of(first.split_seed)
    backbone = load_model(base, data)
    model = attach_new_head(base, data, backbone)
    for init in grid.inits:
        attach.check_init(model, dict(init))
    apply_freeze(model, base)
    preprocessing = backbone.require_preprocessing()

    def extract(split: Split, augmentation: str = "none", view: int = 0) -> Tensor:
        batches = Batches(
            split,
            preprocessing,
            base.trainer.batch_size,
            bucket=data.modality == "text",
            workers=base.trainer.workers,
            augmentation=augmentation,
        )
        return extract_features(model, batches, epoch=view, cache=cache, progress=progress).features

    @functools.cache
    def pool() -> FeaturePool:
        return FeaturePool(_needed(bench, grid), extract, data.num_classes)

    @functools.cache
    def view_pools() -> list[FeaturePool]:
        parts = [
            bench.data_of(seed, count).train for seed, count in itertools.product(grid.split_seeds, grid.per_class)
        ]
        return [
            FeaturePool(parts, functools.partial(extract, augmentation=augmentation, view=view), data.num_classes)
            for view in range(views)
        ]

    site = record_of(model).sites[0]
    facts = [weights_digest(model, site), describe_setting(preprocessing), site.path, site.in_features]
    facts += [augmentation, views] if views else []
    identity = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    bench = Bench(
        model, identity, splits_of, pool, recipe_of(base, data.task, data.class_names), base.trainer.batch_size, base
    )
    bench.view_pools = view_pools
    in_a_bank = data.task in BANK_TASKS and beyond_bank(bench.recipe) is None
    own_epochs = base.trainer.rule is not None or base.trainer.steps_per_epoch is not None
    bench.on_features = (
        in_a_bank and not own_epochs and trains_on_features(model, dataclasses.replace(base, data=plain_data))
    )
    return bench


def _needed(bench: Bench, grid: Grid) -> list[Split]:
    """Every split that some cell reads."""
    found = []
    for split_seed, per_class in itertools.product(grid.split_seeds, grid.per_class):
        data = bench.data_of(split_seed, per_class)
        found += [part for part in (data.train, data.validation, data.test) if part is not None]
    return found


def _named(given: str | Mapping[str, Any]) -> dict[str, Any]:
    return {"name": given} if isinstance(given, str) else dict(given)


def _settings_for(
    model: Mapping[str, Any],
    data: Mapping[str, Any],
    recipe: Recipe,
    batch_size: int,
    head: str,
    head_options: Mapping[str, Any] | None,
    progress: bool,
) -> Settings:
    optim = {
        "name": recipe.optimizer,
        "lr": recipe.lr,
        "backbone_lr": recipe.backbone_lr,
        "backbone_share": recipe.backbone_share,
        "layer_decay": recipe.layer_decay,
        "betas": list(recipe.betas),
        "eps": recipe.eps,
        "momentum": recipe.momentum,
        "nesterov": recipe.nesterov,
    }
    schedule = {
        "name": recipe.schedule,
        "warmup": recipe.warmup,
        "step_epochs": recipe.step_epochs,
        "step_gamma": recipe.step_gamma,
    }
    same = ("epochs", "clip_norm", "accumulation", "label_smoothing", "patience", "monitor", "precision")
    trainer = {**{key: getattr(recipe, key) for key in same}, "batch_size": batch_size, "progress": progress}
    return settings_from(
        {
            "model": dict(model),
            "data": dict(data),
            "head": {"name": head, **(head_options or {})},
            "init": {"name": "zeros"},
            "optim": optim,
            "schedule": schedule,
            "trainer": trainer,
        }
    )


def _bench_in_memory(
    model_or_features: Any,
    data: Any,
    validation: Any,
    test: Any,
    grid: Grid,
    recipe: Recipe,
    batch_size: int,
    head: str,
    head_options: Mapping[str, Any] | None,
    task: str,
    class_names: Sequence[str] | None,
    name: str,
    cache: FeatureCache | None,
    progress: bool,
) -> Bench:
    """Features that are given, or that a given model makes of given data."""
    model = model_or_features
    old_heads: PretrainedHeads = {}
    if isinstance(model, (str, Mapping)):
        from headinit.backbones.load import load_backbone

        backbone = load_backbone(**_named(model))
        model, old_heads = backbone.model, attach.pretrained_classifiers(backbone)
    elif isinstance(model, nn.Module):
        old_heads = attach.pretrained_classifiers(model)
    if isinstance(model, FeatureSet):
        if data is not None:
            raise ConfigError("A FeatureSet holds its labels: leave out data=, and give validation= and test= as such.")
        model, data = None, model
    elif data is None:
        raise ConfigError("compare needs data: a data set's name, (inputs, labels), an iterable of batches.")

    def features_of(given: Any) -> FeatureSet:
        if isinstance(given, FeatureSet) or model is None:
            if not isinstance(given, FeatureSet):
                raise DataError(f"Give validation and test as a FeatureSet, as the training data; found {type(given)}.")
            return given
        return extract_features(model, given, cache=cache, progress=progress)

    with copies_kept():
        train = features_of(data)
        held_out = None if validation is None or isinstance(validation, (int, float)) else features_of(validation)
        last = None if test is None else features_of(test)
    classes = max(part.num_classes for part in (train, held_out, last) if part is not None)
    parts = {"train": train, "validation": held_out, "test": last}
    named = {key: _rows_as_split(part, key) for key, part in parts.items() if part is not None}
    share = 0.2 if validation is None else validation
    names = tuple(class_names) if class_names else tuple(str(k) for k in range(classes))

    def splits_of(seed: int) -> DataSplits:
        own, selecting = (
            (named["train"], named["validation"]) if held_out is not None else divide(named["train"], share, seed)
        )
        return DataSplits(own, selecting, named.get("test"), names, "features", name, task)

    every = torch.cat([part.features.float() for part in parts.values() if part is not None])
    pool = FeaturePool(list(named.values()), lambda split: every, classes)
    width = train.features.shape[1]
    with global_generators_kept():
        bare = nn.Sequential(nn.Identity(), nn.Linear(width, classes))
    first = grid.inits[0]
    waits = schemes.as_scheme(dict(first)).needs_data
    attached = attach.attach_head(
        bare, classes, init=PLACEHOLDER if waits else dict(first), head=head, head_options=head_options, task=task,
        pretrained=True,
    )  # fmt: skip
    old_head = None if model is None else old_heads.get(find_head(model)[0].path)
    keep_pretrained_heads(attached, {} if old_head is None else {record_of(attached).sites[0].path: old_head})
    for init in grid.inits:
        attach.check_init(attached, dict(init))
    if task not in BANK_TASKS:
        raise ConfigError(f"compare takes the tasks {', '.join(BANK_TASKS)}; task={task} needs model and data by name.")
    identity = f"features of width {width}"  # what they are is in the fingerprints of the splits
    return Bench(attached, identity, splits_of, lambda: pool, recipe, batch_size)


def _rows_as_split(data: FeatureSet, part: str) -> Split:
    """Rows of a feature matrix as examples, so that they can be divided like any others."""
    fingerprint = data.fingerprint or tensors_digest({"features": data.features, "labels": data.labels})
    return Split(range(len(data)), data.labels, [f"{part} row {i}" for i in range(len(data))], fingerprint)
