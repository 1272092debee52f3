"""Whole models written as real code is: the same function at every size and batch that the original takes.

Each is fused on one example and compared in float64 on maps from one position up and on other batch sizes.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captured import Function, assert_close, random, randomised
from torch import Tensor, nn

import convmerge
from convmerge.errors import ConvmergeError

MAP = (2, 6, 9, 11)
ROWS = (3, 24)


def sizes(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """The shape itself, other batches of it, and other sizes of each of its spatial dimensions."""
    yield shape
    for batch in (1, 3, 4):
        yield (batch, *shape[1:])
    for dim, n in itertools.product(range(2, len(shape)), range(1, 8)):
        yield (*shape[:dim], n, *shape[dim + 1 :])
    for n in (1, 2, 3, 4, 8, 13):
        yield (*shape[:2], *(n for _ in shape[2:]))


def flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for part in value for t in flat(part)]


def fused(model: nn.Module, x: Tensor) -> convmerge.api.Result:
    """The fused model, once it has been found to be the same function at all sizes."""
    result = convmerge.fuse(model, x)
    for shape in sizes(tuple(x.shape)):
        inputs = random(*shape, seed=sum(shape)).to(x.dtype)
        with torch.no_grad():
            try:
                expected = model(inputs.clone())
            except (RuntimeError, ValueError):
                continue
            found = result.model(inputs.clone())
        for a, b in zip(flat(found), flat(expected), strict=True):
            assert_close(a, b, 1e-10)
    return result


def small_map_sum(m: Any, x: Tensor) -> Tensor:
    """Two branches whose sizes agree for even inputs only; for three positions one and two broadcast."""
    return m.c(m.a(x) + m.b(x))


def written_in_part(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    y[:, :3] += m.b(x)
    return m.c(y)


def input_scaled_in_between(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    x.mul_(0.5)
    return m.c(y) + m.d(x)


def view_written(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    y.view(y.shape[0], -1).add_(1.0)
    return m.c(y)


def padded_to_multiple(m: Any, x: Tensor) -> Tensor:
    h, w = x.shape[-2:]
    return F.pixel_shuffle(m.d(m.a(F.pad(x, (0, -w % 4, 0, -h % 4)))), 4)[..., :h, :w]


def centre_crop(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    top, left = ((x.shape[d] - y.shape[d]) // 2 for d in (2, 3))
    return m.c(y + m.d(x[:, :, top : top + y.shape[2], left : left + y.shape[3]]))


CASES: dict[str, tuple[Callable[..., Any], dict[str, nn.Module | Tensor], tuple[int, ...]]] = {
    "sum that broadcasts on small maps": (
        small_map_sum,
        {
            "a": nn.Conv2d(6, 8, 2, stride=2),
            "b": nn.Conv2d(6, 8, 3, stride=2, padding=1),
            "c": nn.Conv2d(8, 5, 1),
        },
        (2, 6, 6, 6),
    ),
    "squeeze() also drops a batch of one": (
        lambda m, x: m.b(m.a(x.unsqueeze(-1))).squeeze(),
        {"a": nn.Conv1d(24, 12, 1, groups=4), "b": nn.Conv1d(12, 18, 1, groups=3)},
        ROWS,
    ),
    "squeeze() that does nothing here": (
        lambda m, x: m.b(m.a(x).squeeze()),
        {"a": nn.Linear(24, 12), "b": nn.Linear(12, 5)},
        ROWS,
    ),
    "squeeze after a pool": (
        lambda m, x: m.b(F.adaptive_avg_pool2d(m.a(x), 1).squeeze()),
        {"a": nn.Conv2d(6, 16, 1), "b": nn.Linear(16, 5)},
        MAP,
    ),
    "written in part": (
        written_in_part,
        {"a": nn.Conv2d(6, 8, 1), "b": nn.Conv2d(6, 3, 1), "c": nn.Conv2d(8, 5, 1)},
        MAP,
    ),
    "input scaled in between": (
        input_scaled_in_between,
        {"a": nn.Conv2d(6, 8, 1), "c": nn.Conv2d(8, 5, 1), "d": nn.Conv2d(6, 5, 1)},
        MAP,
    ),
    "written through a view": (view_written, {"a": nn.Conv2d(6, 8, 1), "c": nn.Conv2d(8, 5, 1)}, MAP),
    "padded to a multiple": (
        padded_to_multiple,
        {"a": nn.Conv2d(6, 8, 4, stride=4), "d": nn.Conv2d(8, 32, 1)},
        MAP,
    ),
    "centre crop": (
        centre_crop,
        {"a": nn.Conv2d(6, 8, 3), "c": nn.Conv2d(8, 5, 1), "d": nn.Conv2d(6, 8, 1)},
        MAP,
    ),
    "channels as many as positions": (
        lambda m, x: (m.b(m.a(x).transpose(1, 2)), m.d(m.c(x) * m.v + m.v), m.c(m.b(x) * m.w)),
        {
            "a": nn.Linear(8, 8),
            "b": nn.Linear(8, 8),
            "c": nn.Conv1d(8, 8, 1),
            "d": nn.Conv1d(8, 8, 1),
            "v": torch.arange(1.0, 9.0),
            "w": torch.arange(1.0, 9.0)[:, None],
        },
        (8, 8, 8),
    ),
    "one filter for two maps": (
        lambda m, x: (m.b(torch.cat([m.a(x), m.a(x * 2)], 2)), m.b(m.a(x[:, :, :3]))),
        {"a": nn.Conv2d(6, 8, 1), "b": nn.Conv2d(8, 5, 3)},
        MAP,
    ),
    "space to depth by slices": (
        lambda m, x: m.d(
            m.b(m.a(torch.cat([x[..., i::2, j::2] for i, j in itertools.product((0, 1), (0, 1))], 1)))
        ),
        {"a": nn.Conv2d(24, 8, 1), "b": nn.BatchNorm2d(8), "d": nn.Conv2d(8, 4, 3, padding=1)},
        (2, 6, 8, 10),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_function_at_other_sizes_and_batches(name: str) -> None:
    forward, parts, shape = CASES[name]
    model = randomised(Function(forward, **parts))
    result = fused(model, random(*shape))
    assert all(site.reason for site in result.report.sites)


def test_branches_that_broadcast_on_small_maps_are_no_internal_error() -> None:
    forward, parts, shape = CASES["sum that broadcasts on small maps"]
    report = fused(randomised(Function(forward, **parts)), random(*shape)).report
    assert not any("Conv2d(6" in site.reason for site in report.merged())


class Positions(nn.Module):
    """A position embedding, sliced to the length of the sequence, between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(10, 24))
        self.a, self.b = nn.Linear(24, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) + self.embedding[: x.shape[1]])


