"""Figures of a model: operator calls by kind, MACs by hand, parameters counted once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captured import Function
from torch import Tensor, nn

from convmerge.affine import Geometry
from convmerge.counts import count
from convmerge.inputs import Inputs, as_inputs


def counted(model: nn.Module, *shape: int) -> tuple[dict[str, int], int, int]:
    counts = count(model, as_inputs(torch.randn(shape)))
    return counts.operators, counts.macs, counts.parameters


LAYERS: list[tuple[nn.Module, tuple[int, ...], str, int]] = [
    (nn.Conv1d(6, 4, 3, groups=2), (2, 6, 11), "conv", 2 * 4 * 9 * 3 * 3),
    (nn.Conv2d(3, 7, (3, 2), stride=2, padding=1), (2, 3, 9, 11), "conv", 2 * 7 * 5 * 6 * 3 * 6),
    (nn.Conv2d(6, 6, 3, groups=6), (1, 6, 9, 11), "conv", 6 * 7 * 9 * 9),
    (nn.Conv3d(2, 5, 3, dilation=2), (1, 2, 7, 6, 5), "conv", 5 * 3 * 2 * 1 * 2 * 27),
    (nn.ConvTranspose2d(3, 7, 3, stride=2), (2, 3, 5, 4), "conv_transpose", 2 * 3 * 5 * 4 * 7 * 9),
    (nn.ConvTranspose1d(6, 4, 5, groups=2, stride=3), (2, 6, 7), "conv_transpose", 2 * 6 * 7 * 2 * 5),
    (nn.Linear(11, 7), (2, 5, 11), "linear", 2 * 5 * 11 * 7),
]


@pytest.mark.parametrize(("layer", "shape", "kind", "macs"), LAYERS)
def test_macs_are_those_of_the_textbook(
    layer: nn.Module, shape: tuple[int, ...], kind: str, macs: int
) -> None:
    parameters = sum(p.numel() for p in layer.parameters())
    assert counted(layer, *shape) == ({kind: 1}, macs, parameters)


def test_planning_and_counting_agree() -> None:
    """Geometry.macs, for one sample, against what a forward pass does."""
    conv = nn.Conv2d(6, 4, (3, 2), stride=(2, 1), padding=(1, 0), groups=2)
    geometry = Geometry(6, 4, 2, (3, 2), (1, 1), (2, 1), (1, 1), (1, 0), (1, 0), True)
    assert counted(conv, 1, 6, 9, 11)[1] == geometry.macs((9, 11))


KINDS: list[tuple[Callable[[Any, Tensor], Any], dict[str, int]]] = [
    (lambda m, x: x + x - x, {"add": 1, "sub": 1}),
    (lambda m, x: x.clone().add_(1).mul_(2), {"add": 1, "mul": 1}),
    (lambda m, x: 1 + x * 2, {"add": 1, "mul": 1}),
    (lambda m, x: torch.add(x, x) / 2, {"add": 1, "div": 1}),
    (lambda m, x: F.conv2d(x, x[:, :, :1, :1]), {"conv": 1}),
    (lambda m, x: F.conv2d(input=x, weight=x[:, :, :1, :1]), {"conv": 1}),
    (lambda m, x: F.linear(x, x[0, 0]), {"linear": 1}),
    (lambda m, x: F.batch_norm(x, x[0, :, 0, 0], x[0, :, 0, 0]), {"batch_norm": 1}),
    (lambda m, x: F.layer_norm(x, x.shape[2:]), {"layer_norm": 1}),
    (lambda m, x: F.avg_pool2d(x, 2) , {"avg_pool": 1}),
    (lambda m, x: F.max_pool2d(x, 2), {"max_pool": 1}),
    (lambda m, x: F.adaptive_avg_pool2d(x, 1), {"adaptive_avg_pool": 1}),
    (lambda m, x: F.interpolate(x, scale_factor=2), {"interpolate": 1}),
    (lambda m, x: F.pad(torch.cat([x, x], 1), (1, 1)), {"cat": 1, "pad": 1}),
    (lambda m, x: F.pixel_shuffle(x, 2), {"pixel_shuffle": 1}),
    (lambda m, x: x @ x.transpose(2, 3), {"matmul": 1}),
    (lambda m, x: x.relu().sigmoid(), {}),
]  # fmt: skip


@pytest.mark.parametrize(("forward", "expected"), KINDS)
def test_operators_by_kind(forward: Callable[[Any, Tensor], Any], expected: dict[str, int]) -> None:
    assert counted(Function(forward), 1, 4, 6, 6)[0] == expected


WEIGHTS = nn.Parameter(torch.randn(3, 5, 7))
PRODUCTS: list[Callable[[Any, Tensor], Any]] = [
    lambda m, x: torch.bmm(x, WEIGHTS),
    lambda m, x: torch.baddbmm(x[:, :, :1], x, WEIGHTS),
    lambda m, x: x @ WEIGHTS,
    lambda m, x: torch.einsum("bni,bio->nbo", x, WEIGHTS),
]


@pytest.mark.parametrize("product", PRODUCTS)
def test_batched_products_with_a_weight_count(product: Callable[[Any, Tensor], Any]) -> None:
    assert counted(Function(product), 3, 11, 5)[1] == 11 * 3 * 5 * 7


def test_modules_called_twice_count_twice_and_their_parameters_once() -> None:
    conv = nn.Conv2d(5, 5, 1)
    model = nn.Sequential(conv, nn.ReLU(), conv)
    assert counted(model, 2, 5, 3, 4) == ({"conv": 2}, 2 * 2 * 5 * 5 * 12, 30)
    tied = nn.Sequential(nn.Linear(7, 7), nn.Linear(7, 7))
    tied[1].weight = tied[0].weight
    assert counted(tied, 3, 7)[2] == 49 + 14


def test_a_batch_norm_is_counted_in_eval_mode_and_the_model_is_left_in_train_mode() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Dropout(0.5)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert counted(model, 2, 3, 5, 5)[0] == {"batch_norm": 1, "conv": 1}
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_keyword_arguments_are_passed_on() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
            return x * scale

    x = torch.randn(3)
    assert count(Scaled(), Inputs((x,), {"scale": x})).operators == {"mul": 1}
