"""Arguments from the command line and from YAML, and the settings files shipped in examples."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from pgseg_hf import PGSegConfig
from pgseg_hf.training.arguments import parse_arguments

EXAMPLES = Path(__file__).parents[2] / "examples"


def written(tmp_path, text):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    return str(path)


def test_options_override_the_file(tmp_path):
    path = written(
        tmp_path,
        "output_dir: run\nmax_steps: 100\nlearning_rate: 1e-3\nweight_decay: 0\ncrop_sides: [24, 96]\n"
        "gradient_checkpointing: true\nmodel_config: {projection_dim: 32}\n"
        "sources:\n- {path: synthetic, weight: 2}\n- path: photos\n  tags_column: words\n",
    )
    model, data, run = parse_arguments([path, "--max_steps", "7", "--torch_compile"])
    assert (run.max_steps, run.learning_rate, run.weight_decay) == (7, 1e-3, 0.0)
    assert (model.gradient_checkpointing, model.torch_compile) == (True, True)
    assert model.model_config == {"projection_dim": 32}
    assert data.crop_sides == [24, 96]
    assert [(spec.path, spec.weight, spec.tags_column) for spec in data.source_specs()] == [
        ("synthetic", 2, None),
        ("photos", 1.0, "words"),
    ]


def test_yaml_as_people_write_it(tmp_path):
    text = "output_dir: run\nmax_steps: 3\nmixed_precision: no\nreport_to: [tensorboard, wandb]\ncrop_sides: 16\n"
    _, data, run = parse_arguments([written(tmp_path, text + "data: photos\n")])
    assert (run.mixed_precision, run.report_to, data.crop_sides) == ("no", "tensorboard,wandb", [16])
    assert [spec.path for spec in data.source_specs()] == ["photos"]
    _, data, _ = parse_arguments([written(tmp_path, text + "sources: {path: a, weight: 1e0}\n")])
    assert [(spec.path, spec.weight) for spec in data.source_specs()] == [("a", 1.0)]
    _, data, _ = parse_arguments([written(tmp_path, text + "sources: [{path: a}]\n"), "--data", "b"])
    assert [spec.path for spec in data.source_specs()] == ["b"]


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("num_epochs: 3", ["--max_steps", "7"], {"max_steps": 7, "num_epochs": None}),
        ("num_epochs: 3", ["--max-steps=7"], {"max_steps": 7, "num_epochs": None}),
        ("max_steps: 7", ["--num_epochs", "2"], {"max_steps": None, "num_epochs": 2.0}),
        ("max_steps: 7\nsources: [{path: a}]", ["--data=b"], {"data": ["b"], "sources": None}),
        ("max_steps: 7\nsources: [{path: a}]", ["--output_dir", "data"], {"sources": [{"path": "a"}]}),
        (
            "max_steps: 7\nbackbone_name_or_path: a",
            ["--model_name_or_path", "b"],
            {"backbone_name_or_path": None},
        ),
        (
            "max_steps: 7\nbackbone_name_or_path: a",
            ["--text_name_or_path", "b"],
            {"backbone_name_or_path": "a"},
        ),
    ],
)
def test_the_command_line_wins_over_options_of_the_same_meaning(tmp_path, text, options, expected):
    parsed = parse_arguments([written(tmp_path, f"output_dir: run\n{text}\n"), *options])
    found = {name: getattr(part, name) for part in parsed for name in expected if hasattr(part, name)}
    assert found == expected


def test_unknown_options_name_the_nearest(tmp_path):
    with pytest.raises(ValueError, match=r"--max_step \(did you mean max_steps\?\), 3"):
        parse_arguments(["--output_dir", "run", "--max_step", "3"])
    with pytest.raises(ValueError, match=r"lerning_rate \(did you mean learning_rate\?\)"):
        parse_arguments([written(tmp_path, "output_dir: run\nmax_steps: 3\nlerning_rate: 1\n")])


def test_help_is_short_at_the_top_and_in_groups(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    shown = capsys.readouterr().out
    assert "[FILE.yaml] [--option value ...]" in shown.splitlines()[0]
    places = [shown.index(f"\n{group}:") for group in ("model", "data", "training, evaluation and results")]
    assert places == sorted(places)
    assert places[1] < shown.index("--image_column") < places[2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_steps: 3\n", "output_dir is missing"),
        ("output_dir: run\n", "max_steps is None and num_epochs is None"),
        ("output_dir: run\nmax_steps: 3\nnum_epochs: 1\n", "max_steps is 3 and num_epochs is 1"),
        ("output_dir: run\nmax_steps: -3\n", "max_steps is -3, expected a positive number"),
        ("output_dir: run\nmax_steps: 3\nwarmup_ratio: 1\n", "warmup_ratio is 1"),
        ("output_dir: run\nmax_steps: 3\nbatch_size: 1\n", "batch_size is 1, expected"),
        ("output_dir: run\nmax_step: 3\n", "unknown options: max_step"),
        ("- 1\n", "list, expected a mapping"),
        ("a: [\n", "cannot be read as YAML"),
        ("[" * 100_000, "cannot be read as YAML"),
    ],
)
def test_files_that_make_no_sense(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments([written(tmp_path, text)])


def test_values_of_a_wrong_type_end_with_a_message(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_arguments([written(tmp_path, "output_dir: run\nmax_steps: many\n")])
    assert "invalid int value: 'many'" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"absent\.yaml cannot be read"):
        parse_arguments(["absent.yaml"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "either data .* or sources"),
        ("data: [a]\nsources: [{path: b}]\n", "either data .* or sources"),
        ("sources: [photos]\n", "source 'photos' must be a mapping"),
        ("sources: [{weight: 1}]\n", "a mapping with a path"),
        ("sources: [{path: a, width: 1}]\n", "fields .*caption_column"),
    ],
)
def test_sources_that_make_no_sense(tmp_path, text, message):
    _, data, _ = parse_arguments([written(tmp_path, "output_dir: run\nmax_steps: 3\n" + text)])
    with pytest.raises(ValueError, match=message):
        data.source_specs()


@pytest.mark.parametrize("path", sorted((EXAMPLES / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_settings(path):
    model, data, run = parse_arguments([str(path), "--data", "photos", "--output_dir", "run"])
    assert run.output_dir == "run"
    assert data.source_specs()
    PGSegConfig(**(model.model_config or {}))


@pytest.mark.parametrize("path", sorted((EXAMPLES / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_accelerate_settings(path):
    settings = load_config_from_file(str(path))
    assert settings.num_processes >= 1
    assert settings.mixed_precision in ("no", "bf16")
