"""Nearest upsampling to a given size: by how much does it enlarge, at every input size that the model takes?

The exported graph shows the sizes of the example inputs alone. So the model's own code is run, without data,
on inputs that are larger by numbers which leave every remainder of halving a map repeatedly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import Node
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from convmerge.evidence.tracing import quiet, unmarked
from convmerge.inputs import Inputs

# Powers of two show whether a map that is halved was even; multiples of seven are for patches of 7 or 14.
LARGER = (1, 2, 4, 8, 16, 32, 64, 7, 14, 28)
UNKNOWN = "upsamples to a given size, and the model cannot be followed at other sizes"

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Ratio:
    """How an upsampling to a given size enlarges its maps.

    Attributes:
        up: how many times in each dimension, on the example inputs.
        short: whether the result can be smaller by one than that.
        refusal: why it is not such a multiple at all sizes; None where it is at all that were tried.
    """

    up: Sizes
    short: bool = False
    refusal: str | None = None


def ratios_of(model: nn.Module, inputs: Inputs, calls: Mapping[Node, str]) -> dict[Node, Ratio]:
    """The ratios of nearest upsampling to given sizes by whole numbers.

    Args:
        calls: every nearest upsampling in the graph of the model, in order → its ATen name.
    """
    usual = _sizes(model, inputs)
    if usual is None or len(usual) != len(calls):
        return {node: Ratio((), refusal=UNKNOWN) for node in calls}
    known = {node: _first(*sizes) for node, sizes in zip(calls, usual, strict=True)}
    for other in _larger(inputs):
        if all(ratio.refusal for ratio in known.values()):
            break
        sizes = _sizes(model, other)
        if sizes is not None and len(sizes) != len(calls):
            return {node: Ratio((), refusal=UNKNOWN) for node in calls}
        for (node, op), pair in zip(calls.items(), sizes or (), strict=False):
            known[node] = _with(known[node], op, pair, other)
    return known


def _first(before: Sizes, after: Sizes) -> Ratio:
    up = tuple(a // b for a, b in zip(after, before, strict=True))
    whole = all(u * b == a and u > 0 for u, b, a in zip(up, before, after, strict=True))
    return Ratio(up, refusal=None if whole else "upsamples to a size that is no multiple")


def _with(known: Ratio, op: str, sizes: tuple[Sizes, Sizes], inputs: Inputs) -> Ratio:
    """What is known of a ratio once the sizes on other inputs are too."""
    if known.refusal is not None:
        return known
    before, after = sizes
    missing = [u * b - a for u, b, a in zip(known.up, before, after, strict=True)]
    if not any(missing):
        return known
    # Where n becomes 2n - 1, nearest neighbours are those of 2n without the last; not those of centres.
    if set(known.up) == {2} and set(missing) <= {0, 1} and "exact" not in op:
        return replace(known, short=True)
    shape = "×".join(str(n) for n in next(iter(inputs.tensors())).shape)
    words = f"{'×'.join(map(str, before))} to {'×'.join(map(str, after))} on {shape}"
    return replace(
        known, refusal=f"upsamples to a given size, not always {_times(known.up)} as large: {words}"
    )


def _times(up: Sequence[int]) -> str:
    return f"{'×'.join(map(str, up)) if len(set(up)) > 1 else up[0]} times"


def _larger(inputs: Inputs) -> Iterator[Inputs]:
    """The same inputs with larger maps; their values do not count."""
    for more in LARGER:

        def grown(x: Tensor, more: int = more) -> Tensor:
            if not x.is_floating_point() or not 3 <= x.dim() <= 5:
                return x
            return x.new_empty((*x.shape[:2], *(n + more if n > 1 else n for n in x.shape[2:])))

        args, kwargs = pytree.tree_map_only(Tensor, grown, (inputs.args, inputs.kwargs))
        yield replace(inputs, args=args, kwargs=kwargs)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the sizes before and after every nearest upsampling."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: list[tuple[Sizes, Sizes]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "upsample_nearest" in func.name() and isinstance(result, Tensor):
            self.sizes.append((tuple(args[0].shape[2:]), tuple(result.shape[2:])))
        return result


def _sizes(model: nn.Module, inputs: Inputs) -> list[tuple[Sizes, Sizes]] | None:
    """Sizes before and after each nearest upsampling; None where the model does not take the inputs."""
    recorder = _Recorder()
    try:
        with quiet(), unmarked(model), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
            model.eval()  # until its attributes are put back
            args, kwargs = pytree.tree_map_only(Tensor, mode.from_tensor, (inputs.args, inputs.kwargs))
            with recorder:
                model(*args, **kwargs)
    except Exception:  # the model may say anything to a size that it was not made for
        return None
    return recorder.sizes
