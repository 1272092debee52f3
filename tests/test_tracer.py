"""Code that asks about shapes: what a trace answers, asserts, and cannot stand for."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from captured import Function, assert_close, random, randomised
from test_rewrite import fused, reasons
from torch import Tensor, fx, nn

import convmerge

TOKENS = (2, 5, 12)


def again(model: nn.Module) -> nn.Module:
    """Saved and loaded, which makes a traced module run through torch's own tracer."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def projections() -> dict[str, nn.Module]:
    return {name: nn.Linear(12, 6) for name in ("q", "k", "v")}


def attention(m: Any, x: Tensor, split: Callable[[Tensor], tuple[int, ...]], **options: Any) -> Tensor:
    q, k, v = (layer(x).view(split(x)).transpose(1, 2) for layer in (m.q, m.k, m.v))
    y = F.scaled_dot_product_attention(q, k, v, **options)
    return y.transpose(1, 2).reshape(*x.shape[:-1], -1)


# How code looks at a shape → the sizes of heads.
SPLITS: dict[str, Callable[[Tensor], tuple[int, ...]]] = {
    "unpacked": lambda x: (*x.shape[:-1], 3, 2),
    "by size": lambda x: (*x.size()[:2], 3, 2),
    "by length": lambda x: (*[x.shape[i] for i in range(len(x.shape) - 1)], 3, 2),
    "by rank": lambda x: (x.shape[0], x.shape[1], 3, 2) if x.dim() == 3 else (1, x.shape[0], 3, 2),
    "by ndim": lambda x: (x.shape[0], -1, 3, 2) if x.ndim > 2 else (1, -1, 3, 2),
}


@pytest.mark.parametrize("split", SPLITS)
def test_the_rank_of_a_tensor_is_known(split: str) -> None:
    model = randomised(Function(lambda m, x: attention(m, x, SPLITS[split]), **projections()))
    result = fused(model, random(*TOKENS))
    assert models.operators(result.model, random(*TOKENS)) == {"linear": 1}, reasons(result)
    for shape in ((1, 1, 12), (4, 7, 12)):
        x = random(*shape, seed=1)
        with torch.no_grad():
            assert_close(result.model(x), model(x))
            assert torch.equal(again(result.model)(x), result.model(x))


def test_the_rank_that_code_was_traced_for_is_asserted() -> None:
    layers = {"a": nn.Conv2d(6, 6, 3, padding=1), "b": nn.Conv2d(6, 6, 1)}
    model = randomised(
        Function(lambda m, x: (m.a(x) + m.b(x)).mean(-1 if x.dim() == 3 else (2, 3)), **layers)
    )
    result = fused(model, random(2, 6, 9, 11))
    assert models.operators(result.model, random(2, 6, 9, 11))["conv"] == 1, reasons(result)
    model(random(6, 9, 11))
    for traced in (result.model, again(result.model)):
        with pytest.raises(AssertionError, match="x must have 4 axes"):
            traced(random(6, 9, 11))


def test_branches_that_come_to_the_same_need_no_answer() -> None:
    """As in the attention of transformers: only decoders care about more than one token."""

    def forward(m: Any, x: Tensor) -> Tensor:
        causal = x.shape[1] > 1 and m.decoder
        return attention(m, x, SPLITS["unpacked"], is_causal=True if causal else False)  # noqa: SIM210

    for decoder in (False, True):
        model = randomised(Function(forward, **projections()))
        model.decoder = decoder  # type: ignore[assignment]
        result = fused(model, random(*TOKENS))
        linear = models.operators(result.model, random(*TOKENS))["linear"]
        if decoder:
            assert linear == 3
            assert "it goes another way at other sizes" in reasons(result)
        else:
            assert linear == 1, reasons(result)
        for shape in ((2, 1, 12), (1, 3, 12)):
            x = random(*shape)
            with torch.no_grad():
                assert_close(result.model(x), model(x))


def test_a_condition_that_is_used_as_a_value_keeps_its_value() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return attention(m, x, SPLITS["unpacked"], is_causal=x.shape[1] > 40 and m.decoder)

    model = randomised(Function(forward, **projections()))
    model.decoder = False  # type: ignore[assignment]
    result = fused(model, random(*TOKENS))
    assert models.operators(result.model, random(*TOKENS))["linear"] == 1, reasons(result)


