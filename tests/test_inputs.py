"""Example inputs: given, written on the command line, or inferred from the model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torchvision
from torch import Tensor, nn

from convmerge.errors import ConvmergeError
from convmerge.inputs import Inputs, as_inputs, infer_inputs, parse_inputs


class Forward(nn.Module):
    """forward(image, mask=None, *, scale=None) with one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)

    def forward(self, image: Tensor, mask: Tensor | None = None, *, scale: Tensor | None = None) -> Tensor:
        return self.conv(image)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 5, 3), nn.Linear(7, 5)

    def forward(self, image: Tensor, condition: Tensor) -> Tensor:
        return self.conv(image) + self.linear(condition)[:, :, None, None]


def parse(*specs: str, model: nn.Module | None = None, file: Path | None = None, seed: int = 0) -> Inputs:
    return parse_inputs(specs, file, seed, model or Forward())


def assert_refused(words: str, hint: str, *specs: str, **options: Any) -> None:
    with pytest.raises(ConvmergeError, match=words) as caught:
        parse(*specs, **options)
    assert "\n" not in caught.value.message
    assert caught.value.hint is not None and hint in caught.value.hint, caught.value.hint


# The value -------------------------------------------------------------------------------------------------


def test_as_inputs() -> None:
    x, y = torch.ones(2, 3), torch.zeros(5)
    assert as_inputs(x).args == (x,)
    assert as_inputs([x, y]).args == (x, y) and as_inputs((x, None)).args == (x, None)
    assert as_inputs({"a": x}).kwargs == {"a": x} and as_inputs({"a": x}).args == ()
    inputs = Inputs((x,), {"y": y})
    assert as_inputs(inputs) is inputs
    for wrong in ("1,3", 7, None, {1: x}):
        with pytest.raises(ConvmergeError, match="example inputs are"):
            as_inputs(wrong)


def test_clone_and_to_reach_every_tensor() -> None:
    inputs = Inputs(
        (torch.ones(3), [torch.ones(2), 5]), {"a": {"b": (torch.ones(1), torch.tensor([7]))}}, True, ("x",)
    )
    copied = inputs.clone()
    for tensor in copied.tensors():
        tensor.zero_()
    assert [float(t.sum()) for t in inputs.tensors()] == [3, 2, 1, 7]
    assert copied.args[1][1] == 5 and copied.inferred and copied.names == ("x",)
    double = inputs.to(torch.float64)
    assert [t.dtype for t in double.tensors()] == [torch.float64] * 3 + [torch.int64]
    assert inputs.args[0].dtype == torch.float32


def test_describe() -> None:
    inputs = Inputs(
        (torch.ones(1, 3, 7, 5), 3), {"z": torch.tensor(1), "l": [torch.ones(2).half()]}, names=("image",)
    )
    assert inputs.describe() == {
        "image": "1×3×7×5 float32",
        "input1": "3",
        "z": "scalar int64",
        "l[0]": "2 float16",
    }


