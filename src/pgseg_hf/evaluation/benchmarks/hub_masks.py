"""Images with masks in data sets of the Hub."""

from functools import partial

from ...data.columns import Columns
from ...data.tables import StreamedTable, TableSource, open_hub
from ...images import ImageSource
from .reading import LabelledImage


def hub_images(
    path: str, split: str = "validation", image_column: str | None = None, mask_column: str = "mask"
) -> tuple[list[LabelledImage], str]:
    """The rows of a data set of the Hub, of a local folder in its layout, or of one written by `save_to_disk`; images
    are read when they are asked for.

    Args:
        path: as `datasets.load_dataset` takes it.
        split: of the data set; "val" also stands for "validation".
        image_column: by default the usual names.
        mask_column: of masks, one integer a pixel.

    Returns:
        the images, and a fingerprint of the data set.

    Raises:
        ValueError: it cannot be loaded, has no such split, or columns are missing.
    """
    source = open_split(path, split, Columns(image=image_column, mask=mask_column))
    assert not isinstance(source, StreamedTable)
    digits = len(str(len(source)))
    images = [
        LabelledImage(
            f"{row:0{digits}d}", partial(_cell, source, row, "image"), partial(_cell, source, row, "mask")
        )
        for row in range(len(source))
    ]
    return images, source.fingerprint


def open_split(path: str, split: str, columns: Columns) -> TableSource | StreamedTable:
    """As `open_hub`; "val" also stands for "validation"."""
    try:
        return open_hub(path, columns, split=split)
    except ValueError:
        if split != "val":
            raise
        return open_hub(path, columns, split="validation")


def _cell(source: TableSource, row: int, field: str) -> ImageSource:
    content = getattr(source[row], field)
    if content is None:
        raise ValueError(f"row {row} of {source.name} has no {field}.")
    return content
