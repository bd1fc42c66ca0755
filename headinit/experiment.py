"""One run, from settings to result: the only file that knows every room.

`run` reads as the design does: data, backbone, head, freezing, features where they suffice, training, result.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from headinit import attach, schemes
from headinit.analysis.diagnostics import feature_gradient_of, start_diagnostics
from headinit.analysis.metrics import HIGHER_IS_BETTER, metric_names, metrics_for, primary_metric
from headinit.analysis.plots import rate_sweep, save_figure
from headinit.analysis.results import (
    RESULT_FILE,
    RunRecord,
    append_metrics,
    library_versions,
    read_metrics,
    read_result,
    write_json,
    write_result,
)
from headinit.analysis.summary import run_summary
from headinit.backbones.load import Backbone, load_backbone
from headinit.config import Settings, as_mapping
from headinit.data.catalog import load_data
from headinit.data.images import to_rgb
from headinit.data.loading import Batches, CycledBatches, TensorBatches, TokenBatches
from headinit.data.splits import DataSplits, Split
from headinit.errors import CheckpointError, ConfigError, unknown_name
from headinit.features.acceleration import copies_kept
from headinit.features.cache import FeatureCache
from headinit.features.extract import FeatureSet, extract_features
from headinit.heads.locate import evaluating
from headinit.heads.modules import TOKEN_KINDS
from headinit.heads.record import call_model, has_record, record_of
from headinit.processes import by_first, is_first, join_processes, process_count, process_index
from headinit.threads import one_thread_if_small
from headinit.tracking import check_tracker, record_evaluation, record_result, record_start, tracking
from headinit.training.drift import DriftWatch
from headinit.training.evaluation import predict
from headinit.training.finetune import TrainingOutcome, finetune
from headinit.training.freezing import freeze, frozen_digest, frozen_summary
from headinit.training.hyper_rule import bit_hyperrule
from headinit.training.losses import count_targets, summed_loss
from headinit.training.lr_finder import find_learning_rate
from headinit.training.phases import SCHEDULED_POLICIES, Phase, finetune_in_phases, gradual_phases, lp_ft_phases
from headinit.training.recipe import Recipe
from headinit.training.targets import Standardisation, predicting_layers

PLACEHOLDER = "lecun"
"""What stands in the head until a scheme that is computed from data has its data; it suits every head."""

WITHOUT_CLOSED_FORM = (*TOKEN_KINDS, "multi_proxy")
"""Heads in which no linear layer receives one feature vector an example and gives one logit a class."""

RATE_FILE = "lr_finder.json"
"""What the search for a learning rate saw and suggests, in the run's folder."""

START_EXAMPLES = 512
"""How many training examples the start is judged on where the backbone has to run for it."""

_SPLIT_OPTIONS = ("validation", "test", "per_class", "train_size", "join_validation")
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
    join_processes()
    check_tracker(settings.tracker)
    console = console or Console(quiet=not is_first())
    if not is_first():
        settings = dataclasses.replace(settings, trainer=dataclasses.replace(settings.trainer, progress=False))
    clock = PhaseClock()
    with clock("data"):
        splits = load_splits(settings)
        task = Task.of(splits)
    settings = with_rule(settings, splits)
    # What is wrong with it is said before anything is loaded.
    phases_of(settings, recipe_of(settings, task.name, task.class_names))
    finished = by_first(lambda: _finished_run(folder, splits))
    if finished is not None:
        console.print(f"This run has finished before; its result is in {folder}.")
        console.print(run_summary(finished, folder))
        return finished
    with tracking(settings.tracker if is_first() else {}, folder, as_mapping(settings)):
        return _run_anew(settings, splits, task, folder, console, clock)


