from __future__ import annotations

import pytest
import torch

from headinit.data.text import TextPreprocessing
from headinit.errors import DataError

TEXTS = ["a short one", "a b c d e f g h i j k l m n o p", "unknown words here", ""]
PAIRS = [("a b c d e f g h i j k l", "a b"), ("a", "b c d e f g h i j k l"), ("a b", "c d")]


def make_tokenizer(**options):
    """A small BERT-like tokenizer, made here."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnop", "short", "one"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", **options}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=32, model_input_names=inputs, **names)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("items", [TEXTS, PAIRS])
@pytest.mark.parametrize("max_length", [8, 32])
def test_as_the_tokenizer_pads_and_truncates(side, items, max_length):
    tokenizer = make_tokenizer(padding_side=side)
    ours = TextPreprocessing(tokenizer, max_length)(items)
    columns = list(zip(*items, strict=True)) if items is PAIRS else [items]
    theirs = tokenizer(
        *map(list, columns), truncation="longest_first", max_length=max_length, padding=True, return_tensors="pt"
    )
    assert set(ours) == {"input_ids", "token_type_ids", "attention_mask"}
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def test_a_batch_is_padded_to_its_own_longest():
    preprocessing = TextPreprocessing(make_tokenizer(), 32)
    encoded = preprocessing.encode(TEXTS)
    assert encoded.lengths.tolist() == preprocessing.lengths(TEXTS).tolist() == [5, 18, 5, 2]
    batch = preprocessing.pad(encoded, torch.tensor([3, 0]))
    assert batch["input_ids"].shape == (2, 5)
    assert batch["attention_mask"].sum(1).tolist() == [2, 5]


def test_the_tokenizer_is_left_as_it_was():
    tokenizer = make_tokenizer()
    backend = tokenizer.backend_tokenizer
    before = backend.to_str()
    TextPreprocessing(tokenizer, 8)(TEXTS)
    assert backend.to_str() == before
    backend.enable_truncation(7)
    backend.enable_padding(length=9)
    before = backend.to_str()
    TextPreprocessing(tokenizer, 8)(TEXTS)
    assert backend.to_str() == before


def test_no_padding_token_is_an_error_only_where_padding_is_needed():
    preprocessing = TextPreprocessing(make_tokenizer(pad_token=None), 32)
    assert preprocessing(["a b", "b c"])["input_ids"].shape == (2, 4)
    with pytest.raises(DataError, match="no padding token"):
        preprocessing(TEXTS)


@pytest.mark.parametrize("items", [["a", ("b", "c")], [1, 2], [("a", 1)], [("a", "b", "c")]])
def test_items_must_be_texts_or_pairs(items):
    with pytest.raises(DataError, match="texts, or pairs of texts"):
        TextPreprocessing(make_tokenizer(), 32)(items)


@pytest.mark.parametrize("max_length", [0, 33])
def test_max_length_must_fit_the_model(max_length):
    with pytest.raises(DataError, match="up to 32"):
        TextPreprocessing(make_tokenizer(), max_length)
