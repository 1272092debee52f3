"""What a torch.save file holds, told from its pickle without running it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from convmerge.errors import LoadError
from convmerge.io.pickles import Global, Node, Pickle, Value, printable

Holds = Literal["module", "graph_module", "state_dict", "checkpoint", "other"]

# Keys under which checkpoints keep the model, the preferred first: where there is an averaged copy ("ema"),
# it is the one such checkpoints are evaluated with.
MODEL_KEYS = ("ema", "model_ema", "model", "net", "network", "module", "state_dict", "generator", "netG")

_MAX_TENSORS = 1_000_000
_MAX_PATH = 10_000  # characters
_WRAPPERS = {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"}
_TYPED = "torch._tensor._rebuild_from_type_v2"  # (function, class, its arguments, attributes)
_REBUILD = {
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
}


@dataclass(frozen=True)
class TensorInfo:
    """Name, shape and dtype of a tensor in the file; dtype as in ``float32``."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Contents:
    """What the file says it holds; nothing here has been checked against the bytes of the tensors.

    Attributes:
        holds: a whole module, a GraphModule, a state_dict, a dict around modules, or something else.
        title: the same in words, e.g. ``a module of class torchvision.models.resnet.ResNet``.
        modules: path → class of every module, e.g. ``layer1.0.conv1`` → ``torch.nn.modules.conv.Conv2d``; the
            root has the empty path, in a checkpoint every path begins with its key.
        tensors: of the modules or the state_dict, in file order.
        needs: every class and function the file names, in order of first use.
    """

    holds: Holds
    title: str
    modules: dict[str, str]
    tensors: tuple[TensorInfo, ...]
    needs: tuple[str, ...]


def summarise(pickle: Pickle) -> Contents:
    """Describe an inertly read pickle.

    Raises:
        LoadError: it describes more tensors, or deeper nested modules, than any model has.
    """
    root = pickle.root
    modules: dict[str, str] = {}
    tensors: list[TensorInfo] = []
    for path, node in walk_modules(root):
        modules[path] = class_of(node)
        tensors += _tensors_of(path, node)
        if len(tensors) > _MAX_TENSORS or len(path) > _MAX_PATH:
            raise LoadError("the file describes more modules than any model has", "it is damaged or hostile")
    key, state = ("", root) if modules else _state_dict(root)
    if not modules:
        tensors = list(_named_tensors("", state))
    holds, title = _classify(root, key, bool(tensors))
    return Contents(holds, title, modules, tuple(tensors), tuple(str(name) for name in pickle.globals))


def _state_dict(root: Value) -> tuple[str, Value]:
    """The first dict of tensors: the root itself, or an entry of it with its key."""
    if not any(True for _ in _named_tensors("", root)):
        for key, value in _entries(root).items():
            if any(True for _ in _named_tensors("", value)):
                return printable(key), value
    return "", root


def _classify(root: Value, key: str, tensors: bool) -> tuple[Holds, str]:
    if is_graph_module(root):
        return "graph_module", "a traced module (torch.fx.GraphModule)"
    if is_module(root):
        return "module", f"a module of class {class_of(root)}"
    keys = [key for key, value in _entries(root).items() if is_module(value)]
    if keys:
        kept = ", ".join(f"'{printable(key)}': {class_of(_entries(root)[key])}" for key in keys)
        return "checkpoint", f"a checkpoint dict with a module under {kept}"
    if tensors:
        where = f" under '{key}'" if key else ""
        return "state_dict", f"a state_dict{where} (tensors without the model's code)"
    return "other", f"a {'tensor' if tensor_info('', root) else class_of(root)} and no model"


def is_graph_module(node: Value) -> bool:
    """Whether the value is a pickled GraphModule: a call of one of torch.fx's functions that run its code."""
    return isinstance(node, Node) and node.kind == "call" and is_graph_maker(node.maker)


def is_graph_maker(maker: Value) -> bool:
    """Whether the function rebuilds a GraphModule from source code."""
    return isinstance(maker, Global) and maker.module == "torch.fx.graph_module" and "reduce" in maker.name


def is_module(node: Value) -> bool:
    """Whether the value is an instance of an nn.Module class, judged by the attributes every one has."""
    if is_graph_module(node):
        return True
    return (
        isinstance(node, Node)
        and node.kind == "object"
        and {"_modules", "_parameters"} <= _attributes(node).keys()
    )


def class_of(node: Value) -> str:
    """Dotted name of the class or function an object comes from, or of the Python type of a plain value."""
    if isinstance(node, Node):
        return str(node.maker) if isinstance(node.maker, Global) else node.kind
    return type(node).__name__


def _attributes(node: Node) -> dict[str, Value]:
    """The ``__dict__`` of an object, of a GraphModule the one its rebuilding function is given."""
    if node.kind == "call" and is_graph_module(node):
        first = node.args[0] if node.args else None
        return first.mapping() if isinstance(first, Node) else {}
    return node.attributes()


def _entries(node: Value) -> dict[str, Value]:
    """Entries of a dict or of a dict-like object."""
    return node.mapping() if isinstance(node, Node) and node.kind in ("dict", "object", "call") else {}


def walk_modules(root: Value) -> Iterator[tuple[str, Node]]:
    """Every module below ``root`` with its path, each once, parents first; also those in a dict."""
    seen: set[int] = set()
    todo: list[tuple[str, Value]] = [("", root)]
    if not is_module(root):
        todo = [(printable(key), value) for key, value in reversed(_entries(root).items())]
    while todo:
        path, node = todo.pop()
        if id(node) in seen or not is_module(node):
            continue
        seen.add(id(node))
        yield path, node
        children = _entries(_attributes(node).get("_modules"))
        todo += [(_join(path, name), child) for name, child in reversed(children.items())]


def _tensors_of(path: str, module: Node) -> Iterator[TensorInfo]:
    for attribute in ("_parameters", "_buffers"):
        yield from _named_tensors(path, _attributes(module).get(attribute))


def _named_tensors(path: str, mapping: Value) -> Iterator[TensorInfo]:
    for name, value in _entries(mapping).items():
        found = tensor_info(_join(path, name), value)
        if found is not None:
            yield found


def tensor_info(name: str, node: Value) -> TensorInfo | None:
    """Shape and dtype of a pickled tensor or parameter, None if the value is something else."""
    for _ in range(4):  # parameter around typed tensor around tensor
        if not isinstance(node, Node) or node.kind != "call" or not node.args:
            return None
        maker = node.maker.path if isinstance(node.maker, Global) else ""
        if maker in _REBUILD and len(node.args) >= 3:
            return TensorInfo(name, _ints(node.args[2]), _dtype(node.args[0]))
        if maker in _WRAPPERS:
            node = node.args[0]
        elif maker == _TYPED and len(node.args) >= 3 and isinstance(node.args[2], Node):
            node = Node("call", maker=node.args[0], args=tuple(node.args[2].items))
        else:
            return None
    return None


def _ints(node: Value) -> tuple[int, ...]:
    items = node.items if isinstance(node, Node) else []
    return tuple(item for item in items if isinstance(item, int))


def _dtype(storage: Value) -> str:
    kind = storage.args[1] if isinstance(storage, Node) and len(storage.args) > 1 else None
    name = kind.name.removesuffix("Storage") if isinstance(kind, Global) else "?"
    return _DTYPES.get(name, name.lower())


_DTYPES = {
    "Double": "float64",
    "Float": "float32",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
}


def _join(path: str, name: str) -> str:
    return f"{path}.{printable(name)}" if path else printable(name)
