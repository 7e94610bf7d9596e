"""Text in drawings."""

import functools
import unicodedata
from collections import Counter
from collections.abc import Sequence

from PIL import Image, ImageFont

PAPER = (255, 255, 255)
INK = (32, 32, 32)
FAINT_INK = (112, 112, 112)

_ROOM = 24  # visible characters of a text, see `fitted`

# Characters that are not in Pillow's font and that Unicode does not decompose.
_PLAIN_LETTERS = str.maketrans(
    {"ß": "ss", "æ": "ae", "Æ": "Ae", "œ": "oe", "Œ": "Oe", "ø": "o", "Ø": "O", "ł": "l", "Ł": "L", "đ": "d"}
    | {"ð": "d", "þ": "th", "ı": "i", "×": "x", "–": "-", "—": "-"}
)


def letter_size(image: Image.Image) -> int:
    """Font size that is readable when the whole image fits on a screen."""
    return min(96, max(13, round(0.025 * min(image.size))))


@functools.lru_cache(maxsize=8)
def font_of(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's built-in font, so that drawings are the same on every machine."""
    font = ImageFont.load_default(size=size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("Text requires Pillow with FreeType; run pip install --upgrade pillow.")
    return font


@functools.cache
def _has_glyph(character: str) -> bool:
    font = font_of(16)
    return character == " " or bytes(font.getmask(character)) != bytes(font.getmask("\U0010fffd"))


def drawable(texts: Sequence[str], kind: str) -> list[str]:
    """Texts reduced to one line each and to the font's characters: accents and unknown characters are removed. A text
    that lost characters, or whose visible part equals that of another text, is prefixed with its number, as in
    `label 2: car`."""
    found = [_drawable(text) for text in texts]
    alike = Counter(text[:_ROOM] for text, _ in found)
    numbered = [f"{kind} {number}".strip() for number in range(1, len(found) + 1)]
    return [
        text if whole and alike[text[:_ROOM]] == 1 else f"{number}: {text}" if text else number
        for number, (text, whole) in zip(numbered, found)
    ]


def _drawable(text: str) -> tuple[str, bool]:
    """The text in the font's characters, and whether it is complete."""
    text = unicodedata.normalize("NFKD", text[:500].translate(_PLAIN_LETTERS))
    letters = "".join(" " if c.isspace() or unicodedata.category(c) == "Cc" else c for c in text)
    kept = "".join(filter(_has_glyph, letters))
    lost = any(unicodedata.category(c) not in ("Mn", "Cf") for c in set(letters) - set(kept))
    drawn = " ".join(kept.split())
    return drawn, bool(drawn) and not lost


def fitted(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Shortens a text to at most `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1].rstrip()
    return f"{text}…"
