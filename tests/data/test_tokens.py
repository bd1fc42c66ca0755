"""Words with tags: the files that hold them, and the labels of tokens against examples made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from headinit.data.catalog import load_data
from headinit.data.loading import Batches, TokenBatches
from headinit.data.splits import Split
from headinit.data.text import TextPreprocessing, Words
from headinit.data.tokens import load_tokens, read_sentences
from headinit.errors import DataError

CONLL = """-DOCSTART- -X- -X- O

EU NNP B-NP B-ORG
rejects VBZ B-VP O
German JJ B-NP B-MISC

Peter NNP B-NP B-PER
Blackburn NNP I-NP I-PER
"""
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "EU", "re", "##ject", "##s", "German", "Peter", "Black", "##burn"]


def word_pieces(side: str = "right"):
    """A WordPiece tokenizer whose splits are known: re ##ject ##s, Black ##burn."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(PIECES)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=32,
        padding_side=side,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


@pytest.fixture
def splits(tmp_path: Path):
    (tmp_path / "train.txt").write_text(CONLL)
    (tmp_path / "dev.txt").write_text("Peter B-PER\n\n\n\nrejects O\n")
    return load_data("conll", root=tmp_path)


def test_a_conll_file(splits) -> None:
    assert splits.class_names == ("O", "B-MISC", "B-ORG", "B-PER", "I-PER")
    assert list(splits.train.items) == [("EU", "rejects", "German"), ("Peter", "Blackburn")]
    assert splits.train.labels.tolist() == [[2, 0, 1], [3, 4, -100]]
    assert splits.validation.labels.tolist() == [[3], [0]]
    assert [name.rpartition("/")[2] for name in splits.train.names] == ["train.txt line 3", "train.txt line 7"]
    assert (splits.task, splits.modality, splits.test) == ("token", "text", None)


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_tabs_part_columns_and_spaces_stay(tmp_path: Path, line_end: str) -> None:
    path = tmp_path / "train.tsv"
    path.write_bytes(line_end.join(["New York\tB-LOC", "10\u00a0km\tO", " ", "#\tO"]).encode())
    assert [(s.words, s.tags, s.lines) for s in read_sentences(path)] == [
        (("New York", "10\u00a0km"), ("B-LOC", "O"), (1, 2)),
        (("#",), ("O",), (4,)),
    ]


@pytest.mark.parametrize("keys", [("tokens", "tags"), ("tokens", "ner_tags"), ("words", "labels")])
def test_jsonl_says_the_same_as_conll(tmp_path: Path, splits, keys: tuple[str, str]) -> None:
    folder = tmp_path / "json"
    folder.mkdir()
    rows = [(["EU", "rejects", "German"], ["B-ORG", "O", "B-MISC"]), (["Peter", "Blackburn"], ["B-PER", "I-PER"])]
    lines = [json.dumps(dict(zip(keys, row, strict=True))) for row in rows]
    (folder / "train.jsonl").write_text("\n".join(lines))
    found = load_tokens(folder, validation=1)
    assert found.class_names == splits.class_names
    sentences = read_sentences(folder / "train.jsonl")
    assert [sentence.words for sentence in sentences] == list(splits.train.items)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("dev.txt", "Peter B-PER\nParis B-LOC\n", r"dev\.txt line 2 \('B-LOC'\).*'O', 'B-MISC'"),
        ("train.txt", "EU B-ORG\nrejects\n", r"train\.txt line 2 holds one column \('rejects'\)"),
        ("train.txt", "EU O\n\nrejects O\n", "one tag \\('O'\\)"),
        ("train.txt", "\n\n", "holds no sentence"),
        ("dev.jsonl", '{"tokens": ["a", "b"], "tags": ["O"]}', r"dev\.jsonl line 1 .*2 words and 1 tags"),
        ("dev.jsonl", '{"tokens": ["a"], "tags": ["O"]}\n{"tokens": ', r"dev\.jsonl line 2 is not JSON"),
        ("dev.jsonl", '["a"]', "other contents"),
        ("dev.jsonl", '{"tokens": ["a", "b"], "tags": ["O", null]}', "word 2 has no tag"),
    ],
)
def test_what_is_wrong_is_named_by_file_and_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / "train.txt").write_text(CONLL)
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load_tokens(tmp_path, validation=1)


