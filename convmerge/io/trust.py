"""Which classes a file may use.

A pickled module names the classes it is made of, and unpickling instantiates them. Three degrees of trust:

- **default**: the module classes of ``torch.nn`` and what they need; nothing else is even imported.
- ``allow=["pkg.mod", "pkg.mod.Name"]``: also the nn.Module subclasses *defined in* ``pkg.mod``, or the one class or
  function ``Name`` defined there. ``pkg.mod`` is imported, so its top-level code runs.
- ``trust=True``: the file may run any code.

The first two load with ``torch.load(weights_only=True)``, after an inert reading of the pickle has shown that module
classes are only ever instantiated from a state, as torch.save writes them, and never called with arguments.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from convmerge.errors import LoadError
from convmerge.io.contents import is_graph_maker, is_module
from convmerge.io.pickles import Global, Node, Pickle, Value, printable

# What the hooks of torch.nn.utils leave inside modules: objects that recompute a weight, without code of their own.
_HELPERS = {
    "torch.nn.utils.weight_norm": ("WeightNorm",),
    "torch.nn.utils.spectral_norm": (
        "SpectralNorm",
        "SpectralNormLoadStateDictPreHook",
        "SpectralNormStateDictHook",
    ),
    "torch.nn.utils.prune": (
        "CustomFromMask",
        "Identity",
        "L1Unstructured",
        "LnStructured",
        "PruningContainer",
        "RandomStructured",
        "RandomUnstructured",
    ),
    "torch.nn.parallel.data_parallel": ("DataParallel",),
}
# Pure functions of tensors that torch.nn layers keep as attributes (TransformerEncoderLayer.activation).
_FUNCTIONS = {
    "torch.nn.functional": ("relu", "relu6", "silu", "mish", "elu", "selu", "celu", "leaky_relu", "tanh", "sigmoid",
                            "hardswish", "hardsigmoid", "softmax", "log_softmax", "gelu", "logsigmoid", "softplus"),
    "torch._C._nn": ("gelu", "softplus", "log_sigmoid"),
}  # fmt: skip
# What torch.load(weights_only=True) calls by itself while it rebuilds tensors and containers.
_CALLED = frozenset(
    (
        *(
            "collections.OrderedDict",
            "collections.Counter",
            "builtins.set",
            "builtins.complex",
            "builtins.bytearray",
        ),
        *("_codecs.encode", "torch.Size", "torch.device", "torch.serialization._get_layout"),
        *("torch.nn.parameter.Parameter", "torch._tensor._rebuild_from_type_v2"),
    )
)
# Modules whose functions reach the system or run code; nobody's model is made of them.
_DANGEROUS = frozenset(
    ["os", "posix", "nt", "sys", "subprocess", "shutil", "socket", "ctypes", "importlib", "runpy", "pty", "builtins", "operator"]
)


def resolve(pickle: Pickle, unknown: Iterable[str], allow: Sequence[str]) -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """The classes behind the names torch.load does not accept by itself, for ``torch.serialization.safe_globals``.

    Raises:
        LoadError: a name is not covered by the default or by ``allow``, or is used as torch.save never does.
    """
    _check_graph_modules(pickle)
    allowed = _Allowed(allow)
    by_name = {f"{name.module}.{name.name}": name for name in pickle.globals}
    found = {name: allowed.find(by_name[name]) for name in unknown if name in by_name}
    missing = [by_name[name] for name in by_name if name in found and found[name] is None]
    if missing:
        raise _missing(pickle, missing)
    _check_use(pickle, found)
    return [(value, name) for name, value in found.items()]


class _Allowed:
    """Looks names up among the classes that may be used."""

    def __init__(self, allow: Sequence[str]) -> None:
        self.modules: set[str] = set()
        self.names: set[Global] = set()
        for spec in allow:
            self._add(spec)

    def _add(self, spec: str) -> None:
        if not all(part.isidentifier() for part in spec.split(".")):
            raise LoadError(
                f"--allow {printable(spec)}: not a module or class name", "as in --allow pkg.mod[.Name]"
            )
        if import_named(spec) is not None:
            self.modules.add(spec)
            return
        module, _, name = spec.rpartition(".")
        if not module or import_named(module) is None:
            raise LoadError(
                f"--allow {spec}: no module of this name can be imported",
                "run where it is installed, or in the directory of its .py file",
            )
        if _defined(Global(module, name)) is None:
            raise LoadError(f"--allow {spec}: module {module} defines no class or function {name}")
        self.names.add(Global(module, name))

    def find(self, name: Global) -> Any:
        """The object of this name, None if it may not be used."""
        if name in self.names:
            return _defined(name)
        if name.name in (*_HELPERS.get(name.module, ()), *_FUNCTIONS.get(name.module, ())):
            importlib.import_module(name.module)
            return vars(sys.modules[name.module]).get(name.name)
        if name.module in self.modules or name.module.startswith("torch.nn.modules."):
            value = _defined(name)
            return value if isinstance(value, type) and issubclass(value, nn.Module) else None
        return None


def _defined(name: Global) -> Any:
    """The class or function *defined in* the module, which is imported already; None if there is none.

    Looked up without attribute traversal: ``torchvision.models.resnet.torch.load`` would be reachable that way.
    """
    module = sys.modules.get(name.module)
    value = vars(module).get(name.name) if module is not None else None
    is_code = isinstance(value, type) or callable(value)
    return value if is_code and getattr(value, "__module__", None) == name.module else None


def import_named(name: str) -> ModuleType | None:
    """Import a module the user named; None if there is no such module.

    Raises:
        LoadError: the module is there but fails while it is imported.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            return None
        raise LoadError(f"importing {name} fails: {error}", f"install {error.name}") from error
    except Exception as error:
        reason = printable(f"{type(error).__name__}: {error}")
        raise LoadError(f"importing {name} fails: {reason}", f"make `import {name}` work first") from error


