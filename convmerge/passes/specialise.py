"""A module for known values of some of its arguments: what depends on them alone is computed while tracing.

torch.fx runs the module's code with proxies for the arguments that stay and real tensors for those that are
known. Whatever the code does with real tensors alone simply happens, branches on their values included; their
last results become buffers of the traced module. Modules are opened only where both kinds meet in them.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Argument
from torch.fx.proxy import Proxy
from torch.utils import _pytree as pytree

from convmerge.capture import quiet
from convmerge.errors import Refusal
from convmerge.inputs import Inputs
from convmerge.lower import check_hooks

KNOWN = "fixed_{}"


@dataclass(frozen=True, eq=False)
class Specialised:
    """A module without the arguments that were known.

    Attributes:
        module: the traced module.
        fixed: names of its buffers that hold what was computed.
        closed: path of a module that takes known tensors, but whose own code cannot be traced → why.
        batch_of_one: whether a known tensor that the code repeats for every sample was left as it is,
            trusting that its readers broadcast it.
    """

    module: fx.GraphModule
    fixed: tuple[str, ...]
    closed: dict[str, str]
    batch_of_one: bool


def specialise(root: nn.Module, inputs: Inputs, values: Mapping[str, Any], *, repeats: bool) -> Specialised:
    """Trace ``root`` with ``values`` known.

    Args:
        root: a copy in eval mode, which tracing may leave marks on.
        inputs: examples of the arguments that stay. Arguments that are in neither keep their default.
        values: name → known argument.
        repeats: keep the calls that repeat a known tensor for every sample of the batch.

    Raises:
        Refusal: the code of the root cannot be traced.
    """
    tracer = _Specialiser(inputs, values, repeats)
    name = type(root).__name__
    check_hooks(root, "")
    try:
        with quiet(), torch.no_grad(), _expanding(tracer):
            graph = tracer.trace(root)
    except Refusal:
        raise
    except Exception as error:  # torch.fx raises many types on code it cannot follow
        raise Refusal(f"the code of {name} cannot be traced: {_first_line(error)}") from error
    graph.lint()
    module = fx.GraphModule(root, graph, class_name=name)
    module.graph._tracer_cls = module._tracer_cls = fx.Tracer  # ours would make the file need convmerge
    return Specialised(module.eval(), tuple(tracer.fixed), tracer.closed, tracer.batch_of_one)


class _Specialiser(fx.Tracer):
    def __init__(self, inputs: Inputs, values: Mapping[str, Any], repeats: bool) -> None:
        super().__init__()
        self._inputs = inputs
        self._values = values
        self._repeats = repeats
        self._names: dict[int, str] = {}
        self._alive: list[Tensor] = []  # so that no id is given twice
        self.fixed: list[str] = []
        self.closed: dict[str, str] = {}
        self.batch_of_one = False

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Placeholders for what stays, the known values for the others."""
        assert isinstance(self.root, nn.Module)
        named = (*self.root.named_parameters(), *self.root.named_buffers())
        self._names = {id(tensor): name for name, tensor in named}
        whole = inspect.signature(self.root.forward)
        arguments = dict(self._values) | self._proxies(whole)
        ordered = {name: arguments[name] for name in whole.parameters if name in arguments}
        call = inspect.BoundArguments(whole, ordered)
        return lambda root: root_fn(root, *call.args, **call.kwargs), [self.root]

    def _proxies(self, whole: inspect.Signature) -> dict[str, Any]:
        parameters = [p for p in whole.parameters.values() if p.name not in self._values]
        given = whole.replace(parameters=parameters).bind(*self._inputs.args, **self._inputs.kwargs)
        found: dict[str, Any] = {}
        for name, example in given.arguments.items():
            if whole.parameters[name].kind in (
                inspect.Parameter.VAR_POSITIONAL,
                inspect.Parameter.VAR_KEYWORD,
            ):
                raise ValueError("it takes any number of arguments")
            proxy = self.create_proxy("placeholder", name, (), {})
            tensors = any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(example))
            found[name] = proxy if tensors else self._asserted(name, proxy, example)
        return found

    def _asserted(self, name: str, proxy: Proxy, example: Any) -> Any:
        """A plain argument, on which code may branch: the trace holds for this value of it alone."""
        same = operator.is_ if example is None else operator.eq
        test = self.create_proxy("call_function", same, (proxy, example), {})
        message = f"{name} was {example!r} when this model was made, and must be"
        self.create_proxy("call_function", torch._assert, (test, message), {})
        return example

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Parameters are known tensors too."""
        return attr_val

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run it where all is known, open it where known tensors meet others, else keep the call."""
        leaves = pytree.tree_leaves((args, kwargs))
        if not any(isinstance(leaf, Proxy) for leaf in leaves):
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        if any(isinstance(leaf, Tensor) for leaf in leaves):
            last = next(iter(reversed(self.graph.nodes)))
            try:
                check_hooks(m, path)
                return forward(*args, **kwargs)
            except Exception as error:  # torch.fx raises many types on code it cannot follow
                self.closed[path] = _first_line(error)
                while (node := next(iter(reversed(self.graph.nodes)))) is not last:
                    self.graph.erase_node(node)
        return self.create_proxy("call_module", path, args, kwargs)

    def create_arg(self, a: Any) -> Argument:
        """A known tensor that meets others is an attribute of the root; a new one becomes a buffer."""
        if not isinstance(a, Tensor) or isinstance(a, Proxy):
            return super().create_arg(a)
        assert isinstance(self.root, nn.Module)
        if id(a) not in self._names:
            name = KNOWN.format(len(self.fixed))
            while hasattr(self.root, name):
                name += "_"
            # Cloned, as a view would be saved with all of the memory it looks at.
            self.root.register_buffer(name, a.detach().clone(memory_format=torch.contiguous_format))
            self.fixed.append(name)
            self._names[id(a)] = name
            self._alive.append(a)
        return self.create_node("get_attr", self._names[id(a)], (), {})

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any, **others: Any) -> Any:
        """Record a call, except one that repeats a known tensor of one sample for all of the batch."""
        if kind == "call_method" and not self._repeats and (one := _one_sample(target, args)) is not None:
            self.batch_of_one = True
            return one
        return super().create_proxy(kind, target, args, kwargs, *more, **others)


