"""Schedules of freezing: a run in phases, each of which freezes its own part of the network.

Every phase is one call of `finetune`: its optimizer is built with all groups that it needs (torch's schedulers and
DistributedDataParallel break on parameters that are added later), a parameter gets optimizer state when it begins to
train and not before, and each phase has a schedule of its own, with its own warm-up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from headinit.data.loading import batches_from
from headinit.errors import ConfigError
from headinit.heads.record import record_of
from headinit.seeding import derived_seed
from headinit.threads import one_thread_if_small
from headinit.training.drift import DriftWatch
from headinit.training.finetune import TrainingOutcome, finetune
from headinit.training.freezing import freeze
from headinit.training.param_groups import backbone_share
from headinit.training.recipe import Recipe

SCHEDULED_POLICIES = ("lp_ft", "gradual")
"""Freeze policies that change during a run."""

PROBE_FACTOR = 10.0
"""The probe's learning rate as a multiple of the one at which its head goes on when everything trains."""

LP_FT_BACKBONE_SHARE = 0.05
"""Backbone learning rate of the second phase of `lp_ft` as a share of the head's, where none is given and no lower one
suits a finished head: half of what a network in front of a fresh head gets, for a trained head has no large gradients
to send into it."""


@dataclass(frozen=True)
class Phase:
    """A part of a run.

    Attributes:
        name: in the rows of the history.
        policy: what `freeze` takes.
        epochs: passes over the training data.
        lr: peak learning rate of the head; None for that of the recipe.
        probed: whether the head is finished by then; where no rate of the backbone is given, it takes one that suits.

    Example:
        >>> Phase("top", 1, epochs=2).policy
        1
    """

    name: str
    policy: str | int | Sequence[str]
    epochs: int
    lr: float | None = None
    probed: bool = False


def lp_ft_phases(recipe: Recipe, *, probe_epochs: int = 30, probe_lr: float | None = None) -> tuple[Phase, ...]:
    """Linear probing, then fine-tuning (Kumar et al., 2022): the head alone first, then everything.

    Args:
        recipe: of the second phase. Where it gives no rate of the backbone, that is a twentieth of `lr`, or less where
            `param_groups.backbone_share` says so.
        probe_epochs: of the first phase; 0 leaves it out, for a head that starts finished.
        probe_lr: of the first phase; None for ten times `recipe.lr`.

    Raises:
        ConfigError: a number out of range.

    Example:
        >>> [(phase.name, phase.epochs, phase.lr) for phase in lp_ft_phases(Recipe(epochs=3, lr=1e-3))]
        [('probe', 30, 0.01), ('everything', 3, 0.001)]
    """
    _check_whole("probe_epochs", probe_epochs, 0)
    probe_lr = PROBE_FACTOR * recipe.lr if probe_lr is None else probe_lr
    return (
        Phase("probe", "all", probe_epochs, probe_lr),
        Phase("everything", "none", recipe.epochs, recipe.lr, probed=True),
    )


def gradual_phases(recipe: Recipe, *, stages: int = 3, stage_epochs: int = 1) -> tuple[Phase, ...]:
    """Gradual unfreezing (Howard and Ruder, 2018): the head, the last stage too, the one before, ..., everything.

    Args:
        recipe: its `epochs` are those of the whole run; what the first phases leave of them trains everything.
        stages: how many stages begin to train one by one.
        stage_epochs: epochs of the head alone, and of each of these stages.

    Raises:
        ConfigError: a number out of range, or more epochs in these phases than the run has.

    Example:
        >>> [(phase.name, phase.policy, phase.epochs) for phase in gradual_phases(Recipe(epochs=9), stages=2)]
        [('head', 'all', 1), ('last 1', 1, 1), ('last 2', 2, 1), ('everything', 'none', 6)]
    """
    _check_whole("stages", stages, 1)
    _check_whole("stage_epochs", stage_epochs, 1)
    if not recipe.epochs:  # only the start is evaluated
        return (Phase("everything", "none", 0),)
    rest = recipe.epochs - (stages + 1) * stage_epochs
    if rest < 1:
        raise ConfigError(
            f"Gradual unfreezing spends {stage_epochs} of the epochs on the head and on each of {stages} stages, which "
            f"leaves {rest} of {recipe.epochs} for the whole network. Give at least {recipe.epochs + 1 - rest} epochs, "
            "or fewer stages."
        )
    first = [Phase("head", "all", stage_epochs)]
    return (
        *first,
        *(Phase(f"last {k}", k, stage_epochs) for k in range(1, stages + 1)),
        Phase("everything", "none", rest),
    )


