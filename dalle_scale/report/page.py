"""HTML pages of plain data: one template a kind of block, one stylesheet.

    write_page(path, Page("Title", ["a line"], [Section("Results", [Table(rows)])]))

A page stands alone: it holds its images and charts, needs no script and no network, and escapes every text.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import ClassVar

import jinja2
from PIL import Image
from torch import Tensor

from dalle_scale import io
from dalle_scale.report.charts import Chart


@dataclass(frozen=True)
class Table:
    """Rows of texts, the first of which holds the titles."""

    rows: Sequence[Sequence[str]]
    text_columns: int = 1  # these stand at the left, the numbers after them at the right
    template: ClassVar[str] = "table.html"


@dataclass(frozen=True)
class Tiles:
    """Headline numbers, each with its description."""

    items: Sequence[tuple[str, str]]
    template: ClassVar[str] = "tiles.html"


@dataclass(frozen=True)
class Definitions:
    """Terms and their definitions."""

    items: Mapping[str, str]
    template: ClassVar[str] = "definitions.html"


@dataclass(frozen=True)
class ChartCard:
    """A chart with its title, the colours of its kinds, and a line of text."""

    title: str
    chart: Chart
    note: str = ""
    colours: Mapping[str, str] | None = None  # kind -> CSS colour


@dataclass(frozen=True)
class Charts:
    """Charts side by side."""

    cards: Sequence[ChartCard]
    template: ClassVar[str] = "charts.html"


@dataclass(frozen=True)
class GalleryImage:
    """An image, marked where it is right or wrong."""

    image: Tensor  # uint8 [3, H, W]
    right: bool | None = None  # None: no mark
    note: str = ""  # one short line below it


@dataclass(frozen=True)
class Card:
    """A caption and its images by name."""

    images: Sequence[tuple[str, GalleryImage]]
    caption: str = ""


@dataclass(frozen=True)
class Cards:
    """Cards side by side, and the longest side of their images in pixels, as they are and as they are shown."""

    cards: Sequence[Card]
    side: int
    shown_side: int
    template: ClassVar[str] = "cards.html"

    @classmethod
    def of(cls, cards: Sequence[Card]) -> Cards:
        """Choose the size on the page; small images are enlarged by a whole factor."""
        side = max(max(image.image.shape[1:]) for card in cards for _, image in card.images)
        return cls(cards, side, shown_side(side))


@dataclass(frozen=True)
class Section:
    """Blocks under a heading; no title, no heading."""

    title: str
    blocks: Sequence[Table | Tiles | Definitions | Charts | Cards]


@dataclass(frozen=True)
class Page:
    """A whole page: its heading, lines below it, and its sections."""

    title: str
    notes: Sequence[str]
    sections: Sequence[Section]


def shown_side(side: int) -> int:
    """Return the pixels that the longer side of an image, `side` pixels, takes on a page: a whole multiple up to 128
    pixels, so that every pixel of a small image is a square, and at most 384."""
    return min(max(1, round(128 / side)) * side, 384)


def to_pillow(image: Tensor) -> Image.Image:
    """Convert uint8 [3, H, W] to a Pillow image."""
    return Image.fromarray(image.cpu().permute(1, 2, 0).contiguous().numpy())


def render(page: Page) -> str:
    """Return the page as one HTML document."""
    return _environment.get_template("page.html").render(page=page)


def write_page(path: Path, page: Page) -> None:
    """Write the page to `path`, whole or not at all."""
    io.write(path, render(page))


def _data_uri(image: Tensor) -> str:
    buffer = BytesIO()
    to_pillow(image).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


_environment = jinja2.Environment(
    loader=jinja2.PackageLoader("dalle_scale.report"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)
_environment.filters["data_uri"] = _data_uri
