"""Sites whose parts stand in different modules, in code around them that no trace can follow."""

from __future__ import annotations

import models
import pytest
import torch
import torch.nn.functional as F
from captured import assert_close, random, randomised
from test_rewrite import fused, reasons
from torch import Tensor, nn

import convmerge

MAP = (2, 6, 9, 12)
SIZES = (MAP, (1, 6, 8, 7), (3, 6, 12, 10))


class NormAct(nn.BatchNorm2d):
    """A batch norm and an activation in one forward."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        result: Tensor = self.act(y)
        return result


class ConvNormAct(nn.Module):
    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(i, o, 1, bias=False), NormAct(o)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x))
        return y


class Ragged(nn.Module):
    """Pads to multiples of three where it must: which way the code goes depends on the input's size."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(i, i, 3, padding=1), nn.Sequential(*models.conv_bn(i, o, 1))

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        if height % 3 or width % 3:
            x = F.interpolate(x, (height - height % 3 + 3, width - width % 3 + 3))
        y: Tensor = self.last(self.first(x).relu())
        return y


class Stages(nn.Module):
    def __init__(self, *stages: nn.Module) -> None:
        super().__init__()
        self.stages = nn.Sequential(*stages)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.stages(x)
        return y.cumsum(1)


def test_a_run_from_the_end_of_one_module_to_the_beginning_of_the_next() -> None:
    model = randomised(Stages(Ragged(6, 5), ConvNormAct(5, 7), nn.Conv2d(7, 3, 3)))
    result = fused(model, random(*MAP))
    calls = models.operators(result.model, random(*MAP))
    assert (calls["conv"], calls.get("batch_norm", 0)) == (3, 0), reasons(result)
    assert type(result.model.stages) is nn.Sequential
    assert type(result.model.stages[0]) is Ragged
    assert type(result.model.stages[1].norm) is nn.Sequential  # the activation, without code of its own
    assert [site.evidence for site in result.report.merged()] == ["observed"]
    for size in SIZES:
        x = random(*size, seed=1)
        with torch.no_grad():
            assert_close(result.model(x), model(x))


def test_identities_of_the_code_around_stay_where_they_are() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(11))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * (x * x.abs().mean(-1, keepdim=True))

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = Scaled(), nn.Linear(11, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            y = y[:, -3:] if x.shape[1] > 8 else y[:, slice(0, None)]
            result: Tensor = self.head(y)
            return result.relu()

    model = randomised(Decoder())
    result = fused(model, random(2, 7, 11))
    (site,) = result.report.merged()
    assert site.operators == ("mul", "linear")
    assert not any(name.startswith("norm") for name, _ in result.model.named_parameters())
    for length in (3, 7, 10):
        x = random(2, length, 11)
        with torch.no_grad():
            assert_close(result.model(x), model(x))


def test_a_module_that_other_calls_need_as_it_is_stays() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ragged, self.next = Ragged(6, 5), ConvNormAct(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.next(self.next(self.ragged(x)).tanh())
            return y

    result = fused(randomised(Twice()), random(*MAP))
    assert "next.norm is called 2 times with different neighbours" in reasons(result)
    assert models.operators(result.model, random(*MAP))["batch_norm"] == 2


def test_a_value_that_is_read_in_between_as_well_keeps_the_parts_apart() -> None:
    class Tapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ragged, self.next = Ragged(6, 5), ConvNormAct(5, 5)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.ragged(x)
            return self.next(y), y

    model, x = randomised(Tapped()), random(*MAP)
    result = convmerge.fuse(model, x)
    assert models.operators(result.model, x)["conv"] == 3
    with torch.no_grad():
        for mine, theirs in zip(result.model(x), model(x), strict=True):
            assert_close(mine, theirs)


@pytest.mark.long
def test_mobilevit_v2_keeps_no_batch_norm() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model, x = timm.create_model("mobilevitv2_050"), torch.randn(1, 3, 128, 128)
    result = fused(models.calibrate(model, x).double(), x.double())
    assert "batch_norm" not in models.operators(result.model, x.double()), reasons(result)
    before, after = result.report.before, result.report.after
    assert after.macs < 0.88 * before.macs


class Tokens(nn.Module):
    """Reads the number of channels off the map, and mixes its positions as tokens."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * channels)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        q, k, v = self.qkv(x.flatten(2).transpose(1, 2)).chunk(3, -1)
        return (q.sigmoid() * k.tanh() + v.relu()).reshape(batch, height * width, channels)


def test_views_meet_the_channels_that_code_may_have_read() -> None:
    model = randomised(nn.Sequential(nn.BatchNorm2d(512), Tokens(512)))
    result = fused(model, random(1, 512, 7, 7))
    assert isinstance(result.model[0], nn.Identity)
    x = random(2, 512, 8, 5)
    assert_close(result.model(x), model(x))
