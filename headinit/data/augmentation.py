"""Random changes of training pictures, each decided by a generator of its own (threads may run them side by side)."""

from __future__ import annotations

import math

import torch
from PIL import Image, ImageEnhance, ImageOps

AUGMENTATIONS = ("none", "crop", "basic", "trivial_augment")

CROP_MARGIN = 32  # pixels that "crop" has to choose among, as 256 to 224, 160 to 128 and 512 to 480 in common recipes

MAGNITUDES = 31  # levels of TrivialAugmentWide
# operation: (largest magnitude, whether it has a sign)
TRIVIAL_OPERATIONS: dict[str, tuple[float, bool]] = {
    "identity": (0.0, False),
    "shear_x": (0.99, True),
    "shear_y": (0.99, True),
    "translate_x": (32.0, True),
    "translate_y": (32.0, True),
    "rotate": (135.0, True),
    "brightness": (0.99, True),
    "colour": (0.99, True),
    "contrast": (0.99, True),
    "sharpness": (0.99, True),
    "posterise": (6.0, False),
    "solarise": (255.0, False),
    "autocontrast": (0.0, False),
    "equalise": (0.0, False),
}
_ENHANCERS = {
    "brightness": ImageEnhance.Brightness,
    "colour": ImageEnhance.Color,
    "contrast": ImageEnhance.Contrast,
    "sharpness": ImageEnhance.Sharpness,
}


def random_resized_crop(
    image: Image.Image,
    size: tuple[int, int],
    interpolation: Image.Resampling,
    generator: torch.Generator,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Image.Image:
    """A random part of a picture, resized to `size` (H, W), and mirrored half of the time.

    The part has a uniform share of the area and a log-uniform aspect ratio ("Going deeper with convolutions",
    https://arxiv.org/abs/1409.4842; the settings of torchvision's ``RandomResizedCrop``).

    Example:
        >>> random_resized_crop(Image.new("RGB", (9, 9)), (4, 6), Image.Resampling.BILINEAR, torch.Generator()).size
        (6, 4)
    """
    left, top, width, height = random_crop_box(image.size, generator, scale, ratio)
    cropped = image.crop((left, top, left + width, top + height))
    resized = cropped.resize((size[1], size[0]), interpolation)
    return ImageOps.mirror(resized) if torch.rand((), generator=generator) < 0.5 else resized


def random_crop(
    image: Image.Image, size: tuple[int, int], interpolation: Image.Resampling, generator: torch.Generator
) -> Image.Image:
    """A picture resized to `CROP_MARGIN` pixels more than `size` (H, W), a random part of that size, mirrored or not.

    The milder augmentation of BiT (Kolesnikov et al., 2020): everything stays in view but a margin.

    Example:
        >>> random_crop(Image.new("RGB", (9, 9)), (4, 6), Image.Resampling.BILINEAR, torch.Generator()).size
        (6, 4)
    """
    height, width = size
    resized = image.resize((width + CROP_MARGIN, height + CROP_MARGIN), interpolation)
    left, top = torch.randint(CROP_MARGIN + 1, (2,), generator=generator).tolist()
    cropped = resized.crop((left, top, left + width, top + height))
    return ImageOps.mirror(cropped) if torch.rand((), generator=generator) < 0.5 else cropped


def random_crop_box(
    size: tuple[int, int], generator: torch.Generator, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """`(left, top, width, height)` inside a picture of `size` (width, height); its centre after ten misses."""
    full_width, full_height = size
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area_draw, ratio_draw = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        area = full_width * full_height * (scale[0] + (scale[1] - scale[0]) * area_draw)
        aspect = math.exp(log_low + (log_high - log_low) * ratio_draw)
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= full_width and 0 < height <= full_height:
            left = int(torch.randint(full_width - width + 1, (), generator=generator))
            top = int(torch.randint(full_height - height + 1, (), generator=generator))
            return left, top, width, height
    width, height = full_width, full_height
    if full_width / full_height < ratio[0]:
        height = round(full_width / ratio[0])
    elif full_width / full_height > ratio[1]:
        width = round(full_height * ratio[1])
    return (full_width - width) // 2, (full_height - height) // 2, width, height


def trivial_augment(image: Image.Image, generator: torch.Generator) -> Image.Image:
    """One operation at one strength, both drawn uniformly: TrivialAugmentWide (https://arxiv.org/abs/2103.10158).

    Example:
        >>> trivial_augment(Image.new("RGB", (8, 8), "red"), torch.Generator().manual_seed(0)).size
        (8, 8)
    """
    names = list(TRIVIAL_OPERATIONS)
    operation = names[int(torch.randint(len(names), (), generator=generator))]
    level = int(torch.randint(MAGNITUDES, (), generator=generator))
    negative = bool(torch.randint(2, (), generator=generator))
    return apply_operation(image, operation, trivial_magnitude(operation, level, negative))


def trivial_magnitude(operation: str, level: int, negative: bool) -> float:
    """The strength of an operation at one of the 31 levels; posterise counts bits kept, solarise the threshold."""
    largest, signed = TRIVIAL_OPERATIONS[operation]
    magnitude = largest * level / (MAGNITUDES - 1)
    if operation == "posterise":
        return 8 - round(magnitude)
    if operation == "solarise":
        return largest - magnitude
    return -magnitude if signed and negative else magnitude


def apply_operation(image: Image.Image, operation: str, magnitude: float) -> Image.Image:
    """One operation of TrivialAugment on an RGB picture; what comes from outside the picture is black."""
    if operation in _ENHANCERS:
        return _ENHANCERS[operation](image).enhance(1 + magnitude)
    if operation == "rotate":
        return image.rotate(magnitude, Image.Resampling.NEAREST)
    if operation in ("shear_x", "shear_y", "translate_x", "translate_y"):
        # The inverse map from the output to the input, taken at the centre of each pixel, as PIL does.
        matrix = {
            "shear_x": (1, magnitude, 0, 0, 1, 0),
            "shear_y": (1, 0, 0, magnitude, 1, 0),
            "translate_x": (1, 0, -int(magnitude), 0, 1, 0),
            "translate_y": (1, 0, 0, 0, 1, -int(magnitude)),
        }[operation]
        return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)
    if operation == "posterise":
        return ImageOps.posterize(image, int(magnitude))
    if operation == "solarise":
        return ImageOps.solarize(image, magnitude)  # type: ignore[arg-type]  # a fractional threshold is fine
    if operation == "autocontrast":
        return ImageOps.autocontrast(image)
    return ImageOps.equalize(image) if operation == "equalise" else image
