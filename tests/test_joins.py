"""Sums of terms that start from different values: parts of them merge, and operators after them move in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from captured import Function, Pair, assert_close, random, randomised
from torch import Tensor, nn

import convmerge
from convmerge.api import Result

MAP = (2, 6, 11, 13)


def parts() -> dict[str, nn.Module]:
    return {
        "a": nn.Conv2d(6, 6, 3, padding=1),
        "b": nn.Conv2d(6, 6, 1),
        "c": nn.Conv2d(6, 6, (1, 3), padding=(0, 1)),
        "g": nn.Conv2d(6, 6, 3, padding=1, groups=2, bias=False),
        "n": nn.BatchNorm2d(6),
        "far": nn.Conv2d(6, 6, 5, padding=2),
    }


def fused(model: nn.Module, *inputs: Tensor, **options: Any) -> Result:
    """Fuse, and check that the result is the same function, at another size too."""
    result = convmerge.fuse(model, inputs, **options)
    assert result.report.verification is None or result.report.verification.equal
    assert not any("differs" in site.reason for site in result.report.sites), result.report.sites
    wider = tuple(torch.cat([x, x.flip(-1)[..., :3]], -1) for x in inputs)
    with torch.no_grad():
        for given in (inputs, wider):
            kept = [x.clone() for x in given]
            for actual, expected in zip(listed(result.model(*given)), listed(model(*kept)), strict=True):
                assert_close(actual, expected)
    return result


def listed(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, tuple) else [value]


def convolutions(result: Result) -> int:
    return sum(isinstance(m, nn.Conv2d | nn.Linear) for m in result.model.modules())


def norms(result: Result) -> int:
    return sum(isinstance(m, nn.BatchNorm2d) for m in result.model.modules())


def reasons(result: Result) -> str:
    return "; ".join(site.reason for site in result.report.sites if site.action != "merge")


def check(forward: Callable[..., Any], names: str, **options: Any) -> Result:
    """A model of two inputs with the modules that its function uses."""
    known = parts()
    model = randomised(Pair(forward, **{name: known[name] for name in names.split()}))
    return fused(model, random(*MAP), random(*MAP, seed=1), **options)


# --- Terms of one origin in a larger sum --------------------------------------------------------------------

PARTIAL: list[tuple[Callable[..., Any], str, int]] = [
    (lambda m, x, z: m.a(x) + m.b(x) + m.c(z.relu()), "a b c", 2),
    (lambda m, x, z: m.a(x) + m.c(z.relu()) + m.b(x), "a b c", 2),
    (lambda m, x, z: m.c(z.relu()) + m.a(x) + m.b(x), "a b c", 2),
    (lambda m, x, z: m.c(z.relu()) + (m.a(x) + m.b(x)), "a b c", 2),
    (lambda m, x, z: m.a(x) - (m.c(z.relu()) - m.b(x)), "a b c", 2),
    (lambda m, x, z: m.c(z.relu()) - m.a(x) - m.b(x), "a b c", 2),
    (lambda m, x, z: z.relu() - (x - m.a(x)) + m.b(x), "a b", 1),
    (lambda m, x, z: (z.relu() - x) - (m.c(z) - m.b(x)), "b c", 2),
    (lambda m, x, z: (m.a(x) + m.far(z)) + (m.b(x) + m.c(z)), "a b c far", 2),
    (lambda m, x, z: sum([m.a(x), m.c(z.relu()), m.b(x)]), "a b c", 2),
    (lambda m, x, z: torch.stack([m.a(x), z.relu(), m.b(x)]).sum(0), "a b", 1),
    (lambda m, x, z: torch.stack([z.relu(), m.a(x), m.b(x), x], 2).sum(dim=2), "a b", 1),
    (lambda m, x, z: torch.add(m.a(x) * 2, m.c(z.relu()) + m.b(x), alpha=3) + x, "a b c", 2),
    (lambda m, x, z: torch.sub(z.relu(), m.a(x), alpha=2) - m.b(x), "a b", 1),
    (lambda m, x, z: z.relu() - torch.sub(x, m.a(x), alpha=5), "a", 1),
    (lambda m, x, z: m.a(x).add(z.relu()).sub(m.b(x)), "a b", 1),
    (lambda m, x, z: m.a(x).add_(z.relu()).add_(m.b(x)), "a b", 1),
    (lambda m, x, z: m.n(m.a(x) + z.relu() + m.b(x) + m.c(z.relu())), "a b c n", 2),
    (lambda m, x, z: (lambda y: m.a(y) + z.relu() + m.b(y))(m.n(x)), "a b n", 1),
    (lambda m, x, z: (m.a(x) + x.relu() + m.b(x), x * 2), "a b", 1),
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(PARTIAL)))
def test_terms_of_one_origin_become_one_operator(index: int) -> None:
    forward, names, left = PARTIAL[index]
    result = check(forward, names)
    assert convolutions(result) == left, result.report.sites


def in_place(m: Any, x: Tensor, z: Tensor) -> Tensor:
    y = z.relu()
    y += m.a(x)
    y += m.b(x)
    return y.relu_()


def test_a_sum_in_place_is_written_out_of_place_where_a_term_vanishes() -> None:
    assert convolutions(check(in_place, "a b")) == 1


def into_what_is_read(m: Any, x: Tensor, z: Tensor) -> Tensor:
    y = m.b(x) + z
    y += m.a(x)
    return y.relu_() * z


def test_a_term_that_is_read_elsewhere_is_not_written_to() -> None:
    assert convolutions(check(into_what_is_read, "a b")) == 1


def seen_under_its_old_name(m: Any, x: Tensor, z: Tensor) -> Tensor:
    y = z.relu()
    view = y.view(y.shape)
    y += m.a(x)
    y += m.b(x)
    return y * view.sigmoid()


def test_a_sum_that_is_seen_under_another_name_stays() -> None:
    result = check(seen_under_its_old_name, "a b")
    assert convolutions(result) == 2
    assert "read under another name" in reasons(result)


def test_a_mean_of_terms_stays() -> None:
    result = check(lambda m, x, z: torch.stack([m.a(x), z.relu(), m.b(x)]).mean(0), "a b")
    assert convolutions(result) == 2
    assert "single terms cannot be taken out of" in reasons(result)


def test_terms_of_one_origin_that_is_read_elsewhere_or_returned() -> None:
    forward = lambda m, x, z: (lambda y: (m.a(y) + m.c(z) + m.b(y), y, y.relu()))(x.relu())  # noqa: E731
    assert convolutions(check(forward, "a b c")) == 2


def test_a_value_of_a_term_that_is_returned_stays() -> None:
    forward = lambda m, x, z: (lambda y: (y + m.c(z) + m.b(x), y))(m.a(x))  # noqa: E731
    assert convolutions(check(forward, "a b c")) == 3


class Plus(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Code(nn.Module):
    """With the sums in modules of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.add, self.plus = (
            nn.Conv2d(6, 6, 3, padding=1),
            nn.Conv2d(6, 6, 1),
            Plus(),
            Plus(),
        )

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.add(self.plus(self.a(x), z.relu()), self.b(x)).relu()


