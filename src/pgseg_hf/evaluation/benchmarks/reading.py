"""Images that are not read yet, and reading them ahead."""

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
"""A file, its bytes or an image; or a function that gives one, for images that lie in tables."""


class BrokenImage(ValueError):
    """An image or mask that cannot be decoded, such as a truncated file; `name` is the image's."""

    def __init__(self, name: str, message: str):
        super().__init__(message)
        self.name = name


@dataclass(frozen=True)
class LabelledImage:
    """An image with its mask or its class, not read yet.

    Args:
        name: unique in its data set; the name of its result files, without an ending.
        image: the image.
        mask: one integer a pixel; empty where the image has a class.
        label: number of its class; None where the image has a mask.
    """

    name: str
    image: Source
    mask: Source = b""
    label: int | None = None

    @property
    def image_place(self) -> str:
        """What messages call the image."""
        return str(self.image) if isinstance(self.image, (str, os.PathLike)) else f"image {self.name}"

    @property
    def mask_place(self) -> str:
        """What messages call the mask."""
        return str(self.mask) if isinstance(self.mask, (str, os.PathLike)) else f"the mask of {self.name}"

    def read(self) -> Image.Image:
        """The image, RGB.

        Raises:
            BrokenImage: it cannot be decoded.
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
    """What `read` gives for images, in batches, of which the next is read in threads while one is worked on.

    Args:
        images: to read.
        read: gets each of them.
        scores: where those are named that are broken and left out.
        batch_size: images of a batch, with the broken ones.
        readers: threads.
        skip_broken: leave out what `read` raises a [`BrokenImage`] for.

    Raises:
        BrokenImage: unless they are left out.
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
                        logger.warning(f"left out: {error}")
                        scores.broken[error.name] = str(error)
                if batch:
                    yield batch
        finally:
            pool.shutdown(cancel_futures=True)


def file_digests(sources: Sequence[Source]) -> list[str | None]:
    """Of each source what stands for its contents; None for what is no file."""

    def of(source: Source) -> str | None:
        return file_digest(source) if isinstance(source, (str, os.PathLike)) else None

    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(of, sources))
