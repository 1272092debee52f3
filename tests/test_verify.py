"""Verification raises no false alarms, and by itself catches every way in which a merge goes wrong."""

from __future__ import annotations

import copy
import math
import warnings
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass

import models
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convmerge.errors import ConvmergeError, Refusal
from convmerge.inputs import Inputs
from convmerge.verification.compare import FAIL, bisect, compare, probe, rounded_once

HALF = [torch.float32, torch.float16, torch.bfloat16]


def inputs(*args: object, **kwargs: object) -> Inputs:
    return Inputs(args, kwargs)


def folded(conv: nn.Conv2d, bn: nn.BatchNorm2d, *, eps: float | None = None) -> nn.Conv2d:
    """The conv with the batch norm folded in, in float64 and rounded once to the conv's dtype."""
    fused = copy.deepcopy(conv).double()
    scale = bn.weight.double() / (bn.running_var.double() + (bn.eps if eps is None else eps)).sqrt()
    bias = torch.zeros(len(scale)).double() if conv.bias is None else conv.bias.double()
    fused.weight = nn.Parameter(fused.weight * scale.reshape(-1, 1, 1, 1))
    fused.bias = nn.Parameter((bias - bn.running_mean.double()) * scale + bn.bias.double())
    return fused.to(conv.weight.dtype)


