"""The commands: parse, call the Python API, print, exit code.

torch and rich are imported inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from convmerge import __version__
from convmerge.cli.clock import Clock
from convmerge.cli.options import Choice, Head, Output, Printing, Source, spread, typed
from convmerge.errors import ConvmergeError, LoadError

if TYPE_CHECKING:
    from torch import nn

    from convmerge.inputs import Inputs
    from convmerge.io import ModelFile
    from convmerge.render import Document
    from convmerge.report import Report

CLEAN, FINDING = 0, 1
REPORT_IT = "this is a bug in convmerge: please report it with the traceback that -v shows"

_SAVED = "A model saved by torch.save, torch.export or TorchScript."
_Model = Annotated[Path, typer.Argument(metavar="MODEL", help=_SAVED)]

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["--help", "-h"], "max_content_width": 100},
    help="Make a saved PyTorch model smaller and faster without changing the function it computes.",
    epilog="Exit codes: 0 clean; 1 merges are left, verification failed or models differ; 2 no verdict.",
)


def _version(asked: bool) -> None:
    if asked:
        print(f"convmerge {__version__}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


@app.command("inspect")
@spread
def inspect_command(path: _Model, source: Source, head: Head, choice: Choice, printing: Printing) -> int:
    """Show what could be merged, what not, and why. Writes nothing."""
    from convmerge import render

    try:
        report = _planned("inspect", path, source, choice, printing, **head.arguments())
    except LoadError:
        _print_contents(path, printing)
        raise
    command = _fuse_command(path, source, head, choice)
    _print(printing, report, render.inspect_document(report, command, verbose=printing.verbose))
    return CLEAN


@app.command("check")
@spread
def check_command(path: _Model, source: Source, choice: Choice, printing: Printing) -> int:
    """Exit with 1 while a profitable merge is left, for CI. Writes nothing."""
    from convmerge import render

    report = _planned("check", path, source, choice, printing)
    command = _fuse_command(path, source, choice)
    _print(printing, report, render.check_document(report, command, verbose=printing.verbose))
    return FINDING if report.merged() else CLEAN


@app.command("fuse")
@spread
def fuse_command(
    path: _Model,
    out: Output,
    source: Source,
    head: Head,
    choice: Choice,
    printing: Printing,
) -> int:
    """Merge, remove channels that pruning has silenced, verify, write.

    Nothing is written unless the result is the same function.
    """
    from convmerge import api, io, render

    out.check(path)
    with printing.terminal().working() as progress:
        clock = Clock()
        with clock.stage("load", progress):
            opened, inputs = _open(path, source)
        result = api.fuse(
            opened.module,
            inputs,
            seed=source.seed,
            bind=source.bound(),
            progress=progress,
            **head.arguments(),
            **choice.arguments(),
        )
        verdict = result.report.verification
        equal = verdict is None or verdict.equal
        target = out.target() if equal else None
        written = None
        if target:
            with clock.stage("write", progress):
                verify = _same_as(result.model, result.inputs)
                written = io.save(
                    result.model, target, like=opened, inputs=result.inputs, verify=verify, **out.arguments()
                )
    report = dataclasses.replace(
        result.report,
        model=str(path),
        warnings=(*opened.notes, *result.report.warnings, *(written.notes if written else ())),
        seconds=clock.around(result.report.seconds),
        file_bytes=_sizes(before=path, after=target),
        output=str(target) if target else None,
        output_inputs=written.inputs if written else {},
    )
    outcome = _outcome(report, equal, clock.total())
    _print(printing, report, render.fuse_document(report, outcome, verbose=printing.verbose))
    return CLEAN if equal else FINDING


@app.command("verify")
@spread
def verify_command(
    a: Annotated[Path, typer.Argument(metavar="A", help=_SAVED)],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    source: Source,
    printing: Printing,
) -> int:
    """Tell whether two models are the same function. Exits with 1 if not."""
    from convmerge import api, render
    from convmerge.report import Report

    def compare(first: nn.Module, second: nn.Module, inputs: Inputs) -> Report:
        verdict = api.verify(first, second, inputs, seed=source.seed, bind=source.bound())
        return Report("verify", f"{a}, {b}", verification=verdict)

    report = _of_two("compare", a, b, source, printing, compare)
    _print(printing, report, render.verify_document(report, verbose=printing.verbose))
    return CLEAN if report.verification and report.verification.equal else FINDING


@app.command("bench")
@spread
def bench_command(
    a: Annotated[Path, typer.Argument(metavar="A", help=_SAVED)],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one, such as A fused.")],
    *,
    pairs: Annotated[int, typer.Option(min=2, metavar="N", help="Runs of each model, in turn.")] = 15,
    threads: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Threads of torch; its own choice if left out.")
    ] = None,
    source: Source,
    printing: Printing,
) -> int:
    """Time two models in turn; memory, MACs and parameters of both. Does not compare outputs: see verify."""
    from convmerge import api, render
    from convmerge.report import Report

    def measure(first: nn.Module, second: nn.Module, inputs: Inputs) -> Report:
        found = api.bench(first, second, inputs, bind=source.bound(), pairs=pairs, threads=threads)
        before, after = found.counts
        peaks = dict(zip(("before", "after"), found.peak_bytes, strict=True))
        return Report(
            "bench", f"A {a}, B {b}", before=before, after=after, speedup=found.speedup, peak_bytes=peaks
        )

    report = _of_two("run", a, b, source, printing, measure)
    _print(printing, report, render.bench_document(report, verbose=printing.verbose))
    return CLEAN


class NotSameError(ConvmergeError):
    """What was read back from the written file is not what was fused: a negative finding."""


def _open(path: Path, source: Source) -> tuple[ModelFile, Inputs]:
    opened = source.open(path)
    return opened, source.example_inputs(opened)


def _planned(
    name: str, path: Path, source: Source, choice: Choice, printing: Printing, **more: Any
) -> Report:
    """Run the API's inspect or check on a model file."""
    from convmerge import api

    plan = {"inspect": api.inspect, "check": api.check}[name]
    with printing.terminal().working() as progress:
        clock = Clock()
        with clock.stage("load", progress):
            opened, inputs = _open(path, source)
        options = choice.arguments() | more
        report = plan(opened.module, inputs, bind=source.bound(), progress=progress, **options)
    return dataclasses.replace(
        report,
        model=str(path),
        warnings=(*opened.notes, *report.warnings),
        seconds=clock.around(report.seconds),
        file_bytes=_sizes(before=path),
    )


