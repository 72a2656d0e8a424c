"""Every page escapes hostile text, stands alone, is well formed, and can be read without a mouse or a screen."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.processes import ROOT
from support.programs import load_program

from dalle_scale import config as configs
from dalle_scale.cluster import plan, plan_page
from dalle_scale.curation import statistics_page
from dalle_scale.curation.shard_writer import ShardWriter
from dalle_scale.evaluation import reconstruction_page
from dalle_scale.evaluation.reconstruction import Example
from dalle_scale.report import charts, gallery, tables
from dalle_scale.report.page import Cards, GalleryImage, Page, Section, Tiles, render, shown_side, write_page

describe_shards = load_program("describe_shards")

HOSTILE = "\"'></title></style></svg><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 }}{% raw %}&amp;\\| ü"
IMAGE = torch.arange(3 * 8 * 8, dtype=torch.uint8).view(3, 8, 8)
VOID = {"meta", "img", "path", "rect"}


class Reader(HTMLParser):
    """Tags with their attributes, and all text; a tag that is not closed in its turn fails."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open += [tag] * (tag not in VOID)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def gallery_page(folder: Path) -> str:
    images = tuple(GalleryImage(IMAGE, right, HOSTILE) for right in (None, True, False))
    return gallery.page(HOSTILE, [HOSTILE] * 3, [gallery.Row(HOSTILE, images, HOSTILE)] * 2, [HOSTILE])


def reconstruction(folder: Path) -> str:
    row = {"name": HOSTILE, "export": HOSTILE, "stage": HOSTILE, "samples": 1, "samples_lost": 0, HOSTILE: 1.5}
    data = SimpleNamespace(digest="0" * 64, samples=1)
    document = reconstruction_page.document(Path(HOSTILE), data, [row])
    return render(reconstruction_page.page(document, {HOSTILE: {0: Example(IMAGE, IMAGE, 20.0, 0.5)}}))


def planned(folder: Path) -> str:
    cluster = {"nodes": 1, "gpus": 1, "memory_gib": 1.0, "flops": 1e12, "intra_gbps": 80.0, "inter_gbps": 8.0}
    config = configs.load(ROOT / "configs" / "tiny" / "dvae.yaml", [])
    numbers = plan.document(config, configs.parse(plan.Cluster, cluster, where="cluster"))
    numbers["config"]["run"] = HOSTILE
    numbers["parameters"] = {HOSTILE: numbers["parameters"].popitem()[1]}
    for row in numbers["zero"]:
        row["memory_bytes"][HOSTILE] = 2**29
    return render(plan_page.page(numbers))


def statistics(folder: Path) -> str:
    with ShardWriter(folder / "set", info={"kind": HOSTILE}) as writer:
        writer.add("good", {"txt": HOSTILE.encode()})
        writer.add("bad", {"txt": b"\xff"})
    describe_shards.main([f"--data={folder / 'set'}", f"--out={folder / 'page'}", "--workers=1"])
    numbers = json.loads((folder / "page" / "stats.json").read_text())
    numbers["data_set"] = HOSTILE
    numbers["unreadable"] = {HOSTILE: 1}
    numbers["unreadable_examples"] = [{"shard": HOSTILE, "key": HOSTILE, "reason": HOSTILE}]
    numbers["members"] = {HOSTILE: numbers["members"]["txt"]}
    numbers["images"] = {"formats": {HOSTILE: 1}}
    numbers["captions"] |= {"languages": {HOSTILE: 1}, "frequent_words": {HOSTILE: 1}}
    return render(statistics_page.page(numbers))


