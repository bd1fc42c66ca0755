"""Text: tokenised once, padded to the longest of each batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from headinit.errors import DataError

IGNORED_LABEL = -100
"""Label of a piece that is not learnt: special tokens, padding, the rest of a word."""


class Words(tuple[str, ...]):
    """The words of a sentence, parted beforehand, each of which may have a label.

    Example:
        >>> Words(["EU", "rejects"])
        ('EU', 'rejects')
    """

    __slots__ = ()


@dataclass(frozen=True)
class EncodedTexts:
    """Tokenised examples, not yet padded.

    Attributes:
        columns: for each model input ("input_ids", "attention_mask", ...) N lists of integers.
        lengths: `(N,)` int64 numbers of tokens.
        words: of examples that came as `Words`: for each token the number of its word, None for special tokens.
    """

    columns: dict[str, list[list[int]]]
    lengths: Tensor
    words: list[list[int | None]] | None = None

    def __len__(self) -> int:
        return len(self.lengths)


@dataclass(frozen=True, eq=False)
class TextPreprocessing:
    """How a backbone wants its text: its own tokenizer, cut to `max_length` tokens (of a pair the longer text first).

    Called with a list of texts, of pairs of texts, or of `Words`, it gives padded tensors `(B, L)` int64. The
    tokenizer's own settings are as before after each call.

    Attributes:
        tokenizer: a transformers tokenizer (fast ones tokenise a whole data set in parallel).
        max_length: the most tokens that an example may have, the special ones counted.

    Raises:
        DataError: `max_length` is longer than the tokenizer's model can read.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "good": 2, "film": 3}, "[UNK]"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
        >>> TextPreprocessing(tokenizer, max_length=8)(["good film", "good"])["input_ids"]
        tensor([[2, 3],
                [2, 0]])
    """

    tokenizer: Any
    max_length: int = 128

    modality: ClassVar[str] = "text"

    def __post_init__(self) -> None:
        longest = getattr(self.tokenizer, "model_max_length", None)
        if self.max_length < 1 or (longest is not None and self.max_length > longest):
            raise DataError(
                f"max_length={self.max_length} does not fit this tokenizer, whose model reads up to {longest} tokens: "
                f"set model.max_length={longest} or less."
            )

    def __call__(self, items: Sequence[Any]) -> dict[str, Tensor]:
        """Texts, pairs or sentences in words as padded tensors, `(B, L)` int64 each."""
        return self.pad(self.encode(items))

    def encode(self, items: Sequence[Any]) -> EncodedTexts:
        """Tokenise all examples at once.

        Raises:
            DataError: an item is neither a text nor a pair of texts, or texts and pairs are mixed; or the items are
                words and the tokenizer cannot tell which token belongs to which.
        """
        if len(items) and all(isinstance(item, Words) for item in items):
            return self._encode_words(items)
        first, second = _columns_of(items)
        with _settings_kept(self.tokenizer):
            encoded = self.tokenizer(
                first,
                second,
                truncation="longest_first",
                max_length=self.max_length,
                padding=False,
                return_attention_mask=True,
            )
        return _encoded(encoded)

    def _encode_words(self, sentences: Sequence[Words]) -> EncodedTexts:
        """Tokenise sentences whose words are parted already, and keep which token belongs to which word."""
        if not getattr(self.tokenizer, "is_fast", False):
            raise DataError(
                f"{type(self.tokenizer).__name__} does not say which token belongs to which word, so words cannot be "
                "labelled with it. Use a model with a fast tokenizer (a folder with tokenizer.json)."
            )
        # Byte-level and sentence-piece vocabularies know a word in the middle of a text by the space before it; the
        # others drop that space.
        spaced = [[*sentence[:1], *(f" {word}" for word in sentence[1:])] for sentence in sentences]
        with _settings_kept(self.tokenizer):
            encoded = self.tokenizer(
                spaced,
                is_split_into_words=True,
                truncation=True,
                max_length=self.max_length,
                padding=False,
                return_attention_mask=True,
            )
        return _encoded(encoded, [encoded.word_ids(i) for i in range(len(sentences))])

    def align(self, encoded: EncodedTexts, labels: Tensor, indices: Sequence[int] | Tensor | None = None) -> Tensor:
        """Labels of words as labels of tokens, padded as `pad` pads: the first token of a word has the word's label.

        Args:
            encoded: what `encode` gave for examples that are `Words`.
            labels: `(N, W)` int64 labels of the words, -100 behind the last word.
            indices: the chosen examples, all by default.

        Returns:
            `(B, L)` int64; -100 for special tokens, padding and the further tokens of a word. A word that was cut off
            has no token and so no label.
        """
        assert encoded.words is not None
        chosen = range(len(encoded)) if indices is None else torch.as_tensor(indices).tolist()
        longest = int(encoded.lengths[list(chosen)].max())
        left = self.tokenizer.padding_side == "left"
        aligned = torch.full((len(chosen), longest), IGNORED_LABEL, dtype=torch.int64)
        for row, i in enumerate(chosen):
            words = encoded.words[i]
            start = longest - len(words) if left else 0
            positions = first_tokens(words)
            numbers = torch.tensor([words[position] for position in positions], dtype=torch.int64)
            aligned[row, torch.tensor(positions, dtype=torch.int64) + start] = labels[i, numbers]
        return aligned

    def lengths(self, items: Sequence[Any]) -> Tensor:
        """`(N,)` int64 numbers of tokens after truncation."""
        return self.encode(items).lengths

    def pad(self, encoded: EncodedTexts, indices: Sequence[int] | Tensor | None = None) -> dict[str, Tensor]:
        """Chosen examples (all by default) as tensors `(B, L)` int64, L the longest of them.

        Raises:
            DataError: the examples differ in length and the tokenizer has no padding token.
        """
        chosen = range(len(encoded)) if indices is None else torch.as_tensor(indices).tolist()
        lengths = encoded.lengths[list(chosen)]
        longest = int(lengths.max())
        if int(lengths.min()) < longest and self.tokenizer.pad_token_id is None:
            raise DataError(
                "This tokenizer has no padding token, so texts of different length cannot share a batch. Set "
                "tokenizer.pad_token = tokenizer.eos_token and model.config.pad_token_id = tokenizer.pad_token_id."
            )
        left = self.tokenizer.padding_side == "left"
        tensors = {}
        for name, rows in encoded.columns.items():
            padded = torch.full((len(chosen), longest), self._fill(name), dtype=torch.int64)
            for row, i in enumerate(chosen):
                start = longest - len(rows[i]) if left else 0
                padded[row, start : start + len(rows[i])] = torch.tensor(rows[i], dtype=torch.int64)
            tensors[name] = padded
        return tensors

    def _fill(self, name: str) -> int:
        if name == "input_ids":
            return self.tokenizer.pad_token_id or 0
        if name == "token_type_ids":
            return getattr(self.tokenizer, "pad_token_type_id", 0)
        return 1 if name == "special_tokens_mask" else 0

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold of it; the tokenizer is saved by its own library."""
        return {"max_length": self.max_length}


