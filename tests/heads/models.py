"""Tiny models of each library, randomly initialised, with the layouts that matter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
DISTILBERT = {"vocab_size": 60, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24, "pad_token_id": 0}
GPT2 = {"vocab_size": 60, "n_embd": 16, "n_layer": 1, "n_head": 2, "pad_token_id": 0}


def tiny(name: str, **options: Any) -> nn.Module:
    """A transformers model of this class."""
    import transformers

    cls = getattr(transformers, name)
    sizes = DISTILBERT if name.startswith("DistilBert") else GPT2 if name.startswith("GPT2") else SIZES
    return cls(cls.config_class(**{**sizes, **options})).eval()


def tiny_vit(name: str = "ViTForImageClassification", **options: Any) -> nn.Module:
    sizes = {k: v for k, v in SIZES.items() if k not in ("vocab_size", "max_position_embeddings", "pad_token_id")}
    return tiny(name, **{**sizes, "image_size": 32, "patch_size": 16, **options})


def tokens(rows: int = 4, length: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 60, (rows, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def pictures(rows: int = 2, size: int = 64) -> Tensor:
    return torch.rand(rows, 3, size, size, generator=torch.Generator().manual_seed(1))


def perceptron(inputs: int = 8, classes: int = 5) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, classes))
