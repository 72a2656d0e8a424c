"""Rows of captioned pictures as one PNG and one self-contained HTML page.

    gallery.save(folder, "Toy world", ("true scene", "first candidate", "best of 16"), rows)

writes `gallery.png` and `gallery.html`. A row is a caption with one picture a column; rows of the same group stand
together under its heading. A picture may carry a mark: green frame and tick for right, red frame and cross for wrong.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dalle_scale.types import UserError


@dataclass(frozen=True)
class Picture:
    """One cell of a row."""

    image: Tensor  # uint8 [3, H, W]
    right: bool | None = None  # None: no mark
    note: str = ""  # one short line below the picture


@dataclass(frozen=True)
class Row:
    """A caption and its pictures, one a column."""

    caption: str
    pictures: tuple[Picture, ...]
    group: str = ""


def save(
    folder: str | Path, title: str, columns: Sequence[str], rows: Sequence[Row], notes: Sequence[str] = ()
) -> None:
    """Write `folder/gallery.png` and `folder/gallery.html`.

    Args:
        folder: made if it is not there.
        title: heading of the page.
        columns: what the pictures of a row are, as many as each row has pictures.
        rows: rows of one group must follow one another.
        notes: lines below the title: what was run, what came out.

    Raises:
        UserError: there are no rows.
    """
    if not rows:
        raise UserError(f"{folder}: no rows to show in a gallery; sample some pictures first")
    for row in rows:
        assert len(row.pictures) == len(columns), f"{len(row.pictures)} pictures in {len(columns)} columns"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    draw(title, columns, rows, notes).save(folder / "gallery.png", optimize=True)
    (folder / "gallery.html").write_text(page(title, columns, rows, notes), encoding="utf-8")


def _groups(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Runs of rows that share a group label."""
    for label, members in groupby(rows, key=lambda row: row.group):
        yield label, list(members)


def _pillow(image: Tensor) -> Image.Image:
    """uint8 [3, H, W] -> Pillow."""
    return Image.fromarray(image.cpu().permute(1, 2, 0).contiguous().numpy())


# ---- PNG ----

_PAPER, _INK, _FAINT, _RULE = "#ffffff", "#1f2328", "#59636e", "#d1d9e0"
_COLOURS = {None: _RULE, True: "#1a7f37", False: "#cf222e"}  # of a picture's frame
_PAGE_WIDTH = 1600  # pixels; a row that is wider widens the page
_MARGIN, _GAP = 40, 12
_CARD_GAP = 44
_BADGE = 20  # side of the mark below a picture
_TITLE, _HEADING, _TEXT, _SMALL = 40, 28, 20, 17  # font sizes in pixels


