"""One run, from settings to result: the only file that knows every room.

`run` reads as the design does: data, backbone, head, freezing, features where they suffice, training, result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from headinit import attach, schemes
from headinit.analysis.diagnostics import feature_gradient_of, start_diagnostics
from headinit.analysis.metrics import metrics_for, primary_metric
from headinit.analysis.results import (
    RESULT_FILE,
    RunRecord,
    append_metrics,
    library_versions,
    read_metrics,
    read_result,
    write_result,
)
from headinit.analysis.summary import run_summary
from headinit.backbones.load import Backbone, load_backbone
from headinit.config import Settings, as_mapping
from headinit.data.catalog import load_data
from headinit.data.loading import Batches, TensorBatches
from headinit.data.splits import DataSplits, Split
from headinit.errors import ConfigError
from headinit.features.cache import FeatureCache
from headinit.features.extract import FeatureSet, extract_features
from headinit.heads.locate import evaluating
from headinit.heads.modules import TOKEN_KINDS
from headinit.heads.record import call_model, record_of
from headinit.training.evaluation import predict
from headinit.training.finetune import TrainingOutcome, finetune
from headinit.training.freezing import freeze, frozen_digest, frozen_summary
from headinit.training.recipe import Recipe

START_EXAMPLES = 512
"""How many training examples the start is judged on where the backbone has to run for it."""

SMALL_STEP = 50_000_000
"""Multiplications in a step of the head below which it runs on one thread."""

_SPLIT_OPTIONS = ("validation", "per_class", "train_size")
_READING_OPTIONS = ("name", "modality", "augmentation", "split_seed", *_SPLIT_OPTIONS)


@dataclass
class PhaseClock:
    """Wall-clock seconds of each phase of a run."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the time of a block to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Loaders:
    """The batches of each split, read by the backbone's own preprocessing."""

    train: Batches
    train_in_order: Batches
    validation: Batches
    test: Batches | None


def run(settings: Settings, folder: Path, console: Console | None = None) -> RunRecord:
    """Run an experiment, or read its result where it has finished before.

    Args:
        settings: as `headinit.config.settings_from` gives them.
        folder: where results go; made when the first of them is written, after the input has been checked.
        console: where to report; None is the terminal.

    Returns:
        What `result.json` holds.

    Raises:
        HeadInitError: the input or the settings are wrong; nothing has been written.
    """
    console = console or Console()
    clock = PhaseClock()
    with clock("data"):
        splits = load_splits(settings)
    finished = _finished_run(folder, splits)
    if finished is not None:
        console.print(f"This run has finished before; its result is in {folder}.")
        console.print(run_summary(finished, folder))
        return finished
    with clock("backbone"):
        backbone = load_model(settings, splits)
    _announce(console, settings, splits, backbone)
    loaders = make_loaders(settings, splits, backbone)
    with clock("head"):
        model = attach_new_head(settings, splits, backbone)
        apply_freeze(model, settings)
    digest_before = frozen_digest(model)
    if trains_on_features(model, settings):
        start, outcome, evaluations = _run_on_features(model, settings, loaders, folder, clock)
    else:
        start, outcome, evaluations = _run_on_examples(model, settings, loaders, folder, clock)
    digests = {"before": digest_before, "after": frozen_digest(model)}
    record = _record(settings, splits, backbone, model, start, outcome, evaluations, digests, clock)
    attach.save(model, folder / "model", preprocessing=backbone.preprocessing)
    write_result(folder, record)
    console.print(run_summary(record, folder))
    return record


# --- data, backbone, head ---------------------------------------------------------------------------------------------


def load_splits(settings: Settings) -> DataSplits:
    """The data that the settings name."""
    options = {key: value for key, value in settings.data.items() if key not in _READING_OPTIONS}
    split = {key: settings.data[key] for key in _SPLIT_OPTIONS if key in settings.data}
    return load_data(settings.data["name"], seed=split_seed_of(settings), **split, **options)


def split_seed_of(settings: Settings) -> int:
    """The seed of splits and subsets, which is not the head's: runs that share it see the same examples."""
    return int(settings.data.get("split_seed", 0))