def _one_sample(method: str, args: tuple[Any, ...]) -> Tensor | None:
    """The known tensor in ``known.expand(n, -1, …)`` or ``known.repeat(n, 1, …)``, n being the batch size."""
    if method not in ("expand", "repeat") or not isinstance(args[0], Tensor):
        return None
    value = args[0]
    sizes = args[1] if len(args) == 2 and isinstance(args[1], tuple | list) else args[1:]
    if not sizes or not _is_batch_size(sizes[0]):
        return None
    if value.dim() == 0 and len(sizes) == 1:
        return value.reshape(1)
    if value.dim() != len(sizes) or value.shape[0] != 1:
        return None
    same = [
        s == 1 if method == "repeat" else s in (-1, n)
        for s, n in zip(sizes[1:], value.shape[1:], strict=True)
    ]
    return value if all(s is True for s in same) else None


def _is_batch_size(size: Any) -> bool:
    """Whether a proxy is ``x.shape[0]``, ``x.size(0)`` or ``x.size()[0]``."""
    if not isinstance(size, Proxy):
        return False
    node = size.node
    if node.target == "size":
        return node.args[1:] == (0,)
    if node.target is not operator.getitem or node.args[1] != 0 or not isinstance(node.args[0], fx.Node):
        return False
    whole = node.args[0]
    return whole.target == "size" or (whole.target is getattr and whole.args[1:] == ("shape",))


@contextmanager
def _expanding(tracer: _Specialiser) -> Iterator[None]:
    """``Tensor.expand`` alone does not ask its arguments for ``__torch_function__``: do it for it."""
    plain = torch.Tensor.expand

    def expand(self: Tensor, *sizes: Any, **kwargs: Any) -> Any:
        if any(isinstance(size, Proxy) for size in pytree.tree_leaves(sizes)):
            return tracer.create_proxy("call_method", "expand", (self, *sizes), kwargs)
        return plain(self, *sizes, **kwargs)

    torch.Tensor.expand = expand  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        del torch.Tensor.expand


def _first_line(error: Exception) -> str:
    if isinstance(error, Refusal):
        return error.reason
    lines = str(error).strip().splitlines()
    return lines[0].split(". ")[0] if lines else type(error).__name__
