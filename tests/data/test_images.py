from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from headinit.data.augmentation import (
    TRIVIAL_OPERATIONS,
    apply_operation,
    random_crop_box,
    random_resized_crop,
    trivial_magnitude,
)
from headinit.data.images import IMAGENET_MEAN, IMAGENET_STD, ImagePreprocessing, to_rgb
from headinit.errors import DataError

SIZES = [(100, 80), (80, 101), (333, 37), (50, 50), (301, 200), (31, 64)]
OPERATIONS_OF_TORCHVISION = (
    "Identity",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
    "Brightness",
    "Color",
    "Contrast",
    "Sharpness",
    "Posterize",
    "Solarize",
    "AutoContrast",
    "Equalize",
)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("crop", "resize"), [(48, 64), (48, 48), (70, 64)])
def test_bit_equal_to_torchvision(size, interpolation, crop, resize):
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms._presets import ImageClassification

    theirs = ImageClassification(crop_size=crop, resize_size=resize, interpolation=InterpolationMode(interpolation))
    ours = ImagePreprocessing(size=(crop, crop), resize=resize, interpolation=interpolation)
    assert torch.equal(ours(noise(*size)), theirs(noise(*size)))


def test_bit_equal_to_the_transforms_of_real_weights():
    from torchvision.models import ConvNeXt_Tiny_Weights, ResNet50_Weights

    for weights in (ResNet50_Weights.IMAGENET1K_V2, ConvNeXt_Tiny_Weights.IMAGENET1K_V1):
        theirs = weights.transforms()
        ours = ImagePreprocessing(
            size=tuple(theirs.crop_size * 2),
            resize=theirs.resize_size[0],
            interpolation=theirs.interpolation.value,
            mean=tuple(theirs.mean),
            std=tuple(theirs.std),
        )
        assert torch.equal(ours(noise(301, 200)), theirs(noise(301, 200)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("mode", "input_size", "options"),
    [
        ("center", (48, 48), {"resize": 54}),
        ("squash", (48, 48), {"resize": (54, 54), "crop": (48, 48)}),
        ("border", (48, 48), {"resize": (54, 54), "fit": "contain"}),
        ("center", (48, 40), {"resize": (54, 45), "fit": "cover"}),
    ],
)
def test_bit_equal_to_timm(size, interpolation, mode, input_size, options):
    from timm.data import create_transform

    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    theirs = create_transform(
        (3, *input_size), interpolation=interpolation, crop_pct=48 / 54, crop_mode=mode, mean=mean, std=std
    )
    ours = ImagePreprocessing(size=input_size, interpolation=interpolation, mean=mean, std=std, **options)
    assert torch.equal(ours(noise(*size)), theirs(noise(*size)))


@pytest.mark.parametrize("size", [(100, 80), (80, 101), (91, 64), (64, 67)])
def test_as_transformers_within_a_grey_level(size):
    from transformers import CLIPImageProcessor, ViTImageProcessor

    vit = ViTImageProcessor(size={"height": 48, "width": 48})
    ours = ImagePreprocessing(size=(48, 48), mean=(0.5,) * 3, std=(0.5,) * 3)
    theirs = vit(noise(*size), return_tensors="pt")["pixel_values"][0]
    assert (ours(noise(*size)) - theirs).abs().max() <= 1.01 / 255 / 0.5

    # Not resized (the shorter side fits already), so that only the place of the crop can differ.
    clip = CLIPImageProcessor(size={"shortest_edge": min(size)}, crop_size={"height": 48, "width": 48})
    ours = ImagePreprocessing(
        size=(48, 48),
        resize=min(size),
        interpolation="bicubic",
        crop_rounding="down",
        mean=tuple(clip.image_mean),
        std=tuple(clip.image_std),
    )
    theirs = clip(noise(*size), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(ours(noise(*size)), theirs, rtol=0, atol=1e-5)


def test_fields_survive_json():
    for preprocessing in (
        ImagePreprocessing(size=(224, 224), resize=256, interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3),
        ImagePreprocessing(size=(48, 40), resize=(53, 44), fit="cover", crop_rounding="down"),
        ImagePreprocessing(size=(8, 9)),
    ):
        assert ImagePreprocessing.from_dict(json.loads(json.dumps(preprocessing.to_dict()))) == preprocessing
    with pytest.raises(DataError, match="Did you mean 'interpolation'"):
        ImagePreprocessing.from_dict({"interpolaton": "bicubic"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"interpolation": "cubic"}, "bicubic"),
        ({"fit": "squash"}, "Known: contain, cover, exact"),
        ({"crop_rounding": "up"}, "crop_rounding"),
        ({"size": (224,)}, "pair of whole numbers"),
        ({"resize": (256, 256)}, "ends at"),
        ({"resize": 256, "crop": (200, 200)}, "ends at"),
        ({"resize": 0}, "at least 1"),
        ({"std": (0.0, 1.0, 1.0)}, "std above 0"),
        ({"mean": (0.5,)}, "3 values"),
    ],
)
def test_impossible_fields_are_refused(fields, message):
    with pytest.raises(DataError, match=message):
        ImagePreprocessing(**fields)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"])
def test_every_mode_becomes_rgb(mode):
    picture = noise(12, 10).convert("RGB") if mode != "LAB" else Image.new("LAB", (12, 10))
    converted = to_rgb(picture.convert("L").convert(mode) if mode in ("LA", "PA") else picture.convert(mode))
    assert (converted.mode, converted.size) == ("RGB", (12, 10))


