"""Transformers' common processor tests, run on our processor."""

import unittest

from testers import ProcessorTesterMixin
from transformers import CLIPTokenizer

from pgseg_hf import PGSegImageProcessor, PGSegProcessor, default_tokenizer


class PGSegProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = PGSegProcessor

    @classmethod
    def _setup_image_processor(cls) -> PGSegImageProcessor:
        return PGSegImageProcessor()

    @classmethod
    def _setup_tokenizer(cls) -> CLIPTokenizer:
        return default_tokenizer()
