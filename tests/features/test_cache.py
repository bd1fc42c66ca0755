from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections import namedtuple
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from headinit.errors import ConfigError, DataError
from headinit.features.cache import FeatureCache, cache_key, describe_setting, weights_digest
from headinit.features.extract import as_batches, extract_features, stream_features
from headinit.heads.locate import find_head

Batch = namedtuple("Batch", "inputs labels index")


class Counting(nn.Module):
    """Counts its forward passes, and fails after `limit` of them."""

    def __init__(self, width: int = 6, classes: int = 3) -> None:
        super().__init__()
        self.body = nn.Linear(width, 8)
        self.head = nn.Linear(8, classes)
        self.calls = 0
        self.limit = 10**9

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > self.limit:
            raise KeyboardInterrupt
        return self.head(self.body(x).relu())


def data(n: int = 20) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 6, generator=generator), torch.arange(n) % 3


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    return FeatureCache(tmp_path / "features", shard_rows=6)


def test_miss_then_hit(cache: FeatureCache) -> None:
    model = Counting()
    plain = extract_features(model, data(), batch_size=4)
    first = extract_features(model, data(), batch_size=4, cache=cache)
    model.calls = 0
    second = extract_features(model, data(), batch_size=4, cache=cache)
    assert (plain.from_cache, first.from_cache, second.from_cache) == (False, False, True)
    assert model.calls == 0
    for found in (first, second):
        assert torch.equal(found.features, plain.features)
        assert torch.equal(found.labels, plain.labels)
        assert found.num_classes == 3
    assert first.fingerprint == second.fingerprint != ""


def test_another_head_sees_the_same_features(cache: FeatureCache) -> None:
    model = Counting()
    extract_features(model, data(), cache=cache)
    model.head = nn.Linear(8, 7)
    assert extract_features(model, data(), cache=cache).from_cache


@pytest.mark.parametrize("what", ["weight", "buffer", "input", "label", "precision", "speed", "structure"])
def test_a_changed_byte_anywhere_misses(cache: FeatureCache, what: str) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    x, y = data()
    extract_features(model, (x, y), cache=cache)
    assert extract_features(model, (x, y), cache=cache).from_cache
    options = {}
    if what in ("weight", "buffer", "input"):
        tensor = {"weight": model[0].weight.data, "buffer": model[1].running_mean, "input": x}[what]
        flat = tensor.view(-1).view(torch.uint8)
        flat[8] ^= 1  # the lowest bit of the third number
    elif what == "label":
        y[5] = (y[5] + 1) % 3
    elif what == "structure":
        model[2] = nn.GELU()
    else:
        options = {"precision": "bf16"} if what == "precision" else {"speed": "plain"}
    assert not extract_features(model, (x, y), cache=cache, **options).from_cache


@dataclass(frozen=True)
class Preprocessing:
    size: tuple[int, int] = (4, 4)
    interpolation: str = "bilinear"


@dataclass
class Split:
    fingerprint: str


class FakeBatches:
    """The protocol of `headinit.data.loading.Batches`."""

    def __init__(self, fingerprint: str = "f00d", preprocessing=None, augmentation: str = "none") -> None:
        self.split = Split(fingerprint)
        self.preprocessing = preprocessing or Preprocessing()
        self.augmentation, self.shuffle_seed = augmentation, 0
        self.starts: list[int] = []

    def __len__(self) -> int:
        return 5

    def __iter__(self):
        return self.epoch(0)

    def epoch(self, epoch: int, start: int = 0):
        self.starts.append(start)
        x, y = data()
        order = torch.randperm(20, generator=torch.Generator().manual_seed(3))
        noise = epoch if self.augmentation != "none" else 0
        for rows in order.split(4)[start:]:
            yield Batch(x[rows] + noise, y[rows], rows)


