"""The command line: verdicts, streams, files, and what it does when things go wrong."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from convmerge import api
from convmerge.cli import terminal
from convmerge.cli.main import main
from convmerge.inputs import Inputs
from convmerge.render.document import failure
from convmerge.report import Report, Verification

FIXTURES = Path(__file__).parent.parent / "fixtures"
ANSI = "\x1b["


@dataclass(frozen=True)
class Outcome:
    """Exit code and streams of a run."""

    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command line in this process."""
    monkeypatch.delenv("COLUMNS", raising=False)

    def run(*words: object) -> Outcome:
        capsys.readouterr()
        code = main([str(word) for word in words])
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """A copy of a model of two linear blocks' kind: everything merges into one convolution."""
    return Path(shutil.copy(FIXTURES / "conv_chain.pt", tmp_path / "chain.pt"))


@pytest.fixture
def nothing(tmp_path: Path) -> Path:
    """A model in which nothing merges."""
    torch.manual_seed(1)
    path = tmp_path / "nothing.pt"
    torch.save(nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 3)).eval(), path)
    return path


SMALL = ("--input", "1,3,53,59")


# ---- the four commands ----------------------------------------------------------------------------------


def test_inspect_shows_sites_totals_and_the_next_command(run: Run, chain: Path) -> None:
    before = sorted(chain.parent.iterdir())
    result = run("inspect", chain, *SMALL)
    assert (result.code, result.err) == (0, "")
    assert "merge " in result.out and "1×3×53×59 float32" in result.out and "model: " in result.out
    fused = chain.with_name("chain-fused.pt")
    assert result.out.splitlines()[-1] == f"next: convmerge fuse {chain} -o {fused} --input 1,3,53,59"
    assert sorted(chain.parent.iterdir()) == before


def test_the_next_command_does_what_it_says(run: Run, tmp_path: Path) -> None:
    model = shutil.copy(FIXTURES / "conv_chain.pt", tmp_path / "a model's.pt")
    result = run("check", model, *SMALL, "--seed", 7, "--skip", "nowhere*", "--objective", "macs")
    words = shlex.split(result.out.splitlines()[-1].removeprefix("next: "))
    assert words[:2] == ["convmerge", "fuse"]
    assert {"--seed", "7", "--skip", "nowhere*", "--objective", "macs"} <= set(words)
    assert run(*words[1:]).code == 0
    assert run("check", tmp_path / "a model's-fused.pt", *SMALL).code == 0


def test_inspect_names_the_guessed_input(run: Run, chain: Path) -> None:
    assert "(guessed" in run("inspect", chain).out
    assert "(guessed" not in run("inspect", chain, *SMALL).out


