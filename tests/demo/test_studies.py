"""State kept between requests, and invalid input."""

import base64
import io
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from model_catalogue import Catalogue
from PIL import Image
from safetensors.torch import load_file, save_file
from settings import MAX_LABELS, Settings
from studies import Choices, Laboratory, read_labels, read_templates, read_upload

from pgseg_hf import SegmentationOptions

LABELS = read_labels("building, road, tree")


@pytest.fixture
def passes(laboratory, monkeypatch) -> list[int]:
    """A list with an entry for each forward pass of the image encoder."""
    model = laboratory.catalogue.load("").model
    counted: list[int] = []
    original = model.vision_model.forward

    def forward(*args, **kwargs):
        counted.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(model.vision_model, "forward", forward)
    return counted


@pytest.fixture
def upload(street_file):
    return read_upload(street_file, 10**6)


NAME = "pgseg-small-everyday"
WHOLE = Choices(NAME, SegmentationOptions(window_size=None))
SMALL = SegmentationOptions(window_size=None, shortest_edge=224, longest_edge=1344)


class TestStudy:
    @pytest.mark.parametrize("window", ["auto", None])
    @pytest.mark.parametrize("threshold", [None, 0.2, 1.0])
    def test_masks_are_the_librarys(self, laboratory, upload, street_file, window, threshold):
        options = replace(SMALL, window_size=window)
        result = laboratory.study(upload, LABELS, Choices(NAME, options)).segmentation(threshold)
        options = replace(options, background_threshold=threshold)
        expected = laboratory.catalogue.load("")(street_file, LABELS.words, options)
        np.testing.assert_array_equal(result.label_map, expected.label_map)
        np.testing.assert_array_equal(result.scores, expected.scores)
        assert result.background == expected.background

    def test_labels_and_thresholds_need_no_second_pass(self, laboratory, upload, street_file, passes):
        first = laboratory.study(upload, LABELS, WHOLE)
        assert len(passes) == 1
        for threshold in (None, 0.1, 0.9):
            laboratory.study(upload, LABELS, WHOLE, first).segmentation(threshold)
        other = laboratory.study(upload, read_labels("sky, car"), WHOLE, first)
        assert len(passes) == 1
        fresh = laboratory.study(upload, read_labels("sky, car"), WHOLE)
        assert len(passes) == 2
        torch.testing.assert_close(other.scored.label_map(), fresh.scored.label_map(), rtol=0, atol=0)
        assert laboratory.study(upload, LABELS, WHOLE, first) is first

    def test_another_image_or_resolution_does(self, laboratory, upload, street_file, passes):
        first = laboratory.study(upload, LABELS, WHOLE)
        laboratory.study(upload, LABELS, Choices(NAME, SMALL), first)
        flipped = replace(upload, image=upload.image.transpose(Image.Transpose.ROTATE_180), digest="other")
        assert laboratory.study(flipped, LABELS, WHOLE, first).digest == "other"
        assert len(passes) == 3

    def test_other_weights_of_the_same_name_do(self, upload, tiny_folder, tmp_path):
        folder = shutil.copytree(tiny_folder, tmp_path / "own")
        choices = replace(WHOLE, model="own")

        def laboratory() -> Laboratory:
            return Laboratory(Catalogue(Settings(models=(str(folder),))))

        first = laboratory().study(upload, LABELS, choices)
        again = laboratory().study(upload, LABELS, choices, first)
        assert again is first
        weights = load_file(folder / "model.safetensors")
        weights["visual_projection.3.bias"] += torch.linspace(-1, 1, len(weights["visual_projection.3.bias"]))
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        other = laboratory().study(upload, LABELS, choices, first)
        assert not torch.equal(*(each.encoded.windows[0].features.segment_embeds for each in (other, first)))
        with pytest.raises(ValueError, match="own has changed"):
            laboratory().with_prototypes(upload, first)

    def test_prototypes_are_looked_for_once(self, laboratory, upload, passes):
        study = laboratory.with_prototypes(upload, laboratory.study(upload, LABELS, WHOLE))
        assert [count for _, count in study.prototypes] == [32, 16]
        height, width = study.encoded.resized
        assert study.prototypes[0][0].shape == (-(-height // 16), -(-width // 16))
        again = laboratory.with_prototypes(upload, laboratory.study(upload, read_labels("sky"), WHOLE, study))
        assert again.prototypes is study.prototypes
        assert len(passes) == 2

    def test_a_study_holds_no_pixels(self, laboratory, upload):
        study = laboratory.study(upload, LABELS, WHOLE)
        tensors = [value for window in study.encoded.windows for value in vars(window).values()]
        assert all(value.ndim < 3 or value.shape[0] == 16 for value in tensors if torch.is_tensor(value))


class TestLabels:
    def test_commas_and_lines_separate(self):
        assert read_labels(" cat, dog\n\nhot dog ,").names == ["cat", "dog", "hot dog"]
        assert read_labels(" \n,") is None and read_templates(" \n") is None

    def test_markup_is_a_word_like_any_other(self):
        assert read_labels("<script>alert(1)</script>").names == ["<script>alert(1)</script>"]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (",".join(f"word {i}" for i in range(500)), f"500 labels are more than the {MAX_LABELS}"),
            (
                ",".join(f"word {i}|other {i}" for i in range(151)),
                f"302 labels are more than the {MAX_LABELS}",
            ),
            ("a" * 101, "101 characters"),
            ("cat:reddish", "'reddish', expected a threshold"),
            ("cat, Cat", "repeats"),
        ],
    )
    def test_what_makes_no_sense_is_said(self, text, message):
        with pytest.raises(ValueError, match=message):
            read_labels(text)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("a photo.", "templates.0. .*'a photo.'"),
            ("a {}.\nno {} of {}.", "templates.1. .*'no {} of {}.'"),
            ("\n".join(["{}"] * 81), "81 templates"),
            ("{}" + "a" * 99, "101 characters"),
            ("a\0 {}", "x00"),
        ],
    )
    def test_templates_that_make_no_sense_are_named(self, text, message):
        assert read_templates("a {}. \n\nthe {}.") == ("a {}.", "the {}.")
        with pytest.raises(ValueError, match=message):
            read_templates(text)