@contextmanager
def importable(*directories: Path) -> Iterator[None]:
    """Let modules lying in ``directories`` be imported; used only where the user trusts or names them.

    They come last, so that a file lying beside a model never takes the place of an installed package.
    """
    added = [str(directory) for directory in directories if str(directory) not in sys.path]
    sys.path.extend(added)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        for directory in added:
            if directory in sys.path:
                sys.path.remove(directory)


def _check_graph_modules(pickle: Pickle) -> None:
    if any(is_graph_maker(name) for name in pickle.globals):
        raise LoadError(
            "the file holds a traced module (torch.fx.GraphModule); loading one runs code from the file",
            "pass --trust if you made this file",
        )


def _check_use(pickle: Pickle, found: dict[str, Any]) -> None:
    """Refuse what an attacker needs and torch.save never writes."""
    for call in pickle.calls:
        _check_call(call, found)
    for node in (*pickle.objects, *pickle.calls):
        if not isinstance(node.maker, Global):
            raise _suspicious("creates something from a value that is no class")
        for key in node.attributes():
            if key.startswith("__") and key.endswith("__"):
                raise _suspicious(f"replaces the special method {printable(key)} of a {node.maker}")


def _check_call(call: Node, found: dict[str, Any]) -> None:
    maker = call.maker
    name = str(maker)
    if name == "torch._tensor._rebuild_from_type_v2":  # calls its own first argument
        inner = call.args[0] if call.args else None
        if not isinstance(inner, Global) or not _rebuilds_tensor(inner):
            raise _suspicious(f"rebuilds a tensor by calling {_name(inner)}")
        return
    if name in _CALLED or (isinstance(maker, Global) and _rebuilds_tensor(maker)):
        return
    value = found.get(name)
    if isinstance(value, type) and issubclass(value, Enum) and len(call.args) == 1:
        return
    if value is None or isinstance(value, type):
        raise _suspicious(f"calls {name} with arguments of its own instead of restoring it from a state")


def _rebuilds_tensor(name: Global) -> bool:
    return name.module == "torch._utils" and name.name.startswith("_rebuild_")


def _suspicious(what: str) -> LoadError:
    return LoadError(
        f"the file {what}, which torch.save never writes", "pass --trust only if you made this file"
    )


def _name(value: Value) -> str:
    return str(value) if isinstance(value, Global) else getattr(value, "kind", type(value).__name__)


def _missing(pickle: Pickle, missing: list[Global]) -> LoadError:
    """The error that names the classes and the flags that allow them."""
    bad = [name for name in missing if name.module.partition(".")[0] in _DANGEROUS]
    if bad:
        return LoadError(
            f"the file asks for {bad[0]}, which no model needs: it may be hostile",
            "do not load this file unless you made it yourself (then pass --trust)",
        )
    modules = {node.maker for node in pickle.objects if is_module(node)}
    flags = dict.fromkeys(f"--allow {name.module if name in modules else name}" for name in missing)
    shown = ", ".join(str(name) for name in missing[:3])
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    plural = "es" if len(missing) > 1 else ""
    return LoadError(
        f"the file needs the class{plural} {shown}{more}",
        f"pass {' '.join(flags)}, or --trust if you made this file",
    )
