"""Heads as convolutions: on every window of the map they start from they are what they were.

The reference here is independent of the package's: the head's own module, window by window in a loop.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import zoo
from models import Cat, Residual
from torch import Tensor, nn

import convmerge
from convmerge import ConvmergeError
from convmerge.cli.main import main
from convmerge.inputs import Inputs
from convmerge.passes import headrules
from convmerge.passes.fully_conv import fully_convolutional

TOLERANCE = 1e-10  # float64, relative
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
MAX = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
ADAPTIVE = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
ADAPTIVE_MAX = {1: nn.AdaptiveMaxPool1d, 2: nn.AdaptiveMaxPool2d, 3: nn.AdaptiveMaxPool3d}


class Do(nn.Module):
    """A function as a module: torch.fx sees through it."""

    def __init__(self, function, **constants: Tensor) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.function = function
        for name, value in constants.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.parameters())


class Net(nn.Module):
    """Features, then a head; with ``inline``, the flattening is in the code of the root."""

    def __init__(self, features: nn.Module, pool: nn.Module, flatten: str, head: nn.Module) -> None:
        super().__init__()
        self.features, self.pool, self.flatten, self.head = features, pool, flatten, head

    def tail(self, y: Tensor) -> Tensor:
        y = self.pool(y)
        if self.flatten == "view":
            y = y.view(y.size(0), -1)
        elif self.flatten == "reshape":
            y = y.reshape(y.shape[0], -1)
        elif self.flatten == "flatten":
            y = torch.flatten(y, 1)
        elif self.flatten == "squeeze":
            y = y.squeeze(-1).squeeze(-1)
        elif self.flatten == "constant":
            y = y.view(-1, y.shape[1:].numel())
        return self.head(y)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.features(x))


def windows(tail, y: Tensor, size: tuple[int, ...]) -> Tensor:  # type: ignore[no-untyped-def]
    """tail on every window of the map y: (N, F, *positions)."""
    counts = [n - s + 1 for n, s in zip(y.shape[2:], size, strict=True)]
    rows = []
    for at in itertools.product(*map(range, counts)):
        cut = (slice(None), slice(None), *(slice(p, p + s) for p, s in zip(at, size, strict=True)))
        rows.append(tail(y[cut].contiguous()))
    return torch.stack(rows, -1).unflatten(-1, counts)


def settle(model: nn.Module, seed: int) -> nn.Module:
    """Random statistics, float64, eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, tuple(NORM.values())) and module.track_running_stats:
            for tensor in (module.running_mean, module.weight.data, module.bias.data):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            module.running_var.uniform_(0.5, 2.0, generator=generator)
    return model.double().eval()


def random_net(seed: int) -> tuple[Net, Tensor, tuple[int, ...]]:
    """A random classifier, its input, and the size of the map before its head."""
    rng = random.Random(seed)
    n = rng.choice([1, 2, 2, 2, 3])
    c, size = rng.choice([3, 5]), tuple(rng.choice([2, 3, 4]) * rng.choice([1, 2]) for _ in range(n))
    padding = rng.choice([0, 1])
    features: list[nn.Module] = [
        CONV[n](2, c, 3, padding=padding),
        rng.choice([nn.ReLU(), nn.Tanh(), NORM[n](c)]),
    ]
    image = tuple(s + 2 - 2 * padding for s in size)
    if rng.random() < 0.4:
        features.append(MAX[n](2))
        image = tuple(2 * s + 2 - 2 * padding for s in size)
    pool, out = random_pool(rng, n, size)
    if out == (1,) * n and rng.random() < 0.5:
        pool = nn.Sequential(pool, CONV[n](c, 7, 1), nn.Hardswish())
        c = 7
    single = ["view", "reshape", "flatten", "constant"] + ["squeeze"] * (out == (1, 1))
    width = c * torch.Size(out).numel()
    return (
        Net(nn.Sequential(*features), pool, rng.choice(single), random_head(rng, width, n)),
        torch.randn(rng.choice([1, 2]), 2, *image, generator=torch.Generator().manual_seed(seed)).double(),
        size,
    )


