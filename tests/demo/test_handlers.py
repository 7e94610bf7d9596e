"""Event handlers of the page and the API."""

import asyncio
import json
import math
import os
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

gr = pytest.importorskip("gradio", reason="needs pip install pgseg-hf[demo]")

import limits  # noqa: E402
from app import build_app  # noqa: E402
from handlers import Asked, Handlers, file_as_it_is, presets, speaking  # noqa: E402
from model_catalogue import Catalogue  # noqa: E402
from settings import MAX_LABELS, Settings  # noqa: E402
from studies import read_labels  # noqa: E402

from pgseg_hf import SegmentationOptions  # noqa: E402
from pgseg_hf.suggestions import MIN_AREA, everyday_words  # noqa: E402

PLAIN = {"min_area": 0, "synonyms": "average", "templates": ""}
MASKS, ROWS, MASK, LABELS, GROUPS, HEAT, WORDS, NUMBER, FIRST, SECOND, NOTE, FOUND, STUDY, OTHER = range(14)


@pytest.fixture(scope="module")
def handlers(catalogue, tmp_path_factory) -> Handlers:
    return Handlers(catalogue.settings, catalogue, str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def asked(street_file):
    values = dict.fromkeys(field.name for field in fields(Asked))
    values |= {"path": street_file, "words": "road, tree", "background": False, "threshold": 0.3, **PLAIN}
    values |= {
        "model": "pgseg-small-everyday",
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
    before, after = (
        {name.rpartition(" ")[0]: colour for name, colour in shown[MASKS].color_map.items()}
        for shown in (first, second)
    )
    both = before.keys() & after.keys()
    assert both and all(before[label] == after[label] for label in both)


def test_the_window_that_one_looks_at_stays(handlers, asked):
    first = handlers.show_masks(*asked(model="tiny"))
    assert first[NUMBER].value == 2  # the middle window of three
    study = first[STUDY]
    shown = handlers.show_masks(*asked(model="tiny", number=3, threshold=0.5, study=study))
    assert shown[NUMBER].value == 3
    shown = handlers.show_masks(*asked(model="tiny", number=3, window="whole", study=study))
    assert shown[NUMBER].visible is False


def test_two_models_stand_side_by_side(handlers, asked):
    shown = handlers.show_masks(*asked(other="tiny"))
    assert shown[FIRST].visible and shown[SECOND].visible and shown[OTHER].choices.model == "tiny"
    assert [shown[FIRST].label, shown[SECOND].label] == ["pgseg-small-everyday", "tiny"]
    assert shown[FIRST].value == shown[MASKS].value != shown[SECOND].value
    alone = handlers.show_masks(*asked())
    assert not alone[FIRST].visible and not alone[SECOND].visible and alone[OTHER] is None
    with pytest.raises(ValueError, match="choose a different one"):
        handlers.show_masks(*asked(other="pgseg-small-everyday"))


def test_a_model_is_called_by_its_name_wherever_it_is_named(handlers, street_file):
    _, found = handlers.segment(street_file, "road, tree", False, 0, "", "whole", 0, **PLAIN)
    assert found["model"] == "pgseg-small-everyday"
    _, found = handlers.segment(street_file, "road, tree", False, 0, " tiny ", "whole", 0, **PLAIN)
    assert found["model"] == "tiny"


def test_without_labels_everyday_words_are_looked_for(handlers, asked, street_file):
    """The same as `pgseg segment --vocabulary everyday`."""
    given = handlers.show_masks(*asked())
    assert given[FOUND] == gr.skip()
    shown = handlers.show_masks(*asked(words=" ", study=given[STUDY], other="tiny"))
    labels = shown[FOUND].split(", ")
    assert shown[STUDY].encoded is given[STUDY].encoded
    segmenter = handlers.laboratory.catalogue.load("")
    expected = segmenter(street_file, everyday_words(), SegmentationOptions(min_area=MIN_AREA))
    result = shown[STUDY].segmentation(None)
    assert set(labels) == set(expected.without_absent().labels)
    np.testing.assert_array_equal(
        np.array(labels)[result.label_map], np.array(everyday_words())[expected.label_map]
    )
    assert shown[OTHER].labels == labels, "the same for both models"
    _, explained = handlers.segment(street_file, None, False, None, None, "sliding", 0, **PLAIN)
    assert [each["label"] for each in explained["labels"]] == labels
    assert explained["options"]["min_area"] == MIN_AREA
    again = handlers.show_masks(*asked(words="", study=shown[STUDY]))
    assert again[STUDY] is shown[STUDY]
    fewer = handlers.show_masks(*asked(words="", study=shown[STUDY], min_area=0.2))
    assert fewer[STUDY].labels == labels[: len(fewer[STUDY].labels)] != labels


@pytest.mark.parametrize("knows", ["nothing", "street", "more than the shipped one"])
def test_which_words_are_looked_for_is_the_checkpoints_affair(handlers, asked, monkeypatch, knows):
    """A model with a few names looks for these; a fine-tuned one also for its new names."""
    shipped, own = (handlers.laboratory.catalogue.load(name).processor for name in ("", "tiny"))
    words, expected = {
        "nothing": (None, everyday_words()),
        "street": (["road", "pavement"], ["road", "pavement"]),
        "more than the shipped one": ([*shipped.vocabulary, "quagga"], [*everyday_words(), "quagga"]),
    }[knows]
    monkeypatch.setattr(own, "vocabulary", words)
    study = handlers.show_masks(*asked(words="", model="tiny"))[STUDY]
    assert study.asked.names == expected


def test_minimum_area_synonyms_and_templates_are_the_librarys(handlers, asked, street_file):
    words = "building|house, road|pavement, tree, sky, cat"
    study = handlers.show_masks(*asked(words=words))[STUDY]
    segmenter = handlers.laboratory.catalogue.load("")
    for changes, given in (
        ({"min_area": 0.2}, {"min_area": 0.2}),
        ({"synonyms": "best"}, {"synonyms": "best"}),
        ({"templates": "a bad photo of the {}.\n{}"}, {"templates": ("a bad photo of the {}.", "{}")}),
        (
            {"synonyms": "best", "min_area": 0.1, "background": True},
            {"synonyms": "best", "min_area": 0.1, "background_threshold": 0.3},
        ),
    ):
        shown = handlers.show_masks(*asked(words=words, study=study, **changes))
        result = shown[STUDY].segmentation(given.get("background_threshold"))
        expected = segmenter(street_file, words.split(", "), SegmentationOptions(**given))
        names = [
            np.array(["background"] * each.background + each.labels)[each.label_map]
            for each in (result, expected)
        ]
        np.testing.assert_array_equal(*names)
        assert (shown[STUDY].scored.windows[0].scores.shape[1] < 5) == ("min_area" in given)
        assert shown[STUDY].encoded is study.encoded and shown[STUDY] is not study
        assert len(shown[ROWS]) == len(shown[STUDY].labels) + result.background


def test_labels_with_synonyms_colours_and_thresholds(handlers, asked, street_file):
    """The same as in the library. Changed colours and thresholds do not run the model."""
    plain = handlers.show_masks(*asked(words="road|pavement, tree:0, building"))
    study = plain[STUDY]
    assert study.labels == ["road", "tree", "building"] and plain[FOUND] == gr.skip()
    words = "road|pavement:red, tree:1, building:#00f:0.3"
    shown = handlers.show_masks(*asked(words=words, study=study))
    assert shown[STUDY].scored is study.scored
    result = shown[STUDY].segmentation(None)
    options = SegmentationOptions(
        window_size="auto", thresholds={"tree": 1, "building": 0.3}, colours={"road": "red"}
    )
    segmenter = handlers.laboratory.catalogue.load("")
    expected = segmenter(street_file, ["road|pavement", "tree", "building"], options)
    np.testing.assert_array_equal(result.label_map, expected.label_map)
    colours = {name.rpartition(" ")[0]: colour for name, colour in shown[MASKS].color_map.items()}
    assert {"road": "#ff0000", "building": "#0000ff"}.items() >= colours.items() and colours
    with pytest.raises(ValueError, match="'reddish', expected a threshold from 0 to 1 or a colour"):
        handlers.show_masks(*asked(words="road:reddish"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"short_side": math.nan}, "short_side is nan, expected 0"),
        ({"short_side": None}, "short_side is None"),
        ({"short_side": 1}, "short_side is 1, expected 0 .* from 64 to 672"),
        ({"short_side": 673}, "short_side is 673"),
        ({"short_side": 64.5}, "short_side is 64.5"),
        ({"threshold": math.nan}, "threshold is nan"),
        ({"threshold": None}, "threshold is None"),
        ({"threshold": 1.5}, "threshold is 1.5, expected a number from 0 to 1"),
        ({"window": None}, "window is None, expected 'sliding' or 'whole'"),
        ({"labels": "cat, d\0g"}, r"The label 'd\\x00g' has the invalid character '\\x00'"),
        ({"labels": "\ud800"}, "invalid character"),
        ({"model": "a\0b/c"}, "is not a model"),
        ({"min_area": 1.5}, "min_area is 1.5, expected .* from 0 to 1"),
        ({"min_area": math.nan}, "min_area is nan"),
        ({"synonyms": "worst"}, "synonyms is 'worst'"),
        ({"synonyms": ["best"]}, "synonyms is "),
        ({"templates": "a photo"}, "templates.0. .*'a photo'"),
        ({"image": None}, "Choose an image"),
    ],
)
def test_values_that_programs_send_are_refused_by_name(handlers, street_file, changes, message):
    values = {"image": street_file, "labels": "road, tree", "background": True, "threshold": 0.3}
    values |= {"model": None, "window": "whole", "short_side": 0, **PLAIN}
    assert handlers.segment(**values)[1]["labels"]
    with pytest.raises(ValueError, match=message):
        handlers.segment(**(values | changes))


