"""Files that hold a graph: .pt2 written and read, with open sizes, and what is refused or noted."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_io_save import state_of
from torch import Tensor, nn
from torch.export import Dim
from torch_files import small

from convmerge import api, io
from convmerge.cli.main import main
from convmerge.errors import ConvmergeError, LoadError
from convmerge.export import reading
from convmerge.export.program import export_program
from convmerge.export.sizes import Dynamic, named_sizes
from convmerge.inputs import Inputs, as_inputs
from convmerge.io import open_model, save

X = torch.randn(1, 3, 19, 23, generator=torch.Generator().manual_seed(5))


class Head(nn.Module):
    """Takes images of one size only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.out = nn.Linear(4 * 17 * 21, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.conv(x).flatten(1))


class Mixing(Head):
    """As Head, but at other sizes it runs too and mixes samples."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.out(y.reshape(-1)[: y.numel() // (4 * 17 * 21) * 4 * 17 * 21].view(-1, 4 * 17 * 21))


class Branching(nn.Module):
    """Does something else above a size, and wants one that can be halved."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[2] % 2 == 0
        return self.conv(x) + 1 if x.shape[3] > 13 else self.conv(x)


class Masked(nn.Module):
    """Several inputs, nested and by name, and several outputs, nested and None."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5)

    def forward(self, x: Tensor, *, masks: dict[str, Tensor], scale: float = 1.0) -> dict[str, Any]:
        y = self.norm(self.conv(x)) * masks["mask"] * scale
        return {"map": y, "nothing": None, "sums": (y.sum(1), y.sum(0))}


class Untraceable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if float(x.sum()) > 0 else x


def masked(size: Sequence[int] = (1, 3, 12, 14)) -> tuple[nn.Module, Inputs]:
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(size[0], 1, *size[2:], generator=generator)
    return random(Masked()), Inputs((torch.randn(*size, generator=generator),), {"masks": {"mask": mask}})


def random(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        if x.is_floating_point():
            x.data = torch.rand(x.shape, generator=generator) + (0.5 if name.endswith("var") else -0.4)
    return model.eval()


def exported(model: nn.Module, path: Path, x: Tensor, *dims: int) -> Path:
    """A .pt2 file that torch.export wrote, ``dims`` of its input open."""
    program = torch.export.export(
        model, (x,), dynamic_shapes=({dim: Dim.AUTO for dim in dims},), strict=False
    )
    torch.export.save(program, path)
    return path


def names(sizes: Sequence[Any]) -> list[str]:
    return [size.name for size in sizes]


# Sizes -----------------------------------------------------------------------------------------------------


def test_sizes_have_the_names_people_use() -> None:
    def of(*shapes: Sequence[int], dtype: torch.dtype = torch.float32) -> list[tuple[str, int, int]]:
        inputs = Inputs(tuple(torch.ones(*shape, dtype=dtype) for shape in shapes))
        return [(size.name, size.tensor, size.dim) for size in named_sizes(inputs)]

    assert of((2, 3, 5, 7)) == [("batch", 0, 0), ("height", 0, 2), ("width", 0, 3)]
    assert of((2, 3, 5)) == [("batch", 0, 0), ("length", 0, 2)]
    assert of((2, 3, 5, 7, 9))[1:] == [("depth", 0, 2), ("height", 0, 3), ("width", 0, 4)]
    assert of((2, 3, 1, 7)) == [("batch", 0, 0), ("width", 0, 3)]
    assert of((2, 5)) == [("batch", 0, 0)]
    assert of((5,)) == []
    assert of((2, 11), dtype=torch.int64) == [("batch", 0, 0), ("length", 0, 1)]
    # Equal sizes share a name; a map of another size has names of its own, a vector of another length none.
    assert of((2, 3, 5, 7), (2, 1, 5, 7), (3, 4))[3:] == [("batch", 1, 0), ("height", 1, 2), ("width", 1, 3)]
    assert of((2, 3, 5, 7), (2, 3, 6, 7))[3:] == [("batch", 1, 0), ("height_1", 1, 2), ("width", 1, 3)]


@pytest.mark.parametrize("text", ["", "batch,,width", "auto,batch", "none,auto", "x:y", "x:1:2"])
def test_what_is_no_list_of_sizes(text: str) -> None:
    with pytest.raises(ConvmergeError, match="--dynamic"):
        Dynamic.parse(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("depth", "those with a name: batch, height, width"),
        ("y:0", "no input y"),
        ("x:4", "x has no dimension 4"),
    ],
)
def test_sizes_that_are_not_there(text: str, words: str) -> None:
    with pytest.raises(ConvmergeError, match=words) as caught:
        export_program(small().eval(), Inputs((X,), names=("x",)), Dynamic.parse(text))
    assert caught.value.hint


def test_sizes_on_which_the_model_depends_stay_and_are_noted() -> None:
    assert names(export_program(small(), as_inputs(X)).sizes) == ["batch", "height", "width"]
    for model in (Head(), Mixing()):
        fixed = export_program(model.eval(), as_inputs(X))
        assert names(fixed.sizes) == ["batch"]
        assert fixed.notes == (
            "height 19 and width 23 cannot stay open: the model runs on no other that was tried",
        )


def test_sizes_asked_for_are_open_or_an_error() -> None:
    def sizes(model: nn.Module, text: str) -> list[str]:
        return names(export_program(model.eval(), Inputs((X,), names=("x",)), Dynamic.parse(text)).sizes)

    assert sizes(small(), "none") == []
    assert sizes(small(), "width") == ["width"]
    assert sizes(small(), "x:2, batch") == ["height", "batch"]
    with pytest.raises(ConvmergeError, match="width 23 cannot stay open") as caught:
        sizes(Head(), "batch,width")
    assert caught.value.hint == "try --dynamic batch"


def test_a_size_that_the_code_makes_constant_stays() -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * int(x.shape[2]) + x.new_ones(x.shape[3])

    found = export_program(Constant().eval(), as_inputs(torch.randn(2, 3, 17, 19)))
    assert names(found.sizes) == ["batch", "width"]
    assert found.notes == ("height 17 cannot stay open: the model's code makes it a constant",)
    x = torch.randn(5, 3, 17, 8)
    assert torch.equal(found.program.module()(x), x * 17 + 1)


def test_conditions_are_in_words_of_the_names() -> None:
    found = export_program(random(Branching()), as_inputs(torch.randn(1, 3, 12, 14)))
    assert found.conditions == ("width >= 14", "(height % 2) == 0")
    assert names(found.sizes) == ["batch", "height", "width"]
    assert export_program(small(), as_inputs(X)).conditions == (), "the model itself is for height >= 3"


def test_models_that_cannot_be_exported(tmp_path: Path) -> None:
    (tmp_path / "m.pt2").write_bytes(b"old")
    before = state_of(tmp_path)
    with pytest.raises(ConvmergeError, match=r"cannot be exported by torch\.export") as caught:
        save(Untraceable(), tmp_path / "m.pt2", inputs=X)
    assert "\n" not in caught.value.message and caught.value.hint == "write a .pt file instead"
    with pytest.raises(ConvmergeError, match="need example inputs"):
        save(small(), tmp_path / "m.pt2")
    assert state_of(tmp_path) == before


# Written ---------------------------------------------------------------------------------------------------


def test_the_written_program_is_the_model_at_every_size(tmp_path: Path) -> None:
    model, seen = random(small()), []

    def verify(reloaded: nn.Module, others: tuple[Inputs, ...]) -> None:
        assert not (tmp_path / "m.pt2").exists(), "nothing is in place before it has been verified"
        seen.append((reloaded, others))

    written = save(model, tmp_path / "m.pt2", inputs=X, verify=verify)
    assert written.inputs == {"input0": "batch×3×height×width float32"} and written.notes == ()
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt2"]
    (reloaded, (other,)), loaded = seen[0], torch.export.load(tmp_path / "m.pt2").module()
    assert other.tensors()[0].shape != X.shape
    for x in (X, *other.tensors(), torch.randn(5, 3, 4, 9)):
        assert torch.equal(reloaded(x), model(x)) and torch.equal(loaded(x), model(x))


def test_failed_verification_leaves_everything_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "m.pt2").write_bytes(b"old")
    before = state_of(tmp_path)

    def verify(reloaded: nn.Module, others: tuple[Inputs, ...]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(small().eval(), tmp_path / "m.pt2", inputs=X, verify=verify)
    assert state_of(tmp_path) == before


def test_nested_and_named_inputs(tmp_path: Path) -> None:
    model, inputs = masked()
    written = save(model, tmp_path / "m.pt2", inputs=inputs)
    assert list(written.inputs.values()) == ["batch×3×height×width float32", "batch×1×height×width float32"]
    loaded = torch.export.load(tmp_path / "m.pt2").module()
    _, other = masked((4, 3, 9, 8))
    for given in (inputs, other):
        found, expected = (m(*given.args, **given.kwargs) for m in (loaded, model))
        assert found["nothing"] is None
        assert torch.equal(found["map"], expected["map"])
        assert torch.equal(found["sums"][1], expected["sums"][1])


# Read ------------------------------------------------------------------------------------------------------


def test_programs_need_trust_and_damaged_ones_are_an_error(tmp_path: Path) -> None:
    path = exported(random(small()), tmp_path / "m.pt2", X)
    with pytest.raises(LoadError, match="only loads unsafely") as caught:
        open_model(path)
    assert caught.value.hint == "pass --trust if you made this file"
    data = path.read_bytes()
    path.write_bytes(data.replace(b"schema_version", b"schema_versiom"))
    with pytest.raises(LoadError, match="does not load here") as caught:
        open_model(path, trust=True)
    assert "\n" not in caught.value.message


def test_a_program_comes_with_its_inputs_and_open_sizes(tmp_path: Path) -> None:
    model = random(small())
    file = open_model(exported(model, tmp_path / "m.pt2", torch.cat([X, X]), 0, 3), trust=True)
    assert file.inputs is not None and file.inputs.describe() == {"input": "2×3×19×23 float32"}
    assert file.sizes is not None and names(file.sizes) == ["batch", "width"]
    x = torch.randn(3, 3, 19, 8)
    assert torch.equal(file.module(x), model(x)) and torch.equal(file.module(input=x), model(x))
    with pytest.raises(AssertionError, match=r"Guard failed: input\.size\(\)\[2\] == 19"):
        file.module(torch.randn(3, 3, 18, 8))


@pytest.mark.parametrize("dims", [(), (0, 2, 3)])
def test_a_fused_program_is_open_where_it_was(dims: tuple[int, ...], tmp_path: Path) -> None:
    model = random(nn.Sequential(small(), nn.Conv2d(2, 3, 1)))
    path, out = exported(model, tmp_path / "m.pt2", torch.cat([X, X]), *dims), tmp_path / "fused.pt2"
    assert main(["fuse", str(path), "--trust", "-o", str(out), "-q"]) == 0
    fused = open_model(out, trust=True)
    assert fused.sizes is not None and [size.dim for size in fused.sizes] == [*dims]
    assert len(fused.module.state_dict()) == 4 < len(model.state_dict())
    assert main(["verify", str(path), str(out), "--trust", "-q"]) == 0
    assert main(["check", str(path if dims else out), "--trust", "-q"]) == int(bool(dims))


def test_places_of_a_program_are_those_of_its_modules(tmp_path: Path) -> None:
    path = exported(random(nn.Sequential(small(), nn.Conv2d(2, 3, 1))), tmp_path / "m.pt2", X)
    file = open_model(path, trust=True)
    sites = api.inspect(file.module, file.inputs).merged()
    assert [site.place for site in sites] == ["0.0 … 0.1", "0.3 … 1"]
    skipped = api.inspect(file.module, file.inputs, skip=["0.3"])
    assert [site.place for site in skipped.merged()] == ["0.0 … 0.1"]
    fused = api.fuse(file.module, file.inputs)
    assert fused.report.before is not None and fused.report.before.operators["conv"] == 3


def test_decomposed_programs_are_composed_again(tmp_path: Path) -> None:
    up = nn.ConvTranspose2d(3, 4, 3, 2, 1, 1, dilation=2)
    model = random(nn.Sequential(up, nn.ReLU(), nn.Conv2d(4, 5, (3, 1), dilation=(2, 1)), nn.BatchNorm2d(5)))
    program = torch.export.export(model, (X,), strict=False).run_decompositions()
    torch.export.save(program, tmp_path / "m.pt2")
    file = open_model(tmp_path / "m.pt2", trust=True)
    assert torch.equal(file.module(X), model(X))
    before = api.inspect(file.module, file.inputs)
    assert before.before is not None
    assert before.before.operators == {"batch_norm": 1, "conv": 1, "conv_transpose": 1}
    assert [site.place for site in before.merged()] == ["2 … 3"]


@pytest.mark.parametrize("suffix", [".pt", ".pt2"])
def test_nested_programs_are_fused(suffix: str, tmp_path: Path) -> None:
    model, inputs = masked()
    program = torch.export.export(model, inputs.args, dict(inputs.kwargs), strict=False)
    torch.export.save(program, tmp_path / "m.pt2")
    file = open_model(tmp_path / "m.pt2", trust=True)
    assert file.inputs is not None
    result = api.fuse(file.module, file.inputs)
    assert result.report.verification is None or result.report.verification.equal
    save(result.model, tmp_path / f"out{suffix}", like=file, inputs=result.inputs)
    again = open_model(tmp_path / f"out{suffix}", trust=True)
    assert api.verify(model, again.module, inputs).equal


def test_containers_mix_in_verify_and_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = random(small())
    torch.save(model, tmp_path / "m.pt")
    fixed, other = exported(model, tmp_path / "fixed.pt2", X), tmp_path / "other.pt2"
    exported(random(nn.Sequential(*small(), nn.Hardtanh(-0.1, 0.1))), other, X)
    both = [str(tmp_path / "m.pt"), str(fixed), "--trust"]
    for words in (
        ["verify", *both],
        ["verify", both[1], both[0], "--trust"],
        ["bench", *both, "--pairs", "2"],
    ):
        assert main(words) == 0
        assert "input: 1×3×19×23 float32\n" in capsys.readouterr().out, "the inputs of the program"
    assert main(["verify", both[0], str(other), "--trust"]) == 1
    # That a program is for one size makes it no other function.
    assert main(["verify", *both, "--input", "1,3,20,23"]) == 2
    assert "not for 1×3×20×23: Guard failed" in capsys.readouterr().err


# TorchScript -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def scripted(model: nn.Module, path: Path, x: Tensor | None = None) -> Path:
    """A TorchScript file, traced where an input is given."""
    made = torch.jit.script(model) if x is None else torch.jit.trace(model, x)
    torch.jit.save(made, path)
    return path


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("traced", [False, True])
def test_scripts_are_converted_and_fused(traced: bool, tmp_path: Path) -> None:
    model, out = random(nn.Sequential(small(), nn.Conv2d(2, 3, 1))), tmp_path / "out.pt"
    path = scripted(model, tmp_path / "m.pt", X if traced else None)
    with pytest.raises(LoadError, match="TorchScript archive, which only loads unsafely"):
        open_model(path)
    words = [str(path), "--trust", "--input", "1,3,19,23", "-q"]
    assert main(["check", *words]) == 1
    assert main(["fuse", *words, "-o", str(out)]) == 0
    fused = open_model(out, trust=True).module
    assert len(fused.state_dict()) == 4
    for x in (X, torch.randn(5, 3, 7, 8)):
        assert torch.allclose(fused(x), model(x), atol=1e-5)
    file = open_model(path, trust=True, inputs=lambda _: as_inputs(X))
    assert file.inputs is not None and file.sizes is None
    report = api.inspect(file.module, file.inputs)
    assert [site.place for site in report.merged()] == ["0.0 … 0.1", "0.3 … 1"]
    assert report.before is not None
    assert report.before.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_scripts_that_are_not_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = scripted(random(small()), tmp_path / "m.pt")

    def assert_refused(words: str, convert: Callable[..., Any]) -> None:
        monkeypatch.setattr(reading, "_convert", convert)
        with pytest.raises(LoadError, match=words) as caught:
            open_model(path, trust=True, inputs=lambda _: as_inputs(X))
        assert "\n" not in caught.value.message
        assert caught.value.hint == "start from the Python model it was scripted from"

    def failing(*_: object) -> None:
        raise ValueError("prim::Loop\nis unknown")

    assert_refused(r"torch does not convert: .*prim::Loop", failing)
    assert_refused("becomes another function", lambda *_: torch.export.export(small().eval(), (X,)))
    with pytest.raises(LoadError, match="converted by example inputs"):
        open_model(path, trust=True)


# Command line ----------------------------------------------------------------------------------------------


def test_fuse_says_what_the_file_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(random(small()), tmp_path / "m.pt")
    command = ["fuse", str(tmp_path / "m.pt"), "--input", "1,3,19,23", "-o", str(tmp_path / "m.pt2")]
    assert main(command) == 0
    assert "m.pt2 for input batch×3×height×width float32 (" in capsys.readouterr().out
    assert main([*command, "--dynamic", "none"]) == 0
    assert "m.pt2 for input 1×3×19×23 float32 (" in capsys.readouterr().out
    before = state_of(tmp_path)
    assert main([*command[:-1], str(tmp_path / "n.pt"), "--dynamic", "batch"]) == 2
    assert main([*command, "--dynamic", "depth"]) == 2
    assert state_of(tmp_path) == before


def test_conditions_of_the_file_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = save(random(Branching()), tmp_path / "m.pt2", inputs=torch.randn(1, 3, 12, 14))
    assert written.notes == ("m.pt2 is only for width >= 14, (height % 2) == 0, and checks it itself",)


def test_missing_packages_are_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(small(), tmp_path / "m.pt")
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if "onnx" in name else found(name, *rest)
    )
    monkeypatch.setattr(io, "open_model", lambda *_, **__: pytest.fail("the model was opened"))
    assert main(["fuse", str(tmp_path / "m.pt"), "-o", str(tmp_path / "m.onnx")]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: cannot write {tmp_path / 'm.onnx'}: onnx and onnxscript are not installed",
        "hint: pip install onnx onnxscript",
    ]
