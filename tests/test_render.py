"""Reports on terminals of several widths, with and without Unicode, in Markdown and in HTML.

Golden output is in tests/golden; ``UPDATE_GOLDEN=1 pytest tests/test_render.py`` writes it anew, for review.
"""

from __future__ import annotations

import io
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console

from convmerge.cli.terminal import one_line
from convmerge.io import Contents, TensorInfo
from convmerge.render import (
    Document,
    bench_document,
    check_document,
    contents_document,
    fuse_document,
    inspect_document,
    verify_document,
)
from convmerge.render.document import failure
from convmerge.render.figures import arrow, compact, difference, percent, seconds
from convmerge.render.html import html
from convmerge.render.markdown import markdown
from convmerge.render.sites import group_sites
from convmerge.render.text import text_parts
from convmerge.report import Comparison, Counts, Report, SiteReport, Speedup, Verification

GOLDEN = Path(__file__).parent / "golden"
STYLE = re.compile("<style>(.*?)</style>", re.DOTALL)


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


BENCHED = replace(
    REPORT,
    speedup=Speedup(1.31, (1.28, 1.33), (0.0131, 0.01), 2),
    peak_bytes={"before": 7_000, "after": 5_000},
)
MANY = replace(
    REPORT,
    sites=tuple(SiteReport(f"blocks.{n}", ("conv", "conv"), "", "keep", f"costs {n}×") for n in range(2, 17)),
    warnings=("the model is in train mode",),
)


def show(document: Document, width: int, *, unicode: bool = True) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False, markup=False, emoji=False)
    with console.capture() as capture:
        for part in text_parts(document, width, unicode=unicode):
            console.print(part, soft_wrap=isinstance(part, str))
    return "".join(line.rstrip() + "\n" for line in capture.get().splitlines())


INSPECT = inspect_document(REPORT, COMMAND)
CHECK = check_document(REPORT, COMMAND)
FUSE = fuse_document(REPORT, "wrote net-fused.pt (2.3 s)")
VERIFY = verify_document(REPORT)
BENCH = bench_document(BENCHED)
DOCUMENTS = {
    "inspect": INSPECT,
    "inspect-verbose": inspect_document(REPORT, COMMAND, verbose=True),
    "inspect-many": inspect_document(MANY, COMMAND),
    "check": CHECK,
    "fuse": FUSE,
    "verify": VERIFY,
    "bench": BENCH,
    "error": failure("no such file: a.pt", "give the path of a model file"),
}
GOLDEN_CASES = {
    "inspect-200.txt": show(INSPECT, 200),
    "inspect-100.txt": show(INSPECT, 100),
    "inspect-40.txt": show(INSPECT, 40),
    "inspect-200-verbose.txt": show(DOCUMENTS["inspect-verbose"], 200),
    "inspect-200-ascii.txt": show(INSPECT, 200, unicode=False),
    "check-120.txt": show(CHECK, 120),
    "fuse-100.txt": show(FUSE, 100),
    "fuse-40.txt": show(FUSE, 40),
    "fuse-25.txt": show(FUSE, 25),
    "verify-100.txt": show(VERIFY, 100),
    "bench-100.txt": show(BENCH, 100),
    **{f"{name}.md": markdown(document) for name, document in DOCUMENTS.items()},
    **{
        f"{name}.html": STYLE.sub("<style></style>", html(document))
        for name, document in DOCUMENTS.items()
        if name != "check"
    },
}


@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_output_is_as_it_was(name: str) -> None:
    file = GOLDEN / name
    if "UPDATE_GOLDEN" in os.environ:
        file.write_text(GOLDEN_CASES[name], encoding="utf-8")
    assert GOLDEN_CASES[name] == file.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [name for name in GOLDEN_CASES if name.endswith(".txt")])
def test_only_commands_are_wider_than_the_terminal(name: str) -> None:
    width = int(name.removesuffix(".txt").split("-")[1])
    lines = GOLDEN_CASES[name].splitlines()
    assert [line for line in lines if len(line) > width and not line.startswith("next: ")] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_ascii_output_is_ascii(name: str) -> None:
    for width in (200, 80, 30):
        assert show(DOCUMENTS[name], width, unicode=False).isascii()
    assert markdown(DOCUMENTS[name], unicode=False).isascii()
    assert html(DOCUMENTS[name]).isascii()


