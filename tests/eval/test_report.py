"""The report: what it says, hostile names, destinations, and how it looks to a browser."""

from __future__ import annotations

import json
import os
import re
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import browser_support
import pytest
import result_support as made
from browser_support import Browser, browser

from quantkit.errors import DestinationError, UsageError
from quantkit.eval.report import write_report
from quantkit.eval.report.markdown import escape
from quantkit.eval.report.verdict import front, grade, judge

pytest.importorskip("matplotlib")


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def figures(page: Page) -> list[str | None]:
    return [attributes.get("id") for tag, attributes in page.tags if tag == "figure"]


def test_everything_is_there(tmp_path: Path) -> None:
    found = made.result()
    path = write_report(found, tmp_path / "report")
    page = Page(path.read_text(encoding="utf-8"))
    assert figures(page) == ["pareto", "kl", "layers-1", "layers-2", "speed", "memory", "size"]
    assert sum(tag == "svg" for tag, _ in page.tags) == 7
    for words in ("awq", "ternary", "passkey", "arc_easy", "word perplexity", "ab" * 32, "2.13.0", "0.01000"):
        assert words in page.text, words
    assert "quantkit eval out/awq --reference models/source" in page.text
    assert "--override model.layers." in page.text and "prefers-color-scheme: dark" in page.text
    stored = json.loads((tmp_path / "report" / "report.json").read_text())
    assert stored == found.to_json()
    text = (tmp_path / "report" / "report.md").read_text()
    for file in re.findall(r"\]\((figures/[^)]*)\)", text):
        ElementTree.parse(tmp_path / "report" / file)  # well-formed
        assert "var(" not in (tmp_path / "report" / file).read_text()
    assert text.count("](figures/") == 7 and "| awq | awq | 4.50 |" in text
    assert sorted(p.name for p in (tmp_path / "report").iterdir()) == [
        "figures",
        "report.html",
        "report.json",
        "report.md",
    ]


def test_it_needs_nothing_from_outside(tmp_path: Path) -> None:
    page = Page(write_report(made.result(), tmp_path / "r").read_text())
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "object", "embed", "base", "form", "img"), tag
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "action"):
                assert value is not None and value.startswith(("#", "data:,", "data:image/png;")), (
                    tag,
                    name,
                    value,
                )
    raw = (tmp_path / "r" / "report.html").read_text()
    addresses = set(re.findall(r"https?://[^\s\"'<]*", raw))
    assert all(address.startswith("http://www.w3.org/") for address in addresses)  # names of XML dialects
    assert "@import" not in raw and not re.search(r"url\((?!#)", raw)


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    bad = made.row(f"out/{made.HOSTILE}", made.HOSTILE, 0.02)
    for layer in bad.layers:
        layer.name = layer.kind = f"{made.HOSTILE}\x00\x1b[31m\n\ud800"
        layer.advice = [f"--skip '{made.HOSTILE}'"]
    bad.tasks[0].task = bad.checks[0].name = bad.note = made.HOSTILE
    found = made.result(bad, made.row("out/$\\frac{1}{0}$", "nf4", 0.3))
    found.warnings = found.commands = [made.HOSTILE]
    found.environment["cpu"] = made.HOSTILE
    path = write_report(found, tmp_path / "r", title=made.HOSTILE)
    page = Page(path.read_text(encoding="utf-8"))
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert (
        page.text.count("<script>alert(1)</script>") >= 8
        and "{{1234*4321}}" in page.text
        and "5332114" not in page.text
    )
    markdown = (tmp_path / "r" / "report.md").read_text()
    outside_code = re.sub(r"^    .*$", "", markdown, flags=re.MULTILINE)
    assert "<script" not in outside_code and "\x1b" not in markdown
    for file in (tmp_path / "r" / "figures").iterdir():
        ElementTree.parse(file)


def test_markdown_escaping() -> None:
    assert escape("a|b*c_d`e`<f>&[g](h)") == r"a\|b\*c\_d\`e\`&lt;f&gt;&amp;\[g\](h)"


