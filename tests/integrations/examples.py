"""The examples of docs/integrations.md, run as they stand there on tiny models."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import headinit
from headinit.heads.record import record_of
from headinit.training.freezing import frozen_digest
from tests.heads.models import tiny

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "integrations.md"


def example(heading: str) -> str:
    """The fenced Python block under the heading that starts so."""
    sections = re.split(r"^## ", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    (section,) = [section for section in sections if section.startswith(heading)]
    (code,) = re.findall(r"^```python\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
    return code


@dataclass
class Watch:
    """What a model was like when `headinit.freeze` had just frozen it."""

    model: nn.Module = field(default_factory=nn.Module)
    digest: str = ""
    tensors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def see(self, model: nn.Module) -> None:
        self.model, self.digest = model, frozen_digest(model)
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.tensors = {name: (tensor, tensor.detach().clone()) for name, tensor in named.items()}

    def moved(self) -> set[str]:
        """Names, as they were when frozen, of the parameters and buffers that hold other bits now."""
        return {name for name, (tensor, before) in self.tensors.items() if not torch.equal(tensor, before)}

    def head(self) -> set[str]:
        return set(record_of(self.model).new_parameters)


def run(
    heading: str, monkeypatch: pytest.MonkeyPatch, folder: Path, replaced: tuple[str, str] = ("", ""), **given: Any
) -> tuple[dict[str, Any], Watch]:
    """Run an example; what it is given are its free names. Returns its names afterwards and what was frozen."""
    code, (old, new) = example(heading), replaced
    assert old in code
    watch, freeze = Watch(), headinit.freeze

    def watched(model: nn.Module, *args: Any, **options: Any) -> nn.Module:
        freeze(model, *args, **options)
        watch.see(model)
        return model

    monkeypatch.setattr(headinit, "freeze", watched, raising=False)
    monkeypatch.chdir(folder)
    names = {"__name__": "example", **given}
    exec(compile(code.replace(old, new) if old else code, str(DOCUMENT), "exec"), names)
    return names, watch


def convolutional() -> nn.Module:
    """A network with BatchNorm and stochastic depth."""
    return timm.create_model("test_resnet", drop_path_rate=0.2, drop_rate=0.1)


def language(**options: Any) -> nn.Module:
    """A transformer with dropout."""
    return tiny("BertForSequenceClassification", num_hidden_layers=2, **options)


def picture_loader() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(12, 3, 32, 32, generator=generator)
    return DataLoader(TensorDataset(pictures, torch.arange(12) % 3), batch_size=4, shuffle=True)


def text_examples() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 60, (12, 6), generator=generator)
    return [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": torch.tensor(i % 3)}
        for i, row in enumerate(ids)
    ]


def picture_examples() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(12, 3, 32, 32, generator=generator)
    return [{"pixel_values": picture, "labels": torch.tensor(i % 3)} for i, picture in enumerate(pictures)]


def rates(optimizer: torch.optim.Optimizer, key: str = "lr") -> dict[str, float]:
    """Learning rate of each group, which groups of one name without and with decay share."""
    found: dict[str, set[float]] = {}
    for group in optimizer.param_groups:
        found.setdefault(group["name"].partition("/")[0], set()).add(group[key])
    assert all(len(values) == 1 for values in found.values())
    return {name: values.pop() for name, values in found.items()}
