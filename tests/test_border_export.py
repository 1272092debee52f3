"""Border classes, interleaved phases and unfolded convolutions after export with sizes left open."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from pathlib import Path

import laws
import pytest
import torch
from generate import Draw, run
from test_border_classes import NEAREST, RAGGED, SAME, STRIDED, THRICE, WIDE, regular_chain, upscaler
from torch import nn
from torch.export import Dim

from convmerge.affine import Affine
from convmerge.algebra.axis import Axis
from convmerge.borders.classes import bordered
from convmerge.borders.leaks import join
from convmerge.emit import build, emissions
from convmerge.emit.bordered import build_bordered
from convmerge.errors import Refusal

TRANSPOSED = Axis(4, 2, 1, 1, 2, 2)
COVERING, SPREAD = Axis(16, 1, 1, 1, 0, 0), Axis(2, 1, 2, 3, 0, 0)


def chain_of(name: str) -> list[Affine]:
    """Forms in a row that border classes, or one form with its phases interleaved, can be made of."""
    stages = {
        "stem": [[STRIDED] * 2] * 2,
        "unequal rates": [[SAME] * 2, [NEAREST, THRICE], [SAME] * 2],
        "ragged": [[SAME] * 2, [RAGGED] * 2, [SAME] * 2],
        "1-d": [[SAME], [NEAREST], [SAME]],
        "1-d by residues": [[STRIDED]] * 2,
        "3-d": [[SAME] * 3, [NEAREST] * 3, [SAME] * 3],
        "stride first": [[STRIDED] * 2, [NEAREST, THRICE]],
        "up and down": [[THRICE], [STRIDED]],
        "several in a row": [[WIDE] * 2, [STRIDED, SAME]],
        "1-d phases": [[TRANSPOSED]],
        "2-d phases": [[TRANSPOSED] * 2],
        "2-d ragged phases": [[RAGGED, TRANSPOSED]],
        "3-d phases": [[TRANSPOSED] * 3],
        "1-d unfolded": [[COVERING]],
        "2-d unfolded": [[COVERING, SPREAD]],
        "3-d unfolded": [[SPREAD, COVERING, COVERING]],
    }
    if name == "tail":
        return upscaler(Draw(6, 2), 3, (2, 2))
    draw, channels = Draw(6, len(stages[name][0])), [3, 5, 4, 2]
    return [draw.form(channels[i], channels[i + 1], dims) for i, dims in enumerate(stages[name])]


BORDERED = [
    "tail", "stem", "unequal rates", "ragged", "1-d", "1-d by residues", "3-d", "stride first", "up and down",
    "several in a row",
]  # fmt: skip
PHASES = ["1-d phases", "2-d phases", "2-d ragged phases", "3-d phases"]
UNFOLDED = ["1-d unfolded", "2-d unfolded", "3-d unfolded"]


def module_of(name: str, chain: Sequence[Affine]) -> tuple[nn.Module, int]:
    """The merged module in float64, and the smallest size that it takes in every dimension."""
    if name in PHASES:
        form = functools.reduce(lambda inner, outer: join(outer, inner), chain)
        way = next(e for e in reversed(emissions(form.geometry)) if e.layers[-1].kind == "interleave")
        return build(form, way, torch.float64), 1
    if name in UNFOLDED:
        (way,) = (e for e in emissions(chain[0].geometry) if e.layers[0].kind == "unfolded")
        return build(chain[0], way, torch.float64), COVERING.kernel
    b = bordered(tuple(form.geometry for form in chain))
    return build_bordered(b, chain, torch.float64), max(b.minimum)


@pytest.mark.parametrize("name", [*BORDERED, *PHASES, *UNFOLDED])
def test_export_with_open_sizes(name: str) -> None:
    chain = chain_of(name)
    merged, least = module_of(name, chain)
    n = chain[0].geometry.spatial
    # A map of one position would be taken for fixed by torch.export.
    dims = {dim + 2: Dim(f"s{dim}", min=least + 4, max=64) for dim in range(n)}
    draw = Draw(7, n)
    x = draw.input(3, [least + 6 + dim for dim in range(n)])
    program = torch.export.export(merged, (x,), dynamic_shapes=(dims,)).module()
    for extra in range(4, 9):
        x = draw.input(3, [least + extra + 2 * dim for dim in range(n)])
        assert torch.equal(program(x), run(chain, x)), x.shape


@pytest.mark.parametrize("name", ["tail", "stem", "unequal rates", "1-d", "up and down", "several in a row"])
def test_onnx_with_open_sizes(name: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    chain = chain_of(name)
    merged, least = module_of(name, chain)
    n = chain[0].geometry.spatial
    draw, path = Draw(8, n), tmp_path / "merged.onnx"
    axes = {"x": {dim + 2: f"s{dim}" for dim in range(n)}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = draw.input(3, [least + 5] * n)
        torch.onnx.export(
            merged.float(),
            (x.float(),),
            path,
            dynamo=False,
            input_names=["x"],
            output_names=["y"],
            dynamic_axes=axes,
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    for extra in range(6):
        x = draw.input(3, [least + extra + dim for dim in range(n)])
        (found,) = session.run(None, {"x": x.float().numpy()})
        assert torch.equal(torch.from_numpy(found).double(), run(chain, x)), x.shape
    for size in range(1, least):
        with pytest.raises(Exception, match=r"ONNXRuntimeError"):
            session.run(None, {"x": draw.input(3, [size] + [least + 2] * (n - 1)).float().numpy()})


def fails_by_itself(draw: Draw) -> str:
    """Below the smallest size the operators fail without the assertion too: other runtimes drop it."""
    chain = regular_chain(draw) if draw.random.random() < 0.7 else draw.chain(2)
    try:
        b = bordered(tuple(form.geometry for form in chain))
        merged = build_bordered(b, chain, torch.float64)
    except Refusal:
        return "refused"
    for node in list(merged.graph.nodes):
        if node.target is torch._assert:
            merged.graph.erase_node(node)
    merged.recompile()
    for dim, side in enumerate(b.sides):
        for size in range(1, side.ends.minimum) if len(side.segments) > 1 else ():
            x = draw.input(
                chain[0].geometry.in_channels, [size if d == dim else n for d, n in enumerate(b.minimum)]
            )
            with pytest.raises(RuntimeError):
                merged(x)
    return "fails" if max(b.minimum) > 1 else "any size"


@pytest.mark.parametrize(("spatial", "draws"), [(1, 30), (2, 12)])
def test_below_the_smallest_size_there_is_no_result(spatial: int, draws: int) -> None:
    outcomes = laws.check(fails_by_itself, draws, spatial)
    assert outcomes["fails"] > 0.2 * draws, outcomes