def test_no_file_and_per_class_are_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data=conll needs data\.root"):
        load_tokens()
    (tmp_path / "train.txt").write_text(CONLL)
    with pytest.raises(DataError, match="train_size"):
        load_data("conll", root=tmp_path, validation=1, per_class=1)


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_first_piece_of_a_word_has_its_label(splits, side: str) -> None:
    batch = next(iter(Batches(splits.train, TextPreprocessing(word_pieces(side), 32), batch_size=2)))
    # [CLS] EU re ##ject ##s German [SEP]  and  [CLS] Peter Black ##burn [SEP]
    assert batch.inputs["input_ids"][0].tolist() == [2, 4, 5, 6, 7, 8, 3]
    assert batch.labels[0].tolist() == [-100, 2, 0, -100, -100, 1, -100]
    short_ids, short_labels = [2, 9, 10, 11, 3], [-100, 3, 4, -100, -100]
    ids, labels = batch.inputs["input_ids"][1].tolist(), batch.labels[1].tolist()
    if side == "right":
        assert (ids, labels) == ([*short_ids, 0, 0], [*short_labels, -100, -100])
    else:
        assert (ids, labels) == ([0, 0, *short_ids], [-100, -100, *short_labels])


def test_words_that_are_cut_off_have_no_label_and_are_counted(splits, caplog: pytest.LogCaptureFixture) -> None:
    batches = Batches(splits.train, TextPreprocessing(word_pieces(), 5), batch_size=2, bucket=True)
    batch = next(iter(batches))
    rows = {int(i): labels.tolist() for i, labels in zip(batch.index, batch.labels, strict=True)}
    assert rows[0] == [-100, 2, 0, -100, -100]  # [CLS] EU re ##ject [SEP]: German is gone
    assert batches.labelled_tokens().tolist() == [2, 2]
    assert "1 of 5 words have no token" in caplog.text


def test_words_inside_a_sentence_have_the_pieces_they_have_in_text() -> None:
    from transformers import RobertaTokenizerFast

    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "a", "b", "Ġ", "Ġa", "Ġb"]
    merges = [("Ġ", "a"), ("Ġ", "b")]
    tokenizer = RobertaTokenizerFast(vocab={name: i for i, name in enumerate(names)}, merges=merges)
    preprocessing = TextPreprocessing(tokenizer, 16)
    words, text = preprocessing([Words(["b", "a", "b"])]), preprocessing(["b a b"])
    assert torch.equal(words["input_ids"], text["input_ids"])


def test_two_words_are_no_pair_of_texts() -> None:
    preprocessing = TextPreprocessing(word_pieces(), 16)
    assert preprocessing([Words(["EU", "German"])])["input_ids"].tolist() == [[2, 4, 8, 3]]
    assert preprocessing([("EU", "German")])["input_ids"].tolist() == [[2, 4, 3, 8, 3]]


def test_token_batches_bring_whole_sentences() -> None:
    rows, lengths = torch.arange(12.0).reshape(6, 2), torch.tensor([3, 0, 1, 2])
    batches = TokenBatches(rows, torch.arange(6), lengths, batch_size=2, shuffle_seed=1)
    seen: dict[int, list[int]] = {}
    assert len(batches) == 2
    for batch in batches.epoch(3):
        assert batch.inputs.shape[:2] == batch.labels.shape
        for i, features, labels in zip(batch.index.tolist(), batch.inputs, batch.labels, strict=True):
            known = labels >= 0
            assert torch.equal(features[known], rows[labels[known]])
            seen[i] = labels[known].tolist()
    assert seen == {0: [0, 1, 2], 1: [], 2: [3], 3: [4, 5]}
    first, second = list(batches.epoch(3)), list(batches.epoch(3, start=1))
    assert torch.equal(first[1].inputs, second[0].inputs)
    with pytest.raises(DataError, match="6 labelled tokens, and there are 5"):
        TokenBatches(rows[:5], torch.arange(5), lengths, batch_size=2)


def test_order_of_splits_is_kept_by_selection() -> None:
    split = Split([Words(["a"]), Words(["b", "c"])], torch.tensor([[0, -100], [1, 0]]), ["1", "2"], "f00d")
    chosen = split.select([1])
    assert list(chosen.items) == [("b", "c")]
    assert chosen.labels.tolist() == [[1, 0]]