@dataclass(frozen=True)
class _Layout:
    """Where things go, in pixels."""

    side: int  # longer side of a picture
    frame: int  # thickness around a picture
    columns: int  # pictures of a row

    @classmethod
    def of(cls, rows: Sequence[Row]) -> _Layout:
        longest_side = max(max(picture.image.shape[1:]) for row in rows for picture in row.pictures)
        zoom = max(1, round(128 / longest_side))  # whole, so that every pixel of a small picture is a square
        return cls(min(longest_side * zoom, 384), 5 if _marked(rows) else 1, len(rows[0].pictures))

    @property
    def cell(self) -> int:
        """Width of a framed picture."""
        return self.side + 2 * self.frame

    @property
    def card(self) -> int:
        """Width of a row."""
        return self.columns * (self.cell + _GAP) - _GAP

    @property
    def across(self) -> int:
        """Rows side by side."""
        return max(1, (_PAGE_WIDTH - 2 * _MARGIN + _CARD_GAP) // (self.card + _CARD_GAP))

    @property
    def inner(self) -> int:
        """Width of the page without its margins."""
        return self.across * (self.card + _CARD_GAP) - _CARD_GAP


def draw(title: str, columns: Sequence[str], rows: Sequence[Row], notes: Sequence[str] = ()) -> Image.Image:
    """The gallery as one picture; arguments as in `save`."""
    layout = _Layout.of(rows)
    blocks = [_text_block(title, _TITLE, layout.inner, _INK)]
    blocks += [_text_block(line, _TEXT, layout.inner, _FAINT) for line in [*notes, *_legend(rows)]]
    for label, members in _groups(rows):
        if label:
            blocks.append(_heading(label, layout.inner))
        for start in range(0, len(members), layout.across):
            blocks.append(_cards(columns, members[start : start + layout.across], layout))
    height = sum(block.height + _GAP for block in blocks) - _GAP
    sheet = Image.new("RGB", (layout.inner + 2 * _MARGIN, height + 2 * _MARGIN), _PAPER)
    top = _MARGIN
    for block in blocks:
        sheet.paste(block, (_MARGIN, top))
        top += block.height + _GAP
    return sheet


def _marked(rows: Sequence[Row]) -> bool:
    """Whether any picture is marked right or wrong."""
    return any(picture.right is not None for row in rows for picture in row.pictures)


def _legend(rows: Sequence[Row]) -> list[str]:
    """What the marks mean, where there are any."""
    line = "Green frame with a tick: the picture shows what the caption says. Red with a cross: it does not."
    return [line] if _marked(rows) else []


def _cards(columns: Sequence[str], rows: Sequence[Row], layout: _Layout) -> Image.Image:
    """Rows side by side, each a card: the caption above its pictures."""
    captions = [_text_block(row.caption, _TEXT, layout.card, _INK) for row in rows]
    cells = [[_cell(name, p, layout) for name, p in zip(columns, row.pictures, strict=True)] for row in rows]
    caption_height = max(caption.height for caption in captions)
    cells_top = caption_height + 6
    height = cells_top + max(cell.height for row in cells for cell in row) + _GAP
    sheet = Image.new("RGB", (layout.inner, height), _PAPER)
    for index, (caption, row) in enumerate(zip(captions, cells, strict=True)):
        left = index * (layout.card + _CARD_GAP)
        sheet.paste(caption, (left, caption_height - caption.height))
        for column, cell in enumerate(row):
            sheet.paste(cell, (left + column * (layout.cell + _GAP), cells_top))
    return sheet


def _cell(name: str, picture: Picture, layout: _Layout) -> Image.Image:
    """A framed picture; below it its mark, the column's name and its note."""
    framed = _framed(picture, layout)
    indent = 0 if picture.right is None else _BADGE + 6
    name_block = _text_block(name, _SMALL, layout.cell - indent, _FAINT)
    note_block = _text_block(picture.note, _SMALL, layout.cell, _INK)
    name_top = framed.height + 5
    note_top = name_top + name_block.height
    cell = Image.new("RGB", (layout.cell, note_top + (note_block.height if picture.note else 0)), _PAPER)
    cell.paste(framed, (0, 0))
    if picture.right is not None:
        cell.paste(*_badge(picture.right, name_top))
    cell.paste(name_block, (indent, name_top))
    if picture.note:
        cell.paste(note_block, (0, note_top))
    return cell


def _framed(picture: Picture, layout: _Layout) -> Image.Image:
    """The picture at its size on the page, with the frame of its mark."""
    width, height = _fit(picture.image, layout.side)
    enlarged = width >= picture.image.shape[2]
    method = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
    framed = Image.new("RGB", (width + 2 * layout.frame, height + 2 * layout.frame), _COLOURS[picture.right])
    framed.paste(_pillow(picture.image).resize((width, height), method), (layout.frame, layout.frame))
    return framed


def _fit(image: Tensor, side: int) -> tuple[int, int]:
    """Width and height of the picture when its longer side is `side`."""
    _, height, width = image.shape
    scale = side / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _badge(right: bool, top: int) -> tuple[Image.Image, tuple[int, int], Image.Image]:
    """A tick or a cross on a coloured tile, where it goes, and its transparency; drawn large, shrunk for smooth
    edges."""
    unit = 4 * _BADGE / 10
    mask = Image.new("L", (4 * _BADGE, 4 * _BADGE), 0)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, *mask.size), radius=2.5 * unit, fill=255)
    tile = Image.new("RGB", mask.size, _COLOURS[right])
    tick = [((2.2, 5.4), (4.2, 7.4), (7.8, 2.8))]
    cross = [((2.8, 2.8), (7.2, 7.2)), ((7.2, 2.8), (2.8, 7.2))]
    for stroke in tick if right else cross:
        points = [(x * unit, y * unit) for x, y in stroke]
        ImageDraw.Draw(tile).line(points, fill="white", width=round(1.4 * unit), joint="curve")
    size = (_BADGE, _BADGE)
    return tile.resize(size, Image.Resampling.LANCZOS), (0, top), mask.resize(size, Image.Resampling.LANCZOS)


def _heading(label: str, width: int) -> Image.Image:
    """A group's name above a thin line, with air before it."""
    text = _text_block(label, _HEADING, width, _INK)
    block = Image.new("RGB", (width, text.height + 34), _PAPER)
    block.paste(text, (0, 24))
    ImageDraw.Draw(block).line((0, block.height - 2, width, block.height - 2), fill=_RULE, width=2)
    return block


