"""Files are told apart, loaded safely by default, and refused with one line and a way out."""

from __future__ import annotations

import inspect
import io
import itertools
import struct
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import prune
from torch_files import archive, members

from convmerge.errors import ConvmergeError, LoadError
from convmerge.io import load, open_model, peek, sniff, unwrap


def saved(path: Path, obj: Any, **options: Any) -> Path:
    torch.save(obj, path, **options)
    return path


def small() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 5, (3, 1), bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 1)
    )


def assert_same(a: nn.Module, b: nn.Module) -> None:
    assert [type(m).__name__ for m in a.modules()] == [type(m).__name__ for m in b.modules()]
    ours, theirs = a.state_dict(), b.state_dict()
    assert list(ours) == list(theirs)
    for key, value in ours.items():
        assert value.dtype == theirs[key].dtype and torch.equal(value, theirs[key]), key


def assert_refused(path: Path, words: str, **options: Any) -> LoadError:
    with pytest.raises(ConvmergeError, match=words) as caught:
        open_model(path, **options)
    error = caught.value
    assert "\n" not in error.message and len(error.message) < 400, error.message
    assert error.hint and "\n" not in error.hint, "every refusal names a way out"
    assert str(path) in error.message or error.message.startswith("--"), error.message
    return error


# Kinds -----------------------------------------------------------------------------------------------------


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


# Loading plain modules -------------------------------------------------------------------------------------

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


# --allow and --trust ---------------------------------------------------------------------------------------


def test_allow_opens_what_it_names(tmp_path: Path) -> None:
    model = torchvision.models.resnet18()
    path = saved(tmp_path / "m.pt", model)
    error = assert_refused(path, "torchvision.models.resnet.ResNet, torchvision.models.resnet.BasicBlock$")
    assert error.hint == "pass --allow torchvision.models.resnet, or --trust if you made this file"
    assert_same(load(path, allow=["torchvision.models.resnet"]), model)
    names = ["torchvision.models.resnet.ResNet", "torchvision.models.resnet.BasicBlock"]
    assert_same(load(path, allow=names), model)
    assert_refused(path, "needs the class torchvision.models.resnet.BasicBlock", allow=names[:1])
    assert_same(load(path, trust=True), model)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("torchvision.models.nothing", "no class or function nothing"),
        ("nothing.at.all", "no module of this name"),
        ("torchvision.models.resnet.torch.load", "no module of this name"),
        ("torchvision.models.resnet.nn", "no class or function nn"),  # imported there, not defined there
        ("a; rm -rf ~", "not a module"),
        ("", "not a module"),
        (".a", "not a module"),
    ],
)
def test_allow_refuses_what_it_cannot_mean(spec: str, words: str, tmp_path: Path) -> None:
    assert_refused(saved(tmp_path / "m.pt", torchvision.models.resnet18()), words, allow=[spec])


SOURCE = """
import functools
import torch
from torch import nn

class {name}(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 2)
        self.make = functools.partial(nn.ReLU, inplace=True)

    def forward(self, x):
        return self.conv(x)
"""


def test_file_beside_the_model_is_imported_only_when_named(tmp_path: Path) -> None:
    name = "beside_the_model"
    (tmp_path / f"{name}.py").write_text(SOURCE.format(name="Net"))
    sys.path.insert(0, str(tmp_path))
    model = __import__(name).Net()
    path = saved(tmp_path / "m.pt", model)
    sys.path.remove(str(tmp_path))
    del sys.modules[name]
    before = list(sys.path)

    error = assert_refused(path, f"needs the classes {name}.Net, functools.partial")
    assert name not in sys.modules, "an untrusted file must not choose what is imported"
    assert error.hint == f"pass --allow {name} --allow functools.partial, or --trust if you made this file"
    loaded = load(path, allow=[name, "functools.partial"])
    assert type(loaded).__name__ == "Net" and torch.equal(loaded.conv.weight, model.conv.weight)
    del sys.modules[name]
    assert type(load(path, trust=True)).__name__ == "Net"
    assert sys.path == before