def load_model(settings: Settings, splits: DataSplits) -> Backbone:
    """The backbone that the settings name, if it reads what the data hold.

    Raises:
        ConfigError: the backbone reads text and the data are pictures, or the other way round.
    """
    options = {k: v for k, v in settings.model.items() if k not in ("name", "pooling") and v is not None}
    backbone = load_backbone(settings.model["name"], seed=settings.seed, **options)
    if backbone.modality != splits.modality:
        other = {"image": "model=efficientnet_lite0 or model=resnet50", "text": "model=minilm or model=bert"}
        data = {"image": "data=digits or data=imagefolder", "text": "data=pydocs or data=csv"}
        raise ConfigError(
            f"model={settings.model['name']} reads {_plural(backbone.modality)} and data={settings.data['name']} holds "
            f"{_plural(splits.modality)}. Choose {other[splits.modality]} for these data, or {data[backbone.modality]} "
            "for this model."
        )
    return backbone


def make_loaders(settings: Settings, splits: DataSplits, backbone: Backbone) -> Loaders:
    """Batches of each split; only the training batches are shuffled and augmented."""
    trainer = settings.trainer
    augmentation = settings.data.get("augmentation", "none")
    rereads = settings.freeze.policy != "all"  # the same pictures again in every epoch: decode them once

    def batches(split: Split, *, augmentation: str = "none", **options: Any) -> Batches:
        return Batches(
            split,
            backbone.require_preprocessing(),
            trainer.batch_size,
            augmentation=augmentation,
            bucket=splits.modality == "text",
            workers=trainer.workers,
            cache_decoded=rereads and augmentation == "none",
            **options,
        )

    return Loaders(
        train=batches(
            splits.train,
            shuffle_seed=settings.order_seed,
            augmentation=augmentation,
        ),
        train_in_order=batches(splits.train),
        validation=batches(splits.validation),
        test=None if splits.test is None else batches(splits.test),
    )


def attach_new_head(settings: Settings, splits: DataSplits, backbone: Backbone, data: Any = None) -> nn.Module:
    """The model with its new head in place; a scheme that needs data gets its turn when there are features."""
    name, options = init_of(settings)
    head_options = {key: value for key, value in settings.head.items() if key != "name"}
    waits = schemes.needs_data(name, **options)
    pools_by_itself = settings.head["name"] in TOKEN_KINDS
    return attach.attach_head(
        backbone,
        splits.num_classes,
        init="zeros" if waits else name,
        init_options={} if waits else options,
        head=settings.head["name"],
        head_options=head_options,
        pooling="native" if pools_by_itself else settings.model.get("pooling") or "native",
        seed=settings.seed,
        class_names=splits.class_names,
        task=splits.task,
    )


def init_of(settings: Settings) -> tuple[str, dict[str, Any]]:
    """Name and options of the scheme; options left at null are the scheme's own business."""
    options = {key: value for key, value in settings.init.items() if key != "name"}
    return settings.init["name"], options


def apply_freeze(model: nn.Module, settings: Settings) -> None:
    """Freeze what the settings say."""
    policy: Any = settings.freeze.policy
    if policy == "stages":
        policy = settings.freeze.stages
    elif policy == "patterns":
        policy = settings.freeze.patterns
    freeze(model, policy, norm=settings.freeze.norm)


def recipe_of(settings: Settings) -> Recipe:
    """The training recipe that the settings describe."""
    optim, schedule, trainer = settings.optim, settings.schedule, settings.trainer
    return Recipe(
        epochs=trainer.epochs,
        optimizer=optim.name,
        lr=optim.lr,
        backbone_lr=optim.backbone_lr,
        layer_decay=optim.layer_decay,
        weight_decay=optim.weight_decay,
        betas=tuple(optim.betas),  # type: ignore[arg-type]
        eps=optim.eps,
        momentum=optim.momentum,
        nesterov=optim.nesterov,
        schedule=schedule.name,
        warmup=schedule.warmup,
        step_epochs=schedule.step_epochs,
        step_gamma=schedule.step_gamma,
        clip_norm=trainer.clip_norm,
        accumulation=trainer.accumulation,
        label_smoothing=trainer.label_smoothing,
        patience=trainer.patience,
        monitor=trainer.monitor,
        precision=trainer.precision,
        seed=settings.order_seed,
    )


# --- training ---------------------------------------------------------------------------------------------------------


def trains_on_features(model: nn.Module, settings: Settings) -> bool:
    """Whether one pass of the backbone suffices: only the head trains, and its input is the same in every epoch."""
    if settings.data.get("augmentation", "none") != "none":
        return False
    record = record_of(model)
    head = record.sites[0]
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    inside = all(name.startswith(f"{head.path}.") for name in trainable)
    return inside and len(record.sites) == 1 and not isinstance(model.get_submodule(head.path), nn.Conv2d)