def test_resnet50_fits_one_screen() -> None:
    sites = [conv_bn(n, 64 * (1 + n % 7), 10_000_000 + n) for n in range(53)]
    report = Report("inspect", "resnet50.pt", sites=(*sites, KEPT, REFUSED))
    shown = show(inspect_document(report, COMMAND), 160)
    assert len(shown.splitlines()) <= 24
    assert "(and 52 more)" in shown
    assert KEPT.reason in shown and REFUSED.reason in shown.replace("\n", " ").replace("  ", "")


def test_every_reason_to_keep_or_refuse_is_listed() -> None:
    document = inspect_document(MANY, COMMAND)
    for shown in (show(document, 120), markdown(document), html(document).replace("&#215;", "×")):
        assert all(site.reason in shown and site.place in shown for site in MANY.sites)


def test_groups_share_operators_and_add_up() -> None:
    groups = group_sites([conv_bn(1, 2, 10_000_000), BRANCHES, conv_bn(2, 3, 20_000_000), KEPT, KEPT])
    assert [len(group.sites) for group in groups] == [2, 1, 2]
    assert groups[0].total(lambda site: site.macs_before) == 30_000_000
    assert groups[0].geometry == "2→2, 3×3 … 3→3, 3×3"
    assert "".join(span.text for span in groups[0].place) == "layer1.conv … layer1.bn (and 1 more)"


HOSTILE = "[red]a[/red] [/] :boom: [link=http://x]\x1b[31m\x07\tb\nc"


def with_names(name: str, *, verbose: bool) -> list[Document]:
    """Documents in which everything that comes from a file is ``name``."""
    site = SiteReport(name, (name,), name, "merge", name, tree=(name, f"  {name}"))
    report = Report(
        "fuse",
        name,
        {name: name},
        sites=(site,),
        unknown={name: 1},
        warnings=(name,),
        before=Counts({name: 1}, 1, 1),
        after=Counts({name: 1}, 1, 1),
        verification=Verification(False, name, (Comparison(name, 0.0, 0.0),)),
        seconds={name: 1.0},
    )
    contents = Contents("module", name, {name: name}, (TensorInfo(name, (2, 3), name),), (name,))
    return [
        contents_document(contents, verbose=verbose),
        inspect_document(report, name, verbose=verbose),
        check_document(report, name, verbose=verbose),
        fuse_document(report, name, verbose=verbose),
        verify_document(report, verbose=verbose),
        bench_document(report, verbose=verbose),
        failure(name, name),
    ]


@pytest.mark.parametrize("width", [40, 80, 300])
@pytest.mark.parametrize("verbose", [False, True])
def test_names_are_printed_literally(width: int, verbose: bool) -> None:
    for document in with_names(HOSTILE, verbose=verbose):
        shown = show(document, width)
        assert "[red]a[/red]" in shown and ":boom:" in shown
        assert "\x1b" not in shown and "\x07" not in shown and "\t" not in shown


INTO_MARKUP = [
    HOSTILE,
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    '"onmouseover="x\' </code></pre></td></details><!-- & &amp; &#60; &lt',
    "![a](http://x/y.png) [b](javascript:x) <http://x> http://x.y www.x.y a@b.c",
    "| a \\| b \\\\| `c | d` ``e`` |",
    "```",
    "`",
    " ` ",
    "**a** __b__ _c_ ~~d~~ $e$ \\*f\\* layer_1_conv",
    "# a",
    "> a",
    "- a",
    "1. a",
    "1) a",
    "===",
    "---",
    "\\",
    "a\\",
    "@org/team #1 org/repo#2 GH-3 :tada:",
]


def read_markdown(text: str) -> list[Token]:
    """Every token of a Markdown text, inline ones too."""
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)
    return [inner for token in tokens for inner in (token, *(token.children or ()))]


