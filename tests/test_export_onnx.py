"""ONNX files: what is in them, and that what is written is what was checked."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from test_export import X, masked, random
from test_io_save import state_of
from torch import nn
from torch_files import small

from convmerge.cli.main import main
from convmerge.errors import ConvmergeError
from convmerge.export import files, onnxfile
from convmerge.export.onnxfile import NOT_RUN
from convmerge.export.program import export_program
from convmerge.inputs import Inputs, as_inputs
from convmerge.io import save

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Let a package be missing."""
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else found(name, *rest)
    )


def shapes(values: Any) -> dict[str, list[str | int]]:
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}


def test_inputs_sizes_and_outputs_have_names(tmp_path: Path) -> None:
    written = save(random(small()), tmp_path / "m.onnx", inputs=X)
    assert written.inputs == {"input0": "batch×3×height×width float32"}
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"], "the weights are inside"
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert shapes(graph.input) == {"input": ["batch", 3, "height", "width"]}
    assert shapes(graph.output)["output"][:2] == ["batch", 2]

    model, inputs = masked()
    save(model, tmp_path / "n.onnx", inputs=inputs, dynamic="batch")
    graph = onnx.load(tmp_path / "n.onnx").graph
    assert shapes(graph.input) == {"x": ["batch", 3, 12, 14], "masks_mask": ["batch", 1, 12, 14]}
    assert shapes(graph.output) == {
        "map": ["batch", 5, 12, 14],
        "sums_0": ["batch", 12, 14],
        "sums_1": [5, 12, 14],
    }


def test_what_is_run_is_what_was_written(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model, inputs = masked()
    seen: list[nn.Module] = []

    def verify(reloaded: nn.Module, others: tuple[Inputs, ...]) -> None:
        seen.append(reloaded)
        assert not (tmp_path / "m.onnx").exists(), "nothing is in place before it has been verified"
        for given in (inputs, *others):
            found, expected = (m(*given.args, **given.kwargs) for m in (reloaded, model))
            assert found["nothing"] is None and isinstance(found["sums"], tuple)
            assert torch.allclose(found["map"], expected["map"], rtol=1e-5, atol=1e-5)
            assert torch.allclose(found["sums"][1], expected["sums"][1], rtol=1e-5, atol=1e-5)

    assert save(model, tmp_path / "m.onnx", inputs=inputs, verify=verify).notes == ()
    assert len(seen) == 1
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    _, other = masked((5, 3, 7, 9))
    x, mask = other.tensors()
    found = session.run(["map"], {"x": x.numpy(), "masks_mask": mask.numpy()})[0]
    expected = model(*other.args, **other.kwargs)["map"]
    assert torch.allclose(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-5)


def test_without_onnxruntime_it_says_that_it_was_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without(monkeypatch, "onnxruntime")
    torch.save(random(small()), tmp_path / "m.pt")
    words = ["fuse", str(tmp_path / "m.pt"), "--input", "1,3,19,23", "-o", str(tmp_path / "m.onnx")]
    assert main(words) == 0
    printed = capsys.readouterr()
    assert f"warning: m.onnx: {NOT_RUN}\n" in printed.err
    assert "m.onnx for input batch×3×height×width float32 (" in printed.out
    onnx.checker.check_model(tmp_path / "m.onnx", full_check=True)


def other_model(*_: object) -> bytes:
    """The ONNX model of other weights than those that are asked for."""
    return onnxfile.to_onnx(export_program(small(), as_inputs(X)))


@pytest.mark.parametrize(
    ("replaced", "code", "words"),
    [(lambda *_: b"\x08\x09damaged", 2, "does not load again"), (other_model, 1, "is not the fused model")],
)
def test_a_file_that_reads_back_differently_is_not_kept(
    replaced: Any,
    code: int,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("onnxruntime")
    torch.save(random(small()), tmp_path / "m.pt")
    (tmp_path / "m.onnx").write_bytes(b"old")
    before = state_of(tmp_path)
    monkeypatch.setattr(files, "to_onnx", replaced)
    words_given = ["fuse", str(tmp_path / "m.pt"), "--input", "1,3,19,23", "-o", str(tmp_path / "m.onnx")]
    assert main(words_given) == code
    assert words in capsys.readouterr().err
    assert state_of(tmp_path) == before


def test_what_onnx_cannot_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unknown(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.eigvalsh(x[..., :5, :5])

    with pytest.raises(ConvmergeError, match=r"torch\.onnx\.export does not convert the model") as caught:
        save(Unknown(), tmp_path / "m.onnx", inputs=X)
    assert "\n" not in caught.value.message and caught.value.hint == "write a .pt2 file instead"
    monkeypatch.setattr(onnxfile, "_LARGEST", 50)
    with pytest.raises(ConvmergeError, match="over 2 GB"):
        save(small(), tmp_path / "m.onnx", inputs=X)
    assert state_of(tmp_path) == {}
