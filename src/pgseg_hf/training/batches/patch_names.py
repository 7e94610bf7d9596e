"""Names the cells of a frozen backbone's last feature map with the backbone's own classifier."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ...efficientnet_lite import EfficientNetLiteHead
from ...files import write_atomically

# Maximum number of names kept per cell.
KEPT = 4
# Cells whose most likely name has at most this share are ignored.
LEAST_SHARE = 0.3


class CellNamer:
    """Applies the classification head of EfficientNet-Lite to every cell and sums its classes by name.

    Args:
        head: the head's tensors from `convert_efficientnet_lite`.
        classes: the name of each class; several classes may share a name.
        parts: maps a word to names that are parts of it, such as "person" to clothes. If the image has the word as a
            tag, the share of such a name in a cell is split equally between the name and the word.

    Raises:
        ValueError: if the number of classes differs from the head's.
    """

    def __init__(
        self,
        head: Mapping[str, Tensor],
        classes: Sequence[str],
        parts: Mapping[str, Sequence[str]] | None = None,
    ):
        self.head, self.classes = EfficientNetLiteHead(head), list(classes)
        self.parts = {word: list(names) for word, names in (parts or {}).items()}
        self.names = list(dict.fromkeys(classes))
        self.kept = min(KEPT, len(self.names))
        if len(self.names) > 2**16:
            raise ValueError(f"there are {len(self.names)} class names, expected at most {2**16}.")
        if self.head.num_classes != len(classes):
            raise ValueError(
                f"{len(classes)} names of classes are given, expected {self.head.num_classes}, one per class."
            )
        self._sums = torch.zeros(len(classes), len(self.names))
        self._sums[range(len(classes)), [self.names.index(name) for name in classes]] = 1

    @classmethod
    def read(cls, path: str | Path) -> "CellNamer":
        """Reads a file written by [`~CellNamer.save`].

        Raises:
            ValueError: if the file is missing or invalid.
        """
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 - not iterable
                metadata = {name: json.loads(value) for name, value in file.metadata().items()}
                return cls(tensors, metadata["classes"], metadata.get("parts", {}))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is not a classifier file, expected one written by prepare_everyday.py: {error}"
            ) from error

    def save(self, path: Path) -> None:
        """Writes the head, classes and parts as a safetensors file."""
        tensors = {name: tensor.half() for name, tensor in self.head.state_dict().items()}
        content = save(tensors, {"classes": json.dumps(self.classes), "parts": json.dumps(self.parts)})

        def write(file: BinaryIO) -> None:
            file.write(content)

        write_atomically(path, write)

    @torch.inference_mode()
    def logits(self, feature_map: Tensor) -> Tensor:
        """Class logits [B, h, w, classes] of the backbone's last feature map [B, C, h, w]."""
        return self.head.to(feature_map.device)(feature_map.float())

    def shares(self, logits: Tensor) -> Tensor:
        """The softmax over classes [..., classes], summed by name: [..., names]."""
        return logits.softmax(-1) @ self._sums.to(logits.device)

    def likeliest(self, feature_map: Tensor) -> tuple[Tensor, Tensor]:
        """The `kept` most likely names of each cell as indices into `names`, and their shares: [B, h, w, kept] each."""
        shares, names = self.shares(self.logits(feature_map)).topk(self.kept, dim=-1)
        return names, shares

    def names_of_cells(
        self, names: np.ndarray, shares: np.ndarray, tags: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """The share of each name in every cell, {name: [h, w]}; cells without a likely name have shares of 0.

        Args:
            names, shares: [h, w, kept] from [`~CellNamer.likeliest`].
            tags: tags of the image.
        """
        shares = np.where(shares.max(-1, keepdims=True) > LEAST_SHARE, shares.astype(np.float32), 0)
        likely = np.unique(names[shares > LEAST_SHARE])
        found = {self.names[name]: np.where(names == name, shares, 0).sum(-1) for name in likely}
        for word in [word for word in self.parts if word in tags]:
            for part in [part for part in self.parts[word] if part in found]:
                found[part] = found[part] / 2
                found[word] = found.get(word, 0) + found[part]
        return found