def finetune_in_phases(
    model: nn.Module,
    train: Any,
    validation: Iterable[Any],
    recipe: Recipe,
    phases: Sequence[Phase],
    *,
    norm: str | None = None,
    features: tuple[Any, Iterable[Any]] | None = None,
    folder: str | Path | None = None,
    on_evaluation: Callable[[dict[str, Any]], None] | None = None,
    drift: DriftWatch | None = None,
    **options: Any,
) -> TrainingOutcome:
    """Fine-tune in phases, each from the best weights of those before; the best of all are kept.

    A run that was killed goes on in the phase where it was: every phase has its own checkpoints, and those that have
    finished are read back instead of repeated.

    Args:
        model: with a head attached; frozen as the last phase says when the call returns.
        train, validation, recipe: as for `finetune`; the phases replace the recipe's epochs and rates.
        phases: such as `lp_ft_phases` and `gradual_phases` give. Those without epochs are left out.
        norm: for `freeze`, in every phase.
        features: training and validation batches of what the head receives from the pretrained network. Where they are
            given, the first phase trains its head on them if everything else is frozen in it: the network has run once
            then, for all epochs.
        folder: where checkpoints go: a sub-folder for each phase.
        on_evaluation: called with every new row of the history.
        drift: as for `finetune`; the features are compared with those before the first phase.
        options: other arguments of `finetune`.

    Returns:
        As `finetune` gives it for one run: epochs and steps are counted through, each row also has its ``phase``.
        `samples_per_second` and `precision` are those of the last phase.

    Raises:
        ConfigError: there is no phase, or the recipe counts steps, where phases count epochs.
        HeadError: a phase's policy does not fit the model; nothing has been trained then.

    Example:
        >>> import torch
        >>> from headinit.attach import attach_head
        >>> model = attach_head(nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)), 2, pretrained=True)
        >>> x = torch.tensor([[-1.0, 0.0], [1.0, 0.0]] * 8)
        >>> batches, recipe = [(x, (x[:, 0] > 0).long())], Recipe(epochs=1)
        >>> phases = lp_ft_phases(recipe, probe_epochs=2)
        >>> outcome = finetune_in_phases(model, batches, batches, recipe, phases, cpu=True)
        >>> [(row["epoch"], row["phase"]) for row in outcome.history]
        [(0, 'probe'), (1, 'probe'), (2, 'probe'), (3, 'everything')]
    """
    if not phases:
        raise ConfigError("There is no phase to train in: give at least one.")
    if recipe.steps is not None:
        raise ConfigError(f"steps={recipe.steps} does not say how long each phase is: give epochs, and steps=null.")
    chosen = [phase for phase in phases if phase.epochs] or [phases[-1]]
    for phase in chosen:  # what does not fit is said before anything is trained
        freeze(model, phase.policy, norm=norm)
    parts: list[tuple[Phase, TrainingOutcome]] = []
    for index, phase in enumerate(chosen):
        freeze(model, phase.policy, norm=norm)
        own = _recipe_of(recipe, phase, index, model)
        told = None if on_evaluation is None else _renumbered(on_evaluation, phase, parts)
        place = None if folder is None else Path(folder) / f"phase-{index + 1}"
        if features is not None and index == 0 and phase.policy == "all":
            head = model.get_submodule(record_of(model).sites[0].path)
            own = replace(own.of_head_alone(), mixup=0.0)  # nothing is augmented
            with one_thread_if_small(getattr(features[0], "batch_size", 1) * sum(p.numel() for p in head.parameters())):
                outcome = finetune(head, *features, own, folder=place, on_evaluation=told, **options)
        else:
            batches = _Later(train, _epochs_of(parts)) if parts and hasattr(train, "epoch") else train
            outcome = finetune(
                model, batches, validation, own, folder=place, on_evaluation=told, drift=drift, **options
            )
        parts.append((phase, outcome))
    return _joined(parts)


class _Later:
    """Batches whose first epoch is a later one, so that a phase goes on in the order of the run."""

    def __init__(self, batches: Any, epochs: int) -> None:
        self._batches, self._epochs = batches, epochs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.epoch(0))

    def epoch(self, epoch: int, start: int = 0, share: tuple[int, int] = (0, 1)) -> Iterator[Any]:
        """The batches of one epoch, from batch `start` on; `share` as for `Batches`."""
        return batches_from(self._batches, epoch + self._epochs, start, share)


def _recipe_of(recipe: Recipe, phase: Phase, index: int, model: nn.Module) -> Recipe:
    """The recipe of a phase; dropout (and the order of a DataLoader) does not repeat that of the phase before."""
    share = recipe.backbone_share
    if phase.probed and recipe.backbone_lr is None and share is None:
        share = min(LP_FT_BACKBONE_SHARE, backbone_share(model, recipe.optimizer, probed=True))
    return replace(
        recipe,
        epochs=phase.epochs,
        lr=recipe.lr if phase.lr is None else phase.lr,
        backbone_share=share,
        seed=derived_seed(recipe.seed, f"phase/{index}") if index else recipe.seed,
    )


Parts = list[tuple[Phase, TrainingOutcome]]


def _epochs_of(parts: Parts) -> int:
    return sum(outcome.history[-1]["epoch"] for _, outcome in parts)


def _renumbered(tell: Callable[[dict[str, Any]], None], phase: Phase, parts: Parts) -> Callable[[dict[str, Any]], None]:
    """Tell the rows of a phase as rows of the run; the start of a later phase is the best of those before."""
    before = list(parts)

    def told(row: dict[str, Any]) -> None:
        if row["epoch"] or not before:
            tell(_as_row_of_run(row, phase, before))

    return told


def _as_row_of_run(row: dict[str, Any], phase: Phase, before: Parts) -> dict[str, Any]:
    steps = sum(outcome.steps for _, outcome in before)
    return {**row, "epoch": row["epoch"] + _epochs_of(before), "step": row["step"] + steps, "phase": phase.name}


def _joined(parts: Parts) -> TrainingOutcome:
    history: list[dict[str, Any]] = []
    best: dict[str, Any] = {}
    for index, (phase, outcome) in enumerate(parts):
        for row in outcome.history:
            if row["epoch"] or not index:
                history.append(_as_row_of_run(row, phase, parts[:index]))
                best = history[-1] if row["epoch"] == outcome.best_epoch else best
    last = parts[-1][1]
    return replace(
        last,
        best_epoch=best["epoch"],
        best=best,
        history=history,
        steps=sum(outcome.steps for _, outcome in parts),
        seconds=sum(outcome.seconds for _, outcome in parts),
    )


def _check_whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}={value!r} is out of range. Give a whole number from {least} on.")