def random_pool(rng: random.Random, n: int, size: tuple[int, ...]) -> tuple[nn.Module, tuple[int, ...]]:
    """Something that leaves the map or cells of it, and how many."""
    one = (1,) * n
    cells = tuple(s // 2 if s % 2 == 0 else s for s in size)
    axes = tuple(range(2, 2 + n))
    return rng.choice(
        [
            (nn.Identity(), size),
            (ADAPTIVE[n](size), size),
            (ADAPTIVE[n](cells), cells),
            (ADAPTIVE_MAX[n](cells), cells),
            (ADAPTIVE[n](1), one),
            (ADAPTIVE_MAX[n](1), one),
            (Do(lambda x: x.mean(axes, keepdim=True)), one),
            (Do(lambda x: x.amax(axes, keepdim=True) + 0.5 * x.mean(axes, keepdim=True)), one),
        ]
    )


def random_head(rng: random.Random, width: int, n: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Dropout()] if rng.random() < 0.3 else []
    for _ in range(rng.choice([1, 2, 3])):
        out = rng.choice([5, 7, 11])
        layers.append(nn.Linear(width, out, bias=rng.random() < 0.7))
        extra = rng.choice(["none", "relu", "norm", "prelu", "scale", "residual", "cat", "dropout", "twice"])
        if extra == "cat":
            layers.append(Cat(nn.Linear(out, 3), nn.Sequential(nn.Linear(out, 5), nn.ReLU())))
            out = 8
        layers += {
            "relu": [nn.ReLU(inplace=True)],
            "norm": [nn.BatchNorm1d(out), nn.GELU()],
            "prelu": [nn.PReLU(out)],
            "scale": [Do(lambda x, a, b: x * a - b, a=torch.randn(out), b=torch.randn(1, out))],
            "residual": [Residual(nn.Sequential(nn.Linear(out, out), nn.SiLU()))],
            "dropout": [nn.Dropout(0.3), nn.Flatten()],
            "twice": [Do(lambda x: F.relu(x) * torch.sigmoid(x) + 0.5)],
        }.get(extra, [])
        width = out
    return nn.Sequential(*layers, *rng.choice(LAST)())


LAST = [
    lambda: [],
    lambda: [nn.Softmax(1)],
    lambda: [nn.Softmax(-1)],
    lambda: [nn.LogSoftmax(dim=-1)],
    lambda: [nn.Sigmoid()],
    lambda: [Do(lambda x: F.normalize(x, dim=1))],
]


def convert(model: nn.Module, x: Tensor, average: bool = False) -> nn.Module:
    return fully_convolutional(model, Inputs((x,)), average).model


def assert_same(expected: Tensor, found: Tensor, what: str) -> None:
    assert expected.shape == found.shape, f"{what}: {tuple(expected.shape)}, {tuple(found.shape)}"
    apart = ((expected - found).abs().max() / expected.abs().max()).item()
    assert apart < TOLERANCE, f"{what}: {apart:.1e} apart"


@pytest.mark.parametrize("seed", range(24))
def test_a_random_head_is_the_original_on_every_window(seed: int) -> None:
    torch.manual_seed(seed)
    model, x, size = random_net(seed)
    settle(model, seed)
    what = f"random_net({seed}): {model}"
    with torch.no_grad():
        converted = convert(model, x)
        assert_same(windows(model.tail, model.features(x), size), converted(x), what)
        assert converted(x).flatten().shape == model(x).flatten().shape
        larger = torch.randn(x.shape[0], 2, *(s + 3 + 2 * i for i, s in enumerate(x.shape[2:]))).double()
        expected = windows(model.tail, model.features(larger), size)
        assert expected[0, 0].numel() > 1
        assert_same(expected, converted(larger), what)
        if isinstance(model.head[-1], nn.Linear | nn.ReLU | nn.Softmax | nn.LogSoftmax | nn.Sigmoid):
            average = convert(model, x, average=True)
            assert_same(expected.flatten(2).mean(2), average(larger), what)
            assert_same(model(x), average(x), what)


def classifier(*tail: nn.Module) -> nn.Sequential:
    """Unpadded, so that windows of the map are windows of the image, 2 apart."""
    head = tail or (nn.Flatten(), nn.Linear(5 * 3 * 2, 7), nn.ReLU(), nn.Linear(7, 3))
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.MaxPool2d(2), *head)
    return settle(model, 1)