@pytest.mark.parametrize("build", [gallery_page, reconstruction, planned, statistics])
def test_hostile_text_is_text(build, tmp_path):
    page = build(tmp_path)
    found = Reader(page)
    allowed = {"html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "h3", "p", "div", "span", "i", "b"}
    allowed |= {"table", "thead", "tbody", "tr", "th", "td", "dl", "dt", "dd", "figure", "img", "figcaption"}
    allowed |= {"svg", "g", "rect", "path", "text", "details", "summary", "ul", "li"}
    assert {tag for tag, _ in found.tags} <= allowed
    assert not [name for _, attributes in found.tags for name in attributes if name.startswith("on")]
    assert all(attributes["src"].startswith("data:image/png;base64,") for tag, attributes in found.tags if tag == "img")
    title = "".join(found.texts).split("\n:root")[0]
    assert (HOSTILE in title) != (build is reconstruction), "whole, in the title of all but one"
    assert sum(HOSTILE in text for text in found.texts) >= 3
    assert not re.search(r"https?:|url\(|@import|<link|<script|<iframe", page)


@pytest.mark.parametrize("build", [gallery_page, reconstruction, planned, statistics])
def test_a_page_needs_neither_mouse_nor_sight(build, tmp_path):
    tags = Reader(build(tmp_path)).tags
    by_name = {name: [attributes for tag, attributes in tags if tag == name] for name, _ in tags}
    assert by_name["html"] == [{"lang": "en"}] and len(by_name["h1"]) == len(by_name["main"]) == 1
    assert any(meta.get("name") == "viewport" for meta in by_name["meta"])
    assert all(image["alt"] for image in by_name.get("img", ()))
    assert all(chart["aria-label"] for chart in by_name.get("svg", ()))
    assert len(by_name.get("svg", ())) == len(by_name.get("details", ())), "each chart also as text"
    scrolling = [box for box in by_name.get("div", ()) if box.get("class") == "scroll"]
    assert len(scrolling) == len(by_name.get("table", ()))
    assert all(box["tabindex"] == "0" and box["aria-label"] for box in scrolling), "the arrow keys scroll it"


def test_every_page_has_the_one_stylesheet(tmp_path):
    styles = set()
    for build in (gallery_page, reconstruction, planned, statistics):
        (tmp_path / build.__name__).mkdir()
        styles |= set(re.findall(r"<style>.*?</style>", build(tmp_path / build.__name__), re.S))
    [style] = styles
    assert "prefers-color-scheme: dark" in style and ":focus-visible" in style


def test_a_page_is_written_whole(tmp_path):
    page = Page("Title", ["note"], [Section("Numbers", [Tiles([("3", "things")])])])
    write_page(tmp_path / "page.html", page)
    assert (tmp_path / "page.html").read_text() == render(page)
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_images_are_enlarged_by_whole_factors_and_never_too_wide():
    assert [shown_side(side) for side in (8, 24, 100, 128, 200, 512)] == [128, 120, 100, 128, 200, 384]
    assert Cards([], 8, shown_side(8)).shown_side == 128


def test_markdown_tables_keep_their_columns():
    rows = [["name", "note", "number"], ["a|b", "two\nlines\r\nand", "1"], ["\\|", "a\\b", "2"]]
    lines = tables.markdown(rows, text_columns=(0, 1))
    assert lines == [
        "| name | note | number |",
        "| --- | --- | ---: |",
        r"| a\|b | two<br>lines<br>and | 1 |",
        r"| \\\| | a\b | 2 |",
    ]


def test_bars_are_as_long_as_their_numbers():
    parts = [charts.Part("a: 30", 30, "red"), charts.Part("none: 0", 0), charts.Part("b: 90", 90, "blue")]
    chart = charts.rows(
        "label", [charts.Row("one", parts, "120"), charts.Row("two", parts[:1], "30")], 60, charts.Part("room: 45", 45)
    )
    *bars, limit = chart.bars
    widths = [bar.box.width for bar in bars]
    assert [bar.title for bar in bars] == ["a: 30", "b: 90", "a: 30"], "no bar for nothing"
    assert widths[0] == pytest.approx(widths[1]) == pytest.approx(widths[2]), "what is beyond the end is cut"
    assert chart.bars[1].box.x == pytest.approx(chart.bars[0].box.x + widths[0])
    assert limit.title == "room: 45" and limit.box.x == pytest.approx(bars[0].box.x + widths[0] * 1.5)
    empty = charts.rows("nothing", [], 1)
    assert empty.height > 0 and not empty.bars