def _text_block(text: str, size: int, width: int, colour: str) -> Image.Image:
    """Text broken into lines of at most `width` pixels."""
    font = ImageFont.load_default(size)
    lines = _wrap(text, font, width)
    step = round(size * 1.3)
    block = Image.new("RGB", (width, step * len(lines)), _PAPER)
    pen = ImageDraw.Draw(block)
    for number, line in enumerate(lines):
        pen.text((0, number * step), line, fill=colour, font=font)
    return block


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Greedy line breaks at spaces; a word wider than a line is broken inside."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


# ---- HTML ----

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1f2328; --faint: #59636e; --rule: #d1d9e0; --card: #f6f8fa;
        --right: #1a7f37; --wrong: #cf222e; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #0d1117; --ink: #e6edf3; --faint: #9198a1; --rule: #3d444d; --card: #151b23;
          --right: #3fb950; --wrong: #f85149; } }
* { box-sizing: border-box; }
body { margin: 2rem auto; max-width: 100rem; padding: 0 1.5rem; background: var(--paper); color: var(--ink);
       font: 16px/1.45 system-ui, sans-serif; }
h1 { margin: 0 0 .5rem; font-size: 1.8rem; } h2 { margin: 2.2rem 0 1rem; font-size: 1.25rem;
       border-bottom: 1px solid var(--rule); padding-bottom: .3rem; }
p { margin: .2rem 0; color: var(--faint); }
.cards { display: flex; flex-wrap: wrap; gap: 1rem; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: .8rem 1rem;
        max-width: 100%; }
.caption { margin: 0 0 .6rem; color: var(--ink); width: 0; min-width: 100%; overflow-wrap: anywhere; }
.pictures { display: flex; flex-wrap: wrap; gap: .7rem; }
figure { margin: 0; width: var(--side); }
figure img { display: block; width: 100%; height: auto; border: 1px solid var(--rule); border-radius: 3px; }
figcaption { margin-top: .3rem; font-size: .8rem; line-height: 1.3; color: var(--faint); overflow-wrap: anywhere; }
figcaption b { display: block; font-weight: normal; color: var(--ink); }
.right img { border: 4px solid var(--right); } .wrong img { border: 4px solid var(--wrong); }
.mark { display: inline-block; width: 1.1rem; border-radius: 3px; margin-right: .35rem; color: var(--card);
        font-weight: bold; text-align: center; }
.right .mark { background: var(--right); } .wrong .mark { background: var(--wrong); }
"""


def page(title: str, columns: Sequence[str], rows: Sequence[Row], notes: Sequence[str] = ()) -> str:
    """The gallery as one HTML document without links to anything outside it; arguments as in `save`."""
    side = max(max(picture.image.shape[1:]) for row in rows for picture in row.pictures)
    style = f"{_STYLE}:root {{ --side: {min(max(1, round(128 / side)) * side, 384)}px; }}\n"
    style += "img { image-rendering: pixelated; }\n" * (side < 128)
    body = [f"<h1>{html.escape(title)}</h1>"]
    body += [f"<p>{html.escape(line)}</p>" for line in [*notes, *_legend(rows)]]
    for label, members in _groups(rows):
        body += [f"<h2>{html.escape(label)}</h2>"] * bool(label)
        body += ['<div class="cards">', *(_card(columns, row) for row in members), "</div>"]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _card(columns: Sequence[str], row: Row) -> str:
    """One row as HTML."""
    figures = []
    for name, picture in zip(columns, row.pictures, strict=True):
        buffer = io.BytesIO()
        _pillow(picture.image).save(buffer, "PNG")
        data = base64.b64encode(buffer.getvalue()).decode()
        word, sign = {None: ("", ""), True: ("right", "✓"), False: ("wrong", "✗")}[picture.right]
        mark = f'<span class="mark" role="img" aria-label="{word}">{sign}</span>' if word else ""
        note = f"<b>{html.escape(picture.note)}</b>" if picture.note else ""
        alt = html.escape(f"{name}: {row.caption}")
        figures.append(
            f'<figure class="{word}"><img src="data:image/png;base64,{data}" alt="{alt}">'
            f"<figcaption>{mark}{html.escape(name)}{note}</figcaption></figure>"
        )
    caption = f'<p class="caption">{html.escape(row.caption)}</p>'
    return f'<div class="card">{caption}<div class="pictures">{"".join(figures)}</div></div>'
