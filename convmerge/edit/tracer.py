"""A torch.fx tracer that can tell the code of a module what it asks about shapes.

How many axes a tensor has is told from the inputs that the module was called with, and asserted in the trace.
Where code branches on sizes, it is traced on every way that it can go: if all give the same graph, the answer
does not matter, and if they do not, no trace can stand for the code.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx._symbolic_trace import _assert_is_none
from torch.fx.node import Node, map_arg
from torch.fx.proxy import TraceError
from torch.utils import _pytree as pytree

from convmerge.evidence.capture import Signature, plain_defaults
from convmerge.evidence.tracing import quiet, unmarked

# Ways through branches that are tried at most: five branches in a row.
WAYS = 32


def trace_all_ways(module: nn.Module, signature: Signature, opened: frozenset[str]) -> fx.Graph:
    """The graph of a module as it was called, the same on every way that sizes can lead through its code.

    Arguments that were None can be anything where the code hands them on all the same, and are asserted to
    be None elsewhere. Raises TraceError where there is no such graph, and whatever the code raises on
    symbolic values.
    """
    found = _on_all_ways(module, signature, opened, frozenset())
    for name in [name for name, value in arguments(module, signature).items() if value is None]:
        free = found.free | {name}
        try:
            wider = _on_all_ways(module, signature, opened, free)
        except Exception:  # code can do anything with what is not None
            continue
        used = any(node.users for node in wider.graph.find_nodes(op="placeholder") if node.target == name)
        if used and _written(wider, free) == _written(found, free):
            found = wider
    graph = found.graph
    for node in reversed(graph.nodes):
        silent = _is_arithmetic(node) or _reads_rank(node) or _reads_shape(node)
        if node in found.looks and silent and not node.users:
            graph.erase_node(node)
    return graph


def _on_all_ways(
    module: nn.Module, signature: Signature, opened: frozenset[str], free: frozenset[str]
) -> _Tracer:
    """A tracer that has run; the arguments ``free`` are not fixed to None."""
    first = _Tracer(module, signature, opened, free)
    first.run()
    known, pending = _written(first, free), first.others()
    for tried in range(WAYS):
        if not pending:
            break
        tracer = _Tracer(module, signature, opened, free, pending.pop())
        try:
            tracer.run()
            same = _written(tracer, free) == known
        except Exception:  # what code on the other way does with symbolic values can raise anything
            same = False
        if not same or tried == WAYS - 1:
            raise TraceError("it goes another way at other sizes")
        pending += tracer.others()
    return first


def arguments(module: nn.Module, signature: Signature) -> dict[str, Any]:
    """The arguments of the first call by name, with defaults, and with what ``**kwargs`` caught.

    Raises TraceError where ``*args`` caught some.
    """
    bound = inspect.signature(module.forward).bind(*signature.args, **signature.kwargs)
    bound.apply_defaults()
    found: dict[str, Any] = {}
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            found.update(bound.arguments[name])
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            found[name] = bound.arguments[name]
        elif bound.arguments[name]:
            raise TraceError("it is called with more arguments than it names")
    return found


def _written(tracer: _Tracer, absent: frozenset[str]) -> list[object]:
    """What is computed for the result, and asserted, in a form that can be compared.

    A condition is what it was answered to be, and the arguments ``absent`` are None.
    """
    graph = tracer.graph
    answers: dict[Node, bool | None] = dict(tracer.answers)
    answers.update((n, None) for n in graph.find_nodes(op="placeholder") if n.target in absent)
    live: set[Node] = set()
    for node in reversed(graph.nodes):
        kept = node.op in ("placeholder", "output") or node.target is torch._assert
        kept = kept or (node.target is _assert_is_none and node.args[0] not in answers)
        if (kept and node not in answers) or node in live:
            live.update((node, *(n for n in node.all_input_nodes if n not in answers)))
    nodes = [node for node in graph.nodes if node in live]
    index = {node: position for position, node in enumerate(nodes)}

    def numbered(node: Node) -> Any:
        return answers[node] if node in answers else ("node", index[node])

    def entry(node: Node) -> object:
        if node.op == "get_attr" and str(node.target).startswith("_tensor_constant"):
            return object()  # tensors that tracing made of numbers can differ under one name
        return (node.op, node.target, *map_arg((node.args, node.kwargs), numbered))

    return [entry(node) for node in nodes]


class _Sized(fx.Proxy):
    """A proxy that has a length where the rank of a tensor tells it."""

    def __getattr__(self, name: str) -> _Attribute:
        return _Attribute(self, name)

    def __len__(self) -> int:
        tracer = self.tracer
        assert isinstance(tracer, _Tracer)
        return tracer.length(self.node)


class _Attribute(_Sized, fx.proxy.Attribute):
    """An attribute of a proxy, which torch.fx makes an object of its own class for."""


class _Tracer(fx.Tracer):
    """Traces a module once.

    Attributes:
        free: arguments that were None and are traced as if they were not.
        ways: the answers to the first questions about sizes; those to later ones are true.
        answers: what every question was answered.
        looks: what was computed for them.
    """

    def __init__(
        self,
        module: nn.Module,
        signature: Signature,
        opened: frozenset[str],
        free: frozenset[str],
        ways: tuple[bool, ...] = (),
    ) -> None:
        super().__init__()
        self._module = module
        self._signature = signature
        self._opened = opened
        self.free = free
        self._ways = ways
        self._given: list[bool] = []
        self.answers: dict[Node, bool] = {}
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._values: dict[Node, Any] = {}
        self._evaluating = False
        self._ranked: set[Node] = set()
        self._inputs = arguments(module, signature)
        self.looks: set[Node] = set()

    def run(self) -> None:
        """Make the graph, whose placeholders are then named as the arguments."""
        with quiet(), unmarked(self._module):
            self.trace(self._module, concrete_args=self._fixed() or None)
        placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        for node, name in zip(placeholders, self._inputs, strict=True):
            node.target = name  # tracing with fixed arguments renames them, which keyword callers would miss

    def _fixed(self) -> dict[str, Any]:
        """Arguments that code can decide by, with their values: what was left out, and what is no number."""
        given = inspect.signature(self._module.forward).bind(*self._signature.args, **self._signature.kwargs)
        absent = {k: v for k, v in plain_defaults(self._module).items() if k not in given.arguments}
        fixed = absent | {k: v for k, v in self._inputs.items() if isinstance(v, bool | str | None)}
        return {name: value for name, value in fixed.items() if name not in self.free}

    def others(self) -> list[tuple[bool, ...]]:
        """The beginnings of the ways that this one turned off from."""
        given = range(len(self._ways), len(self._given))
        return [(*self._given[:i], not self._given[i]) for i in given]

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """As that of torch.fx, but what ``**kwargs`` caught becomes parameters, and nothing else is taken."""
        plain = inspect.unwrap(root_fn)
        signature = inspect.signature(plain)
        if set(self._inputs) == set(list(signature.parameters)[1:]):
            return super().create_args_for_root(root_fn, is_module, concrete_args)
        caught = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None) for n in self._inputs]
        known = {**{p.name: p for p in caught}, **signature.parameters}
        named = signature.replace(parameters=[known[name] for name in self._inputs])
        proxies = [self._proxy_placeholder(name, concrete_args, named, plain) for name in self._inputs]
        return lambda *args: root_fn(self.root, **dict(zip(self._inputs, args, strict=True))), proxies

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self._opened

    def proxy(self, node: Node) -> fx.Proxy:
        return _Sized(node, self)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        return forward(*args, **kwargs) if self._evaluating else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self._evaluating else super().getattr(attr, attr_val, parameter_proxy_cache)

    def to_bool(self, obj: fx.Proxy) -> bool:
        if obj.node in self.answers:
            return self.answers[obj.node]
        answer = self._value(obj.node)
        if not isinstance(answer, bool):
            return super().to_bool(obj)
        looks = _looks(obj.node)
        self.looks |= looks
        if all(_reads_rank(node) or _is_arithmetic(node) for node in looks):
            for node in filter(_reads_rank, looks):
                self._assert_rank(node.all_input_nodes[0])
            return answer
        if len(self._given) < len(self._ways):
            answer = self._ways[len(self._given)]
        self._given.append(answer)
        self.answers[obj.node] = answer
        return answer

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        return (operator.getitem(obj, i) for i in range(self.length(obj.node)))

    def length(self, node: Node) -> int:
        """The length of the shape of a tensor, or of a part of it. Raises TraceError for other values."""
        value, base = self._value(node), _tensor_of(node)
        if not isinstance(value, torch.Size) or base is None:
            raise TraceError("it goes through a value whose length is not known")
        self._assert_rank(base)
        return len(value)

    def _assert_rank(self, node: Node) -> None:
        if node in self._ranked:
            return
        self._ranked.add(node)
        rank = self._value(node).dim()
        same = self.proxy(node).dim() == rank
        self.create_proxy("call_function", torch._assert, (same, f"{node.name} must have {rank} axes"), {})

    def _value(self, node: Node) -> Any:
        """What a node is on the example inputs, tensors without numbers. Raises TraceError where unknown."""
        needed, pending = {node}, [node]
        while pending:
            sources = [n for n in pending.pop().all_input_nodes if n not in needed and n not in self._values]
            needed.update(sources)
            pending.extend(sources)
        self._evaluating = True
        try:
            with self._fake, torch.no_grad():
                for other in self.graph.nodes:
                    if other in needed and other not in self._values:
                        self._values[other] = self._run(other)
        except Exception as error:  # code can compute anything of anything
            raise TraceError(
                "symbolically traced variables cannot be used as inputs to control flow"
            ) from error
        finally:
            self._evaluating = False
        return self._values[node]

    def _run(self, node: Node) -> Any:
        args = map_arg(node.args, self._values.__getitem__)
        kwargs = map_arg(node.kwargs, self._values.__getitem__)
        if node.op == "placeholder":
            return pytree.tree_map_only(Tensor, self._fake.from_tensor, self._inputs[str(node.target)])
        if node.op == "call_module":
            return self._module.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self._module)
        assert callable(node.target)
        return node.target(*args, **kwargs)


RANKS = ("dim", "ndimension")
SHAPES = ("size", "numel")


def _reads_rank(node: Node) -> bool:
    return str(node.target) in RANKS or (node.target is getattr and bool(node.args[1] == "ndim"))


def _reads_shape(node: Node) -> bool:
    return str(node.target) in SHAPES or (node.target is getattr and bool(node.args[1] == "shape"))


def _is_arithmetic(node: Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "__module__", "") == "_operator"


def _looks(node: Node) -> set[Node]:
    """What a condition is computed from, back to where the shape or the rank of a tensor is read."""
    found, pending = {node}, [node]
    while pending:
        current = pending.pop()
        if not _reads_rank(current) and not _reads_shape(current):
            new = [n for n in current.all_input_nodes if n not in found]
            found.update(new)
            pending.extend(new)
    return found


def _tensor_of(node: Node) -> Node | None:
    """The tensor of whose shape a value is all, or a part."""
    while node.target is operator.getitem and isinstance(node.args[0], Node):
        node = node.args[0]
    whole = _reads_shape(node) and node.target != "numel" and len(node.all_input_nodes) == 1
    return node.all_input_nodes[0] if whole else None
