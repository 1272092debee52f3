"""Two models side by side: figures that do not depend on the machine, and a clock of our own."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import convmerge
from convmerge.benchmark import peak_bytes, speedup
from convmerge.inputs import as_inputs


class Sleeper(nn.Module):
    """Takes the time it is told to, on a clock that others share."""

    def __init__(self, clock: "Clock", seconds: float) -> None:
        super().__init__()
        self.clock = clock
        self.takes = seconds

    def forward(self, x: Tensor) -> Tensor:
        self.clock.now += self.takes
        return x


class Clock:
    """Stands still unless a model runs."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_speedup_is_the_ratio_of_times_within_a_pair() -> None:
    clock = Clock()
    x = as_inputs(torch.zeros(2))
    found = speedup(Sleeper(clock, 0.3), Sleeper(clock, 0.1), x, pairs=5, clock=clock)
    assert found.median == pytest.approx(3.0)
    assert found.middle_half == pytest.approx((3.0, 3.0))
    assert found.seconds == pytest.approx((0.3, 0.1))
    assert found.threads == torch.get_num_threads()


def test_a_pass_that_is_too_short_to_time_is_repeated() -> None:
    clock = Clock()
    calls = itertools.count()

    class Counted(Sleeper):
        def forward(self, x: Tensor) -> Tensor:
            next(calls)
            return super().forward(x)

    speedup(Counted(clock, 2**-6), Sleeper(clock, 1.0), as_inputs(torch.zeros(2)), pairs=2, clock=clock)
    assert next(calls) == 2 + 2 * 4  # 4/64 s is the first multiple beyond 0.05 s


def test_peak_memory_counts_what_is_alive_at_one_time() -> None:
    floats = 4

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1000))

        def forward(self, x: Tensor) -> Tensor:
            a = x.repeat(100)  # 700
            b = a + 1  # 1400 alive
            del a
            c = b.view(7, 100)[:3]  # the same memory
            d = c * 2  # 300: 1000 alive
            del b, c
            d.add_(1)
            return d.sum() + self.weight[0]

    assert peak_bytes(Model(), as_inputs(torch.zeros(7))) == 1400 * floats


def test_bench_of_a_fused_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU())
    x = torch.randn(1, 3, 11, 13)
    threads = torch.get_num_threads()
    found = convmerge.bench(model, convmerge.fuse(model, x).model, x, pairs=2, threads=1)
    assert found.speedup.threads == 1 and torch.get_num_threads() == threads
    before, after = found.counts
    assert before.operators["batch_norm"] == 1 and "batch_norm" not in after.operators
    one_map = 5 * 9 * 11 * 4
    assert found.peak_bytes[0] >= found.peak_bytes[1] == 2 * one_map
    assert model.training, "the model itself is left as it was"


def test_a_model_that_does_not_run() -> None:
    model = nn.Conv2d(3, 5, 3)
    with pytest.raises(convmerge.ConvmergeError, match="does not run on these inputs: RuntimeError"):
        convmerge.bench(model, nn.Conv2d(4, 5, 3), torch.zeros(1, 3, 7, 7), pairs=2)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from convmerge.cli.main import main

    for name, channels in (("a.pt", 5), ("b.pt", 2)):
        torch.save(nn.Sequential(nn.Conv2d(3, channels, 3)), tmp_path / name)
    files = [str(tmp_path / name) for name in ("a.pt", "b.pt")]
    assert main(["bench", *files, "--input", "1,3,7,9", "--pairs", "2", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "peak memory" in out and "× as fast as A: middle half" in out and "1 thread" in out
    assert main(["bench", *files, "--input", "1,3,7,9", "--pairs", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["command"] == "bench" and report["speedup"]["median"] > 0
    assert report["peak_bytes"] == {"before": 5 * 5 * 7 * 4, "after": 2 * 5 * 7 * 4}
    assert main(["bench", *files, "--pairs", "1"]) == 2
    assert "pairs" in capsys.readouterr().err