def shape_of(tokens: list[Token]) -> list[str]:
    """The structure of a Markdown text: literal HTML code is code, and text is not looked at."""
    shape = []
    for token in tokens:
        if token.type == "html_inline" and token.content in ("<code>", "</code>"):
            if token.content == "<code>":
                shape.append("code_inline ")
        elif token.type not in ("text", "text_special", "entity", "inline"):
            shape.append(f"{token.type} {token.content if 'html' in token.type else ''}")
    return shape


@pytest.mark.parametrize("name", INTO_MARKUP)
@pytest.mark.parametrize("verbose", [False, True])
def test_names_are_no_markdown(name: str, verbose: bool) -> None:
    hostile, plain = (with_names(text, verbose=verbose) for text in (name, "name"))
    for document, like in zip(hostile, plain, strict=True):
        text = markdown(document)
        tokens = read_markdown(text)
        assert shape_of(tokens) == shape_of(read_markdown(markdown(like))), text
        said = "".join(
            t.content for t in tokens if t.type in ("text", "text_special", "code_inline", "fence")
        )
        assert one_line(name) in said.replace("\u200b", ""), text


def test_names_in_markdown_mention_nobody() -> None:
    document = verify_document(Report("verify", "m.pt", {"x": INTO_MARKUP[-1]}))
    said = "".join(token.content for token in read_markdown(markdown(document)) if token.type == "text")
    assert "@\u200borg" in said and " #\u200b1" in said and "repo#\u200b2" in said
    assert "GH\u200b-3" in said and ":\u200btada:" in said


class Reader(HTMLParser):
    """The tags and attributes of a page, and the text of its body."""

    EMPTY = ("meta", "img", "br")

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, tuple[tuple[str, str | None], ...]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, "tags must nest"

    def handle_data(self, data: str) -> None:
        if "body" in self.open:
            self.text += data


@pytest.mark.parametrize("name", INTO_MARKUP)
@pytest.mark.parametrize("verbose", [False, True])
def test_names_are_no_html(name: str, verbose: bool) -> None:
    hostile, plain = (with_names(text, verbose=verbose) for text in (name, "name"))
    for document, like in zip(hostile, plain, strict=True):
        page = Reader(html(document))
        assert page.open == [] and page.tags == Reader(html(like)).tags
        assert one_line(name) in page.text


@pytest.mark.parametrize("name", DOCUMENTS)
def test_html_is_one_accessible_file(name: str) -> None:
    page = html(DOCUMENTS[name])
    tags = [tag for tag, _ in Reader(page).tags]
    assert not {"script", "link", "img", "iframe", "a"} & set(tags)
    assert "url(" not in page and "@import" not in page and "http:" not in page and "https:" not in page
    assert tags.count("h1") == tags.count("main") == tags.count("title") == 1
    assert tags.count("caption") == tags.count("table")
    attributes = dict(Reader(page).tags)
    assert ("lang", "en") in attributes["html"]
    assert all(dict(a).get("scope") in ("col", "row") for tag, a in Reader(page).tags if tag == "th")
    for style in ("color-scheme: light dark", "prefers-color-scheme: dark", "@media print"):
        assert style in page


def luminance(colour: str) -> float:
    """Relative luminance of #rgb or #rrggbb, by WCAG 2."""
    digits = colour.removeprefix("#")
    digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
    channels = (int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4))
    linear = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_html_has_contrast_in_light_dark_and_print() -> None:
    schemes = [block.split("}")[0] for block in html(VERIFY).split(":root {")[1:]]
    assert len(schemes) == 3
    for scheme in schemes:
        colours = dict(re.findall(r"--(\w+): (#\w+)", scheme))
        ground = luminance(colours["ground"])
        for name in ("text", "dim", "good", "keep", "refuse", "bad"):
            dark, light = sorted((luminance(colours[name]), ground))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (name, scheme)


def test_markdown_aligns_figures_and_folds_long_listings() -> None:
    assert "| --- | --: | --: | --: |" in markdown(FUSE)
    assert "<details>" not in markdown(INSPECT)
    many = markdown(inspect_document(MANY, COMMAND))
    assert "<summary>15 places</summary>\n\n| action |" in many and many.count("</details>") == 1
    assert "> [!WARNING]\n> the model is in train mode" in many


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
