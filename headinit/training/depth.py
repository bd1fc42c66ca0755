"""How deep in the network each pretrained parameter lies: freezing by stages and layer-wise learning rates read it.

timm models answer for themselves (`group_matcher`). In every other model the blocks are found by their numbers:
torchvision's ``layer1 ... layer4``, transformers' ``encoder.layer.0 ... 11``, a plain ``features.0 ... 8``.
"""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass

from torch import nn

from headinit.heads.pooled import HeadedBackbone

_NUMBERED = re.compile(r"^(.*?)(\d+)$")
_EMBEDDING_NAME = re.compile(r"embed|rel_pos|relative|position", re.IGNORECASE)
_AUXILIARY = re.compile(r"aux", re.IGNORECASE)  # GoogLeNet's side branches outweigh its blocks
_SEQUENCES = nn.Sequential | nn.ModuleList | nn.ModuleDict
_UNMATCHED = "headinit-no-parameter-has-this-name"


@dataclass(frozen=True)
class Depths:
    """Depth of each pretrained parameter.

    Attributes:
        of: parameter name to depth: 0 for the stem or the embeddings, 1 to `count` for the blocks from input to output.
        count: number of blocks (or stages).
    """

    of: dict[str, int]
    count: int


def parameter_depths(model: nn.Module, new: Container[str] = (), *, coarse: bool = False) -> Depths:
    """Depth of every parameter that is not new.

    What comes before the first block has depth 0; what comes after the last one, such as a final norm, belongs to it.

    Args:
        model: the unwrapped model.
        new: names of the new parameters; they have no depth.
        coarse: count stages (four in a ResNet) instead of blocks (sixteen in a ResNet-50).

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.Linear(2, 3))
        >>> parameter_depths(model, ("3.weight", "3.bias")).of
        {'0.weight': 1, '0.bias': 1, '2.weight': 2, '2.bias': 2}
    """
    names = [name for name, _ in model.named_parameters() if name not in new]
    if isinstance(model, HeadedBackbone):
        return _depths_of_backbone(model, names, coarse)
    if callable(getattr(model, "group_matcher", None)):
        return _matched_depths(model, names, coarse)
    blocks = _find_blocks(model, frozenset(names))
    if not coarse:
        blocks = [path for block in blocks for path in _split_block(model, block, frozenset(names))]
    return _depths_around(model, names, blocks)


def _depths_of_backbone(model: HeadedBackbone, names: list[str], coarse: bool) -> Depths:
    """The backbone's own depths, as if it had no head around it; what else is not new is the last of all."""
    inner_new = {name for name, _ in model.backbone.named_parameters() if f"backbone.{name}" not in names}
    inner = parameter_depths(model.backbone, inner_new, coarse=coarse)
    return Depths({name: inner.of.get(name.removeprefix("backbone."), inner.count) for name in names}, inner.count)


def _matched_depths(model: nn.Module, names: list[str], coarse: bool) -> Depths:
    """timm's own grouping; parameters that it leaves over (a final norm) belong to the last block."""
    from timm.models import group_parameters

    class Named(nn.Module):
        def named_parameters(self, *_, **__):  # type: ignore[override]
            return iter([(name, None) for name in [*names, _UNMATCHED]])

    grouped = group_parameters(Named(), model.group_matcher(coarse=coarse), reverse=True)  # type: ignore[operator]
    deepest = grouped.pop(_UNMATCHED)
    matched = [depth for depth in grouped.values() if depth < deepest]
    last = max(matched, default=0)
    return Depths({name: min(grouped.get(name, last), last) for name in names}, last)


def _find_blocks(model: nn.Module, names: frozenset[str]) -> list[str]:
    """Paths of the stages: follow the largest child down to the first module whose children are numbered."""
    node, path = model, ""
    while True:
        children = _children(node, path, names)
        if isinstance(node, nn.ModuleList) and len(children) == 1:
            return [children[0][0]]
        family = _numbered_family(children, names)
        total = sum(_weight(child, child_path, names) for child_path, child in children)
        if family and 2 * sum(_weight(child, p, names) for p, child in family) >= total:
            return [child_path for child_path, _ in family]
        inner = [child for child in children if _children(child[1], child[0], names)]
        # torchvision's VGG keeps most of its parameters in the classifier; the blocks are the convolutions.
        named = [child for child in inner if child[0].rpartition(".")[2] == "features"]
        weights = {child_path: _weight(child, child_path, names) for child_path, child in named or inner}
        if not weights or 2 * max(weights.values()) < sum(weights.values()):
            return [child_path for child_path, _ in children]
        path = max(weights, key=lambda child_path: weights[child_path])
        node = model.get_submodule(path)


