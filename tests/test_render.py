"""Reports on terminals of several widths, with and without Unicode.

Golden output is in tests/golden; ``UPDATE_GOLDEN=1 pytest tests/test_render.py`` writes it anew, for review.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from convmerge.cli.terminal import one_line
from convmerge.io import Contents, TensorInfo
from convmerge.render import View, check_parts, contents_parts, fuse_parts, inspect_parts, verify_parts
from convmerge.render.figures import arrow, compact, difference, percent, seconds
from convmerge.render.sites import group_sites
from convmerge.report import Comparison, Counts, Report, SiteReport, Verification

GOLDEN = Path(__file__).parent / "golden"


def conv_bn(block: int, channels: int, macs: int) -> SiteReport:
    weights = channels * channels * 9
    return SiteReport(
        place=f"layer{block}.conv … layer{block}.bn",
        operators=("conv 3×3", "batch_norm"),
        geometry=f"{channels}→{channels}, 3×3",
        action="merge",
        reason=f"one conv 3×3 {channels}→{channels}",
        macs_before=macs,
        macs_after=macs - 50_176 * channels,
        weights_before=weights + 2 * channels,
        weights_after=weights + channels,
        evidence="static",
        error=1.1e-15,
        bound=3.4e-14,
    )


BRANCHES = SiteReport(
    place="stage.0",
    operators=("conv 3×3", "conv 1×1", "batch_norm", "add"),
    geometry="16→16, 3×3, padding 1",
    action="merge",
    reason="one conv 3×3",
    macs_before=3_010_560,
    macs_after=1_806_336,
    weights_before=2_656,
    weights_after=2_320,
    evidence="observed",
    tree=("sum of 3 branches", "  conv 3×3, batch_norm", "  conv 1×1, batch_norm", "  batch_norm"),
)
KEPT = SiteReport(
    place="features.3.2 … features.4.0",
    operators=("conv 1×1", "conv 1×1"),
    geometry="96→24→144",
    action="keep",
    reason="merged it costs 2.4 times the multiply-accumulates",
    macs_before=4_515_840,
    macs_after=10_838_016,
    weights_before=5_760,
    weights_after=13_824,
)
REFUSED = SiteReport(
    place="tail.0 … tail.2",
    operators=("conv 3×3", "pixel_shuffle", "conv 3×3"),
    geometry="64→256→64→3",
    action="refuse",
    reason="the second conv pads rows and columns where the first one still sees the image",
    macs_before=86_704_128,
    macs_after=86_704_128,
    weights_before=149_443,
    weights_after=149_443,
)
REPORT = Report(
    command="fuse",
    model="models/net.pt",
    inputs={"x": "1×3×224×224 float32"},
    inputs_inferred=True,
    sites=(conv_bn(1, 64, 115_605_504), conv_bn(2, 128, 231_211_008), BRANCHES, KEPT, REFUSED),
    unknown={"max_pool2d": 1, "relu": 17, "add": 8},
    before=Counts({"batch_norm": 5, "conv": 9, "relu": 17, "add": 8}, 4_113_000_000, 25_557_032),
    after=Counts({"conv": 7, "relu": 17, "add": 6, "pad": 1}, 4_089_000_000, 25_530_472),
    verification=Verification(
        True,
        "the same function up to rounding",
        (
            Comparison("1×3×224×224", 3.8e-6, 1.2e-6, 1.4e-14, 3.1e-15, 1.1),
            Comparison("3×3×160×160", 4.1e-6, 1.3e-6),
        ),
    ),
    seconds={"load": 0.12, "capture": 1.3},
    file_bytes={"before": 102_540_000, "after": 102_100_000},
    output="net-fused.pt",
)
COMMAND = "convmerge fuse models/net.pt -o models/net-fused.pt"


def show(parts: Sequence[RenderableType], width: int) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False, markup=False, emoji=False)
    with console.capture() as capture:
        for part in parts:
            console.print(part, soft_wrap=isinstance(part, str))
    return "".join(line.rstrip() + "\n" for line in capture.get().splitlines())


GOLDEN_CASES = {
    "inspect-200": inspect_parts(REPORT, View(200), COMMAND),
    "inspect-100": inspect_parts(REPORT, View(100), COMMAND),
    "inspect-40": inspect_parts(REPORT, View(40), COMMAND),
    "inspect-200-verbose": inspect_parts(REPORT, View(200, verbose=True), COMMAND),
    "inspect-200-ascii": inspect_parts(REPORT, View(200, unicode=False), COMMAND),
    "check-120": check_parts(REPORT, View(120), COMMAND),
    "fuse-100": fuse_parts(REPORT, View(100), "wrote net-fused.pt (2.3 s)"),
    "fuse-40": fuse_parts(REPORT, View(40), "wrote net-fused.pt (2.3 s)"),
    "verify-100": verify_parts(REPORT, View(100)),
}


@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_output_is_as_it_was(name: str) -> None:
    shown = show(GOLDEN_CASES[name], width=int(name.split("-")[1]))
    file = GOLDEN / f"{name}.txt"
    if "UPDATE_GOLDEN" in os.environ:
        file.write_text(shown, encoding="utf-8")
    assert shown == file.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_only_commands_are_wider_than_the_terminal(name: str) -> None:
    width = int(name.split("-")[1])
    lines = show(GOLDEN_CASES[name], width).splitlines()
    assert [line for line in lines if len(line) > width and not line.startswith("next: ")] == []


def test_ascii_output_is_ascii() -> None:
    for parts in (
        inspect_parts(REPORT, View(200, unicode=False), COMMAND),
        fuse_parts(REPORT, View(80, unicode=False), "wrote"),
        fuse_parts(REPORT, View(30, unicode=False), "wrote"),
    ):
        assert show(parts, 200).isascii()


def test_resnet50_fits_one_screen() -> None:
    sites = [conv_bn(n, 64 * (1 + n % 7), 10_000_000 + n) for n in range(53)]
    report = Report("inspect", "resnet50.pt", sites=(*sites, KEPT, REFUSED))
    shown = show(inspect_parts(report, View(160), COMMAND), 160)
    assert len(shown.splitlines()) <= 24
    assert "(and 52 more)" in shown
    assert KEPT.reason in shown and REFUSED.reason in shown.replace("\n", " ").replace("  ", "")


def test_every_reason_to_keep_or_refuse_is_listed() -> None:
    kept = [SiteReport(f"b{n}", ("conv", "conv"), "", "keep", f"costs {n} times more") for n in range(2, 9)]
    shown = show(inspect_parts(Report("inspect", "m.pt", sites=tuple(kept)), View(120), COMMAND), 120)
    assert all(site.reason in shown and site.place in shown for site in kept)


def test_groups_share_operators_and_add_up() -> None:
    groups = group_sites([conv_bn(1, 2, 10_000_000), BRANCHES, conv_bn(2, 3, 20_000_000), KEPT, KEPT])
    assert [len(group.sites) for group in groups] == [2, 1, 2]
    assert groups[0].total(lambda site: site.macs_before) == 30_000_000
    assert groups[0].geometry == "2→2, 3×3 … 3→3, 3×3"
    assert groups[0].place == "layer1.conv … layer1.bn (and 1 more)"


HOSTILE = "[red]a[/red] [/] :boom: [link=http://x]\x1b[31m\x07\tb\nc"


@pytest.mark.parametrize("width", [40, 80, 300])
@pytest.mark.parametrize("verbose", [False, True])
def test_names_are_printed_literally(width: int, verbose: bool) -> None:
    site = SiteReport(HOSTILE, (HOSTILE,), HOSTILE, "merge", HOSTILE, tree=(HOSTILE,))
    report = Report(
        "fuse",
        HOSTILE,
        {HOSTILE: HOSTILE},
        sites=(site,),
        unknown={HOSTILE: 1},
        before=Counts({HOSTILE: 1}, 1, 1),
        after=Counts({HOSTILE: 1}, 1, 1),
        verification=Verification(False, HOSTILE, (Comparison(HOSTILE, 0.0, 0.0),)),
        seconds={HOSTILE: 1.0},
    )
    view = View(width, verbose=verbose)
    contents = Contents(
        "module", HOSTILE, {HOSTILE: HOSTILE}, (TensorInfo(HOSTILE, (2, 3), HOSTILE),), (HOSTILE,)
    )
    for parts in (
        contents_parts(contents, view),
        inspect_parts(report, view, HOSTILE),
        check_parts(report, view, HOSTILE),
        fuse_parts(report, view, HOSTILE),
        verify_parts(report, view),
    ):
        shown = show(parts, width)
        assert "[red]a[/red]" in shown and ":boom:" in shown
        assert "\x1b" not in shown and "\x07" not in shown and "\t" not in shown


def test_one_line_keeps_text_and_escapes_the_rest() -> None:
    assert one_line("conv 3×3  → x\n y\x1b[0m") == "conv 3×3 → x y\\x1b[0m"
    assert one_line("3×3 → …", unicode=False) == "3x3 -> ..."
    assert one_line("\u202ename\udc80") == "\\u202ename\\udc80"


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (0, "0"),
        (532, "532"),
        (999, "999"),
        (1000, "1.00 k"),
        (9_994, "9.99 k"),
        (9_996, "10.0 k"),
        (37_000, "37.0 k"),
        (99_960, "100 k"),
        (999_499, "999 k"),
        (999_500, "1.00 M"),
        (25_557_032, "25.6 M"),
        (4_113_000_000, "4.11 G"),
        (10**12, "1.00 T"),
        (12 * 10**15, "12000 T"),
    ],
)
def test_compact(number: int, shown: str) -> None:
    assert compact(number) == shown


def test_other_numbers() -> None:
    assert compact(102_540_000, "B") == "103 MB"
    assert compact(12, "B") == "12 B"
    assert arrow(51_380_224, 51_380_225) == "51.4 M"
    assert arrow(2_000, 1_000) == "2.00 k → 1.00 k"
    assert (difference(3, 3), difference(3, 1), difference(1, 3)) == ("", "−2", "+2")
    assert (percent(0, 5), percent(200, 199), percent(200, 150)) == ("", "−0.5 %", "−25 %")
    assert seconds(3.84e-5) == "38 µs"
    assert (seconds(0.34), seconds(6.24), seconds(125)) == ("340 ms", "6.2 s", "2 min 5 s")
