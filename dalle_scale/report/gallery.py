"""Rows of captioned pictures as one PNG and one self-contained HTML page.

    gallery.save(folder, "Toy world", ("true scene", "first candidate", "best of 16"), rows)

writes `gallery.png` and `gallery.html`. A row is a caption with one picture a column; rows of the same group stand
together under its heading. A picture may carry a mark: green frame and tick for right, red frame and cross for wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import groupby
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dalle_scale import io
from dalle_scale.report.page import Card, Cards, Page, Picture, Section, render, shown_side, to_pillow
from dalle_scale.types import UserError


@dataclass(frozen=True)
class Row:
    """A caption and its pictures, one a column."""

    caption: str
    pictures: tuple[Picture, ...]
    group: str = ""


def save(
    folder: str | Path,
    title: str,
    columns: Sequence[str],
    rows: Sequence[Row],
    notes: Sequence[str] = (),
    name: str = "gallery",
) -> None:
    """Write `folder/<name>.png` and `folder/<name>.html`, each whole or not at all.

    Args:
        folder: created if missing.
        title: heading of the page.
        columns: the meaning of each image of a row; every row has as many images.
        rows: rows of one group must follow one another.
        notes: lines below the title: the program that was run, its outcome.

    Raises:
        UserError: there are no rows.
    """
    if not rows:
        raise UserError(f"{folder}: no rows to show in a gallery; sample some pictures first")
    for row in rows:
        assert len(row.pictures) == len(columns), f"{len(row.pictures)} pictures in {len(columns)} columns"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sheet = BytesIO()
    draw(title, columns, rows, notes).save(sheet, "PNG", optimize=True)
    io.write(folder / f"{name}.png", sheet.getvalue())
    io.write(folder / f"{name}.html", page(title, columns, rows, notes))


def _groups(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Runs of rows that share a group label."""
    for label, members in groupby(rows, key=lambda row: row.group):
        yield label, list(members)


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
        return cls(shown_side(longest_side), 5 if _marked(rows) else 1, len(rows[0].pictures))

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
    framed.paste(to_pillow(picture.image).resize((width, height), method), (layout.frame, layout.frame))
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


def page(title: str, columns: Sequence[str], rows: Sequence[Row], notes: Sequence[str] = ()) -> str:
    """Return the gallery as one HTML document; arguments as in `save`."""
    cards = [Card(list(zip(columns, row.pictures, strict=True)), row.caption) for row in rows]
    whole = Cards.of(cards)
    sections, start = [], 0
    for label, members in _groups(rows):
        sections.append(Section(label, [replace(whole, cards=cards[start : start + len(members)])]))
        start += len(members)
    return render(Page(title, [*notes, *_legend(rows)], sections))
