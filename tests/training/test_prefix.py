from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from headinit.data.images import ImagePreprocessing
from headinit.data.loading import Batch, Batches, TensorBatches
from headinit.data.splits import Split
from headinit.training import activations
from headinit.training.activations import Rows
from headinit.training.finetune import TrainingOutcome, finetune
from headinit.training.freezing import freeze
from headinit.training.prefix import cached_prefix, find_prefix
from headinit.training.recipe import Recipe

from . import killable
from .models import NormZoo, bert_inputs, record_head, tiny_bert, tiny_timm, torchvision_model

CPU = torch.device("cpu")


def pictures(count: int, size: int = 32) -> TensorBatches:
    generator = torch.Generator().manual_seed(count)
    return TensorBatches(
        torch.randn(count, 3, size, size, generator=generator), torch.arange(count) % 3, 4, shuffle_seed=0
    )


class Texts(TensorBatches):
    """Texts of different lengths, padded batch by batch on either side."""

    def __init__(self, count: int, left: bool = False) -> None:
        generator = torch.Generator().manual_seed(count)
        self.lengths, self.left = torch.randint(3, 9, (count,), generator=generator), left
        super().__init__(
            torch.randint(1, 50, (count, 8), generator=generator), torch.arange(count) % 3, 4, shuffle_seed=0
        )

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for batch in super().epoch(epoch, start):
            lengths = self.lengths[batch.index]
            longest = int(lengths.max())
            mask = (torch.arange(longest) < lengths[:, None]).long()
            mask = mask.flip(1) if self.left else mask
            yield batch._replace(inputs={"input_ids": batch.inputs[:, :longest] * mask, "attention_mask": mask})


def resnet() -> nn.Module:
    return torchvision_model("resnet18", "fc")


def efficientnet() -> nn.Module:
    return tiny_timm("efficientnet_lite0", "classifier", drop_rate=0.2, drop_path_rate=0.2)


def vit() -> nn.Module:
    return tiny_timm("vit_tiny_patch16_224", "head", img_size=32, depth=3, proj_drop_rate=0.1)


def train(
    make: Callable[[], nn.Module],
    data: Callable[[int], Any],
    policy: Any,
    gigabytes: float | None,
    compile: bool = False,
    **options: Any,
) -> tuple[nn.Module, TrainingOutcome]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = freeze(make(), policy)
    recipe = Recipe(epochs=3, lr=1e-3, compile=compile)
    outcome = finetune(model, data(14), data(6), recipe, cpu=True, prefix_cache_gb=gigabytes, **options)
    return model, outcome


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return model.state_dict()


