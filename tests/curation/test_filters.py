"""Filters: captions and sizes with the verdict that each has to get."""

import pytest

from dalle_scale.curation.filters import Filters, is_boilerplate, other_language
from dalle_scale.data.decode import BadSample

BOILERPLATE = """
photographed on 12 May 2007 | Photographed on May 12, 2007 | photo taken on 2007-05-12 | Taken on 12/05/2007 at 10:15
IMG_1234.JPG | IMG_1234 | DSC01234 | DSCN0123.jpg | image 12 | Untitled | untitled image | P1010023 | image | May 2007
20150704_123456.jpg | 2015-07-04 12.34.56 | Photo 3 of 12 | uploaded on 3rd of June 2011 | 12.05.2007 | no title
Screenshot 2019-03-01 at 12.30.11 | Photographed on Sunday, 4 July 1999 at 3:45 PM | Photograph taken in July 1999
image001.png | Date: 12-May-07 | stock photo | Photographed 12th May '07 | File:IMG 2034.jpg | dated 1 Jan. 2001
Photographed on September 3, 2010 in Rome | created by camera on 04.07.2015 | sunset_beach.jpg
Photo posted Dec 24 2012 | 0012 | https://example.com/a/b?c=1
"""
CONTENT = """
a red barn photographed on 12 May 2007 | Paris, 14 July 2008 | a photo of a polar bear | a photo of a cat
vintage camera | birthday party, June 2010 | two dogs | Boeing 747 | an image of the day | BMW M3 2007 | may flowers
march of the penguins | a man in a suit | image of a horse | Route 66 | apollo 11 launch 1969 | 1950s diner
A stock photo of a woman | the second world war | photographer at work | 3D render of a chair | 12 eggs in a box
a red circle | MS Dhoni | the Titanic in 1912 | 日本の寺院
"""
ENGLISH = """
a dog | cat | red bicycle | a photo of a polar bear | Sunset over the sea, Maldives | Nike Air Max 90 Essential
3D render of a chair | Paris, France | Café in Montmartre, Paris | BMW M3 E46 rear bumper | Taj Mahal | Guacamole
two pizzas on a table | man surfing | La Tomatina festival in Spain | Fiat 500 Abarth | Das Boot movie poster
El Capitan, Yosemite National Park | a red circle | kitchen | Louis Vuitton Neverfull MM Monogram | map of Germany
emoji grinning face | person: medium skin tone, red hair | Mona Lisa by Leonardo da Vinci | Buenos Aires skyline
crème brûlée with raspberries | Schnauzer puppy | jalapeño poppers | Ho Chi Minh City traffic | GRINNING FACE
Notre-Dame de Paris cathedral | Dolce & Gabbana Light Blue Eau de Toilette | Hotel Villa del Mar, Cancun | 12345
"""
OTHER = """
ein roter Ball auf dem Tisch | un chien sur la plage | une femme en robe bleue devant la mer | красная машина на улице
el perro corre en la playa con un niño | un gatto nero sul tavolo della cucina | Een rode fiets voor het huis | собака
日本の寺院 | 子供が公園で遊んでいる | مسجد قديم في المدينة | מגדל | 빨간 자동차 | röd stuga vid sjön i Sverige | 苹果
um cachorro na praia ao pôr do sol | stary zamek na wzgórzu w Polsce | kırmızı araba sokakta | Σπίτι στην παραλία
Chaussures de sport femme noires | zwei Katzen auf einem Sofa | Schwarzes Kleid für Damen | maison à vendre
coche rojo en la calle | twee honden in het park | piękna kobieta | голубое небо | Mädchen mit blauem Hut
appartement avec terrasse | vista del lago desde la montaña | Ständer aus Holz | Ein Hund läuft am Strand
"""
MISSED = "chat noir | perro | Küche | gato negro"  # words that could be English names stay: only what is sure goes
MISJUDGED = "spaghetti alla carbonara recipe | Santa Maria delle Grazie, Milan"  # English with foreign names