def test_fuse_writes_the_same_function(run: Run, chain: Path) -> None:
    out = chain.with_name("out.pt")
    result = run("fuse", chain, "-o", out, *SMALL)
    assert (result.code, result.err) == (0, "")
    for word in ("before", "after", "operators", "MACs", "parameters", "file", "verified", f"wrote {out}"):
        assert word in result.out
    original = torch.load(chain, weights_only=False)
    fused = torch.load(out, weights_only=False)
    convs = [module for module in fused.modules() if isinstance(module, nn.Conv2d)]
    assert [conv.kernel_size for conv in convs] == [(5, 7)]
    x = torch.randn(2, 3, 53, 59, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(fused(x), original(x), rtol=1e-4, atol=1e-5)


def test_the_written_file_loads_without_convmerge(run: Run, chain: Path) -> None:
    out = chain.with_name("out.pt")
    assert run("fuse", chain, "-o", out, *SMALL).code == 0
    script = (
        "import sys, torch; model = torch.load(sys.argv[1], weights_only=False);"
        "model(torch.zeros(1, 3, 53, 59)); assert 'convmerge' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script, str(out)], check=True, timeout=60)


def test_fuse_with_nothing_to_merge_writes_the_model_and_says_so(run: Run, nothing: Path) -> None:
    out = nothing.with_name("out.pt")
    result = run("fuse", nothing, "-o", out, *SMALL)
    assert result.code == 0
    assert "nothing to merge" in result.out and f"wrote the model unchanged to {out}" in result.out
    kept, written = (torch.load(path, weights_only=False).state_dict() for path in (nothing, out))
    assert list(kept) == list(written)
    assert all(torch.equal(kept[key], written[key]) for key in kept)


def test_dry_run_writes_nothing(run: Run, chain: Path) -> None:
    result = run("fuse", chain, "-n", *SMALL)
    assert result.code == 0 and "dry run: nothing written" in result.out and "verified" in result.out
    assert run("fuse", chain, "-n", "-o", chain.with_name("out.pt"), *SMALL).code == 0
    assert [path.name for path in chain.parent.iterdir()] == ["chain.pt"]


def test_check_until_it_is_fused(run: Run, chain: Path) -> None:
    out = chain.with_name("out.pt")
    result = run("check", chain, *SMALL)
    assert result.code == 1 and result.err == ""
    assert "profitable merge is left" in result.out and "next: convmerge fuse" in result.out
    assert run("fuse", chain, "-o", out, *SMALL).code == 0
    result = run("check", out, *SMALL)
    assert (result.code, result.out) == (0, f"{out}: no profitable merge is left\n")


def test_verify_tells_same_from_different(run: Run, chain: Path) -> None:
    out, other = chain.with_name("out.pt"), chain.with_name("other.pt")
    assert run("fuse", chain, "-o", out, *SMALL).code == 0
    result = run("verify", chain, out, *SMALL)
    assert result.code == 0 and "verified" in result.out and "1×3×53×59" in result.out
    model = torch.load(chain, weights_only=False)
    with torch.no_grad():
        model[0].bias[0] += 0.01
    torch.save(model, other)
    result = run("verify", chain, other, *SMALL)
    assert result.code == 1 and "NOT the same function" in result.out


def test_only_and_skip_choose_sites(run: Run, chain: Path) -> None:
    assert run("check", chain, *SMALL, "--skip", "*").code == 0
    assert run("check", chain, *SMALL, "--only", "nowhere.*").code == 0
    assert run("check", chain, *SMALL, "--only", "*").code == 1


def test_globs_that_match_no_module_are_warned_of(run: Run, tmp_path: Path) -> None:
    torch.manual_seed(1)
    path = tmp_path / "named.pt"
    stem = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5))
    torch.save(nn.Sequential(OrderedDict(stem=stem, classifier=nn.Conv2d(5, 2, 1))).eval(), path)
    result = run("check", path, *SMALL, "--only", "stme.*", "--skip", "clasifier", "--skip", "classifier")
    assert result.code == 0
    assert result.err.splitlines() == [
        "warning: --only 'stme.*' matches no module; did you mean stem or stem.1?",
        "warning: --skip 'clasifier' matches no module; did you mean classifier?",
    ]
    assert run("check", path, *SMALL, "--skip", "zzz").err == "warning: --skip 'zzz' matches no module\n"
    assert run("check", path, *SMALL, "--only", "*", "--only", "stem", "--skip", "stem.[1]").err == ""


def test_weights_with_a_factory(run: Run, tmp_path: Path) -> None:
    path, whole = tmp_path / "weights.pt", tmp_path / "whole.pt"
    torch.manual_seed(1)
    layer = nn.Linear(3, 2)
    torch.save(layer.state_dict(), path)
    torch.save(layer, whole)
    build = ("--model", "torch.nn:Linear", "--model-args", '{"in_features": 3, "out_features": 2}')
    assert run("inspect", path, *build, "--input", "5,3").code == 0
    assert run("verify", path, whole, *build, "--input", "5,3").code == 0
    result = run("inspect", path, "--input", "5,3")
    assert result.code == 2 and "--model" in result.err