@pytest.mark.parametrize(
    ("make", "data", "policy", "kept"),
    [
        (resnet, pictures, 1, {"layer3"}),
        (resnet, pictures, ["conv1.*", "bn1.*", "layer1.*"], {"layer1"}),
        (efficientnet, pictures, 1, {"blocks.5"}),
        (vit, pictures, 1, {"blocks.1"}),
        (tiny_bert, Texts, 1, {"bert.encoder.layer.1"}),
        (tiny_bert, lambda count: Texts(count, left=True), 2, {"bert.encoder.layer.0"}),
        (tiny_bert, Texts, 0, {"dropout"}),
    ],
)
def test_the_run_is_the_same_with_the_prefix_kept(make: Any, data: Any, policy: Any, kept: set[str]) -> None:
    batch = next(data(14).epoch(0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        prefix = find_prefix(freeze(make(), policy), batch.inputs)
    assert prefix is not None
    assert prefix.read == kept
    (plain, expected), (cached, found) = (train(make, data, policy, gb) for gb in (None, 1.0))
    for row, wanted in zip(found.history, expected.history, strict=True):
        start = {"train_loss": 0.0} if row["epoch"] == 0 else {}  # None there
        assert row | start == pytest.approx(
            wanted | start, rel=1e-5
        )  # a kernel may sum otherwise in a batch of another size
    for name, tensor in tensors(plain).items():
        torch.testing.assert_close(tensors(cached)[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    assert not any("forward" in vars(module) for module in cached.modules())


@pytest.mark.slow
def test_a_compiled_rest_gives_the_same_run() -> None:
    (plain, expected), (cached, found) = (train(resnet, pictures, 1, gb, compile=gb is not None) for gb in (None, 1.0))
    losses = [[row["train_loss"] for row in run.history[1:]] for run in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for name, tensor in tensors(plain).items():
        torch.testing.assert_close(tensors(cached)[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("make", "data", "watched"), [(resnet, pictures, "layer3"), (tiny_bert, Texts, "bert.embeddings")]
)
def test_the_prefix_runs_once(make: Any, data: Any, watched: str) -> None:
    model = freeze(make(), 1)
    calls: list[int] = []
    leaf = next(m for m in model.get_submodule(watched).modules() if not list(m.children()))

    class Watched(type(leaf)):  # type: ignore[misc]
        def forward(self, *args: Any, **options: Any) -> Any:
            calls.append(len(args[0]))
            return super().forward(*args, **options)

    leaf.__class__ = Watched
    rows: list[int] = []
    finetune(
        model,
        data(14),
        data(6),
        Recipe(epochs=3),
        cpu=True,
        prefix_cache_gb=1.0,
        on_evaluation=lambda row: rows.append(len(calls)),
    )
    assert len(set(rows)) == 1  # nothing ran after the start was evaluated
    assert rows[0] < 20


def test_what_is_left_behind() -> None:
    model = freeze(NormZoo(), ["conv", "bn", "bn_act"])
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    prefix = find_prefix(model, torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert prefix is not None
    assert prefix.read == {"bn"}  # bn_plain has no parameter to freeze, and moves
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes


class Skipping(nn.Module):
    """The head also sees the first layer; or its own random numbers; or the inputs."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.first, self.second, self.third, self.head = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.first(x)
        if self.way == "noise" and self.training:
            first = first + torch.rand(4)
        second = self.second(first).relu_()
        own = {"skip": first, "inputs": x, "batch": x.mean(0)}.get(self.way, 0)
        return self.head(self.third(second) + own)


@pytest.mark.parametrize(
    ("way", "read"), [("plain", {"second"}), ("skip", {"first", "second"}), ("noise", {"first"}), ("inputs", None)]
)
def test_what_the_rest_reads(way: str, read: set[str] | None) -> None:
    model = record_head(Skipping(way), "head")
    model.first.requires_grad_(False)
    model.second.requires_grad_(False)
    prefix = find_prefix(model, torch.randn(5, 4))
    assert (prefix.read if prefix else None) == read


def test_what_is_kept_may_be_changed_in_place() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 3))
    model[0].requires_grad_(False)
    data = TensorBatches(torch.randn(9, 4), torch.arange(9) % 3, 4, shuffle_seed=0)
    found = cached_prefix(model, {"training": data}, 1e9, device=CPU)
    assert found is not None
    rows = found[1]["training"].rows
    for _ in range(2):
        kept = rows.batch(torch.arange(9))[0]
        torch.testing.assert_close(kept, model[0](data.features).detach().relu())
        kept.zero_()


def test_no_prefix() -> None:
    model = torchvision_model("resnet18", "fc")
    data = {"training": pictures(6)}
    assert cached_prefix(model, data, 1e9, device=CPU) is None  # everything trains
    freeze(model, 1)
    assert cached_prefix(model, data, 1e3, device=CPU) is None  # too large
    data["training"].augmentation = "basic"  # type: ignore[attr-defined]
    assert cached_prefix(model, data, 1e9, device=CPU) is None
    assert find_prefix(model, torch.randn(2, 3, 32, 32)) is None  # too few to tell examples from other sizes


@pytest.mark.parametrize("policy", [1, 2])
def test_a_killed_run_goes_on_to_the_same_bits(policy: int, tmp_path: Path) -> None:
    whole = killable.build(policy)
    expected = killable.run(whole, str(tmp_path / "whole"), prefix_cache_gb=1.0)

    class Killed(Exception):
        pass

    def kill(row: dict[str, Any]) -> None:
        if row["epoch"] == 2:
            raise Killed

    first = killable.build(policy)
    with pytest.raises(Killed):
        killable.run(first, str(tmp_path / "killed"), prefix_cache_gb=1.0, on_evaluation=kill, save_every_steps=1)
    assert not any("forward" in vars(module) for module in first.modules())
    again = killable.build(policy)
    found = killable.run(again, str(tmp_path / "killed"), prefix_cache_gb=1.0)
    assert killable.fingerprint(again, found) == killable.fingerprint(whole, expected)
    plain = killable.run(killable.build(policy), None)
    for row, wanted in zip(found.history, plain.history, strict=True):
        # A bias in front of a BatchNorm has no gradient but rounding, which Adam makes steps of: nothing is nearer.
        assert row["train_loss"] == (wanted["train_loss"] and pytest.approx(wanted["train_loss"], rel=1e-5))
        assert row["nll"] == pytest.approx(wanted["nll"], rel=1e-2)


def test_pictures_are_read_once(tmp_path: Path) -> None:
    reads: list[int] = []

    class Reading(ImagePreprocessing):
        def pixels(self, picture: Any) -> torch.Tensor:
            reads.append(1)
            return super().pixels(picture)

    generator = torch.Generator().manual_seed(0)
    items = [torch.randint(0, 255, (32, 32), generator=generator, dtype=torch.uint8).numpy() for _ in range(10)]
    split = Split(items, torch.arange(10) % 3, [str(i) for i in range(10)], "")
    histories = []
    for gigabytes in (None, 1.0):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = freeze(resnet(), 1)
        batches = [Batches(split, Reading(size=(32, 32)), 4, shuffle_seed=seed) for seed in (0, None)]
        reads.clear()
        histories.append(finetune(model, *batches, Recipe(epochs=2), cpu=True, prefix_cache_gb=gigabytes).history)
    assert histories[0] == histories[1]
    assert len(reads) <= 2 * len(split) + 4  # and the first batch, to look at


@pytest.mark.parametrize("folder", [False, True])
def test_rows(folder: bool, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(5, 2, 3, 4, generator=generator).contiguous(memory_format=torch.channels_last)
    tokens = torch.randn(5, 4, 6, generator=generator).bfloat16()
    mask = torch.arange(4) < torch.tensor([4, 1, 2, 3, 4])[:, None]
    rows = Rows(["fixed", "padded"], folder=tmp_path if folder else None)
    for part in torch.arange(5).split(2):
        rows.add(part, [maps[part], tokens[part]], mask[part])
    rows.finish()
    assert not list(tmp_path.iterdir())
    index = torch.tensor([3, 1, 2])
    found = rows.batch(index, mask[index][:, :3])
    assert torch.equal(found[0], maps[index])
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found[1], (tokens * mask[..., None])[index][:, :3])
    assert len(rows) == 5
    with pytest.raises(ValueError, match="more than"):
        Rows(["fixed"], budget=10).add(torch.arange(5), [maps])


def test_a_file_where_memory_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "MEMORY_SHARE", 0.0)
    _, expected = train(resnet, pictures, 1, None)
    _, found = train(resnet, pictures, 1, 1.0, folder=tmp_path)
    assert found.history == expected.history
    assert not list(tmp_path.glob(".activations-*"))


def test_padding_that_reaches_the_logits_is_noticed() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mix, self.head = nn.Embedding(50, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.head(self.mix(self.embed(input_ids)).mean(1))  # over the padding too

    model = Mean()
    model.embed.requires_grad_(False)
    assert find_prefix(model, bert_inputs()) is not None
    assert cached_prefix(model, {"training": Texts(14)}, 1e9, device=CPU) is None
