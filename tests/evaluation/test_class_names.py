"""The class name files of the benchmarks: counts, order, and names that work in prompts."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

import pgseg_hf
from pgseg_hf.prompts import validate_labels

FOLDER = Path(pgseg_hf.__file__).parent / "evaluation" / "benchmarks" / "class_names"
COUNTS = {
    "ade20k": 150,
    "cityscapes": 19,
    "coco_object": 80,
    "coco_stuff": 171,
    "context": 59,
    "imagenet": 1000,
    "imagenet_s": 919,
    "lvis": 1203,
    "voc": 20,
}
EXTRA_KEYS = {"imagenet": {"wnids"}, "imagenet_s": {"wnids", "subsets"}}

# Checked against a different public list of each benchmark than the one that the file was made from.
KNOWN_INDICES = {
    "ade20k": {0: "wall", 7: "bed", 12: "person", 20: "car", 76: "boat", 149: "flag"},
    "cityscapes": {0: "road", 5: "pole", 11: "person", 13: "car", 16: "train", 18: "bicycle"},
    "coco_object": {0: "person", 9: "traffic light", 24: "backpack", 62: "tv", 79: "toothbrush"},
    "coco_stuff": {0: "person", 4: "airplane", 79: "toothbrush", 80: "banner", 170: "wood"},
    "context": {0: "airplane", 9: "bottle", 36: "person", 39: "plant", 54: "monitor", 58: "wood"},
    "imagenet": {0: "tench", 134: "crane bird", 207: "Golden Retriever", 517: "construction crane"},
    "imagenet_s": {0: "tench", 1: "goldfish", 3: "tiger shark", 918: "toilet tissue"},
    "lvis": {0: "aerosol can", 2: "airplane", 568: "horse", 610: "kite", 1202: "zucchini"},
    "voc": {0: "aeroplane", 10: "table", 14: "person", 15: "plant", 19: "monitor"},
}


def load(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def is_subsequence(part: list[str], whole: list[str]) -> bool:
    """Whether `part` is found in `whole` in the same order, gaps allowed."""
    rest = iter(whole)
    return all(item in rest for item in part)


@pytest.mark.parametrize("name", COUNTS)
def test_labels_and_synonyms(name: str):
    assert {path.stem for path in FOLDER.glob("*.json")} == set(COUNTS)
    data = load(name)
    released = {"released"} if name in ("lvis", "imagenet_s") else set()
    assert set(data) == {"source", "labels", "synonyms"} | EXTRA_KEYS.get(name, set()) | released
    assert data["source"] and "\n" not in data["source"]
    labels, synonyms = data["labels"], data["synonyms"]
    assert len(labels) == COUNTS[name] and validate_labels(labels) == labels
    assert {index: labels[index] for index in KNOWN_INDICES[name]} == KNOWN_INDICES[name]
    assert set(synonyms) <= set(labels) and all(synonyms.values()), "labels without synonyms are omitted"
    words = [word for each in synonyms.values() for word in each]
    assert validate_labels([*labels, *words]) == [*labels, *words], "names are unique"
    assert not any("_" in word or word != " ".join(word.split()) for word in [*labels, *words])
    assert not {label.casefold() for label in labels} & {"background", "other", "unlabeled", "void"}
    assert len({word.casefold() for word in [*labels, *words]}) == len(labels) + len(words)


def test_things_of_coco_stuff_are_coco_object_in_order():
    things, objects = load("coco_stuff")["labels"][:80], load("coco_object")["labels"]
    differing = [(thing, other) for thing, other in zip(things, objects, strict=True) if thing != other]
    assert differing == [("airplane", "aeroplane")]


def test_wnids():
    known = {"n02012849": "crane bird", "n02113186": "Cardigan Welsh Corgi", "n02963159": "cardigan"}
    named = {"imagenet": ("construction crane", "toilet paper"), "imagenet_s": ("crane", "toilet tissue")}
    for name, others in named.items():
        data = load(name)
        by_id = dict(zip(data["wnids"], data["labels"], strict=True))
        assert known.items() <= by_id.items() and (by_id["n03126707"], by_id["n15075141"]) == others
        assert all(re.fullmatch(r"n\d{8}", wnid) for wnid in by_id)
        assert data["wnids"] == sorted(by_id), "both benchmarks number their classes by sorted wnid"


def test_imagenet_s_subsets():
    data = load("imagenet_s")
    subsets = data["subsets"]
    assert {size: len(wnids) for size, wnids in subsets.items()} == {"50": 50, "300": 300}
    for wnids in subsets.values():
        assert len(set(wnids)) == len(wnids)
        assert is_subsequence(wnids, data["wnids"])
    assert is_subsequence(subsets["50"], subsets["300"])
    # First and last classes of the published lists: goldfish and agaric, tench and bolete.
    assert (subsets["50"][0], subsets["50"][-1]) == ("n01443537", "n12998815")
    assert (subsets["300"][0], subsets["300"][-1]) == ("n01440764", "n13054560")


@pytest.mark.parametrize(("name", "count"), [("lvis", 412), ("imagenet_s", 392)])
def test_names_of_the_released_code(name: str, count: int):
    data = load(name)
    released = data["released"]
    assert len(released) == count and set(released) <= set(data["labels"])
    assert all(label != other for label, other in released.items())
    known = {"lvis": {"aerosol can": "aerosol_can", "bat animal": "bat_(animal)"}}
    known["imagenet_s"] = {"great white shark": "great_white_shark", "Crock Pot": "Crock_Pot"}
    assert known[name].items() <= released.items()
    validate_labels([released.get(label, label) for label in data["labels"]])
