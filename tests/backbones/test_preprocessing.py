"""The libraries' own evaluation transforms are the oracle, over their whole registries."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from headinit.backbones.preprocessing import (
    processor_preprocessing,
    timm_preprocessing,
    torchvision_preprocessing,
)
from headinit.errors import ConfigError, WeightsError


def picture(width: int, height: int) -> Image.Image:
    """Smooth colours with some noise: resizing it differently shows."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    noise = np.random.default_rng(0).integers(-20, 20, (height, width))
    pixels = np.stack([x, y, 127 + 60 * np.sin(x / 9) + noise], axis=2)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


PICTURES = [picture(90, 131), picture(161, 100)]


def test_torchvision_every_published_weight():
    import torchvision

    seen = set()
    for name in torchvision.models.list_models(module=torchvision.models):
        for weights in torchvision.models.get_model_weights(name):
            transforms = weights.transforms()
            if repr(transforms) in seen:
                continue
            seen.add(repr(transforms))
            ours = torchvision_preprocessing(transforms, None)
            for image in PICTURES:
                torch.testing.assert_close(ours(image), transforms(image), rtol=0, atol=0, msg=f"{weights}")
    assert len(seen) > 10


def timm_presets() -> list[dict]:
    import timm
    from timm.data import resolve_data_config

    presets = {}
    for name in timm.list_pretrained():
        settings = timm.get_pretrained_cfg(name).to_dict()
        preset = resolve_data_config(pretrained_cfg=settings)
        presets[repr(sorted(preset.items()))] = preset
    return list(presets.values())


@pytest.mark.slow
def test_timm_every_published_weight():
    from timm.data import create_transform

    presets = timm_presets()
    assert len(presets) > 50
    for preset in presets:
        if preset["input_size"][0] != 3:
            with pytest.raises(ConfigError, match="channels"):
                timm_preprocessing(preset, None)
            continue
        ours, theirs = timm_preprocessing(preset, None), create_transform(**preset)
        for image in PICTURES:
            torch.testing.assert_close(ours(image), theirs(image), rtol=0, atol=0, msg=f"{preset}")


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(64, 64), (48, 96)])
def test_timm_crop_modes(mode, size):
    from timm.data import create_transform

    preset = {
        "input_size": (3, *size),
        "crop_pct": 0.875,
        "crop_mode": mode,
        "interpolation": "bicubic",
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.3, 0.4),
    }
    for image in PICTURES:
        torch.testing.assert_close(timm_preprocessing(preset, None)(image), create_transform(**preset)(image))


PROCESSORS = [
    ("ViTImageProcessor", {}),
    ("ViTImageProcessor", {"do_normalize": False}),
    ("ViTImageProcessor", {"do_rescale": False}),
    ("ConvNextImageProcessor", {"size": {"shortest_edge": 224}}),
    ("ConvNextImageProcessor", {"size": {"shortest_edge": 384}}),
    ("CLIPImageProcessor", {}),
    ("DeiTImageProcessor", {}),
    ("BeitImageProcessor", {}),
    ("BitImageProcessor", {}),
    ("PoolFormerImageProcessor", {}),
    ("EfficientNetImageProcessor", {}),
    ("EfficientNetImageProcessor", {"include_top": False, "rescale_offset": True, "rescale_factor": 1 / 127.5}),
    ("MobileNetV2ImageProcessor", {}),
    ("LevitImageProcessor", {}),
    ("SiglipImageProcessor", {}),
]


@pytest.mark.parametrize(("kind", "options"), PROCESSORS, ids=[f"{k}-{i}" for i, (k, _) in enumerate(PROCESSORS)])
def test_transformers_processors(tmp_path, kind, options):
    import transformers

    processor = getattr(transformers, kind)(**options)
    processor.save_pretrained(tmp_path)
    ours = processor_preprocessing(tmp_path, None)
    for image in PICTURES:
        theirs = processor(image, return_tensors="pt")["pixel_values"][0].float()
        # They resize tensors and we pictures: intermediate roundings differ by a grey level or two.
        level = 1 / 255 / min(ours.std) if options.get("do_rescale", True) else 1 / min(ours.std) / 255
        assert ours(image).shape == theirs.shape
        assert (ours(image) - theirs).abs().max() <= 3.01 * level
        assert (ours(image) - theirs).abs().mean() <= 0.5 * level


@pytest.mark.parametrize("kind", ["MobileViTImageProcessor", "TextNetImageProcessor", "PerceiverImageProcessor"])
def test_a_processor_that_cannot_be_stated_is_refused_rather_than_approximated(tmp_path, kind):
    import transformers

    getattr(transformers, kind)().save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=f"{kind} in .* headinit cannot state"):
        processor_preprocessing(tmp_path, None)


def test_an_image_processor_that_is_not_there(tmp_path):
    with pytest.raises(WeightsError, match="Cannot read the image processor"):
        processor_preprocessing(tmp_path, None)


def test_another_image_size_keeps_the_proportion():
    import torchvision

    transforms = torchvision.models.ResNet50_Weights.IMAGENET1K_V2.transforms()
    assert torchvision_preprocessing(transforms, 448).resize == 464
    assert torchvision_preprocessing(None, 112).resize == 128