def test_batches_bring_their_fingerprint(cache: FeatureCache) -> None:
    model = Counting()
    expected = extract_features(model, data())
    first = extract_features(model, FakeBatches(), cache=cache)
    torch.testing.assert_close(first.features, expected.features)
    hit = extract_features(model, FakeBatches(), cache=cache)
    assert hit.from_cache
    assert torch.equal(hit.features, first.features)
    others = [
        FakeBatches(fingerprint="beef"),
        FakeBatches(preprocessing=replace(Preprocessing(), interpolation="bicubic")),
        FakeBatches(preprocessing=replace(Preprocessing(), size=(4, 5))),
    ]
    for other in others:
        assert not extract_features(model, other, cache=cache).from_cache


def test_epochs_are_views_only_where_something_is_augmented(cache: FeatureCache) -> None:
    model = Counting()
    extract_features(model, FakeBatches(), cache=cache)
    assert extract_features(model, FakeBatches(), cache=cache, epoch=1).from_cache
    first = extract_features(model, FakeBatches(augmentation="basic"), cache=cache)
    second = extract_features(model, FakeBatches(augmentation="basic"), cache=cache, epoch=1)
    assert not second.from_cache
    assert not torch.equal(first.features, second.features)


def test_data_without_a_fingerprint(cache: FeatureCache) -> None:
    x, y = data()
    batches = [(x, y)]
    with pytest.raises(DataError, match="fingerprint="):
        extract_features(Counting(), batches, cache=cache)
    model = Counting()
    assert not extract_features(model, batches, cache=cache, fingerprint="v1").from_cache
    assert extract_features(model, batches, cache=cache, fingerprint="v1").from_cache
    assert not extract_features(model, batches, cache=cache, fingerprint="v2").from_cache


def shard_files(cache: FeatureCache) -> list[Path]:
    return sorted(cache.folder.glob("*/shard-*"))


