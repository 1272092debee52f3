"""What needs --allow or --trust, and what these do."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torch_files import assert_refused, assert_same, saved, small

from convmerge.io import load


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