def test_a_model_saved_in_train_mode_is_warned_of(run: Run, tmp_path: Path) -> None:
    torch.manual_seed(1)
    path = tmp_path / "train.pt"
    torch.save(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)).train(), path)
    result = run("fuse", path, "-n", *SMALL)
    assert result.code == 0
    assert result.err.startswith("warning: ") and "train mode" in result.err and result.err.count("\n") == 1
    assert run("fuse", path, "-n", "-q", *SMALL).err == ""


# ---- nothing is written unless it is right --------------------------------------------------------------


def test_failed_verification_writes_nothing(run: Run, chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fuse(model: nn.Module, inputs: Inputs, **_: object) -> api.Result:
        report = Report("fuse", "", verification=Verification(False, "outputs differ"))
        return api.Result(model, report, inputs)

    monkeypatch.setattr(api, "fuse", fuse)
    result = run("fuse", chain, "-o", chain.with_name("out.pt"), *SMALL)
    assert result.code == 1
    assert "NOT the same function: outputs differ" in result.out and "nothing written" in result.out
    assert [path.name for path in chain.parent.iterdir()] == ["chain.pt"]


def test_a_file_that_reads_back_differently_is_not_kept(
    run: Run, chain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = api.fuse

    def fuse_then_doubt(*arguments: Any, **options: Any) -> api.Result:
        result = fused(*arguments, **options)
        doubt = Verification(False, "a bit flipped")
        monkeypatch.setattr(sys.modules["convmerge.verification.compare"], "compare", lambda *_, **__: doubt)
        return result

    monkeypatch.setattr(api, "fuse", fuse_then_doubt)
    result = run("fuse", chain, "-o", chain.with_name("out.pt"), *SMALL)
    assert result.code == 1
    assert "error: the written file is not the fused model: a bit flipped" in result.err
    assert [path.name for path in chain.parent.iterdir()] == ["chain.pt"]


def test_the_input_is_overwritten_only_by_force(run: Run, chain: Path) -> None:
    before = chain.read_bytes()
    result = run("fuse", chain, "-o", chain, *SMALL)
    assert result.code == 2 and "--force" in result.err and chain.read_bytes() == before
    assert run("fuse", chain, "-o", chain, "--force", *SMALL).code == 0
    assert run("check", chain, *SMALL).code == 0


def test_a_bad_target_is_told_before_the_work(run: Run, chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "fuse", lambda *_, **__: pytest.fail("worked before looking at the target"))
    for target in (chain.parent / "no" / "out.pt", chain.parent, chain.with_name("out.txt")):
        result = run("fuse", chain, "-o", target, *SMALL)
        assert result.code == 2 and result.err.startswith("error: ")


def test_a_directory_as_target_is_told_with_a_file_in_it(run: Run, chain: Path) -> None:
    error, hint = run("fuse", chain, "-o", chain.parent, *SMALL).err.splitlines()
    assert error == f"error: cannot write {chain.parent}: it is a directory"
    assert hint.endswith(f"-o {chain.with_name('chain-fused.pt')}")


# ---- errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ("fsue",),
        ("inspect",),
        ("inspect", "--nope"),
        ("inspect", "a.pt", "b.pt"),
        ("verify", "a.pt"),
        ("inspect", "a.pt", "--objective", "speed"),
        ("inspect", "a.pt", "--seed", "x"),
        ("inspect", "a.pt", "--seed", "-1"),
        ("inspect", "a.pt", "--seed", str(10**30)),
        ("inspect", "a.pt", "--model-args", "{}"),
        ("inspect", "a.pt", "--format", "pdf"),
        ("fuse", "a.pt"),
        ("fuse", "a.pt", "-o"),
        ("inspect", "a.pt", "--input"),
    ],
)
def test_usage_errors(run: Run, words: tuple[str, ...]) -> None:
    result = run(*words)
    assert (result.code, result.out) == (2, "")
    error, hint = result.err.splitlines()
    assert error.startswith("error: ") and hint.startswith("hint: ") and "Value error" not in error
    if words[0] == "inspect" and "see " in hint:
        assert hint == "hint: see convmerge inspect --help"


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(None, id="missing"),
        pytest.param(b"", id="empty"),
        pytest.param(b"hello\n", id="text"),
        pytest.param(b"\x80\x04.", id="pickle"),
        pytest.param(b"PK\x03\x04", id="zip"),
        pytest.param(bytes(range(99)), id="binary"),
    ],
)
@pytest.mark.parametrize("name", ["inspect", "check", "fuse", "verify"])
def test_files_that_are_no_models(run: Run, tmp_path: Path, name: str, content: bytes | None) -> None:
    path = tmp_path / "x.pt"
    if content is not None:
        path.write_bytes(content)
    more = {"fuse": ("-o", tmp_path / "out.pt"), "verify": (path,)}.get(name, ())
    result = run(name, path, *more)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: ") and str(path) in result.err
    assert 1 <= result.err.count("\n") <= 2
    assert not (tmp_path / "out.pt").exists()


