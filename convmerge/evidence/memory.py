"""What other names of a value's memory, and views of it, allow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx.node import Node

from convmerge.errors import Refusal
from convmerge.evidence.capture import Evidence, nodes_of
from convmerge.evidence.constants import memory_root

# Views of a tensor that work at any strides.
_VIEWS = frozenset(["transpose", "permute", "unsqueeze", "select", "slice", "detach", "alias", "expand", "t"])


def check_views(evidence: Evidence, value: Node, axis: int, channels: int) -> None:
    """A value that becomes a part of a larger one is not contiguous: its views must not need that.

    Raises Refusal.
    """
    size = list(evidence.size(value))
    size[axis] = channels
    part = torch.empty(size, device="meta").narrow(axis, 0, evidence.size(value)[axis])
    pending: list[tuple[Node, Tensor]] = [(value, part)]
    while pending:
        node, strided = pending.pop()
        for user in node.users:
            call = evidence.calls.get(user)
            if call is None or call.op not in _VIEWS | {"view", "_unsafe_view"} or user.args[0] is not node:
                continue
            try:
                pending.append((user, user.target(strided, *user.args[1:], **user.kwargs)))  # type: ignore[operator]
            except Exception as error:  # torch raises RuntimeError, or others from argument checks
                raise Refusal(
                    "a view of it needs contiguous memory, which a part of a larger tensor is not"
                ) from error


def check_sums(evidence: Evidence, sums: Sequence[Node]) -> None:
    """Additions that write in place must not be seen under the old name of what they write to.

    Raises Refusal.
    """
    for node in sums:
        call = evidence.calls[node]
        if not call.mutates:
            continue
        root = memory_root(nodes_of(node.args)[0])
        read = {n for c in evidence.calls.values() if c.index > call.index for n in c.node.all_input_nodes}
        names = (n for n in read | evidence.outputs if memory_root(n) is root)
        if any(_index(evidence, n) < call.index for n in names):
            raise Refusal("the sum is written into memory that is read under another name too")


def _index(evidence: Evidence, node: Node) -> int:
    call = evidence.calls.get(node)
    return call.index if call is not None else -1
