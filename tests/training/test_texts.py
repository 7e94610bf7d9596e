"""The texts chosen for records, and nouns found by a spaCy pipeline built here (tests cannot download one)."""

import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgseg_hf.data.records import Record, UnusableRecord
from pgseg_hf.prompts import validate_labels
from pgseg_hf.training.batches.texts import TextOptions, choose_texts, clean_tags, find_nouns, load_noun_model

SEEDS = st.integers(0, 2**31 - 1)
TAGS = st.lists(st.text(max_size=8), max_size=12)
PLAIN = TextOptions(templates=["{}"])


def texts_of(record, options=None, seed=0):
    return choose_texts(record, options or TextOptions(), np.random.default_rng(seed))


def many_texts(record, options=None, count=300):
    return [texts_of(record, options, seed) for seed in range(count)]


def test_one_of_the_captions_is_the_text():
    record = Record("x.jpg", captions=[" a dog ", "", "a hat", "two"], tags=["dog"])
    captions = Counter(texts.caption for texts in many_texts(record))
    assert set(captions) == {"a dog", "a hat", "two"} and min(captions.values()) > 60
    assert texts_of(record).labels == ["a photo of a dog."]


def test_tags_make_a_sentence_of_any_subset_in_any_order():
    record = Record("x.jpg", tags=["hat", "skirt", "boots"])
    sentences = Counter(texts.caption for texts in many_texts(record, PLAIN, 2000))
    assert len(sentences) == 3 + 6 + 6
    assert {"hat", "boots and hat", "skirt, hat and boots"} <= set(sentences)
    # The number of tags is drawn first, so each single tag has 1/9 and each order of all three 1/18.
    assert sentences["hat"] == pytest.approx(2000 / 9, rel=0.25)
    assert sentences["skirt, hat and boots"] == pytest.approx(2000 / 18, rel=0.25)


def test_templates_of_sentences_and_of_labels_are_drawn():
    options = TextOptions(templates=["a photo of a {}.", "{}!"])
    captions = Counter(texts.caption for texts in many_texts(Record("x.jpg", tags=["hat"]), options))
    assert set(captions) == {"a photo of a hat.", "hat!"} and min(captions.values()) > 100
    options = TextOptions(label_templates=["{}", "the {}"])
    found = {tuple(sorted(each.labels)) for each in many_texts(Record("x", tags=["a", "b"]), options)}
    assert found == {("a", "b"), ("a", "the b"), ("b", "the a"), ("the a", "the b")}


def test_labels_are_all_tags_in_the_one_template_that_makes_equal_tags_equal():
    for texts in many_texts(Record("x.jpg", tags=["hat", "fire truck"]), count=20):
        assert sorted(texts.labels) == ["a photo of a fire truck.", "a photo of a hat."]


def test_max_tags_bounds_sentence_and_labels():
    record = Record("x.jpg", tags=[f"t{i}" for i in range(20)])
    options = TextOptions(templates=["{}"], label_templates=["{}"], max_tags=3)
    seen = set()
    for texts in many_texts(record, options):
        assert len(texts.labels) == len(set(texts.labels)) == 3
        assert len(texts.caption.replace(" and ", ", ").split(", ")) <= 3
        seen.update(texts.labels)
    assert len(seen) == 20


def test_captions_from_tags_at_a_rate():
    record = Record("x.jpg", captions=["a sentence"], tags=["hat"])
    options = TextOptions(templates=["{}"], caption_from_tags=0.3)
    captions = Counter(texts.caption for texts in many_texts(record, options, 1000))
    assert captions["hat"] + captions["a sentence"] == 1000
    assert captions["hat"] == pytest.approx(300, abs=60)
    without_tags = Record("x.jpg", captions=["a sentence"])
    assert texts_of(without_tags, TextOptions(caption_from_tags=1.0)).caption == "a sentence"


