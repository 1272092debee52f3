"""The evidence: what a model really computes on example inputs, as one graph of ATen calls.

``torch.export`` gives true data flow in one operator vocabulary, in-place writes included, and for every
call the modules it ran in. Where it fails (forwards that rewrite ``.data``, sizes that depend on data), the
model is run for real under the tracer that torch.export itself uses, which gives the same kind of graph.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import Node, map_arg
from torch.utils import _pytree as pytree

from convmerge.errors import ConvmergeError
from convmerge.evidence.copying import deep_copy
from convmerge.evidence.ratios import Ratio, ratios_of
from convmerge.evidence.tracing import VisibleData, collector_paused, drop_idle, quiet
from convmerge.inputs import Inputs


@dataclass(frozen=True)
class Frame:
    """One call of one module: its canonical path, and a key that tells its calls apart."""

    path: str
    key: str


ROOT = Frame("", "")


@dataclass(frozen=True)
class Signature:
    """How a module was called, over all of its calls.

    Attributes:
        unary: every call passed exactly one positional tensor and nothing else, and returned one tensor.
        calls: number of calls.
        args, kwargs: the arguments of the first call, tensors replaced by zeros of the same kind.
    """

    unary: bool
    calls: int
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Call:
    """One operator call of the evidence graph.

    Attributes:
        node: the graph node; its ``meta["val"]`` is a fake tensor with shape and dtype.
        op: the ATen name without namespace and overload, in-place forms under their plain name (``add``).
        args: arguments by schema name, defaults filled in; tensors are nodes.
        stack: the module calls it ran in, outermost first, beginning with the root (path "").
        mutates: whether it writes into its first argument.
        index: position in execution order.
        origin: for a call in the code of an exported program, the module it was made in before the export.
    """

    node: Node
    op: str
    args: dict[str, Any]
    stack: tuple[Frame, ...]
    mutates: bool
    index: int
    origin: str = ""

    @property
    def path(self) -> str:
        """Path of the module whose code made the call."""
        return self.stack[-1].path

    @property
    def place(self) -> str:
        """Where it is, for people: the module path, of a program's call the one it had."""
        return self.path or self.origin

    @property
    def leaf(self) -> str:
        """The place, or the operator inside the root."""
        return self.place or self.op


@dataclass(eq=False)
class Evidence:
    """A captured model.

    Attributes:
        graph: the exported graph; owned by this object.
        calls: node → call, in execution order (``getitem`` on a tuple result counts as a call of its own).
        tensors: node of a parameter, buffer or constant → (name, tensor of the captured model).
        inputs: the other nodes that are no calls: the model's inputs.
        outputs: nodes that the model returns.
        signatures: canonical module path → how it was called.
        eager: whether the graph was recorded from a run on real tensors, since torch.export failed.
        source: the captured model and its inputs, to ask how it behaves at other sizes.
    """

    graph: fx.Graph
    calls: dict[Node, Call]
    tensors: dict[Node, tuple[str, Tensor]]
    inputs: list[Node]
    outputs: set[Node]
    signatures: dict[str, Signature]
    eager: bool = False
    source: tuple[nn.Module, Inputs] | None = None

    @cached_property
    def ratios(self) -> dict[Node, Ratio]:
        """How nearest upsampling enlarges maps at all sizes that the model takes."""
        calls = {n: c.op for n, c in self.calls.items() if c.op.lstrip("_").startswith("upsample_nearest")}
        return ratios_of(*self.source, calls) if self.source is not None else {}

    def size(self, node: Node) -> tuple[int, ...]:
        """Shape of a tensor value on the example inputs; 0 where it depends on a constant's values."""
        return tuple(n if isinstance(n, int) else 0 for n in node.meta["val"].shape)

    def dtype(self, node: Node) -> torch.dtype:
        """Dtype of a tensor value, or of the first one where a call gives several."""
        value = node.meta["val"]
        dtype: torch.dtype = (value[0] if isinstance(value, tuple | list) else value).dtype
        return dtype


def is_tensor(node: object) -> bool:
    """Whether a graph value is one tensor."""
    return isinstance(node, Node) and isinstance(node.meta.get("val"), Tensor)


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy that shares no storage with the original; tensors computed with gradients are detached.

    Old-style weight_norm and pruning leave such tensors on their modules, which ``copy.deepcopy`` refuses.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return deep_copy(model, memo)


def canonical_paths(model: nn.Module) -> dict[str, str]:
    """Every path under which a module is registered → the first path of that same module."""
    first: dict[int, str] = {}
    return {
        path: first.setdefault(id(module), path)
        for path, module in model.named_modules(remove_duplicate=False)
    }


