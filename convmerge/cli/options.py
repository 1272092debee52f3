"""The options that commands share, as dataclasses, and the decorator that spreads them into a command."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from typer import Option

from convmerge.cli.terminal import Format, Terminal
from convmerge.errors import ConvmergeError

if TYPE_CHECKING:
    from torch import nn

    from convmerge.inputs import Inputs
    from convmerge.io import ModelFile


class Objective(str, Enum):
    """What a merge has to reduce."""

    latency = "latency"
    macs = "macs"
    params = "params"


class Formats(str, Enum):
    """How results are printed."""

    table = "table"
    json = "json"
    markdown = "markdown"
    html = "html"


@dataclass(frozen=True)
class Source:
    """How models are loaded and run."""

    input: Annotated[
        list[str] | None,
        Option(
            metavar="SPEC",
            help="An input of the model, in order: 1,3,224,224 or 1,16:int64 or name=1,3,64,64 or "
            "name=@FILE.pt (.npy, .npz). Repeatable. Guessed from the first layer if left out.",
        ),
    ] = None
    inputs: Annotated[
        Path | None,
        Option(metavar="FILE", help="All inputs: a saved tuple, list or dict of tensors."),
    ] = None
    bind: Annotated[
        list[str] | None,
        Option(
            metavar="NAME=VALUE",
            help="Fix an input: NAME=FILE.pt (.npy, .npz), NAME=0.5,-1,2, NAME=[[1,2],[3,4]] or NAME=true. "
            "What depends on it alone is computed once, and the model written does not take it. Repeatable.",
        ),
    ] = None
    allow: Annotated[
        list[str] | None,
        Option(
            metavar="PKG.MOD[.NAME]",
            help="Also load the module classes defined in PKG.MOD, or just the one. Repeatable.",
        ),
    ] = None
    trust: Annotated[
        bool, Option("--trust", help="Load the file without limits. It can run any code: know its source.")
    ] = False
    model: Annotated[
        str | None,
        Option(metavar="PKG.MOD:FUNC", help="What builds the model, for files with weights alone."),
    ] = None
    model_args: Annotated[
        str | None, Option(metavar="JSON", help="Keyword arguments of that function, as a JSON object.")
    ] = None
    seed: Annotated[int, Option(min=0, max=2**63 - 1, metavar="N", help="Seed of random inputs.")] = 0

    def __post_init__(self) -> None:
        if self.model_args is not None and self.model is None:
            raise ConvmergeError(
                "--model-args without --model", "add --model PKG.MOD:FUNC, what they are for"
            )

    def open(self, path: Path) -> ModelFile:
        """Load a model file. Raises ConvmergeError."""
        from convmerge.io import open_model, peek

        contents = peek(path) if self.model and path.is_file() else None
        weights_alone = contents is None or contents.holds in ("state_dict", "other")
        return open_model(
            path,
            trust=self.trust,
            allow=tuple(self.allow or ()),
            factory=self.model if weights_alone else None,
            factory_args=self.model_args,
            inputs=self._asked_for,
        )

    def bound(self) -> dict[str, Any]:
        """Bound inputs by name. Raises ConvmergeError."""
        from convmerge.inputs import parse_bindings

        return parse_bindings(self.bind or ())

    def example_inputs(self, opened: ModelFile) -> Inputs:
        """The inputs asked for, those the file holds, or guessed. Raises ConvmergeError."""
        if opened.inputs is not None and not self.input and not self.inputs:
            return opened.inputs
        return self._asked_for(opened.module)

    def _asked_for(self, model: nn.Module) -> Inputs:
        from convmerge.inputs import infer_bound, parse_inputs

        bound = self.bound()
        if bound and not self.input and not self.inputs:
            return infer_bound(model, bound, self.seed)
        return parse_inputs(self.input or (), self.inputs, self.seed, model, bound)


@dataclass(frozen=True)
class Choice:
    """Which sites are merged."""

    only: Annotated[
        list[str] | None, Option(metavar="GLOB", help="Merge only sites whose place matches. Repeatable.")
    ] = None
    skip: Annotated[
        list[str] | None, Option(metavar="GLOB", help="Leave sites whose place matches. Repeatable.")
    ] = None
    objective: Annotated[Objective, Option(help="What a merge has to reduce.")] = Objective.latency
    measure: Annotated[
        bool, Option("--measure", help="Time the alternatives on this machine instead of predicting them.")
    ] = False

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the Python API."""
        return {
            "only": tuple(self.only or ()),
            "skip": tuple(self.skip or ()),
            "objective": self.objective.value,
            "measure": self.measure,
        }