def test_inspect_tells_what_a_file_it_may_not_load_holds(run: Run) -> None:
    result = run("inspect", FIXTURES / "repvgg.pt")
    assert result.code == 2 and "--allow fixtures.blocks" in result.err
    assert "fixtures.blocks.RepVGGBlock ×4" in result.out
    assert "0.dense.0.weight" in result.out and "16×3×3×3" in result.out
    assert "6.weight" not in result.out and "6.weight" in run("inspect", FIXTURES / "repvgg.pt", "-v").out


def test_a_model_that_does_not_run(run: Run, chain: Path) -> None:
    result = run("inspect", chain, "--input", "1,4,53,59")
    assert (result.code, result.out) == (2, "")
    error, hint = result.err.splitlines()
    assert error.startswith("error: Sequential does not run on these inputs (input 1×4×53×59 float32)")
    assert "expected input" in error and "captured" not in error and "--input" in hint


def test_internal_errors_are_one_line_and_a_traceback_with_v(
    run: Run, chain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("this\nthat [bold]x[/bold]")

    monkeypatch.setattr(api, "inspect", fail)
    result = run("inspect", chain, *SMALL)
    assert (result.code, result.out) == (2, "")
    error, hint = result.err.splitlines()
    assert error == "error: internal error: RuntimeError: this that [bold]x[/bold]"
    assert hint.startswith("hint: ")
    assert "Traceback" in run("inspect", chain, "-v", *SMALL).err


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (KeyboardInterrupt(), 130, ""),
        (SystemExit(3), 2, "ended the program"),
        (MemoryError(), 2, "out of memory"),
        (EOFError(), 2, "internal error"),
        (OSError(5, "Input/output error", "x.pt"), 2, "Input/output error: x.pt"),
        (RecursionError("deep"), 2, "internal error: RecursionError: deep"),
    ],
)
def test_whatever_is_raised_has_an_exit_code(
    run: Run, chain: Path, monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int, said: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(api, "inspect", fail)
    result = run("inspect", chain, *SMALL)
    assert result.code == code and said in result.err and "Traceback" not in result.err


def test_no_arguments_is_a_usage_error_with_the_help(run: Run) -> None:
    result = run()
    assert (result.code, result.out) == (2, "") and "Commands:" in result.err


HOSTILE = "[red]x[\\red] \x1b[31m\n:boom:.pt"  # no slash in file names


def test_file_names_are_printed_literally(run: Run, chain: Path) -> None:
    path = Path(shutil.copy(chain, chain.with_name(HOSTILE)))
    for result in (
        run("inspect", path, *SMALL),
        run("fuse", path, "-o", path.with_name("out.pt"), *SMALL),
        run("inspect", path.with_name("no" + HOSTILE)),
    ):
        text = result.out + result.err
        assert "[red]x[" in text and ":boom:" in text and "\x1b" not in text


# ---- JSON and quiet -------------------------------------------------------------------------------------


def test_json_is_one_document(run: Run, chain: Path) -> None:
    out = chain.with_name("out.pt")
    for words, code in (
        (("inspect", chain), 0),
        (("check", chain), 1),
        (("fuse", chain, "-o", out), 0),
        (("verify", chain, out), 0),
    ):
        result = run(*words, *SMALL, "--json")
        document = json.loads(result.out)
        assert (result.code, result.err, document["schema"]) == (code, "", 1)
        assert document["command"] == words[0]
    assert run("fuse", chain, "-n", *SMALL, "--json", "-q").out != ""


def test_every_format_is_one_document(run: Run, chain: Path) -> None:
    out = chain.with_name("out.pt")
    for words, code in (
        (("inspect", chain), 0),
        (("check", chain), 1),
        (("fuse", chain, "-o", out), 0),
        (("verify", chain, out), 0),
        (("bench", chain, out, "--pairs", 2), 0),
    ):
        for quiet in ((), ("-q",)):
            result = run(*words, *SMALL, "--format", "markdown", *quiet)
            assert (result.code, result.err) == (code, "")
            assert result.out.startswith("### `") and str(chain) in result.out
        page = run(*words, *SMALL, "--format=html").out
        assert page.startswith("<!DOCTYPE html>") and page.endswith("</html>\n") and page.count("<html") == 1
    verbose = run("inspect", chain, *SMALL, "--format", "markdown", "-v").out
    assert "float64 error" in verbose and "time: load " in verbose


def test_table_and_json_have_names_as_formats(run: Run, chain: Path) -> None:
    words = ("inspect", chain, *SMALL)
    assert run(*words, "--format", "table").out == run(*words).out
    first, second = (json.loads(run(*words, *f).out) for f in (("--format", "json"), ("--json",)))
    assert first.keys() == second.keys() and first["sites"] == second["sites"]


@pytest.mark.parametrize("format", ["table", "json", "markdown", "html"])
def test_two_formats_are_an_error(run: Run, chain: Path, format: str) -> None:
    result = run("inspect", chain, "--json", "--format", format)
    assert result.code == 2 and json.loads(result.out)["error"].startswith("--json and --format")
    assert result.err.splitlines()[1].startswith("hint: ")


@pytest.mark.parametrize(("format", "start"), [("markdown", "### **error**: "), ("html", "<!DOCTYPE html>")])
def test_errors_are_documents_too(run: Run, tmp_path: Path, format: str, start: str) -> None:
    for words in (("inspect", FIXTURES / "repvgg.pt"), ("inspect",), ("inspect", tmp_path / "no.pt"), ()):
        result = run(*words, f"--format={format}")
        assert result.code == 2 and result.err.startswith("error: ")
        assert result.out.startswith(start) and "hint: " in result.out and result.out.count(start) == 1


def test_warnings_are_part_of_documents(run: Run, tmp_path: Path) -> None:
    torch.manual_seed(1)
    path = tmp_path / "train.pt"
    torch.save(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)).train(), path)
    result = run("inspect", path, *SMALL, "--format", "markdown")
    assert "> [!WARNING]\n> the model is in train mode" in result.out and "warning: " in result.err
    assert (
        'role="note">warning: the model is in train mode' in run("inspect", path, *SMALL, "--format=html").out
    )