def capture(model: nn.Module, inputs: Inputs) -> Evidence:
    """Capture ``model`` (in eval mode) on example inputs; the model and the inputs are not changed.

    Raises ConvmergeError where the model does not run on the inputs, or neither torch.export nor a recorded
    run can follow it.
    """
    try:
        with collector_paused():
            evidence = _export(copy_model(model).eval(), inputs.clone())
    except Exception as error:  # torch.export raises many types on code it cannot follow
        try:
            evidence = _run(copy_model(model).eval(), inputs.clone())
        except Exception:
            _check_runs(model, inputs)
            raise ConvmergeError(
                f"{type(model).__name__} cannot be captured by torch.export: {_first_line(error)}",
                hint="the model itself runs on these inputs; run with -v for the whole error",
            ) from error
    evidence.source = model, inputs
    return evidence


def run_copy(model: nn.Module, inputs: Inputs) -> None:
    """Run a copy of ``model`` in eval mode on copies of the inputs; raises whatever its code raises."""
    trial, given = copy_model(model), inputs.clone()
    with contextlib.suppress(NotImplementedError):  # modules from torch.export are in eval mode already
        trial.eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        trial(*given.args, **given.kwargs)


def _check_runs(model: nn.Module, inputs: Inputs) -> None:
    try:
        with quiet(), contextlib.redirect_stderr(io.StringIO()):  # a traced module that fails prints its code
            run_copy(model, inputs)
    except Exception as error:
        shown = ", ".join(f"{name} {what}" for name, what in inputs.describe().items())
        raise ConvmergeError(
            f"{type(model).__name__} does not run on these inputs ({shown}): {_first_line(error)}",
            "give inputs that it takes, as in --input 1,3,224,224; -v shows where it failed",
        ) from error


def plain_defaults(model: nn.Module) -> dict[str, Any]:
    """Forward's parameters whose default is None, a bool, a number or a string, with that default."""
    parameters = inspect.signature(model.forward).parameters.values()
    return {
        p.name: p.default
        for p in parameters
        if p.default is not p.empty and isinstance(p.default, bool | int | float | str | None)
    }


def _export(model: nn.Module, inputs: Inputs) -> Evidence:
    canonical = canonical_paths(model)
    unseen = contextlib.redirect_stderr(io.StringIO())  # where it fails, it prints the graph it has so far
    with quiet(), unseen, VisibleData(), _record_calls(model) as recorded, torch.no_grad():
        program = torch.export.export(model, inputs.args, dict(inputs.kwargs), strict=False)
    if any("_has_compatible_shallow_copy_type" in str(node.target) for node in program.graph.nodes):
        raise ValueError("it replaces the .data of a tensor, which the exported graph does not show")
    kinds = {spec.arg.name: spec for spec in program.graph_signature.input_specs if hasattr(spec.arg, "name")}
    tensors: dict[Node, tuple[str, Tensor]] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in kinds:
            target = kinds[node.name].target
            store = program.state_dict if target in program.state_dict else program.constants
            value = store.get(target) if target is not None else None
            if isinstance(value, Tensor):
                tensors[node] = (str(target), value.detach())
    if any(_of_unknown_size(node) for node in _depending(program.graph, tensors.keys())):
        raise ValueError("the size of a tensor depends on values")
    if "" not in recorded:  # a traced module at the root: export runs it node by node and does not call it
        single = program.call_spec.out_spec is not None and program.call_spec.out_spec.is_leaf()
        recorded[""] = [(inputs.args, inputs.kwargs, inputs.tensors()[0] if single else None)]
    # The code of a traced module remembers modules whose calls were traced, which it does not call itself.
    called = frozenset(recorded) if isinstance(model, fx.GraphModule) else None
    return _evidence(program.graph, tensors, canonical, _signatures(recorded, canonical), called)


def _depending(graph: fx.Graph, tensors: Collection[Node]) -> set[Node]:
    """What depends on the model's inputs."""
    found: set[Node] = set()
    for node in graph.nodes:
        is_input = node.op == "placeholder" and node not in tensors
        if is_input or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _of_unknown_size(node: Node) -> bool:
    val = node.meta.get("val")
    return isinstance(val, Tensor) and any(isinstance(n, torch.SymInt) for n in val.shape)


def _run(model: nn.Module, inputs: Inputs) -> Evidence:
    """Record the calls of one real run; weights computed past the tracer are constants of it."""
    canonical = canonical_paths(model)
    names = {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}

    def forward(*args: Any) -> Any:
        return model(
            *args[: len(inputs.args)], **dict(zip(inputs.kwargs, args[len(inputs.args) :], strict=True))
        )

    forward._orig_mod = model  # type: ignore[attr-defined]  # says whose modules the calls belong to
    with quiet(), VisibleData(), _record_calls(model) as recorded, torch.no_grad():
        traced = make_fx(
            forward, pre_dispatch=True, record_module_stack=True, _error_on_data_dependent_ops=False
        )(*inputs.args, *inputs.kwargs.values())
    tensors: dict[Node, tuple[str, Tensor]] = {}
    first: dict[int, Node] = {}
    for node in traced.graph.find_nodes(op="get_attr"):
        value = getattr(traced, str(node.target))
        if not isinstance(value, Tensor):
            continue
        if (known := first.setdefault(id(value), node)) is not node:  # the tracer reads it anew for every use
            node.replace_all_uses_with(known)
            traced.graph.erase_node(node)
        else:
            tensors[node] = (names.get(id(value), str(node.target)), value.detach())
    evidence = _evidence(traced.graph, tensors, canonical, _signatures(recorded, canonical))
    evidence.eager = True
    return evidence


