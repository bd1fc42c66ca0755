"""One training loop, for a whole network on pictures or text and for a bare head on features alike.

It is read from `finetune` down. What makes a killed run go on to the same bits: the order of the examples is a function
of the epoch, the learning rates are a function of the step, and the random numbers of dropout are seeded at every step,
so that weights, optimizer state and position are all there is to save.
"""

from __future__ import annotations

import hashlib
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headinit.analysis.metrics import HIGHER_IS_BETTER, metrics_for
from headinit.data.loading import batches_from
from headinit.errors import CheckpointError, TrainingError, unknown_name
from headinit.heads.record import has_record, unwrap
from headinit.processes import any_process, by_first, join_processes
from headinit.seeding import derived_seed, global_generators_kept
from headinit.training.averaging import WeightAverage
from headinit.training.checkpoint import (
    StopRequest,
    as_cpu_copy,
    read_checkpoint,
    run_lock,
    stop_on_sigterm,
    write_checkpoint,
)
from headinit.training.compiling import Compiled
from headinit.training.compiling import pays as compiling_pays
from headinit.training.depthwise import fast_depthwise_gradients
from headinit.training.drift import DriftWatch
from headinit.training.evaluation import predict
from headinit.training.freezing import frozen_digest, frozen_tensors
from headinit.training.health import Health
from headinit.training.losses import TASKS, count_targets, split_batch, summed_loss, training_outputs
from headinit.training.mixup import mix
from headinit.training.param_groups import param_groups
from headinit.training.precision import chosen_precision
from headinit.training.prefix import CachedInputs, cached_prefix, supplied
from headinit.training.recipe import Recipe
from headinit.training.sharding import check_sharding, copy_values, in_pieces, let_go, own_piece, put_together

if TYPE_CHECKING:
    from accelerate import Accelerator

SIGTERM_EXIT = 143  # what a shell reports for a process ended by SIGTERM


@dataclass(frozen=True)
class TrainingOutcome:
    """What came of a run; the model has the weights of the best epoch.

    Attributes:
        best_epoch: epoch with the best monitored metric, the earliest of equals; 0 is the start.
        best: its row of `history`.
        history: a row per evaluation: ``epoch``, ``step``, ``train_loss`` (mean since the last row, None at the start),
            ``lr`` (of the head, at the last step) and the validation metrics.
        steps: optimizer steps.
        seconds: spent training and evaluating, over all parts of a resumed run.
        samples_per_second: training examples per second of training, evaluation left out.
        stopped_early: whether patience ran out.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"``, as trained.
        rates: peak learning rate of ``"head"`` and ``"backbone"`` (or ``"backbone/<depth>"``), of what trains.
    """

    best_epoch: int
    best: dict[str, Any]
    history: list[dict[str, Any]]
    steps: int
    seconds: float
    samples_per_second: float
    stopped_early: bool
    precision: str
    rates: dict[str, float] = field(default_factory=dict)


@dataclass
class _Position:
    """Where a run is; together with the weights and the optimizer's state, all that a checkpoint holds."""

    epoch: int = 1
    steps_in_epoch: int = 0
    steps: int = 0
    loss_sum: float = 0.0
    targets: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int = 0
    evaluations_since_best: int = 0
    stopped_early: bool = False
    precision: str = "fp32"
    scaler: dict[str, Any] | None = None
    train_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    examples: int = 0
    health: dict[str, Any] = field(default_factory=dict)


