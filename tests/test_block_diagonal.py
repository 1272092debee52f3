"""Block-diagonal layers end to end: every way people write them becomes the cheapest exact one."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from captured import Function, randomised
from torch import Tensor, nn
from torch.nn.utils import prune

import convmerge
from convmerge.report import SiteReport

BLOCKS, INTO, OUT = 7, 61, 43
ROWS = (17, BLOCKS * INTO)
BATCHED = "one BatchedLinear(7 × 61→43)"


class Loop(nn.Module):
    """A linear layer for every chunk of the features."""

    def __init__(self, inputs: list[int], outputs: list[int]) -> None:
        super().__init__()
        self.inputs = inputs
        self.layers = nn.ModuleList(map(nn.Linear, inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        parts = x.split(self.inputs, -1)
        return torch.cat([layer(part) for layer, part in zip(self.layers, parts, strict=True)], -1)


def block_mask(inputs: list[int], outputs: list[int]) -> Tensor:
    return torch.block_diag(*map(torch.ones, outputs, inputs))


def masked(mask: Tensor, *kernel: int, bias: bool = True) -> nn.Module:
    """A layer with exact zeros where the mask has them, its hook removed."""
    out, into = mask.shape
    conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(kernel) - 1]
    layer = conv(into, out, kernel, bias=bias) if kernel else nn.Linear(into, out, bias)
    prune.custom_from_mask(
        layer, "weight", mask.reshape(*mask.shape, *(1,) * len(kernel)).expand_as(layer.weight)
    )
    return prune.remove(layer, "weight")


def shuffled(mask: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randperm(n, generator=generator) for n in mask.shape)
    return mask[rows][:, columns]


def with_mask(m: Any, x: Tensor) -> Tensor:
    mask = torch.block_diag(*[torch.ones(OUT, INTO, dtype=x.dtype)] * BLOCKS)
    return nn.functional.linear(x, m.dense.weight * mask, m.dense.bias)


def model_of(forward: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    """A function of the layers and the weights that a block-diagonal layer is written with."""
    model = Function(forward)
    model.layers = nn.ModuleList(nn.Linear(INTO, OUT) for _ in range(BLOCKS))
    model.dense = nn.Linear(BLOCKS * INTO, BLOCKS * OUT)
    model.conv = nn.Conv1d(BLOCKS * INTO, BLOCKS * OUT, 1, groups=BLOCKS)
    model.widen = nn.Conv1d(BLOCKS * INTO, BLOCKS * 6, 1, groups=BLOCKS)
    model.narrow = nn.Conv1d(BLOCKS * 6, BLOCKS * OUT, 1, groups=BLOCKS)
    model.weight = nn.Parameter(torch.empty(BLOCKS, INTO, OUT))
    model.bias = nn.Parameter(torch.empty(BLOCKS, OUT))
    return randomised(model)


def joined(m: Any, parts: Any) -> Tensor:
    return torch.cat([layer(part) for layer, part in zip(m.layers, parts, strict=True)], -1)


WRITTEN: dict[str, tuple[Callable[[Any, Tensor], Tensor], tuple[int, ...]]] = {
    "chunks": (lambda m, x: joined(m, x.chunk(BLOCKS, -1)), ROWS),
    "slices": (lambda m, x: joined(m, [x[:, i * INTO : (i + 1) * INTO] for i in range(BLOCKS)]), ROWS),
    "tokens": (lambda m, x: joined(m, x.tensor_split(BLOCKS, -1)), (3, 5, BLOCKS * INTO)),
    "unbind": (lambda m, x: joined(m, x.unflatten(-1, (BLOCKS, INTO)).unbind(1)), ROWS),
    "stack": (
        lambda m, x: torch.stack([f(part) for f, part in zip(m.layers, x.chunk(BLOCKS, -1), strict=True)], 1)
        .flatten(1),
        ROWS,
    ),
    "mask": (with_mask, ROWS),
    "conv1d": (lambda m, x: m.conv(x.unsqueeze(-1)).squeeze(-1), ROWS),
    "conv1d between transposes": (
        lambda m, x: m.conv(x.transpose(1, 2)).transpose(1, 2),
        (3, 5, BLOCKS * INTO),
    ),
    "einsum": (
        lambda m, x: (torch.einsum("nbi,bio->nbo", x.view(-1, BLOCKS, INTO), m.weight) + m.bias).flatten(1),
        ROWS,
    ),
    "einsum on tokens": (
        lambda m, x: torch.einsum("nlbi,bio->nlbo", x.unflatten(-1, (BLOCKS, INTO)), m.weight).flatten(-2),
        (3, 5, BLOCKS * INTO),
    ),
    "bmm": (
        lambda m, x: (
            torch.bmm(x.view(-1, BLOCKS, INTO).transpose(0, 1), m.weight).transpose(0, 1) + m.bias
        ).reshape(-1, BLOCKS * OUT),
        ROWS,
    ),
    "matmul": (
        lambda m, x: (x.view(-1, BLOCKS, 1, INTO) @ m.weight).reshape(-1, BLOCKS * OUT) + m.bias.flatten(),
        ROWS,
    ),
    "matmul from the left": (
        lambda m, x: (m.weight.transpose(1, 2) @ x.view(-1, BLOCKS, INTO, 1)).flatten(1),
        ROWS,
    ),
}  # fmt: skip


def fused(model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> convmerge.Result:
    """Fuse, and compare with the model on the example's shape and on other numbers of rows."""
    model = model.to(dtype).eval()
    result = convmerge.fuse(model, torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(dtype))
    if result.report.verification is not None:
        assert result.report.verification.equal, result.report.verification.reason
    tolerance = 1e-11 if dtype == torch.float64 else 64 * torch.finfo(dtype).eps
    for rows in (shape[0], 1, 2):
        x = torch.randn(rows, *shape[1:], generator=torch.Generator().manual_seed(rows)).to(dtype)
        with torch.no_grad():
            expected, actual = model(x), result.model(x)
        assert actual.shape == expected.shape
        assert (actual - expected).abs().max() <= tolerance * expected.abs().max()
    return result