def _run_anew(
    settings: Settings, splits: DataSplits, task: Task, folder: Path, console: Console, clock: PhaseClock
) -> RunRecord:
    """The run itself, from its beginning or from its last checkpoint."""
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
    if settings.optim.lr == "find":
        record = dataclasses.replace(record, found_lr=_found_rate(folder))

    def write() -> None:
        with _clear_if_unwritable(folder):
            attach.save(model, folder / "model", preprocessing=backbone.preprocessing)
            write_result(folder, record)

    by_first(write)
    record_result({"val": record.val, "test": record.test}, record.steps, [folder / RESULT_FILE])
    console.print(run_summary(record, folder))
    return record


# --- data, backbone, head ---------------------------------------------------------------------------------------------


def load_splits(settings: Settings) -> DataSplits:
    """The data that the settings name."""
    options = {key: value for key, value in settings.data.items() if key not in _READING_OPTIONS}
    split = {key: settings.data[key] for key in _SPLIT_OPTIONS if key in settings.data}
    return load_data(settings.data["name"], seed=split_seed_of(settings), **split, **options)


def with_rule(settings: Settings, splits: DataSplits) -> Settings:
    """The settings with what `trainer.rule` derives from the training data put in, if there is a rule.

    Raises:
        ConfigError: an unknown rule, or data that it is not for.
    """
    rule = settings.trainer.rule
    if rule is None:
        return settings
    if rule != "bit_hyperrule":
        raise unknown_name("trainer.rule", rule, ("bit_hyperrule",))
    if splits.modality != "image":
        raise ConfigError("trainer.rule=bit_hyperrule chooses the size of pictures, and these data are text.")
    derived = bit_hyperrule(len(splits.train), to_rgb(splits.train.items[0]).size)
    schedule = dataclasses.replace(
        settings.schedule,
        name="staircase",
        warmup=derived.warmup_steps / derived.steps,
        milestones=list(derived.milestones),
        step_gamma=0.1,
    )
    trainer = dataclasses.replace(settings.trainer, steps=derived.steps, mixup=derived.mixup)
    model = {**settings.model, "image_size": settings.model.get("image_size") or derived.image_size}
    return dataclasses.replace(settings, model=model, schedule=schedule, trainer=trainer)


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
        init=PLACEHOLDER if waits else name,
        # What happens below the head happens before there are features.
        init_options={"reinit_top": options.get("reinit_top")} if waits else options,
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
    if waits:
        attach.check_init(model, {"name": name, **options})
    return model


def init_of(settings: Settings) -> tuple[str, dict[str, Any]]:
    """Name and options of the scheme; options left at null are the scheme's own business.

    `auto` is told what will be trained after it: the head alone, or a network that wants some energy left in its start.
    For a head that no linear model of its features can be put into, it is `he`; the modifiers stay.
    """
    name, options = settings.init["name"], {key: value for key, value in settings.init.items() if key != "name"}
    if name == "auto" and settings.head["name"] in WITHOUT_CLOSED_FORM:
        return "he", {key: value for key, value in options.items() if key in schemes.modifiers()}
    if name == "auto" and options.get("policy") is None:
        options["policy"] = "frozen" if settings.freeze.policy == "all" else "finetune"
    return name, options


def apply_freeze(model: nn.Module, settings: Settings) -> None:
    """Freeze what the settings say; with a policy that changes, what stays frozen to the end."""
    policy: Any = settings.freeze.policy
    if policy in SCHEDULED_POLICIES:
        policy = "none"
    if policy == "stages":
        policy = settings.freeze.stages
    elif policy == "patterns":
        policy = settings.freeze.patterns
    freeze(model, policy, norm=batch_statistics(settings))


def batch_statistics(settings: Settings) -> str | None:
    """What the BatchNorm statistics of a network that trains do: ``"eval"``, they stay as pretrained, or they move.

    Where nothing is said they stay: a few small batches estimate them badly. Those of a random network have to move.
    """
    whole = settings.freeze.policy in ("all", "norm") or settings.model.get("pretrained") is False
    return settings.freeze.norm or (None if whole else "eval")


