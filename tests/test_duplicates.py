"""Channels that are exact copies or multiples of one another are computed once; all else stays as it is."""

from __future__ import annotations

import random

import pytest
import torch
from captured import assert_close
from models import Residual
from test_fuzz import SIZE, RandomModel
from torch import Tensor, nn

import convmerge
from convmerge.inputs import Inputs
from convmerge.passes import Prepared
from convmerge.passes.channels import copies
from convmerge.passes.duplicates import remove_duplicates

X = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(4)).double()


def copy_rows(layer: nn.Module, *rows: tuple[int, int, float]) -> nn.Module:
    """Make output k of a layer ``factor`` times output j, for every (k, j, factor)."""
    axis = int(isinstance(layer, nn.ConvTranspose2d))
    with torch.no_grad():
        for k, j, factor in rows:
            layer.weight.select(axis, k).copy_(factor * layer.weight.select(axis, j))
            if layer.bias is not None:
                layer.bias[k] = factor * layer.bias[j]
    return layer


def reduced(model: nn.Module, x: Tensor = X) -> Prepared:
    """The model without copies, found to be the same function."""
    prepared = remove_duplicates(model.eval(), Inputs((x,)), objective="macs")
    assert_close(prepared.model(x), model(x))
    return prepared


def widths(model: nn.Module) -> list[int]:
    layers = (m for m in model.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.Linear))
    return [getattr(layer, "out_channels", None) or layer.out_features for layer in layers]


@pytest.fixture(autouse=True)
def double() -> object:
    torch.manual_seed(7)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


BETWEEN = {
    "nothing": (nn.Identity(), {2.0, -1.0, 0.5, 1.0}),
    "relu": (nn.ReLU(), {2.0, 0.5, 1.0}),
    "leaky relu, max pool": (nn.Sequential(nn.LeakyReLU(), nn.MaxPool2d(2)), {2.0, 0.5, 1.0}),
    "average pool": (nn.AvgPool2d(3, 2, 1), {2.0, -1.0, 0.5, 1.0}),
    "gelu": (nn.GELU(), {1.0}),
    "sigmoid, plus one": (nn.Sequential(nn.Sigmoid(), nn.Hardswish()), {1.0}),
    "padding with ones": (nn.ConstantPad2d(1, 1.0), {1.0}),
}


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("factor", [2.0, -1.0, 0.5, 1.0])
def test_factors_and_what_stands_between(between: str, factor: float) -> None:
    layer, factors = BETWEEN[between]
    model = nn.Sequential(copy_rows(nn.Conv2d(3, 7, 3), (5, 1, factor)), layer, nn.Conv2d(7, 2, 3, padding=1))
    assert widths(reduced(model).model) == [6 if factor in factors else 7, 2]


LAYERS = {
    "transposed": lambda: (nn.ConvTranspose2d(3, 7, 3, 2), nn.ReLU(), nn.ConvTranspose2d(7, 2, 3)),
    "batch norm": lambda: (nn.Conv2d(3, 7, 3, bias=False), nn.BatchNorm2d(7), nn.SiLU(), nn.Conv2d(7, 2, 3)),
    "depthwise": lambda: (
        nn.Conv2d(3, 7, 3),
        nn.ReLU(),
        copy_rows(nn.Conv2d(7, 7, 3, padding=1, groups=7), (5, 1, 1.0)),
        nn.Tanh(),
        nn.Conv2d(7, 2, 1),
    ),
    "flattened": lambda: (nn.Conv2d(3, 7, 3), nn.GELU(), nn.Flatten(), nn.Linear(7 * 7 * 6, 2)),
    "pooled": lambda: (nn.Conv2d(3, 7, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 2)),
    "residual": lambda: (
        nn.Conv2d(3, 7, 3),
        Residual(copy_rows(nn.Conv2d(7, 7, 1), (5, 1, 1.0))),
        nn.Conv2d(7, 2, 1),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_hand_copies_on(name: str) -> None:
    layers = LAYERS[name]()
    model = nn.Sequential(copy_rows(layers[0], (5, 1, 1.0)), *layers[1:])
    assert widths(reduced(model).model)[0] == 6


def test_one_round_can_make_others_alike() -> None:
    first, second = copy_rows(nn.Conv2d(3, 7, 3), (5, 1, 1.0)), nn.Conv2d(7, 5, 3)
    with torch.no_grad():  # rows that read copies differently, and together the same
        second.weight[4] = second.weight[0]
        second.weight[4, 1] += 0.25
        second.weight[4, 5] -= 0.25
        second.weight.copy_((second.weight * 1024).round() / 1024)
        second.bias[4] = second.bias[0]
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Conv2d(5, 2, 1))
    assert widths(reduced(model).model) == [6, 4, 2]


def almost(layer: nn.Conv2d) -> nn.Conv2d:
    """One bit away from a copy."""
    with torch.no_grad():
        layer.weight[5] = layer.weight[1]
        layer.bias[5] = layer.bias[1]
        layer.weight[5, 2, 1, 1] = torch.nextafter(layer.weight[1, 2, 1, 1], torch.tensor(9.0))
    return layer


STAY = {
    "almost": (
        nn.Sequential(almost(nn.Conv2d(3, 7, 3).double()), nn.ReLU(), nn.Conv2d(7, 2, 1).double()),
        None,
    ),
    "returned": (nn.Sequential(nn.Conv2d(3, 7, 3).double()), "the model returns it"),
    "read apart": (
        nn.Sequential(nn.Conv2d(3, 7, 3), nn.Conv2d(7, 7, 3, groups=7), nn.Conv2d(7, 2, 1)).double(),
        "what is computed from them differs",
    ),
    "other groups": (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1, groups=2)).double(),
        "what is computed from them differs",
    ),
}


