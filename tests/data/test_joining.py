"""Training on validation examples too, and the milder crop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from headinit.data.augmentation import CROP_MARGIN
from headinit.data.catalog import load_data
from headinit.data.images import ImagePreprocessing
from headinit.errors import DataError


def test_joined_training_examples_are_those_of_both_parts() -> None:
    apart, together = load_data("digits"), load_data("digits", join_validation=True)
    assert list(together.train.names) == [*apart.train.names, *apart.validation.names]
    assert torch.equal(together.train.labels, torch.cat([apart.train.labels, apart.validation.labels]))
    assert np.array_equal(together.train.items[len(apart.train)], apart.validation.items[0])
    assert together.fingerprint != apart.fingerprint
    few = load_data("digits", join_validation=True, per_class=2)
    assert len(few.train) == 20


def test_without_a_test_split_nothing_unseen_would_be_left(picture_folder: Path) -> None:
    with pytest.raises(DataError, match="no test split"):
        load_data("imagefolder", root=picture_folder / "train", join_validation=True)


def test_the_crop_is_a_part_of_the_enlarged_picture() -> None:
    picture = Image.effect_noise((50, 40), 80).convert("RGB")
    preprocessing = ImagePreprocessing(size=(24, 20), interpolation="bilinear")
    wide = np.asarray(picture.resize((20 + CROP_MARGIN, 24 + CROP_MARGIN), Image.Resampling.BILINEAR))
    corners = set()
    for seed in range(30):
        found = preprocessing.augmented_pixels(picture, "crop", seed).permute(1, 2, 0).numpy()
        places = [
            (top, left, mirrored)
            for mirrored in (False, True)
            for top in range(CROP_MARGIN + 1)
            for left in range(CROP_MARGIN + 1)
            if np.array_equal(wide[top : top + 24, left : left + 20][:, :: -1 if mirrored else 1], found)
        ]
        assert len(places) == 1
        corners |= set(places)
    assert len(corners) > 20
    assert {mirrored for *_, mirrored in corners} == {False, True}