class TestUpload:
    def test_nothing_chosen(self):
        with pytest.raises(ValueError, match="Choose an image first"):
            read_upload(None, 100)

    def test_a_file_that_was_deleted_meanwhile(self, tmp_path):
        with pytest.raises(ValueError, match="upload it again") as caught:
            read_upload(str(tmp_path / "gone.jpg"), 100)
        assert str(tmp_path) not in str(caught.value)

    def test_too_many_pixels_are_refused_before_they_are_decoded(self, tmp_path):
        path = tmp_path / "large.png"
        Image.new("1", (8000, 6250)).save(path)
        with pytest.raises(ValueError, match=r"'large.png' has 8000 x 6250 = 50,000,000 pixels, more than"):
            read_upload(str(path), Settings().max_pixels)

    @pytest.mark.parametrize(
        "data", [b"", b"plain text", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"\x89PNG\r\n"]
    )
    def test_a_file_that_is_no_image(self, data, tmp_path):
        path = tmp_path / "photo.jpg"
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"'photo.jpg' is") as caught:
            read_upload(str(path), 100)
        assert str(tmp_path) not in str(caught.value)

    def test_a_data_address(self):
        buffer = io.BytesIO()
        Image.new("RGB", (3, 2), "red").save(buffer, format="PNG")
        upload = read_upload(f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}", 100)
        assert upload.image.size == (3, 2) and upload.name == "image"
        with pytest.raises(ValueError, match="broken"):
            read_upload("data:image/png;base64,%%%", 100)


def test_on_zerogpu_models_are_loaded_before_a_gpu_is_lent(upload, monkeypatch):
    lent: list[str] = []

    class Spaces:
        """Calls a function as in another process, with copies of the arguments and results."""

        @staticmethod
        def GPU(duration):
            assert duration == 60

            def decorate(function):
                def on_gpu(*args):
                    lent.append(function.__name__)
                    with monkeypatch.context() as inside:
                        inside.setattr(
                            Catalogue, "load", lambda *_: pytest.fail("loaded while a GPU is lent")
                        )
                        result = pickle.loads(pickle.dumps(function(*pickle.loads(pickle.dumps(args)))))
                    return result

                return on_gpu

            return decorate

    monkeypatch.setattr("studies.spaces", Spaces)
    laboratory = Laboratory(Catalogue(Settings()))
    study = laboratory.with_prototypes(upload, laboratory.study(upload, LABELS, WHOLE))
    assert lent == ["_study", "_prototypes"]
    laboratory.study(upload, LABELS, WHOLE, study).segmentation(0.5)  # needs no GPU
    assert len(lent) == 2
    with pytest.raises(ValueError, match="is not a model"):
        laboratory.study(upload, LABELS, replace(WHOLE, model="/etc"))
    assert len(lent) == 2
