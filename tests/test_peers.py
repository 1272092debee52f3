"""Cases in which other fusers give wrong results: here each is merged right, or refused with a reason.

Everything goes through the public interface. ``checked`` fuses in float64, where a right merge is off by
rounding of the order of 1e-15 and a wrong one by the size of the activations, and compares on other values,
batches and sizes than the merge was made with; then it does the same from a float32 model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import models
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convmerge
from convmerge.api import Result


class Function(nn.Module):
    """Modules by name, and a forward that uses them."""

    def __init__(self, forward: Callable[..., Tensor], **modules: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def random_model(model: nn.Module, x: Tensor, seed: int = 0) -> nn.Module:
    """Calibrated random constants; the module keeps its train or eval flags."""
    training = {m: m.training for m in model.modules()}
    models.calibrate(model, x, seed=seed)
    for module, flag in training.items():
        module.training = flag
    return model


def checked(model: nn.Module, x: Tensor, *, sizes: bool = True) -> Result:
    """Fuse, and assert that the result is the same function; returns the float64 result.

    ``sizes``: whether to compare on other batch and spatial sizes as well.
    """
    shapes = [tuple(x.shape)]
    if sizes:
        shapes += [(3, *x.shape[1:]), (2, x.shape[1], *(n + 1 + i for i, n in enumerate(x.shape[2:])))]
    result = convmerge.fuse(copy.deepcopy(model).double(), x.double())
    assert_equal(model, result.model, shapes, 1e-12)
    single = convmerge.fuse(model, x)
    assert_equal(model, single.model, shapes, 1e-5)
    assert {p.dtype for p in single.model.parameters()} <= {torch.float32}
    for report in (result.report, single.report):
        assert report.verification is None or report.verification.equal, report.verification
        assert not any("dropped" in warning for warning in report.warnings), report.warnings
        assert report.sites
        assert all(site.reason for site in report.sites), report.sites
    return result


def assert_equal(model: nn.Module, fused: nn.Module, shapes: list[tuple[int, ...]], tolerance: float) -> None:
    model, fused = (copy.deepcopy(m).double().eval() for m in (model, fused))
    for seed, shape in enumerate(shapes):
        x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            expected, actual = model(x.clone()), fused(x.clone())
        assert actual.shape == expected.shape
        error = float((actual - expected).abs().max() / expected.abs().max())
        assert error < tolerance, f"relative error {error:.2g} on {shape}, seed {seed}"


def assert_merged(result: Result, x: Tensor, **operators: int) -> None:
    """Assert that something merged, and how many calls of some kinds are left."""
    assert result.report.merged(), result.report.sites
    calls = models.operators(result.model, x.double())
    assert {kind: calls.get(kind, 0) for kind in operators} == operators, calls


def assert_refused(result: Result) -> None:
    assert not result.report.merged(), result.report.merged()


def reasons(result: Result) -> str:
    return "; ".join(site.reason for site in result.report.sites)


X = torch.randn(2, 6, 9, 11, generator=torch.Generator().manual_seed(7))


# --- Calls and sharing --------------------------------------------------------------------------------------


def test_one_conv_called_twice_and_only_once_followed_by_batch_norm() -> None:
    model = random_model(
        Function(
            lambda m, x: m.bn(m.conv(x)).relu() + m.conv(x.tanh()),
            conv=nn.Conv2d(6, 5, 3, padding=1),
            bn=nn.BatchNorm2d(5),
        ).eval(),
        X,
    )
    checked(model, X)


def test_the_same_conv_and_batch_norm_applied_twice() -> None:
    model = random_model(
        Function(
            lambda m, x: m.bn(m.conv(m.bn(m.conv(x)).relu())), conv=nn.Conv2d(6, 6, 3), bn=nn.BatchNorm2d(6)
        ).eval(),
        X,
    )
    checked(model, X)


def test_one_batch_norm_behind_two_convs() -> None:
    model = random_model(
        Function(
            lambda m, x: m.bn(m.one(x)).relu() + m.bn(m.two(x)).tanh(),
            one=nn.Conv2d(6, 5, 3),
            two=nn.Conv2d(6, 5, 3),
            bn=nn.BatchNorm2d(5),
        ).eval(),
        X,
    )
    checked(model, X)


def test_modules_registered_in_another_order_than_called() -> None:
    model = random_model(
        Function(
            lambda m, x: m.bn2(m.conv2(m.bn1(m.conv1(x)).relu())),
            bn2=nn.BatchNorm2d(7),
            conv2=nn.Conv2d(7, 7, 3),
            bn1=nn.BatchNorm2d(7),
            conv1=nn.Conv2d(6, 7, 3),
        ).eval(),
        X,
    )
    assert_merged(checked(model, X), X, conv=2, batch_norm=0)


def test_a_constant_pad_before_a_shared_conv() -> None:
    def forward(m: Function, x: Tensor) -> Tensor:
        return m.conv(F.pad(x, (1, 2, 0, 1))).amax((2, 3)) + m.conv(x).amin((2, 3))

    checked(random_model(Function(forward, conv=nn.Conv2d(6, 5, 3)).eval(), X), X)


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_a_constant_pad_before_a_conv(value: float) -> None:
    model = random_model(
        nn.Sequential(nn.ConstantPad2d((1, 2, 0, 1), value), nn.Conv2d(6, 5, 3, padding=1)).eval(), X
    )
    checked(model, X)


@pytest.mark.parametrize("pads", [(1, 1, 1, 1), (0, 2, 1, 0)])
def test_a_pad_with_another_number_than_zero_merges_with_what_is_around_it(pads: tuple[int, ...]) -> None:
    """conv(pad_c(x)) = conv(pad_0(x)) and c times the taps on the padding: a channel of ones carries it."""
    layers = nn.Conv2d(6, 31, 1), nn.ConstantPad2d(pads, -0.7), nn.Conv2d(31, 5, 3), nn.BatchNorm2d(5)
    result = checked(random_model(nn.Sequential(*layers).eval(), X), X)
    assert_merged(result, X, conv=1, batch_norm=0, pad=len(set(pads[:2])))  # one more where sides differ
    assert "channel of ones" in result.report.merged()[0].reason


def test_a_pad_with_what_the_layer_before_it_makes_of_zeros_leaves_no_border() -> None:
    model = random_model(
        nn.Sequential(nn.Conv2d(6, 31, 1), nn.ConstantPad2d(1, 0.5), nn.Conv2d(31, 5, 3)).eval(), X
    )
    model[0].bias.data.fill_(0.5)
    assert_merged(checked(model, X), X, conv=1, pad=0)


# --- Batch norm ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [13, 6], ids=["", "as many positions as channels"])
def test_batch_norm_on_another_axis_than_the_linear_before_it(length: int) -> None:
    x = torch.randn(2, 6, length)
    model = random_model(nn.Sequential(nn.Linear(length, length), nn.BatchNorm1d(6)).eval(), x)
    checked(model, x, sizes=False)


def test_linear_and_batch_norm_on_the_same_axis_merge() -> None:
    x = torch.randn(5, 6)
    model = random_model(nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7)).eval(), x)
    assert_merged(checked(model, x, sizes=False), x, linear=1, batch_norm=0)


def test_batch_norm_without_affine_parameters_merges() -> None:
    model = random_model(nn.Sequential(nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5, affine=False)).eval(), X)
    assert_merged(checked(model, X), X, conv=1, batch_norm=0)


def test_batch_norm_without_running_statistics_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5, track_running_stats=False)).eval()
    result = checked(model, X)
    assert_refused(result)
    assert models.operators(result.model, X.double())["batch_norm"] == 1


def test_a_model_in_train_mode_is_treated_in_eval_mode_and_this_is_said() -> None:
    model = random_model(nn.Sequential(nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5), nn.Dropout(0.5)).train(), X)
    statistics = copy.deepcopy(model.state_dict())
    result = checked(model, X)
    assert_merged(result, X, conv=1, batch_norm=0)
    assert any("train mode" in warning for warning in result.report.warnings)
    assert not any(module.training for module in result.model.modules())
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, statistics[key]) for key, value in model.state_dict().items())


def test_batch_norm_left_behind_by_a_block_of_branches_merges_too() -> None:
    block = models.Sum(
        models.conv_bn(6, 6, 3, padding=1, groups=6), models.conv_bn(6, 6, 1, groups=6), nn.BatchNorm2d(6)
    )
    model = random_model(nn.Sequential(block, nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 1)).eval(), X)
    assert_merged(checked(model, X), X, conv=2, batch_norm=0, add=0)


@pytest.mark.parametrize("padding", [0, 1])
def test_batch_norm_before_a_pointwise_conv_that_may_pad(padding: int) -> None:
    model = random_model(nn.Sequential(nn.BatchNorm2d(6), nn.Conv2d(6, 7, 1, padding=padding)).eval(), X)
    result = checked(model, X)
    if not padding:
        assert_merged(result, X, conv=1, batch_norm=0)


# --- Transposed convolutions --------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 3])
def test_transposed_conv_times_a_constant_per_channel(groups: int) -> None:
    conv = nn.ConvTranspose2d(6, 9, (3, 4), stride=(2, 3), padding=1, groups=groups)
    model = random_model(
        Function(lambda m, x: m.conv(x) * m.gain, conv=conv, gain=nn.Parameter(torch.ones(9, 1, 1))).eval(), X
    )
    assert_merged(checked(model, X), X, conv_transpose=1)


@pytest.mark.parametrize("groups", [2, 3, 6])
def test_grouped_transposed_conv_before_batch_norm(groups: int) -> None:
    conv = nn.ConvTranspose2d(6, 12, 3, stride=2, groups=groups, output_padding=1)
    model = random_model(nn.Sequential(conv, nn.BatchNorm2d(12)).eval(), X)
    assert_merged(checked(model, X), X, conv_transpose=1, batch_norm=0)


@pytest.mark.parametrize(
    "conv",
    [
        nn.ConvTranspose2d(6, 7, 1, stride=2),
        nn.ConvTranspose2d(6, 7, 2, stride=2),
        nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, groups=2),
    ],
    ids=repr,
)
def test_batch_norm_before_a_transposed_conv(conv: nn.Module) -> None:
    model = random_model(nn.Sequential(nn.BatchNorm2d(6), copy.deepcopy(conv)).eval(), X)
    checked(model, X)


def test_a_scale_before_a_transposed_conv_merges() -> None:
    conv = nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, groups=2)
    gain = nn.Parameter(torch.ones(6, 1, 1))
    model = random_model(Function(lambda m, x: m.conv(x * m.gain), conv=conv, gain=gain).eval(), X)
    assert_merged(checked(model, X), X, conv_transpose=1)


# --- Chains and borders -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "second",
    [
        nn.Conv2d(6, 7, 1, padding=1, bias=False),
        nn.Conv2d(6, 7, 1, stride=2),
        nn.Conv2d(6, 7, 1, stride=2, padding=1),
    ],
    ids=repr,
)
@pytest.mark.parametrize("bias", [True, False])
def test_depthwise_pointwise_then_pointwise(second: nn.Module, bias: bool) -> None:
    first = nn.Conv2d(6, 6, 1, groups=6, bias=bias)
    result = checked(random_model(nn.Sequential(first, copy.deepcopy(second)).eval(), X), X)
    if second.padding == (0, 0) or not bias:
        assert_merged(result, X, conv=1)


def test_the_bias_of_the_first_conv_is_kept_when_the_second_has_none() -> None:
    model = random_model(nn.Sequential(nn.Conv2d(6, 29, 3), nn.Conv2d(29, 5, 1, bias=False)).eval(), X)
    result = checked(model, X)
    assert_merged(result, X, conv=1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_padded_conv_behind_a_wide_or_biased_one(kernel: int, bias: bool) -> None:
    first = nn.Conv2d(6, 31, kernel, padding=kernel // 2, bias=bias)
    model = random_model(nn.Sequential(first, nn.Conv2d(31, 5, 3, padding=1)).eval(), X)
    result = checked(model, X)
    if kernel == 1 and not bias:
        assert_merged(result, X, conv=1)
    if kernel == 3:
        assert_refused(result)
        assert "pad" in reasons(result)


def test_a_bias_free_depthwise_pair_along_different_axes() -> None:
    model = nn.Sequential(
        nn.Conv2d(6, 6, (1, 5), padding=(0, 2), groups=6, bias=False),
        nn.Conv2d(6, 6, (5, 1), padding=(2, 0), groups=6, bias=False),
    )
    checked(random_model(model.eval(), X), X)


# --- Sums ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: torch.add(m.conv(x), x, alpha=0.5),
        lambda m, x: torch.sub(m.conv(x), x, alpha=0.5),
        lambda m, x: x.sub(m.conv(x), alpha=3),
    ],
    ids=["add", "sub", "sub the conv"],
)
def test_a_scaled_residual_around_a_conv(forward: Callable[..., Tensor]) -> None:
    model = random_model(Function(forward, conv=nn.Conv2d(6, 6, 3, padding=1)).eval(), X)
    assert_merged(checked(model, X), X, conv=1, add=0)


def test_a_residual_around_a_grouped_conv() -> None:
    model = random_model(models.Residual(nn.Conv2d(6, 6, 3, padding=1, groups=2)).eval(), X)
    assert_merged(checked(model, X), X, conv=1, add=0)


def test_a_residual_that_broadcasts_one_channel() -> None:
    x = torch.randn(2, 1, 9, 11)
    checked(random_model(models.Residual(nn.Conv2d(1, 5, 3, padding=1)).eval(), x), x)


# --- Precision ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_low_rank_update_merged_into_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    x = torch.randn(3, 13)
    model = random_model(models.Lora(13, 19), x).to(dtype)
    result = convmerge.fuse(model, x.to(dtype))
    assert result.report.merged(), result.report.sites
    (weight,) = (p for p in result.model.parameters() if p.shape == (19, 13))
    assert weight.dtype == dtype
    product = model.up.weight.double() @ model.down.weight.double()
    exact = model.base.weight.double() + product * model.scaling
    assert float(((weight - exact).abs() / exact.abs()).max()) <= 1.001 * torch.finfo(dtype).eps / 2


def test_differences_above_a_common_tolerance_are_still_equal_up_to_rounding() -> None:
    """Large outputs differ by more than 1e-5 after folding, and so does the original from the exact one."""
    torch.manual_seed(0)
    layers = [m for _ in range(6) for m in (*models.conv_bn(6, 6, 3, padding=1), nn.ReLU())]
    model = random_model(nn.Sequential(*layers, models.conv_bn(6, 5, 3)).eval(), X)
    with torch.no_grad():
        model[-1][1].weight *= 100
    result = convmerge.fuse(model, X)
    with torch.no_grad():
        assert not torch.allclose(model(X), result.model(X), rtol=0, atol=1e-5)
    verification = result.report.verification
    assert verification is not None
    assert verification.equal
    assert verification.comparisons[0].error_ratio is not None
    assert verification.comparisons[0].error_ratio < 4
