"""Filters of captioned images, each by itself; all that need not decode the image.

`Filters.dalle()` are the rules that arXiv 2102.12092 names (Sec. 2.3 and App. C): captions that are too short, not
English, or mostly boilerplate such as "photographed on <date>"; aspect ratios outside [1/2, 2]. How short is too short
the paper does not say; here it is fewer than 3 words or 6 characters.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from py3langid.langid import MODEL_FILE, LanguageIdentifier

from dalle_scale.data.decode import BadSample

LANGUAGES = ("en",)  # those whose rule was tried on captions
WATERMARK_COLUMNS = ("pwatermark",)
NSFW_COLUMNS = ("punsafe", "NSFW", "nsfw")
NSFW_WORDS = {"UNLIKELY": 0.0, "UNSURE": 0.5, "NSFW": 1.0}
# Another language counts where it is likely, and this much likelier than English. Short captions ("kitchen", "Taj
# Mahal") look a little like many languages, so only common ones are asked for. Tried on 72 English captions with many
# foreign names (4 left out), 56 others (11 kept, mostly of one or two words) and the 3,583 names of emoji (none left
# out); tests/curation/test_filters.py holds many of them.
_MIN_PROBABILITY = 0.7
_MIN_RATIO = 30.0
_COMMON = "en ar bg ca cs da de el es et fa fi fr he hr hu id it ja ko lt lv nl no pl pt ro ru sk sl sv th tr uk vi zh"


@dataclass(frozen=True)
class Filters:
    """The rules in force; the defaults leave nothing out but empty captions."""

    min_caption_words: int = 0
    min_caption_characters: int = 0
    language: str | None = None
    boilerplate: bool = False  # leave out captions that say little else
    max_aspect: float | None = None  # longer side by shorter side
    min_side: int = 1  # of the image, in pixels
    max_watermark: float | None = None  # probability, of the column pwatermark
    max_nsfw: float | None = None  # probability, of the column punsafe or NSFW

    @staticmethod
    def dalle() -> Filters:
        """The filters that the DALL-E paper names."""
        return Filters(3, 6, "en", boilerplate=True, max_aspect=2.0)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the input that are judged."""
        watermark = WATERMARK_COLUMNS if self.max_watermark is not None else ()
        return watermark + (NSFW_COLUMNS if self.max_nsfw is not None else ())

    def check_row(self, caption: str, columns: dict[str, Any]) -> None:
        """Judge what is known before the image is read.

        Raises:
            BadSample: the row is left out, and why.
        """
        caption = caption.strip()
        if not caption:
            raise BadSample("empty caption")
        words = len(caption.split())
        if words < self.min_caption_words or len(caption) < self.min_caption_characters:
            raise BadSample(f"caption too short: {words} words, {len(caption)} characters")
        if self.max_watermark is not None:
            _check_score("watermark", columns, WATERMARK_COLUMNS, self.max_watermark)
        if self.max_nsfw is not None:
            _check_score("NSFW", columns, NSFW_COLUMNS, self.max_nsfw)
        if self.boilerplate and is_boilerplate(caption):
            raise BadSample("caption is boilerplate")
        if self.language is not None and (other := other_language(caption)):
            raise BadSample(f"caption in another language: {other}")

    def check_size(self, width: int, height: int) -> None:
        """Judge the image's size in pixels. Raises BadSample."""
        short, long = sorted((width, height))
        if short < self.min_side:
            raise BadSample(f"too small: {width} x {height}")
        if self.max_aspect is not None and long > self.max_aspect * short:
            raise BadSample(f"aspect ratio: {width} x {height}")


def _check_score(what: str, columns: dict[str, Any], names: tuple[str, ...], limit: float) -> None:
    """Judge a probability that the input's author has computed."""
    value = next((columns[name] for name in names if columns.get(name) not in (None, "")), None)
    try:
        score = NSFW_WORDS[value] if what == "NSFW" and value in NSFW_WORDS else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise BadSample(f"no {what} score: {str(value)[:40]!r} in {' or '.join(names)}") from None
    if not score <= limit:  # also NaN
        raise BadSample(f"{what} score: {score:g}")