def test_json_errors(run: Run, tmp_path: Path) -> None:
    for words in (("inspect", tmp_path / "no.pt", "--json"), ("inspect", "--json"), ("--json",)):
        result = run(*words)
        document = json.loads(result.out)
        assert result.code == 2 and result.err.startswith("error: ")
        assert document.keys() == {"schema", "error", "hint"} and document["error"]


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    data = {"a": [float("nan"), (float("inf"), 1.5)], "b": "×"}
    terminal.Terminal(format="json").results(data, failure("", None))
    assert json.loads(capsys.readouterr().out) == {"a": [None, [None, 1.5]], "b": "×"}


def test_quiet_prints_errors_only(run: Run, chain: Path) -> None:
    assert run("check", chain, "-q", *SMALL) == Outcome(1, "", "")
    assert run("fuse", chain, "-o", chain.with_name("out.pt"), "-q", *SMALL) == Outcome(0, "", "")
    assert run("inspect", chain.with_name("no.pt"), "-q").err.startswith("error: ")


@pytest.mark.filterwarnings("ignore:careful")
def test_models_that_print_do_not_spoil_the_output(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chatty_blocks.py").write_text(
        "import warnings\nfrom torch import nn\nprint('imported')\n"
        "class Chatty(nn.Module):\n"
        "    def forward(self, x):\n"
        "        print('called'); warnings.warn('careful')\n"
        "        return x + 1\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import chatty_blocks  # type: ignore[import-not-found]

    torch.save(chatty_blocks.Chatty().eval(), tmp_path / "chatty.pt")
    words = ("inspect", "chatty.pt", "--allow", "chatty_blocks", "--input", "1,3", "--json")
    result = run(*words)
    assert result.code == 0 and json.loads(result.out)["command"] == "inspect" and result.err == ""
    verbose = run(*words, "-v")
    assert json.loads(verbose.out)["command"] == "inspect" and "called" in verbose.err


MEDDLING = """
import os, sys, torch
from torch import nn

class Meddling(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.what, self.conv = what, nn.Conv2d(3, 5, 1)

    def forward(self, x):
        exec(self.what)
        return self.conv(x)
"""


@pytest.mark.parametrize(
    ("what", "code", "said"),
    [
        ("os.write(1, b'among'); os.system('echo the results'); print('or on', file=sys.stderr)", 0, ""),
        ("input('name? ')", 2, "EOF"),
        ("sys.exit(3)", 2, "ended the program"),
        ("raise BaseException('odd')", 2, "raised BaseException: odd"),
        ("torch.empty(10**15)", 2, "out of memory"),
    ],
)
def test_models_that_meddle(tmp_path: Path, what: str, code: int, said: str) -> None:
    (tmp_path / "meddling.py").write_text(MEDDLING)
    make = "import meddling, sys, torch; torch.save(meddling.Meddling(sys.argv[1]).eval(), 'm.pt')"
    subprocess.run([sys.executable, "-c", make, what], cwd=tmp_path, check=True, timeout=60)
    words = ["-m", "convmerge", "inspect", "m.pt", "--trust", "--input", "1,3,7,11", "--json"]
    result = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, timeout=60, input="read me"
    )
    assert result.returncode == code and json.loads(result.stdout)["schema"] == 1
    lines = [line for line in result.stderr.splitlines() if not line.startswith("warning: ")]
    assert (lines == []) if code == 0 else (said in lines[0] and lines[1].startswith("hint: "))
    assert len(lines) <= 2


