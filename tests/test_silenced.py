"""Channels that masks or zeros have silenced: as many are removed as can be, and the function stays."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from silenced import Shuffled, randomise, removed
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import convmerge
from convmerge.inputs import as_inputs
from convmerge.passes import Prepared
from convmerge.passes.silenced import remove_silenced


def silence(layer: nn.Module, *channels: int, bias: float | None = None) -> nn.Module:
    """Zero weights for output channels; ``bias`` is what they emit."""
    with torch.no_grad():
        layer.weight[list(channels)] = 0
        if bias is not None:
            layer.bias[list(channels)] = bias
    return layer


def refusals(result: Prepared) -> str:
    return "\n".join(f"{s.place}: {s.reason}" for s in result.sites if s.action == "refuse")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(11)


X = torch.randn(2, 3, 11, 13)


def test_a_constant_goes_into_the_next_bias() -> None:
    model = nn.Sequential(silence(nn.Conv2d(3, 7, 3), 1, 4), nn.Sigmoid(), nn.Conv2d(7, 5, 3, bias=False))
    result = removed(model, X)
    first, _, second = result.model
    assert (first.out_channels, second.in_channels) == (5, 5) and second.bias is not None
    assert tuple(second.weight.shape) == (5, 5, 3, 3)
    assert [s.action for s in result.sites] == ["merge", "merge"]
    assert all(s.evidence == "static" and s.macs_after < s.macs_before for s in result.sites)


def test_zeros_go_under_padding_and_of_other_constants_one_stays() -> None:
    conv = silence(nn.Conv2d(3, 11, 3), 0, 3, 5, 8)
    with torch.no_grad():
        conv.bias[[0, 3, 5, 8]] = torch.tensor([-1.0, 2.0, -3.0, 0.5])
    model = nn.Sequential(conv, nn.ReLU(), nn.Conv2d(11, 5, 3, padding=1))
    result = removed(model, X)
    assert result.model[2].in_channels == 8
    assert "stands for all that meet the zero padding of 2" in refusals(result)
    padded = copy.deepcopy(model)
    padded[2].padding_mode, padded[2]._reversed_padding_repeated_twice = "circular", [1, 1, 1, 1]
    assert removed(padded, X).model[2].in_channels == 7


@pytest.mark.parametrize("padding", [0, 1])
def test_transposed_convolutions_need_a_constant_too(padding: int) -> None:
    conv = silence(nn.Conv2d(3, 7, 3), 1, 2, 4, bias=0.7)
    model = nn.Sequential(conv, nn.ConvTranspose2d(7, 6, 4, stride=2, padding=padding, bias=False))
    assert removed(model, X).model[1].in_channels == 5
    model[1].weight.data[:, 2] = 0
    assert removed(nn.Sequential(model, nn.Conv2d(6, 2, 1)), X).model[0][1].out_channels == 5


def test_unread_channels_need_not_be_computed() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), nn.ReLU(), nn.Conv2d(7, 5, 3, padding=1), nn.Sigmoid()
    )
    model[3].weight.data[:, [2, 5]] = 0
    result = removed(randomise(model), X)
    assert result.model[0].out_channels == result.model[1].num_features == 5
    assert result.model[3].bias is not None and result.model[3].out_channels == 5


def test_slimming_a_batch_norm_removes_what_is_in_front_of_it() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 7, 1), nn.Conv2d(7, 11, 3), nn.BatchNorm2d(11), nn.Softplus(), nn.Conv2d(11, 5, 3)
    )
    randomise(model)
    model[2].weight.data[[0, 1, 4]] = 0
    model[1].weight.data[[2, 3, 5, 6, 7, 8, 9, 10], 3] = 0  # the rest of input 3 is read for nothing
    result = removed(model, X).model
    assert (result[0].out_channels, result[1].out_channels, result[4].in_channels) == (6, 8, 8)


class Residual(nn.Module):
    def __init__(self, padding: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 7, 3, padding=1)
        self.a, self.b = nn.Conv2d(7, 11, 3, padding=padding), nn.Conv2d(11, 7, 3, padding=2 - padding)
        self.head = nn.Conv2d(7, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(torch.sigmoid(x + self.b(torch.tanh(self.a(x)))))


def test_added_channels_go_only_together() -> None:
    model = Residual()
    silence(model.stem, 1, 2, 5, bias=0.0)
    silence(model.b, 2, 5, 6)
    silence(model.a, 3, 4, bias=0.0)
    result = removed(model, X)
    assert [result.model.stem.out_channels, result.model.a.out_channels] == [5, 9]
    assert result.model.b.out_channels == result.model.head.in_channels == 5
    assert "add joins them with channels that vary" in refusals(result)


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 4, 3, padding=1)
        self.bn, self.c = nn.BatchNorm2d(9), nn.Conv2d(9, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        return self.c(torch.relu(self.bn(torch.cat([a, self.b(a)], 1))))


def test_concatenations_keep_places() -> None:
    model = randomise(Dense())
    silence(model.a, 1, bias=0.0)
    silence(model.b, 0, 3)
    result = removed(model, X).model
    assert (result.a.out_channels, result.b.out_channels, result.bn.num_features) == (4, 2, 6)
    silence(model.a, 2, bias=0.5)  # not zero where b pads, so it stays for b
    assert removed(model, X).model.bn.num_features == 6


class Chunks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 10, 3), nn.Conv2d(5, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x).chunk(2, 1)
        return self.b(a * b.sigmoid() + a)


class Apart(Chunks):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Conv2d(10, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x).chunk(2, 1)
        return self.b(torch.cat([b.sigmoid(), a], 1)[:, :, 1:])


class Halves(Chunks):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x[:, :5] * x[:, 5:].sigmoid())


def test_chunks_keep_equal_sizes_and_slices_their_places() -> None:
    model = Chunks()
    silence(model.a, 1, 2, bias=0.5)
    silence(model.a, 6, bias=0.5)
    assert removed(model, X).model.a.out_channels == 8
    apart = Apart()
    silence(apart.a, 1, 2, 6, bias=0.5)
    result = removed(apart, X)
    assert result.model.a.out_channels == 8 and "takes equal parts" in refusals(result)
    fixed = Halves()
    silence(fixed.a, 1, 6, bias=0.0)
    assert "slices channels at fixed places" in refusals(removed(fixed, X))


def test_grouped_convolutions_lose_whole_groups_or_as_many_in_each() -> None:
    def model() -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Conv2d(6, 9, 3, groups=3), nn.Tanh(), nn.Conv2d(9, 2, 1)
        )

    whole = model()
    silence(whole[2], 3, 4, 5)
    result = removed(whole, X).model
    assert (result[0].out_channels, result[2].groups, result[2].out_channels) == (4, 2, 6)
    even = model()
    silence(even[2], 1, 3, 8)
    result = removed(even, X).model
    assert (result[0].out_channels, result[2].groups, result[2].out_channels) == (6, 3, 6)
    uneven = model()
    silence(uneven[2], 1, 3)
    assert "the groups of 2 keep equal sizes" in refusals(removed(uneven, X))


@pytest.mark.parametrize("bias, stays", [(-1.0, False), (1.0, True)])
def test_depthwise_convolutions_end_a_constant_at_their_padding(bias: float, stays: bool) -> None:
    model = nn.Sequential(
        silence(nn.Conv2d(3, 7, 1), 2, bias=bias),
        nn.ReLU6(),
        silence(nn.Conv2d(7, 7, 3, padding=1, groups=7), 5),
        nn.Hardswish(),
        nn.Conv2d(7, 4, 1),
    )
    result = removed(model, X)
    assert result.model[2].groups == result.model[0].out_channels == (6 if stays else 5)
    assert ("2 pads with zeros where it is a constant" in refusals(result)) is stays


def test_squeeze_and_excitation() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 7, 3), nn.Conv2d(7, 3, 1)
            self.down, self.up = nn.Linear(7, 4), nn.Linear(4, 7)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            n, c, _, _ = x.size()
            gate = torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3))))))
            return self.b(x * gate.view(n, c, 1, 1).expand_as(x))

    model = Gated()
    silence(model.a, 1, bias=0.0)  # zero times anything
    silence(model.a, 3, bias=0.5)  # varies with its gate,
    silence(model.a, 4, bias=0.5)
    silence(model.up, 4)  # unless that is a constant
    silence(model.down, 2)
    result = removed(model, X)
    assert (result.model.a.out_channels, result.model.down.out_features) == (5, 3)
    assert "mul joins them with channels that vary" in refusals(result)

    class Fixed(Gated):
        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            gate = torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3))))))
            return self.b(x * gate.view(-1, 7, 1, 1))

    fixed = Fixed()
    silence(fixed.a, 1, bias=0.0)
    silence(fixed.down, 2)
    result = removed(fixed, X)
    assert (result.model.a.out_channels, result.model.down.out_features) == (7, 3)
    assert "view asks for a size of 7" in refusals(result)


def test_flattened_maps_lose_all_places_of_a_channel() -> None:
    model = nn.Sequential(
        silence(nn.Conv2d(3, 5, 3), 1, bias=0.3),
        nn.SiLU(),
        nn.AdaptiveMaxPool2d((3, 4)),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(60, 7, bias=False),
        nn.Softplus(),
        nn.Linear(7, 2),
    )
    silence(model[5], 2, 3)
    result = removed(model, X).model
    assert (result[0].out_channels, result[5].in_features, result[5].out_features) == (4, 48, 5)


@pytest.mark.parametrize(
    "layer, kept",
    [
        (nn.MaxPool2d(3, 2, 1), 5),
        (nn.AvgPool2d(3, 2), 5),
        (nn.AvgPool2d(3, 2, 1), 6),
        (nn.AvgPool2d(3, 2, 1, count_include_pad=False), 5),
        (nn.Upsample(scale_factor=2, mode="bilinear"), 5),
        (nn.ZeroPad2d(1), 6),
        (nn.ConstantPad2d(1, 0.5), 5),
        (nn.ReflectionPad2d(1), 5),
        (nn.PReLU(6), 5),
        (nn.InstanceNorm2d(6, affine=True), 6),
        (nn.GroupNorm(2, 6), 6),
        (nn.Softmax(2), 6),
        (nn.PixelShuffle(1), 5),
        (nn.Hardshrink(), 6),
        (nn.LogSigmoid(), 5),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_becomes_of_a_constant(layer: nn.Module, kept: int) -> None:
    model = nn.Sequential(silence(nn.Conv2d(3, 6, 1), 2, bias=0.5), layer, nn.Conv2d(6, 4, 1))
    assert removed(model, X).model[0].out_channels == kept


def test_shuffled_channels_go_in_every_group() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ChannelShuffle(2), nn.Conv2d(6, 4, 3))
    silence(model[0], 1, 4, 5)
    assert removed(model, X).model[0].out_channels == 4


@pytest.mark.parametrize("masked", [False, True])
def test_too_few_channels_to_be_faster_stay_for_latency_alone(masked: bool) -> None:
    """63 of 64 channels fill no fewer blocks, and take longer to lay out."""
    conv = nn.Conv2d(64, 64, 3, padding=1)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), conv, nn.ReLU(), nn.Conv2d(64, 64, 3)).eval()
    x = torch.randn(1, 3, 58, 58)
    if masked:
        prune.ln_structured(conv, "weight", 1, 2, 0)
        conv.bias.data.zero_()
    else:
        silence(conv, 3, bias=0.0)
    fused = {o: convmerge.fuse(model, x, objective=o) for o in ("latency", "macs", "params")}
    assert [result.model[2].out_channels for result in fused.values()] == [64, 63, 63]
    kept = [s for s in fused["latency"].report.sites if s.action == "keep"]
    assert [s.place for s in kept] == ["2", "4"] and "too few channels" in kept[0].reason
    assert not hasattr(fused["latency"].model[2], "weight_mask")
    silence(model[0], *range(32), bias=0.0)
    assert convmerge.fuse(model, x).model[2].out_channels == 63


@pytest.mark.parametrize("way", ["view", "sizes", "flatten", "back", "fewer"])
def test_shuffles_written_as_views(way: str) -> None:
    """Channels at equal places of the groups go, whatever numbers they emit."""
    model = nn.Sequential(nn.Conv2d(3, 10, 1), nn.Sigmoid(), Shuffled(2, way), nn.Conv2d(10, 4, 3))
    other = 2 if way in ("view", "sizes", "flatten") else 5
    silent = [3, 8, 1] if other == 2 else [6, 7, 1]
    silence(model[0], *silent)
    result = removed(model, X)
    assert result.model[0].out_channels == result.model[3].in_channels == 8
    assert not any("view" in s.reason for s in result.sites)


def test_a_shuffle_of_a_fixed_size_stays() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(-1, 2, 5, 11, 13).transpose(1, 2).reshape(-1, 10, 11, 13)

    model = nn.Sequential(nn.Conv2d(3, 10, 1), Fixed(), nn.Conv2d(10, 4, 3))
    silence(model[0], 3, 8)
    result = removed(model, X)
    assert "asks for a size of" in refusals(result) and result.model[0].out_channels == 10


def test_groups_on_an_axis_of_their_own_are_read_whole() -> None:
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.unflatten(1, (2, -1)).softmax(1).sum(1)

    model = nn.Sequential(nn.Conv2d(3, 10, 1), Attention(), nn.Conv2d(5, 4, 3))
    silence(model[0], 3, 8)
    assert "softmax reads groups of channels" in refusals(removed(model, X))


def test_a_layer_of_nothing_but_constants_keeps_one_channel() -> None:
    for model in (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1), nn.Conv2d(5, 2, 1)),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1)),
    ):
        silence(model[2], *range(len(model[2].weight)))
        result = removed(model, X).model
        assert [result[i].weight.shape[:2] for i in (0, 2, 3)] == [(1, 3), (1, 1), (2, 1)]


def test_masks_of_every_kind_become_weights() -> None:
    class Mask(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * (torch.arange(len(weight)) % 3 > 0).reshape(-1, 1, 1, 1)

    model = nn.Sequential(
        nn.Conv2d(3, 7, 3), nn.ReLU(), nn.Conv2d(7, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 1)
    )
    prune.ln_structured(model[0], "weight", 3, 2, 0)
    prune.l1_unstructured(model[0], "bias", 2)
    parametrize.register_parametrization(model[2], "weight", Mask())
    prune.l1_unstructured(model[4], "weight", 11)
    result = removed(randomise(model), X)
    shrunk = result.model
    assert [type(m) for m in shrunk] == [nn.Conv2d, nn.ReLU, nn.Conv2d, nn.BatchNorm2d, nn.Conv2d]
    assert (shrunk[2].out_channels, shrunk[4].in_channels) == (4, 4)
    assert all(list(dict(m.named_parameters())) == ["weight", "bias"] for m in (shrunk[0], shrunk[2]))
    assert not any("mask" in name or "param" in name or "orig" in name for name in shrunk.state_dict())
    assert not any(m._forward_pre_hooks for m in shrunk.modules())


def test_scattered_zeros_are_folded_and_said_not_to_be_removable() -> None:
    model = nn.Sequential(nn.Conv2d(3, 7, 3), nn.ReLU(), nn.Conv2d(7, 6, 3))
    pairs = [(model[0], "weight"), (model[2], "weight")]
    prune.global_unstructured(pairs, prune.L1Unstructured, amount=0.5)
    result = removed(model, X)
    assert [s.action for s in result.sites] == ["merge", "merge"]
    assert all("scattered" in s.reason for s in result.sites)
    assert sum(p.numel() for p in result.model.parameters()) == sum(p.numel() for p in model.parameters())
    assert not list(result.model.buffers())
    assert not removed(result.model, X).sites


def test_dtype_gradients_and_memory_format_stay() -> None:
    model = nn.Sequential(silence(nn.Conv2d(3, 8, 3), 1, 4), nn.SiLU(), nn.Conv2d(8, 5, 3))
    model = model.to(torch.bfloat16).to(memory_format=torch.channels_last).eval()
    model[2].requires_grad_(False)
    result = remove_silenced(model, as_inputs(X.bfloat16())).model
    assert {p.dtype for p in result.parameters()} == {torch.bfloat16}
    assert result[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert [p.requires_grad for p in result.parameters()] == [True, True, False, False]


def test_constants_that_overflow_as_a_bias_are_refused() -> None:
    model = nn.Sequential(silence(nn.Conv2d(3, 5, 1), 1, 2, bias=2.0), nn.Conv2d(5, 4, 1)).half().eval()
    model[1].weight.data[:, 1:3] = 3e4
    result = remove_silenced(model, as_inputs(X.half()))
    assert result.model is model and "too large for float16" in refusals(result)


def test_a_small_constant_does_not_stand_for_large_ones() -> None:
    head = nn.Conv2d(8, 2, 1)
    layers = [silence(nn.Conv2d(3, 7, 1), 1, 2, 4, bias=2.0), nn.Conv2d(7, 8, 3, padding=1), head]
    with torch.no_grad():
        layers[0].bias[2] = 1e-7
    result = removed(nn.Sequential(*layers), X).model
    assert result[1].in_channels == 5 and float(result[1].weight.detach().abs().max()) < 10


def test_hooks_on_the_whole_model_see_only_its_inputs_and_outputs() -> None:
    layers = [silence(nn.Conv2d(3, 5, 1), 1), nn.Conv2d(5, 5, 1), nn.ReLU(), nn.Conv2d(5, 3, 1), nn.ReLU()]
    model = nn.Sequential(nn.Identity(), nn.Sequential(*layers))
    silence(model[1][1], 2)
    model[1].register_forward_hook(lambda module, args, output: None)
    result = removed(model, X).model
    assert [m.out_channels for m in result[1] if isinstance(m, nn.Conv2d)] == [5, 4, 3]


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 5, 3), nn.Conv2d(5, 2, 1)
        silence(self.b, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(torch.relu(self.b(torch.relu(self.a(x))))))


class Tied(Twice):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.b(torch.relu(self.a(x))))
        return self.c(torch.conv2d(x, self.b.weight.flip(2)))


class Aliased(Twice):
    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x))
        half = x[:, :1]
        half.mul_(3)
        return self.c(x)


class Hooked(Twice):
    def __init__(self) -> None:
        super().__init__()
        self.b.register_forward_hook(lambda module, args, output: None)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)))


class Generated(Twice):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.conv2d(self.b(self.a(x)), self.c.weight * x.mean())
        return y


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = silence(nn.Conv1d(33, 5, 3), 1, 2)
        self.lstm = nn.LSTM(5, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(self.a(x.flatten(1, 2)).transpose(1, 2))[0]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = silence(nn.Linear(13, 8), 3, 5)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x.flatten(1, 2))
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize(
    "model, reason",
    [
        (Twice, "b.weight is read more than once"),
        (Tied, "the weight is computed in the model's code"),
        (Aliased, "reads memory that is written to under another name"),
        (Hooked, "b has hooks"),
        (Generated, "its weight depends on an input"),
        (Recurrent, "no rule for the channels of lstm"),
        (Attention, "a MultiheadAttention keeps its size"),
    ],
)
def test_what_is_left_alone_and_why(model: Callable[[], nn.Module], reason: str) -> None:
    result = removed(model(), X)
    assert not any(site.action == "merge" for site in result.sites)
    assert reason in refusals(result)


def test_shared_weights_stay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.Conv2d(5, 5, 1), nn.Conv2d(5, 5, 1), nn.Conv2d(5, 2, 1))
    silence(model[1], 1, 3)
    model[2].weight = model[1].weight
    result = removed(model, X)
    assert result.model[1].out_channels == result.model[2].in_channels == 5


def test_weights_of_the_models_own_code_shrink_where_they_are_plain() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.weight = nn.Conv2d(3, 5, 3), nn.Parameter(torch.randn(2, 5, 3, 3))
            self.gamma = nn.Parameter(torch.randn(1, 5, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return torch.conv2d(self.a(x) * self.gamma, self.weight)

    model = Scaled()
    silence(model.a, 1, bias=0.0)
    model.gamma.data[0, 3] = 0
    result = removed(model, X).model
    assert (result.gamma.shape[1], result.weight.shape[1], result.a.out_channels) == (3, 3, 3)
    silence(model.a, 4, bias=2.0)  # it has no bias that could take this constant
    assert removed(model, X).model.weight.shape[1] == 3


def test_models_that_are_only_seen_running_are_left_alone() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = silence(nn.Conv2d(3, 5, 3), 1, bias=0.0), nn.Conv2d(5, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            positive = float(x.sum()) > 0
            return self.b(self.a(x) if positive else -self.a(x))

    result = removed(Branching(), X)
    assert "torch.export cannot follow the model" in refusals(result)
    assert result.model.a.out_channels == 5


def test_only_and_skip() -> None:
    def model() -> nn.Sequential:
        layers = [silence(nn.Conv2d(3, 5, 1), 1), silence(nn.Conv2d(5, 5, 1), 2), nn.Conv2d(5, 3, 1)]
        return nn.Sequential(*layers)

    assert [m.out_channels for m in removed(model(), X, skip=("0",)).model] == [5, 4, 3]
    assert [m.out_channels for m in removed(model(), X, only=("0", "1")).model] == [4, 5, 3]


def test_models_without_silence_are_not_touched() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.Linear(13, 4)).double().eval()
    result = remove_silenced(model, as_inputs(X.double()))
    assert result.model is model and not result.sites


def test_fuse_inspect_and_check() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1)
    )
    prune.ln_structured(randomise(model)[0], "weight", 0.5, 2, 0)
    model.eval()
    assert any("channels that were silenced" in site.reason for site in convmerge.inspect(model, X).merged())
    result = convmerge.fuse(model, X)
    assert result.report.verification is not None and result.report.verification.equal
    assert result.report.after.macs < result.report.before.macs
    assert convmerge.verify(model, result.model, X).equal
    assert not convmerge.check(result.model, X).merged()
