"""Records of what a run depends on: independent of saving and paths, sensitive to contents."""

from pathlib import Path

from tiny_models import tiny_config, tiny_model

from pgseg_hf import PGSegModel, default_tokenizer
from pgseg_hf.run_records import config_fields, differences, vocabulary_of
from pgseg_hf.training.continuing import hash_of_files


def test_configurations_are_the_same_wherever_they_come_from(tmp_path):
    model = tiny_model()
    fields = config_fields(model.config)
    model.save_pretrained(tmp_path / "saved")
    model.set_attn_implementation("eager")
    loaded = PGSegModel.from_pretrained(tmp_path / "saved", dtype="bfloat16")
    assert (
        differences(fields, config_fields(model.config))
        == differences(fields, config_fields(loaded.config))
        == []
    )
    other = tiny_config(vision_config={"prototype_momentum": 0.5}, contrastive_loss="sigmoid")
    assert differences(fields, config_fields(other)) == [
        "contrastive_loss was 'info_nce' and is 'sigmoid'",
        f"vision_config.prototype_momentum was {fields['vision_config.prototype_momentum']} and is 0.5",
    ]


def test_vocabularies_and_files_by_their_contents(tmp_path):
    tokenizer, other = default_tokenizer(), default_tokenizer()
    assert vocabulary_of(tokenizer) == vocabulary_of(other)
    other.add_tokens(["dachshund"])
    assert vocabulary_of(tokenizer) != vocabulary_of(other)
    for name in ("one", "two"):
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "inner" / "weights").write_bytes(b"1")
    assert hash_of_files(tmp_path / "one") == hash_of_files(tmp_path / "two")
    (tmp_path / "two" / "inner" / "weights").write_bytes(b"2")
    assert hash_of_files(tmp_path / "one") != hash_of_files(tmp_path / "two")
    assert hash_of_files(Path("absent")) is None
