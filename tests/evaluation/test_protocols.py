"""Protocols: the published numbers, files of one's own, and that the segmenter does what they say."""

from dataclasses import fields, replace

import pytest
import yaml
from tiny_models import make_photo

from pgseg_hf.evaluation import MaskDataset
from pgseg_hf.evaluation.benchmarks.catalogue import BENCHMARKS
from pgseg_hf.evaluation.metrics.refinement import PixelAdaptiveRefinement
from pgseg_hf.evaluation.protocols import PROTOCOLS, Protocol, load_protocol

# The released configurations' values; the unified protocol has one for all.
THRESHOLDS = {
    "pgseg": {
        "voc": 0.95,
        "context": 0.36,
        "coco_object": 0.85,
        "imagenet_s50": 0.11,
        "imagenet_s300": 0.11,
        "imagenet_s919": 0.11,
        "lvis": 0.35,
    },
    "groupvit": {"voc": 0.95, "context": 0.35, "coco_object": 0.95},
    "unified": dict.fromkeys(
        (
            "voc",
            "context",
            "coco_object",
            "imagenet_s50",
            "imagenet_s300",
            "imagenet_s919",
            "lvis",
        ),
        0.5,
    ),
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
    def test_their_names(self):
        assert set(PROTOCOLS) == set(THRESHOLDS)
        for name, protocol in PROTOCOLS.items():
            assert load_protocol(name) is protocol
            assert protocol.name == name and protocol.source

    @pytest.mark.parametrize(
        ("name", "benchmark", "threshold"),
        [(name, *pair) for name, values in THRESHOLDS.items() for pair in values.items()],
    )
    def test_thresholds(self, name, benchmark, threshold):
        assert load_protocol(name).threshold(benchmark, data_of(benchmark)) == threshold

    @pytest.mark.parametrize("name", THRESHOLDS)
    @pytest.mark.parametrize("benchmark", WITHOUT_BACKGROUND)
    def test_no_threshold_without_a_background(self, name, benchmark):
        assert load_protocol(name).threshold(benchmark, data_of(benchmark)) is None

    @pytest.mark.parametrize(
        ("name", "benchmark"),
        [("groupvit", "lvis"), ("groupvit", "imagenet_s50"), ("checkpoint", "voc"), ("checkpoint", "lvis")],
    )
    def test_a_threshold_that_is_not_there(self, name, benchmark):
        with pytest.raises(
            ValueError, match=f"protocol {name} has no background threshold for {benchmark}; give one"
        ):
            load_protocol(name).threshold(benchmark, data_of(benchmark))

    def test_a_folder_needs_no_threshold(self):
        data = MaskDataset("own", ["none", "cat"], [], background=0)
        assert load_protocol("checkpoint").threshold("folder", data) is None
        assert load_protocol("unified").threshold("folder", data) == 0.5
        assert load_protocol("unified").threshold("folder", replace(data, background=None)) is None

    @pytest.mark.parametrize("name", ["pgseg", "groupvit", "unified"])
    def test_sizes_windows_and_templates(self, name):
        options = load_protocol(name).segmentation(0.5, batch_size=3)
        assert (options.shortest_edge, options.longest_edge) == (448, 2048)
        assert (options.window_size, options.window_stride) == (448, 224)
        assert options.templates == ("a photo of a {}.",)
        assert (options.top_k, options.background_threshold, options.batch_size) == (5, 0.5, 3)
        assert load_protocol(name).make_refinement() is None
        assert load_protocol(name).synonyms == "none"

    def test_all_but_the_thresholds_agree(self):
        common = {"name": "", "source": "", "background_threshold": None, "background_thresholds": {}}
        first, *others = (replace(PROTOCOLS[name], **common) for name in ("pgseg", "groupvit", "unified"))
        assert others == [first, first]

    def test_refinement(self):
        protocol = replace(PROTOCOLS["pgseg"], refinement="pamr")
        assert isinstance(protocol.make_refinement(), PixelAdaptiveRefinement)


class TestFiles:
    @pytest.mark.parametrize("name", THRESHOLDS)
    def test_a_protocol_survives_a_file(self, tmp_path, name):
        changed = replace(
            PROTOCOLS[name],
            name="mine",
            templates=("a photo of a {}.", "a {} in the dark."),
            synonyms="merge",
            top_k=7,
            refinement="pamr",
        )
        path = written(tmp_path, changed.to_dict())
        assert load_protocol(path) == changed
        with pytest.raises(ValueError, match=f"name is '{name}', which is that of another protocol"):
            load_protocol(written(tmp_path, replace(changed, name=name).to_dict()))
        assert Protocol(**changed.to_dict()) == changed
        assert set(changed.to_dict()) == {field.name for field in fields(Protocol)}

    @pytest.mark.parametrize("base", [None, "pgseg", "groupvit", "unified", "checkpoint"])
    def test_what_is_not_said_is_that_of_the_base(self, tmp_path, base):
        content = {"stride": 112, **({"base": base} if base else {})}
        found = load_protocol(written(tmp_path, content, "fine.yaml"))
        assert (found.name, found.source, found.stride) == ("fine", "fine.yaml", 112)
        expected = PROTOCOLS[base or "pgseg"]
        assert replace(found, name=expected.name, source=expected.source, stride=expected.stride) == expected

    def test_a_file_may_give_a_name_and_a_source(self, tmp_path):
        found = load_protocol(written(tmp_path, {"name": "ours", "source": "our paper", "window": None}))
        assert (found.name, found.source, found.window) == ("ours", "our paper", None)

    def test_thresholds_are_added_to_the_bases_unless_one_is_for_all(self, tmp_path):
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump({"background_thresholds": {"voc": 0.7}}))
        assert load_protocol(str(path)).background_thresholds == {
            **PROTOCOLS["pgseg"].background_thresholds,
            "voc": 0.7,
        }
        path.write_text(yaml.safe_dump({"background_threshold": 0.4, "background_thresholds": {"voc": 0.7}}))
        changed = load_protocol(str(path))
        assert (changed.background_threshold, changed.background_thresholds) == (0.4, {"voc": 0.7})

    def test_thresholds_of_a_file(self, tmp_path):
        content = {"base": "unified", "background_threshold": 0.4, "background_thresholds": {"voc": 0.7}}
        found = load_protocol(written(tmp_path, content))
        assert found.threshold("voc", data_of("voc")) == 0.7
        assert found.threshold("context", data_of("context")) == 0.4

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"windows": 3, "strid": 2}, "unknown fields strid, windows, expected some of .*window"),
            ({"base": "mine"}, "base is 'mine', expected one of pgseg, groupvit, unified, checkpoint"),
            ({"base": ["pgseg"]}, "base is"),
            ({"background_threshold": 1.5}, "a background threshold is 1.5, expected a number from 0 to 1"),
            ({"background_thresholds": {"voc": -0.1}}, "a background threshold is -0.1"),
            ({"background_thresholds": {"voc": "high"}}, "is no protocol"),
            ({"background_thresholds": 0.5}, "is no protocol"),
            ({"background_thresholds": {"pascal": 0.5}}, "for pascal, which are no benchmarks"),
            ({"refinement": "crf"}, "refinement is 'crf', expected one of none, pamr"),
            ({"synonyms": "all"}, "synonyms is 'all', expected none, average or merge"),
            ({"templates": ["a photo"]}, r"templates\[0\] must hold '\{\}' exactly once"),
            ({"templates": "a photo of a {}."}, "templates must be a list of strings"),
            ({"templates": []}, "no templates"),
            ({"window": 0}, "window_size is 0, expected a whole number of at least 1"),
            ({"window": "whole"}, "window_size is 'whole'"),
            ({"stride": 1.5}, "window_stride is 1.5"),
            ({"shortest_edge": "448"}, "shortest_edge is '448'"),
            ({"top_k": 0}, "top_k is 0"),
            ("- a\n- b\n", "it holds no fields"),
            ("", "it holds no fields"),
            ("a: [", "is no protocol"),
        ],
    )
    def test_files_that_make_no_sense(self, tmp_path, content, message):
        with pytest.raises(ValueError, match=message) as caught:
            load_protocol(written(tmp_path, content))
        assert "mine.yml is no protocol" in str(caught.value)

    def test_a_file_cannot_make_objects(self, tmp_path):
        path = written(tmp_path, f"name: !!python/object/apply:os.mkdir ['{tmp_path}/made']\n")
        with pytest.raises(ValueError, match="is no protocol"):
            load_protocol(path)
        assert not (tmp_path / "made").exists()

    def test_no_such_protocol(self, tmp_path):
        message = "expected one of pgseg, groupvit, unified, checkpoint or a YAML file"
        with pytest.raises(ValueError, match=f"protocol is 'tcl', {message}"):
            load_protocol("tcl")
        with pytest.raises(ValueError, match=message):
            load_protocol(str(tmp_path / "absent.yml"))


