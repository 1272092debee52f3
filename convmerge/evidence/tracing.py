"""Running torch's tracers so that the graph shows what a model does, and nothing is printed."""

from __future__ import annotations

import contextlib
import gc
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Node
from torch.overrides import TorchFunctionMode


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings and log lines of tracing, which say nothing about the user's model."""
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch.fx", "torch._export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """No garbage collection while a graph grows: it would look at all of it again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class VisibleData(TorchFunctionMode):
    """Shows the tracer what code does with ``tensor.data``, which torch hides from it.

    Reading it gives an alias without gradients, as ``detach`` does; assigning a tensor of the same kind to it
    overwrites the values, as ``copy_`` does. Other assignments stay as they are.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[Any],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func == Tensor.data.__get__:  # type: ignore[attr-defined]
            return args[0].detach()
        if func == Tensor.data.__set__ and _alike(*args):  # type: ignore[attr-defined]
            with torch.no_grad():
                args[0].copy_(args[1])
            return None
        return func(*args, **(kwargs or {}))


def _alike(old: Tensor, new: Tensor) -> bool:
    return old.shape == new.shape and old.dtype == new.dtype and old.device == new.device


# Calls that give a tensor the shape of another one → the same with numbers.
SHAPED_AS: dict[Any, Any] = {
    torch.ops.aten.reshape_as.default: torch.ops.aten.reshape.default,
    torch.ops.aten.view_as.default: torch.ops.aten.view.default,
    torch.ops.aten.expand_as.default: torch.ops.aten.expand.default,
}
WRITTEN_AS = "written as"  # key of a node's meta: the name of such a call, which takes any shape
DROPOUTS = frozenset({"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"})


def drop_idle(graph: fx.Graph) -> None:
    """Remove calls that returned the very tensor they were given, such as dropout at inference.

    The tracer takes every later use of that tensor for a use of the call's result, which ties together what
    has nothing to do with each other. Reading a tensor for its shape alone does so too: it becomes numbers.
    """
    for node in list(graph.nodes):
        if _is_idle(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target in SHAPED_AS and isinstance(node.meta.get("val"), Tensor):
            node.meta[WRITTEN_AS] = node.target.overloadpacket.__name__
            node.target = SHAPED_AS[node.target]
            node.args, node.kwargs = (node.args[0], list(node.meta["val"].shape)), {}


def _is_idle(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not node.args or not isinstance(node.args[0], Node):
        return False
    names = [parameter.name for parameter in schema.arguments]
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    name = schema.name.split("::")[-1].removesuffix("_")
    if name in DROPOUTS:
        return given["train"] is False or given["p"] == 0
    if name not in ("to", "type_as") or given.get("copy") or given.get("memory_format") is not None:
        return False
    before, after = node.args[0].meta.get("val"), node.meta.get("val")
    return (
        isinstance(before, Tensor)
        and isinstance(after, Tensor)
        and (before.dtype, before.device) == (after.dtype, after.device)
    )


@contextlib.contextmanager
def unmarked(module: nn.Module) -> Iterator[None]:
    """Undo what code that assigns to its own attributes leaves on a module while it is traced."""
    before = [(m, [dict(kept) for kept in _state(m)]) for m in module.modules()]
    try:
        yield
    finally:
        for m, states in before:
            vars(m).clear()
            vars(m).update(states[0])
            for kept, now in zip(states[1:], _state(m)[1:], strict=True):
                now.clear()
                now.update(kept)


def _state(module: nn.Module) -> tuple[dict[str, Any], ...]:
    """A module's attributes, and the registries among them that are changed in place."""
    return vars(module), module._parameters, module._buffers, module._modules


def must_be(name: str, value: object) -> str:
    """The message of an assertion that an argument is what a trace was made for."""
    return f"{name} was {value!r} when this model was made, and must be"
