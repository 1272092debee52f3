"""Affine regions: chains between values with one reader, and sums of branches however they are written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captured import Function, Pair, assert_close, random, randomised, regions_of, whole
from torch import Tensor, nn

from convmerge.errors import Refusal
from convmerge.recognise import Filter, Passage, Same, Scalar
from convmerge.regions.elements import Block, Element, Leaf, blocks, calls_of, leaves
from convmerge.regions.fold import fold_geometry, fold_numbers, place_of
from convmerge.verification.replay import apply_at

MAP = (2, 6, 7, 9)


def sketch(elements: Sequence[Element]) -> str:
    """A chain as text: f a filter, s a number, = an identity, p a passage, [..+..] a sum, ~ a part of one,
    [..|..] a concatenation."""
    marks = {Filter: "f", Scalar: "s", Same: "=", Passage: "p"}
    text = ""
    for element in elements:
        if isinstance(element, Block):
            sign = "+" if element.joined == "sum" else "|"
            text += f"[{sign.join(sketch(branch) for branch in element.branches)}]" + "~" * element.partial
        else:
            text += marks[type(element.step)]
    return text


def parts() -> dict[str, nn.Module]:
    return {
        "a": nn.Conv2d(6, 6, 3, padding=1), "b": nn.Conv2d(6, 6, (1, 3), padding=(0, 1)),
        "c": nn.Conv2d(6, 6, 1), "n": nn.BatchNorm2d(6), "d": nn.Dropout(0.5),
    }  # fmt: skip


def model_of(forward: Callable[..., Any]) -> nn.Module:
    return randomised(Function(forward, **parts()))


def looped(m: Any, x: Tensor) -> Tensor:
    out: Any = 0
    for branch in (m.a, m.b, m.c):
        out = out + branch(x)
    return out  # type: ignore[no-any-return]


def looped_in_place(m: Any, x: Tensor) -> Tensor:
    out = m.a(x)
    out += m.b(x)
    out += m.c(x)
    return out  # type: ignore[no-any-return]


WHOLE: list[tuple[Callable[..., Any], str]] = [
    (lambda m, x: m.n(m.a(x)), "ff"),
    (lambda m, x: m.n(m.d(m.a(x))) * 2, "ffs"),
    (lambda m, x: m.n(m.a(x)[...]) * 2, "f=fs"),
    (lambda m, x: m.a(x) + m.b(x), "[f+f]"),
    (lambda m, x: m.a(x) - m.b(x), "[f+fs]"),
    (looped, "[fs+f+f]"),
    (looped_in_place, "[f+f+f]"),
    (lambda m, x: sum([m.a(x), m.b(x), x]), "[fs+f+]"),
    (lambda m, x: torch.stack([m.a(x), m.b(x), x]).sum(0), "[f+f+]"),
    (lambda m, x: torch.stack([m.a(x), m.b(x)]).mean(0), "[fs+fs]"),
    (lambda m, x: x + m.a(x), "[+f]"),
    (lambda m, x: torch.add(x, m.a(x), alpha=3), "[+fs]"),
    (lambda m, x: (m.a(x) + m.b(x)) + (m.c(x) + x), "[f+f+f+]"),
    (lambda m, x: m.a(x) + (m.b(x) - (m.c(x) - x)), "[f+f+[f+s]s]"),
    (lambda m, x: m.n(m.a(x) + m.b(x)), "[f+f]f"),
    (lambda m, x: (lambda y: m.a(y) + m.b(y))(m.n(x)), "f[f+f]"),
    (lambda m, x: (lambda y: y + m.b(y))(x + m.a(x)), "[+f][+f]"),
    (lambda m, x: x + m.b(x + m.a(x)), "[+[+f]f]"),
    (lambda m, x: m.n(m.a(x) + x) * 3 + m.c(m.b(x)), "[[f+]fs+ff]"),
    (lambda m, x: m.a(x) + m.b(x) + 2 * x, "[f+f+s]"),
    (lambda m, x: x + x, "[+]"),
    (lambda m, x: (lambda y: y + y)(m.a(x)), "f[+]"),
    (lambda m, x: (lambda y: m.b(y) + m.c(y) + m.n(x))(m.a(x)), "[f[f+f]+f]"),
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(WHOLE)))
def test_an_affine_model_is_one_chain(index: int) -> None:
    forward, expected = WHOLE[index]
    model, x = model_of(forward), random(*MAP)
    context, regions = regions_of(model, x)
    chain = whole(context, regions)
    assert sketch(chain) == expected
    every_call = {n for n in context.evidence.calls if n not in context.constants}
    assert set(calls_of(chain)) == every_call
    place = place_of(context.evidence, chain)
    if place is None:
        return
    try:
        assert fold_geometry(chain, place).out_channels == 6
        form = fold_numbers(chain, place)
    except Refusal as refusal:
        assert "pads its input with zeros" in refusal.reason or "ends at the padding" in refusal.reason
        return
    with torch.no_grad():
        assert_close(apply_at(form, x, place.axis), model(x.clone()))


CUT: list[tuple[Callable[..., Any], list[str]]] = [
    (lambda m, x: m.b(m.a(x).relu()), ["f", "f"]),
    (lambda m, x: (lambda y: (m.b(y), y))(m.a(x)), ["f", "f"]),
    (lambda m, x: (lambda y: m.b(y) + y.relu())(m.a(x)), ["f", "f"]),
    (lambda m, x: (lambda y: m.n(m.b(y)) * m.c(y).sigmoid())(m.a(x)), ["f", "ff", "f"]),
    (lambda m, x: m.a(x) + m.b(x.relu()), ["f", "f"]),
    (lambda m, x: m.n(m.a(x) + m.b(x.relu())), ["f", "f", "f"]),
    (lambda m, x: torch.cat([m.a(x), m.n(m.b(x))], 1), ["[f|ff]"]),
    (lambda m, x: torch.cat([m.a(x), m.b(x.relu())], 1), ["f", "f"]),
    (lambda m, x: torch.cat([m.a(x), x], 1) * 2, ["[f|]s"]),
    (lambda m, x: m.a(x) * m.b(x), ["f", "f"]),
    (lambda m, x: m.c(m.a(x).mean((2, 3), keepdim=True)), ["fpf"]),
    (lambda m, x: m.n(F.avg_pool2d(m.a(x), 2)).relu(), ["fff"]),
]


@pytest.mark.parametrize("index", range(len(CUT)))
def test_a_chain_ends_where_a_value_has_other_readers_or_no_rule(index: int) -> None:
    forward, expected = CUT[index]
    _, regions = regions_of(model_of(forward), random(*MAP))
    assert [sketch(chain) for chain in regions.chains] == expected


PARTIAL: list[tuple[Callable[..., Any], list[str]]] = [
    (lambda m, x: m.a(x) + m.b(x) + x.relu(), ["[f+f]"]),
    (lambda m, x: m.a(x) + x.relu() + m.b(x), ["[f+f]~"]),
    (lambda m, x: x.relu() + m.a(x) + m.c(x) + x, ["[f+f+]~"]),
    (lambda m, x: (lambda y: m.a(x) + x + m.b(y) + y)(x.relu()), ["[f+]", "[f+]~"]),
    (lambda m, x: m.n(m.a(x) + m.b(x) + x.relu()), ["[f+f]", "f"]),
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(PARTIAL)))
def test_terms_of_one_origin_in_a_larger_sum_are_a_part_of_it(index: int) -> None:
    forward, expected = PARTIAL[index]
    _, regions = regions_of(model_of(forward), random(*MAP))
    assert sorted(sketch(chain) for chain in regions.chains) == sorted(expected)


def test_branches_from_two_inputs_are_two_parts() -> None:
    model = randomised(Pair(lambda m, x, y: m.a(x) + m.b(x) + m.c(y) + m.n(y), **parts()))
    context, regions = regions_of(model, random(*MAP), random(*MAP))
    assert [sketch(chain) for chain in regions.chains] == ["[f+f]", "[f+f]~"]
    assert {chain[0].source for chain in regions.chains} == set(context.evidence.inputs)


def test_long_chains_and_wide_sums_are_reduced_in_reasonable_time() -> None:
    def deep(m: Any, x: Tensor) -> Tensor:
        for _ in range(150):
            x = x + m.c(x)
        return x

    def wide(m: Any, x: Tensor) -> Tensor:
        return sum(m.c(x) for _ in range(150))  # type: ignore[return-value]

    (chain,) = regions_of(model_of(deep), random(*MAP))[1].chains
    assert sketch(chain) == "[+f]" * 150
    (chain,) = regions_of(model_of(wide), random(*MAP))[1].chains
    assert len(chain) == 1
    assert isinstance(chain[0], Block)
    assert len(chain[0].branches) == 150


def test_sums_of_branches_that_do_not_fit_say_why() -> None:
    def reason(forward: Callable[..., Any], **more: nn.Module) -> str:
        model = randomised(Function(forward, **{**parts(), **more}))
        context, regions = regions_of(model, random(*MAP))
        (chain,) = regions.chains
        place = place_of(context.evidence, chain)
        assert place is not None
        with pytest.raises(Refusal) as caught:
            fold_geometry(chain, place)
        return caught.value.reason

    strided = {"s": nn.Conv2d(6, 6, 3, stride=2, padding=1), "u": nn.Upsample(scale_factor=2)}
    assert "stride" in reason(lambda m, x: m.u(m.s(x))[:, :, :-1, :-1] + m.a(x), **strided)
    pooled = {"p": nn.AdaptiveAvgPool2d((7, 9))}
    assert reason(lambda m, x: m.a(x) + m.p(x), **pooled) == "a branch goes through adaptive_avg_pool"


def test_leaves_and_blocks_are_found_at_any_depth() -> None:
    _, regions = regions_of(model_of(lambda m, x: x + m.b(x + m.a(x))), random(*MAP))
    (chain,) = regions.chains
    assert len(blocks(chain)) == 2
    assert [type(leaf) for leaf in leaves(chain)] == [Leaf, Leaf]
    inner = blocks(chain)[1]
    assert inner.source is chain[0].source
    assert not inner.partial