@dataclass(frozen=True)
class Head:
    """What becomes of the layers after a map was flattened or pooled."""

    fully_conv: Annotated[
        bool,
        Option(
            "--fully-conv",
            help="Make convolutions of linear layers, so that larger inputs give a map of outputs, one for "
            "every window of the size of --input.",
        ),
    ] = False
    average: Annotated[
        bool, Option("--average", help="With --fully-conv: one output, the mean over the windows.")
    ] = False

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the Python API."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Output:
    """What is written."""

    output: Annotated[
        Path | None,
        Option("--output", "-o", metavar="OUT", help="The file to write: .pt, .pth, .pt2 or .onnx."),
    ] = None
    dry_run: Annotated[bool, Option("--dry-run", "-n", help="Write nothing.")] = False
    force: Annotated[bool, Option("--force", help="Let OUT be MODEL itself.")] = False
    dynamic: Annotated[
        str | None,
        Option(
            metavar="SIZES",
            help="Which sizes of the inputs stay open in a .pt2 or .onnx file: names between commas (batch, "
            "length, depth, height, width, or INPUT:DIM), none, or auto: all on which the model does not "
            "depend. [default: auto]",
        ),
    ] = None

    def check(self, model: Path) -> None:
        """Raise ConvmergeError where it cannot be written, before any work is done."""
        from convmerge.export import Dynamic
        from convmerge.io import check_target, is_graph_file

        if self.output is None and not self.dry_run:
            raise ConvmergeError("fuse needs to know what to write", "add -o OUT, or -n to write nothing")
        if self.output:
            check_target(self.output, source=model, force=self.force)
        if self.dynamic is not None:
            if self.output is None or not is_graph_file(self.output):
                raise ConvmergeError("--dynamic is for .pt2 and .onnx files", "add -o OUT.pt2 or -o OUT.onnx")
            Dynamic.parse(self.dynamic)

    def target(self) -> Path | None:
        """The file to write, if any."""
        return None if self.dry_run else self.output

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the Python API."""
        return {"force": self.force, "dynamic": self.dynamic or "auto"}


@dataclass(frozen=True)
class Printing:
    """What is printed."""

    format: Annotated[
        Formats | None, Option(help="How to print it; all but tables are one document, for errors too.")
    ] = None
    json: Annotated[bool, Option("--json", help="Short for --format json.")] = False
    quiet: Annotated[
        bool, Option("--quiet", "-q", help="Print errors only, and the document asked for by --format.")
    ] = False
    verbose: Annotated[
        bool, Option("--verbose", "-v", help="Every site, times, and tracebacks of errors.")
    ] = False

    def __post_init__(self) -> None:
        if self.json and self.format:
            raise ConvmergeError("--json and --format both say how to print", "leave one of them out")

    def terminal(self) -> Terminal:
        """What prints that way."""
        chosen: Format = "json" if self.json else self.format.value if self.format else "table"
        return Terminal(quiet=self.quiet, verbose=self.verbose, format=chosen)

    @staticmethod
    def before_parsing(arguments: Sequence[str]) -> Terminal:
        """What prints the errors of a command line that may be wrong."""
        chosen: Format = "json" if "--json" in arguments else "table"
        for word, following in zip(arguments, [*arguments, ""][1:], strict=True):
            value = following if word == "--format" else word.removeprefix("--format=")
            if chosen == "table" and value in Formats.__members__ and value != word:
                chosen = Formats(value).value
        return Terminal(verbose=not {"-v", "--verbose"}.isdisjoint(arguments), format=chosen)


def spread(command: Callable[..., int]) -> Callable[..., int]:
    """Replace every parameter of ``command`` whose type is a dataclass by the fields of that dataclass."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    parameters = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name not in groups:
            parameters.append(parameter.replace(annotation=hints[name], kind=parameter.KEYWORD_ONLY))
            continue
        field_hints = get_type_hints(groups[name], include_extras=True)
        for field in dataclasses.fields(groups[name]):
            parameters.append(
                inspect.Parameter(
                    field.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=field.default,
                    annotation=field_hints[field.name],
                )
            )

    @functools.wraps(command)
    def spread_command(**values: Any) -> int:
        for name, group in groups.items():
            values[name] = group(**{f.name: values.pop(f.name) for f in dataclasses.fields(group)})
        return command(**values)

    spread_command.__signature__ = inspect.Signature(parameters, return_annotation=int)  # type: ignore[attr-defined]
    spread_command.__annotations__ = {p.name: p.annotation for p in parameters}
    return spread_command


def typed(*groups: Source | Choice | Head) -> list[str]:
    """The options that differ from their defaults, as words of a command line."""
    words = []
    for group in groups:
        for field in dataclasses.fields(group):
            value = getattr(group, field.name)
            if value in (field.default, [], ()):
                continue
            flag = "--" + field.name.replace("_", "-")
            if value is True:
                words.append(flag)
                continue
            for item in value if isinstance(value, (list, tuple)) else [value]:
                words += [flag, item.value if isinstance(item, Enum) else str(item)]
    return words
