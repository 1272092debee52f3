"""Measured costs: what is timed and what not, how often, and that the measurement decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn

import convmerge
from convmerge.affine import Geometry
from convmerge.algebra.axis import POINT, Axis, from_axes
from convmerge.cli.main import main
from convmerge.cost.measure import HOPELESS, Measured, Subject, runnable
from convmerge.cost.model import ZERO, Cost, Roofline, operator_cost
from convmerge.cost.timing import Run, Stopwatch
from convmerge.emit import Emission, Layer, emissions

SAME = Axis(3, 1, 1, 1, 1, 1)


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, *seconds: float) -> Run:
        """A call that takes these times in turn, the last of them from then on."""
        left = list(seconds)

        def call() -> None:
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


def test_the_best_of_interleaved_rounds_counts() -> None:
    clock = Clock()
    disturbed = clock.takes(9.0, 9.0, 4.0, 2.0, 7.0, 2.0, 9.0)
    assert Stopwatch(clock=clock, burst=1e-9, least=5)([disturbed, clock.takes(3.0)]) == [2.0, 3.0]


def test_rounds_go_on_until_the_two_best_agree() -> None:
    clock, calls = Clock(), 0

    def settling() -> None:
        nonlocal calls
        calls += 1
        clock.now += max(1.0, 10.0 - calls)

    assert Stopwatch(clock=clock, burst=1e-9, least=2, most=50)([settling]) == [1.0]
    assert calls == 10  # the first one warms up; the ninth and tenth agree


def test_there_is_a_limit_to_the_rounds() -> None:
    clock, calls = Clock(), 0

    def ever_faster() -> None:
        nonlocal calls
        calls += 1
        clock.now += 0.5**calls

    Stopwatch(clock=clock, burst=1e-12, least=2, most=6)([ever_faster])
    assert calls == 7


class Timer:
    """Gives every call the time that ``seconds`` says, and remembers how many were timed together."""

    def __init__(self, seconds: Callable[[nn.Module], float]) -> None:
        self.seconds = seconds
        self.batches: list[int] = []

    def __call__(self, runs: Sequence[Run]) -> list[float]:
        self.batches.append(len(runs))
        return [self.seconds(_module(run)) for run in runs]


def _module(run: Run) -> nn.Module:
    (module,) = [c.cell_contents for c in run.__closure__ or () if isinstance(c.cell_contents, nn.Module)]  # type: ignore[attr-defined]
    return module


def weights_of(module: nn.Module) -> float:
    return 1e-6 * sum(p.numel() for p in module.parameters()) + 1e-7


def conv(into: int, out: int, axis: Axis = SAME, *, bias: bool = True) -> Geometry:
    return from_axes(into, out, 1, [axis, axis], bias)


def ways(model: Measured, g: Geometry, size: tuple[int, int], before: Cost) -> list[Cost]:
    return model.ways(emissions(g), size, batch=1, dtype=torch.float32, before=before)


def test_what_was_timed_is_not_timed_again_and_a_bias_makes_no_difference() -> None:
    timer = Timer(weights_of)
    model = Measured(timer)
    asked: dict[str, Any] = {"size": (9, 7), "batch": 1}
    first = model.operator("conv", 0, geometry=conv(5, 3), **asked)
    again = model.operator("conv", 0, geometry=conv(5, 3, bias=False), **asked)
    (merged,) = ways(model, conv(5, 3), (9, 7), first)
    assert timer.batches == [1]
    assert first.measured and again.measured and merged.measured
    assert first.latency == again.latency == merged.latency
    model.operator("conv", 0, geometry=conv(5, 3), size=(7, 9), batch=1)
    assert timer.batches == [1, 1]


def test_ways_are_timed_together_and_hopeless_ones_not_at_all() -> None:
    timer = Timer(weights_of)
    g = from_axes(16, 16, 1, [Axis(4, 2, 1, 1, 2, 2)] * 2, True)
    predicted = Roofline().ways(emissions(g), (32, 32), batch=1, dtype=torch.float32, before=ZERO)
    much, little = Cost(1.0, 10**9, 0), Cost(min(c.latency for c in predicted) / (2 * HOPELESS), 10**9, 0)
    costs = ways(Measured(timer), g, (32, 32), much)
    assert timer.batches[0] > 1
    assert sum(cost.measured for cost in costs) == timer.batches[0]
    assert not any(cost.measured for cost in ways(Measured(timer), g, (32, 32), little))
    assert len(timer.batches) == 1


def test_what_is_not_timed_is_predicted_at_the_scale_of_what_was() -> None:
    predicted = operator_cost("conv", 0, geometry=conv(5, 3), size=(9, 7)).latency
    model = Measured(Timer(lambda module: 3 * predicted))
    model.operator("conv", 0, geometry=conv(5, 3), size=(9, 7))
    unknown = model.operator("interpolate", 1000)
    assert not unknown.measured
    assert unknown.latency == pytest.approx(3 * operator_cost("interpolate", 1000).latency)


def test_no_measurement_begins_after_the_time_for_them() -> None:
    timer = Timer(weights_of)
    model = Measured(timer, seconds=0.0)
    assert model.exhausted
    assert not model.operator("conv", 0, geometry=conv(5, 3), size=(9, 7)).measured
    assert timer.batches == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "g"),
    [
        ("conv", conv(6, 4)),
        ("conv", from_axes(6, 4, 2, [Axis(2, 1, 2, 1, 1, 1)] * 2)),
        ("conv_transpose", from_axes(6, 4, 1, [Axis(4, 2, 1, 1, 2, 2)] * 2)),
        ("batch_norm", from_axes(6, 6, 6, [POINT, POINT], True)),
        ("layer_scale", from_axes(6, 6, 6, [POINT, POINT])),
        ("avg_pool", from_axes(6, 6, 6, [Axis(2, 1, 2, 1, 0, 0)] * 2)),
        ("nearest", from_axes(6, 6, 6, [Axis(2, 2, 1, 1, 1, 1)] * 2)),
        ("pixel_shuffle", from_axes(8, 2, 2, [Axis(2, 2, 1, 1, 1, 1)] * 2)),
        ("linear", Geometry.channelwise(6, 4, 1, 0, bias=True)),
    ],
)
def test_operators_run_on_the_maps_they_are_timed_on(name: str, g: Geometry, dtype: torch.dtype) -> None:
    size = (8, 6)[: g.spatial]
    shapes: list[tuple[int, ...]] = []

    def shape(module: nn.Module) -> float:
        module.register_forward_hook(lambda _, args, y: shapes.extend((args[0].shape, y.shape)))
        return 1.0

    def timer(runs: Sequence[Run]) -> list[float]:
        for run in runs:
            shape(_module(run))
            run()
        return [1.0 for _ in runs]

    cost = Measured(timer).operator(name, 0, geometry=g, size=size, batch=3, dtype=dtype)
    assert cost.measured and cost.latency == 1.0
    assert shapes == [(3, g.in_channels, *size), (3, g.out_channels, *g.out_size(size))]


def test_layers_of_a_way_run_one_after_the_other() -> None:
    g = conv(6, 4, Axis(3, 1, 1, 1, 0, 1))
    way: Emission = emissions(g)[0]
    assert [layer.kind for layer in way.layers] == ["pad", "conv"]
    y = runnable(Subject(way.layers, (9, 7), 2, torch.float32))()
    assert isinstance(y, Tensor) and y.shape == (2, 4, 8, 6)
    assert isinstance(way.layers[1], Layer)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[nn.Module], float]], None]:
    """Makes the library measure with a given function in place of a stopwatch."""

    def install(seconds: Callable[[nn.Module], float]) -> None:
        monkeypatch.setattr(Stopwatch, "__call__", lambda _, runs: Timer(seconds)(runs))

    return install


def low_rank() -> tuple[nn.Module, Tensor]:
    """A pair with as many MACs apart as in one: only time decides."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(12, 6, 1), nn.Conv2d(6, 12, 1)).eval(), torch.randn(1, 12, 9, 7)


