"""Zero-shot classification."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import make_photo

from pgseg_hf.evaluation.classification import zero_shot_accuracy
from pgseg_hf.prompts import IMAGENET_TEMPLATES


def test_zero_shot_accuracy_against_one_picture_at_a_time(tiny_segmenter):
    model, processor = tiny_segmenter.model, tiny_segmenter.processor
    labels = ["cat", "dog", "grass", "sky", "road", "tree", "car"]
    rng = np.random.default_rng(0)
    pictures = [
        (make_photo(*rng.integers(20, 90, 2).tolist(), seed=seed), labels[seed % 7]) for seed in range(9)
    ]
    classes = processor.get_class_embeddings(model, labels, IMAGENET_TEMPLATES)
    ranks = []
    for image, label in pictures:
        factor = 18 / min(image.size)  # 16 pixels * 256 / 224
        width, height = (int(side * factor + 0.5) for side in image.size)
        resized = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), np.float32) / 255
        top, left = (height - 16) // 2, (width - 16) // 2
        pixels = (resized[top : top + 16, left : left + 16] - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        with torch.no_grad():
            tensor = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None]
            embeds = torch.nn.functional.normalize(model.get_image_features(tensor).pooler_output, dim=-1)
        cosines = (embeds @ classes.T)[0]
        ranks.append(int((cosines > cosines[labels.index(label)]).sum()))
    expected = {"top1": ranks.count(0) / 9, "top5": sum(rank < 5 for rank in ranks) / 9, "pictures": 9}
    assert 0 < expected["top5"] < 1
    for batch_size in (1, 4, 64):
        assert zero_shot_accuracy(model, processor, pictures, labels, batch_size) == expected


def test_zero_shot_of_few_labels_and_odd_inputs(tiny_segmenter, photo):
    model, processor = tiny_segmenter.model, tiny_segmenter.processor
    scores = zero_shot_accuracy(model, processor, [(photo, "cat"), (photo, " dog ")], ["cat", "dog"])
    assert scores == {"top1": 0.5, "top5": 1.0, "pictures": 2}
    nothing = zero_shot_accuracy(model, processor, [], ["cat"])
    assert math.isnan(nothing["top1"]) and nothing["pictures"] == 0
    with pytest.raises(ValueError, match="label 'cow', which is not among the labels"):
        zero_shot_accuracy(model, processor, [(photo, "cow")], ["cat"])
    with pytest.raises(ValueError, match="batch_size is 0"):
        zero_shot_accuracy(model, processor, [(photo, "cat")], ["cat"], batch_size=0)
