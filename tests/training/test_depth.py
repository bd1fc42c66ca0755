from __future__ import annotations

import pytest
import torch
from torch import nn

from headinit.training.depth import parameter_depths


def _torchvision(name: str, **options: object) -> nn.Module:
    import torchvision

    return getattr(torchvision.models, name)(**options)


def _transformers(name: str, **options: object) -> nn.Module:
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    config = getattr(transformers, f"{name}Config")(**{**sizes, **options})
    return getattr(transformers, f"{name}ForSequenceClassification")(config)


# Model, its head, numbers of stages and of blocks by their papers, and depths of some modules among the blocks.
CASES = {
    "resnet50": (lambda: _torchvision("resnet50"), "fc", 4, 16, {"conv1": 0, "layer1.0": 1, "layer4.2": 16}),
    "convnext_tiny": (
        lambda: _torchvision("convnext_tiny"),
        "classifier.2",
        4,
        18,
        {"features.0": 0, "features.1.0": 1, "features.2": 4, "features.7.2": 18, "classifier.0": 18},
    ),
    "swin_t": (lambda: _torchvision("swin_t"), "head", 4, 12, {"features.0": 0, "features.7.1": 12, "norm": 12}),
    "vit_b_32": (
        lambda: _torchvision("vit_b_32"),
        "heads.head",
        12,
        12,
        {"conv_proj": 0, "encoder.layers.encoder_layer_3": 4, "encoder.ln": 12},
    ),
    "efficientnet_b0": (
        lambda: _torchvision("efficientnet_b0"),
        "classifier.1",
        7,
        16,
        {"features.0": 0, "features.7": 16, "features.8": 16},
    ),
    "densenet121": (
        lambda: _torchvision("densenet121"),
        "classifier",
        4,
        58,
        {"features.conv0": 0, "features.denseblock1.denselayer1": 1, "features.norm5": 58},
    ),
    "mnasnet1_0": (lambda: _torchvision("mnasnet1_0"), "classifier.1", 6, 16, {"layers.0": 0, "layers.8.0": 1}),
    "googlenet": (lambda: _torchvision("googlenet", init_weights=False), "fc", 12, 12, {"conv1": 1, "inception5b": 12}),
    "Bert": (
        lambda: _transformers("Bert"),
        "classifier",
        3,
        3,
        {"bert.embeddings": 0, "bert.encoder.layer.0": 1, "bert.pooler": 3},
    ),
    "DebertaV2": (
        lambda: _transformers("DebertaV2", relative_attention=True, norm_rel_ebd="layer_norm", position_buckets=4),
        "classifier",
        3,
        3,
        {
            "deberta.encoder.rel_embeddings": 0,
            "deberta.encoder.LayerNorm": 0,
            "deberta.encoder.layer.2": 3,
            "pooler": 3,
        },
    ),
    "MPNet": (
        lambda: _transformers("MPNet"),
        "classifier",
        3,
        3,
        {"mpnet.encoder.relative_attention_bias": 0, "mpnet.encoder.layer.2": 3},
    ),
    "Albert": (
        lambda: _transformers("Albert", embedding_size=16),
        "classifier",
        1,
        1,
        {"albert.embeddings": 0, "albert.encoder.albert_layer_groups": 1, "albert.pooler": 1},
    ),
    "Llama": (lambda: _transformers("Llama"), "score", 3, 3, {"model.embed_tokens": 0, "model.norm": 3}),
}


@pytest.mark.parametrize("name", CASES)
def test_depths(name: str) -> None:
    build, head, stages, blocks, some = CASES[name]
    with torch.device("meta"):
        model = build()
    new = {n for n, _ in model.named_parameters() if n.startswith(f"{head}.")}
    depths = parameter_depths(model, new)
    assert parameter_depths(model, new, coarse=True).count == stages
    assert depths.count == blocks
    assert depths.of.keys() == {n for n, _ in model.named_parameters()} - new
    assert set(depths.of.values()) - {0} == set(range(1, blocks + 1))
    for path, depth in some.items():
        assert {d for n, d in depths.of.items() if n.startswith(f"{path}.")} == {depth}, path


def test_depth_of_timm_is_timms_own() -> None:
    import timm
    from timm.models import group_parameters

    for name in ("test_vit", "test_convnext", "test_efficientnet", "levit_128s"):
        model = timm.create_model(name)
        theirs = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
        ours = parameter_depths(model)
        classifier = max(theirs.values())
        assert ours.count == classifier - 1
        assert {n: d for n, d in ours.of.items() if theirs[n] < classifier} == {
            n: d for n, d in theirs.items() if d < classifier
        }