def finetune(
    model: nn.Module,
    train: Any,
    validation: Iterable[Any],
    recipe: Recipe,
    *,
    task: str = "single_label",
    folder: str | Path | None = None,
    save_every_steps: int | None = None,
    on_evaluation: Callable[[dict[str, Any]], None] | None = None,
    evaluate_metrics: Callable[[Tensor, Tensor], dict[str, float]] | None = None,
    drift: DriftWatch | None = None,
    prefix_cache_gb: float | None = None,
    progress: bool = False,
    cpu: bool | None = None,
) -> TrainingOutcome:
    """Train what is trainable, keep the weights that were best on the validation data.

    Args:
        model: trained in place. With a record of a head, new parameters train at `recipe.lr` and the rest at
            `recipe.backbone_lr`; freeze first what is to stay.
        train: `Batches` or `TensorBatches` (`len`, and `.epoch(e)` that can be replayed), or a DataLoader.
        validation: iterated once per evaluation.
        recipe: how to train.
        task: ``"single_label"``, ``"multi_label"``, ``"regression"`` or ``"token"``; chooses loss and metrics.
        folder: where checkpoints go, after every epoch, every `save_every_steps` steps and on SIGTERM. A run that finds
            its own checkpoint there goes on from it, to the same bits as if it had never been interrupted.
        on_evaluation: called with every new row of the history, the start (epoch 0) included.
        evaluate_metrics: ``(logits, labels) -> scores``; None for those of the task.
        drift: measures at each evaluation how far the features have moved (``feature_drift`` and ``feature_cka`` in the
            rows), if pretrained parameters train; None measures nothing.
        prefix_cache_gb: where the first part of the network is frozen and the inputs are the same in every epoch, that
            part runs once and its activations are kept, if they take at most so much (see `training.prefix`); None
            runs it in every epoch.
        progress: show a bar on the terminal.
        cpu: True to stay on the CPU; None to take the best device.

    Raises:
        TrainingError: nothing is trainable, the loss is not finite or has diverged, the head gets no gradient (with the
            step and the likely cause), or the monitored metric is not among the metrics. Checkpoints of before stay
            usable.
        CheckpointError: the folder is another run's, in use, or cannot be written.
        SystemExit: with code 143, after saving, on SIGTERM (only where a folder is given).

    Example:
        >>> x = torch.tensor([[-1.0], [1.0]] * 8)
        >>> batches = [(x, (x[:, 0] > 0).long())]
        >>> outcome = finetune(nn.Linear(1, 2), batches, batches, Recipe(epochs=20, lr=0.1), cpu=True)
        >>> outcome.best["accuracy"], outcome.history[0]["epoch"]
        (1.0, 0)
    """
    if task not in TASKS:
        raise unknown_name("task", task, TASKS)
    metrics = evaluate_metrics or metrics_for(task)
    with ExitStack() as stack:
        run = _Run(model, train, validation, recipe, task, metrics, folder, cpu, stack, drift)
        bar = stack.enter_context(_progress_bar(run, progress))
        run.resume()
        stack.enter_context(run.prefix_cached(prefix_cache_gb))
        if not run.at.history:
            run.evaluate(0, on_evaluation)

        while run.at.epoch <= run.epochs and not run.at.stopped_early:
            epoch = run.at.epoch
            run.model.train()
            for batches in run.remaining_steps():
                # Seeded by the step: dropout draws the same numbers whatever was drawn before, also after a restart.
                with global_generators_kept(derived_seed(recipe.seed, f"training/{epoch}/{run.at.steps_in_epoch}")):
                    loss = run.step(batches)
                bar(loss)
                if save_every_steps and run.at.steps % save_every_steps == 0:
                    run.save()
                run.leave_if_asked()
            if epoch % recipe.evaluate_every == 0 or epoch == run.epochs:
                run.evaluate(epoch, on_evaluation)
            run.at.epoch, run.at.steps_in_epoch = epoch + 1, 0
            run.save()

        run.restore_best()
    return run.outcome()