def random_conv_bn(seed: int) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(seed)
    pick = lambda *values: values[int(torch.randint(len(values), ()))]  # noqa: E731
    groups = pick(1, 1, 3)
    i, o, k = groups * pick(1, 5, 16), groups * pick(2, 7, 13), pick(1, 3, 5)
    conv = nn.Conv2d(i, o, k, pick(1, 2), pick(0, k // 2), groups=groups, bias=pick(True, False))
    x = torch.randn(2, i, pick(9, 14), pick(8, 11)) * pick(0.1, 1.0, 10.0)
    return nn.Sequential(*models.calibrate(nn.Sequential(conv, nn.BatchNorm2d(o)), x, seed=seed)), x


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_no_false_alarm_for_conv_and_batch_norm_folded_by_hand(dtype: torch.dtype) -> None:
    for seed in range(50):
        model, x = random_conv_bn(seed)
        model, x = model.to(dtype), x.to(dtype)
        verdict = compare(model, nn.Sequential(folded(*model)), inputs(x), seed=seed)
        assert verdict.equal, f"random_conv_bn({seed}) in {dtype}: {verdict}"
        assert verdict.comparisons[0].relative64 is not None


@pytest.mark.parametrize("dtype", [torch.float64, *HALF], ids=str)
def test_no_false_alarm_for_deep_models(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 61, 9, 11)
    pairs = [models.conv_bn(61, 61, 3, padding=1) for _ in range(20)]
    models.calibrate(nn.Sequential(*(nn.Sequential(pair, nn.ReLU()) for pair in pairs)), x)
    original = nn.Sequential(*(m for pair in pairs for m in (pair, nn.ReLU()))).to(dtype)
    fused = nn.Sequential(*(m for pair in pairs for m in (folded(*pair), nn.ReLU())))
    verdict = compare(original, fused, inputs(x.to(dtype)))
    assert verdict.equal
    ratio = verdict.comparisons[0].error_ratio
    assert ratio is not None
    assert 0.05 < ratio < 4, verdict


def test_no_false_alarm_for_a_single_output_number() -> None:
    for seed in range(40):
        model, x = random_conv_bn(seed)
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(model[0].out_channels, 1))
        original = nn.Sequential(*model, nn.ReLU(), *head)
        fused = nn.Sequential(folded(*model), nn.ReLU(), *head)
        verdict = compare(original, fused, inputs(x[:1]), seed=seed)
        assert verdict.equal, f"random_conv_bn({seed}) to one number: {verdict}"


# --- Mutants: each is what some fuser gets wrong, and must be caught by comparison alone --------------------


def two_convs(seed: int = 0) -> nn.Sequential:
    """A grouped conv with batch norm, a non-linearity, and a plain conv that pads."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(6, 10, (3, 5), padding=(1, 2), groups=2), nn.BatchNorm2d(10), nn.ReLU(), nn.Conv2d(10, 7, 3)
    )
    return models.calibrate(model, torch.randn(2, 6, 13, 15), seed=seed)


def fuse_two_convs(model: nn.Sequential, **wrong: float) -> nn.Sequential:
    return nn.Sequential(folded(model[0], model[1], **wrong), nn.ReLU(), copy.deepcopy(model[3]))


def mutate_one_weight(fused: nn.Sequential) -> None:
    fused[0].weight[3, 1, 2, 0] += 1e-3


def mutate_every_weight_slightly(fused: nn.Sequential) -> None:
    fused[0].weight *= 1 + 1e-5


def drop_bias(fused: nn.Sequential) -> None:
    fused[0].bias.zero_()


def shift_padding(fused: nn.Sequential) -> None:
    conv = fused[0]
    conv.padding = (0, 0)
    fused.insert(0, nn.ZeroPad2d((3, 1, 1, 1)))


def swap_kernel_axes(fused: nn.Sequential) -> None:
    fused[2].weight.copy_(fused[2].weight.transpose(2, 3).clone())


def flip_kernel(fused: nn.Sequential) -> None:
    fused[2].weight.copy_(fused[2].weight.flip(2, 3))


def swap_groups(fused: nn.Sequential) -> None:
    fused[0].weight.copy_(fused[0].weight.roll(5, 0))


def swap_two_channels(fused: nn.Sequential) -> None:
    fused[2].weight.copy_(fused[2].weight[:, [1, 0, *range(2, 10)]])


def ignore_border(fused: nn.Sequential) -> None:
    fused[0].padding_mode = "replicate"
    fused[0]._reversed_padding_repeated_twice = [2, 2, 1, 1]


MUTANTS: list[Callable[[nn.Sequential], None]] = [
    mutate_one_weight,
    mutate_every_weight_slightly,
    drop_bias,
    shift_padding,
    swap_kernel_axes,
    flip_kernel,
    swap_groups,
    swap_two_channels,
    ignore_border,
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("mutate", MUTANTS, ids=lambda f: f.__name__)
def test_mutant_is_caught(mutate: Callable[[nn.Sequential], None], dtype: torch.dtype) -> None:
    model = two_convs().to(dtype)
    x = torch.randn(1, 6, 13, 15, generator=torch.Generator().manual_seed(1), dtype=dtype)
    fused = fuse_two_convs(model)
    assert compare(model, fused, inputs(x)).equal
    with torch.no_grad():
        mutate(fused)
    verdict = compare(model, fused, inputs(x))
    assert not verdict.equal, verdict
    assert verdict.reason


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_forgotten_eps_is_caught(dtype: torch.dtype) -> None:
    model = two_convs().to(dtype)
    with torch.no_grad():
        model[1].running_var.mul_(0.1)
    x = torch.randn(1, 6, 13, 15, dtype=dtype)
    assert not compare(model, fuse_two_convs(model, eps=0.0), inputs(x)).equal


def test_mistakes_that_show_only_at_another_batch_or_size_are_caught() -> None:
    class FixedSize(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3)) * (x.shape[2] * x.shape[3]) / (14 * 18)

    class FirstSample(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:1].mean((2, 3)).expand(len(x), -1)

    class Baked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(1, 5, 14 * 18).mean(2)

    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3))

    x = torch.randn(1, 5, 14, 18)
    for other in (FixedSize(), FirstSample()):
        assert compare(Mean(), other, inputs(x), more=False).equal
        assert not compare(Mean(), other, inputs(x)).equal
    verdict = compare(Mean(), Baked(), inputs(x))
    assert not verdict.equal
    assert "the other fails" in verdict.reason
    assert "on 1×5×9×11" in verdict.reason


def test_variants_that_the_original_refuses_are_dropped_and_named() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(5 * 6 * 7, 3))
    verdict = compare(model, copy.deepcopy(model), inputs(torch.randn(1, 5, 6, 7)))
    assert verdict.equal
    assert [c.inputs for c in verdict.comparisons] == ["1×5×6×7", "3×5×6×7"]
    assert "other spatial sizes" in verdict.reason


# --- What models return -------------------------------------------------------------------------------------

Pair = namedtuple("Pair", "first second")


@dataclass
class Output:
    logits: Tensor
    hidden: tuple[Tensor, ...] | None = None


class Returning(nn.Module):
    """Applies a linear layer and returns the result in some wrapping."""

    def __init__(self, wrap: Callable[[Tensor], object], seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(7, 5)
        self.wrap = wrap

    def forward(self, x: Tensor) -> object:
        return self.wrap(self.linear(x))


WRAPPINGS: dict[str, Callable[[Tensor], object]] = {
    "tuple": lambda y: (y, y.sum()),
    "nested": lambda y: [{"a": (y, None)}, "text", 3],
    "named tuple": lambda y: Pair(y, [y.exp()]),
    "dataclass": lambda y: Output(y, (y, y * 2)),
    "complex": lambda y: torch.fft.fft(y),
    "python number": lambda y: {"norm": y.norm().item()},
    "boolean and integer": lambda y: (y > 0, y.argmax(-1), y),
    "empty": lambda y: (y, y[:0]),
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_any_structure_of_outputs_is_compared(wrapping: str) -> None:
    x = torch.randn(2, 7)
    model = Returning(WRAPPINGS[wrapping])
    assert compare(model, copy.deepcopy(model), inputs(x)).equal
    assert not compare(model, Returning(WRAPPINGS[wrapping], seed=1), inputs(x)).equal


def test_transformers_outputs_are_compared() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    wrap = lambda y: outputs.BaseModelOutput(last_hidden_state=y, hidden_states=(y, y + 1))  # noqa: E731
    x = torch.randn(2, 7)
    assert compare(Returning(wrap), Returning(wrap), inputs(x)).equal
    assert not compare(Returning(wrap), Returning(wrap, seed=1), inputs(x)).equal


@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (lambda y: (y, y), "built differently"),
        (lambda y: y[:, :3], "2×5 in the original and 2×3"),
        (lambda y: y.half(), "float32 in the original and float16"),
        (lambda y: None, "a 2×5 tensor in the original and None"),
    ],
)
def test_another_structure_is_a_clear_reason(wrap: Callable[[Tensor], object], words: str) -> None:
    verdict = compare(Returning(lambda y: y), Returning(wrap), inputs(torch.randn(2, 7)))
    assert not verdict.equal
    assert words in verdict.reason


def test_a_list_is_as_good_as_a_tuple() -> None:
    x = torch.randn(2, 7)
    assert compare(Returning(lambda y: (y, y)), Returning(lambda y: [y, y]), inputs(x)).equal


def test_nan_and_infinities_must_be_in_the_same_places() -> None:
    x = torch.randn(3, 7)
    log = Returning(lambda y: y.log())
    assert compare(log, Returning(lambda y: y.log()), inputs(x)).equal
    verdict = compare(log, Returning(lambda y: y.log().nan_to_num(0.5)), inputs(x))
    assert not verdict.equal
    assert "NaN" in verdict.reason


def test_an_overflow_that_the_other_model_avoids_is_no_difference() -> None:
    class Scaled(nn.Module):
        def __init__(self, first: float, second: float) -> None:
            super().__init__()
            self.first, self.second = nn.Parameter(torch.tensor(first)), nn.Parameter(torch.tensor(second))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.first * self.second

    x = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).half()
    overflowing = Scaled(2.0**15, 2.0**-15).half()
    assert not bool(overflowing(x).isfinite().all())
    assert compare(overflowing, Scaled(1.0, 1.0).half(), inputs(x)).equal
    assert not compare(Scaled(1.0, 1.0).half(), overflowing, inputs(x)).equal


def test_argmax_of_near_ties_may_differ_where_rounding_decides() -> None:
    class Labels(nn.Module):
        def __init__(self, order: slice) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.weight, self.order = nn.Parameter(torch.randn(3, 40)), order

        def forward(self, x: Tensor) -> Tensor:
            terms = (x.unsqueeze(-2) * self.weight)[..., self.order]
            y = terms.cumsum(-1)[..., -1]  # one term after the other
            return torch.stack([y[..., 0], y[..., 0] * (1 + 1e-7)], -1).argmax(-1)

    class Reversed(Labels):
        def forward(self, x: Tensor) -> Tensor:
            terms = (x.unsqueeze(-2) * self.weight).flip(-1)
            y = terms.cumsum(-1)[..., -1]
            return torch.stack([y[..., 0], y[..., 0] * (1 + 1e-7)], -1).argmax(-1)

    x = torch.randn(50, 40)
    assert compare(Labels(slice(None)), Reversed(slice(None)), inputs(x)).equal
    assert not compare(Labels(slice(None)), Labels(slice(0, 20)), inputs(x)).equal


def test_wrong_labels_are_caught() -> None:
    x = torch.randn(20, 7)
    labels = lambda y: y.argmax(-1)  # noqa: E731
    verdict = compare(Returning(labels), Returning(labels, seed=1), inputs(x))
    assert not verdict.equal
    assert "int64" in verdict.reason


# --- No verdict ---------------------------------------------------------------------------------------------


def test_a_random_original_gives_no_verdict() -> None:
    model = nn.Sequential(nn.Linear(7, 5), _Function(lambda x: F.dropout(x, 0.5, training=True)))
    with pytest.raises(ConvmergeError, match="not a function of its inputs"):
        compare(model, model, inputs(torch.randn(3, 7)))


def test_an_original_that_counts_its_calls_gives_no_verdict() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x * self.calls

    model = Counting()
    with pytest.raises(ConvmergeError, match="not a function of its inputs"):
        compare(model, model, inputs(torch.randn(3, 7)))
    assert model.calls == 0


def test_an_original_that_does_not_run_gives_no_verdict() -> None:
    with pytest.raises(ConvmergeError, match="does not run on 3×8"):
        compare(nn.Linear(7, 5), nn.Linear(7, 5), inputs(torch.randn(3, 8)))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_output_without_a_finite_number_gives_no_verdict(value: float) -> None:
    model = _Function(lambda x: torch.full_like(x, value))
    with pytest.raises(ConvmergeError, match="only NaN"):
        compare(model, model, inputs(torch.randn(3, 7)))


class _Function(nn.Module):
    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.function(*args, **kwargs)


# --- Without float64, with side effects, with odd inputs ----------------------------------------------------


class ForcesFloat32(nn.Module):
    """A conv behind a cast that breaks in a float64 model, as hard-coded dtypes do."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.float())


class ReturnsFloat32(ForcesFloat32):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).float()


