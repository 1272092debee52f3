"""Bad structure gets a reason in plain words, at the place where it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captured import random, randomised
from torch import Tensor, nn

import convmerge
from convmerge.report import SiteReport

MAP = (2, 6, 7, 9)


class Forward(nn.Module):
    """The modules, and what a function makes of them and the inputs."""

    def __init__(self, forward: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        return self.run(self, x) if y is None else self.run(self, x, y)


def conv(kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(6, 6, kernel, stride, kernel // 2)


def both(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = m.a(x)
    return y, m.norm(y)


def neighbours(m: Any, x: Tensor) -> Tensor:
    result: Tensor = m.norm(m.a(x)).relu() + m.other(m.a(x.tanh())).sigmoid()
    return result


CASES: dict[str, tuple[Callable[..., Any], int, str]] = {
    "two inputs": (lambda m, x, y: m.a(x) + m.b(y), 2, "branch 2 reads a different input"),
    "a non-linear step in a branch": (
        lambda m, x: m.norm(m.a(x) + m.b(x.relu())),
        1,
        "branch 2 reads a different input",
    ),
    "a third branch": (
        lambda m, x: m.a(x) + m.b(x) + m.other(x.tanh()),
        1,
        "branch 2 reads a different input",
    ),
    "strides": (
        lambda m, x: m.a(x) + F.interpolate(m.halved(x), x.shape[2:]),
        1,
        "a branch goes through interpolate",
    ),
    "another reader": (
        lambda m, x: m.norm(y := m.a(x)) + y.relu(),
        1,
        "the result of conv 3×3 is also read by relu",
    ),
    "a norm alone": (
        lambda m, x: m.norm(F.max_pool2d(m.a(x), 2)).relu(),
        1,
        "no layer next to it: it follows max_pool2d and goes to relu",
    ),
    "two outputs": (both, 1, "the result of conv 3×3 is an output of the model too"),
    "two calls": (neighbours, 1, "a is called 2 times with different neighbours"),
    "kernel": (lambda m, x, w: m.norm(F.conv2d(x, w)), 2, "kernel depends on input"),
    "statistics": (
        lambda m, x: F.batch_norm(m.a(x), None, None, training=True),
        1,
        "statistics of the batch",
    ),
    "dropout": (lambda m, x: m.norm(F.dropout(m.a(x))), 1, "active at inference too"),
}


def sites(name: str) -> tuple[SiteReport, ...]:
    forward, inputs, _ = CASES[name]
    modules = {
        "a": conv(),
        "b": conv(1),
        "halved": conv(3, 2),
        "norm": nn.BatchNorm2d(6),
        "other": nn.BatchNorm2d(6),
    }
    model = randomised(Forward(forward, **modules))
    x = (random(*MAP), random(5, 6, 1, 1) if name == "kernel" else random(*MAP))[:inputs]
    if name == "kernel":
        model.norm = randomised(nn.BatchNorm2d(5))
    return convmerge.inspect(model, x).sites


@pytest.mark.parametrize("name", CASES)
def test_the_reason_is_given(name: str) -> None:
    refused = [site for site in sites(name) if site.action == "refuse"]
    assert any(CASES[name][2] in site.reason for site in refused), [site.reason for site in refused]
    assert all(site.place for site in refused)


def test_a_norm_that_merges_or_has_a_reason_has_no_other_one() -> None:
    found = [site for site in sites("another reader") if "batch_norm" in site.operators]
    assert len(found) == 1
    model = randomised(Forward(lambda m, x: m.norm(m.a(x)).relu(), a=conv(), norm=nn.BatchNorm2d(6)))
    assert [site.action for site in convmerge.inspect(model, random(*MAP)).sites] == ["merge"]


def test_a_plain_residual_block_gives_no_reason() -> None:
    model = randomised(Forward(lambda m, x: (x + m.b(m.a(x).relu())).relu(), a=conv(), b=conv()))
    assert convmerge.inspect(model, torch.randn(*MAP, dtype=torch.float64)).sites == ()