def _split_block(model: nn.Module, path: str, names: frozenset[str]) -> list[str]:
    """The blocks of one stage: ``layer1`` is ``layer1.0 ... layer1.2``; a stage that is one block stays whole."""
    module = model.get_submodule(path)
    # Numbered parts of other modules may be parallel branches; those of a sequence, or of "blocks", follow each other.
    inner: list[tuple[str, nn.Module]] = [(path, module)] if isinstance(module, _SEQUENCES) else []
    inner += [
        (p, m) for p, m in _children(module, path, names) if p.rpartition(".")[2] in ("blocks", "layers", "layer")
    ]
    for inner_path, sequence in inner:
        family = _numbered_family(_children(sequence, inner_path, names), names)
        if family and len({type(child) for _, child in family}) == 1 and any(True for _ in family[0][1].children()):
            return [child_path for child_path, _ in family]
    return [path]


def _depths_around(model: nn.Module, names: list[str], blocks: list[str]) -> Depths:
    """Number the blocks and place everything else by the order in which the modules were registered."""
    position = {path: index for index, (path, _) in enumerate(model.named_modules(remove_duplicate=False))}
    starts = [position[block] for block in blocks]
    inputs = _late_embeddings(model, blocks)
    depths = {}
    for name in names:
        owner = name.rpartition(".")[0]
        inside = [i for i, block in enumerate(blocks) if owner == block or owner.startswith(f"{block}.")]
        before = sum(start <= position[owner] for start in starts)
        if inside:
            depths[name] = inside[0] + 1
        elif any(owner == path or owner.startswith(f"{path}.") for path in inputs):
            depths[name] = 0
        else:
            # A downsampling between two stages belongs to the stage that it leads into.
            depths[name] = 0 if before == 0 else min(before + 1, len(blocks))
    return Depths(depths, len(blocks))


def _late_embeddings(model: nn.Module, blocks: list[str]) -> list[str]:
    """Modules registered after the blocks that nevertheless feed all of them: DeBERTa's relative positions."""
    if not blocks:
        return []
    ancestors = blocks[-1].split(".")[:-1]
    found: list[str] = []
    for depth in range(len(ancestors) + 1):
        parent = ".".join(ancestors[:depth])
        on_path = blocks[-1].split(".")[depth]
        children = [name for name, _ in model.get_submodule(parent).named_children()]
        later = [f"{parent}.{name}".lstrip(".") for name in children[children.index(on_path) + 1 :]]
        outside = [path for path in later if path not in blocks]
        first = next((i for i, path in enumerate(outside) if _is_embedding(path, model.get_submodule(path))), None)
        found += [] if first is None else outside[first:]
    return found


def _is_embedding(path: str, module: nn.Module) -> bool:
    """A module that only looks up positions; a whole sub-network that happens to begin with an embedding is none."""
    leaf = isinstance(module, nn.Embedding)
    return leaf or (bool(_EMBEDDING_NAME.search(path.rpartition(".")[2])) and any(True for _ in module.parameters()))


def _children(node: nn.Module, path: str, names: frozenset[str]) -> list[tuple[str, nn.Module]]:
    children = [(f"{path}.{name}".lstrip("."), child) for name, child in node.named_children()]
    kept = [(p, child) for p, child in children if not _AUXILIARY.match(p.rpartition(".")[2])]
    return [(p, child) for p, child in kept if any(f"{p}.{n}" in names for n, _ in child.named_parameters())]


def _numbered_family(children: list[tuple[str, nn.Module]], names: frozenset[str]) -> list[tuple[str, nn.Module]]:
    """The children that share a name but for its number, if there are two or more; the heaviest family of them."""
    families: dict[str, list[tuple[str, nn.Module]]] = {}
    for path, child in children:
        match = _NUMBERED.match(path.rpartition(".")[2])
        if match:
            families.setdefault(match[1], []).append((path, child))
    if not families:
        return []
    family = max(families.values(), key=lambda members: sum(_weight(child, p, names) for p, child in members))
    nested = [member for member in family if _is_nested(member[1])]
    family = nested if len(nested) >= 2 else family
    return family if len(family) >= 2 else []


def _is_nested(module: nn.Module) -> bool:
    """Whether the module is made of modules: a stage is, a downsampling of a norm and a convolution is not."""
    return any(True for child in module.children() for _ in child.children())


def _weight(module: nn.Module, path: str, names: frozenset[str]) -> int:
    """Number of pretrained values, embedding tables left out: in a small BERT they outweigh the encoder."""
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    own = ((f"{path}.{name}".lstrip("."), parameter) for name, parameter in module.named_parameters())
    return sum(parameter.numel() for name, parameter in own if name in names and id(parameter) not in tables)
