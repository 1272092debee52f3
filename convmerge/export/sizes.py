"""Which sizes of a model's inputs an exported file leaves open.

A size is one dimension of one input tensor; sizes that belong together share a name, as the batch of an
image and of its mask do. Names are those people use for the positions: ``batch``, then ``length`` (tokens,
signals), ``height`` and ``width`` (images), ``depth``, ``height`` and ``width`` (volumes).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from convmerge.errors import ConvmergeError
from convmerge.inputs import Inputs
from convmerge.verification.variants import SIDES, redrawn

_SPATIAL = {3: ("length",), 4: ("height", "width"), 5: ("depth", "height", "width")}
_TOKENS = {2: ("length",)}
BATCH = "batch"


@dataclass(frozen=True)
class Size:
    """One size: dimension ``dim`` of the tensor at position ``tensor`` of ``Inputs.tensors()``."""

    name: str
    tensor: int
    dim: int


Sizes = tuple[Size, ...]


@dataclass(frozen=True)
class Dynamic:
    """Which sizes are asked to stay open.

    Attributes:
        names: ``batch``, ``height`` and so on, or ``INPUT:DIM``; each must stay open.
        auto: instead, all that have a name and on which the model does not depend.
    """

    names: tuple[str, ...] = ()
    auto: bool = True

    @staticmethod
    def parse(text: str) -> Dynamic:
        """From ``auto``, ``none``, or names between commas. Raises ConvmergeError."""
        names = tuple(dict.fromkeys(text.replace(" ", "").split(",")))
        if names in (("auto",), ("none",)):
            return Dynamic(auto=names == ("auto",))
        if not all(re.fullmatch(r"[^:]+(:\d+)?", name) for name in names) or {"auto", "none"} & {*names}:
            raise ConvmergeError(
                f"--dynamic {text}: not auto, none, or names of sizes",
                "as in --dynamic batch,height,width or --dynamic tokens:1",
            )
        return Dynamic(names, False)


def named_sizes(inputs: Inputs) -> Sizes:
    """Every size that has a name: the batch, positions of maps and signals, the length of token sequences.

    The batch is the first tensor's leading dimension. Maps are floating-point tensors of three to five
    dimensions; a side of one number stays what it is. Tensors of other sizes under a name get one of their
    own, with their position.
    """
    found: list[Size] = []
    known: dict[str, int] = {}
    for position, x in enumerate(inputs.tensors()):
        for dim, name in _names_of(x):
            if known.setdefault(name, x.shape[dim]) == x.shape[dim]:
                found.append(Size(name, position, dim))
            elif name != BATCH:
                found.append(Size(f"{name}_{position}", position, dim))
    return tuple(found)


def _names_of(x: Tensor) -> Iterator[tuple[int, str]]:
    if x.dim() and not (x.dim() == 1 and x.is_floating_point()):
        yield 0, BATCH
    start, named = (2, _SPATIAL) if x.is_floating_point() else (1, _TOKENS)
    names = named.get(x.dim(), ())
    yield from ((dim, name) for dim, name in enumerate(names, start) if x.shape[dim] > 1)


def asked_for(dynamic: Dynamic, inputs: Inputs) -> Sizes:
    """The sizes that were asked for by name.

    Raises ConvmergeError where there is none of a name.
    """
    named = named_sizes(inputs)
    tensors = tensor_names(inputs)
    found: dict[tuple[int, int], Size] = {}
    for name in dynamic.names:
        tensor, _, dim = name.rpartition(":")
        if tensor:
            sizes = [_one(tensors, inputs, tensor, int(dim), named)]
        elif not (sizes := [size for size in named if size.name == name]):
            known = ", ".join(dict.fromkeys(size.name for size in named)) or "none"
            raise ConvmergeError(
                f"--dynamic {name}: the inputs have no such size; those with a name: {known}",
                f"name it as INPUT:DIM, such as {tensors[0] if tensors else 'x'}:1",
            )
        found |= {(size.tensor, size.dim): size for size in sizes}
    return tuple(found.values())


def _one(tensors: Sequence[str], inputs: Inputs, name: str, dim: int, named: Sizes) -> Size:
    if name not in tensors:
        known = ", ".join(tensors)
        raise ConvmergeError(f"--dynamic {name}:{dim}: there is no input {name}", f"the inputs are {known}")
    position = tensors.index(name)
    if dim >= inputs.tensors()[position].dim():
        raise ConvmergeError(
            f"--dynamic {name}:{dim}: {name} has no dimension {dim}", "dimensions count from 0"
        )
    same = (size for size in named if (size.tensor, size.dim) == (position, dim))
    plain = re.sub(r"\W+", "_", name).strip("_")
    return next(same, Size(f"{plain}_{dim}", position, dim))


def tensor_names(inputs: Inputs) -> list[str]:
    """The names of the input tensors, as ``--input`` and reports give them."""
    return [name for name, value in inputs.leaves() if isinstance(value, Tensor)]


def resized(inputs: Inputs, sizes: Mapping[Size, int], seed: int = 0) -> Inputs:
    """Inputs of other sizes, their values drawn from those given."""
    wanted: dict[int, dict[int, int]] = {}
    for size, n in sizes.items():
        wanted.setdefault(size.tensor, {})[size.dim] = n
    generator = torch.Generator().manual_seed(seed)
    position = iter(range(len(inputs.tensors())))

    def change(x: Tensor) -> Tensor:
        other = wanted.get(next(position))
        if other is None:
            return x
        return redrawn(x, tuple(other.get(dim, n) for dim, n in enumerate(x.shape)), generator)

    return inputs.map(change)


def others(inputs: Inputs, sizes: Sizes) -> Iterator[dict[Size, int]]:
    """Other values of all ``sizes``, to be tried in turn.

    A batch of three (two where three were given); for the rest see ``SIDES``, where tokens are a first side.
    """
    given = {size: inputs.tensors()[size.tensor].shape[size.dim] for size in sizes}
    seen: list[dict[Size, int]] = []
    for side in SIDES:
        found = {
            size: (2 if n == 3 else 3) if size.name == BATCH else side(n, max(size.dim - 2, 0))
            for size, n in given.items()
        }
        if found not in seen and all(n != given[size] for size, n in found.items()):
            seen.append(found)
            yield found


def takes(inputs: Inputs, sizes: Sizes) -> dict[str, str]:
    """Name of each input → what it may be, as in ``batch×3×height×width float32``."""
    tensors = iter(range(len(inputs.tensors())))
    found = {}
    for name, value in inputs.leaves():
        if not isinstance(value, Tensor):
            found[name] = repr(value)
            continue
        position = next(tensors)
        open_ = {size.dim: size.name for size in sizes if size.tensor == position}
        shape = "×".join(str(open_.get(dim, n)) for dim, n in enumerate(value.shape)) or "scalar"
        found[name] = f"{shape} {str(value.dtype).removeprefix('torch.')}"
    return found
