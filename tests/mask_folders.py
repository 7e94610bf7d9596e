"""Folders of images with masks, and a fake segmenter with known groups."""

import json

import numpy as np
import torch
from PIL import Image
from tiny_models import make_photo

from pgseg_hf import PGSegVisionOutput, SegmentationOptions
from pgseg_hf.scoring import WindowScores
from pgseg_hf.segmentation import EncodedImage, ScoredImage, WindowFeatures

LABELS = {"labels": ["sky", "road", "tree"]}
QUADRANTS = np.kron(np.array([[0, 1], [2, 2]]), np.ones((4, 4), int))


def make_folder(folder, masks, labels=None, metadata=True):
    """Writes images of the same sizes as the given masks, and the masks."""
    rows = []
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for number, mask in enumerate(masks):
        mask = np.asarray(mask, np.uint8)
        names = f"images/{number:03d}.jpg", f"masks/{number:03d}.png"
        make_photo(mask.shape[1], mask.shape[0], seed=number).save(folder / names[0])
        Image.fromarray(mask).save(folder / names[1])
        rows.append(json.dumps({"file_name": names[0], "mask_file_name": names[1]}))
    if metadata:
        (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "labels.json").write_text(json.dumps(labels or LABELS))
    return folder


class KnownGroups:
    """A fake `Segmenter` whose groups are the 2 x 2 quarters of each image. `scores` has one row per quarter and one
    column per requested label."""

    def __init__(self, scores):
        self.options = SegmentationOptions()
        self.scores = torch.tensor(scores)
        self.seen = []

    def class_embeddings(self, labels, options):
        self.seen.append(list(labels))
        return torch.eye(len(labels))

    def encode(self, images, options):
        for image in images:
            height, width = image.height, image.width
            groups = torch.arange(height)[:, None] * 2 // height * 2 + torch.arange(width) * 2 // width
            grouping = torch.nn.functional.one_hot(groups, 4).permute(2, 0, 1).float()
            features = PGSegVisionOutput(grouping=grouping[None], segment_embeds=torch.eye(4)[None])
            window = WindowFeatures(groups.int(), features)
            yield EncodedImage((height, width), (height, width), [window])

    def score(self, image, class_embeds, options, may_have_background=False):
        (window,) = image.windows
        scores = self.scores @ class_embeds.T
        return ScoredImage(image.size, image.resized, [WindowScores(window.groups, scores)])


def one_hot(*labels, count=3):
    return torch.eye(count)[list(labels)].tolist()