def test_a_sum_in_modules_of_its_own() -> None:
    result = fused(randomised(Code()), random(*MAP), random(*MAP, seed=1))
    assert convolutions(result) == 1


# --- Some branches of a sum ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.a(x) + m.cd(m.c(x)) + m.b(x),
        lambda m, x: m.cd(m.c(x)) - m.a(x) + 2 * m.b(x) - x,
        lambda m, x: sum([m.b(x), m.cd(m.c(x)), x, m.a(x)]),
        lambda m, x: torch.stack([m.b(x), m.cd(m.c(x)), x, m.a(x)]).sum(0),
    ],
)
def test_where_not_all_branches_merge_the_others_do(forward: Callable[..., Any]) -> None:
    layers = {"a": nn.Conv2d(6, 6, 3, padding=1), "b": nn.Conv2d(6, 6, 1)}
    deep = {"c": nn.Conv2d(6, 6, 3, padding=1), "cd": nn.Conv2d(6, 6, 3, padding=1)}
    result = fused(randomised(Function(forward, **layers, **deep)), random(*MAP))
    assert convolutions(result) == 3
    assert "ends at the padding" in reasons(result) or "pads its input with zeros" in reasons(result)


def test_branches_that_are_dearer_with_the_others_stay_apart() -> None:
    """A 1×1 branch of many channels does not become a part of a 7×7 depthwise one."""
    layers = {"a": nn.Conv2d(48, 48, 7, padding=3, groups=48), "b": nn.Conv2d(48, 48, 1)}
    layers["n"] = nn.BatchNorm2d(48)
    forward = lambda m, x: m.a(x) + m.b(x) + m.n(x)  # noqa: E731
    result = fused(randomised(Function(forward, **layers)), random(1, 48, 29, 31))
    assert (convolutions(result), norms(result), len(result.report.merged())) == (2, 0, 1)


