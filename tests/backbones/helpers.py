"""Tiny models on disk, as users and libraries leave them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]


def torchvision_model(name: str = "resnet18", seed: int = 3, **options) -> nn.Module:
    from torchvision.models import get_model

    torch.manual_seed(seed)
    return get_model(name, weights=None, **options)


def timm_model(name: str = "test_resnet", seed: int = 3, **options) -> nn.Module:
    import timm

    torch.manual_seed(seed)
    return timm.create_model(name, **options)


def bert_config(**changes):
    from transformers import BertConfig

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return BertConfig(**{"vocab_size": len(VOCABULARY), "max_position_embeddings": 40, **sizes, **changes})


def bert_folder(folder: Path, kind: str = "BertModel", seed: int = 3, dtype=torch.float32, **changes) -> nn.Module:
    """A tiny BERT with its tokenizer, written by save_pretrained; returns the model."""
    import transformers

    torch.manual_seed(seed)
    model = getattr(transformers, kind)(bert_config(**changes)).to(dtype)
    model.save_pretrained(folder)
    add_tokenizer(folder)
    return model


def add_tokenizer(folder: Path, **changes) -> None:
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    settings = {"tokenizer_class": "BertTokenizer", "model_max_length": 40, **changes}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def assert_same(state: dict, expected: dict, *, but: tuple[str, ...] = ()) -> None:
    """Every expected tensor is there, bit for bit, except those named."""
    for name, value in expected.items():
        if name not in but:
            torch.testing.assert_close(
                state[name], value, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}"
            )