@pytest.mark.parametrize("kind", [ForcesFloat32, ReturnsFloat32])
def test_models_that_do_not_run_in_float64_are_still_judged(kind: type[ForcesFloat32]) -> None:
    for seed in range(10):
        model, x = random_conv_bn(seed)
        right, wrong = nn.Sequential(folded(*model)), nn.Sequential(folded(*model))
        with torch.no_grad():
            wrong[0].weight[0] *= 1.0001
        verdict = compare(kind(model), kind(right), inputs(x))
        assert verdict.equal, f"random_conv_bn({seed}): {verdict}"
        assert "float64" in verdict.reason
        assert not compare(kind(model), kind(wrong), inputs(x)).equal


def test_models_and_inputs_are_left_alone() -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(7)

        def forward(self, x: Tensor) -> Tensor:
            x.mul_(2)
            return self.norm(x)

    model, x = Writing().train(), torch.randn(3, 7)
    before, kept, random_state = copy.deepcopy(model.state_dict()), x.clone(), torch.get_rng_state()
    assert compare(model, model, inputs(x)).equal
    assert model.training
    assert torch.equal(x, kept)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_weights_that_are_computed_or_plain_attributes_are_run_in_float64_too() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(0))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.kernel)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        computed = nn.utils.weight_norm(nn.Conv2d(3, 5, 3))
    for model in (Plain(), computed):
        verdict = compare(model, model, inputs(torch.randn(1, 3, 8, 9)))
        assert verdict.equal
        assert verdict.comparisons[0].relative64 == 0


