"""The preprocessing that a backbone was trained with, stated as headinit's own values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from headinit.data.images import ImagePreprocessing
from headinit.data.text import TextPreprocessing
from headinit.errors import ConfigError, WeightsError

_PIL_NAMES = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
_DEFAULT_LENGTH = 128


def torchvision_preprocessing(transforms: Any, image_size: int | None) -> ImagePreprocessing:
    """From ``weights.transforms()``: resize the shorter side, crop at the centre.

    Args:
        transforms: torchvision's preset; None gives its usual one (256, 224).
        image_size: another side of the crop; the resize follows in proportion.
    """
    if transforms is None:
        return _centre_crop(image_size or 224, 256 / 224, "bilinear")
    crop, resize = transforms.crop_size[0], transforms.resize_size[0]
    side = image_size or crop
    return ImagePreprocessing(
        size=(side, side),
        resize=resize if side == crop else round(side * resize / crop),
        crop=(side, side),
        interpolation=transforms.interpolation.value,
        mean=_three(transforms.mean),
        std=_three(transforms.std),
    )


def timm_preprocessing(data_config: Mapping[str, Any], image_size: int | None) -> ImagePreprocessing:
    """From timm's ``resolve_model_data_config``: its evaluation transform for each crop mode.

    Args:
        data_config: ``input_size``, ``crop_pct``, ``crop_mode``, ``interpolation``, ``mean``, ``std``.
        image_size: another side than the one in the configuration.

    Raises:
        ConfigError: the model wants pictures that do not have three channels.
    """
    channels, height, width = data_config["input_size"]
    if channels != 3:
        raise ConfigError(f"This timm model wants pictures with {channels} channels; headinit prepares RGB pictures.")
    if image_size is not None:
        height = width = image_size
    scaled = (math.floor(height / data_config["crop_pct"]), math.floor(width / data_config["crop_pct"]))
    mode = data_config.get("crop_mode", "center")
    interpolation = data_config["interpolation"]
    keeps_ratio = mode not in ("squash", "border")
    return ImagePreprocessing(
        size=(height, width),
        resize=scaled[0] if keeps_ratio and scaled[0] == scaled[1] else scaled,
        crop=(height, width),
        interpolation="bicubic" if interpolation == "random" else interpolation,
        mean=_three(data_config["mean"]),
        std=_three(data_config["std"]),
        fit={"squash": "exact", "border": "contain"}.get(mode, "exact" if scaled[0] == scaled[1] else "cover"),
    )


def processor_preprocessing(folder: Path, image_size: int | None) -> ImagePreprocessing:
    """From the image processor of a transformers folder (``preprocessor_config.json``).

    There are some forty classes of them with rules of their own, so what was read is compared with what the processor
    itself makes of a picture.

    Raises:
        WeightsError: the folder has no image processor, or one that headinit cannot state.
    """
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # unreadable, unknown and code-carrying processors fail in different ways
        raise WeightsError(f"Cannot read the image processor in {folder}: {_first_line(error)}") from error
    _require_equal(_stated(processor, None, folder), processor, folder)
    return _stated(processor, image_size, folder)


def _stated(processor: Any, image_size: int | None, folder: Path) -> ImagePreprocessing:
    size = {name: value for name, value in dict(getattr(processor, "size", None) or {}).items() if value}
    mean, std = _scaled_statistics(processor)
    common: dict[str, Any] = {"interpolation": _interpolation(processor), "mean": mean, "std": std}
    common["crop_rounding"] = "down"
    crop_pct = getattr(processor, "crop_pct", None)
    kind = type(processor).__name__
    if kind.startswith("ConvNext") and "shortest_edge" in size:
        # Below 384 pixels ConvNeXt resizes larger and crops, from there on it squashes.
        side = image_size or size["shortest_edge"]
        if side >= 384:
            return ImagePreprocessing(size=(side, side), resize=(side, side), **common)
        return ImagePreprocessing(
            size=(side, side), resize=int(side / (crop_pct or 0.875)), crop=(side, side), **common
        )
    crop = dict(getattr(processor, "crop_size", None) or {}) if getattr(processor, "do_center_crop", False) else {}
    if kind.startswith("Levit") and "shortest_edge" in size:
        size = {"shortest_edge": int(256 / 224 * size["shortest_edge"])}
    elif kind.startswith("PoolFormer") and crop_pct:
        size = {"shortest_edge": int(size.get("shortest_edge", size.get("height", 0)) / crop_pct)}
    return _from_size(size, crop, image_size, common, folder)


def _require_equal(ours: ImagePreprocessing, processor: Any, folder: Path) -> None:
    """Compare with the processor on a wide and a tall picture, within the rounding of a few grey levels."""
    # Their resize works on tensors and ours on pictures: intermediate values round differently.
    tolerance = 3.0 / 255 / min(ours.std)
    for width, height in ((90, 131), (131, 90)):
        x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
        pixels = np.stack([x, y, 127 + 100 * np.sin(x / 9)], axis=2).astype(np.uint8)
        try:
            theirs = processor(Image.fromarray(pixels), return_tensors="pt").get("pixel_values")
        except Exception as error:  # each class has its own way to refuse
            raise WeightsError(f"{type(processor).__name__} in {folder} does not work: {_first_line(error)}") from error
        if theirs is None or theirs.shape[1:] != (3, *ours.size):
            found = "no pixel_values" if theirs is None else f"pictures of shape {tuple(theirs.shape[1:])}"
            raise WeightsError(f"{type(processor).__name__} in {folder} gives {found}; headinit cannot state it.")
        if float((theirs[0].float() - ours(pixels)).abs().max()) > tolerance:
            raise WeightsError(
                f"{type(processor).__name__} in {folder} prepares pictures in a way of its own (such as BGR channels) "
                "that headinit cannot state. timm and torchvision have most of these models too."
            )


def _from_size(
    size: Mapping[str, int], crop: Mapping[str, Any], image_size: int | None, common: dict[str, Any], folder: Path
) -> ImagePreprocessing:
    if "shortest_edge" in size:
        resize: int | tuple[int, int] = size["shortest_edge"]
    elif "height" in size and "width" in size:
        resize = (size["height"], size["width"])
    else:
        raise WeightsError(f"The image processor in {folder} resizes in a way headinit cannot state: {dict(size)}.")
    side = resize if isinstance(resize, int) else resize[0]
    target = (crop["height"], crop["width"]) if crop.get("height") else None
    if target is None:
        target = (side, side) if isinstance(resize, int) else resize
    if image_size is not None:
        factor = image_size / target[0]
        resize = round(resize * factor) if isinstance(resize, int) else (round(resize[0] * factor),) * 2
        target = (image_size, image_size)
    return ImagePreprocessing(size=target, resize=resize, crop=None if resize == target else target, **common)


def _interpolation(processor: Any) -> str:
    resample = getattr(processor, "resample", None)
    return _PIL_NAMES.get(int(resample), "bicubic") if resample is not None else "bilinear"


def _scaled_statistics(processor: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std for pixels scaled to 0..1, whatever range the processor scales to.

    With pixels ``p / 255`` and its own factor f and offset o, ``(p f - o - mean) / std`` is
    ``(p / 255 - (mean + o) / k) / (std / k)`` where ``k = 255 f``.
    """
    normalised = getattr(processor, "do_normalize", True)
    mean = tuple(processor.image_mean) if normalised and processor.image_mean is not None else (0.0,) * 3
    std = tuple(processor.image_std) if normalised and processor.image_std is not None else (1.0,) * 3
    factor = getattr(processor, "rescale_factor", 1 / 255) if getattr(processor, "do_rescale", True) else 1.0
    offset = 1.0 if getattr(processor, "rescale_offset", False) else 0.0
    if getattr(processor, "include_top", False):  # EfficientNet divides by the std once more for its own classifier
        std = tuple(s * s for s in std)
    k = 255 * factor
    return tuple((m + offset) / k for m in mean), tuple(s / k for s in std)


