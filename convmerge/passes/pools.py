"""How a head takes the spatial axes away: pooling over the whole map, and flattening."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn
from torch.fx.node import Node

from convmerge.affine import Dims
from convmerge.errors import Refusal
from convmerge.evidence.capture import Call, Evidence, is_tensor
from convmerge.passes.headrules import Lifted

AVERAGE = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
MAXIMUM = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
ADAPTIVE_AVERAGE = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
ADAPTIVE_MAXIMUM = {1: nn.AdaptiveMaxPool1d, 2: nn.AdaptiveMaxPool2d, 3: nn.AdaptiveMaxPool3d}


@dataclass(frozen=True, eq=False)
class Pool:
    """Pooling of a map (N, C, *size) to ``out`` cells of equal size.

    Attributes:
        source, size: the map and its spatial size.
        calls: the calls that do it, in order.
        out: number of cells.
        largest: whether it takes the maximum of a cell and not the mean.
        keepdim: whether the result keeps spatial axes.
    """

    source: Node
    calls: tuple[Node, ...]
    size: Dims
    out: Dims
    largest: bool
    keepdim: bool

    @property
    def cell(self) -> Dims:
        """Size of a cell."""
        return tuple(n // o for n, o in zip(self.size, self.out, strict=True))

    @property
    def lifted(self) -> Lifted:
        """What the pooled value becomes: the cells of one window lie a cell apart."""
        apart = tuple(1 if o == 1 else c for o, c in zip(self.out, self.cell, strict=True))
        return Lifted(self.size, self.out, apart, 1 if self.keepdim else None)

    def on_windows(self) -> nn.Module | None:
        """The cell at every position; None where a cell is one value."""
        if math.prod(self.cell) == 1:
            return None
        pools = MAXIMUM if self.largest else AVERAGE
        kernel = self.cell if len(set(self.cell)) > 1 else self.cell[0]
        layer: nn.Module = pools[len(self.size)](kernel, 1)
        return layer

    def on_a_window(self) -> nn.Module:
        """What the model does, on any one window."""
        pools = ADAPTIVE_MAXIMUM if self.largest else ADAPTIVE_AVERAGE
        pool = pools[len(self.size)](self.out)
        return pool if self.keepdim else nn.Sequential(pool, nn.Flatten(1))


def global_pool(evidence: Evidence, call: Call) -> Pool | None:
    """The pooling that a call does if it depends on the size of the whole map.

    Raises Refusal where its cells are not of one size.
    """
    calls: tuple[Node, ...] = (call.node,)
    if call.op == "getitem" and call.node.args[1] == 0 and isinstance(call.node.args[0], Node):
        pooled = evidence.calls.get(call.node.args[0])
        if pooled is None or not pooled.op.startswith("adaptive_max_pool"):
            return None
        unread = (user for user in pooled.node.users if user is not call.node)  # the positions of the maxima
        call, calls = pooled, (pooled.node, *unread, call.node)
    source = next(iter(call.args.values()), None)
    if not is_tensor(source) or not isinstance(source, Node) or len(size := evidence.size(source)[2:]) == 0:
        return None
    result = evidence.size(calls[-1]) if is_tensor(calls[-1]) else ()
    if call.op.startswith("adaptive_") and call.op.endswith(f"_pool{len(size)}d"):
        return _of_equal_cells(Pool(source, calls, size, result[2:], "max" in call.op, True))
    if call.op in (f"avg_pool{len(size)}d", f"max_pool{len(size)}d") and _covers(call, size):
        return Pool(source, calls, size, (1,) * len(size), "max" in call.op, True)
    if call.op in ("mean", "amax") and _axes(call, len(size) + 2) == list(range(2, len(size) + 2)):
        return Pool(source, calls, size, (1,) * len(size), call.op == "amax", bool(call.args["keepdim"]))
    return None


def _of_equal_cells(pool: Pool) -> Pool:
    if any(n % o for n, o in zip(pool.size, pool.out, strict=True)):
        size, out = ("×".join(map(str, dims)) for dims in (pool.size, pool.out))
        raise Refusal(
            f"adaptive pooling from {size} to {out} has cells of unequal sizes; give the size it was made for"
        )
    return pool


def _covers(call: Call, size: Dims) -> bool:
    """Whether a pooling window is the whole map, not padded; a layer of a fixed size stays what it is."""
    kernel = list(call.args["kernel_size"])
    padding = list(call.args["padding"])
    kernel = kernel * len(size) if len(kernel) == 1 else kernel
    fixed = call.op.startswith("max") and _layer(call).startswith("torch.nn.modules.pooling")
    return tuple(kernel) == size and not any(padding) and not fixed


def _layer(call: Call) -> str:
    """The class of the module that made the call, as the evidence names it."""
    stack = list(call.node.meta.get("nn_module_stack", {}).values())
    kind = stack[-1][1] if stack else ""
    return kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"


def _axes(call: Call, rank: int) -> list[int]:
    return sorted(int(d) % rank for d in call.args.get("dim") or ())


RESHAPES = frozenset(["flatten", "view", "reshape", "_unsafe_view", "squeeze"])


def flattens(evidence: Evidence, call: Call) -> bool:
    """Whether a call lays (N, C, *size) out as (N, C · size), channels outermost."""
    if call.op not in RESHAPES:
        return False
    before, after = evidence.size(call.args["self"]), evidence.size(call.node)
    return len(before) > 2 and len(after) == 2 and after == (before[0], math.prod(before[1:]))