# --input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "shape", "dtype"),
    [
        ("1,3,7,5", (1, 3, 7, 5), torch.float32),
        ("1x3x7x5", (1, 3, 7, 5), torch.float32),
        ("1×3×7×5", (1, 3, 7, 5), torch.float32),
        (" (1, 3, 7, 5) ", (1, 3, 7, 5), torch.float32),
        ("[2,3]", (2, 3), torch.float32),
        ("7", (7,), torch.float32),
        ("7,", (7,), torch.float32),
        ("scalar", (), torch.float32),
        ("1,16:int64", (1, 16), torch.int64),
        ("1,16:long", (1, 16), torch.int64),
        ("1,16:bool", (1, 16), torch.bool),
        ("1,16:half", (1, 16), torch.float16),
        ("1,16:bfloat16", (1, 16), torch.bfloat16),
        ("1,16:float64", (1, 16), torch.float64),
        ("scalar:uint8", (), torch.uint8),
    ],
)
def test_shapes(spec: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    (tensor,) = parse(spec).args
    assert tensor.shape == shape and tensor.dtype == dtype
    named = parse("1,3,7,5", f"mask={spec}")
    assert named.kwargs["mask"].shape == shape and named.kwargs["mask"].dtype == dtype


def test_values_depend_on_the_seed_alone() -> None:
    model = Forward()
    before = torch.random.get_rng_state()
    a, b, c = (parse("1,3,7,5", "mask=2,3", seed=seed, model=model) for seed in (4, 4, 5))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(a.args[0], b.args[0]) and torch.equal(a.kwargs["mask"], b.kwargs["mask"])
    assert not torch.equal(a.args[0], c.args[0])
    assert 0.7 < float(parse("997").args[0].std()) < 1.3
    assert parse("3", seed=-(2**70)).args[0].isfinite().all()


def test_floating_inputs_take_the_model_s_dtype() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        inputs = parse("1,3,7,5", "mask=2:float32", model=Forward().to(dtype))
        assert inputs.args[0].dtype == dtype and inputs.kwargs["mask"].dtype == torch.float32
    assert parse("1,3", model=nn.ReLU()).args[0].dtype == torch.float32


def test_integers_stay_below_every_embedding() -> None:
    model = nn.Sequential(nn.Embedding(101, 3), nn.Linear(3, 2))
    (tensor,) = parse("1,997:int64", model=model).args
    assert int(tensor.min()) >= 0 and 90 < int(tensor.max()) <= 100
    model.append(nn.Embedding(3, 2))
    assert sorted(parse("1,97:int32", model=model).args[0].unique().tolist()) == [0, 1, 2]
    assert sorted(parse("1,97:int64").args[0].unique().tolist()) == [0, 1]
    assert sorted(parse("1,97:bool").args[0].unique().tolist()) == [False, True]


@pytest.mark.parametrize(
    "spec", ["", "a", "1,,3", "1;3", "1,-3", "1,3:float32:x", "=1,3", "2x=1,3", "1.5", "1,3 4", "image=", "@"]
)
def test_specs_that_cannot_be_read(spec: str) -> None:
    assert_refused("--input", "--input 1,3,224,224", spec)


def test_other_refusals() -> None:
    assert_refused("size of 0", "--input", "1,0,3")
    assert_refused("too large", "--input", "99999999999,99999999999")
    assert_refused("unknown dtype flaot32", "did you mean float32?", "1,3:flaot32")
    assert_refused("unknown dtype q", "one of float16", "1,3:q")
    assert_refused("no input named imgae", "did you mean image?", "imgae=1,3,7,5")
    assert_refused("no input named zzz", r"forward(image, mask, scale)", "1,3,7,5", "zzz=1")
    assert_refused("mask=… is given twice", "once", "1,3,7,5", "mask=1", "mask=2")
    assert_refused("image is given by position and by name", "once", "1,3,7,5", "image=1,3,7,5")
    assert_refused(r"4 inputs for forward\(image, mask, scale\)", "leave", "1", "1", "1", "1")
    assert_refused("also needs image", "--input image=SHAPE", "mask=1,3")
    assert_refused(r"also needs condition", "--input condition=SHAPE", "1,3,7,5", model=Two())


def test_positional_inputs_are_named_for_the_report() -> None:
    inputs = parse("1,3,7,5", "2,3", "scale=7")
    assert list(inputs.describe()) == ["image", "mask", "scale"]
    assert not inputs.inferred


# Files -----------------------------------------------------------------------------------------------------


def test_tensor_files(tmp_path: Path) -> None:
    value = numpy.random.default_rng(0).standard_normal((2, 3, 7, 5))
    numpy.save(tmp_path / "x.npy", value)
    numpy.save(tmp_path / "i.npy", numpy.array(5))
    numpy.savez(tmp_path / "one.npz", value)
    numpy.savez(tmp_path / "two.npz", mask=value, other=value + 1)
    torch.save(torch.from_numpy(value), tmp_path / "x.pt")
    expected = torch.from_numpy(value).float()
    for name in ("x.npy", "x.pt", "one.npz"):
        assert torch.equal(parse(f"@{tmp_path / name}").args[0], expected)
        assert torch.equal(parse(f"image=@{tmp_path / name}").kwargs["image"], expected)
    assert parse(f"@{tmp_path}/x.npy:float64").args[0].dtype == torch.float64
    assert torch.equal(parse("1", f"mask=@{tmp_path}/two.npz").kwargs["mask"], expected)
    scalar = parse("1", f"mask=@{tmp_path}/i.npy").kwargs["mask"]
    assert scalar.shape == () and scalar.dtype == torch.int64 and int(scalar) == 5
    assert_refused("holds 2 arrays", f"--input mask=@{tmp_path}/two.npz", f"@{tmp_path}/two.npz")


def test_inputs_file(tmp_path: Path) -> None:
    x, mask = torch.randn(2, 3, 7, 5), torch.tensor([3, 4])
    path = tmp_path / "inputs.pt"
    for saved in (x, (x,), [x]):
        torch.save(saved, path)
        inputs = parse(file=path)
        assert torch.equal(inputs.args[0], x) and inputs.names == ("image",)
    torch.save((x, mask), path)
    assert list(parse(file=path).describe()) == ["image", "mask"]
    torch.save({"image": x.double(), "mask": mask}, path)
    inputs = parse(file=path)
    assert inputs.kwargs["image"].dtype == torch.float32 and inputs.kwargs["mask"].dtype == torch.int64
    torch.save({"imag": x}, path)
    assert_refused("no input named imag", "did you mean image?", file=path)
    assert_refused("both given", "one of them", "1,3", file=path)


def test_bad_files(tmp_path: Path) -> None:
    torch.save(Forward(), tmp_path / "model.pt")
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    torch.save("text", tmp_path / "text.pt")
    numpy.save(tmp_path / "objects.npy", numpy.array([{}], dtype=object), allow_pickle=True)
    for name in ("empty.pt", "empty.npy", "empty.npz", "x.csv"):
        (tmp_path / name).write_bytes(b"")
    assert_refused("no torch-saved tensor", "torch.save", file=tmp_path / "model.pt")
    assert_refused("no torch-saved tensor", "torch.save", f"@{tmp_path}/model.pt")
    assert_refused("no torch-saved tensor", "torch.save", f"@{tmp_path}/empty.pt")
    assert_refused("holds a list, not a tensor", "--inputs", f"@{tmp_path}/list.pt")
    assert_refused("example inputs are a str", "tensor", file=tmp_path / "text.pt")
    assert_refused("no readable numpy file", "numpy.save", f"@{tmp_path}/objects.npy")
    assert_refused("no readable numpy file", "numpy.save", f"@{tmp_path}/empty.npy")
    assert_refused("no readable numpy file", "numpy.save", f"@{tmp_path}/empty.npz")
    assert_refused("no .pt, .npy or .npz", "--input", f"@{tmp_path}/x.csv")
    assert_refused("no such file", "check the path", f"@{tmp_path}/gone.npy")
    assert_refused("no such file", "check the path", file=tmp_path / "gone.pt")
    assert_refused("is a directory, not a file", f"as in {tmp_path}/", file=tmp_path)
    assert_refused("is a directory, not a file", f"as in {tmp_path}/", f"@{tmp_path}")


# Inference -------------------------------------------------------------------------------------------------


class OutOfOrder(nn.Module):
    """Registered in another order than called."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.stem = nn.Linear(5, 3), nn.Conv2d(4, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x).mean((2, 3)))


class Stated(nn.Module):
    """Only runs at the size it states itself, as timm models do."""

    default_cfg = {"input_size": (3, 97, 89)}  # noqa: RUF012

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1:] == (3, 97, 89)
        return x


class Tokens(nn.Module):
    """As transformers models: every input is optional, and one is given as integers."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(97, 5), nn.Embedding(2, 5)

    def forward(self, input_ids: Tensor | None = None, mask: Tensor | None = None) -> dict[str, Tensor]:
        return {"out": self.words(input_ids) + self.places(input_ids * 0)}


def conv_head(size: int, channels: int = 3) -> nn.Module:
    """Runs at one image size only."""
    return nn.Sequential(nn.Conv2d(channels, 5, 3, padding=1), nn.Flatten(), nn.Linear(5 * size * size, 2))


CASES: dict[str, tuple[Any, str]] = {
    "image classifier": (lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU()), "1×3×224×224 float32"),
    "grey images": (lambda: nn.Conv2d(1, 5, 3), "1×1×224×224 float32"),
    "odd channels": (lambda: nn.Conv2d(7, 5, 3), "1×7×224×224 float32"),
    "MNIST": (lambda: conv_head(28, 1), "1×1×28×28 float32"),
    "CIFAR": (lambda: conv_head(32), "1×3×32×32 float32"),
    "Inception": (lambda: conv_head(299), "1×3×299×299 float32"),
    "super-resolution": (lambda: nn.Sequential(nn.Conv2d(3, 12, 3), nn.PixelShuffle(2)), "1×3×64×64 float32"),
    "decoder at the end": (
        lambda: nn.Sequential(nn.Conv2d(3, 5, 3, 2, 1), nn.ConvTranspose2d(5, 3, 2, 2)),
        "1×3×224×224 float32",
    ),
    "generator": (
        lambda: nn.Sequential(nn.ConvTranspose2d(11, 5, 4), nn.ConvTranspose2d(5, 3, 4, 4)),
        "1×11×1×1 float32",
    ),
    "audio": (lambda: nn.Conv1d(2, 5, 9), "1×2×256 float32"),
    "volume": (lambda: nn.Conv3d(1, 2, 3), "1×1×16×64×64 float32"),
    "perceptron": (lambda: nn.Sequential(nn.Linear(11, 7), nn.BatchNorm1d(7)), "1×11 float32"),
    "flattened image": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 5)), "1×784 float32"),
    "batch norm first": (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 5, 3)), "1×3×224×224 float32"),
    "batch norm of vectors": (lambda: nn.BatchNorm1d(11), "1×11 float32"),
    "recurrent": (lambda: nn.LSTM(5, 7), "1×16×5 float32"),
    "layer norm": (lambda: nn.LayerNorm(11), "1×16×11 float32"),
    "tokens": (lambda: nn.Sequential(nn.Embedding(11, 5), nn.Linear(5, 3)), "1×16 int64"),
    "all inputs optional": (Tokens, "1×16 int64"),
    "no layer with channels": (lambda: nn.Sequential(nn.ReLU()), "1×3×224×224 float32"),
    "registered out of order": (OutOfOrder, "1×4×224×224 float32"),
    "size the model states": (Stated, "1×3×97×89 float32"),
    "half precision": (lambda: nn.Conv2d(3, 5, 3).half(), "1×3×224×224 float16"),
    "double precision": (lambda: nn.Conv2d(3, 5, 3).double(), "1×3×224×224 float64"),
    "train mode": (lambda: nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)).train(), "1×5 float32"),
}


