"""Kernels computed from inputs: named with what they depend on, and merged with pointwise layers around."""

from __future__ import annotations

import math
import random as rng
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captured import Pair, assert_close, random, randomised, regions_of
from torch import Tensor, nn

import convmerge
from convmerge.report import Report, SiteReport

W = nn.Parameter(random(4, 3, 1, 1))


def _reasons(model: nn.Module, *inputs: Tensor) -> set[str]:
    """What inspect says of the operators whose kernel is computed."""
    sites = convmerge.inspect(model, inputs).sites
    return {site.reason for site in sites if "depends" in site.reason or "every call" in site.reason}


def test_kernels_are_named_with_the_inputs_they_depend_on() -> None:
    x, y = random(1, 3, 5, 7), random(4, 3, seed=1)
    cases = {
        lambda m, x, y: F.conv2d(x, y[:, :, None, None]): "kernel depends on input y",
        lambda m, x, y: F.conv2d(x, W, y[:, 0]): "bias depends on input y",
        lambda m, x, y: F.conv2d(x, y[:, :, None, None] * x.mean()): "kernel depends on inputs x and y",
        lambda m, x, y: F.conv2d(x, W * x.mean((2, 3))[:, :, None, None]): "kernel depends on input x",
        lambda m, x, y: F.conv_transpose2d(x, y.t()[:, :, None, None]): "kernel depends on input y",
        lambda m, x, y: F.linear(x.movedim(1, -1), y): "kernel depends on input y",
        lambda m, x, y: x.movedim(1, -1) @ y.t(): "matrix depends on input y",
        lambda m, x, y: torch.einsum("bchw,oc->bohw", x, y): "matrix depends on input y",
        lambda m, x, y: torch.bmm(y[None], x.flatten(2)): "matrix depends on input y",
        lambda m, x, y: F.conv2d(x + y.sum(), W * torch.rand_like(W)): "kernel is another one in every call",
    }
    for forward, reason in cases.items():
        assert _reasons(Pair(forward), x, y) == {reason}


def test_attention_has_no_kernel() -> None:
    _, regions = regions_of(Pair(lambda m, x, y: x @ x.mT + y), random(5, 7), random(5, 5))
    assert not regions.refused and "matmul" in {call.op for call in regions.unknown}


COND = random(1, 5, seed=3)
APPLY = {2: F.linear, 3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


class Hyper(nn.Module):
    """A layer with a computed kernel between constant ones; its bias is computed, constant, or not there."""

    def __init__(
        self,
        shape: tuple[int, ...],
        before: nn.Module | None = None,
        after: nn.Module | None = None,
        bias: str = "",
        last: nn.Module | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.shape, self.options = shape, options
        self.numbers = math.prod(shape)
        self.computed = bias == "computed"
        made = self.numbers + shape[0] * self.computed
        self.generator = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, made))
        if last is not None:
            self.generator.append(last)
        self.bias = nn.Parameter(torch.zeros(shape[0])) if bias == "constant" else None
        self.before, self.after = before or nn.Identity(), after or nn.Identity()

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        made = self.generator(cond).flatten()
        bias = made[self.numbers :] if self.computed else self.bias
        kernel = made[: self.numbers].view(self.shape)
        return self.after(APPLY[len(self.shape)](self.before(x), kernel, bias, **self.options))


class PerSample(nn.Module):
    """A kernel for every sample, as one grouped convolution."""

    def __init__(self, before: nn.Module | None = None) -> None:
        super().__init__()
        self.kernel = nn.Linear(5, 6 * 3)
        self.before = before or nn.Identity()
        self.after = nn.Sequential(nn.Conv2d(6, 2, 1), nn.ReLU())

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        x = self.before(x)
        b, c, h, w = x.shape
        y = F.conv2d(x.reshape(1, b * c, h, w), self.kernel(cond).view(b * 6, 3, 1, 1), groups=b)
        return self.after(y.view(b, 6, h, w))