def recipe_of(settings: Settings, task: str = "single_label", class_names: tuple[str, ...] = ()) -> Recipe:
    """The training recipe that the settings describe for a task."""
    optim, schedule, trainer = settings.optim, settings.schedule, settings.trainer
    return Recipe(
        epochs=trainer.epochs,
        steps=trainer.steps,
        optimizer=optim.name,
        lr=Recipe.lr if optim.lr == "find" else optim.lr,
        backbone_lr=optim.backbone_lr,
        backbone_share=optim.backbone_share,
        layer_decay=optim.layer_decay,
        weight_decay=optim.weight_decay,
        betas=tuple(optim.betas),  # type: ignore[arg-type]
        eps=optim.eps,
        bias_correction=optim.bias_correction,
        momentum=optim.momentum,
        nesterov=optim.nesterov,
        schedule=schedule.name,
        warmup=schedule.warmup,
        step_epochs=schedule.step_epochs,
        step_gamma=schedule.step_gamma,
        milestones=tuple(schedule.milestones),
        clip_norm=trainer.clip_norm,
        accumulation=trainer.accumulation,
        label_smoothing=trainer.label_smoothing,
        mixup=trainer.mixup,
        patience=trainer.patience,
        evaluate_every=trainer.evaluate_every,
        monitor=_monitor_of(settings, task, class_names),
        select=trainer.select,
        precision=trainer.precision,
        ema=trainer.ema,
        compile=trainer.compile,
        channels_last=trainer.channels_last,
        seed=settings.order_seed,
    )


def _monitor_of(settings: Settings, task: str, class_names: tuple[str, ...]) -> str:
    """The metric that chooses the best epoch.

    Raises:
        ConfigError: it is none of the task's.
    """
    chosen, known = settings.trainer.monitor, metric_names(task, class_names)
    if chosen is not None and chosen not in known:
        raise unknown_name(f"trainer.monitor for {task} data", chosen, known)
    return chosen or primary_metric(task, class_names)


def phases_of(settings: Settings, recipe: Recipe) -> tuple[Phase, ...]:
    """The phases of a run whose freeze policy changes; none for the other policies.

    Raises:
        ConfigError: the epochs do not suffice, or a number is out of range.
    """
    chosen = settings.freeze
    if chosen.policy not in SCHEDULED_POLICIES:
        return ()
    if recipe.steps is not None:
        raise ConfigError(f"freeze={chosen.policy} is counted in epochs: leave trainer.steps and trainer.rule at null.")
    if chosen.policy == "lp_ft":
        return lp_ft_phases(recipe, probe_epochs=chosen.probe_epochs, probe_lr=chosen.probe_lr)
    return gradual_phases(recipe, stages=chosen.stages or 1, stage_epochs=chosen.stage_epochs)


# --- training ---------------------------------------------------------------------------------------------------------


def trains_on_features(model: nn.Module, settings: Settings) -> bool:
    """Whether one pass of the backbone suffices: only the head trains, and its input is the same in every epoch."""
    if settings.data.get("augmentation", "none") != "none" or settings.trainer.mixup:
        return False
    return _in_the_head(model, [name for name, parameter in model.named_parameters() if parameter.requires_grad])


def probes_on_features(model: nn.Module, settings: Settings) -> bool:
    """Whether the first phase of a run in phases trains the head alone, and features suffice for it."""
    phases = phases_of(settings, recipe_of(settings, record_of(model).task, record_of(model).class_names or ()))
    first = next((phase for phase in phases if phase.epochs), None)
    return first is not None and first.policy == "all" and _in_the_head(model, record_of(model).new_parameters)


def _in_the_head(model: nn.Module, names: Iterable[str]) -> bool:
    """Whether these parameters belong to one head that takes a feature vector."""
    record = record_of(model)
    sites = record.sites
    inside = all(name.startswith(f"{sites[0].path}.") for name in names)
    takes_positions = record.head in TOKEN_KINDS or isinstance(model.get_submodule(sites[0].path), nn.Conv2d)
    return inside and len(sites) == 1 and not takes_positions


