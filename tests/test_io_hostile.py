"""Hostile files: nothing they say is run, and whatever they hold ends in one LoadError."""

from __future__ import annotations

import functools
import os
import random
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torch_files import (
    CONV,
    RELU,
    SEQUENTIAL,
    archive,
    call,
    mapping,
    members,
    module,
    name,
    pack,
    program,
    text,
)

from convmerge.errors import LoadError
from convmerge.io import check_module, load, open_model, peek
from convmerge.io.pickles import printable

ORDERED = name("collections", "OrderedDict")
ONE = b"K\x01"


def refuse(path: Path, words: str = "", **options: Any) -> LoadError:
    with pytest.raises(LoadError, match=words or None) as caught:
        open_model(path, **options)
    error = caught.value
    assert error.message.isprintable() and len(error.message) < 400, error.message
    assert error.hint and error.hint.isprintable()
    return error


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that must not appear; relative names are made in its directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "marker"
    yield path
    assert not path.exists(), "code from the file was run"


class Reduce:
    """Pickles as a call of ``function``."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.reduced = (function, args)

    def __reduce__(self) -> Any:
        return self.reduced


def with_attribute(value: Any) -> nn.Module:
    model = nn.ReLU()
    model.note = value
    return model


CALLS = {
    "os.system": Reduce(os.system, "touch marker"),
    "eval": Reduce(eval, "open('marker', 'w')"),
    "exec": Reduce(exec, "open('marker', 'w')"),
    "open": Reduce(open, "marker", "w"),
    "getattr": Reduce(getattr, nn.ReLU, "forward"),
    "torch.load": Reduce(torch.load, "marker"),
    "torch.save": Reduce(torch.save, 1, "marker"),
    "partial": Reduce(functools.partial, os.system, "touch marker"),
    "import": Reduce(__import__, "this"),
    "fx": Reduce(torch.fx.graph_module.reduce_graph_module, {"_code": "open('marker', 'w')"}, ""),
    "jit": Reduce(torch.jit.load, "marker"),
}


@pytest.mark.parametrize("which", CALLS)
@pytest.mark.parametrize("place", ["root", "attribute", "checkpoint", "state_dict"])
@pytest.mark.parametrize("legacy", [False, True])
def test_calls_are_not_run(which: str, place: str, legacy: bool, marker: Path) -> None:
    evil = CALLS[which]
    documents = {
        "root": evil,
        "attribute": with_attribute(evil),
        "checkpoint": {"model": nn.ReLU(), "epoch": evil},
        "state_dict": {"weight": torch.ones(3), "extra": evil},
    }
    path = marker.with_name("m.pt")
    torch.save(documents[place], path, _use_new_zipfile_serialization=not legacy)
    peek(path)
    refuse(path, allow=["torchvision.models.resnet"])
    refuse(path, factory="torchvision.models:resnet18")


def test_hint_never_offers_to_allow_what_runs_code(marker: Path) -> None:
    path = marker.with_name("m.pt")
    for evil in ("os.system", "eval", "getattr", "exec", "import"):
        torch.save(with_attribute(CALLS[evil]), path)
        error = refuse(path, "asks for what can run any code")
        assert error.hint == "pass --trust if you made this file"
    for evil in ("torch.load", "torch.save", "jit"):
        torch.save(with_attribute(CALLS[evil]), path)
        error = refuse(path, "could be made to run code")
        assert error.hint == "pass --trust if you made this file"
    torch.save(with_attribute(CALLS["partial"]), path)
    refuse(path, "asks for what can run any code: (posix|nt).system", allow=["functools.partial"])


HOSTILE = {
    "a module class is called": (
        call(CONV, ONE, ONE, ONE),
        "calls torch.nn.modules.conv.Conv2d with arguments",
    ),
    "a module class is called inside a module": (
        module(SEQUENTIAL, {"0": call(CONV, ONE, ONE, ONE)}),
        "calls torch.nn.modules.conv.Conv2d with arguments",
    ),
    "a module class is called by a tensor's function": (
        call(name("torch._tensor", "_rebuild_from_type_v2"), CONV, CONV, pack(ONE, ONE, ONE), b"}"),
        "rebuilds a tensor by calling torch.nn.modules.conv.Conv2d",
    ),
    "bytes are instantiated": (b"\x96" + bytes([1] + [0] * 7) + b"x)\x81", ""),
    "bytes are called": (b"\x96" + bytes([1] + [0] * 7) + b"x)R" + module(name("a", "B")) + b"\x86", ""),
    "an instance is called": (
        call(module(RELU), ONE),
        "calls a value that is neither a class nor a function",
    ),
    "a method through a dotted name": (
        call(name("torchvision.models.resnet", "torch.load"), text("marker")),
        "the function torchvision.models.resnet.torch.load",
    ),
    "a name that is imported, not defined, there": (
        module(name("torchvision.models.resnet", "nn")),
        "needs the class torchvision.models.resnet.nn",
    ),
    "a function of an allowed module": (
        call(name("torchvision.models.resnet", "resnet18")),
        "the function torchvision.models.resnet.resnet18",
    ),
    "a special method": (
        module(RELU, __reduce_ex__=module(RELU)),
        "replaces the special method __reduce_ex__",
    ),
    "a special method of a dict": (
        module(RELU, note=ORDERED + b")R" + mapping({"__reduce__": module(RELU)}) + b"b"),
        "replaces the special method __reduce__",
    ),
    "the second state of an object": (
        module(RELU, __class__=ONE) + mapping({"training": b"\x88"}) + b"b",
        "replaces the special method __class__",
    ),
    "forward": (module(RELU, forward=CONV), "replaces the method forward of the ReLU"),
    "the compiled call": (module(RELU, _compiled_call_impl=CONV), "replaces the method _compiled_call_impl"),
    "train": (
        module(SEQUENTIAL, {"a": module(RELU, train=CONV)}),
        "replaces the method train of the ReLU at a",
    ),
    "a hook": (module(RELU, _forward_hooks=b"}" + ONE + CONV + b"s"), "puts a hook"),
    "a hook that is a module": (
        module(RELU, _forward_pre_hooks=b"}" + ONE + module(CONV) + b"s"),
        "a hook .Conv2d",
    ),
    "hooks that are no dict": (module(RELU, _backward_hooks=module(RELU)), "puts a hook"),
    "code in a name": (module(SEQUENTIAL, {'a"); open("marker", "w") #': module(RELU)}), "not safe to trace"),
    "a quote in a name": (module(SEQUENTIAL, {"a\\": module(RELU)}), "not safe to trace"),
    "a new line in a name": (module(SEQUENTIAL, {"a\nb": module(RELU)}), "not safe to trace"),
    "a dot in a name": (module(SEQUENTIAL, {"a.b": module(RELU)}), "not safe to trace"),
    "an empty name": (module(SEQUENTIAL, {"": module(RELU)}), "not safe to trace"),
    "a keyword as a name": (module(SEQUENTIAL, {"class": module(RELU)}), "'class' is not safe to trace"),
    "a name that is no string": (
        module(SEQUENTIAL, _modules=b"}" + ONE + module(RELU) + b"s"),
        "1 is not safe",
    ),
    "code in a parameter's name": (module(RELU, _parameters=mapping({'"': b"N"})), "not safe to trace"),
    "a child that is no module": (module(SEQUENTIAL, {"a": ONE}), "its _modules are not all Modules"),
    "a registry that is no dict": (module(SEQUENTIAL, _buffers=b"]"), "its _buffers are not all Tensors"),
    "no registry": (
        SEQUENTIAL + b")\x81" + mapping({"training": b"\x88"}) + b"b",
        "is damaged: its _modules",
    ),
    "a cycle": (  # the Sequential is remembered, and stands below itself
        SEQUENTIAL
        + b")\x81q\x07"
        + mapping({k: b"}" for k in ("_parameters", "_buffers")} | {"_modules": mapping({"a": b"h\x07"})})
        + b"b",
        "module a contains itself",
    ),
    "a module that is no instance": (CONV, "holds a type, not a model"),
    "escapes in a class name": (module(name("a\x1b[2Jb", "C")), "names the class a�"),
    "shell code in a class name": (module(name("a;touch", "marker")), "names the class a;touch.marker"),
    "a very long class name": (module(name("a" * 100_000, "C")), "needs the class aaa"),
    "a class of the script": (module(name("__main__", "Net")), "class of the script that saved it"),
    "a class that torch has lost": (
        module(name("torch.nn.modules.linear", "_Gone")),
        "this version of torch does",
    ),
}


@pytest.mark.parametrize("which", HOSTILE)
def test_hostile_pickle_is_refused(which: str, marker: Path) -> None:
    pickle, words = HOSTILE[which]
    path = archive(marker.with_name("m.pt"), program(pickle))
    peek(path)
    refuse(path, words, allow=["torchvision.models.resnet"])


def nested(depth: int) -> bytes:
    return b")" + b"\x85" * depth


DAMAGED = {
    "no pickle": b"hello",
    "empty": b"",
    "no end": b"\x80\x02]",
    "underflow": b"\x80\x02\x85.",
    "underflow of marks": b"\x80\x02t.",
    "nothing left": b"\x80\x02.",
    "unknown instruction": b"\x80\x02\xff.",
    "unknown protocol": b"\x80\xff].",
    "extension registry": b"\x80\x02\x82\x01.",
    "missing memo": b"\x80\x02h\x09.",
    "huge memo index": b"\x80\x02]r\xff\xff\xff\xff.",
    "huge text": b"\x80\x02X\xff\xff\xff\x7fabc.",
    "huge integer": b"\x80\x02\x8b\xff\xff\xff\x7f1.",
    "many digits": b"\x80\x02I" + b"9" * 100_000 + b"\n.",
    "bad utf-8": b"\x80\x02X\x02\x00\x00\x00\xff\xff.",
    "bad class name": b"\x80\x02c\xff\xfe\n\xff\n.",
    "space in a class name": b"\x80\x02ca b\nc d\n.",
    "class name that is no string": b"\x80\x04K\x01K\x01\x93.",
    "odd items": b"\x80\x02}(K\x01u.",
    "append to a number": b"\x80\x02K\x01K\x01a.",
    "change a tuple": b"\x80\x02)K\x01a.",
    "state of a class": b"\x80\x02" + RELU + b"}b.",
    "arguments that are no tuple": b"\x80\x02" + RELU + b"]\x81.",
    "deep tuple": program(nested(1_000_000)),
    "deep tuple as a key": program(b"}" + nested(200_000) + b"Ns"),
    "exponential tuple as a key": program(b"})" + b"2\x86" * 80 + b"Ns"),
    "foreign persistent id": program(b"K\x01Q"),
    "storage of a wrong form": program(pack(text("module"), RELU, text("0"), text("cpu"), ONE) + b"Q"),
    "storage of a negative size": program(
        pack(text("storage"), name("torch", "FloatStorage"), text("0"), text("cpu"), b"J\xff\xff\xff\xff")
        + b"Q"
    ),
}


@pytest.mark.parametrize("which", DAMAGED)
def test_damaged_pickle_is_one_error(which: str, tmp_path: Path) -> None:
    path = archive(tmp_path / "m.pt", DAMAGED[which])
    refuse(path)
    refuse(path, trust=True)


def test_deep_nesting_is_survived(tmp_path: Path) -> None:
    lists = program(b"]" * 200_000 + b"a" * 199_999)
    refuse(archive(tmp_path / "m.pt", lists), "holds a list")
    tower = functools.reduce(lambda inner, _: module(SEQUENTIAL, {"a": inner}), range(3000), module(RELU))
    refuse(archive(tmp_path / "m.pt", program(tower)), "nest more than 200 deep|more modules than any model")


def test_storage_sizes_are_checked_before_memory_is_taken(tmp_path: Path) -> None:
    huge = pack(
        text("storage"),
        name("torch", "DoubleStorage"),
        text("0"),
        text("cpu"),
        b"\x8a\x06" + b"\xff" * 5 + b"\x7f",
    )
    path = archive(tmp_path / "m.pt", program(huge + b"Q"), {"0": bytes(16)})
    refuse(path, "lacks the numbers of storage 0")


@pytest.mark.filterwarnings("ignore:invalid escape:DeprecationWarning")
def test_mutated_pickles_end_in_load_errors(marker: Path) -> None:
    """Random edits of a real model's pickle, checksums made right again."""
    seed = 11
    parts = members(nn.Sequential(nn.Conv2d(3, 5, 2), nn.BatchNorm2d(5), OrderedModule()))
    storages = {key.removeprefix("data/"): data for key, data in parts.items() if key.startswith("data/")}
    rng, outcomes = random.Random(seed), [0, 0]
    for trial in range(400):
        pickle = bytearray(parts["data.pkl"])
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(pickle))
            edit = rng.choice(["replace", "insert", "delete", "copy"])
            if edit == "replace":
                pickle[at] = rng.randrange(256)
            elif edit == "insert":
                pickle.insert(at, rng.choice(b"(.012}])tuabRcNhqQ\x81\x85\x88"))
            elif edit == "delete":
                del pickle[at : at + rng.randint(1, 4)]
            else:
                pickle[at:at] = pickle[rng.randrange(len(pickle)) :][: rng.randint(1, 30)]
        path = archive(marker.with_name("m.pt"), bytes(pickle), storages)
        try:
            peek(path)
            check_module(load(path, allow=[__name__]))
            outcomes[0] += 1
        except LoadError:
            outcomes[1] += 1
        except Exception as error:
            pytest.fail(f"seed {seed}, trial {trial}: {error!r}")
    assert min(outcomes) > 5, outcomes


class OrderedModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = OrderedDict(a=1, b=(2, [3.5, None]), c={"d": True})


def test_ambient_safe_globals_survive_a_load(tmp_path: Path) -> None:
    """The classes allowed for one file are not allowed for the next, and the caller's own stay."""
    path = tmp_path / "m.pt"
    torch.save(torchvision.models.resnet18(), path)
    with torch.serialization.safe_globals([OrderedModule]):
        before = set(torch.serialization.get_safe_globals())
        load(path, allow=["torchvision.models.resnet"])
        assert set(torch.serialization.get_safe_globals()) == before
    refuse(path, "needs the class")


def test_names_that_real_models_use_are_fine() -> None:
    names = ("0", "conv1", "1x1", "branch-3", "pool/3x3", "ä", "_x", "a b", "p:q", "a+b")
    tree = nn.ModuleDict({name: nn.ReLU() for name in names})
    check_module(tree)
    check_module(nn.Sequential(tree, tree))  # shared, not cyclic


def test_text_from_files_is_made_printable() -> None:
    assert printable("a\x1b[31m\nb") == "a�[31m�b"
    assert len(printable("x" * 10**6)) == 120


def test_modules_beside_the_model_shadow_nothing_installed(tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise SystemExit('hostile')")
    (tmp_path / "json.py").write_text("raise SystemExit('hostile')")
    path = tmp_path / "m.pt"
    torch.save(torchvision.models.resnet18(), path)
    assert isinstance(load(path, allow=["torchvision.models.resnet", "json"]), nn.Module)
    assert "hostile" not in repr(sys.modules["torchvision"])
