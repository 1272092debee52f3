"""What does not depend on an input is evaluated once, in float64, whatever computes it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from captured import Function, applied, assert_close, context_of, random, randomised, regions_of
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import convmerge
from convmerge.errors import ConvmergeError
from convmerge.evidence.constants import memory_root, view_of
from convmerge.recognise import Filter

MAP = (2, 6, 7, 9)


class Doubled(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w + w.mean((1, 2, 3), keepdim=True)


class Standardised(nn.Conv2d):
    """Weight standardisation as written in BiT: statistics over each output channel's weights."""

    def forward(self, x: Tensor) -> Tensor:
        v, m = torch.var_mean(self.weight, dim=[1, 2, 3], keepdim=True, unbiased=False)
        return self._conv_forward(x, (self.weight - m) / torch.sqrt(v + 1e-8), self.bias)


class StandardisedByNorm(nn.Conv2d):
    """Weight standardisation as written in timm: a batch norm of the weights."""

    def forward(self, x: Tensor) -> Tensor:
        w = F.batch_norm(self.weight.reshape(1, len(self.weight), -1), None, None, training=True)
        return self._conv_forward(x, w.reshape_as(self.weight), self.bias)


def conv() -> nn.Conv2d:
    return nn.Conv2d(6, 4, (3, 2), padding=1, groups=2)


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(conv())


def pruned() -> nn.Module:
    module = conv()
    prune.l1_unstructured(module, "weight", 0.4)
    prune.random_structured(module, "weight", 1, dim=0)
    return module


def parametrised() -> nn.Module:
    module = conv()
    parametrize.register_parametrization(module, "weight", Doubled())
    return module


def gated() -> nn.Module:
    return Function(
        lambda m, x: m.conv(x) * torch.sigmoid(m.gate) + (m.gate.softmax(0) * m.shift).view(-1, 1, 1),
        conv=conv(), gate=nn.Parameter(torch.randn(4, 1, 1)), shift=nn.Parameter(torch.randn(4, 1, 1)),
    )  # fmt: skip


def assembled() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        kernel = torch.zeros(4, 6, 3, 3, dtype=x.dtype)
        kernel[:, :, 1, 1] = m.point
        kernel[:, ::2, :, 2] += m.column
        return F.conv2d(x, kernel, torch.arange(4) * m.point.mean(), padding=1)

    return Function(forward, point=nn.Parameter(torch.randn(4, 6)), column=nn.Parameter(torch.randn(4, 3, 3)))


def padded_kernel() -> nn.Module:
    return Function(
        lambda m, x: F.conv2d(x, m.a.weight + F.pad(m.b.weight, (1, 1, 1, 1)), m.b.bias + 1, padding=1),
        a=nn.Conv2d(6, 5, 3), b=nn.Conv2d(6, 5, 1),
    )  # fmt: skip


COMPUTED: dict[str, Callable[[], nn.Module]] = {
    "DO-Conv": lambda: models.DoConv(6, 9, padding=1),
    "DO-GConv": lambda: models.DoConv(6, 9, groups=3, stride=2),
    "DO-DConv": lambda: models.DoConv(6, 6, groups=6),
    "weight_norm, old": old_weight_norm,
    "weight_norm": lambda: parametrizations.weight_norm(conv()),
    "spectral_norm": lambda: parametrizations.spectral_norm(conv()),
    "spectral_norm, old": lambda: nn.utils.spectral_norm(conv()),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Conv2d(6, 4, 1)),
    "parametrization": parametrised,
    "pruned": pruned,
    "standardised": lambda: Standardised(6, 5, 3),
    "standardised by a norm": lambda: StandardisedByNorm(6, 5, 3, padding=1),
    "gated": gated,
    "assembled in place": assembled,
    "padded kernel": padded_kernel,
}


@pytest.mark.parametrize("name", COMPUTED)
def test_a_computed_weight_is_a_constant(name: str) -> None:
    torch.manual_seed(0)
    model, x = COMPUTED[name]().double().eval(), random(*MAP)
    with torch.no_grad():
        assert_close(applied(model, x), model(x.clone()))