IMAGE = torch.randn(1, 2, 8, 6, generator=torch.Generator().manual_seed(2)).double()


def test_windows_of_the_image_where_nothing_pads() -> None:
    model = classifier()
    result = convmerge.fuse(model, IMAGE, fully_conv=True)
    larger = torch.randn(2, 2, 14, 10).double()
    found = result.model(larger)
    assert found.shape == (2, 3, 4, 3)
    for i, j in itertools.product(range(4), range(3)):
        window = larger[:, :, 2 * i : 2 * i + 8, 2 * j : 2 * j + 6]
        assert_same(model(window), found[:, :, i, j], f"window {i}, {j}")
    (site,) = (s for s in result.report.sites if "window" in s.reason)
    assert "every window of 3×2 of this map and of 8×6 of the input, 2×2 apart" in site.reason
    padded = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), *model).double()
    (site,) = (s for s in convmerge.inspect(padded, IMAGE, fully_conv=True).sites if "window" in s.reason)
    assert site.reason.endswith("those of the input differ at their borders: 0 pads")


def test_a_large_head_is_no_slower_form_of_itself() -> None:
    """Its filter becomes one matrix product, the original's own, and takes every size all the same."""
    model = classifier(nn.Flatten(), nn.Linear(5 * 6 * 5, 211), nn.ReLU(), nn.Linear(211, 3))
    result = convmerge.fuse(model, torch.randn(1, 2, 14, 12).double(), fully_conv=True)
    (site,) = (s for s in result.report.sites if "UnfoldedConv2d(5, 211, 6×5)" in s.reason)
    assert site.latency_after < site.latency_before and site.macs_after == site.macs_before
    assert torch.equal(result.model.state_dict()["4.weight"], model[4].weight)
    larger = torch.randn(2, 2, 18, 19).double()
    with torch.no_grad():
        expected = windows(model[3:], model[:3](larger), (6, 5))
        assert_same(expected, result.model(larger), "map")


def test_weights_keep_their_numbers_names_and_dtype() -> None:
    model = classifier().bfloat16()
    model[4].requires_grad_(False)
    converted = convert(model, IMAGE.bfloat16())
    assert {n: p.dtype for n, p in converted.state_dict().items()} == {
        n: p.dtype for n, p in model.state_dict().items()
    }
    assert converted[4].weight.shape == (7, 5, 3, 2) and not converted[4].weight.requires_grad
    for name, value in model.state_dict().items():
        assert torch.equal(value.flatten(), converted.state_dict()[name].flatten()), name


def test_the_model_itself_is_not_changed() -> None:
    model = classifier()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = convmerge.fuse(model, IMAGE, fully_conv=True)
    assert [type(m) for m in model[3:]] == [nn.Flatten, nn.Linear, nn.ReLU, nn.Linear]
    with torch.no_grad():
        for parameter in result.model.parameters():
            parameter.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_flatten_in_the_roots_code_leaves_modules_in_a_row() -> None:
    model = settle(
        Net(nn.Sequential(nn.Conv2d(2, 5, 3)), nn.Identity(), "flatten", nn.Linear(5 * 6 * 4, 7)), 1
    )
    assert [name for name, _ in convert(model, IMAGE).named_children()] == ["features", "head"]


