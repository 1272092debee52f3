"""Layers on one value become one layer and views of its output, where that is faster and views allow it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captured import Function, assert_close, random, randomised
from torch import Tensor, nn

import convmerge
from convmerge.api import Result


def fused(model: nn.Module, x: Tensor, **options: Any) -> Result:
    """Fuse, and check that the result is the same function, for a larger batch too."""
    result = convmerge.fuse(model, x, **options)
    assert result.report.verification is None or result.report.verification.equal
    with torch.no_grad():
        for given in (x, torch.cat([x, x.flip(-1), 2 * x])):
            assert_close(result.model(given.clone()), model(given.clone()))
    return result


def layers(result: Result) -> int:
    return sum(isinstance(m, nn.Conv2d | nn.Linear) for m in result.model.modules())


def reasons(result: Result) -> str:
    return "; ".join(site.reason for site in result.report.sites if site.action != "merge")


class Attention(nn.Module):
    """With separate projections, of which one has no bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.value, self.out, self.heads = nn.Linear(width, width), nn.Linear(width, width), heads

    def split(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        return x.view(batch, tokens, self.heads, width // self.heads).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return x + self.out(y)


def test_projections_of_few_tokens_are_one_layer() -> None:
    result = fused(randomised(Attention(14, 2)), random(2, 5, 14))
    assert layers(result) == 2
    (site,) = result.report.merged()
    assert site.operators == ("linear | linear | linear",)
    assert site.tree[0] == "3 layers on one value"
    assert isinstance(result.model.get_submodule("query"), nn.Linear)


@pytest.mark.parametrize("tokens", [4, 512])
def test_projections_that_take_as_long_together_stay(tokens: int) -> None:
    result = convmerge.inspect(Attention(768, 12).eval(), torch.randn(1, tokens, 768))
    assert not result.merged()
    assert any("costs more as one layer" in site.reason for site in result.sites)


def conv_norm(channels: int, out: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU(inplace=True))


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = conv_norm(22, 6, 1)
        self.b = nn.Sequential(conv_norm(22, 7, 1), conv_norm(7, 9, 3))
        self.c = nn.Sequential(conv_norm(22, 3, 1), conv_norm(3, 5, 5))
        self.d = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv_norm(22, 5, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x), self.c(x), self.d(x)], 1)


def test_pointwise_convolutions_of_one_map_are_one() -> None:
    result = fused(randomised(Inception()), random(1, 22, 9, 11))
    assert layers(result) == 4
    assert not any(isinstance(m, nn.BatchNorm2d) for m in result.model.modules())


def test_of_several_maps_they_stay() -> None:
    result = fused(randomised(Inception()), random(2, 22, 9, 11))
    assert layers(result) == 6
    assert "strided" in reasons(result)


STAYING: list[tuple[Callable[..., Any], str]] = [
    (lambda m, x: m.a(x).relu() * m.b(x.clone().mul_(x.tanh())).sigmoid(), ""),
    (lambda m, x: m.a(x).relu() * m.other(x).sigmoid(), ""),
    (lambda m, x: m.a(x).relu() * m.strided(x).mean(), ""),
    (lambda m, x: m.l(x).view(x.shape[0], -1).relu() + m.k(x).view(x.shape[0], -1).tanh(), "contiguous"),
]


def model_of(forward: Callable[..., Any]) -> nn.Module:
    parts = {"a": nn.Conv1d(5, 7, 1), "b": nn.Conv1d(5, 7, 1), "other": nn.Conv1d(5, 7, 3, padding=1)}
    return randomised(
        Function(
            forward, **parts, strided=nn.Conv1d(5, 7, 1, stride=2), l=nn.Linear(13, 4), k=nn.Linear(13, 4)
        )
    )


@pytest.mark.parametrize("index", range(len(STAYING)))
def test_layers_of_another_value_or_geometry_or_whose_views_would_fail_stay(index: int) -> None:
    forward, reason = STAYING[index]
    model, x = model_of(forward), random(1, 5, 13)
    result = convmerge.fuse(model, x)
    assert not any("|" in name for site in result.report.merged() for name in site.operators)
    assert reason in reasons(result)
    with torch.no_grad():
        assert_close(result.model(x.clone()), model(x.clone()))


JOINED: list[Callable[..., Any]] = [
    lambda m, x: m.a(x).relu_() * m.b(x).sigmoid_(),
    lambda m, x: m.a(x).relu() * m.b(x) * m.a.weight.sum(),
    lambda m, x: (lambda y: m.b(y).relu() + m.a(y).tanh() * y.mean())(x.sin()),
    lambda m, x: m.a(x).relu().unsqueeze(0).squeeze(0) - m.b(x).transpose(1, 2).relu().transpose(1, 2),
]


@pytest.mark.parametrize("index", range(len(JOINED)))
def test_siblings_whose_parts_are_changed_in_place_or_viewed(index: int) -> None:
    result = fused(model_of(JOINED[index]), random(1, 5, 13))
    used = [site for site in result.report.merged() if "|" in site.operators[0]]
    assert len(used) == (index != 1), result.report.sites


def written_between(m: Any, x: Tensor) -> Tensor:
    y = x.relu()
    first = m.a(y).relu()
    y.mul_(x.cos())
    return first * m.b(y).sigmoid()


def scaled_between(m: Any, x: Tensor) -> Tensor:
    y = x.relu()
    first = m.a(y).relu()
    y.mul_(2)
    return first * m.b(y).sigmoid()


def test_a_factor_between_the_readers_is_part_of_one_of_them() -> None:
    result = fused(model_of(scaled_between), random(1, 5, 13))
    assert "conv 1 | (mul → conv 1)" in [site.operators[0] for site in result.report.merged()]


def test_a_value_that_is_written_to_between_its_readers() -> None:
    result = fused(model_of(written_between), random(1, 5, 13))
    assert not any("|" in name for site in result.report.merged() for name in site.operators)


def test_only_and_skip_hold_for_siblings() -> None:
    for options in ({"skip": ["key"]}, {"only": ["out"]}):
        assert layers(fused(randomised(Attention(14, 2)), random(2, 5, 14), **options)) == 4


@pytest.mark.parametrize(("objective", "left"), [("macs", 2), ("params", 4)])
def test_the_objective_counts_first(objective: str, left: int) -> None:
    """The projection without a bias would get one of zeros."""
    assert layers(fused(randomised(Attention(14, 2)), random(2, 5, 14), objective=objective)) == left