def test_sequences_are_compared_at_other_lengths() -> None:
    """With one token in the example, its position looks like a bias of all."""
    model = randomised(Positions())
    result = convmerge.fuse(model, random(2, 1, 24))
    assert not result.report.merged()
    x = random(2, 3, 24)
    assert_close(result.model(x), model(x))


def test_a_batch_of_one_is_compared() -> None:
    class Dropping(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.squeeze(0)

    verdict = convmerge.verify(Dropping(), nn.Identity(), random(*ROWS))
    assert not verdict.equal and "on 1×" in verdict.reason


def test_nobody_is_told_of_options_that_were_not_given() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.b(y - 0.5 * y.mean(1, keepdim=True))

    model = randomised(Function(forward, a=nn.Linear(24, 24), b=nn.Linear(24, 5)))
    report = convmerge.inspect(model, random(2, 1, 24))
    assert report.sites and not any("--only" in site.reason for site in report.sites)


def failing_at_odd_sizes(m: Any, x: Tensor) -> Tensor:
    """What torch.fx traces at even sizes does not run at odd ones, where the original pads."""
    y = m.up(m.down(x))
    right, below = x.shape[3] - y.shape[3], x.shape[2] - y.shape[2]
    return m.c(torch.cat([x, F.pad(y, [0, right, 0, below])], 1))


def test_what_fails_in_verification_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    down, up = nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.ConvTranspose2d(8, 6, 2, 2)
    model = randomised(Function(failing_at_odd_sizes, down=down, up=up, c=nn.Conv2d(12, 5, 1)))
    fused(model, random(2, 6, 14, 18))
    assert capfd.readouterr().err == ""


def test_complex_numbers_are_refused_for_what_they_are() -> None:
    model = Function(lambda m, x: torch.view_as_real(m.b(m.a(x))), a=nn.Linear(6, 8), b=nn.Linear(8, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of modules with complex parameters
        model = model.to(torch.complex64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = convmerge.fuse(model, torch.randn(3, 6, dtype=torch.complex64)).report
    assert {site.reason for site in report.sites} == {"computes with complex numbers"}


@pytest.mark.parametrize("command", [convmerge.fuse, convmerge.inspect, convmerge.check])
def test_a_model_that_draws_random_numbers_leaves_the_random_state_alone(command: Callable[..., Any]) -> None:
    model = Function(lambda m, x: m.b(F.dropout(m.a(x))), a=nn.Linear(24, 8), b=nn.Linear(8, 5))
    before = torch.get_rng_state()
    command(model, torch.ones(3, 24))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_scripted_part_is_named_as_what_it_is() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and in use
        model = nn.Sequential(nn.Linear(24, 8), torch.jit.script(nn.Linear(8, 5)))
    with pytest.raises(ConvmergeError, match="1 is TorchScript"):
        convmerge.fuse(model, torch.ones(3, 24))
