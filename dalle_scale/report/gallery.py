"""Rows of captioned images as one PNG and one self-contained HTML page.

    gallery.save(folder, "Toy world", ("true scene", "first candidate", "best of 16"), rows)

writes `gallery.png` and `gallery.html`. A row is a caption with one image a column; rows of the same group stand
together under its heading. An image may carry a mark: green frame and tick for right, red frame and cross for wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import groupby
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from dalle_scale import io
from dalle_scale.report.page import Card, Cards, GalleryImage, Page, Section, render, shown_side, to_pillow
from dalle_scale.types import UserError


@dataclass(frozen=True)
class Row:
    """A caption and its images, one a column."""

    caption: str
    images: tuple[GalleryImage, ...]
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
        raise UserError(f"{folder}: no rows to show in a gallery; sample some images first")
    for row in rows:
        assert len(row.images) == len(columns), f"{len(row.images)} images in {len(columns)} columns"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sheet = BytesIO()
    draw(title, columns, rows, notes).save(sheet, "PNG", optimize=True)
    io.write(folder / f"{name}.png", sheet.getvalue())
    io.write(folder / f"{name}.html", page(title, columns, rows, notes))


# ---- PNG ----

_PAPER, _INK, _FAINT, _RULE = "#ffffff", "#1f2328", "#59636e", "#d1d9e0"
_COLOURS = {None: _RULE, True: "#1a7f37", False: "#cf222e"}  # of an image's frame
_PAGE_WIDTH = 1600  # pixels; a row that is wider widens the page
_MARGIN, _GAP = 40, 12
_CARD_GAP = 44
_BADGE = 20  # side of the mark below an image
_TITLE, _HEADING, _TEXT, _SMALL = 40, 28, 20, 17  # font sizes in pixels


def draw(title: str, columns: Sequence[str], rows: Sequence[Row], notes: Sequence[str] = ()) -> Image.Image:
    """Return the gallery as one image; arguments as in `save`."""
    side = shown_side(max(max(image.image.shape[1:]) for row in rows for image in row.images))
    frame = 5 if _marked(rows) else 1
    card = len(columns) * (side + 2 * frame + _GAP) - _GAP
    cards_across = max(1, (_PAGE_WIDTH - 2 * _MARGIN + _CARD_GAP) // (card + _CARD_GAP))
    width = cards_across * (card + _CARD_GAP) - _CARD_GAP
    blocks = [_text_block(title, _TITLE, width, _INK)]
    blocks += [_text_block(line, _TEXT, width, _FAINT) for line in [*notes, *_legend(rows)]]
    for label, group in groupby(rows, key=lambda row: row.group):
        if label:
            rule = Image.new("RGB", (width, 2), _RULE)
            blocks.append(_join([_text_block(label, _HEADING, width, _INK), rule], _GAP // 2, before=_CARD_GAP // 2))
        members = list(group)
        for start in range(0, len(members), cards_across):
            shown = members[start : start + cards_across]
            captions = [_text_block(row.caption, _TEXT, card, _INK) for row in shown]
            cells = [
                [_cell(name, image, side, frame) for name, image in zip(columns, row.images, strict=True)]
                for row in shown
            ]
            images = [_join(row, _GAP, "top") for row in cells]
            parts = [_join(captions, _CARD_GAP, "bottom"), _join(images, _CARD_GAP, "top")]
            blocks.append(_join(parts, _GAP // 2, before=_GAP))
    return ImageOps.expand(_join(blocks, _GAP), _MARGIN, _PAPER)


def _marked(rows: Sequence[Row]) -> bool:
    """Whether any image is marked right or wrong."""
    return any(image.right is not None for row in rows for image in row.images)


def _legend(rows: Sequence[Row]) -> list[str]:
    """Legend of the marks, if there are any."""
    line = "Green frame with a tick: the image shows what the caption says. Red with a cross: it does not."
    return [line] if _marked(rows) else []


def _join(blocks: Sequence[Image.Image], gap: int, align: str = "", before: int = 0) -> Image.Image:
    """Blocks below one another, the first `before` pixels from the top; or side by side, aligned "top" or "bottom"."""
    widths, heights = [block.width for block in blocks], [block.height for block in blocks]
    gaps = gap * (len(blocks) - 1)
    size = (sum(widths) + gaps, max(heights)) if align else (max(widths), sum(heights) + gaps + before)
    sheet, x, y = Image.new("RGB", size, _PAPER), 0, before
    for block in blocks:
        if align:
            y = sheet.height - block.height if align == "bottom" else 0
        sheet.paste(block, (x if align else 0, y))
        x, y = x + block.width + gap, y + block.height + gap
    return sheet


def _cell(name: str, image: GalleryImage, side: int, frame: int) -> Image.Image:
    """A framed image; below it its mark, the column's name and its note."""
    pixels, width = to_pillow(image.image), side + 2 * frame
    method = Image.Resampling.NEAREST if side >= max(pixels.size) else Image.Resampling.LANCZOS
    framed = ImageOps.expand(ImageOps.contain(pixels, (side, side), method), frame, _COLOURS[image.right])
    if image.right is None:
        label = _text_block(name, _SMALL, width, _FAINT)
    else:
        text = _text_block(name, _SMALL, width - _BADGE - 6, _FAINT)
        label = _join([_badge(image.right), text], 6, "top")
    return _join([framed, label, *[_text_block(image.note, _SMALL, width, _INK)] * bool(image.note)], 4)


def _badge(right: bool) -> Image.Image:
    """A tick or a cross on a coloured tile, made large and shrunk for smooth edges."""
    unit = 4 * _BADGE / 10
    tile = Image.new("RGB", (4 * _BADGE, 4 * _BADGE), _PAPER)
    pen = ImageDraw.Draw(tile)
    pen.rounded_rectangle((0, 0, *tile.size), radius=2.5 * unit, fill=_COLOURS[right])
    tick, cross = [((2.2, 5.4), (4.2, 7.4), (7.8, 2.8))], [((2.8, 2.8), (7.2, 7.2)), ((7.2, 2.8), (2.8, 7.2))]
    for stroke in tick if right else cross:
        pen.line([(x * unit, y * unit) for x, y in stroke], fill="white", width=round(1.4 * unit), joint="curve")
    return tile.resize((_BADGE, _BADGE), Image.Resampling.LANCZOS)


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
    whole = Cards.of([Card(list(zip(columns, row.images, strict=True)), row.caption) for row in rows])
    sections = [
        Section(label, [replace(whole, cards=[card for _, card in group])])
        for label, group in groupby(zip(rows, whole.cards, strict=True), key=lambda pair: pair[0].group)
    ]
    return render(Page(title, [*notes, *_legend(rows)], sections))