def _run_on_features(
    model: nn.Module, settings: Settings, loaders: Loaders, folder: Path, clock: PhaseClock
) -> tuple[dict[str, Any], TrainingOutcome, dict[str, Any]]:
    """The backbone runs once over every split; the head trains on what it saw."""
    with clock("features"):
        features = {
            name: extract_features(model, batches, cache=feature_cache(settings), progress=settings.trainer.progress)
            for name, batches in (
                ("train", loaders.train_in_order),
                ("val", loaders.validation),
                ("test", loaders.test),
            )
            if batches is not None
        }
    with clock("head"):
        _start_from_data(model, settings, features["train"])
    head = model.get_submodule(record_of(model).sites[0].path)
    start = _start_on_features(head, features["train"])

    def batches(name: str, seed: int | None = None) -> TensorBatches:
        chosen = features[name]
        return TensorBatches(chosen.features, chosen.labels, settings.trainer.batch_size, shuffle_seed=seed)

    with clock("training"), one_thread_if_small(head, settings.trainer.batch_size):
        outcome = _train(head, batches("train", settings.order_seed), batches("val"), model, settings, folder)
    with clock("evaluation"):
        evaluations = {name: _metrics(head, batches(name), model) for name in features if name != "train"}
    return start, outcome, evaluations


def _run_on_examples(
    model: nn.Module, settings: Settings, loaders: Loaders, folder: Path, clock: PhaseClock
) -> tuple[dict[str, Any], TrainingOutcome, dict[str, Any]]:
    """The whole model runs over every batch."""
    name, options = init_of(settings)
    if schemes.needs_data(name, **options):
        with clock("features"):
            features = extract_features(
                model, loaders.train_in_order, cache=feature_cache(settings), progress=settings.trainer.progress
            )
        with clock("head"):
            _start_from_data(model, settings, features)
    with clock("start"):
        start = _start_on_examples(model, loaders.train_in_order)
    with clock("training"):
        outcome = _train(model, loaders.train, loaders.validation, model, settings, folder)
    with clock("evaluation"):
        evaluations = {"val": _metrics(model, loaders.validation, model)}
        if loaders.test is not None:
            evaluations["test"] = _metrics(model, loaders.test, model)
    return start, outcome, evaluations


def feature_cache(settings: Settings) -> FeatureCache | None:
    """Where features are kept between runs, if anywhere."""
    return None if settings.trainer.cache is None else FeatureCache(settings.trainer.cache)


@contextmanager
def one_thread_if_small(head: nn.Module, batch_size: int) -> Iterator[None]:
    """A step of a small head takes less time than threads take to wait for each other."""
    threads = torch.get_num_threads()
    if batch_size * sum(parameter.numel() for parameter in head.parameters()) < SMALL_STEP:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _start_from_data(model: nn.Module, settings: Settings, features: FeatureSet) -> None:
    """Give a scheme that is computed from data its data; the others have started already."""
    name, options = init_of(settings)
    if schemes.needs_data(name, **options):
        attach.init_head(model, name, data=features, seed=settings.seed, **options)


def _train(
    trained: nn.Module, train: Any, validation: Any, model: nn.Module, settings: Settings, folder: Path
) -> TrainingOutcome:
    metrics = metrics_for(record_of(model).task)
    return finetune(
        trained,
        train,
        validation,
        recipe_of(settings),
        task=record_of(model).task,
        evaluate_metrics=metrics,
        folder=folder / "checkpoint",
        save_every_steps=settings.trainer.save_every_steps,
        on_evaluation=_metrics_writer(folder),
        progress=settings.trainer.progress,
    )


def _metrics_writer(folder: Path) -> Callable[[dict[str, Any]], None]:
    """Appends each evaluation to metrics.jsonl, once: a resumed run repeats those after its last checkpoint."""

    def write(row: dict[str, Any]) -> None:
        if row["epoch"] not in {line.get("epoch") for line in read_metrics(folder)}:
            append_metrics(folder, row)

    return write


def _metrics(model: nn.Module, batches: Any, owner: nn.Module) -> dict[str, float]:
    return metrics_for(record_of(owner).task)(*predict(model, batches))


# --- how the head starts ----------------------------------------------------------------------------------------------


def _start_on_features(head: nn.Module, features: FeatureSet) -> dict[str, Any]:
    with evaluating(head):
        logits = torch.cat([head(part) for part in features.features.split(1024)])
    gradient = _feature_gradient(head, features.features[:START_EXAMPLES], features.labels[:START_EXAMPLES])
    return {**start_diagnostics(logits, features.labels), "feature_gradient": gradient}


