"""Protocols: published values, custom files, and their effect on the segmenter."""

from dataclasses import replace

import pytest
import yaml
from tiny_models import make_photo

from pgseg_hf.evaluation import MaskDataset
from pgseg_hf.evaluation.benchmarks.catalogue import BENCHMARKS
from pgseg_hf.evaluation.protocols import PROTOCOLS, load_protocol

# Values of the released configurations; the unified protocol has a single value.
IMAGENET_S = ("imagenet_s50", "imagenet_s300", "imagenet_s919")
THRESHOLDS = {
    "pgseg": {
        "voc": 0.95,
        "context": 0.36,
        "coco_object": 0.85,
        "lvis": 0.35,
        **dict.fromkeys(IMAGENET_S, 0.11),
    },
    "groupvit": {"voc": 0.95, "context": 0.35, "coco_object": 0.95},
    "unified": dict.fromkeys(("voc", "context", "coco_object", "lvis", *IMAGENET_S), 0.5),
    "checkpoint": {},
}
WITHOUT_BACKGROUND = ("voc20", "context59", "coco_stuff", "ade20k", "cityscapes")


def data_of(benchmark):
    return BENCHMARKS[benchmark].over([], benchmark)


def written(tmp_path, content, name="mine.yml"):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(path)


class TestNamedProtocols:
    @pytest.mark.parametrize("name", THRESHOLDS)
    def test_thresholds(self, name):
        protocol = load_protocol(name)
        assert protocol is PROTOCOLS[name] and protocol.name == name and protocol.source
        for benchmark in BENCHMARKS:
            if benchmark in WITHOUT_BACKGROUND or benchmark in THRESHOLDS[name]:
                expected = THRESHOLDS[name].get(benchmark)
                assert protocol.threshold(benchmark, data_of(benchmark)) == expected
                continue
            with pytest.raises(ValueError, match=f"protocol {name} has no .*threshold for {benchmark}"):
                protocol.threshold(benchmark, data_of(benchmark))

    def test_a_folder_needs_no_threshold(self):
        data = MaskDataset("own", ["none", "cat"], [], background=0)
        assert load_protocol("checkpoint").threshold("folder", data) is None
        assert load_protocol("unified").threshold("folder", data) == 0.5
        assert load_protocol("unified").threshold("folder", replace(data, background=None)) is None

    @pytest.mark.parametrize("name", ["pgseg", "groupvit", "unified"])
    def test_sizes_windows_and_templates(self, name):
        expected = {"shortest_edge": 448, "longest_edge": 2048, "window": 448, "stride": 224, "top_k": 5}
        expected |= {"templates": ("a photo of a {}.",), "patch_weight": 0.0, "class_names": "released"}
        assert expected.items() <= PROTOCOLS[name].to_dict().items()
        assert (PROTOCOLS[name].refinement, PROTOCOLS[name].synonyms) == ("none", "none")


