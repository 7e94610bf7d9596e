"""Transformers' common image processor tests, run on our image processors."""

import unittest

from testers import ImageProcessingTester, ImageProcessingTestMixin

from pgseg_hf import PGSegImageProcessor, PGSegImageProcessorPil


class ImageProcessorTester(ImageProcessingTester):
    """Uses small sizes and names the classes, which are not in Transformers' own lists."""

    def __init__(self, parent: unittest.TestCase):
        super().__init__(
            parent,
            do_resize=True,
            size={"shortest_edge": 20},
            do_center_crop=True,
            crop_size={"height": 18, "width": 18},
            do_rescale=True,
            do_normalize=True,
            image_mean=[0.5, 0.4, 0.3],
            image_std=[0.2, 0.3, 0.4],
            do_convert_rgb=True,
        )

    def _get_image_processing_classes(self) -> dict[str, type]:
        return {"pil": PGSegImageProcessorPil, "torchvision": PGSegImageProcessor}


class PGSegImageProcessingTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = ImageProcessorTester

    @unittest.skip("loads by transformers alone, which does not know our classes without this package")
    def test_pil_can_run_without_torchvision(self):
        pass