def test_grey_stays_grey_and_alpha_is_dropped():
    assert to_rgb(np.full((4, 6, 1), 77, dtype=np.uint8)).getpixel((5, 3)) == (77, 77, 77)
    assert to_rgb(Image.new("RGBA", (2, 2), (10, 20, 30, 0))).getpixel((0, 0)) == (10, 20, 30)
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    palette.info["transparency"] = b"\x00\x00"
    assert to_rgb(palette).getpixel((0, 0)) == (9, 8, 7)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, suffix):
    values = np.array([[0, 128, 129, 257, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"deep.{suffix}")
    expected = np.rint(values / 257).astype(int)
    assert np.asarray(to_rgb(tmp_path / f"deep.{suffix}"))[:, :, 0].tolist() == expected.tolist()


def test_floating_point_pixels_and_wrong_arrays_are_refused():
    with pytest.raises(DataError, match="floating-point"):
        to_rgb(Image.new("F", (2, 2)))
    with pytest.raises(DataError, match="exceed 16 bits"):
        to_rgb(Image.fromarray(np.array([[70000]], dtype=np.int32)))
    with pytest.raises(DataError, match="float64"):
        to_rgb(np.zeros((4, 4)))
    with pytest.raises(DataError, match="found int"):
        to_rgb(3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(tmp_path, orientation):
    upright = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6) * 10)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition that a camera's tag undoes
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(np.asarray(to_rgb(tmp_path / "turned.png"))[:, :, 0], np.asarray(upright))


def test_unreadable_files_are_named(tmp_path):
    noise(40, 40).save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.jpg").write_bytes(b"")
    for name, reason in (("cut.jpg", "truncated"), ("empty.jpg", "not a picture"), ("absent.jpg", "No such file")):
        with pytest.raises(DataError, match=rf"{name}.*{reason}"):
            to_rgb(tmp_path / name)


@pytest.mark.parametrize("kind", ["none", "basic", "trivial_augment"])
def test_augmentation_follows_its_seed_alone(kind):
    preprocessing, picture = ImagePreprocessing(size=(24, 32)), noise(60, 50)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    first = [preprocessing.augmented(picture, kind, seed) for seed in range(20)]
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    torch.manual_seed(5)
    again = [preprocessing.augmented(picture, kind, seed) for seed in range(20)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert {tuple(a.shape) for a in first} == {(3, 24, 32)}
    distinct = len({a.numpy().tobytes() for a in first})
    assert distinct == (1 if kind == "none" else 20)
    with pytest.raises(DataError, match="Did you mean 'basic'"):
        preprocessing.augmented(picture, "basik", 0)


def test_random_crops_have_torchvisions_distribution():
    from torchvision.transforms import RandomResizedCrop

    generator, picture = torch.Generator().manual_seed(0), Image.new("RGB", (160, 100))
    scale, ratio = (0.08, 1.0), (3 / 4, 4 / 3)
    ours = np.array([random_crop_box((160, 100), generator, scale, ratio) for _ in range(1500)])
    theirs = np.array([RandomResizedCrop.get_params(picture, list(scale), list(ratio)) for _ in range(1500)])
    for mine, other in (
        (0, 1),
        (1, 0),
        (2, 3),
        (3, 2),
    ):  # (left, top, width, height) against (top, left, height, width)
        assert stats.ks_2samp(ours[:, mine], theirs[:, other]).pvalue > 1e-3
    assert (ours[:, 0] + ours[:, 2]).max() <= 160
    assert (ours[:, 1] + ours[:, 3]).max() <= 100


@pytest.mark.parametrize("size", [(1000, 3), (3, 1000)])
def test_crops_of_extreme_pictures_take_the_centre_as_torchvision_does(size):
    from torchvision.transforms import RandomResizedCrop

    top, left, height, width = RandomResizedCrop.get_params(Image.new("RGB", size), [0.9, 1.0], [3 / 4, 4 / 3])
    box = random_crop_box(size, torch.Generator(), (0.9, 1.0), (3 / 4, 4 / 3))
    assert box == (left, top, width, height)


def test_half_of_the_crops_are_mirrored():
    gradient = Image.fromarray(np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))).convert("RGB")
    generator = torch.Generator().manual_seed(0)
    crops = [random_resized_crop(gradient, (16, 16), Image.Resampling.BILINEAR, generator) for _ in range(400)]
    mirrored = sum(crop.getpixel((0, 8))[0] > crop.getpixel((15, 8))[0] for crop in crops)
    assert 160 < mirrored < 240  # 4 standard deviations


@pytest.mark.parametrize(("ours", "theirs"), list(zip(TRIVIAL_OPERATIONS, OPERATIONS_OF_TORCHVISION, strict=True)))
def test_operations_are_torchvisions(ours, theirs):
    from torchvision.transforms import InterpolationMode, TrivialAugmentWide
    from torchvision.transforms.autoaugment import _apply_op

    picture = noise(37, 50)
    magnitudes, signed = TrivialAugmentWide()._augmentation_space(31)[theirs]
    for level in (0, 1, 10, 15, 29, 30):
        for sign in (1, -1) if signed else (1,):
            magnitude = sign * float(magnitudes[level]) if magnitudes.ndim else 0.0
            assert trivial_magnitude(ours, level, sign < 0) == pytest.approx(magnitude, abs=1e-4)
            expected = _apply_op(picture, theirs, magnitude, InterpolationMode.NEAREST, None)
            assert np.array_equal(np.asarray(apply_operation(picture, ours, magnitude)), np.asarray(expected))


def test_imagenet_statistics_are_timms():
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    assert (IMAGENET_MEAN, IMAGENET_STD) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
