"""Pictures: read from any common file, and prepared exactly as the backbone was trained to see them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from headinit.data.augmentation import AUGMENTATIONS, random_crop, random_resized_crop, trivial_augment
from headinit.errors import DataError, unknown_name
from headinit.seeding import generator_for

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}
FITS = ("exact", "cover", "contain")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ImagePreprocessing:
    """How a backbone wants its pictures: resize through PIL (with antialiasing), crop at the centre, normalise.

    States the evaluation transforms of torchvision, timm and transformers exactly. Called with a picture it gives a
    `(3, H, W)` float32 tensor, bit for bit what torchvision's and timm's own transforms give.

    Attributes:
        size: `(H, W)` of what the backbone sees.
        resize: int: the shorter side becomes this long, the aspect ratio stays; `(h, w)`: see `fit`; None: to `size`.
        crop: `(h, w)` cut out at the centre (missing borders are padded); None: no crop. Follows from `size` after a
            resize that keeps the aspect ratio.
        interpolation: one of nearest, bilinear, bicubic, lanczos, box, hamming.
        mean, std: 3 values each, for pixels scaled to 0..1.
        fit: how a pair `resize` is met: ``"exact"`` (aspect ratio ignored; timm's squash), ``"cover"`` (the smallest
            size that covers it), ``"contain"`` (the largest inside it, borders filled with the mean; timm's border).
        crop_rounding: where a centre crop of odd excess starts: ``"nearest"`` (torchvision, timm) or ``"down"``
            (transformers).

    Raises:
        DataError: a field has a value that cannot be.

    Example:
        >>> preprocessing = ImagePreprocessing(size=(224, 224), resize=256, interpolation="bicubic")
        >>> preprocessing(Image.new("RGB", (640, 480), "red")).shape
        torch.Size([3, 224, 224])
    """

    size: tuple[int, int] = (224, 224)
    resize: int | tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    interpolation: str = "bilinear"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    fit: str = "exact"
    crop_rounding: str = "nearest"

    modality: ClassVar[str] = "image"

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "size", _pair(self.size, "size"))
        put(self, "mean", tuple(float(v) for v in self.mean))
        put(self, "std", tuple(float(v) for v in self.std))
        if self.resize is None:
            put(self, "resize", self.size)
        elif not isinstance(self.resize, int):
            put(self, "resize", _pair(self.resize, "resize"))
        if self.crop is not None:
            put(self, "crop", _pair(self.crop, "crop"))
        elif isinstance(self.resize, int) or self.fit != "exact":
            put(self, "crop", self.size)
        self._check()

    def _check(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            raise unknown_name("interpolation", self.interpolation, INTERPOLATIONS, DataError)
        if self.fit not in FITS:
            raise unknown_name("fit", self.fit, FITS, DataError)
        if self.crop_rounding not in ("nearest", "down"):
            raise unknown_name("crop_rounding", self.crop_rounding, ("nearest", "down"), DataError)
        given = self.crop if self.crop is not None else self.resize
        if given != self.size:
            raise DataError(
                f"Preprocessing ends at {given} but size is {self.size}: make resize or crop equal to size."
            )
        if isinstance(self.resize, int) and self.resize < 1:
            raise DataError(f"resize must be at least 1 pixel, got {self.resize}.")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise DataError(f"mean and std must hold 3 values, std above 0: got mean={self.mean}, std={self.std}.")

    @classmethod
    def from_dict(cls, fields_given: Mapping[str, Any]) -> ImagePreprocessing:
        """The inverse of `to_dict`, also after a round trip through JSON.

        Raises:
            DataError: an unknown field.
        """
        known = [field.name for field in fields(cls)]
        for name in fields_given:
            if name not in known:
                raise unknown_name("preprocessing field", name, known, DataError)
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields_given.items()}
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values that JSON can hold.

        Example:
            >>> ImagePreprocessing.from_dict(ImagePreprocessing(resize=256).to_dict()).resize
            256
        """
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def __call__(self, picture: Any) -> Tensor:
        """A picture (anything `to_rgb` takes) as the backbone sees it: `(3, H, W)` float32."""
        return self.normalise(self.pixels(picture))

    def pixels(self, picture: Any) -> Tensor:
        """The picture resized and cropped, not yet normalised: `(3, H, W)` uint8."""
        return _tensor_of(self._cropped(self._resized(to_rgb(picture))))

    def augmented(self, picture: Any, kind: str, seed: int) -> Tensor:
        """The picture with a random augmentation, normalised: `(3, H, W)` float32. The same seed gives the same bits.

        Args:
            picture: anything `to_rgb` takes.
            kind: ``"none"``; ``"crop"`` (resized to 32 pixels more than needed, a random part, horizontal flip);
                ``"basic"`` (random resized crop of 8 % to 100 % of the area, horizontal flip);
                ``"trivial_augment"`` (basic, then TrivialAugmentWide, https://arxiv.org/abs/2103.10158).
            seed: decides all random choices; the global generators are not touched.

        Raises:
            DataError: an unknown kind.

        Example:
            >>> picture = Image.effect_noise((64, 48), 50)
            >>> a, b = (ImagePreprocessing(size=(32, 32)).augmented(picture, "basic", seed=3) for _ in range(2))
            >>> torch.equal(a, b)
            True
        """
        return self.normalise(self.augmented_pixels(picture, kind, seed))

    def augmented_pixels(self, picture: Any, kind: str, seed: int) -> Tensor:
        """As `augmented`, not yet normalised: `(3, H, W)` uint8."""
        if kind not in AUGMENTATIONS:
            raise unknown_name("augmentation", kind, AUGMENTATIONS, DataError)
        if kind == "none":
            return self.pixels(picture)
        generator = generator_for(seed, "augmentation")
        interpolation = INTERPOLATIONS[self.interpolation]
        if kind == "crop":
            return _tensor_of(random_crop(to_rgb(picture), self.size, interpolation, generator))
        image = random_resized_crop(to_rgb(picture), self.size, interpolation, generator)
        return _tensor_of(trivial_augment(image, generator) if kind == "trivial_augment" else image)

    def normalise(self, pixels: Tensor) -> Tensor:
        """``(pixels / 255 - mean) / std``: `(..., 3, H, W)` uint8 to float32 of the same shape."""
        mean, std = (torch.tensor(v, dtype=torch.float32).view(3, 1, 1) for v in (self.mean, self.std))
        return pixels.to(torch.float32).div_(255).sub_(mean).div_(std)

    def _resized(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        target: tuple[int, int]
        if isinstance(self.resize, int):
            longer = int(self.resize * max(width, height) / min(width, height))
            target = (self.resize, longer) if width <= height else (longer, self.resize)
        else:
            assert self.resize is not None  # set in __post_init__
            target = (self.resize[1], self.resize[0])
            if self.fit != "exact":
                ratios = (height / self.resize[0], width / self.resize[1])
                ratio = min(ratios) if self.fit == "cover" else max(ratios)
                target = (max(1, round(width / ratio)), max(1, round(height / ratio)))
        return image if target == image.size else image.resize(target, INTERPOLATIONS[self.interpolation])

    def _cropped(self, image: Image.Image) -> Image.Image:
        if self.crop is None or self.crop == (image.height, image.width):
            return image
        height, width = self.crop
        fill = tuple(round(255 * v) for v in self.mean) if self.fit == "contain" else (0, 0, 0)
        if width > image.width or height > image.height:
            left, top = max(0, (width - image.width) // 2), max(0, (height - image.height) // 2)
            padded = Image.new("RGB", (max(width, image.width), max(height, image.height)), fill)
            padded.paste(image, (left, top))
            image = padded
        rounded = round if self.crop_rounding == "nearest" else math.floor
        top, left = rounded((image.height - height) / 2), rounded((image.width - width) / 2)
        return image.crop((left, top, left + width, top + height))


def to_rgb(picture: Any) -> Image.Image:
    """Any picture as 8-bit RGB, upright.

    Args:
        picture: a path, a `PIL.Image` of any mode, or a uint8 array `(H, W)`, `(H, W, 1)` or `(H, W, 3)`.

    EXIF orientation is applied; palettes, CMYK and grey become RGB; 16-bit grey is scaled (65535 becomes 255); an alpha
    channel is dropped, as torchvision, timm and transformers do; of an animation the first frame is taken.

    Raises:
        DataError: the file cannot be decoded, the array has another shape or type, or the pixels are floating-point.

    Example:
        >>> to_rgb(np.full((4, 6), 128, dtype=np.uint8)).getpixel((0, 0))
        (128, 128, 128)
    """
    if isinstance(picture, (str, Path)):
        try:
            with Image.open(picture) as opened:
                return to_rgb(opened)
        except DataError:
            raise
        except Exception as error:  # decoders of damaged files raise anything from struct.error to MemoryError
            reason = (
                "is not a picture" if isinstance(error, Image.UnidentifiedImageError) else str(error) or repr(error)
            )
            raise DataError(f"Cannot read picture {picture}: {reason}.") from error
    if isinstance(picture, np.ndarray):
        picture = _image_of(picture)
    if not isinstance(picture, Image.Image):
        raise DataError(f"Expected a picture (path, PIL image or uint8 array), found {type(picture).__name__}.")
    picture = ImageOps.exif_transpose(picture)
    if picture.mode == "F":
        raise DataError("Pictures with floating-point pixels have no fixed range: convert them to 8 or 16 bits.")
    if picture.mode.startswith("I"):
        picture = _eight_bit(picture)
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _image_of(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)):
        raise DataError(f"Expected a uint8 array (H, W) or (H, W, 3), found {array.dtype} {array.shape}.")
    return Image.fromarray(np.ascontiguousarray(array))


def _eight_bit(picture: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey: ``value / 257``, rounded (PIL's own conversion clips everything above 255)."""
    values = np.asarray(picture).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise DataError(
            f"Grey values from {values.min()} to {values.max()} exceed 16 bits: convert the picture to 8 bits."
        )
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _tensor_of(image: Image.Image) -> Tensor:
    # A copy: PIL's buffer is read-only. contiguous() so that stacking batches is a plain copy.
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()


def _pair(value: Any, what: str) -> tuple[int, int]:
    if isinstance(value, int):
        value = (value, value)
    if not (isinstance(value, Sequence) and len(value) == 2 and all(isinstance(v, int) and v >= 1 for v in value)):
        raise DataError(f"{what} must be a pair of whole numbers (height, width), got {value!r}.")
    return int(value[0]), int(value[1])
