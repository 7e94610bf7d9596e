"""Lazy images, and a reader that prefetches them."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

from PIL import Image
from transformers.utils import logging

from ...images import ImageSource, load_image
from ...run_records import file_digest
from ..metrics.sums import ImageSums

logger = logging.get_logger(__name__)

_READERS = 4

Source = ImageSource | Callable[[], ImageSource]
"""A file, its bytes or an image, or for rows of a table a function that returns one."""


class BrokenImage(ValueError):
    """An image or mask cannot be decoded, such as a truncated file. `name` is the name of the image."""

    def __init__(self, name: str, message: str):
        super().__init__(message)
        self.name = name


@dataclass(frozen=True)
class LabelledImage:
    """An image with its mask or class, read on access.

    Args:
        name: unique name in the dataset, and name of its output files without suffix.
        image: the image.
        mask: mask with one integer per pixel; empty if the image has a class.
        label: index of the class; None if the image has a mask.
    """

    name: str
    image: Source
    mask: Source = b""
    label: int | None = None

    @property
    def image_place(self) -> str:
        """Name of the image in messages."""
        return str(self.image) if isinstance(self.image, (str, os.PathLike)) else f"image {self.name}"

    @property
    def mask_place(self) -> str:
        """Name of the mask in messages."""
        return str(self.mask) if isinstance(self.mask, (str, os.PathLike)) else f"the mask of {self.name}"

    def read(self) -> Image.Image:
        """Reads the image as RGB.

        Raises:
            BrokenImage: the image cannot be decoded.
        """
        try:
            return load_image(self.image() if callable(self.image) else self.image)
        except ValueError as error:
            raise BrokenImage(self.name, f"{self.image_place}: {error}") from error


def read_batches(
    images: Iterable[Any],
    read: Callable[[Any], Any],
    scores: ImageSums,
    batch_size: int,
    readers: int = 2,
    skip_broken: bool = False,
) -> Iterator[list[Any]]:
    """Yields the results of `read` in batches. Threads read the next batch while the current one is processed.

    Args:
        images: images to read.
        read: function that is called with each image.
        scores: records the names of skipped images.
        batch_size: images per batch, including broken ones.
        readers: number of threads.
        skip_broken: skip images for which `read` raises [`BrokenImage`].

    Raises:
        BrokenImage: an image is broken and `skip_broken` is False.
    """
    images = iter(images)
    with ThreadPoolExecutor(readers) as pool:
        try:
            coming = [pool.submit(read, each) for each in islice(images, batch_size)]
            while coming:
                now, coming = coming, [pool.submit(read, each) for each in islice(images, batch_size)]
                batch = []
                for future in now:
                    try:
                        batch.append(future.result())
                    except BrokenImage as error:
                        if not skip_broken:
                            raise
                        logger.warning(f"skipped: {error}")
                        scores.broken[error.name] = str(error)
                if batch:
                    yield batch
        finally:
            pool.shutdown(cancel_futures=True)


def file_digests(sources: Sequence[Source]) -> list[str | None]:
    """Digest of each source's contents; None for sources that are not files."""

    def of(source: Source) -> str | None:
        return file_digest(source) if isinstance(source, (str, os.PathLike)) else None

    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(of, sources))