def captions(table: str) -> list[str]:
    return [caption.strip() for line in table.strip().splitlines() for caption in line.split(" | ")]


@pytest.mark.parametrize("caption", captions(BOILERPLATE))
def test_boilerplate(caption):
    assert is_boilerplate(caption)


@pytest.mark.parametrize("caption", captions(CONTENT))
def test_content(caption):
    assert not is_boilerplate(caption)


@pytest.mark.parametrize("caption", [*captions(ENGLISH), *captions(MISSED)])
def test_captions_that_may_be_english_stay(caption):
    assert other_language(caption) == ""


@pytest.mark.parametrize("caption", [*captions(OTHER), *captions(MISJUDGED)])
def test_captions_that_are_surely_in_another_language_go(caption):
    assert other_language(caption)


def verdict(filters: Filters, caption: str = "a red fox in the snow", **columns) -> str:
    try:
        filters.check_row(caption, columns)
    except BadSample as error:
        return str(error)
    return ""


def size_verdict(filters: Filters, width: int, height: int) -> str:
    try:
        filters.check_size(width, height)
    except BadSample as error:
        return str(error)
    return ""


def test_each_filter_is_off_by_default():
    for caption in ("x", "IMG_1234.JPG", "ein roter Ball auf dem Tisch"):
        assert verdict(Filters(), caption) == ""
    assert size_verdict(Filters(), 1, 1000) == ""
    assert verdict(Filters(), " \n") == "empty caption"
    assert Filters().columns == ()


@pytest.mark.parametrize(
    "width, height, passes",
    [(100, 200, True), (200, 100, True), (100, 201, False), (201, 100, False), (100, 100, True), (1, 2, True)],
)
def test_aspect_ratio_is_the_papers(width, height, passes):
    assert (size_verdict(Filters.dalle(), width, height) == "") == passes


def test_short_captions():
    assert verdict(Filters(min_caption_words=3), "two words").startswith("caption too short: 2 words")
    assert verdict(Filters(min_caption_words=3), "a b c") == ""
    assert verdict(Filters(min_caption_characters=6), " a b c ").startswith("caption too short: 3 words, 5 characters")
    assert verdict(Filters(min_caption_characters=5), "a b c") == ""


def test_smallest_side():
    assert size_verdict(Filters(min_side=8), 8, 9) == ""
    assert size_verdict(Filters(min_side=8), 100, 7) == "too small: 100 x 7"


@pytest.mark.parametrize(
    "columns, reason",
    [
        ({"pwatermark": 0.5, "punsafe": 0.2}, ""),
        ({"pwatermark": "0.5", "punsafe": "0.2"}, ""),  # as CSV has it
        ({"pwatermark": 0.51, "punsafe": 0.2}, "watermark score: 0.51"),
        ({"pwatermark": 0.1, "punsafe": 0.21}, "NSFW score: 0.21"),
        ({"pwatermark": 0.1, "punsafe": float("nan")}, "NSFW score: nan"),
        ({"pwatermark": 0.1, "NSFW": "UNLIKELY"}, ""),
        ({"pwatermark": 0.1, "NSFW": "UNSURE"}, "NSFW score: 0.5"),
        ({"pwatermark": 0.1, "NSFW": "NSFW"}, "NSFW score: 1"),
        ({"pwatermark": 0.1, "NSFW": "perhaps"}, "no NSFW score: 'perhaps'"),
        ({"pwatermark": 0.1, "punsafe": None}, "no NSFW score: 'None'"),
        ({"pwatermark": "", "punsafe": 0.1}, "no watermark score"),
        ({"punsafe": 0.1}, "no watermark score"),
        ({"pwatermark": [1], "punsafe": 0.1}, "no watermark score"),
    ],
)
def test_scores_of_the_input(columns, reason):
    filters = Filters(max_watermark=0.5, max_nsfw=0.2)
    assert set(columns) <= set(filters.columns)
    found = verdict(filters, **columns)
    assert found.startswith(reason) and bool(found) == bool(reason)
