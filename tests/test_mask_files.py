"""Masks as image files: values of every mode are read unchanged and survive writing."""

import io

import numpy as np
import pytest
from PIL import Image
from tiny_models import make_photo

from pgseg_hf.images import load_label_map
from pgseg_hf.visualization import indexed_png, palette


def halves(width: int = 40, height: int = 60) -> np.ndarray:
    """A label map whose upper half is 0 and lower half 1."""
    label_map = np.zeros((height, width), dtype=np.int64)
    label_map[height // 2 :] = 1
    return label_map


@pytest.mark.parametrize("mode", ["L", "P", "I;16", "I"])
def test_masks_of_any_mode_keep_their_values(mode, tmp_path):
    values = np.arange(200).reshape(10, 20)
    image = Image.fromarray(values.astype(np.uint16 if mode == "I;16" else np.uint8))
    if mode == "P":
        image.putpalette([255 - i // 3 for i in range(768)])
    if mode == "I":
        image = image.convert("I")
    assert image.mode == mode
    path = tmp_path / ("mask.tiff" if mode == "I" else "mask.png")
    image.save(path)
    content = path.read_bytes()
    for source in (image, path, str(path), content, io.BytesIO(content), values):
        mask = load_label_map(source)
        assert mask.dtype == np.int64 and np.array_equal(mask, values)


def test_masks_with_loss_are_refused(tmp_path):
    Image.new("L", (20, 20)).save(tmp_path / "mask.jpg")
    with pytest.raises(ValueError, match=r"mask.jpg' is not a mask that can be read"):
        load_label_map(tmp_path / "mask.jpg")


def test_bits_and_other_numbers(tmp_path):
    Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8) > 0).save(tmp_path / "bits.png")
    assert load_label_map(tmp_path / "bits.png").tolist() == [[0, 1], [1, 1]]
    make_photo().save(tmp_path / "colours.png")
    with pytest.raises(ValueError, match=r"colours.png' has the shape \(90, 120, 3\)"):
        load_label_map(tmp_path / "colours.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "colours.png").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"half.png' is not a mask that can be read"):
        load_label_map(tmp_path / "half.png")
    with pytest.raises(ValueError, match=r"absent.png' cannot be read|absent.png"):
        load_label_map(tmp_path / "absent.png")
    with pytest.raises(ValueError, match="type float64"):
        load_label_map(np.zeros((3, 3)))


class TestIndexedPng:
    @pytest.mark.parametrize(
        ("values", "num_labels", "mode"),
        [
            ([[0, 1], [2, 255]], None, "P"),
            ([[0, 1]], 256, "P"),
            ([[0, 1]], 257, "I;16"),
            ([[0, 65_535]], None, "I;16"),
        ],
    )
    def test_values_survive_a_png_file(self, values, num_labels, mode):
        buffer = io.BytesIO()
        indexed_png(values, num_labels).save(buffer, format="PNG")
        read = Image.open(buffer)
        assert read.mode == mode
        np.testing.assert_array_equal(np.asarray(read), values)

    def test_the_background_is_black(self):
        mask = np.asarray(indexed_png(halves(), num_labels=1, background=True).convert("RGB"))
        assert (mask[0] == 0).all() and (mask[-1] == palette(1)[0]).all()
        assert indexed_png([[0]], num_labels=256, background=True).mode == "I;16"

    @pytest.mark.parametrize(("values", "num_labels"), [([[65_536]], None), ([[3]], 3), ([[-1]], None)])
    def test_values_that_do_not_fit_are_refused(self, values, num_labels):
        with pytest.raises(ValueError, match=r"65,535|value 3|-1"):
            indexed_png(values, num_labels)
