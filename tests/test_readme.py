"""The README's commands, run as written in a copy of the fixtures, and its output compared.

``UPDATE_README=1 pytest tests/test_readme.py`` replaces the output in the README by what the commands print.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
INSTALL = re.compile(r"python3 -m venv \.venv && \.venv/bin/pip install (\.|'\.\[test\]') && ")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    """Contents of the fenced blocks of a language, in order."""
    return [body for kind, body in FENCE.findall(README.read_text(encoding="utf-8")) if kind == language]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the fixtures; blocks run in it one after the other and see each other's files."""
    path = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "fixtures", path / "fixtures")
    return path


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a shell command with the tools of this environment, at the README's width of 100 columns."""
    tools = str(Path(sys.executable).parent)
    environment = os.environ | {
        "PATH": tools + os.pathsep + os.environ["PATH"],
        "COLUMNS": "100",
        "NO_COLOR": "1",
        "PYTHONIOENCODING": "utf-8",
    }
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        timeout=240,
        check=False,
    )


def in_this_environment(command: str) -> str:
    """The command without creating and filling an environment of its own."""
    assert INSTALL.match(command), f"not a set-up command: {command}"
    return INSTALL.sub("", command).replace(".venv/bin/", "")


def normal(output: str) -> str:
    """The output without what differs between machines: times, rounding errors and file sizes."""
    output = re.sub(r"\b\d+(\.\d+)? m?s\b", "TIME", output)
    output = re.sub(r"\b\d(\.\d+)?e[+-]\d+", "ERROR", output)
    output = re.sub(r"(?<=\s)0(?= \(0 relative\))", "ERROR", output).replace(
        "(0 relative)", "(ERROR relative)"
    )
    output = re.sub(r"\b[\d.]+×(?=\s)", "RATIO", output)
    output = re.sub(r"^file .*$", "file", output, flags=re.MULTILINE)
    return re.sub(r" +", " ", output).strip()


def test_there_are_two_set_up_commands(folder: Path) -> None:
    first, second = (line for block in blocks("bash")[:2] for line in block.splitlines())
    fused = run(in_this_environment(first), folder)
    assert fused.returncode == 0, fused.stdout
    assert in_this_environment(second) == "pytest"
    assert second in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("index", range(len(blocks("console"))))
def test_commands_print_what_is_shown(index: int, folder: Path) -> None:
    block = blocks("console")[index]
    shown = re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]
    assert shown, f"no command in {block!r}"
    printed = []
    for part in shown:
        command = part.partition("\n")[0]
        printed.append(f"{command}\n{run(command, folder).stdout}")
    if "UPDATE_README" in os.environ:
        text = README.read_text(encoding="utf-8")
        README.write_text(text.replace(block, "".join(f"$ {part}" for part in printed)), encoding="utf-8")
    else:
        assert [normal(part) for part in printed] == [normal(part) for part in shown]


@pytest.mark.parametrize("index", range(len(blocks("python"))))
def test_python_runs(index: int, folder: Path) -> None:
    script = folder / f"block{index}.py"
    script.write_text(blocks("python")[index], encoding="utf-8")
    result = run(f"python {script.name}", folder)
    assert result.returncode == 0, result.stdout