class _Run:
    """The parts that the loop moves: model, optimizer, position, best weights."""

    def __init__(
        self,
        model: nn.Module,
        train: Any,
        validation: Iterable[Any],
        recipe: Recipe,
        task: str,
        metrics: Callable[[Tensor, Tensor], dict[str, float]],
        folder: str | Path | None,
        cpu: bool | None,
        stack: ExitStack,
        drift: DriftWatch | None,
    ) -> None:
        self.recipe, self.task, self.metrics, self.train, self.validation = recipe, task, metrics, train, validation
        self.given = unwrap(model)
        groups = _groups(self.given, recipe)
        precision = chosen_precision(recipe.precision, self.given, train, cpu=cpu)
        self.accelerator = _accelerator(precision, cpu)
        self.rank, self.processes = self.accelerator.process_index, self.accelerator.num_processes
        self.model = stack.enter_context(_prepared(self.accelerator, model, recipe.channels_last))
        self.call: Callable[..., Any] = self.model
        self.bare = unwrap(self.model)
        self.in_pieces = self.bare is not self.given
        if self.in_pieces:
            groups = _groups(self.bare, recipe)
        self.optimizer = _optimizer(recipe, groups)
        self.names = {id(parameter): name for name, parameter in self.bare.named_parameters()}
        self.trainable = [parameter for group in groups for parameter in group["params"]]
        new = {id(p) for group in groups if group["name"].startswith("head") for p in group["params"]}
        pretrained = [p for p in self.bare.parameters() if p.requires_grad and id(p) not in new]
        self.average = None
        if recipe.ema is not None:
            weights = {self.names[id(parameter)]: parameter for parameter in self.trainable}
            self.average = WeightAverage(weights, recipe.ema)
        self.health = Health(task, [p for p in self.trainable if id(p) in new], pretrained, self.names)
        self.drift = drift if pretrained else None
        self.batches_per_step = recipe.accumulation * self.processes
        self.steps_per_epoch = math.ceil(_length(train) / self.batches_per_step)
        self.total_steps = recipe.epochs * self.steps_per_epoch if recipe.steps is None else recipe.steps
        self.epochs = math.ceil(self.total_steps / self.steps_per_epoch)
        compiling = recipe.compile == "auto" and compiling_pays(self.bare, self.accelerator.device, self.total_steps)
        if (compiling or recipe.compile is True) and not self.in_pieces:
            self.call = Compiled(self.model)
        self.at = _Position(precision=precision)
        self.best: dict[str, Tensor] = {}
        self.folder = Path(folder) if folder is not None else None
        self.stop = StopRequest()
        self.leaving = False
        if (place := self.folder) is not None:
            by_first(lambda: stack.enter_context(run_lock(place)))
            self.stop = stack.enter_context(stop_on_sigterm())

    @contextmanager
    def prefix_cached(self, gigabytes: float | None) -> Iterator[None]:
        """Within the block the frozen first part of the network does not run again, where that is possible and pays."""
        found = None
        again = self.epochs > 1 and self.at.epoch <= self.epochs and not self.at.stopped_early
        if gigabytes and again and self.processes == 1 and not self.recipe.mixup:
            began = time.perf_counter()
            found = cached_prefix(
                self.bare,
                {"training": self.train, "validation": self.validation},
                gigabytes * 1e9,
                device=self.accelerator.device,
                folder=self.folder,
                channels_last=self.recipe.channels_last,
                between=self.leave_if_asked if self.at.history else None,
            )
            self.at.train_seconds += time.perf_counter() - began
        if found is None:
            yield
            return
        prefix, cached = found
        self.train, self.validation = cached["training"], cached["validation"]
        with prefix.installed():
            yield

    def remaining_steps(self) -> Iterator[list[Any]]:
        """The batches of each optimizer step of this epoch that is still to be done."""
        start = self.at.steps_in_epoch * self.batches_per_step
        batches = _epoch_batches(self.train, self.at.epoch - 1, start, self.recipe.seed, (self.rank, self.processes))
        while self.at.steps < self.total_steps and (group := list(islice(batches, self.batches_per_step))):
            yield group

    def step(self, batches: list[Any]) -> float:
        """One optimizer step on the mean loss over all targets of the batches; returns that loss."""
        began = time.perf_counter()
        examples = [split_batch(batch) for batch in batches]
        targets = max(1, sum(count_targets(labels, self.task) for _, labels in examples))
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self._factor(self.at.steps)
        loss_sum = torch.zeros((), device=self.accelerator.device)
        mine = range(self.rank, len(examples) + -len(examples) % self.processes, self.processes)
        for index in mine:
            # With several processes a last, missing batch is stood in for by a known one that counts nothing.
            inputs, labels = examples[index] if index < len(examples) else examples[0]
            weight = float(index < len(examples))
            synchronise = index + self.processes >= len(examples)
            with nullcontext() if synchronise else self._unsynchronised():
                loss = weight * self._loss(inputs, labels, index)
                self.accelerator.backward(loss * (self.processes / targets))
            loss_sum += loss.detach()
        mean = self._summed_over_processes(loss_sum) / targets
        self._check_finite(mean, "loss", examples)
        self.health.check_loss(mean, self.at.steps + 1, lambda: self._predict(examples))
        if self.accelerator.scaler is None:  # a small gradient is zero in float16 until its scale has been found
            self.health.check_gradients(mean, self.at.steps + 1)
        self._apply(examples)
        if self.average is not None:
            self.average.update(self.at.steps + 1)
        self.at.loss_sum += mean * targets
        self.at.targets += targets
        self.at.steps += 1
        self.at.steps_in_epoch += 1
        self.at.examples += sum(len(labels) for _, labels in examples)
        self.at.train_seconds += time.perf_counter() - began
        return mean

    def evaluate(self, epoch: int, on_evaluation: Callable[[dict[str, Any]], None] | None) -> None:
        """Score the validation data, keep the weights if they are the best so far; averaged ones, if they are kept."""
        with self.average.in_place() if self.average is not None else nullcontext():
            self._evaluate(epoch, on_evaluation)

    def _evaluate(self, epoch: int, on_evaluation: Callable[[dict[str, Any]], None] | None) -> None:
        began = time.perf_counter()
        self._share_buffers()
        with self._drift_watched():
            logits, labels = self._predict(self.validation, between=self.leave_if_any_asked if epoch else None)
        if self.in_pieces:
            let_go(self.bare)
        scores = self.metrics(logits, labels)
        at, monitor = self.at, self.recipe.monitor
        if monitor not in scores:
            raise TrainingError(f"The metric {monitor!r} that chooses the best epoch is none of {', '.join(scores)}.")
        row = {
            "epoch": epoch,
            "step": at.steps,
            "train_loss": at.loss_sum / at.targets if at.targets else None,
            "lr": self.recipe.lr * self._factor(at.steps - 1) if at.steps else 0.0,
            **scores,
            **(self.drift.scores() if self.drift is not None else {}),
        }
        best = next((earlier[monitor] for earlier in at.history if earlier["epoch"] == at.best_epoch), None)
        if best is None or self.recipe.select == "last":
            better = True
        else:
            better = row[monitor] > best if HIGHER_IS_BETTER[monitor] else row[monitor] < best
        if better:
            at.best_epoch, at.evaluations_since_best = epoch, 0
            self.best = {name: as_cpu_copy(put_together(tensor)) for name, tensor in moving_tensors(self.bare).items()}
        else:
            at.evaluations_since_best += 1
        at.history.append(row)
        at.loss_sum, at.targets = 0.0, 0
        at.stopped_early = self.recipe.patience is not None and at.evaluations_since_best >= self.recipe.patience
        at.evaluate_seconds += time.perf_counter() - began
        if on_evaluation is not None and self.rank == 0:
            on_evaluation(row)

    def save(self) -> None:
        """Write a checkpoint, if there is a folder for one."""
        if (folder := self.folder) is None:
            return
        scaler = self.accelerator.scaler
        self.at.scaler = scaler.state_dict() if scaler is not None else None
        self.at.health = self.health.state()
        tensors = self._tensors()
        # The others wait, and learn of a full disk.
        by_first(lambda: write_checkpoint(folder, tensors, asdict(self.at), self.identity))

    def _tensors(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint; of those that lie in pieces only the first process keeps the whole."""
        own = {} if self.average is None else self.average.own
        tensors = {f"model/{name}": tensor for name, tensor in (moving_tensors(self.bare) | own).items()}
        tensors |= {f"best/{name}": tensor for name, tensor in self.best.items()}
        if self.average is not None:
            tensors |= {f"average/{name}": tensor for name, tensor in self.average.values.items()}
        for parameter, state in self.optimizer.state.items():
            known = {key: value for key, value in state.items() if isinstance(value, Tensor)}
            tensors |= {f"optimizer/{key}/{self.names[id(parameter)]}": value for key, value in known.items()}
        if self.drift is not None and self.drift.reference is not None:
            tensors["drift/reference"] = self.drift.reference
        if not self.in_pieces:
            return tensors
        whole = ((name, put_together(tensor)) for name, tensor in tensors.items())
        return {name: tensor.cpu() for name, tensor in whole if self.rank == 0}

    def resume(self) -> None:
        """Go on from the checkpoint in the folder, if there is one."""
        if self.folder is None:
            return
        self.identity = self._identity()
        found = self._found_checkpoint(self.folder)
        if found is None:
            return
        tensors, state = found
        self.at = _Position(**state)
        if self.at.scaler is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(self.at.scaler)
        self.health.restore(self.at.health)
        if self.drift is not None:
            self.drift.reference = tensors.pop("drift/reference", None)
            self.drift = self.drift if self.drift.reference is not None else None  # not measured from the beginning
        parameters = dict(self.bare.named_parameters())
        for name, tensor in tensors.items():
            part, _, rest = name.partition("/")
            if part == "best":
                self.best[rest] = tensor.clone()
            elif part == "average" and self.average is not None:
                copy_values(self.average.values[rest], tensor)
            elif part == "optimizer":
                key, _, parameter_name = rest.partition("/")
                parameter = parameters[parameter_name]
                self.optimizer.state[parameter][key] = _laid_out_like(parameter, tensor)
        _copy_into(
            moving_tensors(self.bare), {n.partition("/")[2]: t for n, t in tensors.items() if n.startswith("model/")}
        )

    def _found_checkpoint(self, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The checkpoint that the first process finds; it also clears away what is damaged."""
        if self.processes == 1 or not by_first(lambda: read_checkpoint(folder, self.identity) is not None):
            return read_checkpoint(folder, self.identity) if self.processes == 1 else None
        found = read_checkpoint(folder, self.identity)
        if found is None:
            raise CheckpointError(f"Process {self.rank} does not see {folder}: put it where all processes can read.")
        return found

    def leave_if_asked(self) -> None:
        """On SIGTERM: save, then end the process."""
        if self.leaving if self.processes > 1 else self.stop.asked:
            self.save()
            self.stop.hand_on()
            raise SystemExit(SIGTERM_EXIT)

    def leave_if_any_asked(self) -> None:
        """The same between two batches of an evaluation, where the processes have to ask each other."""
        self.leaving = any_process(self.stop.asked)
        self.leave_if_asked()

    def _summed_over_processes(self, value: Tensor) -> float:
        """The sum over the processes, which also tell each other here whether one was asked to end."""
        if self.processes == 1:
            return value.item()
        told = self.accelerator.reduce(torch.stack([value.double(), value.new_tensor(self.stop.asked).double()]))
        self.leaving = bool(told[1] > 0)
        return float(told[0])

    def restore_best(self) -> None:
        """Put the best weights into the model, and leave it ready for prediction."""
        _copy_into(moving_tensors(self.given), self.best)
        self.optimizer.zero_grad(set_to_none=True)
        self.given.eval()

    def outcome(self) -> TrainingOutcome:
        """The summary of the run so far."""
        at, groups = self.at, self.optimizer.param_groups
        return TrainingOutcome(
            best_epoch=at.best_epoch,
            best=next(row for row in at.history if row["epoch"] == at.best_epoch),
            history=at.history,
            steps=at.steps,
            seconds=at.train_seconds + at.evaluate_seconds,
            samples_per_second=at.examples / at.train_seconds if at.train_seconds else 0.0,
            stopped_early=at.stopped_early,
            precision=at.precision,
            rates={group["name"].removesuffix("/no_decay"): group["initial_lr"] for group in groups},
        )

    def _predict(self, batches: Iterable[Any], between: Callable[[], None] | None = None) -> tuple[Tensor, Tensor]:
        device, rank, processes = self.accelerator.device, self.rank, self.processes
        return predict(
            self.bare, batches, device=device, rank=rank, processes=processes, together=self.in_pieces, between=between
        )

    def _unsynchronised(self) -> AbstractContextManager[None]:
        """Within the block gradients stay with their process, to be summed with the next."""
        if isinstance(self.model, nn.parallel.DistributedDataParallel):
            return self.model.no_sync()
        return self.accelerator.no_sync(self.model)

    def _drift_watched(self) -> AbstractContextManager[None]:
        if self.drift is None:
            return nullcontext()
        batches = len(self.validation) if isinstance(self.validation, Sized) else 1
        return self.drift.watching(self.bare, math.ceil(batches / self.processes))

    def _factor(self, step: int) -> float:
        return self.recipe.rate_factor(step, self.total_steps, self.steps_per_epoch)

    def _loss(self, inputs: Any, labels: Tensor, index: int) -> Tensor:
        """Loss summed over the targets of one batch; a distilled model has two outputs and pays for both alike."""
        labels = labels.to(self.accelerator.device)
        parts: tuple[tuple[float, Tensor], ...] = ((1.0, labels),)
        with supplied(inputs) as given:
            given = _to_device(given, self.accelerator.device, self.recipe.channels_last and given is inputs)
            if self.recipe.mixup:
                given, parts = mix(given, labels, self.recipe.mixup, self.recipe.seed, f"{self.at.steps}/{index}")
            output = self.call(**given) if isinstance(given, Mapping) else self.call(given)
        outputs = training_outputs(output)
        smoothing = self.recipe.label_smoothing
        losses = [
            torch.stack([share * summed_loss(logits, wanted, self.task, smoothing) for share, wanted in parts]).sum()
            for logits in outputs
        ]
        return torch.stack(losses).mean() if len(losses) > 1 else losses[0]

    def _apply(self, examples: list[tuple[Any, Tensor]]) -> None:
        """Clip and step; float16 leaves out a step whose gradient overflowed and lowers its scale."""
        scaler = self.accelerator.scaler
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        if self.recipe.clip_norm is not None:
            norm = put_together(nn.utils.clip_grad_norm_(self.trainable, self.recipe.clip_norm))
            if scaler is None:
                self._check_finite(norm.item(), "gradient norm", examples)
        if scaler is not None:
            scaler.step(self.optimizer)
            scaler.update()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _check_finite(self, value: float, what: str, examples: list[tuple[Any, Tensor]]) -> None:
        if math.isfinite(value):
            return
        at = self.at
        raise TrainingError(
            f"The {what} is {value} at step {at.steps + 1} (epoch {at.epoch}, step {at.steps_in_epoch + 1} of "
            f"{self.steps_per_epoch}). Likely cause: {self._likely_cause(examples)} Nothing of this step was saved."
        )

    def _likely_cause(self, examples: list[tuple[Any, Tensor]]) -> str:
        for inputs, labels in examples:
            inputs = inputs.inputs if isinstance(inputs, CachedInputs) else inputs
            tensors = inputs.values() if isinstance(inputs, Mapping) else [inputs]
            if any(t.is_floating_point() and not bool(torch.isfinite(t).all()) for t in tensors):
                return "the inputs of this batch contain NaN or infinity; look at the data and its preprocessing."
            if labels.is_floating_point() and not bool(torch.isfinite(labels).all()):
                return "the labels of this batch contain NaN or infinity; look at the label column."
        parameters = self.bare.named_parameters()
        damaged = next((n for n, p in parameters if not bool(torch.isfinite(own_piece(p)).all())), None)
        if damaged is not None and self.at.steps == 0:
            return f"the parameter {damaged} was not finite before training; load or initialise it again."
        if self.at.precision == "fp16":
            return "float16 overflowed; use precision=bf16 or fp32, or a lower learning rate."
        rate = max(group["initial_lr"] for group in self.optimizer.param_groups)
        return f"a learning rate that is too high (peak {rate:g}); try a tenth of it, a longer warm-up, or clipping."

    def _share_buffers(self) -> None:
        """Running statistics differ by process; the first one's are those that are kept."""
        if self.processes > 1:
            for buffer in self.bare.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to be of this run."""
        shapes = {name: [*tensor.shape, str(tensor.dtype)] for name, tensor in moving_tensors(self.given).items()}
        return {
            **asdict(self.recipe),
            "task": self.task,
            "model": type(self.given).__name__,
            "trainable tensors": shapes,
            "frozen part": frozen_digest(self.given),
            "training data": _data_identity(self.train),
            "validation data": _data_identity(self.validation),
            "precision in use": self.at.precision,
            "processes": self.processes,
        }


def _groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    share = recipe.backbone_share
    return param_groups(
        model,
        lr=recipe.lr,
        backbone_lr=recipe.backbone_lr if share is None else share * recipe.lr,
        layer_decay=recipe.layer_decay,
        weight_decay=recipe.weight_decay,
        optimizer=recipe.optimizer,
    )


def moving_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: trainable parameters, and buffers outside the frozen part."""
    fixed = {name for name, _ in frozen_tensors(model)}
    named = {name: parameter.data for name, parameter in model.named_parameters()}
    named |= dict(model.named_buffers())
    return {name: tensor for name, tensor in named.items() if name not in fixed}


def _accelerator(precision: str, cpu: bool | None) -> Accelerator:
    """Device, processes and precision; accelerate remembers a process's first precision, but another run may differ."""
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    join_processes()
    mixed = {"fp32": "no"}.get(precision, precision)
    shared = AcceleratorState._shared_state
    if shared and shared.get("_mixed_precision") != mixed:
        AcceleratorState._reset_state()
    # A model may have parameters that its loss does not reach, such as an unused pooler.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(mixed_precision=mixed, cpu=bool(cpu), kwargs_handlers=[unused])
    check_sharding(accelerator)
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise TrainingError("precision=fp16 needs a GPU, and this run is on the CPU. Use precision=fp32 or bf16.")
    return accelerator


@contextmanager
def _prepared(accelerator: Accelerator, model: nn.Module, channels_last: bool) -> Iterator[nn.Module]:
    """The model on its device, in its memory layout, wrapped for precision and processes; all but the device undone.

    Under FSDP it is a copy in pieces; of a bare head, which is not worth cutting, each process has the whole.
    """
    bare = unwrap(model)
    if accelerator.is_fsdp2:
        if has_record(bare):
            yield in_pieces(accelerator, bare)
        else:
            yield nn.parallel.DistributedDataParallel(bare.to(accelerator.device))
        bare.to(accelerator.device)
        return
    own_forward = vars(bare).get("forward")
    if channels_last:
        bare.to(memory_format=torch.channels_last)
    reduced = accelerator.mixed_precision == "bf16" and accelerator.device.type == "cpu"
    try:
        with warnings.catch_warnings(), fast_depthwise_gradients(bare) if reduced else nullcontext():
            warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")
            yield accelerator.prepare_model(model)
    finally:
        for mark in ("_original_forward", "_is_accelerate_prepared"):
            vars(bare).pop(mark, None)
        vars(bare).pop("forward", None)  # accelerate's autocast
        if own_forward is not None:
            bare.forward = own_forward
        if channels_last:
            bare.to(memory_format=torch.contiguous_format)


def _optimizer(recipe: Recipe, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer over all groups at once (torch's schedulers break on groups added later)."""
    for group in groups:
        group["initial_lr"] = group["lr"]
    dense = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for g in groups for p in g["params"])
    if recipe.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, fused=dense)
        return optimizer if recipe.bias_correction else _without_bias_correction(optimizer)
    # torch's fused SGD rounds otherwise than its plain one, and training at small batches makes much of the difference.
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.nesterov)


