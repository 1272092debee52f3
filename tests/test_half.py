"""Models in half precision, with adapters in it or in single precision: merged in float64, rounded once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import models
import pytest
import torch
from captured import Function
from torch import Tensor, nn

import convmerge
from convmerge.api import Result
from convmerge.edit.retrace import Trace
from convmerge.edit.rewrite import Replacement, apply

HALVES = [torch.float16, torch.bfloat16]


class Adapted(nn.Module):
    """A linear layer with a low-rank update whose weights are, and which computes, in ``inner`` precision."""

    def __init__(self, base: nn.Linear, inner: torch.dtype, rank: int = 3, scale: float = 1.7) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.down = nn.Linear(base.in_features, rank, bias=False, dtype=inner)
        self.up = nn.Linear(rank, base.out_features, bias=False, dtype=inner)

    def forward(self, x: Tensor) -> Tensor:
        result = self.base(x)
        given = x.to(self.down.weight.dtype)
        return (result + self.up(self.down(given)) * self.scale).to(result.dtype)

    def exact(self) -> Tensor:
        """The weight that it stands for, in float64."""
        return self.base.weight.double() + self.scale * self.up.weight.double() @ self.down.weight.double()


def adapted(dtype: torch.dtype, inner: torch.dtype) -> nn.Sequential:
    torch.manual_seed(1)
    layers = [Adapted(nn.Linear(*sizes).to(dtype), inner) for sizes in ((11, 13), (13, 7))]
    return nn.Sequential(layers[0], nn.Tanh(), layers[1]).eval().requires_grad_(False)


def fused(model: nn.Module, x: Tensor) -> Result:
    result = convmerge.fuse(model, x)
    verification = result.report.verification
    assert verification is None or verification.equal, verification
    assert not any("dropped" in warning for warning in result.report.warnings), result.report.warnings
    return result


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("mixed", [True, False], ids=["mixed", "half"])
def test_adapters_vanish_and_weights_are_rounded_once(dtype: torch.dtype, mixed: bool) -> None:
    """Adapters of half-precision models are kept, and compute, in single precision."""
    model = adapted(dtype, torch.float32 if mixed else dtype)
    result = fused(model, torch.randn(5, 11).to(dtype))
    for index in (0, 2):
        layer, original = result.model[index], model[index]
        assert isinstance(layer, nn.Linear)
        assert torch.equal(layer.weight, original.exact().to(dtype))
        assert torch.equal(layer.bias, original.base.bias)


def narrowed(m: nn.Module, x: Tensor) -> Tensor:
    return m.b(m.a(x).half().float())


def not_cast_back(m: nn.Module, x: Tensor) -> Tensor:
    return m.b(m.a(x.half()).float())


def sum_in_single(m: nn.Module, x: Tensor) -> Tensor:
    """The half-precision terms are added up in half precision only after the cast."""
    x = x.half()
    return (m.a(x) + m.b(x.float()) + x.tanh()).tanh()


KEPT: list[tuple[Callable[..., Tensor], bool, str]] = [
    (narrowed, False, "rounds"),
    (not_cast_back, True, "ends in another dtype"),
    (sum_in_single, True, "ends in another dtype"),
]


@pytest.mark.parametrize(("forward", "half", "reason"), KEPT)
def test_what_rounds_on_purpose_or_stays_wide_is_kept(
    forward: Callable[..., Tensor], half: bool, reason: str
) -> None:
    torch.manual_seed(2)
    a, b = nn.Linear(7, 7).to(torch.float16 if half else torch.float32), nn.Linear(7, 7)
    model, x = Function(forward, a=a, b=b).eval(), torch.randn(5, 7)
    result = fused(model, x)
    assert not result.report.merged()
    assert any(reason in site.reason for site in result.report.sites)
    assert result.model(x).dtype == model(x).dtype


def rescaled(m: nn.Module, x: Tensor) -> Tensor:
    return (m.a(x).float() * m.scale).to(x.dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_scales_in_single_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    scale = torch.randn(5)
    model = Function(rescaled, a=nn.Linear(7, 5, bias=False).to(dtype), scale=scale).eval()
    result = fused(model, torch.randn(3, 7).to(dtype))
    (layer,) = (m for m in result.model.modules() if isinstance(m, nn.Linear))
    exact = scale.double().unsqueeze(1) * model.a.weight.double()
    assert torch.equal(layer.weight, exact.to(dtype))


# --- What the comparison of whole models sees ---------------------------------------------------------------


def convolutional() -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels, out in ((3, 11), (11, 13), (13, 17), (17, 11)):
        layers += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(11, 5))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_right_merge_passes_and_a_wrong_weight_is_seen(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    model = convolutional().eval()
    x = torch.randn(2, 3, 17, 19)
    with torch.no_grad():
        models.calibrate(model, x)
    model, x = model.to(dtype), x.to(dtype)
    result = fused(model, x)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in result.model.modules()) == 0
    wrong = copy.deepcopy(result.model)
    layer = next(m for m in wrong.modules() if isinstance(m, nn.Conv2d))
    with torch.no_grad():
        layer.weight[0] *= 1.5
    assert not convmerge.verify(model, wrong, x).equal


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_layer_put_in_the_wrong_place_is_seen_though_rounding_hides_it(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merged layers in single precision are compared too; in half precision this one would pass."""

    def off(model: nn.Module, replacements: Sequence[Replacement], traces: Mapping[str, Trace]) -> nn.Module:
        changed = []
        for replacement in replacements:
            layer = copy.deepcopy(replacement.layer)
            if isinstance(layer, nn.Linear) and layer.in_features == 11:
                with torch.no_grad():
                    layer.weight[0, 0] += 2e-3
            changed.append(replace(replacement, layer=layer))
        return apply(model, changed, traces)

    model, x = adapted(dtype, torch.float32), torch.randn(5, 11).to(dtype)
    with monkeypatch.context() as patched:
        patched.setattr(convmerge.api, "apply", off)
        patched.setattr(convmerge.api, "unequal_in_single", lambda *_, **__: None)
        assert len(convmerge.fuse(model, x).report.merged()) == 2
    monkeypatch.setattr(convmerge.api, "apply", off)
    report = convmerge.fuse(model, x).report
    assert [site.modules[0].split(".")[0] for site in report.merged()] == ["2"]
    assert any("1 sites were dropped" in warning for warning in report.warnings), report.warnings


# --- What peft makes of its own adapters --------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str)
@pytest.mark.parametrize("mixed", [True, False], ids=["mixed", "half"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_weights_are_no_further_off_than_those_that_peft_merges(
    dtype: torch.dtype, mixed: bool, options: dict[str, bool]
) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(6)
    base = nn.Sequential(nn.Linear(23, 29), nn.Tanh(), nn.Linear(29, 19)).to(dtype)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["0", "2"], **options)
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=mixed).eval().requires_grad_(False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.05 * torch.randn(parameter.shape).to(parameter)
    exact, theirs = copy.deepcopy(model).double().merge_and_unload(), copy.deepcopy(model).merge_and_unload()
    ours = fused(model, torch.randn(5, 23).to(dtype)).model.get_submodule("base_model.model")
    for name in ("0", "2"):
        weight = exact.get_submodule(name).weight
        error, authors = (
            float((m.get_submodule(name).weight.double() - weight).norm()) for m in (ours, theirs)
        )
        assert error <= authors * (1 + 1e-9), (name, error, authors)