@pytest.mark.parametrize("name", COMPUTED)
def test_a_module_that_computes_its_weight_becomes_one_plain_layer(name: str) -> None:
    torch.manual_seed(0)
    model, x = COMPUTED[name]().double().eval(), random(*MAP)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = convmerge.fuse(model, x)
    assert type(result.model) is nn.Conv2d, result.report.sites
    with torch.no_grad():
        assert_close(result.model(x), model(x.clone()))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_constants_of_a_single_precision_model_are_evaluated_in_double() -> None:
    torch.manual_seed(0)
    model = models.DoConv(6, 9).eval()
    context, regions = regions_of(model, random(*MAP).float())
    ((leaf,),) = regions.chains
    weight = leaf.step.numbers().weight  # type: ignore[union-attr]
    exact = copy.deepcopy(model).double()
    x = random(*MAP)
    assert weight.dtype == torch.float64
    with torch.no_grad():
        assert_close(F.conv2d(x, weight, exact.bias), exact(x), 1e-14)
    context.constants.release()
    assert torch.equal(leaf.step.numbers().weight, weight)  # type: ignore[union-attr]


def test_random_numbers_are_no_constants() -> None:
    model = Function(
        lambda m, x: F.conv2d(x, m.w * torch.rand(4, 6, 1, 1)), w=nn.Parameter(torch.ones(4, 6, 1, 1))
    )
    context, regions = regions_of(model, random(*MAP).float())
    assert not regions.chains
    assert "kernel is another one in every call" in regions.refused.values()
    noise = next(node for node, call in context.evidence.calls.items() if call.op == "rand")
    assert noise not in context.constants
    with pytest.raises(KeyError):
        context.constants.value(noise)


def test_a_mask_of_active_dropout_is_no_constant() -> None:
    model = Function(lambda m, x: F.conv2d(x, F.dropout(m.w, 0.5)), w=nn.Parameter(torch.ones(4, 6, 1, 1)))
    _, regions = regions_of(model, random(*MAP).float())
    assert not regions.chains


def test_memory_that_data_is_written_to_is_no_constant() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        kernel = torch.zeros(4, 6, 1, 1, dtype=x.dtype)
        seen = kernel.view(4, 6)
        kernel[0] = x[0, :, :1, :1]
        return F.conv2d(x, seen.view(4, 6, 1, 1))

    context, regions = regions_of(Function(forward), random(*MAP))
    assert not any(isinstance(e.step, Filter) for chain in regions.chains for e in chain)  # type: ignore[union-attr]
    zeros = next(node for node, call in context.evidence.calls.items() if call.op == "zeros")
    assert zeros not in context.constants


def test_a_constant_has_its_value_at_the_time_it_is_read() -> None:
    """Written to twice: the first conv reads what the first write left."""

    def forward(m: Any, x: Tensor) -> Tensor:
        w = m.w.clone()
        w.mul_(2)
        x = F.conv2d(x, w.clone()).relu()
        w[:, 0] += 1
        return F.conv2d(x, w)

    model, x = randomised(Function(forward, w=nn.Parameter(torch.ones(6, 6, 1, 1)))), random(*MAP)
    result = convmerge.fuse(model, x)
    with torch.no_grad():
        assert_close(result.model(x), model(x))
    _, regions = regions_of(model, x)
    first, second = [chain[0].step.numbers().weight for chain in regions.chains]  # type: ignore[union-attr]
    assert_close(first, 2 * model.w)
    assert torch.equal(second[:, 1:], first[:, 1:])
    assert_close(second[:, 0], first[:, 0] + 1)


def test_a_buffer_that_forward_updates_is_no_constant() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.seen.add_(x.mean((0, 2, 3)))
        return x * m.seen.view(-1, 1, 1)

    model, x = Function(forward, seen=random(6)), random(*MAP)
    _, regions = regions_of(model, x)
    assert not any(call.op == "mul" for chain in regions.chains for e in chain for call in [e.target])
    before = model.seen.clone()
    result = convmerge.fuse(model, x)
    assert torch.equal(model.seen, before)
    assert not result.report.merged()


def test_views_share_memory_and_padding_does_not() -> None:
    model = Function(lambda _, x: F.pad(x, (1, 1)) + F.pad(x.view(2, 6, 63).view(*MAP), (0, 0)).mean())
    context = context_of(model, random(*MAP))
    (x,) = context.evidence.inputs
    pads = [node for node, call in context.evidence.calls.items() if call.op == "pad"]
    assert memory_root(pads[0]) is pads[0]
    assert view_of(pads[0]) is None
    assert memory_root(pads[-1]) is x


