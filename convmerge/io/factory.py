"""``--model pkg.mod:callable``: the code that builds the architecture a file of tensors belongs to."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from torch import nn

from convmerge.errors import ConvmergeError, LoadError
from convmerge.io.allowed import import_named
from convmerge.io.pickles import printable

Factory = Callable[[], nn.Module]

_ARGS = """as in --model-args '{"num_classes": 10}'"""


def make_factory(spec: str, arguments: dict[str, Any] | str | None) -> Factory:
    """The callable ``pkg.mod:name`` with its keyword arguments (a dict or JSON) bound; imports the module.

    Raises:
        ConvmergeError: no such callable, or arguments that are no JSON object. Calling the result raises it
        too,
            where the callable fails or gives no module.
    """
    module_name, colon, name = spec.partition(":")
    parts = (*module_name.split("."), *name.split("."))
    if not colon or not all(part.isidentifier() for part in parts):
        raise ConvmergeError(
            f"--model {printable(spec)}: not of the form pkg.mod:callable",
            "as in --model torchvision.models:resnet18",
        )
    build: Any = import_named(module_name)
    if build is None:
        raise LoadError(
            f"--model {spec}: there is no module {module_name}",
            "run where it is installed, or in the directory of its .py file",
        )
    for part in name.split("."):
        build = getattr(build, part, None)
    if not callable(build):
        raise LoadError(
            f"--model {spec}: {module_name} has no callable {name}", "check the name after the colon"
        )
    kwargs = _keyword_arguments(arguments)
    return lambda: _build(spec, build, kwargs)


def _build(spec: str, build: Callable[..., Any], kwargs: dict[str, Any]) -> nn.Module:
    try:
        model = build(**kwargs)
    except Exception as error:
        reason = printable(f"{type(error).__name__}: {error}")
        raise LoadError(f"--model {spec} fails: {reason}", f"give its arguments {_ARGS}") from error
    if not isinstance(model, nn.Module):
        raise LoadError(f"--model {spec} gave a {type(model).__name__}, not a module", "name a model's class")
    return model


def _keyword_arguments(arguments: dict[str, Any] | str | None) -> dict[str, Any]:
    if not isinstance(arguments, str):
        return dict(arguments or {})
    try:
        value = json.loads(arguments)
    except ValueError as error:
        raise ConvmergeError(f"--model-args is no JSON: {error}", _ARGS) from None
    if not isinstance(value, dict):
        raise ConvmergeError("--model-args is no JSON object", _ARGS)
    return value
