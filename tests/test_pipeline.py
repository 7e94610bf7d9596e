import numpy as np
import pytest
from PIL import Image
from tiny_models import make_photo
from transformers import pipeline

from pgseg_hf import SegmentationOptions

LABELS = ["cat", "dog", "grass"]


@pytest.fixture(scope="module")
def segment(tiny_folder):
    return pipeline("open-vocabulary-segmentation", model=tiny_folder)


def test_one_image(segment, tiny_segmenter, photo, photo_file):
    result = segment(photo_file, labels=LABELS, background_threshold=0.5)
    expected = tiny_segmenter(photo, LABELS, SegmentationOptions(background_threshold=0.5))
    assert [entry["label"] for entry in result] == [found.label for found in expected.segments()]
    for entry, found in zip(result, expected.segments(), strict=True):
        assert set(entry) == {"label", "score", "mask"}
        assert isinstance(entry["mask"], Image.Image) and entry["mask"].mode == "L"
        np.testing.assert_array_equal(np.asarray(entry["mask"]) == 255, expected.mask(found))
        assert entry["score"] == pytest.approx(found.score, abs=1e-4)


def test_lists_and_generators(segment):
    photos = [make_photo(seed=0), make_photo(60, 80, seed=1)]
    expected = [segment(photo, labels=LABELS) for photo in photos]
    assert segment(photos, labels=LABELS) == expected
    assert list(segment((photo for photo in photos), labels=LABELS, batch_size=2)) == expected


def test_errors(segment, photo, tmp_path):
    with pytest.raises(ValueError, match="labels are missing"):
        segment(photo)
    with pytest.raises(ValueError, match="unknown argument colour"):
        segment(photo, labels=LABELS, colour="red")
    with pytest.raises(ValueError, match="broken"):
        (tmp_path / "broken.png").write_bytes(b"no picture")
        segment(str(tmp_path / "broken.png"), labels=LABELS)
