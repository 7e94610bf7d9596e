"""Collates training examples into the arguments of `PGSegModel.forward`."""

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
# Extra negative texts per batch, if there are any to draw from.
NEGATIVES = 150
# Tokenizers without a length limit report 10^30.
_NO_LIMIT = 1_000_000


class PGSegCollator:
    """Stacks images and tokenizes their texts, for a `DataLoader` or for Transformers' `Trainer` with
    `remove_unused_columns=False`.

    In the "paired" layout each image has its own caption, and labels for the multi-label loss. In the "shared" layout
    all images of a batch share its distinct texts; the positives of an image are its labels, or its caption if it has
    no labels.

    With several processes the paired layout needs `num_labels` if images have labels. Otherwise some processes could
    have labels in a batch and others none, and they would wait for each other indefinitely.

    Args:
        tokenizer: tokenizer of the model's text tower.
        context_length: maximum length of a text in tokens, by default the tokenizer's `model_max_length`. Longer texts
            are truncated.
        layout: "paired" or "shared".
        padding: "max_length" pads all texts to `context_length`, "longest" to the longest text of the batch.
        num_labels: number of labels per image in the paired layout, padded or truncated; 0 for none. By default the
            largest number in the batch.
        texts: in the shared layout, the texts of every batch, which must include those of all examples. Texts that no
            image of a batch has are then negatives too.
        synonyms: in the shared layout, alternatives for a text. The choice is seeded by the batch's content and is the
            same for all its images, so that synonyms are never negatives of each other. With several processes, each
            one chooses for its own part of the batch.
        negatives: in the shared layout, texts from which `NEGATIVES` more are drawn for each batch, seeded by its
            content, so that words that rarely share a batch compete too.

    Raises:
        ValueError: if an argument is invalid; the message names it.
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
                f"context_length is {context_length}, expected the text tower's limit in tokens, at least 3."
            )
        if num_labels is not None and (layout != "paired" or num_labels < 0):
            raise ValueError(f"num_labels is {num_labels}, expected 0 or more, and layout='paired'.")
        if texts is not None and (layout != "shared" or not texts):
            raise ValueError("texts needs layout='shared' and at least one text.")
        if synonyms and layout != "shared":
            raise ValueError(f"synonyms needs layout='shared', but layout is {layout!r}.")
        self.tokenizer, self.context_length = tokenizer, context_length
        self.layout, self.padding, self.num_labels = layout, padding, num_labels
        self.texts, self.synonyms, self.negatives = texts, dict(synonyms or {}), list(negatives)
        self.cut_texts = 0
        """Number of texts truncated so far in this process."""

    def __call__(self, examples: Sequence[Example | Mapping[str, Any]]) -> dict[str, Any]:
        """
        Args:
            examples: B examples, or mappings with the same keys (`labels` may be missing).

        Returns:
            `pixel_values` [B, 3, S, S] or `backbone_features` [B, C, h, w], and `return_loss=True`.

            Paired layout: `input_ids` and `attention_mask` [B, T] and, if there are labels, `tag_input_ids` and
            `tag_attention_mask` [B, M, T], where the mask of a missing label is all zeros. Shared layout: `input_ids`
            and `attention_mask` [N, T], `text_targets` [B, N] of 0 and 1 and, if an example has `patch_texts` (even
            empty ones), `patch_targets` [B, h, w, N].

        Raises:
            ValueError: if there are no examples, a text is not among the given `texts`, or several processes use the
                paired layout with labels but without `num_labels`.
        """
        if not examples:
            raise ValueError("there are no examples to collate; a batch needs at least one.")
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
        # DataLoader workers have no process group; they only see the environment variables.
        if most and self.num_labels is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                "num_labels is None, but training with several processes needs the number of labels per image."
            )
        labels = [of_image[:most] for of_image in labels]
        # A single call pads captions and labels to the same length.
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
        # Texts with the same tokens share a column.
        columns: dict[tuple[int, ...], int] = {}
        column_of: dict[str, int] = {}
        first: list[int] = []
        for index, (text, tokens) in enumerate(zip(texts, encoded["input_ids"].tolist())):
            if tuple(tokens) not in columns:
                if self.texts is not None and index >= len(self.texts):
                    raise ValueError(f"{text!r} is not one of the {len(self.texts)} texts of the collator.")
                columns[tuple(tokens)] = len(first)
                first.append(index)
            column_of[text] = columns[tuple(tokens)]
        # Integers, not booleans, because the Trainer may pad these as labels with -100.
        targets = torch.zeros(len(captions), len(first), dtype=torch.int64)
        for row, of_image in enumerate(of_images):
            targets[row, [column_of[called[text]] for text in of_image]] = 1
        batch = {**{name: values[first] for name, values in encoded.items()}, "text_targets": targets}
        # Also if no cell has a name, because all processes need the same kind of batch.
        if any(of_image is not None for of_image in grids):
            size = next((grid.shape for of_image in patches for grid in of_image.values()), (1, 1))
            batch["patch_targets"] = torch.zeros(len(captions), *size, len(first))
            for row, shown in enumerate(patches):
                for text, grid in shown.items():
                    batch["patch_targets"][row, ..., column_of[called[text]]] += torch.as_tensor(grid)
        return batch

    def _in_other_words(self, texts: list[str]) -> tuple[dict[str, str], list[str]]:
        """The name of each text in this batch (with probability 1/2 one of its synonyms), and the extra negatives."""
        rng = np.random.default_rng(zlib.crc32("\n".join(texts).encode()))
        called: dict[str, str] = {}
        for text in dict.fromkeys(texts):
            others = self.synonyms.get(text)
            called[text] = others[int(rng.integers(len(others)))] if others and rng.random() < 0.5 else text
        others = [text for text in self.negatives if text not in called]
        return called, [others[place] for place in rng.permutation(len(others))[:NEGATIVES]]

    def _encode(self, texts: list[str]) -> dict[str, Tensor]:
        """Token ids and attention mask [N, T]; equal texts are tokenized only once."""
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