@given(TAGS)
def test_cleaned_tags_are_what_prompts_accept(tags):
    cleaned = clean_tags(tags)
    assert clean_tags(cleaned) == cleaned
    assert all(tag == " ".join(tag.split()) != "" for tag in cleaned)
    if cleaned:
        assert validate_labels(cleaned) == cleaned


@given(SEEDS, TAGS, st.integers(1, 5))
def test_any_tags_give_texts_unless_all_are_empty(seed, tags, most):
    record, options = Record("x", tags=tags), TextOptions(max_tags=most)
    if not clean_tags(tags):
        record = Record("x", ["", " "], tags, name="photo 7")
        with pytest.raises(UnusableRecord, match="photo 7 has neither") as caught:
            texts_of(record, options, seed)
        assert caught.value.reason == "no text"
        return
    texts = texts_of(record, options, seed)
    assert texts == texts_of(record, options, seed)
    assert len(texts.labels) == min(most, len(clean_tags(tags)))
    assert texts.caption


def test_equal_tags_are_merged():
    assert clean_tags(["Red  hat", "red hat ", "", "boots", "BOOTS"]) == ["Red hat", "boots"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"templates": ["no place"]}, "no place"),
        ({"label_templates": []}, "no templates"),
        ({"max_tags": 0}, "max_tags is 0"),
        ({"num_nouns": -1}, "num_nouns is -1"),
        ({"num_nouns": 2}, "num_nouns is 2, which needs noun_model"),
        ({"caption_from_tags": 1.5}, "caption_from_tags is 1.5"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        TextOptions(**options)


# Nouns


@pytest.fixture(scope="module")
def noun_model(tmp_path_factory) -> str:
    """A pipeline that tags the part of speech of a dozen words."""
    spacy = pytest.importorskip("spacy")
    nouns = ["dog", "dogs", "truck", "fire", "photo", "photos", "playhouse"]
    patterns = [{"patterns": [[{"LOWER": word}]], "attrs": {"POS": "NOUN"}} for word in nouns]
    patterns.append({"patterns": [[{"TEXT": "Paris"}]], "attrs": {"POS": "PROPN"}})
    patterns.append({"patterns": [[{"LOWER": "climbs"}]], "attrs": {"POS": "VERB"}})
    pipeline = spacy.blank("en")
    pipeline.add_pipe("attribute_ruler").add_patterns(
        [{"patterns": [[{"LOWER": "a"}]], "attrs": {"POS": "DET"}}, *patterns]
    )
    folder = tmp_path_factory.mktemp("nouns")
    pipeline.to_disk(folder)
    return str(folder)


def test_nouns_are_found_compounds_joined_and_words_for_images_dropped(noun_model):
    caption = "A photo of a dog, photos, Dogs, a dog and a fire truck that climbs in Paris."
    assert find_nouns(caption, noun_model) == ("dog", "dogs", "fire truck", "paris")
    assert find_nouns("Climbs!", noun_model) == ()


def test_random_nouns_of_the_caption_become_labels(noun_model):
    record = Record("x.jpg", captions=["a dog and a truck climbs a playhouse"], tags=["Dog"])
    options = TextOptions(num_nouns=2, noun_model=noun_model, label_templates=["{}"])
    labels = Counter(tuple(sorted(texts.labels)) for texts in many_texts(record, options))
    # A noun that is already a tag is not repeated.
    assert set(labels) == {("Dog", "truck"), ("Dog", "playhouse"), ("Dog", "playhouse", "truck")}


def test_a_pipeline_that_is_not_there_or_tells_no_nouns(tmp_path):
    spacy = pytest.importorskip("spacy")
    with pytest.raises(ValueError, match=r"python -m spacy download en_none_sm"):
        load_noun_model("en_none_sm")
    spacy.blank("en").to_disk(tmp_path / "blank")
    with pytest.raises(ValueError, match=r"blank.* parts of speech"):
        load_noun_model(str(tmp_path / "blank"))


def test_without_spacy_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ValueError, match="pip install spacy"):
        load_noun_model("any")
