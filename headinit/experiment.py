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
from headinit.data.loading import Batches, TensorBatches, TokenBatches
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
from headinit.training.losses import count_targets, summed_loss
from headinit.training.recipe import Recipe
from headinit.training.targets import Standardisation, predicting_layers

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


@dataclass(frozen=True)
class Task:
    """What is learnt and how it is judged.

    Attributes:
        name: ``"single_label"``, ``"multi_label"``, ``"regression"`` or ``"token"``.
        class_names: names of the classes, or of the targets.
        scale: of regression targets, which the model learns standardised.
    """

    name: str
    class_names: tuple[str, ...]
    scale: Standardisation | None = None

    @classmethod
    def of(cls, splits: DataSplits) -> Task:
        """The task of some data."""
        scale = Standardisation.of(splits.train.labels) if splits.task == "regression" else None
        return cls(splits.task, splits.class_names, scale)

    def in_own_units(self, values: Tensor) -> Tensor:
        """Outputs, or the labels that batches bring, in the units of the data."""
        return values if self.scale is None else self.scale.restore(values)

    def metrics(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """Scores, in the units of the data."""
        scores = metrics_for(self.name, self.class_names)
        return scores(self.in_own_units(outputs), self.in_own_units(labels))

    def start(self, outputs: Tensor, labels: Tensor) -> dict[str, Any]:
        """How the head starts, in the units of the data."""
        return start_diagnostics(self.in_own_units(outputs), self.in_own_units(labels), task=self.name)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The sum over examples (over labelled tokens) of their losses, in the units of the data."""
        outputs, labels = self.in_own_units(outputs), self.in_own_units(labels.to(outputs.device))
        per_example = 1 if self.name in ("single_label", "token") else count_targets(labels[:1], self.name)
        return summed_loss(outputs, labels, self.name) / per_example


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
        task = Task.of(splits)
    recipe_of(settings, task.name, task.class_names)  # what is wrong with it is said before anything is loaded
    finished = _finished_run(folder, splits)
    if finished is not None:
        console.print(f"This run has finished before; its result is in {folder}.")
        console.print(run_summary(finished, folder))
        return finished
    with clock("backbone"):
        backbone = load_model(settings, splits)
    _announce(console, settings, splits, backbone)
    learnt = splits if task.scale is None else task.scale.standardised(splits)
    loaders = make_loaders(settings, learnt, backbone)
    with clock("head"):
        model = attach_new_head(settings, splits, backbone)
        apply_freeze(model, settings)
    digest_before = frozen_digest(model)
    if trains_on_features(model, settings):
        start, outcome, evaluations = _run_on_features(model, settings, loaders, task, folder, clock)
    else:
        start, outcome, evaluations = _run_on_examples(model, settings, loaders, task, folder, clock)
    digests = {"before": digest_before, "after": frozen_digest(model)}
    if task.scale is not None:
        task.scale.fold(model)
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
    backbone = load_backbone(settings.model["name"], seed=settings.seed, task=splits.task, **options)
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
    repeats = settings.freeze.policy != "all"  # the network runs over the same pictures in every epoch

    def batches(split: Split, *, keep: bool = False, **options: Any) -> Batches:
        return Batches(
            split,
            backbone.require_preprocessing(),
            trainer.batch_size,
            bucket=splits.modality == "text",
            workers=trainer.workers,
            cache_decoded=keep,
            **options,
        )

    return Loaders(
        train=batches(
            splits.train,
            shuffle_seed=settings.order_seed,
            augmentation=augmentation,
            keep=repeats and augmentation == "none",
        ),
        train_in_order=batches(splits.train),
        validation=batches(splits.validation, keep=repeats),
        test=None if splits.test is None else batches(splits.test),
    )


def attach_new_head(settings: Settings, splits: DataSplits, backbone: Backbone) -> nn.Module:
    """The model with its new head in place; a scheme that needs data gets its turn when there are features.

    Raises:
        ConfigError: the kind of head makes one feature of all tokens, and every token has a label.
        HeadError: the head cannot predict numbers, and the data are a regression.
    """
    name, options = init_of(settings)
    head_options = {key: value for key, value in settings.head.items() if key != "name"}
    waits = schemes.needs_data(name, **options)
    pools_by_itself = settings.head["name"] in TOKEN_KINDS
    if pools_by_itself and splits.task == "token":
        raise ConfigError(
            f"head={settings.head['name']} makes one feature of all tokens, and in these data every word has a label: "
            "use head=linear, mlp or cosine."
        )
    unpooled = pools_by_itself or splits.task == "token"
    model = attach.attach_head(
        backbone,
        splits.num_classes,
        init="zeros" if waits else name,
        init_options={} if waits else options,
        head=settings.head["name"],
        head_options=head_options,
        pooling="native" if unpooled else settings.model.get("pooling") or "native",
        seed=settings.seed,
        class_names=splits.class_names,
        task=splits.task,
        bias=True if splits.task == "regression" else None,  # it will hold the mean of the targets
    )
    if splits.task == "regression":
        predicting_layers(model)  # says what does not suit before anything is trained
    return model


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


def recipe_of(settings: Settings, task: str = "single_label", class_names: tuple[str, ...] = ()) -> Recipe:
    """The training recipe that the settings describe for a task."""
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
        monitor=trainer.monitor or primary_metric(task, class_names),
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
    model: nn.Module, settings: Settings, loaders: Loaders, task: Task, folder: Path, clock: PhaseClock
) -> tuple[dict[str, Any], TrainingOutcome, dict[str, Any]]:
    """The backbone runs once over every split; the head trains on what it saw."""
    sources = {"train": loaders.train_in_order, "val": loaders.validation}
    if loaders.test is not None:
        sources["test"] = loaders.test
    with clock("features"):
        features = {
            name: extract_features(model, batches, cache=feature_cache(settings), progress=settings.trainer.progress)
            for name, batches in sources.items()
        }
        lengths = {name: sources[name].labelled_tokens() for name in sources if task.name == "token"}
    with clock("head"):
        _start_from_data(model, settings, features["train"])
    head = model.get_submodule(record_of(model).sites[0].path)
    start = _start_on_features(head, features["train"], task)

    def batches(name: str, seed: int | None = None) -> TensorBatches:
        chosen, size = features[name], settings.trainer.batch_size
        if task.name == "token":
            return TokenBatches(chosen.features, chosen.labels, lengths[name], size, shuffle_seed=seed)
        return TensorBatches(chosen.features, chosen.labels, size, shuffle_seed=seed)

    with clock("training"), one_thread_if_small(head, settings.trainer.batch_size):
        outcome = _train(head, batches("train", settings.order_seed), batches("val"), task, settings, folder)
    with clock("evaluation"):
        evaluations = {name: task.metrics(*predict(head, batches(name))) for name in features if name != "train"}
    return start, outcome, evaluations


def _run_on_examples(
    model: nn.Module, settings: Settings, loaders: Loaders, task: Task, folder: Path, clock: PhaseClock
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
        start = _start_on_examples(model, loaders.train_in_order, task)
    with clock("training"):
        outcome = _train(model, loaders.train, loaders.validation, task, settings, folder)
    with clock("evaluation"):
        evaluations = {"val": task.metrics(*predict(model, loaders.validation))}
        if loaders.test is not None:
            evaluations["test"] = task.metrics(*predict(model, loaders.test))
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
    trained: nn.Module, train: Any, validation: Any, task: Task, settings: Settings, folder: Path
) -> TrainingOutcome:
    return finetune(
        trained,
        train,
        validation,
        recipe_of(settings, task.name, task.class_names),
        task=task.name,
        evaluate_metrics=task.metrics,
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


# --- how the head starts ----------------------------------------------------------------------------------------------


def _start_on_features(head: nn.Module, features: FeatureSet, task: Task) -> dict[str, Any]:
    with evaluating(head):
        logits = torch.cat([head(part) for part in features.features.split(1024)])
    gradient = _feature_gradient(head, features.features[:START_EXAMPLES], features.labels[:START_EXAMPLES], task)
    return {**task.start(logits, features.labels), "feature_gradient": gradient}


def _start_on_examples(model: nn.Module, batches: Batches, task: Task) -> dict[str, Any]:
    """Judged on the first examples in a fixed order, at most `START_EXAMPLES`."""
    logits, labels, gradients = [], [], []
    examples = 0
    for batch in batches:
        found, gradient = head_start(model, batch.inputs, batch.labels, task.loss)
        known = batch.labels >= 0 if task.name == "token" else slice(None)
        logits.append(found[known])
        labels.append(batch.labels[known])
        gradients.append(gradient[known])
        examples += len(batch.labels)
        if examples >= START_EXAMPLES:
            break
    start = task.start(torch.cat(logits), torch.cat(labels))
    return {**start, "feature_gradient": torch.cat(gradients).mean().item()}


def head_start(
    model: nn.Module, inputs: Any, labels: Tensor, loss: Callable[[Tensor, Tensor], Tensor] = summed_loss
) -> tuple[Tensor, Tensor]:
    """Logits of one batch, and the norm of the loss's gradient into what the head receives, per example.

    The backbone runs without gradients: the graph begins at the head. With labels `(B, T)` for each token the norms are
    those of each token.
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
            (gradient,) = torch.autograd.grad(loss(logits.float(), labels.to(logits.device)), leaves[-1])
    finally:
        handle.remove()
    rows = logits.ndim - 1  # one for each example, or for each token of each
    return logits.detach().float().cpu(), gradient.flatten(rows).norm(dim=rows).double().cpu()


def _feature_gradient(head: nn.Module, features: Tensor, labels: Tensor, task: Task) -> float:
    with evaluating(head), torch.enable_grad():
        return feature_gradient_of(head, features, labels, task.loss).mean().item()


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
    config = as_mapping(settings)
    config["trainer"]["monitor"] = recipe_of(settings, splits.task, splits.class_names).monitor
    return RunRecord(
        config=config,
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
        history=[(line["step"], line[primary_metric(splits.task, splits.class_names)]) for line in outcome.history],
        data=splits.name,
        task=splits.task,
    )


def _announce(console: Console, settings: Settings, splits: DataSplits, backbone: Backbone) -> None:
    """What is about to run, and where the weights come from."""
    weights = backbone.weights
    origin = f"{weights.source} weights" + (f" ({weights.path})" if weights.path else "")
    test = "no test split" if splits.test is None else f"{len(splits.test)} test"
    console.print(f"[bold]{settings.model['name']}[/bold] ({backbone.library}), {origin}", highlight=False)
    kinds = {"regression": "target", "token": "tag", "multi_label": "label"}
    what = f"{splits.num_classes} {kinds.get(splits.task, 'class')}"
    if splits.num_classes > 1:
        what += "es" if splits.task == "single_label" else "s"
    console.print(
        f"[bold]{splits.name}[/bold]: {what}, {len(splits.train)} train, {len(splits.validation)} validation, {test}",
        highlight=False,
    )
    if weights.source == "random":
        console.print(
            "[yellow]The backbone's weights are random (model.pretrained=false): every result says so.[/yellow]"
        )


def _plural(modality: str) -> str:
    return {"image": "pictures", "text": "text"}[modality]