def merged(result: convmerge.Result) -> list[SiteReport]:
    return [site for site in result.report.sites if site.action == "merge"]


@pytest.mark.parametrize("name", WRITTEN)
def test_every_way_to_write_equal_blocks_is_one_batched_product(name: str) -> None:
    forward, shape = WRITTEN[name]
    result = fused(model_of(forward), shape)
    assert [site.reason.split(": ")[-1] for site in merged(result)][-1].startswith(BATCHED), merged(result)
    buffer = io.BytesIO()
    torch.save(result.model, buffer)
    assert b"convmerge" not in buffer.getvalue()


@pytest.mark.parametrize("way", ["hook", "removed"])
def test_pruned_layers(way: str) -> None:
    layer = nn.Linear(BLOCKS * INTO, BLOCKS * OUT)
    prune.custom_from_mask(layer, "weight", block_mask([INTO] * BLOCKS, [OUT] * BLOCKS))
    if way == "removed":
        prune.remove(layer, "weight")
        with torch.no_grad():
            layer.bias.uniform_()
        result = convmerge.fuse(layer.double(), torch.randn(ROWS).double())
    else:
        result = convmerge.fuse(nn.Sequential(layer, nn.ReLU()).double(), torch.randn(ROWS).double())
    assert BATCHED in merged(result)[-1].reason
    assert result.report.after.parameters == BLOCKS * OUT * (INTO + 1)


def test_batched_layers_take_any_leading_dimensions() -> None:
    forward, shape = WRITTEN["chunks"]
    result = fused(model_of(forward), shape)
    (layer,) = (m for m in result.model.modules() if type(m).__name__ == "BatchedLinear")
    x = torch.randn(2, 3, 4, ROWS[1], dtype=torch.float64)
    assert torch.allclose(layer(x)[1, 2], layer(x[1, 2])) and torch.allclose(
        layer(x)[0, 0, 0], layer(x[0, 0, 0])
    )
    assert layer(x[:0]).shape == (0, 3, 4, BLOCKS * OUT)


def test_a_batched_product_stays() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        blocks = x.view(-1, BLOCKS, INTO).transpose(0, 1)
        return torch.bmm(blocks, m.weight).transpose(0, 1).reshape(-1, BLOCKS * OUT)

    assert not merged(fused(model_of(forward), ROWS))
    model = nn.Sequential(model_of(forward), nn.BatchNorm1d(BLOCKS * OUT))
    (site,) = merged(fused(randomised(model), ROWS))
    assert site.operators == ("bmm of 7 blocks", "batch_norm") and BATCHED in site.reason


@pytest.mark.parametrize("added", [lambda m, y: torch.add(m.bias, y, alpha=2), lambda m, y: y + 1.5])
def test_other_sums_behind_a_product_are_not_taken_for_a_bias(added: Callable[[Any, Tensor], Tensor]) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        blocks = torch.einsum("nbi,bio->nbo", x.view(-1, BLOCKS, INTO), m.weight)
        return added(m, blocks).flatten(1)

    assert not fused(model_of(forward), ROWS).report.warnings


def left_to_merge(result: convmerge.Result, shape: tuple[int, ...]) -> list[SiteReport]:
    report = convmerge.check(result.model, torch.randn(shape).double())
    return [site for site in report.sites if site.action == "merge"]


@pytest.mark.parametrize("shape", [(2, 427), (300, 427), (2, 3, 427)])
def test_what_was_made_is_not_made_again(shape: tuple[int, ...]) -> None:
    result = fused(Loop([INTO] * BLOCKS, [OUT] * BLOCKS), shape)
    assert merged(result) and not left_to_merge(result, shape)
    mask = shuffled(block_mask([131, 217, 79], [191, 49, 187]), seed=1)
    result = fused(nn.Sequential(masked(mask), nn.ReLU()), (300, 427))
    assert merged(result) and not left_to_merge(result, (300, 427))