def test_integer_inputs_keep_their_range() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table = nn.Embedding(11, 5)

        def forward(self, ids: Tensor, *, mask: Tensor) -> Tensor:
            return self.table(ids) * mask.unsqueeze(-1)

    model, ids = Tokens(), torch.tensor([[10, 3, 7, 1]])
    verdict = compare(
        model, copy.deepcopy(model), inputs(ids, mask=torch.tensor([[True, True, False, True]]))
    )
    assert verdict.equal
    assert [c.inputs for c in verdict.comparisons] == ["1×4, 1×4", "1×3, 1×3", "3×3, 3×3"]


def test_constant_example_inputs_do_not_hide_a_wrong_weight() -> None:
    model = nn.Conv2d(3, 5, 3)
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong.weight.copy_(wrong.weight.flip(2, 3))
    for x in (torch.zeros(1, 3, 9, 11), torch.ones(1, 3, 9, 11)):
        assert compare(model, wrong, inputs(x), more=False).equal
        assert not compare(model, wrong, inputs(x)).equal


def test_a_model_that_amplifies_rounding_to_the_size_of_its_output_is_named_as_such() -> None:
    class Chaotic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(3.9))

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(60):
                x = self.gain * x * (1 - x)
            return x

    class Rearranged(Chaotic):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(60):
                x = self.gain * (x - x * x)
            return x

    verdict = compare(Chaotic(), Rearranged(), inputs(torch.rand(1, 500)))
    assert verdict.equal
    assert "only the comparison in float64 tells much" in verdict.reason


