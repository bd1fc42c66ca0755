from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from headinit.errors import HeadError
from headinit.heads.modules import (
    AttentionPool,
    CosineHead,
    RecurrentPool,
    as_tokens,
    build_head,
    hidden_part,
    output_layer,
)
from headinit.heads.pooled import pool_tokens


def test_linear_head_has_the_names_of_its_library_with_dropout_too() -> None:
    for options in ({}, {"dropout": 0.5}):
        assert list(build_head("linear", 4, 3, options=options).state_dict()) == ["weight", "bias"]
    head = build_head("linear", 400, 3, options={"dropout": 0.5})
    features = torch.ones(2, 400)
    torch.testing.assert_close(head.eval()(features), F.linear(features, head.weight, head.bias))
    assert not torch.equal(head.train()(features), head.eval()(features))


def test_a_head_for_a_convolution_keeps_its_geometry() -> None:
    like = nn.Conv2d(8, 5, 3, stride=2, padding=1)
    for kind in ("linear", "mlp"):
        head = build_head(kind, 8, 4, like=like)
        assert head(torch.rand(2, 8, 9, 9)).shape == (2, 4, *like(torch.rand(1, 8, 9, 9)).shape[2:])


@pytest.mark.parametrize("norm", ["none", "layer", "batch"])
def test_mlp_layers(norm: str) -> None:
    options = {"hidden": [6, 5], "activation": "gelu", "norm": norm, "dropout": 0.2}
    head = build_head("mlp", 8, 3, options=options).eval()
    kinds = [type(layer) for layer in hidden_part(head)]
    norms = {"none": [], "layer": [nn.LayerNorm], "batch": [nn.BatchNorm1d]}[norm]
    assert kinds == [nn.Linear, *norms, nn.GELU, nn.Dropout] * 2
    assert (output_layer(head).in_features, output_layer(head).out_features) == (5, 3)
    assert head(torch.rand(2, 8)).shape == (2, 3)


@pytest.mark.parametrize(
    ("kind", "options", "match"),
    [
        ("mpl", {}, "Unknown head 'mpl'. Did you mean 'mlp'"),
        ("mlp", {"hiden": [3]}, "Did you mean 'hidden'"),
        ("mlp", {"hidden": []}, "hidden sizes of at least 1"),
        ("mlp", {"activation": "rellu"}, "Did you mean .*'relu'"),
        ("mlp", {"norm": "group"}, "norm"),
        ("mlp", {"dropout": 1.0}, r"\[0, 1\)"),
        ("cosine", {"scale": -1.0}, "positive"),
        ("attention_pool", {"num_heads": 3}, "does not divide"),
        ("recurrent", {"cell": "rnn"}, "cell"),
        ("conv", {"kernel_size": 2}, "odd kernel_size"),
    ],
)
def test_bad_options(kind: str, options: dict, match: str) -> None:
    with pytest.raises(HeadError, match=match):
        build_head(kind, 8, 3, options=options)


def test_cosine_is_the_cosine() -> None:
    head = CosineHead(16, 3, scale=4.0)
    with torch.no_grad():
        head.weight.normal_()
    features = torch.randn(5, 16)
    expected = 4.0 * F.cosine_similarity(features[:, None], head.weight[None], dim=-1)
    torch.testing.assert_close(head(features), expected, rtol=2e-3, atol=2e-3)


def test_a_zero_cosine_head_starts_at_ln_k_with_an_ordinary_gradient() -> None:
    head = CosineHead(384, 4)
    features, labels = torch.randn(32, 384), torch.arange(32) % 4
    loss = F.cross_entropy(head(features), labels)
    assert loss.item() == pytest.approx(math.log(4), abs=1e-6)
    loss.backward()
    norm = head.weight.grad.norm().item()
    assert 0 < norm < 100  # division by the plain length gives 1e12


@pytest.mark.parametrize("width", [16, 384, 2048])
def test_the_default_cosine_scale_starts_near_ln_k(width: int) -> None:
    head = CosineHead(width, 10)
    with torch.no_grad():
        head.weight.normal_(std=(2 / width) ** 0.5)
    loss = F.cross_entropy(head(torch.randn(500, width)), torch.arange(500) % 10)
    assert abs(loss.item() - math.log(10)) < 0.15


