"""Copies, compilers and processes: freezing and logits come along."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import headinit
from headinit.heads.record import call_model, record_of
from headinit.training.freezing import frozen_digest
from tests.heads.models import tokens

from . import two_processes
from .examples import convolutional, example, language

MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor] | Tensor]]] = {
    "timm": (convolutional, lambda: torch.rand(4, 3, 32, 32)),
    "bert": (language, tokens),
    "bert_mean": (lambda: language().bert, tokens),
}


def through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_torch_save,
}


def frozen_model(name: str) -> nn.Module:
    return headinit.freeze(headinit.attach_head(MODELS[name][0](), 3, seed=5), 1)


def train(model: nn.Module, inputs: dict[str, Tensor] | Tensor, steps: int = 2) -> None:
    optimizer = torch.optim.SGD(headinit.param_groups(model, lr=0.1, backbone_lr=0.01))
    for _ in range(steps):
        model.train()
        loss = cross_entropy(call_model(model, inputs), torch.tensor([0, 1, 2, 0]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", MODELS)
def test_a_copy_is_frozen_and_gives_the_same(name: str, how: str) -> None:
    model, inputs = frozen_model(name), MODELS[name][1]()
    other = COPIES[how](model)
    assert torch.equal(call_model(other.eval(), inputs), call_model(model.eval(), inputs))
    assert record_of(other) == record_of(model)
    digest = frozen_digest(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(other, inputs)
    assert frozen_digest(other) == digest
    head = record_of(other).new_parameters[0]
    assert not torch.equal(other.get_parameter(head), before[head])
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())  # and not the original


@pytest.mark.parametrize("name", MODELS)
def test_state_dict_round_trip(name: str) -> None:
    model, inputs = frozen_model(name), MODELS[name][1]()
    train(model, inputs)
    other = headinit.freeze(headinit.attach_head(MODELS[name][0](), 3, seed=6), 1)
    assert frozen_digest(other) != frozen_digest(model)
    other.load_state_dict(model.state_dict())
    assert frozen_digest(other) == frozen_digest(model)
    assert torch.equal(call_model(other.eval(), inputs), call_model(model.eval(), inputs))
    digest = frozen_digest(other)
    train(other, inputs)
    assert frozen_digest(other) == digest


@pytest.mark.parametrize("name", MODELS)
def test_compiled(name: str) -> None:
    torch.compiler.reset()
    model, inputs = frozen_model(name), MODELS[name][1]()
    digest, head = frozen_digest(model), record_of(model).new_parameters[0]
    before = model.get_parameter(head).detach().clone()
    compiled = torch.compile(model, backend="eager")
    expected = call_model(model.eval(), inputs)
    torch.testing.assert_close(call_model(compiled.eval(), inputs), expected)
    train(compiled, inputs)
    assert frozen_digest(compiled) == digest
    assert not torch.equal(model.get_parameter(head), before)
    torch.testing.assert_close(call_model(compiled.eval(), inputs), call_model(model.eval(), inputs))
    torch.compiler.reset()


def test_two_processes(tmp_path: Path) -> None:
    """DistributedDataParallel over gloo: each process has other data and other global seeds."""
    torch.multiprocessing.spawn(two_processes.work, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first["start"].keys() == first["end"].keys()
    frozen = [name for name in first["end"] if name.startswith(("0.", "1."))]  # with the statistics of BatchNorm
    assert {"0.weight", "1.running_mean", "1.num_batches_tracked"} <= set(frozen)
    for name, value in first["end"].items():
        assert torch.equal(second["start"][name], first["start"][name])  # one head, although the processes differ
        assert torch.equal(second["end"][name], value)
        assert torch.equal(value, first["start"][name]) == (name in frozen)
    assert first["digest"] == second["digest"]


def test_a_model_in_pieces_is_trained_as_a_whole_one(tmp_path: Path) -> None:
    """The FSDP example of docs/integrations.md on two processes, and the same loop on one with both shares."""
    code = example("FSDP")
    torch.multiprocessing.spawn(two_processes.shard, (code, str(tmp_path)), nprocs=2)
    found = headinit.load(tmp_path / "my-model")
    model = headinit.freeze(headinit.attach_head(two_processes.load_bert(), 3, init="he", seed=0), 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(headinit.param_groups(model, lr=1e-2, backbone_lr=1e-4))
    for _ in range(2):
        model.train()
        for inputs, labels in two_processes.sentences(0, 1):
            cross_entropy(model(**inputs).logits, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(found.state_dict(), dict(model.state_dict()), rtol=1e-4, atol=1e-6)
    moved = {name for name, value in found.state_dict().items() if not torch.equal(value, before[name])}
    assert any(name.startswith("classifier") for name in moved)
    assert not any(name.startswith("bert.embeddings") for name in moved)