def _run_on_features(
    model: nn.Module, settings: Settings, loaders: Loaders, task: Task, folder: Path, clock: PhaseClock
) -> tuple[dict[str, Any], TrainingOutcome, dict[str, Any]]:
    """The backbone runs once over every split; the head trains on what it saw."""
    sources = {"train": loaders.train_in_order, "val": loaders.validation}
    if loaders.test is not None:
        sources["test"] = loaders.test
    with clock("features"):
        features = features_of(model, sources, settings)
        lengths = {name: sources[name].labelled_tokens() for name in sources if task.name == "token"}
    with clock("head"):
        _start_from_data(model, settings, features["train"])
    head = model.get_submodule(record_of(model).sites[0].path)
    start = _start_on_features(head, features["train"], task)
    record_start(start)

    def batches(name: str, seed: int | None = None) -> TensorBatches:
        return _feature_batches(features[name], lengths.get(name), settings.trainer.batch_size, seed)

    with (
        clock("training"),
        one_thread_if_small(settings.trainer.batch_size * sum(p.numel() for p in head.parameters())),
    ):
        outcome = _train(head, batches("train", settings.order_seed), batches("val"), task, settings, folder)
    with clock("evaluation"):
        evaluations = {name: task.metrics(*predict(head, batches(name))) for name in features if name != "train"}
    return start, outcome, evaluations


def _run_on_examples(
    model: nn.Module, settings: Settings, loaders: Loaders, task: Task, folder: Path, clock: PhaseClock
) -> tuple[dict[str, Any], TrainingOutcome, dict[str, Any]]:
    """The whole model runs over every batch."""
    name, options = init_of(settings)
    probed = probes_on_features(model, settings)
    sources = {"val": loaders.validation} if probed else {}
    if probed or schemes.needs_data(name, **options):
        sources["train"] = loaders.train_in_order
    features, probe = {}, None
    if sources:
        with clock("features"):
            features = features_of(model, sources, settings)
            lengths = {part: sources[part].labelled_tokens() for part in sources if task.name == "token"}
        with clock("head"):
            _start_from_data(model, settings, features["train"])
    with clock("start"):
        start = _start_on_examples(model, loaders.train_in_order, task)
        record_start(start)
    if probed:
        size, seed = settings.trainer.batch_size, settings.order_seed
        probe = (
            _feature_batches(features["train"], lengths.get("train"), size, seed),
            _feature_batches(features["val"], lengths.get("val"), size, None),
        )
    with clock("training"):
        outcome = _train(model, loaders.train, loaders.validation, task, settings, folder, probe)
    with clock("evaluation"):
        evaluations = {"val": {name: value for name, value in outcome.best.items() if name in HIGHER_IS_BETTER}}
        if loaders.test is not None:
            rank, processes = process_index(), process_count()
            evaluations["test"] = task.metrics(*predict(model, loaders.test, rank=rank, processes=processes))
    return start, outcome, evaluations


def features_of(model: nn.Module, sources: Mapping[str, Batches], settings: Settings) -> dict[str, FeatureSet]:
    """What the head receives from each of these splits."""
    cache, progress = feature_cache(settings), settings.trainer.progress
    with copies_kept():
        return {
            name: extract_features(model, batches, cache=cache, progress=progress, shared=True)
            for name, batches in sources.items()
        }


def _feature_batches(chosen: FeatureSet, lengths: Tensor | None, size: int, seed: int | None) -> TensorBatches:
    """Features as batches; with the number of labelled tokens of each sentence, by sentences."""
    if lengths is not None:
        return TokenBatches(chosen.features, chosen.labels, lengths, size, shuffle_seed=seed)
    return TensorBatches(chosen.features, chosen.labels, size, shuffle_seed=seed)


def feature_cache(settings: Settings) -> FeatureCache | None:
    """Where features are kept between runs, if anywhere."""
    return None if settings.trainer.cache is None else FeatureCache(settings.trainer.cache)


