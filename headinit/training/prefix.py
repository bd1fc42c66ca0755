"""A frozen first part runs once: what it gives for each example is kept, and every epoch begins there.

Where the frozen part ends is not looked up by name. One pass over a few examples shows which modules have no trainable
parameter, come before every trainable one, draw no random number and give the same bits in training as in evaluation;
a gradient shows which of their outputs the rest of the network reads. These are kept. Afterwards the forward functions
of those modules stand aside: they hand out what was kept, or an empty tensor of the right shape where nothing is read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from headinit.features.acceleration import accelerate, pays
from headinit.features.extract import FAST_TOLERANCE, relative_error
from headinit.seeding import global_generators_kept
from headinit.training.activations import Rows

logger = logging.getLogger(__name__)

PADDED_TOLERANCE = 1e-4
"""Greatest relative error of the logits of padded texts: padding is not kept, and sums over other lengths round
otherwise (by about 1e-6)."""

_ROWS, _FEWER = 3, 2  # examples of the passes that find the boundary: two numbers show which sizes follow the batch


@dataclass(frozen=True)
class CachedInputs:
    """Inputs of a batch that goes through the rest of a network only; `supplied` hands them to it.

    Attributes:
        inputs: what the model is called with: texts as they are, pictures as zeros of their shape.
        index: `(B,)` which examples they are.
        prefix: the frozen part.
        rows: its activations by example.
    """

    inputs: Any
    index: Tensor
    prefix: FrozenPrefix
    rows: Rows


@contextmanager
def supplied(inputs: Any) -> Iterator[Any]:
    """The inputs to call a model with, for as long as the block lasts; ordinary inputs pass through.

    Example:
        >>> with supplied("anything") as inputs:
        ...     inputs
        'anything'
    """
    if not isinstance(inputs, CachedInputs):
        yield inputs
        return
    with inputs.prefix.replaying(inputs.rows.batch(inputs.index, _mask(inputs.inputs)), inputs.inputs):
        yield inputs.inputs


class CachedBatches:
    """Batches with the activations of a frozen part in the place of their inputs, by the protocol of `Batches`."""

    def __init__(self, data: Any, prefix: FrozenPrefix, rows: Rows) -> None:
        self.data, self.prefix, self.rows = data, prefix, rows

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Any]:
        return self.epoch(0)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """The batches of one epoch, from batch `start` on; pictures are not read."""
        with getattr(self.data, "unread", nullcontext)():
            for batch in self.data.epoch(epoch, start):
                yield batch._replace(inputs=CachedInputs(batch.inputs, batch.index, self.prefix, self.rows))


@dataclass(frozen=True)
class _Leaf:
    """One tensor that a module gives: its sizes as `(times, plus, of)`, and whether the rest reads it."""

    sizes: tuple[tuple[int, int, str], ...]
    dtype: torch.dtype
    device: torch.device
    read: bool

    def empty(self, rows: int, length: int, fill: float) -> Tensor:
        """A tensor of the right shape that takes no memory."""
        known = {"rows": rows, "length": length, "": 1}
        shape = [times * known[of] + plus for times, plus, of in self.sizes]
        return torch.full((), fill, dtype=self.dtype, device=self.device).expand(shape)

    @property
    def kind(self) -> str | None:
        """How the examples lie in it: ``"fixed"`` `(B, ...)`, ``"padded"`` `(B, L, ...)`, or None for otherwise."""
        if self.sizes[:1] != ((1, 0, "rows"),):
            return None
        rest = [of for _, _, of in self.sizes[1:]]
        if not any(rest):
            return "fixed"
        return "padded" if self.sizes[1] == (1, 0, "length") and not any(rest[1:]) else None


@dataclass(frozen=True)
class _Boundary:
    """A frozen module whose forward stands aside."""

    path: str
    leaves: tuple[_Leaf, ...]
    structure: Any


class FrozenPrefix:
    """The frozen first part of a network: how to compute its activations, and how to do without it.

    Attributes:
        boundaries: the modules that stand aside, in the order in which they are called.
    """

    def __init__(self, model: nn.Module, boundaries: tuple[_Boundary, ...]) -> None:
        self.model, self.boundaries = model, boundaries
        self.read = {b.path for b in boundaries if any(leaf.read for leaf in b.leaves)}
        self._now: tuple[list[Tensor], int, int, float] | None = None

    @property
    def kinds(self) -> list[str | None]:
        """How each tensor that is kept holds its examples."""
        return [leaf.kind for boundary in self.boundaries for leaf in boundary.leaves if leaf.read]

    def activations(self, model: nn.Module, inputs: Any, stop: bool = True) -> list[Tensor]:
        """What the rest of the network reads, computed by the frozen modules; the rest does not run.

        Args:
            model: the network or a copy of it.
            inputs: of one batch, on its device.
            stop: end the pass there; a tracer needs a whole one.
        """
        found: dict[str, Any] = {}

        def keep(path: str, module: nn.Module, args: Any, output: Any) -> None:
            found[path] = [leaf.clone() for leaf in pytree.tree_leaves(output)]  # the next module may work in place
            if stop and len(found) == len(self.read):
                raise _ReachedTheEnd

        handles = [model.get_submodule(p).register_forward_hook(partial(keep, p)) for p in sorted(self.read)]
        with _handles_removed(handles), _in_mode(model, train=False), torch.no_grad():
            _pass_until_stopped(model, inputs)
        return [
            tensor
            for boundary in self.boundaries
            if boundary.path in self.read
            for tensor, leaf in zip(found[boundary.path], boundary.leaves, strict=True)
            if leaf.read
        ]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Let the frozen modules stand aside wherever activations are replayed; undone afterwards."""
        modules = [(self.model.get_submodule(b.path), b) for b in self.boundaries]
        for module, boundary in modules:
            module.forward = partial(self._stand_aside, boundary, module.forward)
        try:
            yield
        finally:
            for module, _ in modules:
                vars(module).pop("forward", None)

    @contextmanager
    def replaying(self, kept: list[Tensor], inputs: Any, fill: float = 0.0) -> Iterator[None]:
        """Hand these activations out during the block."""
        self._now = (kept, *_extent(inputs), fill)
        try:
            yield
        finally:
            self._now = None

    def _stand_aside(self, boundary: _Boundary, forward: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if self._now is None:
            return forward(*args, **options)
        kept, rows, length, fill = self._now
        position = 0
        for earlier in self.boundaries[: self.boundaries.index(boundary)]:
            position += sum(leaf.read for leaf in earlier.leaves)
        leaves = []
        for leaf in boundary.leaves:
            if leaf.read:
                leaves.append(kept[position].to(leaf.device))
                position += 1
            else:
                leaves.append(leaf.empty(rows, length, fill))
        return pytree.tree_unflatten(leaves, boundary.structure)


def find_prefix(model: nn.Module, inputs: Any) -> FrozenPrefix | None:
    """The frozen first part of a model, or None if it has none that can be cut off.

    Modes, buffers and random states are left as they were.

    Args:
        model: the bare model on its device, frozen as it will train.
        inputs: of one training batch; its first three examples are looked at.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))
        >>> _ = model[:3].requires_grad_(False).eval()
        >>> prefix = find_prefix(model, torch.randn(4, 4))
        >>> [boundary.path for boundary in prefix.boundaries], prefix.read
        (['0', '1', '2'], {'2'})
    """
    if _extent(inputs)[0] < _ROWS:
        return None
    try:
        with _buffers_kept(model), global_generators_kept(0):
            prefix = _find(model, _head_of(inputs, _ROWS), _head_of(inputs, _FEWER, shorter=True))
            if prefix is None:
                logger.info("No frozen first part of %s can be kept.", type(model).__name__)
            return prefix
    except Exception as reason:  # whatever foreign code a model holds: the plain way is always there
        logger.info("The frozen part of %s runs in every epoch: %s", type(model).__name__, reason)
        return None


def cached_prefix(
    model: nn.Module,
    data: Mapping[str, Any],
    budget: float,
    *,
    device: torch.device,
    folder: Path | None = None,
    channels_last: bool = False,
    between: Callable[[], None] | None = None,
) -> tuple[FrozenPrefix, dict[str, CachedBatches]] | None:
    """Compute the activations of the frozen first part for all data, if there is one and they fit.

    The batches are read in the order of their first epoch, so that a run that is resumed finds the same bits.

    Args:
        model: the bare model, frozen as it will train.
        data: batches by name, the training data first; each says `index`, and repeats its inputs in every epoch.
        budget: most bytes that all activations may take.
        device: where the model is.
        folder: where activations go that take more than half of the free memory.
        channels_last: lay pictures out so.
        between: called after each batch.

    Returns:
        The prefix, to be `installed`, and the batches to train and evaluate on; None if it runs as usual.
    """
    if all(parameter.requires_grad for parameter in model.parameters()):
        return None
    if any(getattr(b, "augmentation", "none") != "none" or not hasattr(b, "epoch") for b in data.values()):
        return None
    first = next(iter(next(iter(data.values())).epoch(0)))
    place = partial(_placed, device=device, channels_last=channels_last)
    if not hasattr(first, "_replace") or not isinstance(getattr(first, "index", None), Tensor):
        return None
    inputs = place(first.inputs)
    prefix = find_prefix(model, inputs)
    if prefix is None:
        return None
    needed = _bytes_needed(prefix, inputs, data.values())
    if needed > budget:
        logger.info("Activations of the frozen part need %.1f GB, more than prefix_cache_gb.", needed / 1e9)
        return None
    compute = _computer(prefix, inputs, sum(len(batches) for batches in data.values()))
    cached = {}
    for name, batches in data.items():
        rows = Rows.placed(prefix.kinds, needed, budget, folder)
        if not _fill(prefix, rows, batches, compute, place, between):
            return None
        cached[name] = CachedBatches(batches, prefix, rows)
    return prefix, cached


def _fill(
    prefix: FrozenPrefix,
    rows: Rows,
    batches: Any,
    compute: Callable[[Any], list[Tensor]],
    place: Callable[[Any], Any],
    between: Callable[[], None] | None,
) -> bool:
    """Compute and keep the activations of all batches; False if they cannot be kept after all."""
    checked = "padded" not in prefix.kinds
    for batch in batches.epoch(0):
        inputs = place(batch.inputs)
        mask = _mask(inputs)
        kept = compute(inputs)
        try:
            rows.add(batch.index, kept, mask)
        except (OSError, ValueError) as reason:
            logger.info("Activations of the frozen part are not kept: %s", reason)
            return False
        if not checked and mask is not None and not bool(mask.all()):
            checked = True
            without_padding = [tensor * mask.view(*mask.shape, *[1] * (tensor.ndim - 2)) for tensor in kept]
            if not _same_logits(prefix, inputs, without_padding, PADDED_TOLERANCE):
                logger.info("Padding reaches the logits, so activations of the frozen part are not kept.")
                return False
        if between is not None:
            between()
    rows.finish()
    if len(rows) < _examples(batches):
        logger.info("An epoch has not all examples, so activations of the frozen part are not kept.")
    return len(rows) >= _examples(batches)


def _computer(prefix: FrozenPrefix, inputs: Any, batches: int) -> Callable[[Any], list[Tensor]]:
    """How to compute the activations: by the faster copy that features are extracted with, or plainly."""
    plain = partial(prefix.activations, prefix.model)
    if len(prefix.kinds) != 1 or not pays(prefix.model, inputs, batches) or torch.is_autocast_enabled("cpu"):
        return plain
    if "forward" in vars(prefix.model):  # accelerate's autocast
        return plain

    def runner(network: nn.Module) -> Callable[[Any], Tensor]:
        return lambda pictures: prefix.activations(network, pictures, stop=False)[0]

    faster = accelerate(prefix.model, runner, inputs, FAST_TOLERANCE)
    if faster is None:
        return plain
    return lambda pictures: [faster(pictures).contiguous(memory_format=torch.channels_last)]


# --- where the frozen part ends ---------------------------------------------------------------------------------------


def _find(model: nn.Module, inputs: Any, fewer: Any) -> FrozenPrefix | None:
    training, evaluating = _frozen_outputs(model, inputs, train=True), _frozen_outputs(model, inputs, train=False)
    smaller = _frozen_outputs(model, fewer, train=False)
    boundaries: list[_Boundary] = []
    outputs: list[list[Tensor]] = []
    for path, output in training.items():
        if path not in evaluating or not _equal(output, evaluating[path]):
            break  # dropout or batch statistics: what follows depends on them
        leaves, structure = pytree.tree_flatten(output)
        found = _leaves(leaves, pytree.tree_leaves(smaller.get(path)), _extent(inputs), _extent(fewer))
        if found is not None:
            boundaries.append(_Boundary(path, found, structure))
            outputs.append(leaves)
    modules = [model.get_submodule(boundary.path) for boundary in boundaries]
    if not any(True for module in modules for _ in module.parameters()):
        return None
    prefix = _reading(model, boundaries, outputs, inputs)
    if prefix is None or None in prefix.kinds or ("padded" in prefix.kinds and _mask(inputs) is None):
        return None
    kept = [leaf for b, own in zip(prefix.boundaries, outputs, strict=True) for leaf in _read(b, own)]
    tolerance = 0.0 if "padded" not in prefix.kinds else PADDED_TOLERANCE
    return prefix if _same_logits(prefix, inputs, kept, tolerance) else None


class _ReachedTheEnd(Exception):
    """The pass has reached the end of the frozen part."""


def _frozen_outputs(model: nn.Module, inputs: Any, *, train: bool) -> dict[str, Any]:
    """What the outermost frozen modules give, up to the first trainable one, in the order in which they end."""
    calls: dict[str, int] = {}
    outputs: dict[str, Any] = {}
    states = _random_states()
    heard = _heard(model)

    def enter(path: str, module: nn.Module, args: Any) -> None:
        calls[path] = calls.get(path, 0) + 1
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            raise _ReachedTheEnd

    def leave(path: str, module: nn.Module, args: Any, output: Any) -> None:
        leaves = pytree.tree_leaves(output)
        usable = all(isinstance(x, Tensor) and x.is_floating_point() and not x.requires_grad for x in leaves)
        if (
            leaves
            and usable
            and module not in heard
            and _is_frozen(module)
            and all(map(torch.equal, states, _random_states()))
        ):
            for inner in [known for known in outputs if known.startswith(f"{path}.")]:
                del outputs[inner]
            outputs[path] = pytree.tree_map(torch.clone, output)  # the next module may work in place

    handles = []
    for path, module in model.named_modules():
        if path:
            handles += [
                module.register_forward_pre_hook(partial(enter, path)),
                module.register_forward_hook(partial(leave, path)),
            ]
    with _handles_removed(handles), _in_mode(model, train=train), torch.enable_grad():
        _pass_until_stopped(model, inputs)
    return {path: output for path, output in outputs.items() if calls[path] == 1}


def _is_frozen(module: nn.Module) -> bool:
    """Whether nothing trains in the module, and its forward is its own."""
    return "forward" not in vars(module) and not any(parameter.requires_grad for parameter in module.parameters())


def _heard(model: nn.Module) -> set[nn.Module]:
    """Modules that must run because a hook on them, or on a part of them, looks at what passes through."""

    def idle(module: nn.Module) -> bool:
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        return all(getattr(hook, "idle_in_evaluation", False) for hook in hooks)

    listened = {module for module in model.modules() if not idle(module)}
    return {module for module in model.modules() if any(part in listened for part in module.modules())}


def _reading(
    model: nn.Module, boundaries: list[_Boundary], outputs: list[list[Tensor]], inputs: Any
) -> FrozenPrefix | None:
    """The prefix that keeps what the rest reads: whatever a gradient reaches when no frozen module runs."""
    everything = [
        _Boundary(b.path, tuple(_Leaf(x.sizes, x.dtype, x.device, True) for x in b.leaves), b.structure)
        for b in boundaries
    ]
    prefix = FrozenPrefix(model, tuple(everything))
    read: set[int] = set()
    for train in (True, False):  # in training there may be further branches
        leaves = [leaf.detach().clone().requires_grad_() for own in outputs for leaf in own]
        with prefix.installed(), prefix.replaying([leaf.clone() for leaf in leaves], inputs):
            total = torch.stack([x.float().sum() for x in _output_tensors(model, inputs, train=train)]).sum()
        gradients = torch.autograd.grad(total, leaves, allow_unused=True)
        read |= {i for i, gradient in enumerate(gradients) if gradient is not None}
    if not read:
        return None
    numbers = iter(range(sum(map(len, outputs))))
    return FrozenPrefix(
        model,
        tuple(
            _Boundary(
                b.path, tuple(_Leaf(x.sizes, x.dtype, x.device, next(numbers) in read) for x in b.leaves), b.structure
            )
            for b in boundaries
        ),
    )


def _same_logits(prefix: FrozenPrefix, inputs: Any, kept: list[Tensor], tolerance: float) -> bool:
    """Whether the network gives the same with the frozen modules standing aside; NaN in place of what is not read."""
    blank = torch.full_like(inputs, torch.nan) if isinstance(inputs, Tensor) else inputs
    for train in (False, True):
        with torch.no_grad(), _buffers_kept(prefix.model):
            expected = _output_tensors(prefix.model, inputs, train=train)
            with prefix.installed(), prefix.replaying([tensor.clone() for tensor in kept], inputs, torch.nan):
                found = _output_tensors(prefix.model, blank, train=train)
        errors = [relative_error(a, b) for a, b in zip(found, expected, strict=True)]
        if not all(error <= tolerance for error in errors):
            logger.info("Without its frozen part %s differs by %s.", type(prefix.model).__name__, errors)
            return False
    return True


def _output_tensors(model: nn.Module, inputs: Any, *, train: bool) -> list[Tensor]:
    """Everything that the model gives, with the same random numbers every time."""
    with global_generators_kept(0), _in_mode(model, train=train):
        output = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _leaves(
    found: list[Tensor], fewer: list[Tensor], extent: tuple[int, int], smaller: tuple[int, int]
) -> tuple[_Leaf, ...] | None:
    """The tensors with what their sizes follow; None if that cannot be told."""
    if len(found) != len(fewer):
        return None
    leaves = []
    for tensor, small in zip(found, fewer, strict=True):
        if tensor.ndim != small.ndim:
            return None
        sizes = [_size(a, b, extent, smaller) for a, b in zip(tensor.shape, small.shape, strict=True)]
        if None in sizes:
            return None
        leaves.append(_Leaf(tuple(size for size in sizes if size), tensor.dtype, tensor.device, False))
    return tuple(leaves)


def _size(a: int, b: int, extent: tuple[int, int], smaller: tuple[int, int]) -> tuple[int, int, str] | None:
    (rows, length), (fewer, shorter) = extent, smaller
    if a == b:
        return (0, a, "")
    if a * fewer == b * rows and a % rows == 0:
        return (a // rows, 0, "rows")
    if shorter < length and a - b == length - shorter:
        return (1, a - length, "length")
    return None


# --- inputs, modes, passes --------------------------------------------------------------------------------------------


def _extent(inputs: Any) -> tuple[int, int]:
    """Examples of a batch, and tokens of its longest text (0 for pictures)."""
    if isinstance(inputs, Tensor):
        return len(inputs), 0
    mask = _mask(inputs)
    first = mask if mask is not None else next(iter(inputs.values()))
    return len(first), first.shape[1] if first.ndim > 1 else 0


def _mask(inputs: Any) -> Tensor | None:
    """`(B, L)` which positions are no padding."""
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _head_of(inputs: Any, rows: int, *, shorter: bool = False) -> Any:
    """The first examples; texts, if asked, one token shorter."""
    if isinstance(inputs, Tensor):
        return inputs[:rows]
    _, length = _extent(inputs)
    end = length - 1 if shorter and length > 1 else length
    return {n: v[:rows, :end] if v.ndim > 1 and v.shape[1] == length else v[:rows] for n, v in inputs.items()}


def _placed(inputs: Any, *, device: torch.device, channels_last: bool) -> Any:
    if isinstance(inputs, Mapping):
        return {name: value.to(device) for name, value in inputs.items()}
    inputs = inputs.to(device)
    return inputs.contiguous(memory_format=torch.channels_last) if channels_last and inputs.ndim == 4 else inputs


def _bytes_needed(prefix: FrozenPrefix, inputs: Any, data: Iterable[Any]) -> int:
    few = prefix.activations(prefix.model, _head_of(inputs, _ROWS))
    per_example = sum(tensor.numel() * tensor.element_size() for tensor in few) // _ROWS
    return sum(per_example * _examples(batches) for batches in data)


def _examples(batches: Any) -> int:
    for held in (getattr(batches, "split", None), getattr(batches, "labels", None)):
        if held is not None:
            return len(held)
    return len(batches) * getattr(batches, "batch_size", 1)


def _read(boundary: _Boundary, leaves: list[Tensor]) -> list[Tensor]:
    return [tensor for tensor, leaf in zip(leaves, boundary.leaves, strict=True) if leaf.read]


def _equal(first: Any, second: Any) -> bool:
    ours, theirs = pytree.tree_leaves(first), pytree.tree_leaves(second)
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def _random_states() -> list[Tensor]:
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]


def _pass_until_stopped(model: nn.Module, inputs: Any) -> None:
    with suppress(_ReachedTheEnd):
        model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


@contextmanager
def _handles_removed(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _in_mode(model: nn.Module, *, train: bool) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.train(train)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Put running statistics back that passes in training mode move."""
    before = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, values in before:
                buffer.copy_(values)
