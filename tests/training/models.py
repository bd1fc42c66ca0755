"""Tiny models with a recorded head, one per library."""

from __future__ import annotations

import torch
from torch import nn

from headinit.heads.record import HeadRecord, HeadSite, set_record


def record_head(model: nn.Module, *paths: str, classes: int = 3, roles: tuple[str, ...] = ("main",)) -> nn.Module:
    """Record the modules at `paths` as the new head."""
    names = [n for n, _ in model.named_parameters() if any(n.startswith(f"{path}.") for path in paths)]
    width = next(m.in_features for m in model.get_submodule(paths[0]).modules() if isinstance(m, nn.Linear))
    sites = tuple(HeadSite(path, "linear", width, classes, role=role) for path, role in zip(paths, roles, strict=False))
    set_record(model, HeadRecord(sites, "linear", classes, tuple(names), tuple(paths)))
    return model


def tiny_bert(layers: int = 3, classes: int = 3, dropout: float = 0.5) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=classes,
    )
    return record_head(BertForSequenceClassification(config), "classifier", classes=classes)


def bert_inputs(count: int = 4, length: int = 8) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 50, (count, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def tiny_timm(name: str, head: str | tuple[str, ...], classes: int = 3, **options: object) -> nn.Module:
    import timm

    model = timm.create_model(name, num_classes=classes, **options)
    paths = (head,) if isinstance(head, str) else head
    return record_head(model, *paths, classes=classes, roles=("main", "distilled"))


def torchvision_model(name: str, head: str, classes: int = 3, **options: object) -> nn.Module:
    import torchvision

    model = getattr(torchvision.models, name)(num_classes=classes, **options)
    return record_head(model, head, classes=classes)


class NormZoo(nn.Module):
    """Every normalisation layer that keeps statistics, and dropout in between."""

    def __init__(self) -> None:
        super().__init__()
        from timm.layers import BatchNormAct2d

        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.bn_plain = nn.BatchNorm2d(4, affine=False)
        self.bn_act = BatchNormAct2d(4)
        self.instance = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
        self.sync = nn.SyncBatchNorm(4)
        self.drop = nn.Dropout(0.5)
        self.flat = nn.BatchNorm1d(4)
        self.head = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop(self.instance(self.bn_act(self.bn_plain(self.bn(self.conv(x))))))
        # SyncBatchNorm trains on GPUs alone; in evaluation mode it is an ordinary BatchNorm.
        x = self.sync(x) if not self.sync.training or x.is_cuda else x
        return self.head(self.flat(x.mean((2, 3))))
