"""From examples to the arguments of `PGSegModel.forward`."""

import os
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ...tokenization import warn_of_cut_texts
from .preparation import Example

LAYOUTS = ("paired", "shared")
PADDINGS = ("max_length", "longest")
# Texts beside a batch's own, where there are any to draw from.
NEGATIVES = 150
# Tokenizers that know no limit say 10^30.
_NO_LIMIT = 1_000_000


class PGSegCollator:
    """Stacks images and tokenises their texts; for a `DataLoader`, or transformers' `Trainer` with
    `remove_unused_columns=False`.

    "paired": each image has its caption, and its labels for the multi-label loss. "shared": the texts of a batch are
    collected, equal ones once, and each image's positives are its labels, or its caption where it has none.

    On several processes the paired layout needs `num_labels` where images have labels, so that every process makes
    batches of the same kind: they would wait for each other.

    Args:
        tokenizer: of the model's text tower.
        context_length: longest text in tokens, by default the tokenizer's `model_max_length`; the rest is cut off.
        layout: "paired" or "shared".
        padding: "max_length" makes all texts `context_length` long, "longest" as long as the batch's longest.
        num_labels: in the paired layout the number of labels of every image, padded or cut; 0 for none. By default
            the largest number in the batch.
        texts: in the shared layout the texts of every batch, which the examples' are among: words that no image of
            a batch has are then negatives too.
        synonyms: in the shared layout, other texts for a text. A batch has one of them for all of its images, drawn by
            the batch's content, so that no text of an image is a negative of another that shows the same; on several
            processes each draws for its own part of the batch.
        negatives: in the shared layout, texts of which every batch has `NEGATIVES` more, drawn by its content, so that
            words compete that are seldom in one batch.

    Raises:
        ValueError: naming the argument that makes no sense.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        context_length: int | None = None,
        layout: Literal["paired", "shared"] = "paired",
        padding: Literal["max_length", "longest"] = "max_length",
        num_labels: int | None = None,
        texts: Sequence[str] | None = None,
        synonyms: Mapping[str, Sequence[str]] | None = None,
        negatives: Sequence[str] = (),
    ):
        for name, value, known in (("layout", layout, LAYOUTS), ("padding", padding, PADDINGS)):
            if value not in known:
                raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}.")
        if context_length is None:
            context_length = tokenizer.model_max_length
        if not 3 <= context_length < _NO_LIMIT:
            raise ValueError(
                f"context_length is {context_length}, expected the tokens that the text tower takes, at least 3."
            )
        if num_labels is not None and (layout != "paired" or num_labels < 0):
            raise ValueError(f"num_labels is {num_labels}; it is for the paired layout, and 0 or more.")
        if texts is not None and (layout != "shared" or not texts):
            raise ValueError("texts are for the shared layout, and at least one.")
        if synonyms and layout != "shared":
            raise ValueError(f"synonyms are for the shared layout, and layout is {layout!r}.")
        self.tokenizer, self.context_length = tokenizer, context_length
        self.layout, self.padding, self.num_labels = layout, padding, num_labels
        self.texts, self.synonyms, self.negatives = texts, dict(synonyms or {}), list(negatives)
        self.cut_texts = 0
        """How many texts were cut so far, in this process."""

    def __call__(self, examples: Sequence[Example | Mapping[str, Any]]) -> dict[str, Any]:
        """
        Args:
            examples: B of them, or mappings with the same keys (`labels` may be missing).

        Returns:
            `pixel_values` [B, 3, S, S], or `backbone_features` [B, C, h, w], and `return_loss` True.

            Paired: `input_ids` and `attention_mask` [B, T], and where there are labels `tag_input_ids` and
            `tag_attention_mask` [B, M, T], absent labels with a mask of zeros. Shared: `input_ids` and
            `attention_mask` [N, T], `text_targets` [B, N] of 0 and 1, and `patch_targets` [B, h, w, N]
            where examples have `patch_texts`, if only empty ones.

        Raises:
            ValueError: no examples, in the shared layout a text that is not among the given ones, or in the paired one
                labels without `num_labels` on several processes.
        """
        if not examples:
            raise ValueError("no examples to collate: a batch needs at least one.")
        rows = [vars(example) if isinstance(example, Example) else example for example in examples]
        captions = [row["caption"] for row in rows]
        labels = [[] if row.get("labels") is None else list(row["labels"]) for row in rows]
        name = "pixel_values" if rows[0].get("backbone_features") is None else "backbone_features"
        images = torch.stack([torch.as_tensor(np.asarray(row[name])) for row in rows])
        if self.layout == "paired":
            texts = self._paired(captions, labels)
        else:
            texts = self._shared(captions, labels, [row.get("patch_texts") for row in rows])
        return {name: images, **texts, "return_loss": True}

    def _paired(self, captions: list[str], labels: list[list[str]]) -> dict[str, Tensor]:
        most = max(map(len, labels)) if self.num_labels is None else self.num_labels
        # Workers of a data loader know their run by its environment only.
        if most and self.num_labels is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                "num_labels is None, and several processes need it: give the labels of every image."
            )
        labels = [of_image[:most] for of_image in labels]
        # In one call, so that captions and labels are padded to one length.
        encoded = self._encode([*captions, *(label for of_image in labels for label in of_image)])
        batch = len(captions)
        texts = {name: values[:batch] for name, values in encoded.items()}
        if most:
            is_label = torch.arange(most) < torch.tensor([len(of_image) for of_image in labels])[:, None]
            for name, filler in (("input_ids", self.tokenizer.pad_token_id), ("attention_mask", 0)):
                padded = encoded[name].new_full((*is_label.shape, encoded[name].shape[1]), filler)
                padded[is_label] = encoded[name][batch:]
                texts[f"tag_{name}"] = padded
        return texts

    def _shared(
        self, captions: list[str], labels: list[list[str]], grids: list[dict[str, np.ndarray] | None]
    ) -> dict[str, Tensor]:
        patches = [of_image or {} for of_image in grids]
        of_images = [of_image or [caption] for caption, of_image in zip(captions, labels)]
        wanted = [text for of_image in [*of_images, *patches] for text in of_image]
        called, more = self._in_other_words(wanted)
        texts = list(dict.fromkeys([*(self.texts or []), *called.values(), *more]))
        encoded = self._encode(texts)
        # Texts that the tokenizer does not tell apart are one.
        columns: dict[tuple[int, ...], int] = {}
        column_of: dict[str, int] = {}
        first: list[int] = []
        for index, (text, tokens) in enumerate(zip(texts, encoded["input_ids"].tolist())):
            if tuple(tokens) not in columns:
                if self.texts is not None and index >= len(self.texts):
                    raise ValueError(f"{text!r} is not among the {len(self.texts)} texts of the collator.")
                columns[tuple(tokens)] = len(first)
                first.append(index)
            column_of[text] = columns[tuple(tokens)]
        # No bools: Trainer pads what it takes for labels with -100.
        targets = torch.zeros(len(captions), len(first), dtype=torch.int64)
        for row, of_image in enumerate(of_images):
            targets[row, [column_of[called[text]] for text in of_image]] = 1
        batch = {**{name: values[first] for name, values in encoded.items()}, "text_targets": targets}
        # Where no cell has a name too, as every process needs a batch of the same kind.
        if any(of_image is not None for of_image in grids):
            size = next((grid.shape for of_image in patches for grid in of_image.values()), (1, 1))
            batch["patch_targets"] = torch.zeros(len(captions), *size, len(first))
            for row, shown in enumerate(patches):
                for text, grid in shown.items():
                    batch["patch_targets"][row, ..., column_of[called[text]]] += torch.as_tensor(grid)
        return batch

    def _in_other_words(self, texts: list[str]) -> tuple[dict[str, str], list[str]]:
        """What each text is called in this batch, half of those with synonyms by one of them; and further texts."""
        rng = np.random.default_rng(zlib.crc32("\n".join(texts).encode()))
        called: dict[str, str] = {}
        for text in dict.fromkeys(texts):
            others = self.synonyms.get(text)
            called[text] = others[int(rng.integers(len(others)))] if others and rng.random() < 0.5 else text
        others = [text for text in self.negatives if text not in called]
        return called, [others[place] for place in rng.permutation(len(others))[:NEGATIVES]]

    def _encode(self, texts: list[str]) -> dict[str, Tensor]:
        """Token ids and attention mask [N, T], equal texts tokenised once."""
        unique = {text: index for index, text in enumerate(dict.fromkeys(texts))}
        encoded = self.tokenizer(
            list(unique),
            padding=self.padding,
            truncation=True,
            max_length=self.context_length,
            return_attention_mask=True,
            return_tensors="pt",
        )
        self.cut_texts += warn_of_cut_texts(encoded, list(unique), self.context_length)
        rows = torch.tensor([unique[text] for text in texts])
        return {name: encoded[name][rows] for name in ("input_ids", "attention_mask")}
