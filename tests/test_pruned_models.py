"""Random pruned networks stay the same function, and real ones shrink by what their masks allow."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from silenced import TOLERANCE, RandomNet, apart, pruned_model, removed
from torch import Tensor, nn

from convmerge.inputs import as_inputs
from convmerge.passes.silenced import remove_silenced


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(11)


def runs(model: nn.Module, x: Tensor) -> bool:
    """Whether a model accepts an input of this size."""
    try:
        model(x)
    except RuntimeError:
        return False
    return True


def check_random(number: int) -> Counter[str]:
    """Refuse or exact, on the size that the channels were removed for and on another; and nothing is left."""
    model = RandomNet(number).double().eval()
    x = torch.randn(2, model.inputs, 12, 10, dtype=torch.float64)
    result = remove_silenced(model, as_inputs(x))
    assert apart(model, result.model, x) < TOLERANCE, f"RandomNet({number})"
    other = torch.randn(1, model.inputs, 16, 14, dtype=torch.float64)
    if runs(model, other):
        assert apart(model, result.model, other) < TOLERANCE, f"RandomNet({number}) on another size"
    assert all(site.reason for site in result.sites), f"RandomNet({number}): a site without a reason"
    counts = Counter(site.action for site in result.sites)
    counts["before"] = sum(p.numel() for p in model.parameters())
    counts["after"] = sum(p.numel() for p in result.model.parameters())
    return counts


def test_random_networks() -> None:
    counts: Counter[str] = Counter()
    for number in range(12):
        counts += check_random(number)
    assert counts["after"] < counts["before"] * 0.85
    assert counts["merge"] > counts["refuse"] / 2 > 0


@pytest.mark.long
def test_many_random_networks() -> None:
    counts: Counter[str] = Counter()
    for number in range(1000, 1600):
        counts += check_random(number)
    print(dict(counts))
    assert counts["after"] < counts["before"] * 0.85


def masked(layer: nn.Conv2d) -> Tensor:
    """Which output channels a mask has silenced."""
    return (layer.weight == 0).flatten(1).all(1)


def emitted(layer: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """What batch norm makes of the silenced channels."""
    bias = torch.zeros(layer.out_channels) if layer.bias is None else layer.bias
    return (bias - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias


def expected_vgg(model: nn.Module) -> list[int]:
    """Channels of the layers: those of no mask, and one where a constant would meet zero padding."""
    layers = list(model.features)
    places = [i for i, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)]
    counts = []
    for place in places:
        gone, value = masked(layers[place]), emitted(layers[place], layers[place + 1])
        one = bool((gone & (value > 0)).any()) and place != places[-1]
        counts.append(int((~gone).sum()) + one)
    return counts


def check_vgg(amount: float, *, last: bool) -> None:
    model = pruned_model("vgg16_bn", amount, last=last, head=61)
    result = removed(model, torch.randn(1, 3, 64, 64)).model
    found = [m.out_channels for m in result.features if isinstance(m, nn.Conv2d)]
    assert found == expected_vgg(model)
    assert result.classifier[0].in_features == 49 * found[-1]


def check_resnet(amount: float, *, last: bool) -> None:
    """Inside the blocks as in VGG; between them what is silenced in all layers that are added goes.

    There, each of the convolutions that pad may need one constant.
    """
    model = pruned_model("resnet18", amount, last=last)
    result = removed(model, torch.randn(1, 3, 96, 96)).model
    writers = [(model.conv1, None)]
    for stage in range(1, 5):
        blocks, shrunk = (getattr(m, f"layer{stage}") for m in (model, result))
        writers = writers if stage == 1 else [(blocks[0].downsample[0], None)]
        for block, after in zip(blocks, shrunk, strict=True):
            gone, value = masked(block.conv1), emitted(block.conv1, block.bn1)
            assert after.conv1.out_channels == int((~gone).sum()) + bool((gone & (value > 0)).any())
            writers.append((block.conv2, block.bn2))
        together = torch.stack([masked(conv) for conv, _ in writers]).all(0)
        needed, readers = int((~together).sum()), 2 if stage < 4 else 1
        assert needed <= shrunk[0].conv2.out_channels <= needed + readers
        assert shrunk[1].conv2.out_channels == shrunk[0].conv2.out_channels == shrunk[1].conv1.in_channels
    assert result.fc.in_features == result.layer4[1].conv2.out_channels


def check_mobilenet(amount: float, *, last: bool) -> None:
    """Expanded channels go if the depthwise layer is silenced there, or emits nothing but zeros."""
    model = pruned_model("mobilenet_v2", amount, last=last)
    result = removed(model, torch.randn(1, 3, 64, 64)).model
    trunk: list[tuple[list[nn.Conv2d], list[nn.Conv2d]]] = []
    for block, after in zip(model.features[2:-1], result.features[2:-1], strict=True):
        (expand, norm, _), (depthwise, _, _), project, _ = block.conv
        zero = masked(expand) & (emitted(expand, norm) <= 0)
        assert after.conv[1][0].out_channels == int((~(masked(depthwise) | zero)).sum())
        if block.use_res_connect:
            trunk[-1][0].append(project)
            trunk[-1][1].append(after.conv[2])
        else:
            trunk.append(([project], [after.conv[2]]))
    for before, shrunk in trunk:
        together = torch.stack([masked(layer) for layer in before]).all(0)
        assert {layer.out_channels for layer in shrunk} == {int((~together).sum())}
    assert result.classifier[1].in_features == int((~masked(model.features[-1][0])).sum())


CHECKS = {"vgg16_bn": check_vgg, "resnet18": check_resnet, "mobilenet_v2": check_mobilenet}


@pytest.mark.parametrize("name, amount, last", [("resnet18", 0.5, False), ("mobilenet_v2", 0.3, True)])
def test_models_shrink_by_what_the_masks_allow(name: str, amount: float, last: bool) -> None:
    CHECKS[name](amount, last=last)


@pytest.mark.long
@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("amount", [0.3, 0.5])
@pytest.mark.parametrize("last", [True, False])
def test_all_models_shrink_by_what_the_masks_allow(name: str, amount: float, last: bool) -> None:
    CHECKS[name](amount, last=last)