# --- language ---------------------------------------------------------------------------------------------------------


def other_language(caption: str) -> str:
    """The language of a caption that is surely not English, "" for all others."""
    letters = [letter for letter in caption if letter.isalpha()]
    latin = sum(letter < "\u0250" or "\u1e00" <= letter < "\u1f00" or letter > "\uff00" for letter in letters)
    if 2 * latin < len(letters):
        return "another script"
    ranks = dict(_identifier().rank(caption.lower()))  # in Title Case, and IN CAPITALS, it knows few words
    best = max(ranks, key=lambda name: ranks[name])
    sure = ranks[best] >= _MIN_PROBABILITY and ranks[best] >= _MIN_RATIO * ranks["en"]
    return str(best) if sure else ""


@cache
def _identifier() -> LanguageIdentifier:
    """The model that comes with the package: plain arrays, nothing that runs. It takes a second to open."""
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(_COMMON.split())
    return identifier


# --- boilerplate ------------------------------------------------------------------------------------------------------

_MONTH = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?"
    r"|nov(?:ember)?|dec(?:ember)?)\.?"
)
_DAY = r"\d{1,2}(?:st|nd|rd|th)?"
_PATTERNS = [
    r"\S+\.(?:jpe?g|png|gif|bmp|tiff?|webp|heic|cr2|nef|raw|pdf)\b",  # file names
    r"\b(?:imgp?|dscn?|dscf|pict?|p|image|photo|mvi|gopr|dji|wp|scan|screenshot|cimg|sam|hpim)[-_ ]?\d[\d_-]*\b",
    r"https?://\S+|\bwww\.\S+",
    r"\b(?:19|20)\d{2}[-/.: ]?[01]\d[-/.: ]?[0-3]\d(?:[-_T ]?\d{6})?\b",  # 2007-05-12, 20070512_101530
    r"\b\d{1,2}[-/.]\d{1,2}[-/.]\d{2,4}\b",
    rf"\b{_DAY}[\s-]+(?:of\s+)?{_MONTH}[\s,-]*(?:\d{{4}}|'\d{{2}})?(?!\w)",  # 12th of May, 2007
    rf"\b{_MONTH}\s+(?:{_DAY}(?!\d),?\s*(?:\d{{4}}|'\d{{2}})?|\d{{4}}|'\d{{2}})(?!\w)",  # May 12, 2007
    r"\b\d{1,2}[:.h]\d{2}(?:[:.]\d{2})?\s*(?:[ap]\.?m\b\.?|uhr|gmt|utc)?",
    r"\b\d+\b",
]
_PATTERN = re.compile("|".join(f"(?:{pattern})" for pattern in _PATTERNS), re.IGNORECASE)
_EMPTY_WORDS = """
    photographed photograph photographs photo photos photography pic pics image images image images img untitled
    title taken shot captured uploaded posted created published updated dated date time file filename default caption
    stock screenshot camera digital thumbnail thumb placeholder unnamed none null unknown copy original nan jpg jpeg
    png gif monday tuesday wednesday thursday friday saturday sunday am pm
"""
_GLUE = "a an the on at in of by from with and or to for no not n s is was this my o clock"
_EMPTY, _UNCOUNTED = frozenset(_EMPTY_WORDS.split()), frozenset(_GLUE.split())
_WORD = re.compile(r"[^\W_]+")


def is_boilerplate(caption: str) -> bool:
    """Whether dates, file names and words like "photographed" are more than three quarters of the caption's words,
    not counting "the", "of" and their like."""
    words = _words(_PATTERN.sub(" ", caption))
    return 4 * sum(word not in _EMPTY for word in words) < len(_words(caption))


def _words(text: str) -> list[str]:
    words = (word.lower() for word in _WORD.findall(text))
    return [word for word in words if word not in _UNCOUNTED]