def _of_two(
    stage: str,
    a: Path,
    b: Path,
    source: Source,
    printing: Printing,
    found: Callable[[nn.Module, nn.Module, Inputs], Report],
) -> Report:
    """What is ``found`` of two model files on the same inputs, with what the files and inputs were."""
    with printing.terminal().working() as progress:
        clock = Clock()
        with clock.stage("load", progress):
            first, second = source.open(a), source.open(b)
            inputs = source.example_inputs(second if first.inputs is None and second.inputs else first)
        with clock.stage(stage, progress):
            report = found(first.module, second.module, inputs)
    return dataclasses.replace(
        report,
        inputs=inputs.describe(),
        inputs_inferred=inputs.inferred,
        warnings=(*first.notes, *second.notes),
        seconds=clock.stages,
        file_bytes=_sizes(before=a, after=b),
    )


def _same_as(model: nn.Module, inputs: Inputs) -> Callable[[nn.Module, tuple[Inputs, ...]], None]:
    """A check that a model read back from its file still is ``model``. It raises NotSameError."""

    def check(reloaded: nn.Module, others: tuple[Inputs, ...]) -> None:
        from convmerge.verification.compare import compare

        for given in (inputs, *others):
            verdict = compare(model, reloaded, given, more=False)
            if not verdict.equal:
                raise NotSameError(f"the written file is not the fused model: {verdict.reason}", REPORT_IT)

    return check


def _sizes(**files: Path | None) -> dict[str, int]:
    return {side: file.stat().st_size for side, file in files.items() if file}


def _outcome(report: Report, equal: bool, time_taken: float) -> str:
    from convmerge.render.figures import seconds

    if not equal:
        what = "nothing written"
    elif report.output is None:
        what = "dry run: nothing written"
    else:
        what = f"wrote {'' if report.merged() else 'the model unchanged to '}{report.output}"
        if report.output_inputs:
            taken = (f"{name} {shape}" for name, shape in report.output_inputs.items())
            what += f" for {', '.join(taken)}"
    return f"{what} ({seconds(time_taken)})"


def _fuse_command(path: Path, *groups: Source | Head | Choice) -> str:
    """The command that fuses what was inspected."""
    output = path.with_name(f"{path.stem}-fused{path.suffix}")
    words = ["convmerge", "fuse", str(path), "-o", str(output), *typed(*groups)]
    return shlex.join(words)


def _print_contents(path: Path, printing: Printing) -> None:
    """Tell what a file that cannot be loaded says it holds."""
    from convmerge import render
    from convmerge.io import peek

    with contextlib.suppress(LoadError, OSError):
        contents = peek(path)
        if contents is not None:
            printing.terminal().show(render.contents_document(contents, verbose=printing.verbose))


def _print(printing: Printing, report: Report, document: Document) -> None:
    """Warnings on stderr, the report on stdout in the format asked for."""
    terminal = printing.terminal()
    for warning in report.warnings:
        terminal.warn(warning)
    terminal.results(report.to_dict(), document)
