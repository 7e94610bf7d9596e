"""Records of what results depend on."""

import json

import pytest
import torch
from tiny_models import tiny_model, tiny_texts

from pgseg_hf.run_records import differences, flat, is_same_run, model_record, read_record, weights_digest


def test_weights_by_their_values():
    model = tiny_model(npr_variant="released")
    before = weights_digest(model)
    with torch.no_grad():
        model.get_text_features(tiny_texts(2))
        assert weights_digest(model) == before, "texts are no change"
        assert weights_digest(tiny_model(npr_variant="released")) == before
        assert weights_digest(tiny_model(npr_variant="released").half()) != before
        model.logit_scale += 1e-6
    assert weights_digest(model) != before


def test_a_record_is_json_and_names_no_place(tiny_segmenter, tiny_folder):
    record = model_record(tiny_segmenter)
    assert json.loads(json.dumps(record)) and tiny_folder not in json.dumps(record)
    assert differences(json.loads(json.dumps(record)), record) == []
    other = {**record, "processor": {**record["processor"], "top_k": 1}}
    (change,) = differences(json.loads(json.dumps(record)), other)
    assert change == f"processor.top_k was {tiny_segmenter.processor.top_k} and is 1"


def test_differences_have_both_values():
    known = {"a": {"b": [1, 2], "c": None}, "d": "x" * 1000, "e": 1}
    wanted = {"a": {"b": (1, 2), "c": 0.5}, "d": "y", "f": True}
    a, d, e, f = differences(known, wanted)
    assert (a, e, f) == (
        "a.c was None and is 0.5",
        "e was 1 and is None",
        "f was None and is True",
    )
    assert d.startswith("d was 'xxx") and d.endswith("xxx... and is 'y'") and len(d) < 400
    assert differences({"a": {}}, {"a": {"x": ""}}) == ["a.x was None and is ''"]
    assert flat({"a": {"b": {"c": (1, 2)}, "d": {}}, "e": 3}) == {"a.b.c": [1, 2], "a.d": {}, "e": 3}


def test_a_run_is_the_same_or_refused_with_what_differs(tmp_path):
    path = tmp_path / "run.json"
    assert is_same_run(path, {"a": 1}, "Go.") is None
    path.write_text('{"a": 1, "b": [2]}')
    assert is_same_run(path, {"a": 1, "b": (2,)}, "Go.") is True
    with pytest.raises(ValueError, match=f"{tmp_path.name} contains .* a was 1 and is 2.* Go."):
        is_same_run(path, {"a": 2, "b": (2,)}, "Go.")
    assert is_same_run(path, {"a": 2, "b": (2,)}, "Go.", overwrite=True) is False


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_what_is_no_record(tmp_path, content):
    assert read_record(tmp_path / "absent.json") is None
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"run.json cannot be read: .*; choose another output folder"):
        read_record(tmp_path / "run.json")