def _without_bias_correction(optimizer: torch.optim.AdamW) -> torch.optim.AdamW:
    """Begin Adam's step count where its bias correction 1 - beta^step has become 1."""
    far = float(2**24)  # float32 adds no more 1 to it
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        optimizer.state[parameter] = {
            "step": torch.tensor(far, dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
    return optimizer


def _length(train: Any) -> int:
    try:
        batches = len(train)
    except TypeError:
        raise TrainingError(
            f"The training data ({type(train).__name__}) has no length, so its epochs have no end. Give Batches, "
            "TensorBatches, a DataLoader or a list of batches."
        ) from None
    if batches == 0:
        raise TrainingError("The training data has no batch. Give at least one training example.")
    return batches


def _epoch_batches(train: Any, epoch: int, start: int, seed: int, share: tuple[int, int]) -> Iterator[Any]:
    """The batches of an epoch from number `start` on; see `Batches.epoch` for those of other processes."""
    if not hasattr(train, "epoch"):
        # A DataLoader draws its order from the global generator when it begins.
        with global_generators_kept(derived_seed(seed, f"order/{epoch}")):
            batches = iter(train)
            first = list(islice(batches, 1))
        yield from first[start:]
        yield from islice(batches, max(0, start - 1), None)
    else:
        yield from batches_from(train, epoch, start, share)


def _to_device(inputs: Any, device: torch.device, channels_last: bool) -> Any:
    from accelerate.utils import send_to_device

    inputs = send_to_device(inputs, device)
    if channels_last and isinstance(inputs, Tensor) and inputs.ndim == 4:
        return inputs.contiguous(memory_format=torch.channels_last)
    return inputs


def _laid_out_like(parameter: Tensor, values: Tensor) -> Tensor:
    """Optimizer state in the memory layout of its parameter: fused kernels walk through both side by side."""
    if values.shape != parameter.shape:
        return values.clone()
    return copy_values(torch.empty_like(parameter, dtype=values.dtype, requires_grad=False), values)


def _copy_into(targets: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        copy_values(targets[name], value)


def _data_identity(data: Any) -> dict[str, Any]:
    """What tells one set of batches from another: content, order, sizes; as far as the object says.

    Features in memory are known by their labels and shape: computed again on resuming, they may differ in a last bit.
    """
    said = ("batch_size", "shuffle_seed", "augmentation", "bucket", "drop_last", "fingerprint")
    told = {name: getattr(data, name, None) for name in said}
    told["fingerprint"] = told["fingerprint"] or getattr(getattr(data, "split", None), "fingerprint", None)
    told["batches"] = len(data) if hasattr(data, "__len__") else None
    told = {name: value for name, value in told.items() if isinstance(value, int | float | str)}
    for name in ("features", "labels"):
        if isinstance(tensor := getattr(data, name, None), Tensor):
            told[f"shape of {name}"] = list(tensor.shape)
    if isinstance(labels := getattr(data, "labels", None), Tensor):
        told["labels"] = hashlib.sha256(labels.cpu().contiguous().numpy().tobytes()).hexdigest()
    return told


@contextmanager
def _progress_bar(run: _Run, shown: bool) -> Iterator[Callable[[float], None]]:
    """A function that advances the bar by one step and shows the loss."""
    if not shown or run.rank != 0:
        yield lambda loss: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("training", total=run.total_steps)

        def advance(loss: float) -> None:
            best = next((row for row in run.at.history if row["epoch"] == run.at.best_epoch), {})
            score = f", best {run.recipe.monitor} {best.get(run.recipe.monitor, math.nan):.4f}"
            text = f"epoch {run.at.epoch}/{run.epochs}, loss {loss:.4f}{score}"
            bar.update(task, completed=run.at.steps, description=text)

        yield advance