def test_two_grouped_convolutions_for_sizes_that_do_not_divide() -> None:
    """6 inputs of 31 and 4 outputs: the finest groups that hold are two."""
    layers = nn.Sequential(
        nn.Unflatten(1, (186, 1)),
        nn.Conv1d(186, 372, 1, groups=6),
        nn.Conv1d(372, 148, 1, groups=4),
        nn.Flatten(),
    )
    (site,) = merged(fused(layers, (37, 186)))
    assert site.geometry.endswith("groups 2") and "BatchedLinear(2 × 93→74)" in site.reason


def test_unequal_blocks_around_batch_norm_stay_side_by_side() -> None:
    sizes = [113, 41, 167], [211, 97, 29]
    model = nn.Sequential(nn.BatchNorm1d(321), Loop(*sizes), nn.BatchNorm1d(337))
    result = fused(randomised(model), (19, 321))
    (site,) = merged(result)
    assert site.reason.startswith("3 blocks (113→211, 41→97, 167→29): Linear(113, 211), Linear(41, 97)")
    assert result.report.after.operators == {"cat": 1, "linear": 3}
    assert result.report.after.macs == 19 * sum(i * o for i, o in zip(*sizes, strict=True))


def test_loops_in_a_row_and_inside_one_another() -> None:
    inner = Loop([53, 53], [31, 31])
    outer = Loop([67, 106], [47, 62])
    outer.layers[1] = inner
    model = nn.Sequential(outer, Loop([47, 31, 31], [61, 59, 59]))
    result = fused(model, (23, 173))
    (site,) = merged(result)
    assert site.reason.startswith("3 blocks (2 of 53→59, 67→61)"), site.reason


@pytest.mark.parametrize(("kernel", "shape"), [((), (129, 427)), ((1, 1), (1, 427, 17, 13))])
def test_blocks_behind_a_permutation(kernel: tuple[int, ...], shape: tuple[int, ...]) -> None:
    mask = shuffled(block_mask([INTO] * BLOCKS, [151] * BLOCKS), seed=3)
    (site,) = merged(fused(masked(mask, *kernel), shape))
    assert site.reason.startswith("7 blocks of 61→151, behind a permutation: index_select → ")


def test_a_masked_convolution_becomes_grouped() -> None:
    mask = block_mask([32] * 4, [48] * 4)
    result = fused(masked(mask, 3, 3), (1, 128, 15, 13))
    (site,) = merged(result)
    assert site.reason.startswith("4 blocks of 32→48: one Conv2d(128, 192, 3×3, groups 4)")
    (layer,) = (m for m in result.model.modules() if isinstance(m, nn.Conv2d))
    assert layer.groups == 4


def test_small_blocks_stay_one_dense_layer_and_inspect_says_so() -> None:
    report = fused(nn.Sequential(masked(block_mask([5] * 4, [3] * 4)), nn.ReLU()), (2, 20)).report
    (site,) = report.sites
    assert site.action == "keep" and "4 blocks of 5→3 in its weight, which cost more" in site.reason


def test_scattered_zeros_are_no_blocks() -> None:
    mask = (torch.rand(151, 149, generator=torch.Generator().manual_seed(2)) < 0.3).float()
    assert not fused(nn.Sequential(masked(mask), nn.ReLU()), (16, 149)).report.sites


def test_a_slice_that_something_else_reads_stays() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        parts = x.chunk(BLOCKS, -1)
        return joined(m, parts) * parts[0].relu().sum()

    result = fused(model_of(forward), ROWS)
    assert not merged(result) and result.report.after.operators["linear"] == BLOCKS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    result = fused(Loop([INTO] * BLOCKS, [OUT] * BLOCKS), ROWS, dtype)
    assert merged(result) and {p.dtype for p in result.model.parameters()} == {dtype}


@pytest.mark.parametrize("seed", range(12))
def test_random_masks_are_exact_or_kept(seed: int) -> None:
    draw = random.Random(seed)
    count = draw.randint(2, 6)
    equal = draw.randint(2, 40), draw.randint(2, 40)
    sizes = [equal if seed % 2 else (draw.randint(1, 90), draw.randint(1, 90)) for _ in range(count)]
    mask = block_mask([i for i, _ in sizes], [o for _, o in sizes])
    if draw.random() < 0.3:
        mask[draw.randrange(len(mask))] = 0
        mask[:, draw.randrange(mask.shape[1])] = 0
    if draw.random() < 0.5:
        mask = shuffled(mask, seed)
    kernel = draw.choice([(), (), (1,), (1, 1), (3, 2)])
    lead = draw.choice([(1,), (33,), (2, 9)]) if not kernel else (2,)
    shape = (*lead, mask.shape[1], *(9, 7)[: len(kernel)])
    layers = [masked(mask, *kernel, bias=draw.random() < 0.5)]
    if draw.random() < 0.5:
        layers.append(masked((torch.rand(11, len(mask)) < 0.9).float(), *(1,) * len(kernel)))
    result = fused(nn.Sequential(*layers, nn.ReLU()), shape)
    assert not result.report.warnings, f"seed {seed}: {sizes}, {kernel}, {shape}: {result.report.warnings}"