def _signatures(recorded: dict[str, list[Any]], canonical: dict[str, str]) -> dict[str, Signature]:
    return {canonical[path]: _signature(calls) for path, calls in recorded.items() if path in canonical}


def _evidence(
    graph: fx.Graph,
    tensors: dict[Node, tuple[str, Tensor]],
    canonical: dict[str, str],
    signatures: dict[str, Signature],
    called: Collection[str] | None = None,
) -> Evidence:
    """Normalise a traced graph, which the result owns from then on."""
    drop_idle(graph)
    calls: dict[Node, Call] = {}
    inputs: list[Node] = []
    outputs: set[Node] = set()
    for index, node in enumerate(graph.nodes):
        if node.op == "call_function":
            calls[node] = _call(node, index, canonical, called)
        elif node.op == "output":
            outputs.update(node.all_input_nodes)
        elif node not in tensors:
            inputs.append(node)
    return Evidence(graph, calls, tensors, inputs, outputs, signatures)


def _call(node: Node, index: int, canonical: dict[str, str], called: Collection[str] | None) -> Call:
    stack, origin = [ROOT], ""
    for key, (path, _) in node.meta.get("nn_module_stack", {}).items():
        path = _SLICE.sub(_sliced, path.split("@")[0])
        path = canonical.get(path, path)
        if called is not None and path not in called:
            origin = path
        elif path:
            stack.append(Frame(path, key))
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        name = getattr(node.target, "__name__", str(node.target))
        return Call(node, name, {}, tuple(stack), False, index, origin)
    args: dict[str, Any] = {}
    for position, parameter in enumerate(schema.arguments):
        if position < len(node.args):
            args[parameter.name] = node.args[position]
        elif parameter.name in node.kwargs:
            args[parameter.name] = node.kwargs[parameter.name]
        else:
            args[parameter.name] = parameter.default_value
    name = schema.name.split("::")[-1]
    mutates = bool(schema.is_mutable)
    op = name.removesuffix("_") if mutates and not name.startswith("_") else name
    return Call(node, op, args, tuple(stack), mutates, index, origin)


# How torch.export names a module reached through a slice of a container, in models with shared modules.
_SLICE = re.compile(r"\.slice\((None|\d+), (?:None|-?\d+), (None|\d+)\)\.(\d+)")


def _sliced(match: re.Match[str]) -> str:
    """The place in the container itself: ``layers.slice(2, None, None).0`` is ``layers.2``."""
    start, step, index = (
        (default if n == "None" else int(n)) for n, default in zip(match.groups(), (0, 1, 0), strict=True)
    )
    return f".{start + step * index}"


@contextlib.contextmanager
def _record_calls(model: nn.Module) -> Iterator[dict[str, list[tuple[Any, Any, Any]]]]:
    """Note the arguments and the result of every module call while the model is traced."""
    paths = {id(module): path for path, module in model.named_modules()}
    recorded: dict[str, list[tuple[Any, Any, Any]]] = {}

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        # A module that export wraps to follow shared submodules keeps the original's __dict__.
        path = paths.get(id(module)) or by_dict.get(id(module.__dict__.get("_parameters")))
        if path is not None:
            recorded.setdefault(path, []).append((args, kwargs, output))

    by_dict = {id(module.__dict__.get("_parameters")): path for path, module in model.named_modules()}
    handle = nn.modules.module.register_module_forward_hook(hook, with_kwargs=True)
    try:
        yield recorded
    finally:
        handle.remove()
        # torch forgets this entry, and torch.compile then warns of a hook on all modules.
        nn.modules.module._global_forward_hooks_with_kwargs.pop(handle.id, None)


def _signature(calls: list[tuple[Any, Any, Any]]) -> Signature:
    unary = all(
        len(args) == 1 and isinstance(args[0], Tensor) and not kwargs and isinstance(output, Tensor)
        for args, kwargs, output in calls
    )
    args, kwargs, _ = calls[0]
    blank = pytree.tree_map_only(
        Tensor, lambda t: torch.zeros(tuple(int(n) for n in t.shape), dtype=t.dtype), (args, kwargs)
    )
    return Signature(unary, len(calls), *blank)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}".rstrip(": ")


def live_calls(calls: Sequence[Node]) -> list[Node]:
    """The calls, in order, without those that only compute something that nobody reads."""
    dead: set[Node] = set()
    for node in reversed(calls):
        schema = getattr(node.target, "_schema", None)
        if (schema is None or not schema.is_mutable) and all(user in dead for user in node.users):
            dead.add(node)
    return [node for node in calls if node not in dead]


def nodes_of(value: Any) -> list[Node]:
    """All graph nodes inside an argument, in order."""
    found: list[Node] = []
    map_arg(value, lambda node: found.append(node) or node)  # type: ignore[func-returns-value]
    return found