def _start_on_examples(model: nn.Module, batches: Batches) -> dict[str, Any]:
    """Judged on the first examples in a fixed order, at most `START_EXAMPLES`."""
    logits, labels, gradients = [], [], []
    for batch in batches:
        found, gradient = head_start(model, batch.inputs, batch.labels)
        logits.append(found)
        labels.append(batch.labels)
        gradients.append(gradient)
        if sum(map(len, labels)) >= START_EXAMPLES:
            break
    start = start_diagnostics(torch.cat(logits), torch.cat(labels))
    return {**start, "feature_gradient": torch.cat(gradients).mean().item()}


def head_start(model: nn.Module, inputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of one batch, and the norm of the loss's gradient into what the head receives, per example.

    The backbone runs without gradients: the graph begins at the head.
    """
    head = model.get_submodule(record_of(model).sites[0].path)
    leaves: list[Tensor] = []

    def cut(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        leaves.append(args[0].detach().requires_grad_())
        return (leaves[-1], *args[1:])

    handle = head.register_forward_pre_hook(cut)
    try:
        with evaluating(model), torch.enable_grad():
            logits = call_model(model, inputs)
            loss = nn.functional.cross_entropy(logits.float(), labels.to(logits.device), reduction="sum")
            (gradient,) = torch.autograd.grad(loss, leaves[-1])
    finally:
        handle.remove()
    return logits.detach().float().cpu(), gradient.flatten(1).norm(dim=1).double().cpu()


def _feature_gradient(head: nn.Module, features: Tensor, labels: Tensor) -> float:
    with evaluating(head), torch.enable_grad():
        return feature_gradient_of(head, features, labels).mean().item()


# --- results ----------------------------------------------------------------------------------------------------------


def _finished_run(folder: Path, splits: DataSplits) -> RunRecord | None:
    """The result that this folder holds, if it is of the same data.

    Raises:
        ConfigError: the folder holds a result of other data under the same settings.
    """
    if not (folder / RESULT_FILE).is_file():
        return None
    record = read_result(folder)
    if record.fingerprints.get("data") == splits.fingerprint:
        return record
    raise ConfigError(
        f"{folder} holds the result of these settings on other data (the files have changed since). Delete that folder "
        "to run again, or keep both with hydra.run.dir=ANOTHER."
    )


def _record(
    settings: Settings,
    splits: DataSplits,
    backbone: Backbone,
    model: nn.Module,
    start: Mapping[str, Any],
    outcome: TrainingOutcome,
    evaluations: Mapping[str, Any],
    digests: Mapping[str, str],
    clock: PhaseClock,
) -> RunRecord:
    frozen = frozen_summary(model)
    return RunRecord(
        config=as_mapping(settings),
        seeds={"head": settings.seed, "order": settings.order_seed, "split": split_seed_of(settings)},
        init=dict(start),
        val=evaluations["val"],
        test=evaluations.get("test"),
        best_epoch=outcome.best_epoch,
        steps=outcome.steps,
        seconds={phase: round(seconds, 3) for phase, seconds in clock.seconds.items()},
        samples_per_second=outcome.samples_per_second,
        parameters={key: frozen[key] for key in ("new", "trainable", "frozen")},
        frozen_digest=digests,
        fingerprints={
            "data": splits.fingerprint,
            "train": splits.train.fingerprint,
            "validation": splits.validation.fingerprint,
            "test": None if splits.test is None else splits.test.fingerprint,
            "weights": backbone.weights.sha256,
        },
        versions=library_versions(),
        pretrained=backbone.weights.source != "random",
        weights_source=backbone.weights.source,
        class_names=splits.class_names,
        history=[(line["step"], line[primary_metric(splits.task)]) for line in outcome.history],
        data=splits.name,
        task=splits.task,
    )


def _announce(console: Console, settings: Settings, splits: DataSplits, backbone: Backbone) -> None:
    """What is about to run, and where the weights come from."""
    weights = backbone.weights
    origin = f"{weights.source} weights" + (f" ({weights.path})" if weights.path else "")
    test = "no test split" if splits.test is None else f"{len(splits.test)} test"
    console.print(f"[bold]{settings.model['name']}[/bold] ({backbone.library}), {origin}", highlight=False)
    console.print(
        f"[bold]{splits.name}[/bold]: {splits.num_classes} classes, {len(splits.train)} train, "
        f"{len(splits.validation)} validation, {test}",
        highlight=False,
    )
    if weights.source == "random":
        console.print(
            "[yellow]The backbone's weights are random (model.pretrained=false): every result says so.[/yellow]"
        )


def _plural(modality: str) -> str:
    return {"image": "pictures", "text": "text"}[modality]
