from __future__ import annotations

import re
import sys

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits as sklearn_digits

from headinit.data.builtin import DOCUMENTED_LIBRARIES, _sentences, load_digits, load_pydocs
from headinit.errors import DataError


def test_digits_are_all_of_scikit_learns():
    splits, reference = load_digits(), sklearn_digits()
    assert splits.test is not None
    parts = (splits.train, splits.validation, splits.test)
    assert [len(part) for part in parts] == [1079, 359, 359]
    ours = sorted(
        (np.asarray(p).tobytes(), int(k)) for part in parts for p, k in zip(part.items, part.labels, strict=True)
    )
    scaled = np.rint(reference.images / 16 * 255).astype(np.uint8)
    assert ours == sorted((p.tobytes(), int(k)) for p, k in zip(scaled, reference.target, strict=True))
    assert scaled.max() == 255
    for part in parts:
        share = torch.bincount(part.labels) / len(part)
        np.testing.assert_allclose(share, np.bincount(reference.target) / 1797, atol=0.004)


def test_digits_split_by_seed():
    assert load_digits().fingerprint == load_digits().fingerprint != load_digits(seed=1).fingerprint
    assert len(load_digits(validation=100).validation) == 100
    assert len(load_digits(validation=0.1).validation) == 180
    with pytest.raises(DataError, match="validation share"):
        load_digits(validation=0.0)


@pytest.fixture(scope="module")
def pydocs():
    return load_pydocs(sentences_per_library=100)


def test_pydocs_is_balanced_and_repeatable(pydocs):
    assert pydocs.test is not None
    labels = torch.cat([pydocs.train.labels, pydocs.validation.labels, pydocs.test.labels])
    assert torch.bincount(labels).tolist() == [100] * len(DOCUMENTED_LIBRARIES)
    assert pydocs.class_names == DOCUMENTED_LIBRARIES
    again = load_pydocs(sentences_per_library=100)
    assert (again.fingerprint, again.train.items) == (pydocs.fingerprint, pydocs.train.items)
    texts = [*pydocs.train.items, *pydocs.validation.items, *pydocs.test.items]
    assert len({re.sub(r"\W+", " ", text.lower()).strip() for text in texts}) == len(texts)


def test_pydocs_gives_no_name_away(pydocs):
    names = (
        r"\b(numpy|np|scipy|sklearn|scikit|torch|pytorch|torchvision|transformers|timm|matplotlib|pyplot|plt|hugging)\b"
    )
    for text in [*pydocs.train.items, *pydocs.validation.items]:
        assert not re.search(names, text, re.IGNORECASE), text
        assert ">>>" not in text
        assert "`" not in text
        assert 6 <= len(text.split()) <= 40


def test_pydocs_imports_nothing(pydocs):
    import subprocess

    code = (
        "import sys; from headinit.data.builtin import _library_sentences; before = set(sys.modules);"
        "assert len(_library_sentences('matplotlib', 30)) == 30;"
        "print([m for m in set(sys.modules) - before if m.startswith('matplotlib')])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_sentences_are_cleaned():
    docstring = (
        "Compute the mean of a :class:`numpy.ndarray` along the given axis. "
        "It is `fast` and **simple** to use, really.\n\n"
        ">>> import numpy as np\n>>> np.mean([1, 2]) is a number of some kind here.\n\n"
        "Similar to torch.nn.functional.softmax but it works on lists of numbers."
    )
    assert list(_sentences(docstring)) == [
        "Compute the mean of a along the given axis.",
        "It is fast and simple to use, really.",
        "Similar to but it works on lists of numbers.",
    ]


def test_too_few_sentences_is_an_error():
    with pytest.raises(DataError, match="at least 10"):
        load_pydocs(sentences_per_library=3)