class TestFiles:
    @pytest.mark.parametrize("name", THRESHOLDS)
    def test_a_protocol_survives_a_file(self, tmp_path, name):
        changed = PROTOCOLS[name].changed(
            {
                "name": "mine",
                "templates": ["a photo of a {}.", "a {} in the dark."],
                "synonyms": "merge",
                "refinement": "pamr",
                "window": None,
                "shortest_edge": 320,
                "longest_edge": None,
                "top_k": 3,
                "background_threshold": 0.3,
                "background_thresholds": {"voc": 0.7, "folder": 0.2},
            }
        )
        assert load_protocol(written(tmp_path, changed.to_dict())) == changed
        with pytest.raises(ValueError, match=f"name is '{name}'"):
            load_protocol(written(tmp_path, replace(changed, name=name).to_dict()))

    def test_edges(self, tmp_path):
        for content, edges in (
            ({"base": "checkpoint", "shortest_edge": 320}, (320, 2048)),
            ({"base": "checkpoint"}, (None, None)),
            ({"shortest_edge": None}, (None, None)),
            ({"shortest_edge": 320, "longest_edge": None}, (320, None)),
            ({"longest_edge": 1000}, (448, 1000)),
        ):
            found = load_protocol(written(tmp_path, content)).segmentation
            assert (found.shortest_edge, found.longest_edge) == edges

    @pytest.mark.parametrize("base", [None, "pgseg", "groupvit", "unified", "checkpoint"])
    def test_what_is_not_said_is_that_of_the_base(self, tmp_path, base):
        content = {"stride": 112, **({"base": base} if base else {})}
        found = load_protocol(written(tmp_path, content, "fine.yaml"))
        assert found.segmentation.window_stride == 112
        expected = PROTOCOLS[base or "pgseg"]
        assert found == expected.changed({"name": "fine", "source": "fine.yaml", "stride": 112})

    def test_thresholds_are_added_to_the_bases_unless_one_is_for_all(self, tmp_path):
        found = load_protocol(written(tmp_path, {"background_thresholds": {"voc": 0.7}}))
        assert found.background_thresholds == {**PROTOCOLS["pgseg"].background_thresholds, "voc": 0.7}
        content = {"background_threshold": 0.4, "background_thresholds": {"voc": 0.7}, "name": "ours"}
        found = load_protocol(written(tmp_path, content))
        assert (found.name, found.background_thresholds) == ("ours", {"voc": 0.7})
        assert found.threshold("voc", data_of("voc")) == 0.7
        assert found.threshold("context", data_of("context")) == 0.4

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"windows": 3, "strid": 2}, "unknown fields strid, windows, expected some of .*window"),
            ({"base": "mine"}, "base is 'mine', expected one of pgseg, groupvit, unified, checkpoint"),
            ({"base": ["pgseg"]}, "base is"),
            ({"background_threshold": 1.5}, "background_threshold is 1.5"),
            ({"background_thresholds": {"voc": -0.1}}, "background_thresholds.*-0.1"),
            ({"background_thresholds": {"voc": "high"}}, "not a valid protocol"),
            ({"background_thresholds": 0.5}, "not a valid protocol"),
            ({"background_thresholds": {"pascal": 0.5}}, "background_thresholds.*pascal"),
            ({"refinement": "crf"}, "refinement is 'crf'"),
            ({"synonyms": "all"}, "synonyms is 'all'"),
            ({"templates": ["a photo"]}, r"templates\[0\] .* '\{\}' exactly once"),
            ({"templates": "a photo of a {}."}, "templates must be a list of strings"),
            ({"templates": []}, "no templates"),
            ({"window": 0}, "window_size is 0, expected a whole number of at least 1"),
            ({"window": "whole"}, "window_size is 'whole'"),
            ({"stride": 1.5}, "window_stride is 1.5"),
            ({"shortest_edge": "448"}, "shortest_edge is '448'"),
            ({"top_k": 0}, "top_k is 0"),
            ("- a\n- b\n", "no fields"),
            ("", "no fields"),
            ("a: [", "not a valid protocol"),
        ],
    )
    def test_files_that_make_no_sense(self, tmp_path, content, message):
        with pytest.raises(ValueError, match=message) as caught:
            load_protocol(written(tmp_path, content))
        assert "mine.yml" in str(caught.value)

    def test_a_file_cannot_make_objects(self, tmp_path):
        path = written(tmp_path, f"name: !!python/object/apply:os.mkdir ['{tmp_path}/made']\n")
        with pytest.raises(ValueError, match="not a valid protocol"):
            load_protocol(path)
        assert not (tmp_path / "made").exists()

    def test_no_such_protocol(self, tmp_path):
        for name in ("tcl", str(tmp_path / "absent.yml")):
            with pytest.raises(ValueError, match=f"protocol is '{name}', expected one of pgseg"):
                load_protocol(name)


class TestWhatTheSegmenterDoes:
    """The tiny segmenter was saved with a short side of 64, windows of 64 and a stride of 32."""

    def encoded(self, segmenter, protocol, size=(120, 90)):
        (image,) = segmenter.encode([make_photo(*size)], protocol.segmentation)
        return image

    def test_the_checkpoints_sizes(self, tiny_segmenter):
        found = self.encoded(tiny_segmenter, PROTOCOLS["checkpoint"])
        assert (found.size, found.resized) == ((90, 120), (64, 85))
        assert [(window.top, window.left) for window in found.windows] == [(0, 0), (0, 21)]
        assert {tuple(window.groups.shape) for window in found.windows} == {(64, 64)}

    def test_the_checkpoint_protocol_is_the_segmenters_own_way(self, tiny_segmenter):
        photo, labels = make_photo(), ["cat", "grass", "sky"]
        options = replace(PROTOCOLS["checkpoint"].segmentation, background_threshold=0.1)
        own = tiny_segmenter(photo, labels, replace(tiny_segmenter.options, background_threshold=0.1))
        assert (tiny_segmenter(photo, labels, options).label_map == own.label_map).all()
