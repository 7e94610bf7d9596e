"""What the buttons of the page do."""

import json
import os
import shutil
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

gr = pytest.importorskip("gradio", reason="needs pip install pgseg-hf[demo]")

from handlers import Asked, Handlers, file_as_it_is, presets, speaking  # noqa: E402
from model_catalogue import Catalogue  # noqa: E402
from settings import MAX_LABELS, Settings  # noqa: E402
from studies import read_labels  # noqa: E402

MASKS, ROWS, MASK, LABELS, GROUPS, HEAT, WORDS, NUMBER, COMPARED, STUDY, OTHER = range(11)


@pytest.fixture(scope="module")
def handlers(tiny_folder, tmp_path_factory) -> Handlers:
    other = tmp_path_factory.mktemp("models") / "tiny"
    shutil.copytree(tiny_folder, other)
    settings = Settings(models=(str(other),))
    return Handlers(settings, Catalogue(settings), str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def asked(street_file):
    values = dict.fromkeys((field.name for field in fields(Asked)), None)
    values |= {"path": street_file, "words": "road, tree", "background": False, "threshold": 0.3}
    values |= {
        "model": "pgseg-small-street",
        "other": "none",
        "window": "sliding",
        "short_side": 0,
        "number": 1,
    }

    def change(**changes):
        return (values | changes).values()

    return change


def test_files_hold_what_the_page_shows(handlers, asked):
    shown = handlers.show_masks(*asked(background=True, threshold=1.0))
    mask = np.asarray(Image.open(shown[MASK].value["path"]))
    explained = json.loads(Path(shown[LABELS].value["path"]).read_text())
    areas = {row[0]: row[1] for row in shown[ROWS]}
    for found in explained["labels"]:
        assert found["area"] == (mask == found["value"]).mean()
        assert areas[found["label"]] == f"{found['area']:.1%}"
    assert explained["labels"][0]["label"] == "background" and explained["labels"][0]["area"] > 0.5


def test_a_colour_stays_with_its_label(handlers, asked):
    first = handlers.show_masks(*asked())
    second = handlers.show_masks(*asked(words="road, tree, sky", background=True, study=first[STUDY]))
    assert first[MASKS].color_map.items() <= second[MASKS].color_map.items()


def test_the_window_that_one_looks_at_stays(handlers, asked):
    first = handlers.show_masks(*asked())
    assert first[NUMBER].value == 10  # the middle one of 18
    study = first[STUDY]
    assert handlers.show_masks(*asked(number=3, threshold=0.5, study=study))[NUMBER].value == 3
    assert handlers.show_masks(*asked(number=3, window="whole", study=study))[NUMBER].visible is False


def test_two_models_stand_side_by_side(handlers, asked):
    shown = handlers.show_masks(*asked(other="tiny"))
    assert shown[COMPARED].visible and shown[OTHER].choices.model == "tiny"
    alone = handlers.show_masks(*asked())
    assert not alone[COMPARED].visible and alone[OTHER] is None
    with pytest.raises(ValueError, match="is the model already"):
        handlers.show_masks(*asked(other="pgseg-small-street"))


def test_other_views_want_masks_of_the_same_picture_first(handlers, asked, street_file, tmp_path):
    assert "Segment" in handlers.show_prototypes(street_file, None)[1]
    study = handlers.show_masks(*asked())[STUDY]
    gallery, _, seen = handlers.show_prototypes(street_file, study)
    assert len(gallery.value) == 2 and seen.prototypes
    Image.new("RGB", (50, 40)).save(tmp_path / "other.png")
    other = str(tmp_path / "other.png")
    assert "new picture" in handlers.show_prototypes(other, study)[1]
    with pytest.raises(ValueError, match="Press Segment first"):
        handlers.show_groups(other, False, 0.3, 1, study)
    assert len(handlers.show_groups(street_file, False, 0.3, 99, study)) == 3  # a number beyond is the last


def test_refusals_are_shown_as_text():
    def refuse():
        raise ValueError("no <b>such</b> label & more")

    with pytest.raises(gr.Error) as caught:
        speaking(refuse)()
    assert caught.value.message == "no &lt;b&gt;such&lt;/b&gt; label &amp; more"


def test_only_files_of_visitors_are_opened(tmp_path):
    cache, other = tmp_path / "cache", tmp_path / "other"
    for folder in (cache, other):
        folder.mkdir()
        (folder / "photo.jpg").write_bytes(b"x")
    (cache / "link.jpg").symlink_to(other / "photo.jpg")
    os.mkfifo(cache / "pipe")
    take = file_as_it_is(str(cache))
    assert take(None) is None
    assert take(SimpleNamespace(url=None, path=str(cache / "photo.jpg"))) == str(cache / "photo.jpg")
    data = SimpleNamespace(url="data:image/png;base64,AAAA", path=None)
    assert take(data) == data.url
    refused = ["/etc/passwd", cache, cache / "pipe", cache / "link.jpg", cache / ".." / "other" / "photo.jpg"]
    for path in (*map(str, refused), None, "", "a\0b", str(other / "photo.jpg"), "/dev/zero"):
        with pytest.raises(gr.Error, match="not on the server"):
            take(SimpleNamespace(url=None, path=path))
    with pytest.raises(gr.Error, match="too large"):
        take(SimpleNamespace(url="data:image/png;base64," + "A" * 28_000_000, path=None))


def test_presets_are_labels_that_can_be_taken():
    known = presets()
    assert known["Pascal VOC 2012, 20 classes and background"][1] is True
    counts = {title: len(read_labels(words)) for title, (words, _) in known.items()}
    assert counts["ADE20K, 150 classes"] == 150
    assert max(counts.values()) <= MAX_LABELS