def test_attention_pool_ignores_padding_and_starts_at_the_mean() -> None:
    pool = AttentionPool(8, num_heads=2)
    tokens, mask = torch.randn(3, 5, 8), torch.tensor([[1, 1, 1, 0, 0]] * 3)
    torch.testing.assert_close(pool(tokens, mask), tokens[:, :3].mean(1))  # a zero query is the mean
    pool.initialise(torch.Generator().manual_seed(0))
    torch.testing.assert_close(pool(tokens, mask), pool(tokens[:, :3]))
    by_hand = []
    for part, query in zip(tokens.split(4, -1), pool.query.split(4), strict=True):
        by_hand.append(((part @ query / 2).softmax(1).unsqueeze(-1) * part).sum(1))
    torch.testing.assert_close(pool(tokens), torch.cat(by_hand, -1))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_recurrent_pool_does_not_see_padding_on_either_side(cell: str, bidirectional: bool) -> None:
    pool = RecurrentPool(6, 4, cell, 2, bidirectional, 0.0)
    pool.initialise(torch.Generator().manual_seed(0))
    tokens = torch.randn(2, 3, 6)
    padding = torch.full((2, 2, 6), 9.0)
    right = pool(torch.cat([tokens, padding], 1), torch.tensor([[1, 1, 1, 0, 0]] * 2))
    left = pool(torch.cat([padding, tokens], 1), torch.tensor([[0, 0, 1, 1, 1]] * 2))
    torch.testing.assert_close(right, pool(tokens))
    torch.testing.assert_close(left, pool(tokens))
    assert right.shape == (2, pool.width)


def test_recurrent_initialisation() -> None:
    pool = RecurrentPool(64, 32, "lstm", 1, False, 0.0)
    intended = pool.initialise(torch.Generator().manual_seed(0))
    for gate in pool.rnn.weight_hh_l0.split(32):
        torch.testing.assert_close(gate @ gate.T, torch.eye(32), rtol=0, atol=1e-5)
    bound = math.sqrt(6 / (64 + 32))
    for gate in pool.rnn.weight_ih_l0.split(32):
        assert gate.abs().max() <= bound
        assert gate.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    forget = pool.rnn.bias_ih_l0 + pool.rnn.bias_hh_l0
    assert forget.tolist() == [0.0] * 32 + [1.0] * 32 + [0.0] * 64
    for name in ("weight_ih_l0", "weight_hh_l0"):
        assert getattr(pool.rnn, name).std().item() == pytest.approx(intended[f"rnn.{name}"], rel=0.05)


@pytest.mark.parametrize("kind", ["attention_pool", "recurrent"])
def test_heads_over_tokens_take_maps_and_refuse_pooled_features(kind: str) -> None:
    head = build_head(kind, 8, 3)
    assert head(torch.rand(2, 8, 4, 4)).shape == (2, 3)
    with pytest.raises(HeadError, match="pooled features"):
        head(torch.rand(2, 8))


def test_conv_heads() -> None:
    tokens, mask = torch.rand(2, 5, 8), torch.tensor([[1, 1, 1, 0, 0]] * 2)
    head = build_head("conv", 8, 3, options={"channels": 4})
    changed = tokens.clone()
    changed[:, 3:] = 7.0
    torch.testing.assert_close(head(tokens, mask), head(changed, mask))
    assert build_head("conv", 8, 3, options={"dims": 2})(torch.rand(2, 8, 4, 4)).shape == (2, 3)
    with pytest.raises(HeadError, match="dims=1"):
        build_head("conv", 8, 3, options={"dims": 2})(tokens)


def test_pooling_against_plain_loops() -> None:
    tokens = torch.randn(3, 5, 4)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1]])
    for row in range(3):
        real = tokens[row][mask[row] == 1]
        expected = {"mean": real.mean(0), "max": real.amax(0), "cls": real[0], "last": real[-1]}
        for pooling, value in expected.items():
            torch.testing.assert_close(pool_tokens(tokens, pooling, mask)[row], value)
    with pytest.raises(HeadError, match="Unknown pooling"):
        pool_tokens(tokens, "sum")
    assert as_tokens(torch.rand(2, 4, 3, 3)).shape == (2, 9, 4)


@pytest.mark.parametrize("pooling", ["logsumexp", "max"])
def test_multi_proxy_head_joins_the_rows_of_a_class(pooling: str) -> None:
    head = build_head("multi_proxy", 6, 3, options={"proxies": 4, "pooling": pooling})
    x = torch.randn(5, 6, dtype=torch.float64)
    rows = F.linear(x, head.output.weight.double(), head.output.bias.double()).view(5, 3, 4)
    wanted = rows.max(2).values if pooling == "max" else rows.exp().sum(2).log()
    torch.testing.assert_close(head.double()(x), wanted)
    assert (head.in_features, head.out_features) == (6, 3)
    assert output_layer(head).out_features == 12


@pytest.mark.parametrize(
    ("options", "match"), [({"proxies": 0}, "proxies of at least 1"), ({"pooling": "mean"}, "Known: logsumexp, max")]
)
def test_multi_proxy_head_options(options: dict, match: str) -> None:
    with pytest.raises(HeadError, match=match):
        build_head("multi_proxy", 6, 3, options=options)
