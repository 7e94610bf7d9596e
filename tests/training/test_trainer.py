"""The Trainer of Transformers: loss, predictions, metrics and best model in both layouts, also with two processes."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny_models import CLIP_TEXT, make_photo, tiny_model
from transformers import Trainer, TrainingArguments

from pgseg_hf import PGSegModel, default_tokenizer
from pgseg_hf.training.batches.collator import PGSegCollator

COUNT = 7
WORDS = ["cat", "dog", "tree", "sky", "car"]
COLLATORS = {
    "captions": {"num_labels": 0},
    "captions and tags": {"num_labels": 2},
    "shared": {"layout": "shared", "padding": "longest"},
}
LAYOUTS = pytest.mark.parametrize("layout", COLLATORS)


def examples():
    """Images whose captions and tags differ in number and length."""
    pixels = [np.array(make_photo(16, 16, seed=n), np.float32).transpose(2, 0, 1) / 255 for n in range(COUNT)]
    return [
        {
            "pixel_values": pixels[n],
            "caption": f"photo {n} of a {WORDS[n % 5]}",
            "labels": WORDS[n % 3 : n % 3 + 2],
        }
        for n in range(COUNT)
    ]


def trainer_of(layout, folder, model=None, **arguments):
    """A Trainer with three images per batch and process, so that the last batch is smaller."""
    loss = {"contrastive_loss": "multi_positive"} if layout == "shared" else {}
    collator = PGSegCollator(default_tokenizer(), 77, **COLLATORS[layout])
    seen = []

    def keep(prediction):
        seen.append(prediction)
        return {"images": float(len(prediction.predictions[0]))}

    options = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 3,
        "per_device_eval_batch_size": 3,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "load_best_model_at_end": True,
        "report_to": "none",
        "remove_unused_columns": False,
        "dataloader_drop_last": False,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    trainer = Trainer(
        model=model or tiny_model(text_config=CLIP_TEXT, std=0.1, **loss),
        args=TrainingArguments(**options | arguments),
        train_dataset=examples()[:6],
        eval_dataset=examples(),
        data_collator=collator,
        compute_metrics=keep,
    )
    return trainer, seen


@LAYOUTS
def test_evaluation_prediction_metrics_and_the_best_model(tmp_path, layout):
    trainer, seen = trainer_of(layout, tmp_path)
    model, rows = trainer.model.eval(), examples()
    found = trainer.evaluate()
    batches = [trainer.data_collator(rows[start : start + 3]) for start in (0, 3, 6)]
    with torch.no_grad():
        outputs = [model(**batch) for batch in batches]
    expected = sum(output.loss.item() * len(output.image_embeds) for output in outputs) / COUNT
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert found["eval_images"] == COUNT
    logits, embeds, segments = trainer.predict(rows).predictions
    np.testing.assert_allclose(embeds, torch.cat([output.image_embeds for output in outputs]), atol=1e-6)
    assert segments.shape[:1] == (COUNT,)
    for start, output in zip((0, 3, 6), outputs):
        own = logits[start : start + 3]
        count = output.logits_per_image.shape[1]
        np.testing.assert_allclose(own[:, :count], output.logits_per_image, atol=1e-4)
        assert (own[:, count:] == -100).all()
    trainer.train()
    history = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert len(history) == 2
    assert trainer.state.best_metric == min(history)
    best = PGSegModel.from_pretrained(trainer.state.best_model_checkpoint)
    assert all(
        torch.equal(value, best.state_dict()[name]) for name, value in trainer.model.state_dict().items()
    )
    assert len(seen) == 4


def test_targets_of_shared_texts_reach_the_metrics(tmp_path):
    trainer, seen = trainer_of("shared", tmp_path, label_names=["text_targets"])
    assert np.isfinite(trainer.evaluate()["eval_loss"])
    (prediction,) = seen
    assert prediction.label_ids.shape == prediction.predictions[0].shape
    assert set(np.unique(prediction.label_ids)) == {-100, 0, 1}
    np.testing.assert_array_equal((prediction.label_ids == 1).sum(1), [2] * COUNT)
    np.testing.assert_array_equal(prediction.label_ids == -100, prediction.predictions[0] == -100)


def test_columns_of_tags_are_no_unused_ones(tmp_path):
    """The Trainer silently drops columns that are not arguments of `forward`."""
    trainer, _ = trainer_of("captions", tmp_path)
    trainer._set_signature_columns_if_needed()
    assert {"tag_input_ids", "tag_attention_mask", "text_targets"} <= set(trainer._signature_columns)
    assert trainer.label_names == []


@pytest.mark.slow
def test_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    path = os.pathsep.join(sys.path)
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path)],
            env=os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": path},
        )
        for rank in (0, 1)
    ]
    try:
        assert [process.wait(300) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    for layout in COLLATORS:
        found = json.loads((tmp_path / f"{layout}.json").read_text())
        alone, _ = trainer_of(layout, tmp_path / "alone")
        # With two processes the batches have images 0-2 and 3-5, then image 6, padded with the first ones.
        embeds = alone.predict(examples()).predictions[1]
        np.testing.assert_allclose(found["embeds"], embeds, atol=1e-5)
        assert np.isfinite(found["eval_loss"]) and found["eval_images"] == COUNT
        assert len(found["history"]) == 2


def one_of_two_processes(folder):
    torch.set_num_threads(1)
    for layout in COLLATORS:
        trainer, _ = trainer_of(layout, os.path.join(folder, layout), ddp_backend="gloo")
        found = trainer.evaluate()
        found["embeds"] = trainer.predict(examples()).predictions[1].tolist()
        trainer.train()
        found["history"] = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
        if trainer.is_world_process_zero():
            with open(os.path.join(folder, f"{layout}.json"), "w") as file:
                json.dump(found, file)


if __name__ == "__main__":
    one_of_two_processes(*sys.argv[1:])