def test_errors_of_missing_code_are_clear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "module_that_goes"
    (tmp_path / f"{name}.py").write_text(SOURCE.format(name="Net"))
    monkeypatch.syspath_prepend(str(tmp_path))
    path = saved(tmp_path / "m.pt", __import__(name).Net())
    monkeypatch.undo()
    del sys.modules[name]
    (tmp_path / f"{name}.py").write_text(SOURCE.format(name="Renamed"))
    assert_refused(path, f"needs the class {name}.Net, which is not there", trust=True)
    assert_refused(path, f"needs the class.* {name}.Net", allow=[name])
    del sys.modules[name]
    (tmp_path / f"{name}.py").write_text("import no_such_package_x\n")
    assert_refused(path, "needs the module no_such_package_x", trust=True)
    assert_refused(path, "importing module_that_goes fails: No module named", allow=[name])
    (tmp_path / f"{name}.py").write_text("1 / 0\n")
    assert_refused(path, "importing module_that_goes fails: ZeroDivisionError", allow=[name])
    (tmp_path / f"{name}.py").unlink()
    assert_refused(path, "needs the module module_that_goes", trust=True)


def test_traced_modules_need_trust(tmp_path: Path) -> None:
    traced = torch.fx.symbolic_trace(small())
    path = saved(tmp_path / "m.pt", nn.Sequential(traced))
    error = assert_refused(path, "traced module")
    assert error.hint == "pass --trust if you made this file"
    loaded, x = load(path, trust=True), torch.randn(2, 3, 7, 5)
    assert torch.equal(loaded.eval()(x), traced.eval()(x))


def test_legacy_files(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pt", small(), _use_new_zipfile_serialization=False)
    assert "--trust" in (assert_refused(path, "format from before torch 1.6").hint or "")
    assert_same(load(path, trust=True), small())
    path = saved(tmp_path / "s.pt", small().state_dict(), _use_new_zipfile_serialization=False)
    assert_same(load(path, factory=f"{__name__}:small"), small())


def test_other_pickle_protocols(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pt", small(), pickle_protocol=4)
    assert "--trust" in (assert_refused(path, "protocol 4").hint or "")
    assert_same(load(path, trust=True), small())


# Checkpoints, state_dicts, wrappers ------------------------------------------------------------------------


def test_checkpoint_dict_around_a_module(tmp_path: Path) -> None:
    file = open_model(saved(tmp_path / "m.pt", {"epoch": 7, "model": small()}))
    assert_same(file.module, small())
    assert file.container.document is not None and file.container.document["epoch"] == 7
    assert file.container.key == "model" and file.notes == ()


@pytest.mark.parametrize("order", list(itertools.permutations(["net", "ema", "model"])))
def test_checkpoint_with_several_modules_says_which_is_taken(order: tuple[str, ...], tmp_path: Path) -> None:
    document = {key: nn.Linear(3, len(key)) for key in order}
    file = open_model(saved(tmp_path / "m.pt", document))
    assert_same(file.module, document["ema"])
    others = [key for key in order if key != "ema"]
    assert file.notes == (
        f"of several modules in the file took 'ema' and left '{others[0]}', '{others[1]}' as it is",
    )


def test_same_module_twice_is_one(tmp_path: Path) -> None:
    model = small()
    file = open_model(saved(tmp_path / "m.pt", {"model": model, "ema": model}))
    assert file.notes == ()
    new = nn.ReLU()
    assert file.container.wrap(new) == {"model": new, "ema": new}
    assert file.container.document is not None and file.container.document["ema"] is file.module


@pytest.mark.parametrize(
    "obj", [[nn.ReLU()], (1, 2), "text", {"a": 1}, {}, None, torch.ones(3), {"a": {"b": {}}}]
)
def test_files_without_a_model(obj: Any, tmp_path: Path) -> None:
    assert_refused(saved(tmp_path / "m.pt", obj), "holds (no|a)")


def test_state_dict_needs_a_factory(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pt", small().state_dict())
    assert "--model" in (assert_refused(path, "tensors only").hint or "")
    file = open_model(path, factory=f"{__name__}:small")
    assert_same(file.module, small())
    assert "writes a whole module" in file.notes[-1]


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "params", "net"])
def test_state_dict_inside_a_checkpoint(key: str, tmp_path: Path) -> None:
    state = {f"module.{name}": value for name, value in small().state_dict().items()}
    path = saved(tmp_path / "m.pt", {"epoch": 1, key: OrderedDict(state), "optimizer": {"lr": 0.1}})
    file = open_model(path, factory=f"{__name__}:small")
    assert_same(file.module, small())
    assert file.notes[:2] == (f"took the weights under '{key}'", "took 'module.' off every key")


def test_state_dict_keeps_half_precision(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pt", small().half().state_dict())
    assert_same(load(path, factory=f"{__name__}:small"), small().half())


def convs(out: int = 4, name: str = "conv") -> nn.Module:
    return nn.Sequential(OrderedDict({name: nn.Conv2d(3, out, 2), "tail": nn.Conv2d(out, 2, 1)}))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            {"out": 5},
            r"does not fit the model: conv.weight is \(4, 3, 2, 2\) in the file, \(5, 3, 2, 2\) in the model",
        ),
        ({"name": "stem"}, r"2 missing \(first: stem.weight\), 2 unexpected \(first: conv.weight\)"),
        ('{"depth": 3}', "convs fails: TypeError"),
        ("[1]", "no JSON object"),
        ("{", "no JSON"),
    ],
)
def test_state_dict_that_does_not_fit(args: Any, words: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pt", convs().state_dict())
    assert_same(load(path, factory=f"{__name__}:convs", factory_args='{"out": 4}'), load_convs(path))
    assert_refused(path, words, factory=f"{__name__}:convs", factory_args=args)


def load_convs(path: Path) -> nn.Module:
    model = convs()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (__name__, "not of the form"),
        (f"{__name__}:", "not of the form"),
        ("no.such.module:f", "no module no.such.module"),
        (f"{__name__}:nothing", "no callable nothing"),
        (f"{__name__}:KINDS", "no callable KINDS"),
        (f"{__name__}:numpy_bytes", "gave a bytes"),
    ],
)
def test_bad_factories(factory: str, words: str, tmp_path: Path) -> None:
    assert_refused(saved(tmp_path / "m.pt", convs().state_dict()), words, factory=factory)


