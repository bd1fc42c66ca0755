"""The top of a backbone: its pooler and its last blocks, as far as they can start anew."""

from __future__ import annotations

from torch import nn

from headinit.errors import HeadError
from headinit.heads.locate import child_path


def top_parameters(model: nn.Module, blocks: int) -> tuple[str, ...]:
    """Names of the parameters of the pooler, if there is one, and of the last blocks.

    Args:
        model: a model whose blocks stand in one list, as those of BERT-like models and of ViT do.
        blocks: how many blocks; 0 is the pooler alone.

    Raises:
        HeadError: the model has no such list, fewer blocks, or nothing that would start anew; or its blocks hold
            statistics of the data (BatchNorm).

    Example:
        >>> layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> top_parameters(nn.ModuleDict({"layers": layers, "pooler": nn.Linear(2, 2)}), 1)
        ('layers.1.weight', 'layers.1.bias', 'pooler.weight', 'pooler.bias')
    """
    poolers = [path for path, _ in model.named_modules() if path.rpartition(".")[2] == "pooler"]
    outermost = [path for path in poolers if not any(path.startswith(f"{other}.") for other in poolers)]
    paths = [*(_blocks(model, blocks) if blocks else ()), *outermost]
    names = tuple(name for name, _ in model.named_parameters() if any(name.startswith(f"{path}.") for path in paths))
    if not names:
        raise HeadError(
            f"reinit_top={blocks}: {type(model).__name__} has no pooler to start anew. Give the number of blocks, 1 or "
            "more."
        )
    norms = [path for path in paths for module in model.get_submodule(path).modules() if _keeps_statistics(module)]
    if norms:
        raise HeadError(
            f"reinit_top={blocks}: {norms[0]!r} of this {type(model).__name__} holds BatchNorm statistics of the "
            "pretraining data, which do not fit new weights. Use it on models with LayerNorm: BERT-like ones, ViT."
        )
    return names


def _blocks(model: nn.Module, blocks: int) -> list[str]:
    """Paths of the last blocks: the list of modules of one kind that holds the most parameters."""
    found: list[tuple[int, list[str]]] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            children = [(child_path(path, name), child) for name, child in module.named_children()]
            if len(children) >= 2 and len({type(child) for _, child in children}) == 1:
                found.append((_size(module), [name for name, _ in children]))
    size, names = max(found, default=(0, []))
    # Embeddings, of which a small BERT has more than of anything else, do not count; stages of blocks are no blocks.
    if not names or 10 * size < _size(model) or any(_is_stage(model.get_submodule(name)) for name in names):
        raise HeadError(
            f"reinit_top={blocks}: the blocks of {type(model).__name__} do not stand in one list, so which are its top "
            "blocks is unknown. It works for BERT-like models and ViT."
        )
    if blocks >= len(names):
        raise HeadError(
            f"reinit_top={blocks}: {type(model).__name__} has {len(names)} blocks, and one at least must stay "
            "pretrained. Give a smaller number."
        )
    return names[-blocks:]


def _is_stage(module: nn.Module) -> bool:
    """Whether a module holds a list of composite modules of one kind, as the stages of ConvNeXt and Swin do."""
    lists = [list(m.children()) for m in module.modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
    return any(
        children and len({type(child) for child in children}) == 1 and any(True for _ in children[0].children())
        for children in lists
    )


def _size(module: nn.Module) -> int:
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    return sum(p.numel() for p in module.parameters() if id(p) not in tables)


def _keeps_statistics(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
