"""Files that hold tensors only: state_dicts and safetensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convmerge.errors import LoadError
from convmerge.io.pickles import printable

# Where checkpoints keep their state_dict, the preferred first (averaged weights before live ones).
_KEYS = ("params_ema", "ema_state_dict", "state_dict_ema", "model_ema", "ema", "state_dict", "model_state_dict",
         "model_state", "model", "params", "net", "network", "generator", "module", "weights")  # fmt: skip
# Names under which DataParallel, torch.compile and Lightning keep the model.
_PREFIXES = ("module.", "_orig_mod.", "model.")

State = dict[str, Tensor]


def state_dict_in(document: Any, name: str) -> tuple[State, tuple[str, ...]]:
    """The state_dict a file holds, and notes on where it lay.

    Raises:
        LoadError: there is none.
    """
    if isinstance(document, nn.Module):
        raise LoadError(f"{name} holds a whole module already", "leave --model out")
    if _is_state(document):
        return dict(document), ()
    if isinstance(document, Mapping):
        for key in _KEYS:
            if _is_state(document.get(key)):
                return dict(document[key]), (f"took the weights under '{key}'",)
    raise LoadError(f"{name} holds no model and no state_dict", "save the model: torch.save(model, path)")


def _is_state(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(k, str) for k in value)
        and any(isinstance(v, Tensor) for v in value.values())
        and not any(isinstance(v, nn.Module) for v in value.values())
    )


def load_state(build: Callable[[], nn.Module], state: State, name: str) -> tuple[nn.Module, tuple[str, ...]]:
    """Build the model and load the state strictly, in the dtype of the file.

    Raises:
        LoadError: keys or shapes differ; the first of each is named.
    """
    model = build()
    notes: tuple[str, ...] = ()
    expected = model.state_dict().keys()
    for prefix in _PREFIXES:
        if state and not state.keys() & expected and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
            notes = (*notes, f"took the prefix '{prefix}' off every key")
    _check_keys(expected, state.keys(), name)
    _check_shapes(model.state_dict(), state, name)
    _match_dtype(model, state)
    try:
        model.load_state_dict(state, strict=True)
    except Exception as error:
        reason = printable(str(error).partition("\n")[2].strip() or str(error))
        raise LoadError(f"{name} does not load into {type(model).__name__}: {reason}", _CHECK) from error
    return model, notes


_CHECK = "check --model and --model-args against the model the file was saved from"


def _check_keys(expected: Any, given: Any, name: str) -> None:
    missing, extra = list(expected - given), list(given - expected)
    parts = []
    if missing:
        first = next(key for key in expected if key in set(missing))
        parts.append(f"{len(missing)} missing (first: {first})")
    if extra:
        first = next(key for key in given if key in set(extra))
        parts.append(f"{len(extra)} unexpected (first: {printable(first)})")
    if parts:
        raise LoadError(f"the keys in {name} do not fit the model: {', '.join(parts)}", _CHECK)


def _check_shapes(expected: Mapping[str, Any], given: State, name: str) -> None:
    for key, value in given.items():
        want = expected[key]
        if isinstance(want, Tensor) and isinstance(value, Tensor) and want.shape != value.shape:
            shapes = f"{tuple(value.shape)} in the file, {tuple(want.shape)} in the model"
            raise LoadError(f"{name} does not fit the model: {key} is {shapes}", _CHECK)


def _match_dtype(model: nn.Module, state: State) -> None:
    """Give the model the file's floating dtype where there is exactly one, so that half stays half."""
    dtypes = {v.dtype for v in state.values() if isinstance(v, Tensor) and v.is_floating_point()}
    if len(dtypes) == 1:
        model.to(dtypes.pop())


def read_safetensors(path: Path) -> State:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        LoadError: the file is damaged, or the safetensors package is not installed.
    """
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise LoadError(
            f"{path} is a safetensors file and the safetensors package is not installed",
            "pip install safetensors",
        ) from None
    try:
        with torch.no_grad():
            return dict(load_file(str(path), device="cpu"))
    except Exception as error:
        raise LoadError(f"{path} is damaged: {printable(str(error))}", "download or copy it again") from None
