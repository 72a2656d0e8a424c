"""The gallery shows every image, caption and mark, in both of its forms."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from dalle_scale.report import gallery
from dalle_scale.report.gallery import Row
from dalle_scale.report.page import GalleryImage
from dalle_scale.types import UserError

COLUMNS = ("true scene", "best of 16")


def plain(colour: tuple[int, int, int], height: int = 8, width: int = 8) -> torch.Tensor:
    """An image of one colour."""
    return torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(3, height, width).contiguous()


def make_rows(count: int, group: str = "seen", right: bool | None = None) -> list[Row]:
    """Rows with noise images, the second of each marked."""
    torch.manual_seed(0)
    images = torch.randint(256, (count, 2, 3, 8, 8)).to(torch.uint8)
    return [Row(f"caption {n}", (GalleryImage(a), GalleryImage(b, right)), group) for n, (a, b) in enumerate(images)]


def count_of(sheet: Image.Image, colour: str | tuple[int, int, int]) -> int:
    """Pixels of exactly this colour."""
    rgb = Image.new("RGB", (1, 1), colour).getpixel((0, 0))
    return int((np.asarray(sheet) == rgb).all(axis=-1).sum())


def test_files_are_written(tmp_path):
    gallery.save(tmp_path / "new", "Title", COLUMNS, make_rows(3))
    with Image.open(tmp_path / "new" / "gallery.png") as sheet:
        assert sheet.mode == "RGB" and min(sheet.size) > 200
    assert "caption 2" in (tmp_path / "new" / "gallery.html").read_text()
    with pytest.raises(UserError, match="no rows"):
        gallery.save(tmp_path, "Title", COLUMNS, [])


def test_page_holds_the_exact_images_and_nothing_from_outside():
    rows = make_rows(3)
    page = gallery.page("Title", COLUMNS, rows)
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    images = [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data in found]
    expected = [image.image.permute(1, 2, 0).numpy() for row in rows for image in row.images]
    assert len(images) == 6 and all(map(np.array_equal, images, expected))
    assert not re.search(r"https?:|<script|<link|url\(", page)
    assert (
        'class="cards enlarged"' in page
        and "image-rendering: pixelated" in page
        and "prefers-color-scheme: dark" in page
    )


def test_text_is_escaped():
    row = Row('<script>alert("1")</script> & more', (GalleryImage(plain((1, 2, 3)), note="<i>"),), "<b>group</b>")
    page = gallery.page("<title>", ("a<b",), [row], notes=["1 < 2"])
    assert not re.search(r"<script>|<b>group|<i>|a<b|1 < 2|<title><title>", page)
    assert "&lt;script&gt;alert(&#34;1&#34;)&lt;/script&gt; &amp; more" in page


def test_groups_stand_under_their_headings():
    page = gallery.page("T", COLUMNS, [*make_rows(2, "seen"), *make_rows(1, "held out")])
    order = re.findall(r"<h2>(.*?)</h2>|<p class=\"caption\">(.*?)</p>", page)
    assert order == [("seen", ""), ("", "caption 0"), ("", "caption 1"), ("held out", ""), ("", "caption 0")]
    assert "<h2>" not in gallery.page("T", COLUMNS, make_rows(2, ""))


def test_marks_are_colour_and_sign():
    for right, word, sign, other in ((True, "right", "✓", "✗"), (False, "wrong", "✗", "✓")):
        page = gallery.page("T", COLUMNS, make_rows(1, right=right))
        body = page[page.index("<body>") :]
        assert body.count(f'class="{word}"') == 1 and body.count(sign) == 1 and other not in body
        sheet = gallery.draw("T", COLUMNS, make_rows(1, right=right))
        assert count_of(sheet, gallery._COLOURS[right]) > 1000
        assert count_of(sheet, gallery._COLOURS[not right]) == 0
    badges = [np.asarray(gallery._badge(right).convert("L")) > 200 for right in (True, False)]
    assert (badges[0] != badges[1]).mean() > 0.1, "tick and cross differ in shape"
    unmarked = gallery.page("T", COLUMNS, make_rows(1))
    assert "✓" not in unmarked and "with a tick" not in unmarked


def test_small_images_are_enlarged_to_whole_squares():
    """Every pixel of an 8 x 8 image becomes 16 x 16, untouched."""
    image = plain((11, 22, 33))
    image[:, 2, 5] = torch.tensor([201, 102, 3])
    sheet = np.asarray(gallery.draw("T", ("x",), [Row("caption", (GalleryImage(image),))]))
    rows, columns = np.nonzero((sheet == (201, 102, 3)).all(axis=-1))
    assert len(rows) == 16 * 16 and np.ptp(rows) == np.ptp(columns) == 15
    assert count_of(Image.fromarray(sheet), (11, 22, 33)) == 63 * 16 * 16


@pytest.mark.parametrize(
    ("height", "width", "shown"), [(8, 16, 64 * 128), (512, 512, 384 * 384), (300, 600, 192 * 384)]
)
def test_shape_of_images_is_kept(height, width, shown):
    row = Row("caption", (GalleryImage(plain((11, 22, 33), height, width)),))
    assert count_of(gallery.draw("T", ("x",), [row]), (11, 22, 33)) == shown


def test_all_images_of_many_rows_are_there():
    """More rows than stand side by side, of uneven caption length; each image's own colour is found in full."""
    rows = [
        Row("word " * (1 + 9 * (n % 3)), tuple(GalleryImage(plain((n, column, 77))) for column in range(4)))
        for n in range(1, 12)
    ]
    sheet = gallery.draw("T", "abcd", rows)
    assert all(count_of(sheet, (n, column, 77)) == 128 * 128 for n in range(1, 12) for column in range(4))


def test_lines_are_broken_at_the_width():
    font = ImageFont.load_default(20)
    text = "a red circle left of a supercalifragilisticexpialidocious blue square"
    lines = gallery._wrap(text, font, 150)
    assert all(font.getlength(line) <= 150 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert gallery._wrap(text, font, 10_000) == [text] and gallery._wrap("", font, 100) == [""]
