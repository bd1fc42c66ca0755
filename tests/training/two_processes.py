"""Trains on as many processes as it is started with; the first one prints what came out.

``python -m torch.distributed.run --nproc-per-node 2 -m tests.training.two_processes BATCH_SIZE [PHASES]``
"""

from __future__ import annotations

import json
import os
import signal
import sys

import torch
from torch import nn

from headinit.analysis.metrics import metrics_for
from headinit.data.loading import TensorBatches
from headinit.processes import leave_processes
from headinit.training.finetune import finetune
from headinit.training.freezing import freeze, frozen_digest
from headinit.training.phases import finetune_in_phases, gradual_phases, lp_ft_phases
from headinit.training.recipe import Recipe

from .models import record_head


def train(batch_size: int, phases: str = "") -> tuple[nn.Module, dict]:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5))
    model = freeze(record_head(nn.Sequential(body, nn.Sequential(nn.Linear(5, 5), nn.GELU()), nn.Linear(5, 3)), "2"), 1)
    x = torch.randn(70, 5)  # 70 = 4 * 16 + 6: the second process lacks a last batch
    batches = TensorBatches(x, x[:, :3].argmax(1), batch_size, shuffle_seed=1)
    validation = TensorBatches(x[:33], x[:33, :3].argmax(1), 4)
    digest = frozen_digest(model)
    stop_after = os.environ.get("HEADINIT_TEST_STOP")  # an evaluation at which the second process is asked to end

    def metrics(outputs: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        told.append(1)
        if stop_after and len(told) == 1 + int(stop_after) and torch.distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return scores(outputs, labels)

    told: list[int] = []
    scores = metrics_for("single_label")
    folder = os.environ.get("HEADINIT_TEST_FOLDER")
    recipe = Recipe(epochs=3, lr=0.01, accumulation=2, monitor="nll")
    options = {"cpu": True, "folder": folder, "evaluate_metrics": metrics}
    if phases:
        schedule = {"lp_ft": lp_ft_phases(recipe, probe_epochs=2), "gradual": gradual_phases(recipe, stages=1)}
        outcome = finetune_in_phases(model, batches, validation, recipe, schedule[phases], norm="eval", **options)
    else:
        outcome = finetune(model, batches, validation, recipe, **options)
        assert frozen_digest(model) == digest
    return model, {"history": outcome.history, "steps": outcome.steps}


if __name__ == "__main__":
    torch.set_num_threads(1)
    network, told = train(int(sys.argv[1]), *sys.argv[2:])
    weights = {name: value.tolist() for name, value in network.state_dict().items()}
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        print("RESULT" + json.dumps({"weights": weights, **told}), flush=True)
    leave_processes()
    os._exit(0)  # at the end of about one interpreter in 50, a thread of gloo's aborts it
