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
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import Argument
from torch.fx.proxy import Proxy
from torch.utils import _pytree as pytree

from convmerge.edit.lower import check_hooks
from convmerge.errors import Refusal
from convmerge.evidence.tracing import must_be, quiet
from convmerge.inputs import Inputs
from convmerge.inputs.values import model_device, model_dtype
from convmerge.passes.assume import Examples, run_assuming

KNOWN = "fixed_{}"


@dataclass(frozen=True, eq=False)
class Specialised:
    """A module without the arguments that were known.

    Attributes:
        module: the traced module.
        fixed: names of its buffers that hold what was computed.
        closed: path of a module that takes known tensors, but whose own code cannot be traced → why.
        assumed: whether calls that fit known tensors to the other inputs were run for one sample in the
            model's dtype, trusting that their readers broadcast.
    """

    module: fx.GraphModule
    fixed: tuple[str, ...]
    closed: dict[str, str]
    assumed: bool


def specialise(root: nn.Module, inputs: Inputs, values: Mapping[str, Any], *, assume: bool) -> Specialised:
    """Trace ``root`` with ``values`` known.

    Args:
        root: a copy in eval mode, which tracing may leave marks on.
        inputs: examples of the arguments that stay. Arguments that are in neither keep their default.
        values: name → known argument.
        assume: run calls that take the batch size or the dtype of other inputs alone for one sample, in the
            model's dtype.

    Raises:
        Refusal: the code of the root cannot be traced.
    """
    tracer = _Specialiser(inputs, values, _like(root) if assume else None)
    name = type(root).__name__
    check_hooks(root, "")
    try:
        with quiet(), torch.no_grad(), _heard_by(tracer):
            graph = tracer.trace(root)
    except Refusal:
        raise
    except Exception as error:  # torch.fx raises many types on code it cannot follow
        raise Refusal(f"the code of {name} cannot be traced: {_first_line(error)}") from error
    graph.lint()
    module = fx.GraphModule(root, graph, class_name=name)
    module.graph._tracer_cls = module._tracer_cls = fx.Tracer  # ours would make the file need convmerge
    return Specialised(module.eval(), tuple(tracer.fixed), tracer.closed, tracer.assumed)


