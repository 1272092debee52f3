"""One merged kernel against the calls it replaces, in float64 and within the rounding bound."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.node import Node

from convmerge.affine import Affine
from convmerge.evidence.capture import Evidence
from convmerge.evidence.constants import Constants, run_call
from convmerge.passes.generator.choice import Fold
from convmerge.passes.generator.kernels import Selection
from convmerge.passes.generator.numbers import Rows
from convmerge.recognise import Filter
from convmerge.regions.elements import calls_of
from convmerge.verification.probes import Probe, probe

Forms = tuple[Affine | None, Affine | None]


def merged(rows: Rows, forms: Forms) -> Rows:
    """Kernel and bias with the forms before and after the layer."""
    before, after = forms
    rows = rows if before is None else rows.after(before)
    return rows if after is None else rows.before(after)


def generated_rows(fold: Fold, constants: Constants) -> Rows:
    """Kernel and bias of a layer as functions of what the generator's last layer reads."""
    assert fold.generator is not None
    step = fold.generator.step
    assert isinstance(step, Filter)
    form = step.numbers()
    weight = form.weight
    shift = weight.new_zeros(len(weight)) if form.bias is None else form.bias
    whole = torch.cat([weight, shift[:, None]], 1)
    return _rows(fold, whole[fold.layer.weight.rows], constants, whole)


def _rows(fold: Fold, kernel: Tensor, constants: Constants, whole: Tensor) -> Rows:
    bias: Tensor | None = None
    if isinstance(fold.layer.bias, Selection):
        bias = whole[fold.layer.bias.rows]
    elif fold.layer.bias is not None:
        fixed = constants.tensor(fold.layer.bias)
        assert fixed is not None
        bias = torch.cat([fixed.new_zeros(len(fixed), kernel.shape[-1] - 1), fixed[:, None]], 1)
    return Rows(kernel, bias, fold.layer.geometry.groups)


def check(
    fold: Fold, evidence: Evidence, constants: Constants, rows: Rows | None, forms: Forms, seed: int
) -> Probe:
    """Run the calls and the merged kernel on random maps and random hidden values.

    Args:
        rows: of the generator; None: random kernels are merged with ``forms``.

    Raises Refusal as :func:`probe`.
    """
    generator = torch.Generator().manual_seed(seed)
    layer, last = fold.layer, fold.generator
    values: dict[Node, Any] = {}
    args = evidence.calls[layer.node].args
    if rows is not None and last is not None:
        hidden = torch.randn(evidence.size(last.source), generator=generator, dtype=torch.float64)
        values[last.source] = hidden
    else:
        hidden = torch.empty(0, dtype=torch.float64)
        drawn = {
            name: torch.randn(evidence.size(args[name]), generator=generator, dtype=torch.float64)
            for name in ("weight", "bias")
            if args[name] is not None and args[name] not in constants
        }
        values.update({args[name]: value for name, value in drawn.items()})
        fixed = None if args["bias"] is None else constants.tensor(args["bias"])
        bias = drawn.get("bias", fixed)
        rows = Rows(
            drawn["weight"][..., None], None if bias is None else bias[:, None], layer.geometry.groups
        )
    calls = [*calls_of((*fold.before, *fold.after)), layer.node]
    if last is not None:
        calls.append(last.node)
        for selection in (layer.weight, layer.bias):
            calls += selection.calls if isinstance(selection, Selection) else ()
    ordered = sorted(set(calls), key=lambda node: evidence.calls[node].index)
    source = fold.before[0].source if fold.before else layer.source
    target = fold.after[-1].target if fold.after else layer.node

    def original(x: Tensor) -> Tensor:
        known = {**values, source: x}
        for node in ordered:
            known[node] = run_call(node, lambda n: known[n] if n in known else constants.value(n))
        result: Tensor = known[target]
        return result

    def composed(x: Tensor) -> Tensor:
        assert rows is not None
        return _apply(fold, x, *merged(rows, forms).at(hidden))

    def magnitude(x: Tensor) -> Tensor:
        assert rows is not None
        positive = tuple(None if form is None else _absolute(form) for form in forms)
        return _apply(fold, x, *merged(rows.magnitude(), positive).at(hidden.abs()))  # type: ignore[arg-type]

    g = layer.geometry
    terms = hidden.numel() + fold.geometry.in_channels + g.in_channels * math.prod(g.kernel) + g.out_channels
    return probe(original, composed, magnitude, [fold.place.shape], terms=terms, seed=seed)


def _absolute(form: Affine) -> Affine:
    return Affine(form.geometry, form.weight.abs(), None if form.bias is None else form.bias.abs())


def _apply(fold: Fold, x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    g = fold.geometry
    if not g.spatial:
        return F.linear(x, kernel, bias)
    conv = (F.conv1d, F.conv2d, F.conv3d)[g.spatial - 1]
    return conv(x, kernel, bias, g.down, g.lo, g.dilation, g.groups)