class TwoHeads(nn.Module):
    """Logits and an embedding, of the same pooled map, and the map itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.logits, self.embed = nn.Conv2d(2, 5, 3), nn.Linear(5, 3), nn.Linear(5, 7)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.conv(x).relu()
        pooled = y.mean((2, 3))
        return {"map": y, "logits": self.logits(pooled), "embed": self.embed(pooled).tanh(), "pooled": pooled}


def test_several_outputs() -> None:
    model = settle(TwoHeads(), 1)
    result = convmerge.fuse(model, IMAGE, fully_conv=True)
    larger = torch.randn(1, 2, 9, 8).double()
    found, y = result.model(larger), model.conv(larger).relu()
    assert_same(y, found["map"], "map")
    for name in ("logits", "embed", "pooled"):
        tail = {"pooled": lambda v: v.mean((2, 3))}.get(name)
        layer = {"logits": model.logits, "embed": lambda v: model.embed(v).tanh()}.get(name)
        expected = windows(tail or (lambda v, f=layer: f(v.mean((2, 3)))), y, (6, 4))
        assert_same(expected, found[name], name)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.position, self.fc = (
            nn.Conv2d(2, 5, 2, 2),
            nn.Parameter(torch.randn(12, 5)),
            nn.Linear(5, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.conv(x).flatten(2).transpose(1, 2) + self.position
        return self.fc(tokens.mean(1))


class WithNumbers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(2, 5, 3), nn.Linear(5 + 4, 3)

    def forward(self, x: Tensor, numbers: Tensor) -> Tensor:
        return self.fc(torch.cat([self.conv(x).mean((2, 3)), numbers], 1))


class Gated(nn.Module):
    """Squeeze and excitation: what was pooled goes back to the map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate = nn.Conv2d(2, 5, 3), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        gate = self.gate(y.mean((2, 3))).sigmoid()
        return y * gate[:, :, None, None], gate