BRANCHES: dict[str, Callable[[Tensor], Tensor]] = {
    "batch": lambda y: y.relu() if y.shape[0] > 1 else y,
    "size": lambda y: F.pad(y, (0, 1)) if y.shape[-1] % 2 else y,
    "values": lambda y: y.relu() if y.sum() > 0 else y,
    "rows": lambda y: torch.stack([row.relu() for row in y]),
    "parts": lambda y: torch.cat([part.tanh() for part in y.split(3, 2)], 2),
}


@pytest.mark.parametrize("branch", BRANCHES)
def test_code_that_goes_another_way_at_other_sizes_is_not_traced(branch: str) -> None:
    layers = {"a": nn.Conv2d(6, 6, 3, padding=1), "b": nn.Conv2d(6, 6, 1)}
    model = randomised(Function(lambda m, x: BRANCHES[branch](m.a(x) + m.b(x)), **layers))
    result = convmerge.fuse(model, random(2, 6, 9, 11))
    merged = models.operators(result.model, random(2, 6, 9, 11)).get("conv") == 1
    assert not merged, "branches were traced"
    assert "the code of Function cannot be traced" in reasons(result) or result.report.warnings
    for shape in ((1, 6, 8, 8), (3, 6, 5, 7)):
        x = random(*shape)
        with torch.no_grad():
            assert_close(result.model(x), model(x))


class Block(nn.Module):
    """Takes and passes on what its caller gives, as blocks of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(projections())

    def forward(
        self, x: Tensor, mask: Tensor | None, scale: float | None = None, **options: Any
    ) -> tuple[Tensor, bool]:
        q, k, v = (layer(x).view(*x.shape[:-1], 3, 2).transpose(1, 2) for layer in self.layers.values())
        scores = q @ k.transpose(2, 3) * options.get("factor", 1.0)
        if mask is not None:
            scores = scores + mask
        if options.get("shift") is not None:
            scores = scores + options["shift"]
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return (y.relu() if options.get("cut") else y), True


class Caller(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.block, self.options = Block(), options

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.block(x, mask=None, **self.options)
        result: Tensor = y.tanh()
        return result


@pytest.mark.parametrize("options", [{}, {"cut": True}, {"cut": False, "factor": 0.5}])
def test_arguments_that_forward_does_not_name(options: dict[str, Any]) -> None:
    model, x = randomised(Caller(**options)), random(*TOKENS)
    result = fused(model, x)
    assert models.operators(result.model, x)["linear"] == 1, reasons(result)
    assert isinstance(result.model.block, fx.GraphModule)
    with torch.no_grad():
        assert torch.equal(again(result.model)(x), result.model(x))
    for block in (result.model.block, again(result.model.block)):
        with pytest.raises(AssertionError, match="mask"):
            block(x, mask=x, **options)
        with pytest.raises(TypeError, match="unexpected"):
            block(x, mask=None, other=1, **options)


class Masked(nn.Module):
    """Hands a mask on, or looks at it, or takes no notice of what is no tensor."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layers, self.kind = nn.ModuleDict(projections()), kind

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (layer(x).view(*x.shape[:-1], 3, 2).transpose(1, 2) for layer in self.layers.values())
        if self.kind == "looks" and mask is not None:
            mask = mask * 2
        if self.kind == "asks" and not isinstance(mask, Tensor):
            mask = None
        return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2).relu()


@pytest.mark.parametrize("kind", ["hands on", "looks", "asks"])
def test_an_argument_that_was_none(kind: str) -> None:
    model, x = randomised(Masked(kind)), random(*TOKENS)
    mask = random(5, 5, seed=1)
    for traced in ((result := fused(model, x)).model, again(result.model)):
        assert models.operators(traced, x)["linear"] == 1, reasons(result)
        if kind == "hands on":
            assert_close(traced(x, mask), model(x, mask))
        else:
            with pytest.raises(AssertionError, match="mask"):
                traced(x, mask)


class Shifted(Caller):
    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.block(x, mask=None, shift=x.mean((1, 2))[:, None, None, None], **self.options)
        result: Tensor = y.tanh()
        return result


def test_tensors_among_arguments_that_forward_does_not_name() -> None:
    model, x = randomised(Shifted(cut=True)), random(*TOKENS)
    result = fused(model, x)
    assert models.operators(result.model, x)["linear"] == 1, reasons(result)
    other = random(3, 4, 12)
    with torch.no_grad():
        assert_close(again(result.model)(other), model(other))
