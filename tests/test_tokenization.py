"""CLIP's tokenizer, built from the package's own merges."""

import hashlib

import pytest
from transformers import AutoProcessor, CLIPTokenizer

from pgseg_hf import PGSegImageProcessorPil, PGSegProcessor
from pgseg_hf.tokenization import (
    END_TOKEN,
    START_TOKEN,
    build_vocabulary,
    default_tokenizer,
    load_merges,
    merges_for_words,
)

START, END = 49406, 49407

# Recorded from open_clip's own tokenizer (open_clip_torch 3.3.0).
# fmt: off
RECORDED = {
    "a photo of a cat": [320, 1125, 539, 320, 2368],
    "a photo of a cat.": [320, 1125, 539, 320, 2368, 269],
    "it's we're I'll they'd": [585, 568, 649, 982, 328, 1342, 889, 1896],
    "na\xefve caf\xe9": [1097, 35689, 563, 15304],
    "\u65e5\u672c\u8a9e \u306e \u5199\u771f": [39121, 44353, 34002, 508, 4813, 362, 44653, 33440, 509],
    "\U0001f600 \U0001f469\u200d\U0001f469\u200d\U0001f467": [7334, 26304, 26304, 964, 356],
    "3.14159, 1,000 & C++!": [274, 269, 272, 275, 272, 276, 280, 267, 272, 267, 271, 271, 271, 261, 322, 47298, 256],
    "snake_case road-sign": [8798, 318, 2068, 1759, 268, 2292],
    "x\xb2+y\xb3=\xbd": [343, 41175, 266, 344, 126, 367, 284, 33613],
    "\u0939\u093f\u0928\u094d\u0926\u0940": [29446, 26721, 26090, 19389, 29552, 25751],
    "": [],
}
# fmt: on


@pytest.fixture(scope="module")
def tokenizer():
    return default_tokenizer()


def test_vocabulary_is_clips():
    vocabulary = build_vocabulary()
    assert len(load_merges()) == 48_894
    assert len(vocabulary) == 49_408
    assert sorted(vocabulary.values()) == list(range(49_408))
    assert (vocabulary["!"], vocabulary["!</w>"], vocabulary["in"]) == (0, 256, 512)
    assert (vocabulary[START_TOKEN], vocabulary[END_TOKEN]) == (START, END)
    joined = "\n".join(sorted(vocabulary, key=vocabulary.__getitem__))
    assert (
        hashlib.sha256(joined.encode()).hexdigest()
        == "7cccc44d334555d1ff3c0ac5f0246b428fab2918383e77ee745cf30d41010b78"
    )


@pytest.mark.parametrize("text", RECORDED, ids=ascii)
def test_recorded_token_ids(tokenizer, text):
    assert tokenizer(text)["input_ids"] == [START, *RECORDED[text], END]


def test_is_a_clip_tokenizer_with_the_usual_settings(tokenizer):
    assert isinstance(tokenizer, CLIPTokenizer)
    assert len(tokenizer) == 49_408
    assert tokenizer.model_max_length == 77
    assert tokenizer.bos_token_id == START
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == END
    assert tokenizer.model_input_names == ["input_ids", "attention_mask"]


@pytest.mark.parametrize("context_length", [3, 77])
def test_long_text_is_cut_to_the_context_and_keeps_its_end_token(context_length):
    tokenizer = default_tokenizer(context_length)
    encoded = tokenizer(["cat " * 200, "cat"], truncation=True, padding="max_length")
    for ids, mask in zip(encoded["input_ids"], encoded["attention_mask"]):
        assert len(ids) == len(mask) == context_length
        assert ids[0] == START
        assert ids[sum(mask) - 1] == END
    assert sum(encoded["attention_mask"][0]) == context_length
    assert sum(encoded["attention_mask"][1]) == 3


def test_fewer_merges_are_a_smaller_tokenizer_of_the_same_kind(tmp_path):
    tokenizer = default_tokenizer(context_length=16, merges=1000)
    assert len(tokenizer) == 1514 and len(default_tokenizer(merges=48_894)) == 49_408
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1512, 1513, 1513)
    assert (
        tokenizer.decode(tokenizer("a wombat in a café")["input_ids"], skip_special_tokens=True)
        == "a wombat in a café"
    )
    PGSegProcessor(PGSegImageProcessorPil(), tokenizer).save_pretrained(tmp_path)
    for loaded in (
        CLIPTokenizer.from_pretrained(tmp_path),
        AutoProcessor.from_pretrained(tmp_path).tokenizer,
    ):
        assert loaded.get_vocab() == tokenizer.get_vocab()
        assert loaded.model_max_length == 16
        assert loaded(list(RECORDED), truncation=True) == tokenizer(list(RECORDED), truncation=True)


def test_merges_for_words_keep_the_tokens_of_the_words(tokenizer):
    words = ["wombat", "kitchen", "café", "xylophone", "aardvark", "banana", "2nd"]
    merges = merges_for_words(words, 1000)
    assert len(merges) < 60
    smaller = default_tokenizer(merges=merges)
    for word in words:
        assert smaller.tokenize(word) == tokenizer.tokenize(word)
    kitchen = merges_for_words(["kitchen"], 1000)
    assert merges_for_words(["kitchen", "wombat"], len(kitchen)) == kitchen


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"context_length": 2}, "at least 3.* 2"),
        ({"merges": 0}, "merges is 0, expected 1 to 48894"),
        ({"merges": 48_895}, "merges is 48895"),
    ],
)
def test_sizes_that_make_no_tokenizer_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        default_tokenizer(**fields)