FLAT = (nn.Flatten(), nn.Linear(30, 7))
REFUSED: dict[str, tuple[nn.Module, str]] = {
    "no map": (nn.Sequential(nn.Flatten(0, 2), nn.Linear(6, 3)), "which has no windows|axes"),
    "maps only": (nn.Sequential(nn.Conv2d(2, 3, 3)), "no output is a vector"),
    "unequal cells": (
        classifier(nn.AdaptiveAvgPool2d((2, 2)), nn.Flatten(), nn.Linear(20, 3)),
        "unequal sizes",
    ),
    "tokens": (Tokens(), "as of tokens"),
    "layer norm": (classifier(*FLAT, nn.LayerNorm(7)), "normalises the last axis"),
    "softmax over the batch": (classifier(*FLAT, nn.Softmax(0)), "does not work along the features"),
    "batch norm per position": (
        classifier(nn.Flatten(), nn.BatchNorm1d(30), nn.Linear(30, 3)),
        "every position",
    ),
    "batch statistics": (classifier(*FLAT, nn.BatchNorm1d(7, track_running_stats=False)), "statistics"),
    "mixes the batch": (classifier(*FLAT, Do(lambda x: x.view(-1))), "keep windows apart"),
    "permuted": (classifier(Do(lambda x: x.permute(0, 2, 3, 1)), *FLAT), "."),
    "features last": (classifier(*FLAT, Do(lambda x: x[..., 1:4])), "."),
    "gate": (Gated(), "is also read by"),
    "fixed size": (classifier(Do(lambda x: x.reshape(1, 5, 3, 2)), *FLAT), "fail on larger inputs"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_and_why(name: str) -> None:
    model, reason = REFUSED[name]
    batch = (
        IMAGE.expand(1, -1, -1, -1) if name in ("mixes the batch", "fixed size") else IMAGE.repeat(2, 1, 1, 1)
    )
    with pytest.raises(ConvmergeError, match=reason) as caught:
        convert(settle(model, 1), batch)
    assert caught.value.message.startswith("the head cannot become fully convolutional: ")
    assert caught.value.hint


def test_other_inputs_have_no_windows() -> None:
    with pytest.raises(ConvmergeError, match=re.escape("the input numbers directly")):
        fully_convolutional(settle(WithNumbers(), 1), Inputs((IMAGE, torch.randn(1, 4).double())))


def test_a_wrong_kernel_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and columns of the window swapped: right sizes, wrong function."""
    build = headrules._conv
    monkeypatch.setattr(headrules, "_conv", lambda w, *a: build(w.flip(2), *a))
    with pytest.raises(ConvmergeError, match="not the original's on windows"):
        convert(classifier(), IMAGE)


def test_average_is_for_fully_conv() -> None:
    with pytest.raises(ConvmergeError, match="average"):
        convmerge.fuse(classifier(), IMAGE, average=True)
    result = convmerge.fuse(classifier(), IMAGE, fully_conv=True, average=True)
    assert result.model(torch.randn(3, 2, 19, 17).double()).shape == (3, 3)
    ends_in_a_sum = classifier(*FLAT, Residual(nn.Linear(7, 7)))
    with pytest.raises(ConvmergeError, match="not averaged after add of 5; without --average"):
        convmerge.fuse(ends_in_a_sum, IMAGE, fully_conv=True, average=True)
    assert convmerge.fuse(ends_in_a_sum, IMAGE, fully_conv=True).report.verification.equal


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "model.pt", tmp_path / "map.pt"
    model = classifier().float()
    torch.save(model, source)
    command = ["fuse", str(source), "--input", "1,2,8,6", "-o", str(target), "--fully-conv"]
    assert main(command) == 0
    written = torch.load(target, weights_only=False)
    x = torch.randn(1, 2, 10, 6)
    assert written(x).shape == (1, 3, 2, 1)
    assert torch.allclose(written(x)[:, :, 1, 0], model(x[:, :, 2:]), atol=1e-5)
    assert main(["inspect", str(source), "--input", "1,2,8,6", "--fully-conv", "--average"]) == 0
    assert "--fully-conv --average" in capsys.readouterr().out


def test_nothing_is_written_where_no_head_can_be_rewritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "model.pt", tmp_path / "map.pt"
    torch.save(nn.Sequential(nn.Conv2d(2, 3, 3)), source)
    assert main(["fuse", str(source), "--input", "1,2,8,6", "-o", str(target), "--fully-conv"]) == 2
    assert not target.exists()
    error = capsys.readouterr().err
    assert "no output is a vector" in error and "hint: " in error


REAL: dict[str, tuple[str, Callable[[nn.Module, Tensor], Tensor]]] = {
    "alexnet": ("features", lambda m, y: m.classifier(m.avgpool(y).flatten(1))),
    "vgg11_bn": ("features", lambda m, y: m.classifier(m.avgpool(y).flatten(1))),
    "squeezenet1_1": ("features", lambda m, y: m.classifier(y).flatten(1)),
    "resnet18": ("layer4", lambda m, y: m.fc(m.avgpool(y).flatten(1))),
    "mobilenet_v2": ("features", lambda m, y: m.classifier(y.mean((2, 3)))),
    "densenet121": ("features", lambda m, y: m.classifier(y.relu().mean((2, 3)))),
    "googlenet": ("inception5b", lambda m, y: m.fc(m.avgpool(y).flatten(1))),
    "timm/resnet18": ("layer4", lambda m, y: m.fc(m.global_pool(y))),
    "timm/efficientnet_b0": ("bn2", lambda m, y: m.forward_head(y)),
    "timm/mobilenetv3_small_100": ("blocks", lambda m, y: m.forward_head(y)),
    "timm/convnext_atto": ("stages", lambda m, y: m.head(m.norm_pre(y))),
}


@pytest.mark.long
@pytest.mark.parametrize("name", REAL)
def test_real_models_on_windows_of_a_larger_image(name: str) -> None:
    path, tail = REAL[name]
    options = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    kind = name.removeprefix("timm/")
    model, _ = zoo.timm(kind, 224) if kind != name else zoo.torchvision(name, 224, **options)
    model.double().eval()
    with torch.no_grad():
        converted = convert(model, torch.randn(1, 3, 224, 224).double())
        maps: list[Tensor] = []
        model.get_submodule(path).register_forward_hook(lambda *found: maps.append(found[-1]))
        model(torch.randn(1, 3, 224, 224).double())
        larger = torch.randn(1, 3, 256, 320).double()
        found = converted(larger)
        model(larger)
        size = tuple(maps[0].shape[2:])
        expected = windows(lambda y: tail(model, y), maps[1], size)
    assert min(expected.shape[2:]) > 1
    assert_same(expected, found, name)