@pytest.mark.parametrize(("one", "action"), [(1e-4, "merge"), (9e-4, "keep")])
def test_the_measurement_decides(
    timed: Callable[[Callable[[nn.Module], float]], None], one: float, action: str
) -> None:
    """Two convolutions of 4e-4 s each, or one."""
    timed(lambda module: one if next(module.parameters()).shape[:2] == (12, 12) else 4e-4)
    model, x = low_rank()
    result = convmerge.fuse(model, x, measure=True)
    (site,) = result.report.sites
    assert (site.action, site.measured) == (action, True)
    assert (site.latency_before, site.latency_after) == (8e-4, one)
    if action == "keep":
        assert site.reason == "costs more as one operator: 1.12× the measured time"
        assert result.report.saving is None
    else:
        assert result.report.saving is not None and result.report.saving.measured
        assert result.report.to_dict()["saving"] == {
            "latency_before": 8e-4,
            "latency_after": one,
            "measured": True,
        }


def test_predicted_savings_are_not_called_measured() -> None:
    report = convmerge.inspect(*low_rank())
    (site,) = report.sites
    assert not site.measured
    assert site.latency_before > 0


def test_the_report_compares_with_the_model_as_it_is() -> None:
    """Of three branches two could merge by themselves; what is saved counts from none of them merged."""
    model, x = models.build("repvgg")
    report = convmerge.inspect(model, x)
    assert report.before is not None
    (three,) = [site for site in report.merged() if site.tree[0] == "sum of 3 branches"][:1]
    assert three.macs_before > three.macs_after
    convs = sum(site.macs_before for site in report.merged())
    assert convs == report.before.macs


def test_the_command_line_says_what_was_measured(
    timed: Callable[[Callable[[nn.Module], float]], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    timed(lambda module: 1e-4 if next(module.parameters()).shape[:2] == (12, 12) else 4e-4)
    file = tmp_path / "model.pt"
    torch.save(low_rank()[0], file)
    words = [str(file), "--input", "1,12,9,7", "--measure"]
    assert main(["inspect", *words]) == 0
    printed = capsys.readouterr().out
    assert "one Conv2d(12, 12, 1×1): 8.00× faster, measured" in printed
    assert "merged places 800 µs → 100 µs (8.00× faster, measured)" in printed
    assert f"convmerge fuse {file}" in printed and "--measure" in printed.splitlines()[-1]
    assert main(["fuse", *words, "-n"]) == 0
    assert "merged places: 800 µs → 100 µs (8.00× faster, measured)" in capsys.readouterr().out
    assert main(["check", *words]) == 1