def test_masks_of_less_detail_are_said_to_be(handlers, asked, street_file, monkeypatch):
    full = handlers.show_masks(*asked())
    assert not full[NOTE].visible
    monkeypatch.setattr(limits, "MAX_MAP_ENTRIES", 20_000)
    less = handlers.show_masks(*asked())
    explained = json.loads(Path(less[LABELS].value["path"]).read_text())
    made = explained["made_at"]
    assert made["width"] * made["height"] <= 10_000 and explained["width"] == 256
    assert less[NOTE].visible and f"{made['width']} x {made['height']}" in less[NOTE].value
    first, second = (np.asarray(Image.open(shown[MASK].value["path"])) for shown in (full, less))
    assert first.shape == second.shape and (first == second).mean() > 0.95


def test_a_request_has_only_so_much_time(handlers, asked, tmp_path):
    hurried = Handlers(Settings(max_seconds=0), handlers.laboratory.catalogue, str(tmp_path))
    with pytest.raises(ValueError, match="longer than the 0 seconds"):
        hurried.show_masks(*asked())


def test_a_slow_download_does_not_count(tmp_path, street_file, monkeypatch):
    load = Catalogue.load

    def slowly(catalogue, name):
        if not catalogue._loaded:
            clock[0] += 1000
        return load(catalogue, name)

    settings, clock = Settings(), [0.0]
    handlers = Handlers(settings, Catalogue(settings), str(tmp_path))
    monkeypatch.setattr(Catalogue, "load", slowly)
    monkeypatch.setattr(limits, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    assert handlers.segment(street_file, "tree", False, 0, "", "whole", 0, **PLAIN)


def test_other_views_want_masks_of_the_same_image_first(handlers, asked, street_file, tmp_path):
    assert "Segment" in handlers.show_prototypes(street_file, None)[1]
    study = handlers.show_masks(*asked())[STUDY]
    gallery, _, seen = handlers.show_prototypes(street_file, study)
    assert len(gallery.value) == 2 and seen.prototypes
    Image.new("RGB", (50, 40)).save(tmp_path / "other.png")
    other = str(tmp_path / "other.png")
    assert "new image" in handlers.show_prototypes(other, study)[1]
    with pytest.raises(ValueError, match="Press Segment first"):
        handlers.show_groups(other, False, 0.3, 1, study)
    assert len(handlers.show_groups(street_file, False, 0.3, 99, study)) == 3  # the last window


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


def test_no_web_address_of_a_request_is_fetched(monkeypatch):
    """For any component."""
    fetched = []

    async def fetch(url, cache_dir):
        fetched.append(url)
        raise OSError("no network")

    monkeypatch.setattr("gradio.processing_utils.async_ssrf_protected_download", fetch)
    monkeypatch.setattr(Handlers, "first_study", lambda *_: None)

    def request(app, place, path):
        function = next(each for each in app.fns.values() if each.api_name == "segment")
        values = [None, "tree", False, 0.3, "", "whole", 0, *PLAIN.values()]
        values[place] = {"path": path, "meta": {"_type": "gradio.FileData"}}
        asyncio.run(app.preprocess_data(function, values, None))

    closed, open_one = build_app(Settings()), build_app(Settings(web_images=True))
    for place in (0, 1):
        for path, message in (("https://example.com/a.jpg", "does not fetch"), ("a\0b", "not on the server")):
            with pytest.raises(gr.Error, match=message):
                request(closed, place, path)
        assert fetched == []
        with pytest.raises(OSError, match="no network"):
            request(open_one, place, "https://example.com/a.jpg")
        assert fetched.pop() == "https://example.com/a.jpg"


def test_presets_are_labels_that_can_be_taken():
    known = presets()
    assert known["Pascal VOC 2012, 20 classes and background"][1] is True
    counts = {title: len(read_labels(words).names) for title, (words, _) in known.items()}
    assert counts["ADE20K, 150 classes"] == 150
    assert max(counts.values()) <= MAX_LABELS