# ---- streams --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["fuse", "--help"], ["nope"]])
def test_help_and_usage_errors_import_neither_torch_nor_rich(words: list[str]) -> None:
    script = (
        "import sys; from convmerge.cli.main import main; main(sys.argv[1:]);"
        "print(sorted({'torch', 'numpy', 'rich'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.splitlines()[-1] == "[]"


# Runs the command line with a canned report, as importing torch takes seconds.
CANNED = """
import sys, time
from convmerge.cli import commands, main
from convmerge.report import Report, SiteReport

def planned(name, *_, **__):
    if name == "check":
        print("running", flush=True)
        time.sleep(60)
    site = SiteReport("a … b", ("conv 3×3",), "3→5", "merge", "one conv")
    return Report(name, "×→.pt", sites=(site,), warnings=("×→",))

commands._planned = planned
sys.exit(main.main())
"""


def canned(*words: str) -> list[str]:
    return [sys.executable, "-c", CANNED, *words]


def on_a_terminal(words: list[str], **environment: str) -> str:
    """What a command prints on a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    chunks: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # how Linux reports the end
            while chunk := os.read(ours, 4096):
                chunks.append(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    keep = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "TERM")}
    environment = keep | {"TERM": "xterm", "COLUMNS": "80"} | environment
    try:
        subprocess.run(
            words, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, timeout=60, check=True
        )
    finally:
        os.close(theirs)  # the reader waits for it
        reader.join()
        os.close(ours)
    return b"".join(chunks).decode()


def test_colour_on_a_terminal_unless_no_color() -> None:
    green = f"{ANSI}32m"
    assert green in on_a_terminal(canned("inspect", "a.pt"))
    plain = on_a_terminal(canned("inspect", "a.pt"), NO_COLOR="1")
    assert green not in plain and "merge" in plain


def test_no_ansi_and_no_wrapping_in_a_pipe(run: Run, chain: Path) -> None:
    for words in (("inspect", chain, "-v"), ("check", chain), ("fuse", chain, "-n")):
        out = run(*words, *SMALL).out
        assert ANSI not in out
        assert not any(line.endswith(" ") for line in out.splitlines())
    lines = run("inspect", chain, *SMALL).out.splitlines()
    assert len([line for line in lines if line.startswith("merge ") and "Conv2d(3, 7, 5×7)" in line]) == 1


def test_columns_limit_the_width(run: Run, chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    lines = run("inspect", chain, *SMALL).out.splitlines()
    assert max(len(line) for line in lines if not line.startswith("next: ")) <= 40


@pytest.mark.parametrize("words", [("inspect", "a.pt"), ("inspect", "a.pt", "--json"), ("×→",)])
def test_streams_without_unicode(words: tuple[str, ...]) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    result = subprocess.run(canned(*words), capture_output=True, env=environment, timeout=60, check=False)
    text = result.stdout + result.stderr
    assert text.isascii() and b"Traceback" not in text
    assert b"x->" in text


def test_a_reader_that_leaves_is_no_error() -> None:
    with subprocess.Popen(
        canned("inspect", "a.pt", "-q", "--json"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 0


def test_a_full_disk_behind_stdout_is_an_error() -> None:
    words = canned("inspect", "a.pt")
    with open("/dev/full", "w") as full:
        result = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, timeout=60, check=False)
    assert result.returncode == 2
    error, hint = result.stderr.decode().splitlines()[-2:]
    assert error == "error: No space left on device" and hint.startswith("hint: ")


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_it_quietly(sent: signal.Signals, code: int) -> None:
    with subprocess.Popen(
        canned("check", "a.pt"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"running\n"
        process.send_signal(sent)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.strip()) == (code, b"", b"")


# fuse that waits while it compares what it wrote with what it fused.
WAITING = """
import sys, time
from convmerge.cli import commands, main

def wait(*_):
    print("written", file=sys.__stderr__, flush=True)
    time.sleep(60)

commands._same_as = lambda *_: wait
sys.exit(main.main())
"""


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_leave_no_temporary_file(chain: Path, sent: signal.Signals, code: int) -> None:
    words = ["fuse", str(chain), "-o", str(chain.with_name("out.pt")), *SMALL]
    with subprocess.Popen(
        [sys.executable, "-c", WAITING, *words], stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == b"written\n"
        assert len(list(chain.parent.iterdir())) == 2, "the temporary file"
        process.send_signal(sent)
        assert process.wait(timeout=60) == code
    assert [path.name for path in chain.parent.iterdir()] == ["chain.pt"]


def test_a_reader_of_the_help_that_leaves_is_no_error() -> None:
    script = "import sys; from convmerge.cli.main import main; sys.stdin.read(); sys.exit(main(['--help']))"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 0


class FakeTerminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_progress_shows_on_a_terminal_only_and_only_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(stream: io.StringIO, after: float, quiet: bool = False) -> str:
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(terminal, "PROGRESS_AFTER", after)
        monkeypatch.setenv("TERM", "xterm")
        with terminal.Terminal(quiet=quiet).working() as progress:
            progress("planning [x]", 1, 3)
            if after == 0:
                threading.Event().wait(0.3)
        return stream.getvalue()

    assert "planning [x]" in shown(FakeTerminal(), 0)
    assert shown(FakeTerminal(), 0, quiet=True) == ""
    assert shown(FakeTerminal(), 60) == ""
    assert shown(io.StringIO(), 0) == ""