class _Specialiser(fx.Tracer):
    def __init__(self, inputs: Inputs, values: Mapping[str, Any], like: Tensor | None) -> None:
        super().__init__()
        self._inputs = inputs
        self._values = values
        self._like = like
        self._names: dict[int, str] = {}
        self._alive: list[Tensor] = []  # so that no id is given twice
        self.fixed: list[str] = []
        self.closed: dict[str, str] = {}
        self.assumed = False

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Placeholders for what stays, the known values for the others."""
        assert isinstance(self.root, nn.Module)
        named = (*self.root.named_parameters(), *self.root.named_buffers())
        self._names = {id(tensor): name for name, tensor in named}
        self._examples = Examples(self.root)
        whole = inspect.signature(self.root.forward)
        arguments = dict(self._values) | self._proxies(whole)
        ordered = {name: arguments[name] for name in whole.parameters if name in arguments}
        call = inspect.BoundArguments(whole, ordered)
        return lambda root: root_fn(root, *call.args, **call.kwargs), [self.root]

    def _proxies(self, whole: inspect.Signature) -> dict[str, Any]:
        parameters = [p for p in whole.parameters.values() if p.name not in self._values]
        given = whole.replace(parameters=parameters).bind(*self._inputs.args, **self._inputs.kwargs)
        found: dict[str, Any] = {}
        last = max((i for i, value in enumerate(given.arguments.values()) if _has_tensors(value)), default=0)
        for index, (name, example) in enumerate(given.arguments.items()):
            if whole.parameters[name].kind in (
                inspect.Parameter.VAR_POSITIONAL,
                inspect.Parameter.VAR_KEYWORD,
            ):
                raise ValueError("it takes any number of arguments")
            default = (example,) if index > last else ()  # the one value that a plain argument may have
            proxy = self.create_proxy("placeholder", name, default, {})
            self._examples.note(proxy.node, example)
            found[name] = proxy if _has_tensors(example) else self._asserted(name, proxy, example)
        return found

    def _asserted(self, name: str, proxy: Proxy, example: Any) -> Any:
        """A plain argument, on which code may branch: the trace holds for this value of it alone."""
        test = self.create_proxy("call_function", operator.eq, (proxy, example), {})
        self.create_proxy("call_function", torch._assert, (test, must_be(name, example)), {})
        return example

    def to_bool(self, obj: Proxy) -> bool:
        """Where code branches on shapes or types, the trace holds for the example's, and asserts it."""
        try:
            value = bool(self._examples.plain(obj.node))
        except ValueError:
            return super().to_bool(obj)
        test = self.create_proxy("call_function", operator.ne if value else operator.eq, (obj, False), {})
        message = "this model was made for inputs of other sizes or types"
        self.create_proxy("call_function", torch._assert, (test, message), {})
        return value

    def iter(self, obj: Proxy) -> Iterator[Any]:
        """Code that goes through a shape, or a tuple of tensors, gets as many parts as the example has."""
        parts: Any = obj
        return iter([parts[i] for i in range(self.length(obj))])

    def length(self, value: Proxy) -> int:
        """How many parts a shape or a tuple has. Raises TraceError for anything else, a tensor included."""
        try:
            example = self._examples.value(value.node)
        except ValueError:
            example = None
        if not isinstance(example, tuple | list):
            raise fx.proxy.TraceError("it goes through the values of a tensor")
        return len(example)

    def is_tensor(self, value: Proxy) -> bool:
        """Whether a proxy stands for a tensor."""
        return isinstance(self._examples.value(value.node), Tensor)

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
        if not isinstance(a, Tensor):
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
        """Record a call, unless all it takes from proxies can be assumed: then run it."""
        if self._like is not None and kind in ("call_function", "call_method"):
            try:
                done = run_assuming(kind, target, args, kwargs, self._like)
            except (
                Exception
            ):  # the code may be fit for another batch size than one alone: then it is recorded
                done = None
            if done is not None:
                self.assumed = True
                return done
        return super().create_proxy(kind, target, args, kwargs, *more, **others)


# Functions that do not ask those of their arguments that can be sizes for ``__torch_function__``.
_DEAF = ((F, "interpolate"), (F, "adaptive_avg_pool2d"), (torch, "zeros"), (torch, "ones"), (torch, "empty"))


@contextmanager
def _heard_by(tracer: _Specialiser) -> Iterator[None]:
    """Let proxies into ``Tensor.expand``, ``torch.is_tensor`` and the like while ``tracer`` traces."""
    patches: list[tuple[Any, str, Any]] = []

    def patch(owner: Any, name: str, function: Any) -> None:
        patches.append((owner, name, vars(owner).get(name)))
        setattr(owner, name, function)

    def hearing(kind: str, target: Any, plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if any(isinstance(leaf, Proxy) for leaf in pytree.tree_leaves((args, kwargs))):
                return tracer.create_proxy(kind, target, args, kwargs)
            return plain(*args, **kwargs)

        return call

    is_tensor = torch.is_tensor
    try:
        patch(torch.Tensor, "expand", hearing("call_method", "expand", torch.Tensor.expand))
        patch(torch, "is_tensor", lambda x: tracer.is_tensor(x) if isinstance(x, Proxy) else is_tensor(x))
        patch(Proxy, "__len__", lambda proxy: tracer.length(proxy))
        for owner, name in _DEAF:
            function = getattr(owner, name)
            patch(owner, name, hearing("call_function", function, function))
        yield
    finally:
        for owner, name, before in reversed(patches):
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)


def _has_tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def _like(root: nn.Module) -> Tensor:
    """A tensor of the dtype and on the device of a model."""
    return torch.empty(0, dtype=model_dtype(root), device=model_device(root))


def _first_line(error: Exception) -> str:
    if isinstance(error, Refusal):
        return error.reason
    lines = str(error).strip().splitlines()
    return lines[0].split(". ")[0] if lines else type(error).__name__
