"""Images with masks from datasets on the Hub."""

from functools import partial

from ...data.columns import Columns
from ...data.tables import StreamedTable, TableSource, open_hub
from ...images import ImageSource
from .reading import LabelledImage


def hub_images(
    path: str, split: str = "validation", image_column: str | None = None, mask_column: str = "mask"
) -> tuple[list[LabelledImage], str]:
    """Opens a dataset on the Hub, in a local folder with the same layout, or written by `save_to_disk`. Images are
    read on access.

    Args:
        path: path as for `datasets.load_dataset`.
        split: split of the dataset; "val" also stands for "validation".
        image_column: column of the images; by default the usual names are tried.
        mask_column: column of the masks, with one integer per pixel.

    Returns:
        the images and a fingerprint of the dataset.

    Raises:
        ValueError: the dataset cannot be loaded, or a split or column is missing.
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
    """Like `open_hub`, but "val" also stands for "validation"."""
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