def test_a_constant_that_is_written_to_later_is_not_taken_at_its_final_value() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        w = m.w.clone()
        x = F.conv2d(x, w).relu()
        w[:, 0] += 1
        return F.conv2d(x, w)

    model, x = randomised(Function(forward, w=nn.Parameter(torch.ones(6, 6, 1, 1)))), random(*MAP)
    _, regions = regions_of(model, x)
    ((leaf,),) = regions.chains
    assert_close(leaf.step.numbers().weight[:, 0], model.w[:, 0] + 1)  # type: ignore[union-attr]
    assert list(regions.refused.values()) == ["reads memory that was written to in between"]


def test_a_buffer_that_counts_the_runs_is_no_constant() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.runs.add_(1)
        return m.norm(m.conv(x)) / m.runs

    parts = {"conv": nn.Conv2d(6, 4, 3), "norm": nn.BatchNorm2d(4)}
    model, x = randomised(Function(forward, runs=torch.ones(()), **parts)), random(*MAP)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ConvmergeError, match="differs in two runs"):
        convmerge.fuse(model, x)
    report = convmerge.inspect(model, x)
    assert [site.operators for site in report.merged()] == [("conv 3×3", "batch_norm")]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_a_buffer_that_every_run_overwrites_alike_is_a_constant() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.kernel.copy_(m.a @ m.b)
        return F.linear(x, m.kernel)

    parts = {"a": nn.Parameter(torch.ones(7, 2)), "b": nn.Parameter(torch.ones(2, 9))}
    model, x = randomised(Function(forward, kernel=torch.zeros(7, 9), **parts)), random(*MAP)
    with torch.no_grad():
        assert_close(applied(model, x), x @ (model.a @ model.b).t())


class RoundingWithin(nn.Linear):
    """A weight that goes through float32, as Fourier and Hadamard adapters have it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + torch.fft.ifft2(self.weight.float()).real.to(x.dtype), self.bias)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 2e-7)])
def test_a_model_in_double_precision_rounds_where_it_does(dtype: torch.dtype, tolerance: float) -> None:
    model = randomised(nn.Sequential(RoundingWithin(7, 5), nn.Linear(5, 3))).to(dtype)
    x = random(11, 7).to(dtype)
    result = convmerge.fuse(model, x)
    assert len(result.report.merged()) == 1
    with torch.no_grad():
        difference, size = (result.model(x) - model(x)).abs().max(), model(x).abs().max()
    assert float(difference) < tolerance * float(size)


class Accumulating(nn.Module):
    """A sum of branches that begins with zeros or ones in the shape of the data."""

    def __init__(self, begin: Callable[[Tensor], Tensor], *, in_place: bool) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(6, 6, k, padding=k // 2) for k in (1, 3, 5))
        self.begin, self.in_place = begin, in_place

    def forward(self, x: Tensor) -> Tensor:
        y = self.begin(x)
        for branch in self.branches:
            if self.in_place:
                y += branch(x)
            else:
                y = y + branch(x)
        return y


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    "begin",
    [
        torch.zeros_like,
        torch.ones_like,
        lambda y: y.new_zeros(y.shape),
        lambda y: torch.zeros(y.shape, dtype=y.dtype),
    ],
    ids=["zeros_like", "ones_like", "new_zeros", "zeros"],
)
def test_a_sum_accumulated_from_zeros(begin: Callable[[Tensor], Tensor], in_place: bool) -> None:
    model, x = (
        randomised(nn.Sequential(Accumulating(begin, in_place=in_place), nn.BatchNorm2d(6))),
        random(*MAP),
    )
    result = convmerge.fuse(model, x)
    assert models.operators(result.model, x).get("conv") == 1, result.report
    with torch.no_grad():
        assert_close(result.model(x), model(x))


def test_zeros_that_are_written_to_are_no_constant() -> None:
    def forward(_: Any, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y[:, 2:] += x[:, :4]
        return y + x

    context = context_of(Function(forward), random(*MAP))
    (zeros,) = (node for node, call in context.evidence.calls.items() if call.op == "zeros_like")
    assert not context.constants.uniform(zeros)
    assert zeros not in context.constants