def test_little_to_show(tmp_path: Path) -> None:
    """No reference, no layers, no speed; one row; infinite perplexity."""
    bare = made.row("only", "nf4", 0.01)
    bare.divergence, bare.layers, bare.speed, bare.checks, bare.tasks, bare.sha256 = (
        None,
        [],
        None,
        [],
        [],
        None,
    )
    page = Page(write_report(made.result(bare, reference=False), tmp_path / "one").read_text())
    assert figures(page) == ["pareto", "size"]
    broken = made.row("broken", "nf4", 0.5)
    assert broken.divergence is not None
    broken.perplexity.ppl = broken.divergence.ppl_ratio = broken.divergence.kl_mean = float("inf")
    broken.divergence.kl_quantiles[-1] = float("inf")
    page = Page(
        write_report(made.result(broken, made.row("fine", "awq", 0.01)), tmp_path / "two").read_text()
    )
    assert "a heavy loss" in page.text
    alone = made.result()
    alone.rows = alone.rows[:1]
    assert "Only the reference" in write_report(alone, tmp_path / "three").read_text()


def test_many_checkpoints_and_layers(tmp_path: Path) -> None:
    rows = [
        made.row(f"sweep/setting-number-{i}-{'x' * 40}", "gptq", 0.01 + i / 50, layers=30) for i in range(11)
    ]
    page = Page(write_report(made.result(*rows), tmp_path / "r").read_text())
    assert len(figures(page)) == 5 + 11


def test_verdict() -> None:
    small, large = made.row("a", "awq", 0.01, size=5), made.row("b", "fp8", 0.001, size=9)
    worse = made.row("c", "nf4", 0.05, size=6)
    found = made.result(small, large, worse)
    assert [grade(row) for row in (small, large, worse)] == [
        "a small loss",
        "practically lossless",
        "a noticeable loss",
    ]
    assert front(found) == [small, large]
    words = judge(found)
    assert words.headline.startswith("a is the smallest with at most a small loss")
    assert "b stays closest" in words.headline and len(words.details) == 3
    heavy = made.row("d", "ternary", 0.5)
    assert (
        grade(heavy) == "a heavy loss"
        and "lost on passkey 100 → 30 %" in judge(made.result(heavy)).details[0]
    )
    assert judge(made.result(heavy, worse)).headline.startswith("Every checkpoint loses noticeably; c")


def test_destinations(tmp_path: Path) -> None:
    found = made.result()
    write_report(found, tmp_path / "r")
    with pytest.raises(DestinationError, match="--overwrite"):
        write_report(found, tmp_path / "r")
    found.warnings = ["another one"]
    assert "another one" in write_report(found, tmp_path / "r", overwrite=True).read_text()
    (tmp_path / "r" / "notes.txt").write_text("mine")
    with pytest.raises(DestinationError, match=r"holds notes\.txt"):
        write_report(found, tmp_path / "r", overwrite=True)
    assert (tmp_path / "r" / "notes.txt").read_text() == "mine"
    (tmp_path / "file").write_text("")
    with pytest.raises(DestinationError, match="is a file"):
        write_report(found, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    write_report(found, tmp_path / "empty")
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"quantkit\[report\]"):
        write_report(made.result(), tmp_path / "r")


# -- in a browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    reason = browser_support.missing()
    if reason:
        pytest.skip(reason)
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report as awkward as they come: long hostile names, many rows, deep models."""
    rows = [
        made.row(f"out/{made.HOSTILE}-{'long' * 30}", "nf4", 0.02),
        *(
            made.row(f"out/setting-{i}", "gptq", 0.01 * (i + 1), layers=40, size=4_000_000 + i)
            for i in range(5)
        ),
    ]
    found = made.result(*rows)
    found.commands = ["quantkit sweep " + "x" * 400]
    return write_report(found, tmp_path_factory.mktemp("page") / "r", title="A" * 150)


OVERFLOW = """
const wide = [];
for (const node of document.querySelectorAll('body *')) {
  if (node.closest('.scroll') && !node.classList.contains('scroll')) continue;  // scrolls on its own
  if (node.closest('svg') && node.tagName !== 'svg') continue;
  const box = node.getBoundingClientRect();
  if (box.width && (box.right > document.documentElement.clientWidth + 0.5 || box.left < -0.5))
    wide.push(node.tagName + '.' + node.className + ' ' + box.left + '..' + box.right);
}
return [document.documentElement.scrollWidth, document.documentElement.clientWidth, wide];
"""
SCROLLING = """
return [...document.querySelectorAll('.scroll')]
  .filter(n => n.scrollWidth > n.clientWidth + 1).map(n => n.id + n.className);