def test_the_ratio_does_not_depend_on_the_seed_of_the_caller_but_on_its_own() -> None:
    model, x = random_conv_bn(3)
    fused = nn.Sequential(folded(*model))
    first = compare(model, fused, inputs(x), seed=5)
    torch.manual_seed(99)
    assert compare(model, fused, inputs(x), seed=5) == first


def test_few_float64_passes() -> None:
    passes = []

    class Watching(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor) -> Tensor:
            passes.append((x.dtype, x.numel()))
            return self.module(x)

    model, x = random_conv_bn(1)
    assert compare(Watching(model), Watching(nn.Sequential(folded(*model))), inputs(x)).equal
    double = [numel for dtype, numel in passes if dtype == torch.float64]
    assert len(double) <= 5
    assert sum(double) < 4 * x.numel()


# --- One merge: probe ---------------------------------------------------------------------------------------


def chain(w1: Tensor, w2: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: F.conv2d(F.conv2d(x, w1), w2)


def composed(w1: Tensor, w2: Tensor) -> Tensor:
    """The kernel of conv w2 after conv w1, both without padding."""
    pad = [n - 1 for n in w2.shape[2:]]
    return F.conv2d(w1.transpose(0, 1), w2.flip(2, 3), padding=pad).transpose(0, 1).contiguous()


@pytest.mark.parametrize("seed", range(5))
def test_a_right_merge_stays_within_the_bound_and_one_wrong_tap_does_not(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    w1 = torch.randn(16, 64, 3, 3, generator=generator, dtype=torch.float64)
    w2 = torch.randn(64, 16, 3, 3, generator=generator, dtype=torch.float64)
    merged = composed(w1, w2)
    assert merged.numel() > 100_000
    sides = {"magnitude": chain(w1.abs(), w2.abs()), "terms": 64 * 9 + 16 * 9, "seed": seed}
    shapes = [(1, 64, 12, 13), (1, 64, 7, 8)]
    right = probe(chain(w1, w2), lambda x: F.conv2d(x, merged), shapes=shapes, **sides)
    assert right.exact, right
    assert 0 < right.error < right.bound
    at = merged.abs().flatten().argsort()[merged.numel() // 2]  # a weight of middling size
    merged.view(-1)[at] *= 1 + 1e-8
    wrong = probe(chain(w1, w2), lambda x: F.conv2d(x, merged), shapes=shapes, **sides)
    assert not wrong.exact, wrong


@pytest.mark.parametrize("name", ["eps", "bias", "padding", "flip", "border"])
def test_probe_alone_catches_mutants(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(5, 3, 3, 5, generator=generator, dtype=torch.float64)
    bias = torch.randn(5, generator=generator, dtype=torch.float64)
    gain = 1 / (1.3 + 1e-5) ** 0.5

    def right(x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (2, 2, 1, 1)), weight * gain, bias * gain)

    mutants: dict[str, Callable[[Tensor], Tensor]] = {
        "eps": lambda x: F.conv2d(x, weight / 1.3**0.5, bias / 1.3**0.5, padding=(1, 2)),
        "bias": lambda x: F.conv2d(x, weight * gain, padding=(1, 2)),
        "padding": lambda x: F.conv2d(F.pad(x, (3, 1, 1, 1)), weight * gain, bias * gain),
        "flip": lambda x: F.conv2d(x, weight.flip(3) * gain, bias * gain, padding=(1, 2)),
        "border": lambda x: F.conv2d(F.pad(x, (2, 2, 1, 1), "replicate"), weight * gain, bias * gain),
    }

    def original(x: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, padding=(1, 2)) * gain

    def magnitude(x: Tensor) -> Tensor:
        return F.conv2d(x, weight.abs(), bias.abs(), padding=(1, 2)) * gain

    shapes = [(1, 3, 9, 8), (1, 3, 3, 5)]
    assert probe(original, right, magnitude, shapes, terms=47, seed=0).exact
    assert not probe(original, mutants[name], magnitude, shapes, terms=47, seed=0).exact


def test_probe_skips_what_the_original_refuses_and_refuses_what_the_merge_fails_on() -> None:
    weight = torch.randn(5, 3, 3, 3, dtype=torch.float64)
    conv, magnitude = lambda x: F.conv2d(x, weight), lambda x: F.conv2d(x, weight.abs())
    assert probe(conv, conv, magnitude, [(1, 3, 2, 2), (1, 3, 8, 9)], terms=27, seed=0).shape == (1, 3, 8, 9)
    with pytest.raises(Refusal, match="none of the shapes"):
        probe(conv, conv, magnitude, [(1, 3, 2, 2)], terms=27, seed=0)
    with pytest.raises(Refusal, match="1×5×8×8 for 1×5×6×6"):
        probe(conv, lambda x: F.conv2d(x, weight, padding=1), magnitude, [(1, 3, 8, 8)], terms=27, seed=0)
    with pytest.raises(Refusal, match="fails on 1×3×8×8"):
        probe(conv, lambda x: x.reshape(2, 5), magnitude, [(1, 3, 8, 8)], terms=27, seed=0)
    assert not probe(conv, lambda x: conv(x) * math.nan, magnitude, [(1, 3, 8, 8)], terms=27, seed=0).exact


# --- Weights rounded once -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, *HALF], ids=str)
def test_rounding_once_passes_and_rounding_twice_or_elsewhere_does_not(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    exact = nn.Conv2d(7, 11, 3).double()
    rounded_once(copy.deepcopy(exact).to(dtype), exact)
    off = copy.deepcopy(exact).to(dtype)
    with torch.no_grad():
        off.weight[1, 2, 1, 1] *= 1 + 2 * torch.finfo(dtype).eps
    with pytest.raises(Refusal, match="weight is not its float64 value rounded once"):
        rounded_once(off, exact)


def test_weights_out_of_range_are_refused() -> None:
    exact = nn.Conv2d(7, 11, 3).double()
    with torch.no_grad():
        exact.weight *= 1e6
    with pytest.raises(Refusal, match="more than float16 can hold"):
        rounded_once(copy.deepcopy(exact).half(), exact)
    with torch.no_grad():
        exact.weight *= 1e-14
    with pytest.raises(Refusal, match="too small for float16"):
        rounded_once(copy.deepcopy(exact).half(), exact)


def test_a_few_small_weights_among_others_are_fine_in_half_precision() -> None:
    exact = nn.Conv2d(7, 11, 3).double()
    with torch.no_grad():
        exact.weight[0] *= 1e-6
        exact.weight[1] = 0
    rounded_once(copy.deepcopy(exact).half(), exact)


# --- Bisection ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guilty", [[0], [36], [17], [3, 20], [0, 1, 36], list(range(37))])
def test_bisection_finds_the_guilty_in_few_steps(guilty: list[int]) -> None:
    calls = []

    def ok(chosen: list[int]) -> bool:
        calls.append(chosen)
        return not set(chosen) & set(guilty)

    assert bisect(range(37), ok) == guilty
    assert len(calls) <= len(guilty) * (math.ceil(math.log2(37)) + 1)


def test_bisection_ends_with_what_passes_even_when_two_are_guilty_only_together() -> None:
    ok = lambda chosen: not {5, 11} <= set(chosen)  # noqa: E731
    guilty = bisect(range(20), ok)
    assert guilty == [11]
    assert ok([c for c in range(20) if c not in guilty])


def test_the_limits_are_those_of_the_design() -> None:
    """An error of a few units of rounding passes, one of several times the limit does not."""
    original = _Offset(0.0)
    x = torch.randn(1, 4096, generator=torch.Generator().manual_seed(0))
    unit = torch.finfo(torch.float32).eps * 0.3
    assert compare(original, _Offset(2 * unit), inputs(x)).equal
    assert not compare(original, _Offset(3 * FAIL * unit), inputs(x)).equal


class _Offset(nn.Module):
    def __init__(self, offset: float) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.tensor(offset))

    def forward(self, x: Tensor) -> Tensor:
        return x * 0.3 + self.offset
