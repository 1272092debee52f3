"""Files that hold tensors only: state_dicts and safetensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from convmerge.errors import LoadError
from convmerge.io.pickles import printable

State = dict[str, Any]

# Where checkpoints keep their state_dict, the preferred first: averaged weights before live ones.
_KEYS = (
    *("params_ema", "ema_state_dict", "state_dict_ema", "model_ema", "ema"),
    *("state_dict", "model_state_dict", "model_state", "model", "params", "net", "network", "generator"),
    *("module", "weights"),
)
# What DataParallel, torch.compile and Lightning put before every key.
_PREFIXES = ("module.", "_orig_mod.", "model.")
_CHECK = "check --model and --model-args against the model the file was saved from"


def state_dict_in(document: Any, name: str) -> tuple[State, tuple[str, ...]]:
    """The state_dict a file holds, and a note on where it lay.

    Raises:
        LoadError: there is none, or there is a whole module.
    """
    if _is_state(document):
        return dict(document), ()
    values = document.values() if isinstance(document, Mapping) else [document]
    if any(isinstance(value, nn.Module) for value in values):
        raise LoadError(f"{name} holds a whole module, which needs no --model", "leave --model out")
    if isinstance(document, Mapping):
        for key in _KEYS:
            if _is_state(document.get(key)):
                return dict(document[key]), (f"took the weights under '{key}'",)
    raise LoadError(f"{name} holds no model and no state_dict", "save the model: torch.save(model, path)")


def _is_state(value: Any) -> bool:
    """Whether the value maps names to tensors; extra state of other types may lie between them."""
    return (
        isinstance(value, Mapping)
        and all(isinstance(key, str) for key in value)
        and any(isinstance(item, Tensor) for item in value.values())
        and not any(isinstance(item, (nn.Module, Mapping)) for item in value.values())
    )


def load_state(build: Callable[[], nn.Module], state: State, name: str) -> tuple[nn.Module, tuple[str, ...]]:
    """Build the model and load the state strictly; also returns notes on what was changed to make it fit.

    The model takes the floating-point dtype of the file if there is only one.

    Raises:
        LoadError: building fails, or keys or shapes differ; the first of each is named.
    """
    model = build()
    expected = model.state_dict()
    notes: tuple[str, ...] = ()
    for prefix in _PREFIXES:
        if not state.keys() & expected.keys() and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
            notes += (f"took '{prefix}' off every key",)
    _check_keys(expected.keys(), state.keys(), name)
    _check_shapes(expected, state, name)
    dtypes = {
        value.dtype for value in state.values() if isinstance(value, Tensor) and value.is_floating_point()
    }
    if len(dtypes) == 1:
        model.to(dtypes.pop())
    try:
        model.load_state_dict(state, strict=True)
    except Exception as error:
        reason = printable(" ".join(str(error).split()))
        raise LoadError(f"{name} does not load into {type(model).__name__}: {reason}", _CHECK) from error
    return model, notes


def _check_keys(expected: Collection[str], given: Collection[str], name: str) -> None:
    missing = [key for key in expected if key not in given]
    extra = [key for key in given if key not in expected]
    parts = [
        f"{len(keys)} {what} (first: {printable(keys[0])})"
        for what, keys in (("missing", missing), ("unexpected", extra))
        if keys
    ]
    if parts:
        raise LoadError(f"the keys in {name} do not fit the model: {', '.join(parts)}", _CHECK)


def _check_shapes(expected: Mapping[str, Any], given: State, name: str) -> None:
    for key, value in given.items():
        want = expected[key]
        if isinstance(want, Tensor) and isinstance(value, Tensor) and want.shape != value.shape:
            shapes = f"{tuple(value.shape)} in the file, {tuple(want.shape)} in the model"
            raise LoadError(f"{name} does not fit the model: {printable(key)} is {shapes}", _CHECK)


def read_safetensors(path: Path) -> State:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        LoadError: the file is damaged, or the safetensors package is not installed.
    """
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise LoadError(
            f"{path} is a safetensors file, and the safetensors package is not installed",
            "pip install safetensors",
        ) from None
    try:
        return dict(load_file(str(path), device="cpu"))
    except Exception as error:
        reason = printable(str(error) or type(error).__name__)
        raise LoadError(f"{path} is damaged: {reason}", "download or copy it again") from None
