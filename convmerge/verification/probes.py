"""Is one merge exact? In float64, where a right merge is provably within a rounding bound of the original."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from convmerge.errors import Refusal

T = TypeVar("T")
Map = Callable[[Tensor], Tensor]

UNIT = 2.0**-53  # unit roundoff of float64
CONSTANT_TERMS = 16  # roundings in folding a batch norm: variance + eps, square root, division, products
DOUBLE_ROUNDING = (
    2.0**-11
)  # torch rounds float64 to half precision by way of float32: this much over half an ulp


@dataclass(frozen=True)
class Probe:
    """The worst output element of a probe, relative to its bound.

    Attributes:
        error: |original - merged| there, in float64.
        bound: what rounding alone can amount to there.
        shape: the input shape on which it was seen.
    """

    error: float
    bound: float
    shape: tuple[int, ...]

    @property
    def exact(self) -> bool:
        """Whether rounding alone explains the error."""
        return self.error <= self.bound


def probe(
    original: Map,
    merged: Map,
    magnitude: Map,
    shapes: Iterable[Sequence[int]],
    *,
    terms: int,
    seed: int = 0,
) -> Probe:
    """Compare a merge with what it replaces, on random float64 inputs, within an elementwise rounding bound.

    A sum of n products, accumulated in any order, is off by at most ``gamma(n) * sum(|w| |x|)`` with
    ``gamma(n) = n u / (1 - n u)`` (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1).
    Three such sums are involved, the original's, the merged layer's, and the one that composed the merged
    weights, plus a few roundings for folded constants: the bound is ``gamma(3 terms + 16) * magnitude(|x|)``.

    Each shape is run twice. Dense inputs meet everything, but with n terms in an output a wrong one is a
    1/n-th of it; sparse inputs, about 32 non-zeros under each output (more where there are so few positions
    that some tap would meet none), make a single wrong tap stand out. Where they are dense, one run does.

    Args:
        original, merged: the two sides, on float64 tensors of the given shapes.
        magnitude: the original with absolute weights and biases (a subtraction becoming an addition).
        shapes: input shapes (N, C, *spatial); include sizes around the kernel's, odd and even. Those that
            the original refuses are skipped.
        terms: how many products the longest path to one output element accumulates, summed over the stages.

    Raises:
        Refusal: the original runs on none of the shapes; the merge fails or changes the output shape on one.
    """
    generator = torch.Generator().manual_seed(seed)
    gamma = _gamma(3 * terms + CONSTANT_TERMS)
    worst: Probe | None = None
    for shape in map(tuple, shapes):
        for x in _probe_inputs(shape, terms, generator):
            try:
                expected = _run(original, x)
            except Exception:
                continue  # the original does not take this shape, so nothing is promised for it
            found = _probe_once(expected, merged, magnitude, x, gamma)
            if worst is None or _excess(found) > _excess(worst):
                worst = found
    if worst is None:
        raise Refusal("the original ran on none of the shapes it was probed with")
    return worst


def _probe_inputs(shape: tuple[int, ...], terms: int, generator: torch.Generator) -> Iterator[Tensor]:
    positions = shape[0] * math.prod(shape[2:])
    density = max(32 / max(terms, 1), 8 / max(positions, 1))
    yield torch.randn(shape, generator=generator, dtype=torch.float64)
    if density < 1:
        keep = torch.rand(shape, generator=generator) < density
        yield torch.randn(shape, generator=generator, dtype=torch.float64) * keep


def _probe_once(expected: Tensor, merged: Map, magnitude: Map, x: Tensor, gamma: float) -> Probe:
    shape = tuple(x.shape)
    try:
        actual = _run(merged, x)
    except Exception as error:
        raise Refusal(f"the merged form fails on {_times(shape)}: {first_line(error)}") from error
    if actual.shape != expected.shape:
        raise Refusal(
            f"the merged form gives {_times(actual.shape)} for {_times(expected.shape)} on {_times(shape)}"
        )
    bound = gamma * _run(magnitude, x.abs()).expand_as(expected)
    apart = (expected - actual).abs().nan_to_num(math.inf, math.inf)
    if apart.numel() == 0:
        return Probe(0.0, 0.0, shape)
    at = torch.where(apart > 0, apart / bound, apart).nan_to_num(math.inf, math.inf).argmax()
    return Probe(apart.flatten()[at].item(), bound.flatten()[at].item(), shape)


def _excess(found: Probe) -> float:
    if found.error == 0:
        return 0.0
    return found.error / found.bound if found.bound > 0 else math.inf


def _gamma(terms: int) -> float:
    return terms * UNIT / (1 - terms * UNIT)


def _run(function: Map, x: Tensor) -> Tensor:
    with torch.no_grad():
        return function(x.clone())


def rounded_once(layer: nn.Module, exact: nn.Module) -> None:
    """Check that every parameter and buffer of ``layer`` is the float64 one of ``exact`` rounded once.

    That is, it lies within half a unit in the last place of its dtype. Below the normal range units are of
    constant size, so a tensor that lies mostly there can satisfy this and have lost its digits: the error
    must also stay within one unit roundoff of the whole tensor's norm, as it does for normal numbers.

    Raises:
        Refusal: a value overflows, underflows, or is not the rounded one.
    """
    wanted = {**dict(exact.named_parameters()), **dict(exact.named_buffers())}
    for name, value in (*layer.named_parameters(), *layer.named_buffers()):
        if value.is_floating_point():
            _check_rounding(name, value.detach(), wanted[name].detach().to(value.device))


def _check_rounding(name: str, value: Tensor, exact: Tensor) -> None:
    info, dtype = torch.finfo(value.dtype), str(value.dtype).removeprefix("torch.")
    if not bool(exact.isfinite().all()):
        raise Refusal(f"the merged {name} is not finite")
    if not bool(value.isfinite().all()):
        raise Refusal(
            f"the merged {name} reaches {exact.abs().max():.3g}, more than {dtype} can hold ({info.max:.3g})"
        )
    if not torch.equal(value, exact.to(value.dtype)) and not _within_half_an_ulp(value, exact):
        raise Refusal(f"the merged {name} is not its float64 value rounded once to {dtype}")
    if bool((value.abs() < info.smallest_normal).any()):
        lost = float((value.to(exact.dtype) - exact).norm())
        if lost > info.eps / 2 * (1 + DOUBLE_ROUNDING) * float(exact.norm()):
            raise Refusal(f"the merged {name} is too small for {dtype} to keep its digits")


def _within_half_an_ulp(value: Tensor, exact: Tensor) -> bool:
    info = torch.finfo(value.dtype)
    exponent = torch.frexp(exact).exponent  # |exact| < 2**exponent, and at least half of it
    ulp = torch.ldexp(torch.full_like(exact, info.eps / 2), exponent) * (exact != 0)
    error = (value.to(exact.dtype) - exact).abs()
    return bool((error <= ulp.clamp_min(info.smallest_normal * info.eps) / 2 * (1 + DOUBLE_ROUNDING)).all())


def bisect(candidates: Sequence[T], ok: Callable[[Sequence[T]], bool]) -> list[T]:
    """Which candidates to leave out so that ``ok`` holds for the rest.

    Args:
        candidates: for which ``ok`` is known to fail; ``ok`` of none is taken to hold.
        ok: whether this selection, in the given order, passes.

    Returns the guilty ones in order, found with about log2(n) + 1 calls for each.
    """
    kept, guilty = list(candidates), []
    while kept:
        passes, fails = 0, len(kept)  # kept[:passes] is ok, kept[:fails] is not
        while fails - passes > 1:
            middle = (passes + fails) // 2
            if ok(kept[:middle]):
                passes = middle
            else:
                fails = middle
        guilty.append(kept.pop(passes))
        if not kept or ok(kept):
            break
    return [c for c in candidates if any(c is g for g in guilty)]


def _times(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
