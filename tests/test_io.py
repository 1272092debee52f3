"""Files are told apart by their bytes, and modules of torch.nn load without being asked for anything."""

from __future__ import annotations

import inspect
import io
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import prune
from torch_files import assert_refused, assert_same, saved, small

from convmerge.io import load, open_model, peek, sniff


def zip_of(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for member, data in files.items():
            file.writestr(member.replace("__", "/"), data)
    return buffer.getvalue()


def numpy_bytes() -> bytes:
    buffer = io.BytesIO()
    numpy.save(buffer, numpy.ones((2, 3)))
    return buffer.getvalue()


KINDS = {
    "empty": b"",
    "text": b"epoch,loss\n1,0.5\n",
    "html": b"\n<!DOCTYPE html><html><body>404</body></html>",
    "lfs_pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "onnx": b"\x08\x09\x12\x07pytorch\x1a\x052.1.0",
    "pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00}\x94\x8c\x01a\x94K\x01s.",
    "numpy": numpy_bytes(),
    "torchscript": zip_of(**{"m__data.pkl": b"", "m__constants.pkl": b"", "m__code__net.py": b""}),
    "pt2": zip_of(**{"m__archive_format": b"pt2", "m__models__model.json": b"{}"}),
    "pt2_compiled": zip_of(**{"m__archive_format": b"pt2", "m__data__aotinductor__model__a.so": b""}),
    "torch_package": zip_of(**{"m__.data__extern_modules": b"", "m__model__model.pkl": b""}),
    "zip": zip_of(**{"m__readme.txt": b"hello"}),
    "damaged_zip": zip_of(**{"m__data.pkl": b"0" * 99})[:80],
    "text ": b'{"abc": {"looks": "like safetensors"}}',
    "other": b"\x89HDF\r\n\x1a\n\x00\x00",
}


@pytest.mark.parametrize("kind", KINDS)
def test_kind_told_from_bytes_and_refused_with_a_way_out(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(KINDS[kind])
    assert sniff(path).name == kind.strip()
    assert_refused(path, "model.pt is ")
    assert_refused(path, "model.pt is ", trust=True)


def test_kinds_that_open(tmp_path: Path) -> None:
    assert sniff(saved(tmp_path / "a.pt", small())).name == "torch_zip"
    assert (
        sniff(saved(tmp_path / "b.pt", small(), _use_new_zipfile_serialization=False)).name == "torch_legacy"
    )
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    path = tmp_path / "c.bin"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0\0\0\0")
    assert sniff(path).name == "safetensors"


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_kinds_written_by_torch(tmp_path: Path) -> None:
    model, x = small().eval(), torch.randn(1, 3, 7, 5)
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "a.pt2")
    torch.jit.trace(model, x).save(str(tmp_path / "b.pt"))
    with torch.package.PackageExporter(tmp_path / "c.pt") as package:
        package.intern("**")
        package.save_pickle("model", "model.pkl", {"a": 1})
    kinds = [sniff(tmp_path / name).name for name in ("a.pt2", "b.pt", "c.pt")]
    assert kinds == ["pt2", "torchscript", "torch_package"]


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    assert sniff(tmp_path).name == "directory"
    assert sniff(tmp_path / "no.pt").name == "missing"
    assert sniff("/dev/null").name == "special"
    assert_refused(tmp_path, "is a directory")
    assert_refused(tmp_path / "no.pt", "no such file")
    assert_refused(tmp_path / "no.pt" / "below.pt", "no such file")
    assert_refused(Path("/dev/null"), "not a regular file")
    assert_refused(Path("nul\0byte"), "cannot read")


# Constructor arguments of the torch.nn modules that need some.
ARGUMENTS: dict[str, Any] = {
    **dict.fromkeys(("in_channels", "num_features", "in_features", "in1_features", "input_size", "n"), 3),
    **dict.fromkeys(
        ("out_channels", "out_features", "embed_dim", "d_model", "hidden_size", "num_channels"), 4
    ),
    **dict.fromkeys(
        ("kernel_size", "num_heads", "nhead", "num_groups", "groups", "padding", "stride", "size"), 2
    ),
    **dict.fromkeys(("upscale_factor", "downscale_factor", "output_size", "in2_features", "norm_type"), 2),
    **dict.fromkeys(("num_embeddings", "embedding_dim", "normalized_shape", "num_classes"), 5),
    **{"dim": 1, "unflattened_size": (1, 3), "threshold": 0.1, "value": 0.2, "cutoffs": [2], "n_classes": 5},
}
SPECIAL = {
    "FractionalMaxPool2d": lambda: nn.FractionalMaxPool2d(2, output_size=3),
    "FractionalMaxPool3d": lambda: nn.FractionalMaxPool3d(2, output_size=3),
    "GRU": lambda: nn.GRU(3, 4),
    "LSTM": lambda: nn.LSTM(3, 4, 2, bidirectional=True),
    "ModuleDict": lambda: nn.ModuleDict({"a": nn.ReLU()}),
    "ModuleList": lambda: nn.ModuleList([nn.ReLU()]),
    "ParameterDict": lambda: nn.ParameterDict({"a": torch.ones(2)}),
    "ParameterList": lambda: nn.ParameterList([torch.ones(2)]),
    "RNN": lambda: nn.RNN(3, 4),
    "RNNBase": lambda: nn.RNNBase("LSTM", 3, 4),
    "RNNCellBase": lambda: nn.RNNCellBase(3, 4, True, 4),
    "Sequential": small,
    "TransformerDecoder": lambda: nn.TransformerDecoder(
        nn.TransformerDecoderLayer(4, 2, activation="gelu"), 2
    ),
    "TransformerEncoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8), 2),
}


def build(name: str) -> nn.Module:
    if name in SPECIAL:
        return SPECIAL[name]()
    cls = getattr(nn, name)
    needed = [
        p.name
        for p in inspect.signature(cls).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    return cls(**{key: ARGUMENTS[key] for key in needed})


NN_MODULES = sorted(
    name
    for name, value in vars(nn).items()
    if isinstance(value, type)
    and issubclass(value, nn.Module)
    and "Lazy" not in name
    and name not in ("DataParallel", "Container")
)


@pytest.mark.filterwarnings("ignore")
def test_every_torch_nn_module_loads_by_default(tmp_path: Path) -> None:
    assert len(NN_MODULES) > 140
    for name in NN_MODULES:
        model = build(name)
        assert_same(load(saved(tmp_path / "m.pt", model)), model)


@pytest.mark.filterwarnings("ignore")
def test_helpers_of_torch_nn_utils_load_by_default(tmp_path: Path) -> None:
    weight_norm = nn.utils.weight_norm(nn.Conv2d(3, 5, 2))
    spectral_norm = nn.utils.spectral_norm(nn.Linear(3, 5))
    pruned = nn.Linear(5, 7)
    prune.l1_unstructured(pruned, "weight", 0.5)
    prune.ln_structured(pruned, "weight", 0.3, n=2, dim=0)
    for model in (weight_norm, spectral_norm, pruned):
        loaded = load(saved(tmp_path / "m.pt", model)).eval()
        x = torch.randn(2, 3, 7, 6) if model is weight_norm else torch.randn(2, model.in_features)
        assert torch.equal(loaded(x), model.eval()(x))


def test_tensors_with_attributes_and_half_precision(tmp_path: Path) -> None:
    model = small().half()
    model[0].weight.origin = "here"
    model.register_buffer("table", torch.ones(3))
    model.table.unit = "cm"
    loaded = load(saved(tmp_path / "m.pt", model))
    assert_same(loaded, model)
    assert loaded[0].weight.origin == "here" and loaded.table.unit == "cm"
    assert loaded[0].weight.dtype == torch.float16
    assert not loaded[0].weight.is_meta and loaded.training


def test_attributes_named_like_methods(tmp_path: Path) -> None:
    """ultralytics sets ``module.type = "Conv"``, which calls nothing."""
    model = small()
    model[0].type = "torch.nn.modules.conv.Conv2d"
    assert load(saved(tmp_path / "m.pt", model))[0].type == model[0].type


def test_describes_what_the_file_is(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pt", small())
    file = open_model(path)
    assert file.describe == "a torch.save file with a module of class torch.nn.modules.container.Sequential"
    assert file.path == path and file.notes == ()


def test_peek_tells_classes_and_tensors_without_running_anything(tmp_path: Path) -> None:
    contents = peek(saved(tmp_path / "m.pt", torchvision.models.resnet18()))
    assert contents is not None and contents.holds == "module"
    assert contents.modules[""] == "torchvision.models.resnet.ResNet"
    assert contents.modules["layer1.0.bn1"] == "torch.nn.modules.batchnorm.BatchNorm2d"
    model = torchvision.models.resnet18()
    found = {t.name: (t.shape, t.dtype) for t in contents.tensors}
    assert found == {k: (tuple(v.shape), str(v.dtype)[6:]) for k, v in model.state_dict().items()}
    assert "torchvision.models.resnet.BasicBlock" in contents.needs
    assert peek(__file__) is None


@pytest.mark.parametrize("legacy", [False, True])
def test_peek_at_other_contents(legacy: bool, tmp_path: Path) -> None:
    def holds(obj: Any) -> tuple[str, int]:
        path = saved(tmp_path / "m.pt", obj, _use_new_zipfile_serialization=not legacy)
        contents = peek(path)
        assert contents is not None
        return contents.holds, len(contents.tensors)

    tensors = len(small().state_dict())
    assert holds(small().state_dict()) == ("state_dict", tensors)
    assert holds({"epoch": 3, "state_dict": small().state_dict()}) == ("state_dict", tensors)
    assert holds({"epoch": 3, "weights": [1, 2]}) == ("other", 0)
    assert holds(torch.fx.symbolic_trace(small()))[0] == "graph_module"
    assert holds(torch.ones(3)) == ("other", 0)
    contents = peek(saved(tmp_path / "m.pt", nn.Parameter(torch.ones(3))))
    assert contents is not None and contents.title == "a tensor and no model"
    if not legacy:
        assert holds({"epoch": 3, "model": small()}) == ("checkpoint", tensors)
