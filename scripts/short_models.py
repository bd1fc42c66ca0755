"""Models of every size made cheap to run: equal blocks that follow each other are cut to one, widths stay.

A network is built as its library builds it, but without the time that random values of a billion weights take: large
tensors stay unwritten until the blocks have been cut, and only what is left is filled.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from headinit.errors import HeadError
from headinit.heads.locate import find_head, is_layer
from headinit.heads.record import HeadSite

_LARGE = 1 << 15
_OWN_PAGES = 1 << 23
_INPUT_SIZES: tuple[dict[str, int], ...] = ({"img_size": 96}, {"img_size": 112}, {})
_WRITES = {
    getattr(torch.ops.aten, name)
    for name in ("normal_", "uniform_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_", "div_", "sub_")
}


class _Unwritten(TorchDispatchMode):
    """Leaves the memory of large tensors untouched, or zero: an initialiser returns at once.

    Memory that was used before is cleared, since some initialisers draw again until all values lie in their bounds. The
    largest tensors have pages of their own, which the system gives out cleared.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in _WRITES and args[0].numel() > _LARGE and args[0].is_floating_point():
            return args[0].zero_() if args[0].numel() < _OWN_PAGES else args[0]
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Shortening:
    """How a model was made short, so that another of the same shape can be built; `cut` blocks are missing."""

    cut: int = 0
    choose: Callable[[nn.Module], list[str]] | None = None
    size: Mapping[str, int] = field(default_factory=dict)

    def build(self, build: Callable[..., nn.Module]) -> nn.Module:
        """The model; the values of large tensors are whatever the memory held."""
        with _Unwritten():
            model = build(**self.size).eval()
        if self.choose is not None:
            _cut(model, self.choose)
        return model


def build_short(
    build: Callable[..., nn.Module], runs: Callable[[nn.Module], bool], limit: float
) -> tuple[nn.Module, Shortening]:
    """The model with values, its equal blocks cut to one where it has more than `limit` parameters.

    Args:
        build: builds it whole; may take `img_size`, the size of the pictures that it reads.
        runs: whether a model with values runs; what does not run when it is cut stays as it was.
        limit: number of parameters up to which all blocks stay.

    Returns:
        The model, and what was done to it.

    Raises:
        AssertionError: the head of the cut model is not that of the whole one.
    """
    with _Unwritten():
        model = build().eval()
    if sum(p.numel() for p in model.parameters()) <= limit:
        return build().eval(), Shortening()
    whole = sites_of(model)
    for choose, size in itertools.product((_numbered, _in_plain_sequences), _INPUT_SIZES):
        try:
            with _Unwritten():
                model = build(**size).eval()
        except (TypeError, ValueError, AssertionError, RuntimeError):  # no size of its own, or not this one
            continue
        cut = _cut(model, choose)
        if size and not cut:
            continue  # smaller pictures alone would make it another architecture for nothing
        _fill(model)
        if runs(model):
            assert sites_of(model) == whole, "cutting blocks has changed the head"
            return model, Shortening(cut, choose, size)
    return build().eval(), Shortening()


def sites_of(model: nn.Module) -> tuple[HeadSite, ...]:
    """The heads of a model; none of one that has none."""
    try:
        return find_head(model)
    except HeadError:
        return ()


def _cut(model: nn.Module, choose: Callable[[nn.Module], list[str]]) -> int:
    """Take blocks out of every module that is made of numbered blocks; gives how many went."""
    heads = [site.path for site in sites_of(model)]
    found = 0
    for path, parent in list(model.named_modules()):
        if not path or any(head.startswith(f"{path}.") for head in heads):
            continue
        taken = choose(parent)
        for name in reversed(taken):
            if isinstance(parent, nn.Sequential | nn.ModuleList) and name.isdigit():
                del parent[list(parent._modules).index(name)]  # renumbers those that follow
            else:
                del parent._modules[name]
        found += len(taken)
    return found


def _numbered(parent: nn.Module) -> list[str]:
    """All blocks but the first of those that are equal, values aside."""
    names = [name for name, _ in parent.named_children()]
    if len(names) < 2 or len({re.sub(r"\d+$", "", name) for name in names}) > 1:
        return []
    repeated, seen = [], set()
    for name, block in parent.named_children():
        if is_layer(block) or not any(True for child in block.children() for _ in child.parameters()):
            continue
        kind = (type(block), getattr(block, "shift_size", None), *((n, t.shape) for n, t in block.state_dict().items()))
        if kind in seen:
            repeated.append(name)
        seen.add(kind)
    return repeated


def _in_plain_sequences(parent: nn.Module) -> list[str]:
    """The same in plain sequences alone, where nothing but their order can matter."""
    return _numbered(parent) if type(parent) is nn.Sequential else []


@torch.no_grad()
def _fill(model: nn.Module) -> None:
    """Values for what was left unwritten, of a size that keeps a signal alive; the same at every call."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.numel() > _LARGE:
            bound = (3 * len(parameter) / parameter.numel()) ** 0.5 if parameter.ndim > 1 else 0.02
            parameter.uniform_(-bound, bound, generator=generator)