# --- Operators after a sum ----------------------------------------------------------------------------------

MOVED: list[tuple[Callable[..., Any], str]] = [
    (lambda m, x, z: m.n(m.a(x) + m.b(z)), "a b n"),
    (lambda m, x, z: m.n(m.g(x) + m.b(z)), "g b n"),
    (lambda m, x, z: m.n(m.g(x) - m.b(z)), "g b n"),
    (lambda m, x, z: m.n(torch.sub(m.g(x), m.b(z), alpha=2)), "g b n"),
    (lambda m, x, z: m.n((m.a(x) + m.b(z)) * 2 - 1) / 3, "a b n"),
    (lambda m, x, z: m.n(m.a(x) + m.b(z) + m.c(x.relu())).relu(), "a b c n"),
    (lambda m, x, z: m.n(sum([m.a(x), m.b(z)])) * m.n.weight.view(-1, 1, 1), "a b n"),
    (lambda m, x, z: m.n(torch.stack([m.a(x), m.b(z)]).mean(0)), "a b n"),
    (lambda m, x, z: (lambda y: (m.n(m.a(y) + m.b(z)), y))(x.relu()), "a b n"),
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(MOVED)))
def test_channelwise_operators_after_a_sum_move_into_its_terms(index: int) -> None:
    forward, names = MOVED[index]
    result = check(forward, names)
    assert norms(result) == 0, result.report.sites
    assert convolutions(result) == len(names.split()) - 1
    assert len(result.report.merged()) >= 2


def test_a_norm_and_a_module_that_are_used_twice_stay() -> None:
    result = check(lambda m, x, z: m.n(m.a(m.n(x)) + m.b(m.b(z).relu())), "a b n")
    assert norms(result) == 1


@pytest.mark.parametrize(("middle", "out", "kernel", "left"), [(40, 3, 1, 2), (6, 40, 3, 3)])
def test_a_pointwise_filter_moves_where_it_saves(middle: int, out: int, kernel: int, left: int) -> None:
    layers = {"a": nn.Conv2d(6, middle, 1), "b": nn.Conv2d(6, middle, kernel, padding=kernel // 2)}
    layers["c"] = nn.Conv2d(middle, out, 1)
    model = randomised(Pair(lambda m, x, z: m.c(m.a(x) + m.b(z)).relu(), **layers))
    result = fused(model, random(*MAP), random(*MAP, seed=1))
    assert convolutions(result) == left
    assert left == 2 or "costs more in every term of the sum" in reasons(result)


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x, z: m.n(m.a(x) + z),
        lambda m, x, z: m.n(m.a(x) + z.relu()),
        lambda m, x, z: m.n(m.a(x) + m.a(z).sigmoid()),
    ],
)
def test_a_sum_with_a_term_that_is_no_filter_keeps_its_norm(forward: Callable[..., Any]) -> None:
    result = check(forward, "a n")
    assert norms(result) == 1
    assert "adds a tensor that depends on another input" in reasons(result)


def test_values_of_terms_or_of_the_sum_that_others_read_stay() -> None:
    assert norms(check(lambda m, x, z: (lambda y: m.n(y + m.b(z)) + y.relu())(m.a(x)), "a b n")) == 1
    assert norms(check(lambda m, x, z: (lambda y: (m.n(y), y))(m.a(x) + m.b(z)), "a b n")) == 1


def test_only_and_skip_hold_for_the_terms_of_a_sum() -> None:
    forward, names = MOVED[0]
    for options in ({"skip": ["b"]}, {"skip": ["n"]}, {"only": ["a"]}):
        assert norms(check(forward, names, **options)) == 1


class Branching(nn.Module):
    """Control flow that no trace follows: modules are replaced, the code stays."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.n = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        y = self.a(x)
        if z.shape[0] > 0:
            y += self.b(z)
        return self.n(y).relu()


def test_modules_are_replaced_in_place_where_that_will_do() -> None:
    result = fused(randomised(Branching()), random(*MAP), random(*MAP, seed=1))
    assert type(result.model) is Branching
    assert isinstance(result.model.n, nn.Identity)
