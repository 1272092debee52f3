"""Constant pointwise operators around a computed kernel move into what computes it.

A kernel that a linear layer computes, K = reshape(L h), is linear in h. So is its product Q K P with the
matrices of a pointwise convolution after it and of one before it: another linear layer computes that.
Where something else computes the kernel, the product is made in every call: of kernels, not of maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from convmerge.cost.model import Objective
from convmerge.decide import matches, site_paths
from convmerge.edit.frames import Frames
from convmerge.edit.retrace import Trace, retrace
from convmerge.edit.rewrite import Tree, stand_in
from convmerge.errors import Refusal
from convmerge.evidence.capture import Evidence, capture, copy_model
from convmerge.evidence.constants import Constants
from convmerge.inputs import Inputs
from convmerge.passes import Prepared
from convmerge.passes.edits import shallow_copy
from convmerge.passes.generator.check import Forms, check, generated_rows, merged
from convmerge.passes.generator.choice import Chooser, Fold
from convmerge.passes.generator.kernels import computed_layers, has_computed_kernel
from convmerge.passes.generator.writing import Opening, Writer, opening
from convmerge.plan import Planner
from convmerge.recognise import Context
from convmerge.regions.elements import Element, calls_of
from convmerge.regions.fold import after, fold_numbers
from convmerge.regions.reduction import find_regions
from convmerge.report import SiteReport
from convmerge.sites import comparison, describe_geometry, figures, operator_names, place_name


def fold_into_generators(
    model: nn.Module,
    inputs: Inputs,
    *,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    objective: Objective = "latency",
    seed: int = 0,
) -> Prepared:
    """A model whose computed kernels have taken in the pointwise operators around them, where that pays.

    Args:
        model: in eval mode; not changed.
        only, skip: globs on module paths of the operators that may, or must not, move.

    Raises ConvmergeError where the model cannot be captured.
    """
    evidence = capture(model, inputs)
    constants = Constants(evidence)
    if evidence.eager or not any(has_computed_kernel(call, constants) for call in evidence.calls.values()):
        return Prepared(model, inputs, evidence=evidence)
    regions = find_regions(Context(evidence, constants))
    layers = computed_layers(evidence, constants, regions)

    def allowed(elements: Sequence[Element]) -> bool:
        paths = site_paths(evidence, elements)
        wanted = not only or any(matches(path, only) for path in paths)
        return wanted and not any(matches(path, skip) for path in paths)

    frames = Frames(evidence, constants)
    chooser = Chooser(evidence, regions, Planner(frames, objective, allowed=allowed))
    best = [(fold, gains) for fold, gains in map(chooser.best, layers) if fold is not None]
    work = _Work(model, frames, constants, seed)
    written = work.write([fold for fold, gains in best if gains])
    rows = [written[fold] if gains else _row(evidence, fold, None) for fold, gains in best]
    if work.changed is None:
        return Prepared(model, inputs, tuple(rows), evidence=evidence)
    return Prepared(work.changed, inputs, tuple(rows))


class _Work:
    """Writes folds into one copy of a model, which shares what does not change."""

    def __init__(self, model: nn.Module, frames: Frames, constants: Constants, seed: int) -> None:
        self._model = model
        self._frames = frames
        self._evidence = frames.evidence
        self._constants = constants
        self._seed = seed
        self._scratch: nn.Module | None = None
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self.changed: nn.Module | None = None

    def write(self, folds: Sequence[Fold]) -> dict[Fold, SiteReport]:
        """Write what can be written, and tell for every fold what became of it."""
        rows: dict[Fold, SiteReport] = {}
        by_owner: dict[str, list[tuple[Fold, Opening]]] = {}
        for fold in folds:
            try:
                place = opening(self._frames, fold, self._model)
            except Refusal as refusal:
                rows[fold] = _row(self._evidence, fold, refusal.reason)
            else:
                by_owner.setdefault(place.owner.path, []).append((fold, place))
        tree = Tree(shallow_copy(self._model))
        for path in sorted(by_owner, key=lambda path: -len(path)):  # what is inside before what is around it
            owner = tree.get(path)
            made = self._write_owner(owner, by_owner[path], rows)
            if made is not None:
                tree.put(owner, stand_in(made, owner))
                self.changed = tree.root
        return rows

    def _write_owner(
        self, owner: nn.Module, work: list[tuple[Fold, Opening]], rows: dict[Fold, SiteReport]
    ) -> nn.Module | None:
        frame = work[0][1].owner
        opened = frozenset(path for _, place in work for path in place.opened)
        calls = self._frames.calls[frame]
        try:
            trace = self._trace(frame.path, opened)
        except Refusal as refusal:
            rows.update({fold: _row(self._evidence, fold, refusal.reason) for fold, _ in work})
            return None
        writer = Writer(owner, trace, {node: index for index, node in enumerate(calls)})
        written = False
        for fold, _ in work:
            try:
                rows[fold] = self._write_fold(writer, fold)
                written = True
            except Refusal as refusal:
                rows[fold] = _row(self._evidence, fold, refusal.reason)
        return writer.module() if written else None

    def _trace(self, path: str, opened: frozenset[str]) -> Trace:
        start = len(path) + 1 if path else 0
        frame = self._frames.by_path[path][0]
        self._scratch = self._scratch or copy_model(self._model).eval()  # tracing can leave marks
        inside = frozenset(inner[start:] for inner in opened)
        return retrace(
            self._scratch.get_submodule(path),
            frame,
            self._evidence,
            self._constants,
            self._frames.calls[frame],
            inside,
        )

    def _write_fold(self, writer: Writer, fold: Fold) -> SiteReport:
        behind = after(fold.layer.place, fold.layer.geometry)
        forms: Forms = (
            fold_numbers(fold.before, fold.place) if fold.before else None,
            fold_numbers(fold.after, behind) if fold.after else None,
        )
        rows = generated_rows(fold, self._constants) if fold.generator is not None else None
        found = check(fold, self._evidence, self._constants, rows, forms, self._seed)
        if not found.exact:
            raise Refusal(
                f"differs from the original by {found.error:.1e} in float64, more than rounding explains"
            )
        writer.write(fold, None if rows is None else merged(rows, forms), forms, self._like(fold))
        self._constants.release()
        return replace(_row(self._evidence, fold, ""), error=found.error, bound=found.bound)

    def _like(self, fold: Fold) -> nn.Parameter:
        """A parameter in the style of those that are merged: trainable if any of them is."""
        nodes = calls_of((*fold.before, *fold.after))
        nodes += [fold.generator.node] if fold.generator is not None else []
        named = self._parameters
        read = {source for node in nodes for source in node.all_input_nodes}
        tensors = [self._evidence.tensors[n] for n in read if n in self._evidence.tensors]
        trainable = any(name in named and named[name].requires_grad for name, _ in tensors)
        floating = next(tensor for _, tensor in tensors if tensor.is_floating_point())
        return nn.Parameter(floating[:0], requires_grad=trainable)


def _row(evidence: Evidence, fold: Fold, refusal: str | None) -> SiteReport:
    """A row of the report: merged if ``refusal`` is empty, kept for its cost if it is None."""
    layer = fold.layer
    nodes = [layer.node, *calls_of((*fold.before, *fold.after))]
    nodes += [fold.generator.node] if fold.generator is not None else []
    paths = [call.place for call in sorted((evidence.calls[node] for node in nodes), key=lambda c: c.index)]
    kernel = "×".join(map(str, layer.geometry.kernel))
    own = f"computed {evidence.calls[layer.node].op.rstrip('123d')} {kernel}".strip()
    names = (*operator_names(fold.before), own, *operator_names(fold.after))
    if fold.generator is not None:
        out = evidence.size(fold.generator.node)[-1]
        names = (f"linear {evidence.size(fold.generator.source)[-1]}→{out}", *names)
    how = "composed in every call"
    if fold.generator is not None:
        how = f"computed by one Linear({evidence.size(fold.generator.source)[-1]}, {fold.numbers})"
    reason = refusal or f"one {own.removeprefix('computed ')}, its kernel {how}"
    if refusal is None:
        reason = f"costs more with its kernel {how}: {comparison(fold.old, fold.new)}"
    return SiteReport(
        place=place_name(paths),
        operators=names,
        geometry=describe_geometry(fold.geometry),
        action="merge" if refusal == "" else "keep" if refusal is None else "refuse",
        reason=reason,
        evidence="static" if refusal == "" else "",
        modules=tuple(dict.fromkeys(paths)),
        **figures(fold.old, fold.new),
    )