def text_preprocessing(tokenizer: Any, model: Any, max_length: int | None) -> TextPreprocessing:
    """The tokenizer with a length that the model can take; a missing padding token is the end token.

    Args:
        tokenizer: a transformers tokenizer.
        model: the transformers model; its configuration gets the padding token if it has none.
        max_length: pieces per example; None: 128, or the model's limit if that is lower.

    Raises:
        ConfigError: the model takes fewer pieces.
    """
    limit = min(tokenizer.model_max_length, position_limit(model))
    if max_length is not None and not 1 <= max_length <= limit:
        raise ConfigError(f"max_length={max_length} asked, the model takes 1 to {limit} pieces of text.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id  # GPT-like classifiers find the last piece by it
    return TextPreprocessing(tokenizer, max_length or min(_DEFAULT_LENGTH, limit))


def position_limit(model: Any) -> int:
    """How many pieces of text a transformers model has positions for (RoBERTa keeps its first two unused)."""
    longest = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(longest, int) or longest < 1:
        return 1 << 30
    for path, module in model.named_modules():
        if path.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return longest - int(module.padding_idx) - 1
    return longest


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a transformers folder.

    Raises:
        WeightsError: there is none, it is damaged, or it needs code from outside.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # unreadable, unknown and code-carrying tokenizers fail in different ways
        raise WeightsError(f"Cannot read the tokenizer in {folder}: {_first_line(error)}") from error
    # Without its files transformers makes some tokenizers EMPTY: every word would be unknown. Those that work on bytes
    # or characters name no files.
    files = {"tokenizer.json", *type(tokenizer).vocab_files_names.values()} if tokenizer.vocab_files_names else set()
    if files and not any((folder / file).is_file() for file in files):
        raise WeightsError(f"There is no tokenizer in {folder} (none of {', '.join(sorted(files))}).")
    return tokenizer


def _three(values: Any) -> tuple[float, float, float]:
    red, green, blue = values
    return float(red), float(green), float(blue)


def _centre_crop(side: int, ratio: float, interpolation: str) -> ImagePreprocessing:
    return ImagePreprocessing(
        size=(side, side), resize=round(side * ratio), crop=(side, side), interpolation=interpolation
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
