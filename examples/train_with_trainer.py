"""Trains PGSeg with the `Trainer` of transformers on a folder of images with captions or tags.

    python examples/train_with_trainer.py photos checkpoint
    python examples/train_with_trainer.py photos adapter --lora

The second command writes a PEFT adapter, which `PeftModel.from_pretrained(model, "adapter")` loads. For contrast across
processes, gradient caching, streaming data and exact resuming see `train_pgseg.py`.
"""

import os
import sys

from transformers import Trainer, TrainingArguments

from pgseg_hf import DEFAULT_CHECKPOINT, PGSegConfig, PGSegModel, PGSegProcessor
from pgseg_hf.data.augmentation import AugmentationOptions
from pgseg_hf.data.sources import SourceSpec, open_source
from pgseg_hf.training.batches.collator import PGSegCollator
from pgseg_hf.training.batches.map_dataset import RecordDataset
from pgseg_hf.training.batches.preparation import Preparation

# Captions and tags repeat between images, so this loss replaces the checkpoint's.
LOSS = "multi_positive"


def train(
    data: str,
    output: str,
    steps: int = 100,
    batch_size: int = 32,
    start: str = DEFAULT_CHECKPOINT,
    lora: bool = False,
) -> Trainer:
    """Fine-tunes the checkpoint `start` on the folder `data` and writes a folder for `from_pretrained`. With `lora`, it
    trains and writes only matrices of rank 8 for all linear layers."""
    config = PGSegConfig.from_pretrained(start)
    pooling = config.contrastive_pooling if config.pooling.parts == "patches" else "groups"
    model = PGSegModel.from_pretrained(
        start, dtype="float32", contrastive_loss=LOSS, contrastive_pooling=pooling
    )
    side = model.config.vision_config.image_size
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    processor = PGSegProcessor.from_pretrained(start)
    augmentation = AugmentationOptions(image_size=side)
    dataset = RecordDataset(open_source(SourceSpec(path=data)), Preparation(augmentation))
    most = len(dataset) // int(os.environ.get("WORLD_SIZE", "1"))
    if most < 2:
        raise ValueError(f"{data} has {len(dataset)} images, expected at least 2 for each process.")
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=output,
            max_steps=steps,
            per_device_train_batch_size=min(batch_size, most),
            learning_rate=1e-3 if lora else 5e-5,
            warmup_steps=max(1, steps // 10),
            lr_scheduler_type="cosine",
            weight_decay=0.05,
            max_grad_norm=5.0,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,  # the collator turns examples into arguments of forward
            dataloader_drop_last=True,  # BatchNorm needs more than one image
        ),
        train_dataset=dataset,
        data_collator=PGSegCollator(processor.tokenizer, layout="shared"),
        processing_class=processor,
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    places = [argument for argument in sys.argv[1:] if argument != "--lora"]
    if len(places) != 2:
        sys.exit(__doc__)
    train(*places, lora="--lora" in sys.argv)