def test_factory_for_a_whole_module_is_refused(tmp_path: Path) -> None:
    for obj in (small(), {"model": small()}):
        assert_refused(saved(tmp_path / "m.pt", obj), "whole module", factory=f"{__name__}:small")


def test_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is optional: with a stand-in for it, with a failing one, and without it."""
    path = tmp_path / "m.bin"
    path.write_bytes(struct.pack("<Q", 2) + b"{}")
    stand_in = ModuleType("safetensors.torch")
    monkeypatch.setitem(sys.modules, "safetensors", ModuleType("safetensors"))
    monkeypatch.setitem(sys.modules, "safetensors.torch", stand_in)
    stand_in.load_file = lambda file, device: small().state_dict()  # type: ignore[attr-defined]
    assert_same(load(path, factory=f"{__name__}:small"), small())
    assert "--model" in (assert_refused(path, "tensors only").hint or "")
    stand_in.load_file = lambda file, device: 1 / 0  # type: ignore[attr-defined]
    assert_refused(path, "damaged: division by zero", factory=f"{__name__}:small")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    error = assert_refused(path, "safetensors package is not installed", factory=f"{__name__}:small")
    assert error.hint == "pip install safetensors"


def test_wrappers_come_off(tmp_path: Path) -> None:
    file = open_model(saved(tmp_path / "m.pt", nn.DataParallel(small())))
    assert_same(file.module, small())
    assert file.notes == ("took the model out of its DataParallel wrapper, and writes it without",)
    compiled = torch.compile(small())
    inner, wrappers = unwrap(nn.DataParallel(compiled))
    assert inner is compiled._orig_mod and wrappers == ("DataParallel", "torch.compile")
    error = assert_refused(saved(tmp_path / "c.pt", compiled), "torch.compile wrapper")
    assert "_orig_mod" in (error.hint or "")


@pytest.mark.filterwarnings("ignore:torch.quantize")
def test_tensors_without_plain_numbers(tmp_path: Path) -> None:
    with torch.device("meta"):
        meta = nn.Linear(3, 5)
    sparse = nn.Linear(3, 5)
    sparse.register_buffer("mask", torch.eye(3).to_sparse())
    quantised = nn.Module()
    quantised.register_buffer("q", torch.quantize_per_tensor(torch.ones(3), 0.1, 2, torch.qint8))
    for model, words in (
        (meta, "weight is on the meta device"),
        (sparse, "mask is sparse"),
        (quantised, "q is quantised"),
        (nn.LazyLinear(3), "lazy module"),
    ):
        assert_refused(saved(tmp_path / "m.pt", model), words)


# Damage ----------------------------------------------------------------------------------------------------


def boundaries(path: Path) -> list[int]:
    """Where the parts of a zip archive begin and end."""
    with zipfile.ZipFile(path) as file:
        ends = [info.header_offset for info in file.infolist()]
        ends += [info.header_offset + 30 + len(info.filename) for info in file.infolist()]
        directory = file.start_dir
    size = path.stat().st_size
    return sorted({*ends, directory, directory + 46, size - 22, size - 1})


def test_cut_short_anywhere_is_one_clear_error(tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole.pt", small()).read_bytes()
    path = tmp_path / "m.pt"
    cuts = {cut + shift for cut in boundaries(tmp_path / "whole.pt") for shift in (-1, 0, 1)}
    for cut in sorted(cuts - {-1, len(whole)}):
        path.write_bytes(whole[:cut])
        for trust in (False, True):
            assert_refused(path, "m.pt", trust=trust)
    assert len(cuts) > 40


def test_legacy_cut_short(tmp_path: Path) -> None:
    whole = saved(tmp_path / "w.pt", small().state_dict(), _use_new_zipfile_serialization=False).read_bytes()
    path = tmp_path / "m.pt"
    for cut in {*range(0, len(whole), 97), 1, 13, 14, 15, 16, 30, len(whole) - 1}:
        path.write_bytes(whole[:cut])
        assert_refused(path, "m.pt|pickle", factory=f"{__name__}:small")


def test_a_flipped_byte_is_refused_or_harmless(tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole.pt", small()).read_bytes()
    path, refused = tmp_path / "m.pt", 0
    positions = range(0, len(whole), 41)
    for position in positions:
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        try:
            model = load(path)
        except LoadError:
            refused += 1
        else:
            assert_same(model, small())
    assert refused > len(positions) / 4, f"{refused} of {len(positions)}"


def test_a_flipped_weight_byte_is_refused_by_name(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pt", small())
    whole = path.read_bytes()
    start = whole.index(small()[0].weight.detach().numpy().tobytes())
    for position in range(start, start + 3 * 5 * 3 * 4, 17):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        assert_refused(path, "is damaged: m/data/0 does not match its checksum")


def test_member_that_claims_to_be_a_directory(tmp_path: Path) -> None:
    """torch.load gives uninitialised memory for it."""
    path = tmp_path / "m.pt"
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members(small()).items():
            info = zipfile.ZipInfo(f"m/{name}")
            info.external_attr = 0x10 if name == "data/0" else 0
            file.writestr(info, data)
    assert_refused(path, "claims to be a directory")


def test_files_without_checksums_load(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(tmp_path / "m.pt", small())
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(load(path), small())


def test_archives_that_are_not_as_torch_writes_them(tmp_path: Path) -> None:
    parts = members(small())
    path = tmp_path / "m.pt"
    storages = {key.removeprefix("data/"): value for key, value in parts.items() if key.startswith("data/")}

    archive(path, parts["data.pkl"], storages)
    assert_same(load(path), small())
    archive(path, parts["data.pkl"], storages, byteorder=b"big")
    assert_refused(path, "another byte order")
    archive(path, parts["data.pkl"], storages, byteorder=b"\xff")
    assert_refused(path, "another byte order")
    archive(path, parts["data.pkl"], {key: value for key, value in storages.items() if key != "2"})
    assert_refused(path, "lacks the numbers of storage 2")
    archive(path, parts["data.pkl"], {**storages, "0": storages["0"][:-4]})
    assert_refused(path, "lacks the numbers of storage 0")
    with zipfile.ZipFile(path, "a") as file, pytest.warns(UserWarning):
        file.writestr("archive/data.pkl", parts["data.pkl"])
    assert_refused(path, "doubled")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in parts.items():
            file.writestr(f"archive/{name}", data)
    assert_refused(path, "packed again")
