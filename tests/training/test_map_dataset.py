"""`RecordDataset`, alone and with the Trainer of Transformers."""

import pytest
import torch
from tiny_models import make_photo
from train_with_trainer import train

from pgseg_hf import load_segmenter
from pgseg_hf.data.records import Record, UnusableRecord
from pgseg_hf.training.batches.map_dataset import RecordDataset


class Records:
    name = "some records"

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return Record(image="", tags=[str(index)])


def tag_and_number(record, rng):
    if record.tags in (["1"], ["3"]):
        raise UnusableRecord("broken image", f"record {record.tags[0]} is broken")
    return record.tags[0], rng.integers(1_000_000)


def test_items_are_random_views_of_their_records():
    dataset = RecordDataset(Records(), tag_and_number)
    torch.manual_seed(0)
    first = [dataset[0] for _ in range(3)]
    torch.manual_seed(0)
    assert [dataset[0] for _ in range(3)] == first
    assert {tag for tag, _ in first} == {"0"}
    assert len({number for _, number in first}) == 3
    with pytest.raises(IndexError):
        dataset[4]


def test_another_record_stands_in_for_a_broken_one():
    dataset = RecordDataset(Records(), tag_and_number)
    assert {dataset[1][0] for _ in range(20)} == {"0", "2"}

    def fail(record, rng):
        raise UnusableRecord("no text", "nothing to read")

    with pytest.raises(ValueError, match=r"100 records of some records .*: nothing to read"):
        RecordDataset(Records(), fail)[0]


def test_the_trainer_example(tmp_path, photo_folder):
    trainer = train(str(photo_folder), str(tmp_path / "out"), steps=10, batch_size=3)
    logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(logged) == 1
    assert 0 < logged[0] < 20
    before, after = load_segmenter().model, load_segmenter(str(tmp_path / "out")).model
    assert after.config.contrastive_loss == "multi_positive"
    assert not torch.equal(before.logit_scale, after.logit_scale)
    assert not torch.equal(
        before.vision_model.encoder.stages[0].npr.prototypes,
        after.vision_model.encoder.stages[0].npr.prototypes,
    )


def test_the_trainer_example_writes_an_adapter(tmp_path, photo_folder):
    peft = pytest.importorskip("peft")
    train(str(photo_folder), str(tmp_path / "adapter"), steps=3, batch_size=3, lora=True)
    segmenter = load_segmenter()

    def segments():
        return next(segmenter.encode([make_photo(64, 48)])).windows[0].features.segment_embeds[0]

    before = segments()
    segmenter.model = peft.PeftModel.from_pretrained(segmenter.model, tmp_path / "adapter")
    after = segments()
    assert (after - before).abs().max() > 1e-3
    with segmenter.model.disable_adapter():
        torch.testing.assert_close(segments(), before, rtol=1e-3, atol=1e-4)
    segmenter.model = segmenter.model.merge_and_unload()
    torch.testing.assert_close(segments(), after, rtol=1e-3, atol=1e-4)
    assert segmenter(make_photo(64, 48), ["road", "tree"]).label_map.shape == (48, 64)
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