"""
CLIPPED = """
const cut = [];
for (const svg of document.querySelectorAll('figure svg')) {
  const frame = svg.getBoundingClientRect();
  for (const text of svg.querySelectorAll('text')) {
    const box = text.getBoundingClientRect();
    if (box.right > frame.right + 1 || box.left < frame.left - 1 || box.bottom > frame.bottom + 1
        || box.top < frame.top - 1) cut.push(svg.closest('figure').id + ': ' + text.textContent);
  }
}
return cut;
"""
DRAWN = """
return [...document.querySelectorAll('figure')].map(figure => {
  const svg = figure.querySelector('svg'), box = svg.getBoundingClientRect();
  return [figure.id, box.width, box.height, svg.querySelectorAll('path, use').length];
});
"""
CONTRAST = """
const channel = v => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number);
  return 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b); };
const back = node => { for (; node; node = node.parentElement) {
  const c = getComputedStyle(node).backgroundColor; if (!/, 0\\)|transparent/.test(c)) return c; } };
const low = [];
for (const node of document.querySelectorAll('h1, h2, h3, p, dt, dd, th, td, figcaption, code, li')) {
  const a = light(getComputedStyle(node).color), b = light(back(node));
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < 4.5) low.push(node.tagName + '.' + node.className + ' ' + ratio.toFixed(2));
}
for (const node of document.querySelectorAll('svg text')) {
  const a = light(getComputedStyle(node).fill), b = light(back(node.closest('section')));
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < 4.5) low.push('svg text ' + node.textContent + ' ' + ratio.toFixed(2));
}
return low;
"""


@pytest.mark.parametrize("width", [380, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_in_chromium(chromium: Browser, page: Path, width: int, dark: bool) -> None:
    chromium.console()
    chromium.open(page, width, dark=dark)
    assert chromium.console() == []  # no error, no warning: the Content-Security-Policy was never met
    scrolled, client, wide = chromium.run(OVERFLOW)
    assert client == width and scrolled <= width and wide == []
    if width < 640:
        assert chromium.run(SCROLLING) == []  # a phone shows every figure without scrolling sideways
    drawn = chromium.run(DRAWN)
    assert [name for name, *_ in drawn] == [
        *("pareto", "kl", *(f"layers-{i}" for i in range(1, 7))),
        *("speed", "memory", "size"),
    ]
    assert all(w > 250 and h > 100 and shapes > 10 for _, w, h, shapes in drawn)
    assert chromium.run(CLIPPED) == []
    assert chromium.run(CONTRAST) == []
    background = chromium.run("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) is dark
    assert chromium.run("return document.title").startswith("AAAA")


def test_a_script_in_the_page_would_not_run(chromium: Browser, page: Path, tmp_path: Path) -> None:
    """The page's own policy stops what escaping should never let through."""
    attack = tmp_path / "attack.html"
    attack.write_text(page.read_text().replace("</main>", "<script>document.title = 'owned'</script></main>"))
    chromium.open(attack, 1280)
    assert chromium.run("return document.title") != "owned"
    assert any("Content Security Policy" in entry["message"] for entry in chromium.console())


def test_it_prints(chromium: Browser, page: Path, tmp_path: Path) -> None:
    chromium.open(page, 1280, dark=True)
    data = chromium.pdf()
    assert data.startswith(b"%PDF-") and 2 <= data.count(b"/Type /Page\n") <= 14


def test_svg_text_is_text(tmp_path: Path) -> None:
    write_report(made.result(), tmp_path / "r")
    svg = (tmp_path / "r" / "figures" / "pareto.svg").read_text()
    assert ">awq</text>" in svg and len(svg) < 60_000
    assert "metadata" not in svg and "2026" not in svg


def test_same_result_same_bytes(tmp_path: Path) -> None:
    texts: list[Any] = []
    for seed in ("1", "2"):
        code = (
            "import sys; sys.path[:0] = sys.argv[2:]; import result_support as m; "
            "from quantkit.eval.report import write_report; write_report(m.result(), sys.argv[1])"
        )
        out = tmp_path / seed
        here = Path(__file__).parent
        subprocess.run(
            [__import__("sys").executable, "-c", code, str(out), str(here), str(here.parent)],
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        texts.append((out / "report.html").read_text())
    assert texts[0] == texts[1]
