"""A run with dropout, BatchNorm, a frozen part, accumulation and early stopping, for the tests that kill it.

Run as a script it is the process to kill: ``python -m tests.training.killable FOLDER POLICY``.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator

import torch
from torch import nn

from headinit.data.loading import Batch, TensorBatches
from headinit.features.extract import extract_features
from headinit.training.drift import DriftWatch
from headinit.training.finetune import TrainingOutcome, finetune
from headinit.training.freezing import freeze
from headinit.training.phases import SCHEDULED_POLICIES, finetune_in_phases, gradual_phases, lp_ft_phases
from headinit.training.recipe import Recipe

from .models import record_head

RECIPE = Recipe(epochs=4, lr=3e-2, accumulation=2, patience=3, seed=5, label_smoothing=0.1, layer_decay=0.7)


class SlowBatches(TensorBatches):
    """Batches that take a while, so that a kill arrives in the middle."""

    pause = 0.0

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for batch in super().epoch(epoch, start):
            time.sleep(self.pause)
            yield batch


def build(policy: str | int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(11)
        body = [nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.GELU(), nn.Dropout(0.3)) for _ in range(3)]
        model = record_head(nn.Sequential(*body, nn.Linear(6, 3)), "3")
    return freeze(model, "none" if policy in SCHEDULED_POLICIES else policy)


def data(count: int = 90, pause: float = 0.0) -> SlowBatches:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(count, 6, generator=generator)
    batches = SlowBatches(x, (x[:, :3] + 0.3 * x[:, 3:]).argmax(1), 8, shuffle_seed=3)
    batches.pause = pause
    return batches


def run(
    model: nn.Module,
    folder: str | None,
    *,
    policy: str | int = "",
    pause: float = 0.0,
    recipe: Recipe = RECIPE,
    **options: object,
) -> TrainingOutcome:
    train, validation = data(pause=pause), data(count=30)
    options |= {"folder": folder, "cpu": True, "drift": DriftWatch(16)}
    if policy == "lp_ft":
        features = on_features(model, train), on_features(model, validation)
        phases = lp_ft_phases(recipe, probe_epochs=3)
        return finetune_in_phases(model, train, validation, recipe, phases, features=features, **options)  # type: ignore[arg-type]
    if policy == "gradual":
        phases = gradual_phases(recipe, stages=2)
        return finetune_in_phases(model, train, validation, recipe, phases, **options)  # type: ignore[arg-type]
    return finetune(model, train, validation, recipe, **options)  # type: ignore[arg-type]


def on_features(model: nn.Module, batches: SlowBatches) -> SlowBatches:
    found = extract_features(model, (batches.features, batches.labels))
    result = SlowBatches(found.features, found.labels, 8, shuffle_seed=3)
    result.pause = batches.pause
    return result


def fingerprint(model: nn.Module, outcome: TrainingOutcome) -> str:
    """Every bit that must not depend on interruptions."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    told = [outcome.history, outcome.best_epoch, outcome.best, outcome.steps, outcome.stopped_early]
    digest.update(json.dumps(told).encode())
    return digest.hexdigest()


if __name__ == "__main__":
    torch.set_num_threads(1)
    chosen = int(sys.argv[2]) if sys.argv[2].isdigit() else sys.argv[2]
    network = build(chosen)
    run(build(chosen), None, recipe=Recipe(epochs=0))  # import everything, so that a kill hits the run
    print("ready", flush=True)
    told = lambda row: print("evaluated", row["epoch"], flush=True)  # noqa: E731
    result = run(network, sys.argv[1], policy=chosen, pause=0.01, save_every_steps=2, on_evaluation=told)
    print(fingerprint(network, result), flush=True)