def first_tokens(words: Sequence[int | None]) -> list[int]:
    """Positions at which a word begins, given each token's word.

    Example:
        >>> first_tokens([None, 0, 1, 1, 2, None])
        [1, 2, 4]
    """
    earlier = [None, *words[:-1]]
    return [i for i, (word, before) in enumerate(zip(words, earlier, strict=True)) if word not in (None, before)]


def _encoded(encoded: Any, words: list[list[int | None]] | None = None) -> EncodedTexts:
    columns = {name: encoded[name] for name in encoded}
    lengths = torch.tensor([len(ids) for ids in columns["input_ids"]], dtype=torch.int64)
    return EncodedTexts(columns, lengths, words)


def _columns_of(items: Sequence[Any]) -> tuple[list[str], list[str] | None]:
    if all(isinstance(item, str) for item in items):
        return list(items), None
    if all(isinstance(item, (tuple, list)) and len(item) == 2 for item in items):
        first, second = [item[0] for item in items], [item[1] for item in items]
        if all(isinstance(text, str) for text in (*first, *second)):
            return first, second
    kinds = sorted({type(item).__name__ for item in items})
    raise DataError(f"Expected texts, or pairs of texts, and not both: found {', '.join(kinds)}.")


@contextmanager
def _settings_kept(tokenizer: Any) -> Iterator[None]:
    """A call with truncation changes a fast tokenizer for good (it would be saved so): put its settings back."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    truncation = backend.truncation if backend is not None else None
    padding = backend.padding if backend is not None else None
    try:
        yield
    finally:
        if backend is not None:
            backend.enable_truncation(**truncation) if truncation else backend.no_truncation()
            backend.enable_padding(**padding) if padding else backend.no_padding()
