"""The model files in fixtures/ are what their script makes, and merge into what they are there to show."""

from __future__ import annotations

import hashlib
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parent.parent
FILES = sorted(path.name for path in (ROOT / "fixtures").glob("*.pt"))


def make(folder: Path) -> None:
    command = [sys.executable, "-m", "fixtures.make", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make(folder)
    return folder


def load(path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    importlib.import_module("fixtures.blocks")
    return torch.load(path, weights_only=False)


def test_the_script_is_deterministic(made: Path, tmp_path: Path) -> None:
    make(tmp_path)
    first, second = (
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.pt")}
        for folder in (made, tmp_path)
    )
    assert first == second
    assert sorted(first) == FILES


@pytest.mark.parametrize("name", FILES)
def test_the_file_is_what_the_script_makes(name: str, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not byte for byte: other versions of torch pickle other attributes.
    kept, new = load(ROOT / "fixtures" / name, monkeypatch), load(made / name, monkeypatch)
    if isinstance(kept, nn.Module):
        assert repr(kept) == repr(new) and kept.training == new.training
        kept, new = tuple(kept.state_dict().items()), tuple(new.state_dict().items())
        assert [key for key, _ in kept] == [key for key, _ in new]
        kept, new = tuple(value for _, value in kept), tuple(value for _, value in new)
    assert len(kept) == len(new)
    assert all(torch.equal(a, b) for a, b in zip(kept, new, strict=True))


@pytest.mark.parametrize("name", FILES)
def test_files_are_small(name: str) -> None:
    assert (ROOT / "fixtures" / name).stat().st_size < 1_000_000
