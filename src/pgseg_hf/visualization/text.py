"""Letters in drawings."""

import functools
import unicodedata

from PIL import Image, ImageFont

PAPER = (255, 255, 255)
INK = (32, 32, 32)
FAINT_INK = (112, 112, 112)

# Letters that Pillow's font lacks and Unicode does not decompose.
_PLAIN_LETTERS = str.maketrans(
    {"ß": "ss", "æ": "ae", "Æ": "Ae", "œ": "oe", "Œ": "Oe", "ø": "o", "Ø": "O", "ł": "l", "Ł": "L", "đ": "d"}
    | {"ð": "d", "þ": "th", "ı": "i", "×": "x", "–": "-", "—": "-"}
)


def letter_size(picture: Image.Image) -> int:
    """Letters of a size that stays readable when the picture is shown on one screen."""
    return min(96, max(13, round(0.025 * min(picture.size))))


@functools.lru_cache(maxsize=8)
def font_of(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font, so that a picture looks the same on every machine."""
    font = ImageFont.load_default(size=size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("Text needs a Pillow that was built with FreeType: pip install --upgrade pillow.")
    return font


@functools.cache
def _has_glyph(character: str) -> bool:
    font = font_of(16)
    return character == " " or bytes(font.getmask(character)) != bytes(font.getmask("\U0010fffd"))


def drawable(text: str, fallback: str) -> str:
    """The text on one line in letters that the font has: accents dropped, what has no likeness left out."""
    text = unicodedata.normalize("NFKD", text[:500].translate(_PLAIN_LETTERS))
    text = "".join(" " if c.isspace() or unicodedata.category(c) == "Cc" else c for c in text)
    return " ".join("".join(filter(_has_glyph, text)).split()) or fallback


def fitted(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text, shortened to at most `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1].rstrip()
    return f"{text}…"
