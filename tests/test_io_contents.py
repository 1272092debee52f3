"""Checkpoint dicts, state_dicts, wrapped models and tensors without plain numbers."""

from __future__ import annotations

import itertools
import struct
import sys
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch_files import assert_refused, assert_same, saved, small

from convmerge.io import load, open_model, unwrap


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
        (f"{__name__}:nn", "no callable nn"),
        ("builtins:dict", "gave a dict"),
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