class TestWhatTheSegmenterDoes:
    """The tiny segmenter was saved with a short side of 64, windows of 64 and a stride of 32."""

    def encoded(self, segmenter, protocol, size=(120, 90)):
        (image,) = segmenter.encode([make_photo(*size)], protocol.segmentation(None))
        return image

    def test_the_checkpoints_sizes(self, tiny_segmenter):
        found = self.encoded(tiny_segmenter, PROTOCOLS["checkpoint"])
        assert (found.size, found.resized) == ((90, 120), (64, 85))
        assert [(window.top, window.left) for window in found.windows] == [(0, 0), (0, 21)]
        assert {tuple(window.groups.shape) for window in found.windows} == {(64, 64)}

    def test_the_checkpoint_protocol_is_the_segmenters_own_way(self, tiny_segmenter):
        photo, labels = make_photo(), ["cat", "grass", "sky"]
        options = PROTOCOLS["checkpoint"].segmentation(0.1)
        own = tiny_segmenter(photo, labels, replace(tiny_segmenter.options, background_threshold=0.1))
        assert (tiny_segmenter(photo, labels, options).label_map == own.label_map).all()

    @pytest.mark.parametrize("edge", [32, 48])
    def test_another_short_side(self, tiny_segmenter, edge):
        protocol = replace(PROTOCOLS["pgseg"], shortest_edge=edge, window=32, stride=16)
        found = self.encoded(tiny_segmenter, protocol)
        assert found.resized == (edge, round(edge * 120 / 90))
        assert {tuple(window.groups.shape) for window in found.windows} == {(32, 32)}
        # Of 48 x 64 pixels: rows at 0 and 16, columns at 0, 16 and 32.
        assert len(found.windows) == {32: 2, 48: 6}[edge]

    def test_the_long_side_is_limited(self, tiny_segmenter):
        protocol = replace(PROTOCOLS["pgseg"], shortest_edge=32, longest_edge=64, window=None)
        found = self.encoded(tiny_segmenter, protocol, size=(120, 40))
        assert found.resized == (21, 64)
        unlimited = replace(protocol, longest_edge=None)
        assert self.encoded(tiny_segmenter, unlimited, size=(120, 40)).resized == (32, 96)

    def test_the_whole_picture_is_one_window(self, tiny_segmenter):
        found = self.encoded(tiny_segmenter, replace(PROTOCOLS["checkpoint"], window=None))
        assert [tuple(window.groups.shape) for window in found.windows] == [(64, 85)]
