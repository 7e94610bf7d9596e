"""Limits of a request."""

import os
import threading
import time

import numpy as np
import pytest
import torch
from limits import MAX_MAP_ENTRIES, map_size, resampled, time_limit, watch


class TestTime:
    @pytest.fixture
    def model(self):
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        watch(model)
        return model

    def test_a_pass_stops_where_the_time_is_over(self, model):
        model(torch.zeros(2))
        with time_limit(60):
            model(torch.zeros(2))
        model[0].register_forward_hook(lambda *_: time.sleep(0.06))
        reached = []
        model[1].register_forward_pre_hook(lambda *_: reached.append(1))
        with pytest.raises(ValueError, match=r"longer than the 0.05 seconds"), time_limit(0.05):
            model(torch.zeros(2))
        assert reached == []
        model(torch.zeros(2))  # no limit outside the context
        assert reached == [1]

    def test_others_have_their_own_time(self, model):
        answers = []
        with time_limit(0):
            other = threading.Thread(target=lambda: answers.append(model(torch.zeros(2))))
            other.start()
            other.join()
        assert len(answers) == 1


class TestMapSize:
    def test_171_labels_on_a_common_photo_keep_their_detail(self):
        assert map_size((1024, 1536), 170) == (1024, 1536)
        assert map_size((3024, 4032), 21) == (3024, 4032)

    @pytest.mark.parametrize(
        ("size", "count"), [((4000, 4000), 300), ((1, 16_000_000), 300), ((4000, 3000), 24)]
    )
    def test_more_is_made_smaller_in_the_same_shape(self, size, count):
        height, width = map_size(size, count)
        assert height * width * count <= max(MAX_MAP_ENTRIES, width * count)
        if min(height, width) > 1:
            assert height * width * count > 0.99 * MAX_MAP_ENTRIES
            assert height / width == pytest.approx(size[0] / size[1], rel=0.01)


def test_resampling_takes_values_of_the_map():
    values = np.array([[1, 2], [3, 4]])
    assert resampled(values, (2, 2)) is values
    assert resampled(values, (4, 3)).tolist() == [[1, 1, 2], [1, 1, 2], [3, 3, 4], [3, 3, 4]]
    assert resampled(resampled(values, (6, 6)), (2, 2)).tolist() == values.tolist()


def test_old_files_of_visitors_go_and_examples_stay(tmp_path):
    pytest.importorskip("gradio", reason="needs pip install pgseg-hf[demo]")
    from app import _keep_clean

    (tmp_path / "example.jpg").write_bytes(b"ours")
    _keep_clean(tmp_path, keep_seconds=5)
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "photo.jpg").write_bytes(b"theirs")
    long_ago = time.time() - 60
    for path in (tmp_path / "old" / "photo.jpg", tmp_path / "example.jpg"):
        os.utime(path, (long_ago, long_ago))
    until = time.monotonic() + 30
    while (tmp_path / "old" / "photo.jpg").exists() and time.monotonic() < until:
        time.sleep(0.1)
    assert sorted(path.name for path in tmp_path.rglob("*.jpg")) == ["example.jpg", "photo.jpg"]
    assert (tmp_path / "new" / "photo.jpg").exists() and not (tmp_path / "old" / "photo.jpg").exists()
