"""Bound inputs: what depends on them alone is computed once, and they leave the signature."""

from __future__ import annotations

import inspect
import math
import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from captured import Function, assert_close, randomised
from torch import Tensor, nn
from torch.nn.utils import prune

import convmerge
from convmerge.cli.main import main
from convmerge.errors import ConvmergeError
from convmerge.inputs import Filled, as_inputs, bind_inputs, parse_bindings

FIXTURES = Path(__file__).parent.parent / "fixtures"
X = torch.randn(1, 3, 7, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
COND = torch.randn(1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


class Hyper(nn.Module):
    """A convolution whose kernel and bias one linear layer computes, batch norm, and a convolution."""

    def __init__(self, kernel: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.shape, self.groups = (6, 3 // groups, kernel, kernel), groups
        self.generator = nn.Sequential(
            nn.Linear(5, 11), nn.ReLU(), nn.Linear(11, 6 * 3 // groups * kernel**2 + 6)
        )
        self.norm = nn.BatchNorm2d(6)
        self.conv = nn.Conv2d(6, 7, 3)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        made = self.generator(cond).flatten()
        weight, bias = made[:-6].reshape(self.shape), made[-6:]
        return self.conv(self.norm(F.conv2d(x, weight, bias, groups=self.groups)))


class Film(nn.Module):
    """Scale and shift for every channel, computed from a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.film, self.out = nn.Linear(5, 12), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        scale, shift = self.film(cond)[:, :, None, None].chunk(2, 1)
        return self.out(F.relu(self.norm(self.conv(x)) * (1 + scale) + shift))


class Residual(nn.Module):
    """A block of a diffusion model: the embedding of the time step is added between two convolutions."""

    def __init__(self, inp: int, out: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(inp, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)
        self.embed = nn.Linear(11, out)
        self.skip = nn.Conv2d(inp, out, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.first(x) + self.embed(F.silu(embedding))[:, :, None, None]
        return self.second(F.silu(h)) + self.skip(x)


class Diffusion(nn.Module):
    """Sinusoidal embedding of a time step, given as a number, a scalar or one for each sample; a label."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, 11), nn.SiLU(), nn.Linear(11, 11))
        self.label = nn.Embedding(5, 11)
        self.down, self.up = Residual(3, 4), Residual(4, 2)

    def forward(self, x: Tensor, t: Any, label: Tensor | None = None) -> Tensor:
        if not torch.is_tensor(t):
            t = torch.tensor([t], dtype=torch.long, device=x.device)
        elif t.dim() == 0:
            t = t[None].to(x.device)
        t = t.expand(x.shape[0])
        rates = torch.exp(torch.arange(4, dtype=torch.float32) * (-math.log(1000) / 4)).to(t.device)
        angles = t[:, None].to(x.dtype) * rates[None].to(x.dtype)
        embedding = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        if label is not None:
            embedding = embedding + self.label(label)
        return self.up(self.down(x, embedding), embedding)


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.scale = nn.Conv2d(3, 4, 1), nn.Linear(5, 4)

    def forward(self, x: Tensor, *, cond: Tensor, factor: float = 2.0, twice: bool = False) -> Tensor:
        y = self.conv(x) * self.scale(cond)[:, :, None, None] * factor
        return y + y if twice else y


class Batched(nn.Module):
    """A dict of inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.scale = nn.Conv2d(3, 4, 1), nn.Linear(5, 4)

    def forward(self, x: Tensor, more: dict[str, Tensor]) -> dict[str, Any]:
        y = self.conv(x) * self.scale(more["cond"])[:, :, None, None]
        if "shift" in more:
            y = y + more["shift"]
        return {"y": y, "both": (y, y.mean())}


class PerSample(nn.Module):
    """A kernel for every sample, as one grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.conv = nn.Linear(5, 4 * 3 * 9), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        b, c, h, w = x.shape
        weight = self.kernel(cond).view(b * 4, c, 3, 3)
        y = F.conv2d(x.reshape(1, b * c, h, w), weight, groups=b, padding=1)
        return self.conv(y.view(b, 4, h, w))


class Painted(nn.Module):
    """The vector as constant channels beside the image's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Linear(5, 2), nn.Conv2d(5, 4, 1)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        painted = self.embed(cond)[:, :, None, None].expand(x.shape[0], -1, x.shape[2], x.shape[3])
        return self.conv(torch.cat([x, painted], 1))


class Filled2d(nn.Module):
    """The vector as channels of a map made from zeros, a pruned layer, parts of a tensor in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Linear(5, 2), nn.Conv2d(5, 4, 1)
        prune.l1_unstructured(self.embed, "weight", 3)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        painted = torch.zeros(x.shape[0], 2, *x.shape[2:], dtype=x.dtype) + self.embed(cond)[:, :, None, None]
        return sum(part.relu() for part in self.conv(torch.cat([x, painted], 1)).split(2, 1))


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positive, self.negative = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        assert x.shape[1] == 3, "an image"
        return self.positive(x) if cond.sum() > 0 else self.negative(x)


class Attends(nn.Module):
    """Attention to a context, in a module whose own code torch.fx cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.context, self.attention = nn.Linear(5, 4), nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        key = self.context(context).expand(x.shape[0], -1, -1)
        return self.attention(x, key, key)[0]


LABEL, STEP = torch.tensor([3]), torch.tensor([417])
# What to bind, the model's inputs, and parameters that must be gone.
CASES: dict[str, tuple[nn.Module, dict[str, Any], tuple[str, ...], str]] = {
    "kernel and bias": (Hyper(), {"x": X, "cond": COND}, ("cond",), "generator"),
    "3×3 kernel in groups": (Hyper(3, 3), {"x": X, "cond": COND}, ("cond",), "generator"),
    "film": (Film(), {"x": X, "cond": COND}, ("cond",), "film"),
    "time step": (Diffusion(), {"x": X, "t": STEP}, ("t",), "time"),
    "time step without a dimension": (Diffusion(), {"x": X, "t": STEP[0]}, ("t",), "time"),
    "time step as a number": (Diffusion(), {"x": X, "t": 417}, ("t",), "time"),
    "time step and label": (Diffusion(), {"x": X, "t": STEP, "label": LABEL}, ("t", "label"), "time"),
    "label alone": (Diffusion(), {"x": X, "t": STEP, "label": LABEL}, ("label",), "label"),
    "keyword only": (Keywords(), {"x": X, "cond": COND}, ("cond",), "scale"),
    "flag and number": (
        Keywords(),
        {"x": X, "cond": COND, "twice": True, "factor": 3.0},
        ("cond", "twice", "factor"),
        "scale",
    ),
    "dict": (Batched(), {"x": X, "more": {"cond": COND}}, ("more",), "scale"),
    "larger dict": (
        Batched(),
        {"x": X, "more": {"cond": COND, "shift": COND[:, :4, None, None]}},
        ("more",),
        "scale",
    ),
    "kernel per sample": (
        PerSample(),
        {"x": torch.cat([X, -X]), "cond": torch.cat([COND, COND + 1])},
        ("cond",),
        "kernel",
    ),
    "one sample": (PerSample(), {"x": X, "cond": COND}, ("cond",), "kernel"),
    "painted": (Painted(), {"x": X, "cond": COND}, ("cond",), "embed"),
    "painted on zeros": (Filled2d(), {"x": X, "cond": COND}, ("cond",), "embed"),
    "one branch": (Branches(), {"x": X, "cond": COND}, ("cond",), "none"),
    "attention": (Attends(), {"x": X[0, :2, :, :4], "context": X[:, 0, :, :5]}, ("context",), "context"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_bound_model_is_the_same_function(name: str) -> None:
    model, inputs, names, gone = CASES[name]
    randomised(model)
    bind = {n: inputs[n] for n in names}
    rest = {n: v for n, v in inputs.items() if n not in names}
    result = convmerge.fuse(model, inputs, bind=bind)
    assert result.report.verification is not None and result.report.verification.equal
    assert set(inspect.signature(result.model.forward).parameters) <= {*rest, "input"}
    assert not any(gone in key.split(".") for key in result.model.state_dict())
    expected, actual = model(**inputs), result.model(*rest.values())
    for a, b in zip(_tensors(actual), _tensors(expected), strict=True):
        assert_close(a, b, 1e-9)
    assert set(result.report.inputs) == set(rest)
    assert convmerge.verify(model, result.model, inputs, bind=bind).equal


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def test_other_values_are_told_apart() -> None:
    model = randomised(Hyper())
    fused = convmerge.fuse(model, (X, COND), bind={"cond": COND}).model
    assert not convmerge.verify(model, fused, (X, COND), bind={"cond": COND * 1.01}).equal


def test_a_generated_kernel_joins_its_chain() -> None:
    model = randomised(Hyper())
    result = convmerge.fuse(model, (X, COND), bind={"cond": COND})
    assert isinstance(result.model, nn.Conv2d) and result.model.kernel_size == (3, 3)
    bound, merged = result.report.merged()
    assert bound.place == "cond" and bound.weights_after == 6 * 3 + 6
    assert bound.weights_before == sum(p.numel() for p in model.generator.parameters())
    assert merged.operators == ("conv 1×1", "batch_norm", "conv 3×3")


def test_scale_and_shift_become_part_of_the_convolution() -> None:
    result = convmerge.fuse(randomised(Film()), (X, COND), bind={"cond": COND})
    assert [type(m) for m in result.model] == [nn.Conv2d, nn.ReLU, nn.Conv2d]


def test_constants_are_rounded_once() -> None:
    """A single precision model's constants are computed in double precision."""
    model = randomised(Hyper()).float()
    model.norm = nn.Identity()
    model.conv = nn.ReLU()
    result = convmerge.fuse(model, (X.float(), COND.float()), bind={"cond": COND.float()})
    exact = model.double().generator(COND.float().double()).flatten()
    weight = next(v for v in result.model.state_dict().values() if v.dim() == 4)
    assert torch.equal(weight, exact[:-6].reshape(weight.shape).float())


def test_any_batch_size_where_the_code_repeats_the_value() -> None:
    model = randomised(Diffusion())
    fused = convmerge.fuse(model, (X, STEP), bind={"t": STEP}).model
    left = {n: p for n, p in model.named_parameters() if not {"time", "label", "embed"} & {*n.split(".")}}
    assert sum(p.numel() for p in fused.parameters()) == sum(p.numel() for p in left.values())
    x = torch.cat([X, 2 * X, -X])
    assert_close(fused(x), model(x, STEP), 1e-9)


def test_a_value_for_every_sample_where_its_reader_does_not_broadcast() -> None:
    def forward(self: Any, x: Tensor, cond: Tensor) -> Tensor:
        beside = self.embed(cond.expand(x.shape[0], -1))
        return self.out(torch.cat([x.mean((2, 3)), beside], 1))

    model = randomised(Two(forward, embed=nn.Linear(5, 2), out=nn.Linear(5, 4)))
    fused = convmerge.fuse(model, (X, COND), bind={"cond": COND}).model
    x = torch.cat([X, 2 * X, -X])
    assert_close(fused(x), model(x, COND), 1e-9)


def test_a_size_that_the_code_branches_on_is_asserted() -> None:
    model = randomised(Branches())
    fused = convmerge.fuse(model, (X, COND), bind={"cond": COND}).model
    assert_close(fused(X[..., :5]), model(X[..., :5], COND))
    with pytest.raises(AssertionError, match="made for inputs of other sizes"):
        fused(X[:, :2])


def test_a_plain_argument_is_asserted() -> None:
    model = randomised(Keywords())
    fused = convmerge.fuse(model, {"x": X, "cond": COND, "twice": True}, bind={"cond": COND}).model
    assert_close(fused(x=X, twice=True), model(X, cond=COND, twice=True))
    assert_close(fused(X), model(X, cond=COND, twice=True))
    with pytest.raises(AssertionError, match="twice was True"):
        fused(x=X, twice=False)


def test_an_absent_argument_stays_absent() -> None:
    model = randomised(Diffusion())
    fused = convmerge.fuse(model, (X, STEP, None), bind={"t": STEP}).model
    assert_close(fused(X), model(X, STEP))
    assert_close(fused(X, None), model(X, STEP))
    with pytest.raises(AssertionError, match="label was None"):
        fused(X, LABEL)


def test_nothing_that_varies_is_frozen() -> None:
    def forward(self: Any, x: Tensor, cond: Tensor) -> Tensor:
        return x * cond + torch.rand(3, dtype=x.dtype)

    with pytest.raises(ConvmergeError):
        convmerge.fuse(Two(forward), (X[0, 0, :, :3], COND[:, :3]), bind={"cond": COND[:, :3]})


def test_memory_that_every_call_fills_is_not_frozen() -> None:
    def forward(self: Any, x: Tensor, cond: Tensor) -> Tensor:
        out = torch.zeros(1, 3, 7, 9, dtype=torch.float64)
        out[:, :2] += x[:, :2] * cond
        return out

    with pytest.raises(ConvmergeError, match="cannot be bound"):
        convmerge.fuse(Two(forward), (X, COND[0, 0]), bind={"cond": COND[0, 0]})


class Two(Function):
    """Around one function of two inputs."""

    def forward(self, x: Tensor, cond: Tensor) -> Any:  # type: ignore[override]
        return self.function(self, x, cond)


def test_code_that_cannot_be_followed_is_refused() -> None:
    def forward(self: Any, x: Tensor, cond: Tensor) -> Tensor:
        return x * cond if x.sum() > 0 else x

    with pytest.raises(ConvmergeError, match="cond cannot be bound: the code of Two cannot be traced"):
        convmerge.fuse(Two(forward), (X.abs(), COND[0, 0]), bind={"cond": COND[0, 0]})


def test_sizes_that_take_another_path_are_refused() -> None:
    def forward(self: Any, x: Tensor, cond: Tensor) -> Tensor:
        return (F.pad(x, (0, 1)) if x.shape[-1] == 9 else x) * cond

    with pytest.raises(ConvmergeError, match="bind failed its check"):
        convmerge.fuse(Two(forward), (X, COND[0, 0]), bind={"cond": COND[0, 0]})


def test_hooks_are_kept_or_refused() -> None:
    model = randomised(Hyper())
    model.register_forward_hook(lambda module, args, output: None)
    with pytest.raises(ConvmergeError, match="has a hook, which would be lost"):
        convmerge.fuse(model, (X, COND), bind={"cond": COND})


@pytest.mark.parametrize(
    "bind, message",
    [
        ({"kond": COND}, "forward has no input named kond"),
        ({"cond": COND[0]}, "cond is bound to 5 float64, but the model's input cond is 1×5 float64"),
        ({"cond": COND.expand(2, 5)}, "bound to 2×5 float64"),
        ({"cond": torch.ones(1, 5, dtype=torch.int64)}, "bound to 1×5 int64"),
        ({"x": X, "cond": COND}, "with x, cond bound, .* no input left"),
    ],
)
def test_values_that_do_not_fit(bind: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ConvmergeError, match=message):
        convmerge.inspect(randomised(Hyper()), (X, COND), bind=bind)


@pytest.mark.parametrize("example", [(), ("--input", "1,3,5,7")])
def test_the_only_input_bound(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], example: tuple[str, ...]
) -> None:
    path, value = tmp_path / "model.pt", tmp_path / "value.pt"
    torch.save(nn.Conv2d(3, 2, 3).eval(), path)
    torch.save(torch.ones(1, 3, 5, 7), value)
    assert main(["inspect", str(path), "--bind", f"input={value}", *example]) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: with input bound, forward(input) has no input left")
    assert "give input as an example, by --input" in hint


def test_without_an_example_of_the_bound_input() -> None:
    model = randomised(Hyper())
    assert convmerge.fuse(model, X, bind={"cond": COND}).report.inputs == {"x": "1×3×7×9 float64"}
    with pytest.raises(ConvmergeError, match="the model does not run with cond = 1×4 float64: RuntimeError"):
        convmerge.fuse(model, X, bind={"cond": COND[:, :4]})


def test_inputs_before_the_bound_one_and_after_it() -> None:
    class First(Hyper):
        def forward(self, cond: Tensor, x: Tensor, factor: float = 1.0) -> Tensor:  # type: ignore[override]
            return super().forward(x, cond) * factor

    model = randomised(First())
    for inputs in ((COND, X), (X,), {"x": X}, {"x": X, "cond": COND}):
        bound = bind_inputs(model, as_inputs(inputs), {"cond": COND})
        (left,) = bound.rest.tensors()
        assert left is X and list(bound.inputs.describe()) == ["cond", "x"]
    filled = Filled(model, {"cond": COND})
    assert_close(filled(X), model(COND, X))
    assert_close(filled(X, factor=2.0), model(COND, X, 2.0))
    assert_close(filled.double()(x=X), model(COND, X))


def test_values_as_written(tmp_path: Path) -> None:
    torch.save(COND, tmp_path / "cond.pt")
    numpy.save(tmp_path / "cond.npy", COND.numpy())
    model = randomised(Hyper())
    files = [f"cond={tmp_path}/cond.pt", f"cond=@{tmp_path}/cond.npy"]
    for text in (*files, f"cond={COND.tolist()}", f"cond={COND.tolist()}:float64"):
        (value,) = bind_inputs(model, as_inputs(X), parse_bindings([text])).values.values()
        assert torch.equal(value, COND)
    flat = bind_inputs(model, as_inputs((X, COND)), parse_bindings(["cond=[[-1,2,0,3,1]]"])).values["cond"]
    assert flat.dtype == torch.float64 and flat.tolist() == [[-1, 2, 0, 3, 1]]
    vector = bind_inputs(model, as_inputs(X), parse_bindings(["cond=-1,2,0,3,1"])).values["cond"]
    assert vector.dtype == torch.float64 and vector.shape == (5,)
    steps = bind_inputs(randomised(Diffusion()), as_inputs(X), parse_bindings(["t=417"])).values["t"]
    assert steps.dtype == torch.int64 and steps.shape == ()
    flags = parse_bindings(["twice=true", "factor=3", "cond=[[1,2,3,4,5]]"])
    settled = bind_inputs(randomised(Keywords()), as_inputs({"x": X}), flags).values
    assert settled["twice"] is True and settled["factor"] == 3 and settled["cond"].shape == (1, 5)


@pytest.mark.parametrize(
    "text, message",
    [
        ("cond", "not of the form NAME=VALUE"),
        ("cond=", "not of the form NAME=VALUE"),
        ("cond=nothing.pt", "no such file"),
        ("cond=1,x", "the file is no .pt, .npy or .npz"),
        ("cond=[[1],[2,3]]", "no numbers or even lists of them"),
        ("cond={1: 2}", "no numbers or even lists of them"),
    ],
)
def test_values_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(ConvmergeError, match=message):
        parse_bindings([text])
    with pytest.raises(ConvmergeError, match="given twice"):
        parse_bindings(["cond=1", "cond=2"])


def test_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(FIXTURES.parent)
    source = ["fixtures/hypernetwork.pt", "--allow", "fixtures.blocks"]
    bind = ["--bind", "cond=0.5,-1,2,0,1"]
    fused = tmp_path / "fused.pt"
    assert main(["fuse", *source, *bind, "--input", "1,3,11,13", "-o", str(fused)]) == 0
    assert fused.stat().st_size < 0.5 * (FIXTURES / "hypernetwork.pt").stat().st_size
    loaded = convmerge.load(fused)  # without trust
    assert {name: tuple(p.shape) for name, p in loaded.state_dict().items()} == {
        "weight": (7, 3, 1, 1),
        "bias": (7,),
    }
    assert main(["verify", source[0], str(fused), *source[1:], *bind]) == 0
    assert main(["verify", source[0], str(fused), *source[1:], "--bind", "cond=0.5,-1,2,0,1.1"]) == 1
    assert main(["check", *source, *bind]) == 1
    assert main(["check", str(fused)]) == 0
    capsys.readouterr()
    assert main(["inspect", *source, "--bind", "kond=1"]) == 2
    assert "hint: did you mean cond?" in capsys.readouterr().err


def _random_model(seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A hypernetwork of random sizes, groups, kernel, bias, norm and following convolution."""
    rng = random.Random(seed)
    groups = rng.choice([1, 1, 2])
    inp, mid = groups * rng.choice([1, 2, 3]), groups * rng.choice([1, 3, 4])
    kernel, cond, hidden = rng.choice([1, 1, 3]), rng.choice([2, 5]), rng.choice([3, 7])
    biased, padding = rng.random() < 0.5, rng.choice([0, 1])
    numbers = mid * inp // groups * kernel**2
    layers: list[nn.Module] = [nn.Linear(cond, hidden)]
    layers += [rng.choice([nn.ReLU(), nn.Tanh(), nn.Identity()]), nn.Linear(hidden, numbers + mid * biased)]
    after: list[nn.Module] = [nn.BatchNorm2d(mid)] if rng.random() < 0.5 else []
    after += [nn.Conv2d(mid, rng.choice([2, 5]), rng.choice([1, 3]), bias=rng.random() < 0.5)]
    after += [nn.ReLU()] if rng.random() < 0.3 else []

    def forward(self: Any, x: Tensor, cond: Tensor) -> Tensor:
        made = self.generator(cond).reshape(-1)
        weight = made[:numbers].view(mid, inp // groups, kernel, kernel)
        bias = made[numbers:] if biased else None
        return self.after(F.conv2d(self.before(x), weight, bias, padding=padding, groups=groups))

    before = nn.Conv2d(2, inp, 1, bias=rng.random() < 0.5) if rng.random() < 0.5 else nn.Conv2d(2, inp, 3)
    model = Two(forward, generator=nn.Sequential(*layers), before=before, after=nn.Sequential(*after))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 2, 8, 7, dtype=torch.float64, generator=generator)
    return randomised(model, seed), x, torch.randn(1, cond, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("seed", range(6))
def test_random_hypernetworks(seed: int) -> None:
    model, x, cond = _random_model(seed)
    result = convmerge.fuse(model, (x, cond), bind={"cond": cond})
    assert_close(result.model(x), model(x, cond), 1e-9)
    assert not any("generator" in name for name in result.model.state_dict()), seed
    assert result.report.merged(), seed


@pytest.mark.long
@pytest.mark.parametrize("seed", range(6, 60))
def test_many_random_hypernetworks(seed: int) -> None:
    test_random_hypernetworks(seed)