@pytest.mark.parametrize("case", CASES)
def test_inferred_shapes(case: str) -> None:
    make, expected = CASES[case]
    model = make()
    inputs = infer_inputs(model, seed=3)
    assert list(inputs.describe().values()) == [expected]
    assert inputs.inferred
    model.eval()(*inputs.args)
    assert torch.equal(infer_inputs(model, 3).args[0], inputs.args[0])


def test_first_convolution_runs_without_specs() -> None:
    inputs = parse(model=torchvision.models.resnet18())
    assert inputs.inferred and inputs.describe() == {"x": "1×3×224×224 float32"}


def test_inference_changes_nothing() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.calls = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.norm.running_mean += 1
            x.mul_(2)
            return self.norm(self.conv(x)) + torch.rand(())

    model = Writes().train()
    state, random = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    inputs = infer_inputs(model, 0)
    assert model.calls == 0 and model.training and torch.is_grad_enabled()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert torch.equal(inputs.args[0], parse("1,3,224,224", model=model).args[0]), (
        "not the values the model wrote into"
    )


def test_what_cannot_be_inferred() -> None:
    assert_refused(
        r"forward needs 2 inputs \(image, condition\)",
        "--input image=SHAPE --input condition=SHAPE, with SHAPE as in 1,3,224,224",
        model=Two(),
    )
    assert_refused("cannot be inferred; at 1×3×64×64: .*mat1", "--input 1,3,224,224", model=conv_head(19))

    class Nothing(nn.Module):
        def forward(self) -> int:
            return 1

    assert_refused("takes no input", "input", model=Nothing())

    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("\nfirst\nsecond")

    assert_refused("at 1×3×224×224: first$", "--input", model=Fails())

    class Uncopyable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lines = (line for line in ())

    assert_refused("cannot be copied", "plain", model=Uncopyable())
