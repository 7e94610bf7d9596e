"""The vocabulary for images without given labels."""

from pathlib import Path

from .text_files import read_text

MIN_AREA = 0.02
_EVERYDAY_FILE = Path(__file__).parent / "assets" / "everyday_words.txt"


def everyday_words() -> list[str]:
    """The vocabulary included in the package: 256 names of things and surroundings."""
    return read_text(_EVERYDAY_FILE).splitlines()
