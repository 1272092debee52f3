"""What specialising a module may assume about the arguments that stay, where their code asks."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.node import Node, map_arg
from torch.fx.proxy import Proxy
from torch.utils import _pytree as pytree

# Calls that fit a tensor to a batch of any size: what they do for one sample, broadcast, is what they do.
_FITTING: frozenset[Any] = frozenset(
    ["expand", "repeat", "view", "reshape", torch.full, torch.ones, torch.zeros, torch.tile]
)
_SIZES = {operator.mul: operator.mul, operator.floordiv: operator.floordiv, operator.add: operator.add}


class _UnknownError(Exception):
    """A proxy that nothing is assumed about."""


def run_assuming(kind: str, target: Any, args: Any, kwargs: Any, like: Tensor) -> Tensor | None:
    """A call on known tensors, for one sample in the model's dtype and on its device.

    None where it takes anything else from proxies. Raises what the call raises.
    """
    leaves = pytree.tree_leaves((args, kwargs))
    proxies = [leaf for leaf in leaves if isinstance(leaf, Proxy)]
    known = any(isinstance(leaf, Tensor) for leaf in leaves)
    if not proxies or (kind == "call_method" and not isinstance(args[0], Tensor)):
        return None
    if (
        target in ("to", "type_as")
        and len(args) == 2
        and isinstance(args[1], Proxy)
        and not _attribute(args[1])
    ):
        return args[0].to(like)  # type: ignore[no-any-return]

    def assumed(leaf: Any) -> Any:
        if not isinstance(leaf, Proxy):
            return leaf
        if name := _attribute(leaf):
            return getattr(like, name)
        if target in _FITTING:
            return _size(leaf.node)
        raise _UnknownError

    args, kwargs = pytree.tree_map(assumed, (tuple(args), dict(kwargs)))
    if not known and target not in (
        torch.full,
        torch.ones,
        torch.zeros,
        torch.arange,
        torch.linspace,
        torch.tensor,
    ):
        return None
    result = (
        getattr(args[0], target)(*args[1:], **kwargs) if kind == "call_method" else target(*args, **kwargs)
    )
    return result if isinstance(result, Tensor) else None


def _attribute(proxy: Proxy) -> str:
    """``dtype`` or ``device`` where a proxy is that of a tensor, else nothing."""
    node = proxy.node
    name = node.args[1] if node.target is getattr and len(node.args) > 1 else ""
    return str(name) if name in ("dtype", "device") else ""


def _size(value: Any) -> Any:
    """A number made of the batch size, taken to be one. Raises _UnknownError for other sizes and values."""
    if not isinstance(value, Node):
        return value
    if value.target in _SIZES:
        return _SIZES[value.target](*map(_size, value.args))
    whole = value.args[0] if value.args else None
    if value.target == "size" and value.args[1:] == (0,):
        return 1
    if value.target is operator.getitem and value.args[1] == 0 and _is_shape(whole):
        return 1
    raise _UnknownError


def _is_shape(value: Any) -> bool:
    if not isinstance(value, Node):
        return False
    return value.target == "size" or (value.target is getattr and value.args[1:] == ("shape",))


# What gives numbers or flags that depend on a tensor's shape and type alone.
_OF_TYPES: frozenset[Any] = frozenset(
    [getattr, "size", "dim", "numel", "ndimension", "stride", "is_floating_point", "is_complex"]
)


class Examples:
    """Values of a trace on example inputs, computed where they are asked for."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._values: dict[Node, Any] = {}

    def note(self, node: Node, value: Any) -> None:
        """Give the value of a placeholder."""
        self._values[node] = value

    def value(self, node: Node) -> Any:
        """The value on the example inputs. Raises ValueError where a number was read from a tensor for it."""
        needed, pending = {node}, [node]
        while pending:
            for source in pending.pop().all_input_nodes:
                if source not in needed and source not in self._values:
                    needed.add(source)
                    pending.append(source)
        for current in sorted(needed - self._values.keys()):
            self._values[current] = self._run(current)
        return self._values[node]

    def plain(self, node: Node) -> Any:
        """A value that depends on the shapes and types of tensors alone. Raises ValueError for any other."""
        value = self.value(node)
        if not isinstance(value, bool | int | float | torch.dtype | torch.device | None):
            raise ValueError("it depends on values")
        return value

    def _run(self, node: Node) -> Any:
        args, kwargs = map_arg((node.args, dict(node.kwargs)), self._values.__getitem__)
        if node.op == "call_module":
            return self._root.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self._root)
        if node.op == "call_method":
            result = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            assert callable(node.target)
            result = node.target(*args, **kwargs)
        of_tensor = bool(args) and isinstance(args[0], Tensor)
        if of_tensor and isinstance(result, bool | int | float) and node.target not in _OF_TYPES:
            raise ValueError("it depends on values")
        return result
