"""What each of two processes does: attach, freeze, wrap or cut, train, leave its weights."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy


def work(rank: int, folder: str) -> None:
    from headinit.attach import attach_head
    from headinit.training.freezing import freeze, frozen_digest
    from headinit.training.param_groups import param_groups

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(0)
    body = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5)]
    torch.manual_seed(100 + rank)  # from here on each process draws numbers of its own
    model = attach_head(nn.Sequential(*body, nn.Linear(8, 5)), 3, seed=1)
    freeze(model, "all")
    told: dict[str, Any] = {"start": {name: value.clone() for name, value in model.state_dict().items()}}
    digest = frozen_digest(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(param_groups(wrapped, lr=0.1))
    for _ in range(3):
        wrapped.train()
        loss = cross_entropy(wrapped(torch.randn(4, 6)), torch.randint(3, (4,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert frozen_digest(wrapped) == digest
    told |= {"end": dict(model.state_dict()), "digest": digest}
    torch.save(told, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def load_bert() -> nn.Module:
    from tests.heads.models import tiny

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tiny("BertForSequenceClassification", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def sentences(rank: int, processes: int) -> list[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """The share of a process in three batches."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 20, (3, 8, 6), generator=generator)
    labels = torch.randint(0, 3, (3, 8), generator=generator)
    return [({"input_ids": i[rank::processes]}, y[rank::processes]) for i, y in zip(ids, labels, strict=True)]


def shard(rank: int, code: str, folder: str) -> None:
    """The example of the documentation, on the processor."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    os.chdir(folder)
    exec(compile(code, "FSDP", "exec"), {"load_bert": load_bert, "train_loader": sentences(rank, 2)})
    torch.distributed.destroy_process_group()
