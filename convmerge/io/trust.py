"""Which files may be unpickled.

A pickled module names the classes it is made of, and unpickling instantiates them. Three degrees of trust:

- **default**: the module classes of ``torch.nn`` and what they need; nothing else is even imported.
- ``allow=["pkg.mod", "pkg.mod.Name"]``: also the nn.Module subclasses *defined in* ``pkg.mod``, or the one
  class or function ``Name`` defined there. ``pkg.mod`` is imported, so its top-level code runs.
- ``trust=True``: the file may run any code.

The first two load with ``torch.load(weights_only=True)``, after an inert reading of the pickle has shown that
module classes are only instantiated and given a state, as torch.save writes them, never called.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from convmerge.errors import LoadError
from convmerge.io.allowed import Allowed
from convmerge.io.contents import is_graph_maker, is_module
from convmerge.io.pickles import Global, Node, Pickle, Value, printable

SafeGlobals = list[Callable[..., Any] | tuple[Callable[..., Any], str]]

_TRUST = "pass --trust if you made this file"

# What torch.load(weights_only=True) calls by itself while it rebuilds tensors and containers.
_CALLED = frozenset(
    (
        *("collections.OrderedDict", "collections.Counter", "torch.Size", "torch.device", "_codecs.encode"),
        *("builtins.set", "builtins.complex", "builtins.bytearray", "torch.serialization._get_layout"),
        *("torch.nn.parameter.Parameter",),
    )
)
_TYPED_REBUILD = "torch._tensor._rebuild_from_type_v2"

_LIBRARIES = sys.stdlib_module_names | {"torch", "numpy"}
_RUN_CODE = (
    *("os.", "posix.", "nt.", "sys.", "subprocess.", "shutil.", "socket.", "ctypes.", "importlib.", "runpy."),
    *("builtins.eval", "builtins.exec", "builtins.compile", "builtins.open", "builtins.getattr"),
    *("builtins.__import__", "builtins.setattr", "operator."),
)
# (how a name that is not allowed begins, what that says of the file, the way out), the most telling first.
_TELLING = (
    (
        ("torch.nn.parameter.Uninitialized",),
        "holds a lazy module whose parameters have no shape yet",
        "run the model once before saving it",
    ),
    (
        ("torch._dynamo.",),
        "holds a torch.compile wrapper",
        f"save the model inside it (compiled._orig_mod), or {_TRUST}",
    ),
    (
        ("torch.ao.nn.", "torch.nn.quantized.", "torch.nn.intrinsic."),
        "holds a quantised model",
        "fuse the floating-point model, then quantise the result",
    ),
    (_RUN_CODE, "asks for what can run any code", _TRUST),
    (
        ("__main__.",),
        "needs a class of the script that saved it",
        "move the class into a .py file of its own, import it from there and save the model again",
    ),
    (
        ("torch.nn.modules.",),
        "needs a class this version of torch does not have",
        "load it with the torch version it was saved with, and save its state_dict",
    ),
)


def resolve(pickle: Pickle, unknown: Iterable[str], allow: Sequence[str]) -> SafeGlobals:
    """The classes and functions to pass to ``torch.serialization.safe_globals`` for this file.

    Args:
        unknown: the names in the file that torch.load does not accept by itself.

    Raises:
        LoadError: a name is not allowed, or is used as torch.save never does.
    """
    allowed = Allowed(allow)
    if any(is_graph_maker(name) for name in pickle.globals):
        raise LoadError("the file holds a traced module (torch.fx.GraphModule), whose code would run", _TRUST)
    refused = set(unknown)
    found: dict[str, Any] = {}
    missing: list[Global] = []
    for name in pickle.globals:
        if name.path in refused:
            found[name.path] = allowed.find(name)
            if found[name.path] is None:
                missing.append(name)
    if missing:
        raise _missing(pickle, missing)
    _check_use(pickle, found)
    return [(value, path) for path, value in found.items()]


def _check_use(pickle: Pickle, found: dict[str, Any]) -> None:
    """Refuse what an attacker needs and torch.save never writes."""
    for call in pickle.calls:
        _check_call(call, found)
    for node in (*pickle.objects, *pickle.calls):
        for key in node.attributes():
            if key.startswith("__") and key.endswith("__"):
                raise _suspicious(f"replaces the special method {printable(key)} of a {_name(node.maker)}")


def _check_call(call: Node, found: dict[str, Any]) -> None:
    """Only what rebuilds tensors and plain containers is called, and functions the user allowed."""
    maker = call.maker
    if not isinstance(maker, Global):
        raise _suspicious("calls a value that is neither a class nor a function")
    if maker.path == _TYPED_REBUILD:  # calls its own first argument
        inner = call.args[0] if call.args else None
        if not isinstance(inner, Global) or not _rebuilds_tensor(inner):
            raise _suspicious(f"rebuilds a tensor by calling {_name(inner)}")
        return
    if maker.path in _CALLED or _rebuilds_tensor(maker):
        return
    value = found.get(maker.path)
    if value is None or (isinstance(value, type) and issubclass(value, nn.Module)):
        raise _suspicious(f"calls {maker} with arguments of its own instead of restoring it from a state")


def _rebuilds_tensor(name: Global) -> bool:
    return name.module == "torch._utils" and name.name.startswith("_rebuild_")


def _suspicious(what: str) -> LoadError:
    return LoadError(
        f"the file {what}, which torch.save never writes", "pass --trust only if you made this file"
    )


def _name(value: Value) -> str:
    return str(value) if isinstance(value, Global) else getattr(value, "kind", type(value).__name__)


def _could_do_anything(name: Global, called: set[Global]) -> bool:
    """Whether to name it in a hint would be bad advice: a function that is called, or one of a large library.

    Judged by the spelling, since nothing is imported to find out. ``functools.partial`` is data to models.
    """
    is_function = name.name.lstrip("_")[:1].islower() and name.path != "functools.partial"
    return is_function and (name in called or name.module.partition(".")[0] in _LIBRARIES)


def _missing(pickle: Pickle, missing: list[Global]) -> LoadError:
    """The error that names the classes and the flags that allow them."""
    for name in missing:
        # The hint is meant to be pasted into a shell.
        if not all(part.isidentifier() for part in name.path.split(".")):
            raise _suspicious(f"names the class {name}")
    for prefixes, what, hint in _TELLING:
        for name in missing:
            if name.path.startswith(prefixes):
                return LoadError(f"the file {what}: {name}", hint)
    called = {call.maker for call in pickle.calls if isinstance(call.maker, Global)}
    for name in missing:
        if _could_do_anything(name, called):
            return LoadError(
                f"the file asks for the function {name}, which could be made to run code", _TRUST
            )
    modules = {node.maker for node in pickle.objects if isinstance(node.maker, Global) and is_module(node)}
    flags = dict.fromkeys(f"--allow {name.module if name in modules else name}" for name in missing)
    classes = f"class {missing[0]}" if len(missing) == 1 else f"classes {_first_few(missing)}"
    return LoadError(
        f"the file needs the {classes}", f"pass {' '.join(flags)}, or --trust if you made this file"
    )


def _first_few(names: list[Global]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(str(name) for name in names[:3]) + more