@pytest.mark.parametrize("stopped_after", range(6))
def test_an_interrupted_extraction_goes_on_where_it_stopped(cache: FeatureCache, stopped_after: int) -> None:
    model, expected = Counting(), None
    expected = extract_features(model, FakeBatches())
    model.calls, model.limit = 0, stopped_after
    if stopped_after < 5:
        with pytest.raises(KeyboardInterrupt):
            extract_features(model, FakeBatches(), cache=cache)
    else:
        extract_features(model, FakeBatches(), cache=cache)
    kept = 2 * (stopped_after // 2) if stopped_after < 5 else 5  # 6 rows a shard: every second batch of 4
    model.calls, model.limit = 0, 10**9
    again = FakeBatches()
    found = extract_features(model, again, cache=cache)
    assert model.calls == 5 - kept
    assert again.starts == ([kept] if kept < 5 else [])
    assert found.from_cache == (kept == 5)
    assert torch.equal(found.features, expected.features)
    assert torch.equal(found.labels, expected.labels)
    assert extract_features(model, FakeBatches(), cache=cache).from_cache


def test_killed_at_any_moment_it_ends_with_the_same_numbers(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import os, sys, torch
        from torch import nn
        from headinit.features.cache import FeatureCache
        from headinit.features.extract import extract_features

        class Mortal(nn.Module):
            def __init__(self):
                super().__init__()
                self.body, self.head, self.calls = nn.Linear(6, 8), nn.Linear(8, 3), 0
                self.load_state_dict(torch.load(sys.argv[1]))
            def forward(self, x):
                self.calls += 1
                if self.calls > int(sys.argv[3]):
                    os.kill(os.getpid(), 9)
                return self.head(self.body(x).relu())

        x, y = torch.load(sys.argv[4])
        cache = FeatureCache(sys.argv[2], shard_rows=8)
        print(extract_features(Mortal(), (x, y), batch_size=4, cache=cache).features.double().sum().item())
        """
    )
    model = Counting()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    torch.save(data(40), tmp_path / "data.pt")
    command = [sys.executable, "-c", script, tmp_path / "weights.pt", tmp_path / "cache"]
    outcomes = []
    for limit in (3, 3, 99):  # of 10 batches, two are kept by each of the first two
        run = subprocess.run(
            [*map(str, command), str(limit), str(tmp_path / "data.pt")], capture_output=True, text=True
        )
        outcomes.append(run.returncode)
    assert outcomes == [-9, -9, 0], run.stderr
    expected = extract_features(model, data(40), batch_size=4).features.double().sum().item()
    assert float(run.stdout) == expected
    assert not list((tmp_path / "cache").rglob(".tmp-*"))


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone", "swapped"])
def test_a_damaged_shard_is_computed_again(cache: FeatureCache, damage: str) -> None:
    model = Counting()
    expected = extract_features(model, data(), batch_size=4, cache=cache)
    files = shard_files(cache)
    assert len(files) == 3
    content = bytearray(files[1].read_bytes())
    if damage == "flip":
        content[-20] ^= 1
    if damage == "gone":
        files[1].unlink()
    elif damage == "swapped":
        files[1].write_bytes(files[0].read_bytes())
    else:
        files[1].write_bytes({"flip": content, "cut": content[: len(content) // 2], "empty": b""}[damage])
    model.calls = 0
    found = extract_features(model, data(), batch_size=4, cache=cache)
    assert not found.from_cache
    assert model.calls == 3
    assert torch.equal(found.features, expected.features)
    assert extract_features(model, data(), batch_size=4, cache=cache).from_cache


@pytest.mark.parametrize("position", range(0, 400, 23))
def test_every_flipped_byte_of_a_shard_is_found(cache: FeatureCache, position: int) -> None:
    model = Counting()
    expected = extract_features(model, data(4), cache=cache)
    (file,) = shard_files(cache)
    content = bytearray(file.read_bytes())
    content[position % len(content)] ^= 0x10
    file.write_bytes(content)
    assert torch.equal(extract_features(model, data(4), cache=cache).features, expected.features)


def test_nothing_half_written_is_left(cache: FeatureCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(tensors, path, metadata) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("headinit.features.cache.save_file", dies)
    with pytest.raises(KeyboardInterrupt):
        extract_features(Counting(), data(), cache=cache)
    assert [path for path in cache.folder.rglob("*") if path.is_file() and path.suffix != ".lock"] == []


def test_a_full_disk_does_not_stop_the_extraction(
    cache: FeatureCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args, **kwargs) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("headinit.features.cache.save_file", full)
    found = extract_features(Counting(), data(), cache=cache)
    assert len(found) == 20
    assert "No space left" in caplog.text
    assert not cache.entry(found.fingerprint).complete


def test_the_entries_used_longest_ago_go_first(tmp_path: Path) -> None:
    model = Counting()
    sets = [data(20 + i) for i in range(4)]
    cache = FeatureCache(tmp_path)
    keys = []
    for moment, pair in enumerate(sets[:3]):
        keys.append(extract_features(model, pair, cache=cache).fingerprint)
        os.utime(tmp_path / keys[-1] / "complete.json", (moment, moment))
    assert extract_features(model, sets[0], cache=cache).from_cache  # the first is now the latest
    small = FeatureCache(tmp_path, max_bytes=cache.size() + 100)
    keys.append(extract_features(model, sets[3], cache=small).fingerprint)
    assert [small.entry(key).complete for key in keys] == [True, False, True, True]
    assert small.size() <= small.max_bytes


def test_features_larger_than_the_cache_are_not_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = FeatureCache(tmp_path, max_bytes=600, shard_rows=4)
    found = extract_features(Counting(), data(), batch_size=4, cache=cache)
    assert len(found) == 20
    assert "not kept" in caplog.text
    assert cache.size() == 0


def test_two_streams_of_one_entry_do_not_disturb_each_other(cache: FeatureCache) -> None:
    model = Counting()
    expected = extract_features(model, data(), batch_size=4)
    first = stream_features(model, data(), batch_size=4, cache=cache)
    parts = [next(first)[0]]
    inner = extract_features(model, data(), batch_size=4, cache=cache)
    assert torch.equal(inner.features, expected.features)
    parts += [features for features, _ in first]
    assert torch.equal(torch.cat(parts), expected.features)
    assert extract_features(model, data(), batch_size=4, cache=cache).from_cache


def test_what_is_cached_streams_memory_mapped(tmp_path: Path) -> None:
    """Shards are read one by one: the heap does not grow with the number of rows."""
    rows, width = 120_000, 64
    model = nn.Sequential(nn.Identity(), nn.Linear(width, 2))
    x = torch.arange(rows * width, dtype=torch.float32).view(rows, width)
    cache = FeatureCache(tmp_path)
    extract_features(model, (x, torch.zeros(rows, dtype=torch.long)), batch_size=4096, cache=cache, fingerprint="x")
    entry = cache.entry(next(tmp_path.glob("*/complete.json")).parent.name)
    shards = list(entry.shards())
    assert sum(len(shard.index) for shard in shards) == rows
    if Path("/proc/self/maps").exists():
        mapped = Path("/proc/self/maps").read_text()
        assert all(str(path) in mapped for path in entry.folder.glob("shard-*"))
    del shards
    total = torch.zeros((), dtype=torch.float64)
    for features, _ in stream_features(model, (x, torch.zeros(rows, dtype=torch.long)), cache=cache, fingerprint="x"):
        total += features.double().sum()
    assert total.item() == pytest.approx(x.double().sum().item())


def test_token_rows_keep_their_examples_over_a_resume(cache: FeatureCache) -> None:
    class Tagger(Counting):
        pass

    generator = torch.Generator().manual_seed(2)
    x = torch.randn(12, 5, 6, generator=generator)
    y = torch.randint(-1, 3, (12, 5), generator=generator)
    model = Tagger()
    expected = extract_features(model, (x, y), batch_size=2)
    assert len(expected) == (y >= 0).sum()
    model.calls, model.limit = 0, 4
    with pytest.raises(KeyboardInterrupt):
        extract_features(model, (x, y), batch_size=2, cache=cache)
    model.limit = 10**9
    found = extract_features(model, (x, y), batch_size=2, cache=cache)
    assert torch.equal(found.features, expected.features)
    assert torch.equal(found.labels, expected.labels)


def test_key_ignores_where_a_transformers_model_came_from() -> None:
    import transformers as t

    config = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 9,
    }
    model = t.BertForSequenceClassification(t.BertConfig(**config))
    site = find_head(model)[0]
    before = weights_digest(model, site)
    model.config.id2label, model.config.problem_type = {0: "a", 1: "b"}, "single_label_classification"
    assert weights_digest(model, site) == before
    model.config.layer_norm_eps = 1e-3
    assert weights_digest(model, site) != before


def test_tokenizers_are_told_apart_by_their_definition() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    def tokenizer(word: str) -> PreTrainedTokenizerFast:
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"[U]": 0, word: 1}, "[U]")))

    assert describe_setting(tokenizer("good")) == describe_setting(tokenizer("good"))
    assert describe_setting(tokenizer("good")) != describe_setting(tokenizer("bad"))
    with pytest.raises(DataError, match="does not say what it does"):
        describe_setting(object())


def test_same_bytes_in_another_shape_or_type_are_other_data() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 2))
    site = find_head(model)[0]
    y = torch.zeros(2, dtype=torch.long)
    x = torch.zeros(2, 2, 3)
    keys = {cache_key(model, site, as_batches((value, y), 2)) for value in (x, x.view(2, 3, 2), x.view(2, 6), x.int())}
    assert len(keys) == 4


@pytest.mark.parametrize("options", [{"max_bytes": 0}, {"shard_rows": -1}, {"flush_seconds": 0}])
def test_senseless_settings_are_refused(tmp_path: Path, options: dict) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(options))}="):
        FeatureCache(tmp_path, **options)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        FeatureCache(path)


def test_numbers_survive_bit_for_bit(cache: FeatureCache) -> None:
    values = np.frombuffer(np.arange(1, 97, dtype=np.uint32).tobytes(), dtype=np.float32).copy()  # denormals
    model = nn.Sequential(nn.Identity(), nn.Linear(6, 2))
    pair = (torch.from_numpy(values).view(16, 6), torch.zeros(16, dtype=torch.long))
    extract_features(model, pair, cache=cache)
    hit = extract_features(model, pair, cache=cache)
    assert hit.from_cache
    assert hit.features.numpy().tobytes() == values.tobytes()
