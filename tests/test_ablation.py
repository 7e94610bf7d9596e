"""The ablation example: its arithmetic on handmade records, and two variants from training to table."""

import json

import ablate_npr
import ablation_report
import numpy as np
import pytest
import yaml
from data_files import write_folder
from tiny_models import TINY_FIELDS

SETTINGS = {
    "data": "synthetic:train,size=32,length=50,with_tags=0",
    # No block after the last grouping, as in all CPU configurations.
    "model_config": TINY_FIELDS | {"vision_config": TINY_FIELDS["vision_config"] | {"depths": [1, 1, 0]}},
    "contrastive_loss": "multi_positive",
    "cpu": True,
    "short_side": 32,
    "batch_size": 4,
    "max_steps": 2,
    "learning_rate": 1e-3,
    "num_workers": 0,
    "log_steps": 1,
}


def record_of(variant, seed, mean_iou, recall=0.5):
    names = (*ablation_report.FIGURES, *ablation_report.GROUP_FIGURES, *ablation_report.RETRIEVAL)
    figures = dict.fromkeys(names, 0.25) | {"mean_iou": mean_iou, "recall@1": recall}
    log = [{"step": step, "contrastive": 2 / step, "eval_mean_iou": mean_iou} for step in (1, 2)]
    sets = {"test": figures, "novel": dict.fromkeys(names, 0.125)}
    return {"variant": variant, "seed": seed, "figures": sets, "log": log}


@pytest.fixture
def records():
    """Records with binary fractions as values, so that the table can be computed by hand."""
    return [
        record_of("none", 0, 0.25),
        record_of("none", 1, 0.5),
        record_of("none", 2, 0.5, recall=None),
        record_of("corrected", 0, 0.5),
        record_of("corrected", 1, 0.625),
    ]


def test_means_spreads_and_paired_differences(records):
    rows = ablation_report.summarize(
        [*records, record_of("ours", 1, 0.5), record_of("ours-no-matching", 1, 0.75)]
    )
    assert rows["ours"]["differences"]["test/mean_iou"] == {"mean": -0.125, "spread": None, "count": 1}
    assert rows["ours-no-matching"]["differences"]["test/mean_iou"]["mean"] == 0.25  # to `ours`
    assert rows["none"]["seeds"] == [0, 1, 2] and rows["corrected"]["seeds"] == [0, 1]
    figures, differences = rows["none"]["figures"], rows["none"]["differences"]
    # The mean of 1/4, 1/2, 1/2 is 5/12. Their squared deviations sum to 1/24, so the spread is (1/24 / 2) ** .5.
    expected = {"mean": pytest.approx(5 / 12), "spread": pytest.approx(48**-0.5), "count": 3}
    assert figures["test/mean_iou"] == expected
    # Differences -1/4 and -1/8; seed 2 has no partner.
    expected = {"mean": -0.1875, "spread": pytest.approx(0.0625 * 2**0.5), "count": 2}
    assert differences["test/mean_iou"] == expected
    assert figures["test/recall@1"] == {"mean": 0.5, "spread": 0.0, "count": 2}
    assert rows["corrected"]["differences"]["test/mean_iou"] == {"mean": 0.0, "spread": 0.0, "count": 2}
    rows = ablation_report.summarize([record_of("none", 0, None), record_of("corrected", 1, 0.5)])
    assert rows["none"]["figures"]["test/mean_iou"] == {"mean": None, "spread": None, "count": 0}
    assert rows["none"]["differences"]["test/purity"]["count"] == 0  # of another seed
    assert rows["corrected"]["figures"]["test/mean_iou"] == {"mean": 0.5, "spread": None, "count": 1}


def test_results_are_made_of_the_records_alone(records, tmp_path, capsys):
    for record in records:
        path = tmp_path / "records" / f"{record['variant']}-seed{record['seed']}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(record))
    assert ablate_npr.main(["--output", str(tmp_path), "--table"]) == 0
    assert json.loads((tmp_path / "table.json").read_text()) == ablation_report.summarize(records)
    text = (tmp_path / "table.md").read_text()
    assert text in capsys.readouterr().out
    assert "| variant | seeds | mIoU | foreground iou |" in text
    assert "| none | 3 | 0.417 ± 0.144 | 0.250 ± 0.000 |" in text
    assert "| none | 2 | -0.188 ± 0.088 | +0.000 ± 0.000 |" in text
    assert "| none | 3 | 0.125 ± 0.000 |" in text.split("Novel scenes")[1]
    assert text.count("| corrected |") == 3  # not in the table of differences to itself
    assert ablate_npr.main(["--output", str(tmp_path), "--table", "--variants", "none"]) == 0
    shown = capsys.readouterr().out
    assert "| none | 2 | -0.188" in shown and "| corrected |" not in shown  # differences to what is not shown
    with pytest.raises(ValueError, match=r"has no records of untrained, none, .*; run without --table first"):
        ablate_npr.main(["--output", str(tmp_path / "empty"), "--table"])