def _start_from_data(model: nn.Module, settings: Settings, features: FeatureSet) -> None:
    """Give a scheme that is computed from data its data; the others have started already."""
    name, options = init_of(settings)
    if schemes.needs_data(name, **options):
        attach.init_head(model, name, data=features, seed=settings.seed, **options)


def _train(
    trained: nn.Module,
    train: Any,
    validation: Any,
    task: Task,
    settings: Settings,
    folder: Path,
    probe: tuple[TensorBatches, TensorBatches] | None = None,
) -> TrainingOutcome:
    if settings.trainer.steps_per_epoch is not None:
        per_step = settings.trainer.accumulation * process_count()
        train = CycledBatches(train, settings.trainer.steps_per_epoch * per_step)
    recipe = recipe_of(settings, task.name, task.class_names)
    if not has_record(trained):  # a head on features: there is no backbone whose rate could be set
        recipe = recipe.of_head_alone()
    if settings.optim.lr == "find":
        recipe = dataclasses.replace(recipe, lr=_rate_to_take(trained, train, recipe, task, folder))
    options: dict[str, Any] = {
        "task": task.name,
        "evaluate_metrics": task.metrics,
        "folder": folder / "checkpoint",
        "save_every_steps": settings.trainer.save_every_steps,
        "on_evaluation": _metrics_writer(folder),
        "drift": DriftWatch() if settings.trainer.drift else None,
        "prefix_cache_gb": settings.trainer.prefix_cache_gb,
        "progress": settings.trainer.progress,
    }
    phases = phases_of(settings, recipe)
    if not phases:
        return finetune(trained, train, validation, recipe, **options)
    norm = batch_statistics(settings)
    return finetune_in_phases(trained, train, validation, recipe, phases, norm=norm, features=probe, **options)


def _rate_to_take(trained: nn.Module, train: Any, recipe: Recipe, task: Task, folder: Path) -> float:
    """The learning rate that a sweep suggests; written down before training, so that a resumed run takes the same."""
    found = by_first(lambda: _found_rate(folder))
    if found is None:
        sweep = find_learning_rate(trained, train, recipe, task=task.name)
        found = sweep.suggestion
        if process_index() == 0:
            save_figure(rate_sweep(sweep.rates, sweep.losses, found), folder / "lr_finder.png")
            write_json(folder / RATE_FILE, dataclasses.asdict(sweep))
    return by_first(lambda: found)


def _found_rate(folder: Path) -> float | None:
    path = folder / RATE_FILE
    return json.loads(path.read_text(encoding="utf-8"))["suggestion"] if path.is_file() else None


@contextmanager
def _clear_if_unwritable(folder: Path) -> Iterator[None]:
    """A full disk or a read-only folder as an error that says what is kept."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"Cannot write to {folder}: {error}. Make room or make the folder writable, and repeat the command: it "
            "goes on from the last checkpoint."
        ) from error


def _metrics_writer(folder: Path) -> Callable[[dict[str, Any]], None]:
    """Appends each evaluation to metrics.jsonl, once: a resumed run repeats those after its last checkpoint."""

    def write(row: dict[str, Any]) -> None:
        if row["epoch"] not in {line.get("epoch") for line in read_metrics(folder)}:
            with _clear_if_unwritable(folder):
                append_metrics(folder, row)
            record_evaluation(row)

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
    if process_count() > 1:
        config["trainer"]["processes"] = process_count()  # each step takes as many batches
    scheme, options = init_of(settings)
    if scheme != settings.init["name"]:  # what the head started by, not what was asked for
        config["init"] = {"name": scheme, **options}
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
        rates=outcome.rates,
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
        drift={key: outcome.best[key] for key in ("feature_drift", "feature_cka") if key in outcome.best} or None,
        data=splits.name,
        task=splits.task,
    )


def _announce(console: Console, settings: Settings, splits: DataSplits, backbone: Backbone) -> None:
    """What is about to run, and where the weights come from."""
    scheme, _ = init_of(settings)
    if scheme != settings.init["name"]:
        console.print(f"init=auto: head={settings.head['name']} has no closed form, so it starts by {scheme}.")
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
