"""A model is written whole or not at all, as its input was, and loads without convmerge."""

from __future__ import annotations

import errno
import os
import resource
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch_files import assert_same, small

from convmerge.errors import ConvmergeError
from convmerge.io import check_target, load, open_model, save


def state_of(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def assert_refused(path: Path, words: str, directory: Path, **options: Any) -> None:
    """The error is one line with a way out, and nothing in the directory has changed."""
    before = state_of(directory)
    with pytest.raises(ConvmergeError, match=words) as caught:
        save(options.pop("model", small()), path, **options)
    assert "\n" not in caught.value.message and caught.value.hint
    assert state_of(directory) == before


# Containers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["m.pt", "m.pth", "m.PT"])
def test_module_comes_back(name: str, tmp_path: Path) -> None:
    save(small(), tmp_path / name)
    assert_same(load(tmp_path / name), small())
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_checkpoint_stays_a_dict_with_only_the_module_replaced(tmp_path: Path) -> None:
    document = {"epoch": 7, "model": small(), "ema": nn.DataParallel(small()), "optimizer": {"lr": [0.1, 2]}}
    torch.save(document, tmp_path / "in.pt")
    file = open_model(tmp_path / "in.pt")
    save(nn.Linear(3, 5), tmp_path / "out.pt", like=file)
    written = torch.load(tmp_path / "out.pt", weights_only=False)
    assert list(written) == list(document) and written["epoch"] == 7
    assert written["optimizer"] == document["optimizer"]
    assert isinstance(written["ema"], nn.Linear)
    assert_same(written["model"], small())
    assert file.container.document is not None
    assert isinstance(file.container.document["ema"], nn.DataParallel), "the opened document is not changed"
    again = open_model(tmp_path / "out.pt")
    assert isinstance(again.module, nn.Linear) and again.container.key == "ema"


def test_written_bytes_do_not_depend_on_the_run(tmp_path: Path) -> None:
    save(small(), tmp_path / "a.pt")
    save(small(), tmp_path / "b.pt")
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


class Tracer(torch.fx.Tracer):
    """A tracer of this test, which a fresh process cannot import."""

    def is_leaf_module(self, m: nn.Module, name: str) -> bool:
        return isinstance(m, nn.Conv2d) or super().is_leaf_module(m, name)


LOAD_ALONE = """
import sys
for name in ("convmerge", "torch_files", "test_io_save"):
    sys.modules[name] = None  # importing it raises
import torch
torch.set_num_threads(int(sys.argv[2]))
directory = sys.argv[1]
x = torch.load(directory + "/x.pt")
for name in ("plain", "traced", "checkpoint"):
    model = torch.load(f"{directory}/{name}.pt", weights_only=False)
    model = model["model"] if name == "checkpoint" else model
    assert torch.equal(model(x), torch.load(directory + "/y.pt")), name
print("fine")
"""


def test_written_files_load_with_torch_alone(tmp_path: Path) -> None:
    model, x = small().eval(), torch.randn(2, 3, 7, 5)
    traced = nn.Sequential(model[0], torch.fx.GraphModule(model[1:], Tracer().trace(model[1:])))
    assert torch.equal(traced(x), model(x))
    torch.save({"epoch": 1, "model": model}, tmp_path / "in.pt")
    torch.save(x, tmp_path / "x.pt")
    torch.save(model(x), tmp_path / "y.pt")
    save(model, tmp_path / "plain.pt")
    save(traced, tmp_path / "traced.pt")
    save(traced, tmp_path / "checkpoint.pt", like=open_model(tmp_path / "in.pt"))
    command = [sys.executable, "-c", LOAD_ALONE, str(tmp_path), str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0 and done.stdout == "fine\n", done.stderr


# Verification from the temporary file ----------------------------------------------------------------------


def test_what_is_verified_is_what_was_written(tmp_path: Path) -> None:
    seen: list[nn.Module] = []

    def verify(model: nn.Module, others: object) -> None:
        seen.append(model)
        assert not (tmp_path / "m.pt").exists(), "nothing is in place before it has been verified"

    model = small()
    save(model, tmp_path / "m.pt", verify=verify)
    assert seen[0] is not model
    assert_same(seen[0], model)


@pytest.mark.parametrize(
    "error", [ConvmergeError("not equal", "x"), KeyboardInterrupt(), SystemExit(3), OSError("x")]
)
def test_failed_verification_leaves_everything_as_it_was(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    path.write_bytes(b"old")

    def verify(model: nn.Module, others: object) -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        save(small(), path, verify=verify)
    assert caught.value is error
    assert state_of(tmp_path) == {str(path): b"old"}


# Targets ---------------------------------------------------------------------------------------------------


def test_existing_file_is_replaced_and_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    path.write_bytes(b"old")
    path.chmod(0o640)
    with path.open("rb") as reader:
        save(small(), path)
        assert reader.read() == b"old", "who has the old file open keeps it"
    assert_same(load(path), small())
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_new_file_gets_the_usual_permissions(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save(small(), tmp_path / "m.pt")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "m.pt").stat().st_mode) == 0o640


def test_symbolic_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "m.pt", tmp_path / "link.pt"
    link.symlink_to(target)
    for _ in range(2):  # dangling, then not
        save(small(), link)
        assert link.is_symlink() and not target.is_symlink()
        assert_same(load(target), small())
    assert [path.name for path in (tmp_path / "real").iterdir()] == ["m.pt"]


def test_targets_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "directory.pt").mkdir()
    os.mkfifo(tmp_path / "fifo.pt")
    (tmp_path / "null.pt").symlink_to("/dev/null")
    (tmp_path / "loop.pt").symlink_to("loop.pt")
    (tmp_path / "file").write_bytes(b"x")
    for name, words in {
        "m.safetensors": "written as .pt, .pth, .pt2 or .onnx, not '.safetensors'",
        "m": "no suffix",
        "": "it is a directory",
        "nowhere/m.pt": "there is no directory",
        "file/m.pt": "there is no directory",
        "directory.pt": "it is a directory",
        "fifo.pt": "not a regular file",
        "null.pt": "not a regular file",
        "loop.pt": "cannot write",
        "n" * 300 + ".pt": "File name too long",
    }.items():
        assert_refused(tmp_path / name, words, tmp_path)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_the_input_itself_needs_force(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save(small(), path)
    file = open_model(path)
    (tmp_path / "link.pt").symlink_to(path)
    os.link(path, tmp_path / "hard.pt")
    for name in ("m.pt", "link.pt", "hard.pt"):
        assert_refused(tmp_path / name, "is the input itself", tmp_path, like=file)
    assert check_target(path, source=file.path, force=True) == path.resolve()
    save(nn.Linear(3, 5), tmp_path / "link.pt", like=file, force=True)
    assert isinstance(load(path), nn.Linear)


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked of the system beforehand; root may write everywhere, so the answer is replaced here."""
    path = tmp_path / "m.pt"
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        assert_refused(path, "the directory is read-only", tmp_path)
        path.write_bytes(b"old")
        assert_refused(path, "the file is read-only", tmp_path)

    def denied(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    for function in ("replace", "chmod"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, denied)
            assert_refused(path, "Permission denied", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.mkstemp", denied)
        assert_refused(path, "Permission denied", tmp_path)


@pytest.mark.parametrize("room", [0, 100, 3000, 20_000])
def test_no_room_is_a_clean_error(room: int, tmp_path: Path) -> None:
    (tmp_path / "m.pt").write_bytes(b"old")
    model = nn.Linear(103, 211)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = state_of(tmp_path)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit[1]))
        with pytest.raises(ConvmergeError, match="File too large"):
            save(model, tmp_path / "m.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert state_of(tmp_path) == before


def test_full_disk_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    before = state_of(tmp_path)
    with pytest.raises(ConvmergeError, match="No space left on device") as caught:
        save(small(), tmp_path / "m.pt")
    assert caught.value.hint == "free some space, or choose another place with -o"
    assert state_of(tmp_path) == before


class Unloadable(nn.Module):
    """Can be pickled, but not unpickled."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        raise ValueError("wrong version")


def test_models_that_do_not_pickle(tmp_path: Path) -> None:
    class Local(nn.Module):
        pass

    with_lambda = small()
    with_lambda.f = lambda x: x
    for model in (Local(), with_lambda):
        assert_refused(tmp_path / "m.pt", "cannot be pickled", tmp_path, model=model)
    assert_refused(
        tmp_path / "m.pt", "would not load again: ValueError: wrong version", tmp_path, model=Unloadable()
    )


def test_interrupt_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.pt"
    path.write_bytes(b"old")

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(small(), path)
    assert state_of(tmp_path) == {str(path): b"old"}
