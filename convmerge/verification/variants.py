"""Further inputs to compare two models on, made from the ones given."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from convmerge.verification.outputs import shape_text

if TYPE_CHECKING:
    from convmerge.inputs import Inputs

Side = Callable[[int, int], int]

# Another size of a side of n positions, the i-th of its map: smaller and odd, smaller multiples of 32, larger
# ones, and twice as many. Odd and unequal sizes come first: they show strides and paddings that even squares
# hide.
SIDES: tuple[Side, ...] = (
    lambda n, i: max(1, n * (11 - 2 * i) // 16) | 1,
    lambda n, i: max(32, n * (3 - i) // 4 // 32 * 32),
    lambda n, i: (n * 5 // 4 + 31) // 32 * 32,
    lambda n, i: 2 * n,
)


def fresh(inputs: Inputs, generator: torch.Generator) -> Inputs:
    """Inputs of the same shapes with other values, see :func:`redrawn`."""
    return _map(inputs, lambda x: redrawn(x, tuple(x.shape), generator))


def other_batches(inputs: Inputs, generator: torch.Generator) -> Iterator[Inputs]:
    """Three samples (two where three were given); nothing where no tensor has a leading dimension."""
    given = _batch(inputs)
    if given is not None:
        yield _of_batch(inputs, 2 if given == 3 else 3, generator)


def one_sample(inputs: Inputs, generator: torch.Generator) -> Iterator[Inputs]:
    """A batch of one, whose axis some code drops; nothing where one sample is given."""
    if _batch(inputs) not in (None, 1):
        yield _of_batch(inputs, 1, generator)


def _batch(inputs: Inputs) -> int | None:
    """The first tensor's leading dimension."""
    return next((x.shape[0] for x in _tensors(inputs) if x.dim() > 0), None)


def _of_batch(inputs: Inputs, size: int, generator: torch.Generator) -> Inputs:
    """The tensors that share the batch size are resized."""
    given = _batch(inputs)

    def shape(x: Tensor) -> tuple[int, ...]:
        return (size, *x.shape[1:]) if x.dim() and x.shape[0] == given else tuple(x.shape)

    return _map(inputs, lambda x: redrawn(x, shape(x), generator))


def other_sizes(inputs: Inputs, generator: torch.Generator) -> Iterator[Inputs]:
    """Other spatial sizes, to be tried in turn, see ``SIDES``.

    Spatial are the dimensions after (batch, channels) of floating-point tensors of three to five dimensions.
    Last come other lengths of sequences, see :func:`_other_lengths`.
    """
    if any(_is_map(x) for x in _tensors(inputs)):
        for side in SIDES:
            sized = _resize(inputs, side, generator)
            if shapes(sized) != shapes(inputs):
                yield sized
    yield from _other_lengths(inputs, generator)


def _other_lengths(inputs: Inputs, generator: torch.Generator) -> Iterator[Inputs]:
    """The second dimension of a first tensor of tokens, smaller or larger, wherever a tensor has it.

    Tokens are (batch, length) of numbers that are no features, or (batch, length, features).
    """
    first = next(iter(_tensors(inputs)), None)
    if first is None or first.dim() != (3 if first.is_floating_point() else 2):
        return
    given = first.shape[1]
    for length in dict.fromkeys([SIDES[0](given, 0), 2 * given + 1]):
        if length == given:
            continue

        def resized(x: Tensor, length: int = length) -> Tensor:
            shape = (*x.shape[:1], *(length if n == given else n for n in x.shape[1:]))
            return redrawn(x, shape, generator) if shape != x.shape else x

        yield _map(inputs, resized)


def _resize(inputs: Inputs, side: Side, generator: torch.Generator) -> Inputs:
    return _map(inputs, lambda x: redrawn(x, _resized(x, side) if _is_map(x) else tuple(x.shape), generator))


def shapes(inputs: Inputs) -> str:
    """``1×3×224×224, 1×16``: the shapes of the tensors, in order."""
    return ", ".join(shape_text(x) for x in _tensors(inputs)) or "no tensors"


def numel(inputs: Inputs) -> int:
    """How many numbers the tensors hold together."""
    return sum(x.numel() for x in _tensors(inputs))


def redrawn(x: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A tensor of the given shape whose values are drawn from those of x.

    So indices stay in range, masks stay masks and images keep their range. A constant floating-point tensor
    (``torch.zeros`` as an example input) says nothing about its values and would hide most mistakes: it is
    drawn from the standard normal distribution instead; a single floating-point number is scaled.
    """
    if x.numel() == 0:
        return x.new_zeros(shape)
    if x.is_floating_point() and x.numel() == 1:
        scale = 0.5 + torch.rand(shape, generator=generator)
        return x.reshape(()) * scale.to(x) if bool(x.any()) else torch.randn(shape, generator=generator).to(x)
    flat = x.detach().reshape(-1)
    if x.is_floating_point() and bool((flat == flat[0]).all()):
        return torch.randn(shape, generator=generator).to(x)
    index = torch.randint(flat.numel(), shape, generator=generator)
    return flat[index.to(flat.device)]


def _tensors(inputs: Inputs) -> list[Tensor]:
    return [x for x in pytree.tree_leaves((inputs.args, inputs.kwargs)) if isinstance(x, Tensor)]


def _map(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    args, kwargs = pytree.tree_map_only(Tensor, change, (inputs.args, inputs.kwargs))
    return dataclasses.replace(inputs, args=args, kwargs=kwargs)


def _is_map(x: Tensor) -> bool:
    return x.is_floating_point() and 3 <= x.dim() <= 5


def _resized(x: Tensor, side: Side) -> tuple[int, ...]:
    """x's shape with every side above 1 changed."""
    return (*x.shape[:2], *(side(n, i) if n > 1 else n for i, n in enumerate(x.shape[2:])))