def test_changes_of_variants_are_put_into_the_configuration(tmp_path):
    config = tmp_path / "settings.yaml"
    config.write_text(yaml.safe_dump(SETTINGS))
    ablation = ablate_npr.Ablation(tmp_path, config, steps=3, scenes=2)
    plain = SETTINGS["model_config"]
    assert ablation.settings_of("corrected") == SETTINGS | {"max_steps": 3, "threads": 1}
    changed = ablation.settings_of("no-momentum")["model_config"]
    assert changed["vision_config"] == plain["vision_config"] | {"prototype_momentum": 1.0}
    assert ablation.settings_of("none")["model_config"] == plain | {"npr_variant": "none"}
    assert ablation.settings_of("corrected")["model_config"] == plain  # nothing leaks from one to the next


def test_a_record_of_other_data_or_scenes_is_refused_and_of_other_versions_said(tmp_path, capsys):
    config = tmp_path / "settings.yaml"
    photos = write_folder(
        tmp_path / "photos", [{"file_name": f"{n}.png", "caption": f"photo {n}"} for n in range(4)]
    )
    config.write_text(yaml.safe_dump(SETTINGS | {"data": photos}))

    def ablation():
        return ablate_npr.Ablation(tmp_path, config, scenes=2)

    known = ablation()
    versions = ablate_npr._versions()
    record = {"depends_on": known.depends_on("corrected"), "versions": versions | {"numpy": "1.0"}}
    ablate_npr.write_json(record, known.record_path("corrected", 0))
    assert ablation().is_done("corrected", 0) and not known.is_done("corrected", 1)
    assert f"from other versions: numpy was '1.0' and is '{np.__version__}'" in capsys.readouterr().err
    (tmp_path / "photos" / "1.png").write_bytes((tmp_path / "photos" / "2.png").read_bytes())
    with pytest.raises(ValueError, match=r"contents of the sources was .* and is"):
        ablation().is_done("corrected", 0)


def test_scenes_to_measure_on_are_not_those_of_training():
    scenes = ablate_npr.make_scenes("test", 32, 5)
    again = ablate_npr.make_scenes("test", 32, 5)
    curve = ablate_npr.make_scenes("test", 32, 5, ablate_npr.CURVE_SEED)
    novel = ablate_npr.make_scenes("novel", 32, 5)
    images = [np.asarray(image).tobytes() for each in (scenes, curve, novel) for image in each.images]
    assert len(set(images)) == 15
    assert scenes.captions == again.captions and all(" on " in caption for caption in scenes.captions)


def test_equal_captions_stand_for_each_other(tiny_segmenter):
    scenes = ablate_npr.make_scenes("test", 64, 4)
    scenes.captions = ["a circle"] * 4
    assert ablate_npr.retrieval(tiny_segmenter, scenes) == {"recall@1": 1.0, "recall@5": 1.0}


@pytest.mark.slow
def test_variants_from_training_to_table(tmp_path, capsys):
    config, output = tmp_path / "settings.yaml", tmp_path / "ablation"
    config.write_text(yaml.safe_dump(SETTINGS))
    command = ["--output", str(output), "--config", str(config), "--scenes", "4", "--seeds", "0"]
    variants = ["untrained", "no-matching"]
    assert ablate_npr.main([*command, "--variants", *variants]) == 0
    untrained, record = ablate_npr.read_records(output)
    assert (record["seed"], record["steps"], record["changes"]) == (0, 2, {"prototype_matching": "order"})
    assert record["settings"]["model_config"]["prototype_matching"] == "order"
    assert [line["step"] for line in record["log"] if "contrastive" in line] == [1, 2]
    assert [line["step"] for line in record["log"] if "eval_oracle_mean_iou" in line] == [1, 2]
    assert 0 <= record["figures"]["novel"]["oracle_mean_iou"] <= 1
    assert untrained["steps"] == 0 and untrained["log"] == []
    assert {file.name for file in output.iterdir()} >= {"records", "table.md", "table.json"}
    before = {path: path.stat().st_mtime_ns for path in (output / "records").iterdir()}
    assert ablate_npr.main([*command, "--variants", *variants]) == 0, "a record is not made twice"
    assert {path: path.stat().st_mtime_ns for path in (output / "records").iterdir()} == before
    with pytest.raises(ValueError, match=r"settings.max_steps was 2 and is 3.*--output"):
        ablate_npr.main([*command, "--variants", "no-matching", "--steps", "3"])
    capsys.readouterr()

    # A failed run is named, and the others continue.
    config.write_text(yaml.safe_dump(SETTINGS | {"data": "synthetic:val"}))
    command[1] = str(tmp_path / "failing")
    assert ablate_npr.main([*command, "--variants", "corrected", "untrained"]) == 1
    assert "corrected, seed 0: " in capsys.readouterr().err
    failed = tmp_path / "failing" / "failed" / "corrected-seed0.txt"
    assert "option 'val'" in failed.read_text()
    assert [path.name for path in failed.parents[1].glob("records/*")] == ["untrained-seed0.json"]