class Mixed(nn.Module):
    """A mixture of kernels, weighted by what the image looks like; the vector only shifts the result."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.mixing = nn.Parameter(torch.zeros(4, 6 * 3 * 9)), nn.Linear(3, 4)
        self.after, self.shift = nn.Conv2d(6, 2, 1), nn.Linear(5, 2)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        kernel = (self.mixing(x.mean((2, 3))).sigmoid() @ self.kernels).view(6, 3, 3, 3)
        return self.after(F.conv2d(x, kernel)) + self.shift(cond)[:, :, None, None]


MAP = random(1, 3, 9, 8)
# What merges: model, input, modules that are gone, the merged geometry.
MERGED: dict[str, tuple[nn.Module, Tensor, str, str]] = {
    "after": (Hyper((11, 3, 1, 1), after=nn.Conv2d(11, 2, 1)), MAP, "after", "3→2 1×1"),
    "after, without bias": (
        Hyper((11, 3, 1, 1), after=nn.Conv2d(11, 2, 1, bias=False)),
        MAP,
        "after",
        "3→2 1×1",
    ),
    "after a biased one": (
        Hyper((11, 3, 1, 1), after=nn.Conv2d(11, 2, 1), bias="constant"),
        MAP,
        "after",
        "3→2 1×1",
    ),
    "computed bias": (
        Hyper((11, 3, 1, 1), after=nn.Conv2d(11, 2, 1), bias="computed"),
        MAP,
        "after",
        "3→2 1×1",
    ),
    "after a 3×3 kernel": (
        Hyper(
            (11, 3, 3, 3), after=nn.Conv2d(11, 2, 1), bias="computed", stride=2, padding=1, dilation=(1, 2)
        ),
        MAP,
        "after",
        "3→2 3×3 stride 2 dilation 1×2 padding 1",
    ),
    "batch norm": (Hyper((4, 3, 1, 1), after=nn.BatchNorm2d(4)), MAP, "after", "3→4 1×1"),
    "batch norm and groups": (
        Hyper((4, 3, 3, 3), nn.BatchNorm2d(6), nn.BatchNorm2d(4), "computed", groups=2),
        random(1, 6, 9, 8),
        "after",
        "6→4 3×3 groups 2",
    ),
    "before": (Hyper((2, 11, 1, 1), nn.Conv2d(3, 11, 1), bias="constant"), MAP, "before", "3→2 1×1"),
    "before a 3×3 kernel": (
        Hyper((2, 11, 3, 3), nn.Conv2d(3, 11, 1), stride=2),
        MAP,
        "before",
        "3→2 3×3 stride 2",
    ),
    "before padding": (
        Hyper((2, 11, 3, 3), nn.Conv2d(3, 11, 1, bias=False), padding=1),
        MAP,
        "before",
        "3→2 3×3 padding 1",
    ),
    "on both sides": (
        Hyper((13, 11, 1, 1), nn.Sequential(nn.Conv2d(3, 11, 1), nn.BatchNorm2d(11)), nn.Conv2d(13, 2, 1)),
        MAP,
        "after",
        "3→2 1×1",
    ),
    "one dimension": (Hyper((11, 3, 3), after=nn.Conv1d(11, 2, 1)), random(1, 3, 50), "after", "3→2 3"),
    "three dimensions": (
        Hyper((11, 3, 1, 1, 1), after=nn.Conv3d(11, 2, 1)),
        random(1, 3, 4, 5, 6),
        "after",
        "3→2 1×1×1",
    ),
    "linear": (Hyper((11, 3), nn.Linear(4, 3), nn.Linear(11, 2), "computed"), random(50, 4), "after", "4→2"),
    "a kernel for every sample": (PerSample(), MAP, "after.0", "3→2 1×1"),
    "before a kernel for every sample": (PerSample(nn.Conv2d(2, 3, 1)), MAP[:, :2], "after.0", "2→2 1×1"),
    "a mixture that depends on the image": (Mixed(), MAP, "kernels", "3→2 3×3"),
    "composed in every call": (
        Hyper((11, 3, 1, 1), after=nn.Conv2d(11, 2, 1), last=nn.Sigmoid()),
        random(1, 3, 33, 31),
        "after",
        "3→2 1×1",
    ),
    "composed on both sides": (
        Hyper(
            (13, 11, 3, 3),
            nn.Conv2d(3, 11, 1),
            nn.Sequential(nn.BatchNorm2d(13), nn.Conv2d(13, 2, 1)),
            "computed",
            nn.Sigmoid(),
        ),
        random(1, 3, 33, 31),
        "after",
        "3→2 3×3",
    ),
}


@pytest.mark.parametrize("name", MERGED)
def test_pointwise_layers_move_into_the_generator(name: str) -> None:
    model, x, gone, geometry = MERGED[name]
    randomised(model)
    result = convmerge.fuse(model, (x, COND))
    (row,) = _rows(result.report)
    assert (row.action, row.geometry) == ("merge", geometry), row
    assert row.error is not None and row.bound is not None and row.error <= row.bound
    assert row.macs_after <= row.macs_before and row.latency_after < row.latency_before
    assert not any(key.startswith(f"{gone}.") for key in result.model.state_dict())
    assert gone not in result.model.state_dict()
    for scale in (1.0, -2.0):
        assert_close(result.model(x, COND * scale), model(x, COND * scale), 1e-10)
    _check_gradients(model, result.model, x)


def _rows(report: Report) -> list[SiteReport]:
    """What became of the computed kernels."""
    return [site for site in report.sites if any(name.startswith("computed") for name in site.operators)]


def _check_gradients(a: nn.Module, b: nn.Module, x: Tensor) -> None:
    """The same derivatives with respect to both inputs, and some for every parameter that is left."""
    found = []
    for model in (a, b):
        inputs = x.clone().requires_grad_(), COND.clone().requires_grad_()
        output = model(*inputs)
        found.append(
            torch.autograd.grad((output * random(*output.shape, seed=5)).sum(), inputs, retain_graph=True)
        )
        if model is b:
            assert all(g is not None for g in torch.autograd.grad(output.sum(), list(model.parameters())))
    for mine, other in zip(*found, strict=True):
        assert_close(mine, other, 1e-9)


def test_a_kernel_for_every_sample_of_a_batch() -> None:
    model = randomised(PerSample())
    fused = convmerge.fuse(model, (MAP, COND)).model
    assert not any(key.startswith("after") for key in fused.state_dict())
    x, cond = torch.cat([MAP, -MAP, 2 * MAP]), torch.cat([COND, COND + 1, -COND])
    assert_close(fused(x, cond), model(x, cond), 1e-10)


def test_what_costs_more_is_kept_with_numbers() -> None:
    wide = randomised(Hyper((3, 4, 1, 1), after=nn.Conv2d(3, 64, 1)))
    (row,) = _rows(convmerge.inspect(wide, (random(1, 4, 3, 2), COND)))
    assert row.action == "keep" and row.reason.startswith("costs more with its kernel ")
    assert row.macs_after > row.macs_before
    small = randomised(Hyper((7, 61, 1, 1), after=nn.Conv2d(7, 5, 1), last=nn.Sigmoid()))
    (row,) = _rows(convmerge.inspect(small, (random(1, 61, 2, 2), COND)))
    assert row.action == "keep" and row.macs_after > row.macs_before
    (row,) = _rows(convmerge.inspect(small, (random(1, 61, 40, 50), COND)))
    assert row.action == "merge" and "composed in every call" in row.reason


@pytest.mark.parametrize(
    "model, x",
    [
        (Hyper((11, 3, 1, 1), after=nn.Sequential(nn.ReLU(), nn.Conv2d(11, 2, 1))), MAP),
        (Hyper((2, 11, 3, 3), nn.Conv2d(3, 11, 1), padding=1), MAP),  # the bias would end at the border
        (Hyper((4, 3, 1, 1), after=nn.Conv2d(4, 2, 1), groups=2), random(1, 6, 9, 8)),
        (Hyper((11, 3, 1, 1), after=nn.Conv2d(11, 2, 1, stride=2)), MAP),
        (Hyper((11, 3, 1, 1), after=nn.Conv2d(11, 2, 1, padding=1)), MAP),
    ],
)
def test_what_is_not_pointwise_or_not_exact_stays(model: nn.Module, x: Tensor) -> None:
    randomised(model)
    result = convmerge.fuse(model, (x, COND))
    rows = _rows(result.report)
    assert not any(row.action == "merge" or "differs from" in row.reason for row in rows)
    assert_close(result.model(x, COND), model(x, COND), 1e-10)


def test_a_generator_of_several_kernels_stays() -> None:
    def forward(m: Any, x: Tensor, y: Tensor) -> Tensor:
        made = m.generator(y).flatten()
        x = F.relu(m.first(F.conv2d(x, made[:33].view(11, 3, 1, 1))))
        return m.second(F.conv2d(x, made[33:].view(11, 3, 1, 1)))

    layers = {"generator": nn.Linear(5, 66), "first": nn.Conv2d(11, 3, 1), "second": nn.Conv2d(11, 2, 1)}
    model, x = randomised(Pair(forward, **layers)), random(1, 3, 33, 31)
    result = convmerge.fuse(model, (x, COND))
    rows = _rows(result.report)
    assert [row.action for row in rows] == ["merge", "merge"]
    assert all("composed in every call" in row.reason for row in rows)
    assert_close(result.model(x, COND), model(x, COND), 1e-10)


def test_several_kernels_in_modules_of_their_own() -> None:
    def block(inp: int, out: int) -> nn.Module:
        return randomised(Hyper((11, inp, 1, 1), after=nn.Conv2d(11, out, 1), bias="computed"), seed=inp)

    def forward(m: Any, x: Tensor, y: Tensor) -> Tensor:
        return m.second(F.relu(m.first(x, y)), y)

    model = Pair(forward, first=block(3, 4), second=block(4, 2)).eval()
    result = convmerge.fuse(model, (MAP, COND))
    assert [row.place for row in result.report.merged()] == ["first", "second"]
    assert_close(result.model(MAP, COND), model(MAP, COND), 1e-10)
    kept = convmerge.fuse(model, (MAP, COND), skip=["first.after"]).model
    assert "first.after.weight" in kept.state_dict() and "second.after.weight" not in kept.state_dict()


def test_a_module_called_twice_stays() -> None:
    def forward(m: Any, x: Tensor, y: Tensor) -> Tensor:
        return m.block(F.relu(m.block(x, y)), y)

    model = randomised(Pair(forward, block=Hyper((11, 3, 1, 1), after=nn.Conv2d(11, 3, 1))))
    result = convmerge.fuse(model, (MAP, COND))
    assert all(row.action == "refuse" and "is called 2 times" in row.reason for row in _rows(result.report))
    assert_close(result.model(MAP, COND), model(MAP, COND), 1e-10)


def test_linear_layers_of_a_generator_merge() -> None:
    def forward(m: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.relu(F.conv2d(x, m.generator(y).view(4, 3, 1, 1)))

    generator = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 12))
    model = randomised(Pair(forward, generator=generator))
    result = convmerge.fuse(model, (MAP, COND))
    assert [type(m) for m in result.model.generator.modules() if not list(m.children())].count(nn.Linear) == 1
    assert sum(p.numel() for p in result.model.parameters()) == 12 * 6
    assert_close(result.model(MAP, COND), model(MAP, COND), 1e-10)


def test_single_precision() -> None:
    model = randomised(Hyper((11, 3, 1, 1), after=nn.Conv2d(11, 2, 1))).float()
    result = convmerge.fuse(model, (MAP.float(), COND.float()))
    assert result.report.verification is not None and result.report.verification.equal
    assert {p.dtype for p in result.model.parameters()} == {torch.float32}


def _random_model(seed: int) -> tuple[nn.Module, Tensor]:
    """A computed kernel of random sizes between random constant layers."""
    draw = rng.Random(seed)
    groups, kernel = draw.choice([1, 1, 2]), draw.choice([1, 1, 3])
    inp, mid = groups * draw.choice([1, 2, 5]), groups * draw.choice([2, 7])

    def around(i: int, o: int) -> nn.Module:
        layers: list[nn.Module] = [nn.BatchNorm2d(i)] if draw.random() < 0.4 else []
        if draw.random() < 0.7:
            size = draw.choice([1, 1, 1, 3])
            layers.append(nn.Conv2d(i, o, size, bias=draw.random() < 0.6, groups=draw.choice([1, groups])))
        else:
            o = i
        if draw.random() < 0.4:
            layers.append(nn.BatchNorm2d(o))
        if draw.random() < 0.2:
            layers.append(nn.ReLU())
        return nn.Sequential(*layers)

    before, after = around(2 * groups, inp), around(mid, groups * draw.choice([1, 3]))
    sizes = [m.out_channels for m in before if isinstance(m, nn.Conv2d)] or [2 * groups]
    model = Hyper(
        (mid, sizes[-1] // groups, kernel, kernel),
        before,
        after,
        draw.choice(["", "constant", "computed"]),
        draw.choice([None, None, nn.Tanh()]),
        groups=groups,
        padding=draw.choice([0, 0, 1]),
        stride=draw.choice([1, 2]),
    )
    return randomised(model, seed), random(1, 2 * groups, draw.choice([11, 20]), 13, seed=seed)


def _check_random(seed: int) -> bool:
    model, x = _random_model(seed)
    result = convmerge.fuse(model, (x, COND))
    assert result.report.verification is None or result.report.verification.equal, seed
    assert not any("left out" in warning for warning in result.report.warnings), seed
    for cond in (COND, -2 * COND):
        assert_close(result.model(x, cond), model(x, cond), 1e-9)
    _check_gradients(model, result.model, x)
    return any(row.action == "merge" for row in _rows(result.report))


def test_random_computed_kernels() -> None:
    merged = [_check_random(seed) for seed in range(4)]
    assert any(merged)


@pytest.mark.long
def test_many_random_computed_kernels() -> None:
    merged = [_check_random(seed) for seed in range(4, 150)]
    assert sum(merged) > 50