@pytest.mark.parametrize("name", STAY)
def test_what_stays_and_why(name: str) -> None:
    model, reason = STAY[name]
    if name != "almost":
        copy_rows(model[0], (5, 1, 1.0))
    prepared = reduced(model)
    assert prepared.model is model
    if reason is None:
        assert not prepared.sites
    else:
        (site,) = prepared.sites
        assert site.action == "refuse" and reason in site.reason
        assert site.geometry == f"1 of {model[0].out_channels} output channels are multiples of others"


class Focus(nn.Module):
    """Every other column of one map, side by side: the same channels, at other positions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 5, 1), nn.Conv2d(10, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(torch.cat([y[..., ::2], y[..., 1::2]], 1))


@pytest.mark.parametrize("model", [Focus(), nn.Sequential(nn.Conv2d(3, 4, 2), nn.PixelUnshuffle(1))])
def test_positions_of_a_channel_are_no_copies(model: nn.Module) -> None:
    copy_rows(next(iter(model.children())), (3, 1, 1.0))
    reduced(model.double())


@pytest.mark.parametrize("seed", range(8))
def test_random_copies_in_a_random_model(seed: int) -> None:
    rng, x = random.Random(seed), X
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    c, removed = 3, 0
    for _ in range(3):
        out = rng.choice([5, 7, 11])
        places = rng.sample(range(1, out), rng.choice([0, 1, 2]))
        layers += [copy_rows(nn.Conv2d(c, out, 3, padding=1), *((p, 0, 1.0) for p in places))]
        layers += [rng.choice([nn.ReLU(), nn.BatchNorm2d(out), nn.GELU()])]
        c, removed = out, removed + len(places)
    model = nn.Sequential(*layers, nn.Conv2d(c, 2, 1))
    before, after = sum(widths(model)), sum(widths(reduced(model, x).model))
    assert before - after == removed, f"seed {seed}: {model}"


def sprinkled(seed: int) -> tuple[nn.Module, Tensor]:
    """A random program of layers, branches and sums, with copies in most of its layers."""
    model, rng = RandomModel(seed).double().eval(), random.Random(seed)
    for module in model.modules():
        if not isinstance(module, nn.Conv2d | nn.ConvTranspose2d) or rng.random() < 0.2:
            continue
        outputs = module.weight.shape[int(isinstance(module, nn.ConvTranspose2d))]
        if outputs > 1:
            copy_rows(module, (*rng.sample(range(outputs), 2), rng.choice([1.0, 1.0, 2.0, -1.0, 0.5])))
    generator = torch.Generator().manual_seed(seed)
    return model, torch.randn(2, model.channels, SIZE, SIZE, generator=generator)


def exact_or_refused(seeds: range) -> int:
    """How many models became smaller, all of them being what they were."""
    smaller = 0
    for seed in seeds:
        model, x = sprinkled(seed)
        prepared = remove_duplicates(model, Inputs((x,)), objective="macs")
        with torch.no_grad():
            expected, found = model(x), prepared.model(x)
        apart = (expected - found).abs().max() / expected.abs().max().clamp_min(1e-300)
        assert apart < 1e-10, f"sprinkled({seed}): {apart:.1e}"
        smaller += prepared.model is not model
    return smaller


def test_random_programs_with_copies() -> None:
    assert exact_or_refused(range(10)) >= 3


@pytest.mark.long
def test_many_random_programs_with_copies() -> None:
    assert exact_or_refused(range(10, 160)) >= 60


def test_fuse_and_inspect_report_them() -> None:
    model = nn.Sequential(copy_rows(nn.Conv2d(3, 7, 3), (5, 1, 2.0)), nn.ReLU(), nn.Conv2d(7, 2, 3)).eval()
    result = convmerge.fuse(model, X, objective="macs")
    assert widths(result.model) == [6, 2]
    assert [s.reason for s in result.report.merged()] == [
        "Conv2d(3, 6, 3×3), without 1 output channels that were copies of others",
        "Conv2d(6, 2, 3×3), without 1 input channels that were copies of others",
    ]
    assert convmerge.inspect(model, X, objective="macs").merged()
    assert not convmerge.check(result.model, X, objective="macs").merged()
    assert widths(convmerge.fuse(model, X, objective="macs", skip=["2"]).model) == [7, 2]


@pytest.mark.parametrize(("copied", "stay"), [(6, True), (32, False)])
def test_a_few_copies_stay_where_time_counts(copied: int, stay: bool) -> None:
    """58 channels take a kernel with blocks of 16 as long as 64."""
    rows = ((64 - copied + i, i, 1.0) for i in range(copied))
    model = nn.Sequential(copy_rows(nn.Conv2d(3, 64, 3), *rows), nn.ReLU(), nn.Conv2d(64, 64, 3)).eval()
    prepared = remove_duplicates(model, Inputs((torch.randn(1, 3, 56, 56),)))
    assert (prepared.model is model) == stay
    assert {site.action for site in prepared.sites} == {"keep" if stay else "merge"}


def test_a_wrong_factor_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = copies._repeated
    wrong = lambda o, g: [copies.Copy(c.place, c.of, 1.5 * c.factor) for c in right(o, g)]  # noqa: E731
    monkeypatch.setattr(copies, "_repeated", wrong)
    model = nn.Sequential(copy_rows(nn.Conv2d(3, 7, 3), (5, 1, 2.0)), nn.ReLU(), nn.Conv2d(7, 2, 3)).eval()
    result = convmerge.fuse(model, X, objective="macs")
    assert widths(result.model) == [7, 2] and not result.report.merged()
    assert any("duplicates was left out" in warning for warning in result.report.warnings)
