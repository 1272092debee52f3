"""The model files in fixtures/ are what their script makes, and merge into what they are there to show."""

from __future__ import annotations

import hashlib
import importlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from convmerge.cli.main import main

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


@dataclass(frozen=True)
class Case:
    """How a fixture is given to convmerge, and the operators that are left of it.

    ``left`` is None where it depends on predicted costs; no batch norm is left in any case.
    ``traced``: the fused file holds a GraphModule, which loads by running code from the file.
    """

    left: dict[str, int] | None
    options: tuple[str, ...] = ()
    traced: bool = False


ALLOW = ("--allow", "fixtures.blocks")
HYPERNETWORK = (*ALLOW, "--inputs", "fixtures/hypernetwork_inputs.pt")
CASES = {
    "block_diagonal_grouped": Case({"linear": 1}),
    "block_diagonal_loop": Case({"linear": 1}, ALLOW),
    "block_diagonal_mask": Case({"linear": 2}),
    "block_diagonal_two_step": Case({"linear": 1}),
    "conv_chain": Case({"conv": 1}),
    "do_conv": Case({"conv": 2}, ALLOW),
    "edsr": Case(None, traced=True),
    "hypernetwork": Case({"conv": 1, "linear": 2}, HYPERNETWORK, traced=True),
    "linear_head": Case({"linear": 1}),
    "classifier": Case({"conv": 2, "linear": 2, "max_pool": 2}),
    "lora": Case({"linear": 2}, ALLOW),
    "mobilenet": Case(None),
    "pruned": Case({"adaptive_avg_pool": 1, "add": 2, "conv": 6, "linear": 1}, ALLOW),
    "repvgg": Case({"adaptive_avg_pool": 1, "conv": 4, "linear": 1}, ALLOW, traced=True),
    "resnet": Case({"adaptive_avg_pool": 1, "add": 3, "conv": 9, "linear": 1}, ALLOW),
    "sesr": Case({"conv": 4, "pixel_shuffle": 1}),
    "span": Case({"conv": 2}),
}


def convmerge(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, Any]:
    """Exit code and JSON document."""
    capsys.readouterr()
    code = main([*words, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_every_model_has_a_case() -> None:
    assert sorted(CASES) == [name[:-3] for name in FILES if not name.endswith("_inputs.pt")]


@pytest.mark.parametrize("name", CASES)
def test_fusing_leaves_what_is_expected_and_nothing_to_merge(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    case, model, fused = CASES[name], f"fixtures/{name}.pt", str(tmp_path / "fused.pt")
    code, report = convmerge(capsys, "fuse", model, "-o", fused, *case.options)
    assert code == 0
    after = report["after"]["operators"]
    assert "batch_norm" not in after
    assert case.left in (None, after)
    options = (*case.options, *["--trust"] * case.traced)
    assert convmerge(capsys, "verify", model, fused, *options)[0] == 0
    code, report = convmerge(capsys, "check", fused, *options)
    assert code == 0, [site["reason"] for site in report["sites"] if site["action"] == "merge"]


def test_the_generated_kernel_is_named_as_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    options = CASES["hypernetwork"].options
    _, report = convmerge(capsys, "inspect", "fixtures/hypernetwork.pt", *options)
    assert any("kernel depends on input cond" in site["reason"] for site in report["sites"])
