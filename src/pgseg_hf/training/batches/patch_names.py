"""Names for the cells of a frozen backbone's last feature map, by the classifier that was trained on it."""

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

# Names that are kept of a cell, at most.
KEPT = 4
# A cell whose likeliest name has less than this share teaches nothing.
LEAST_SHARE = 0.3


class CellNamer:
    """The head of EfficientNet-Lite, applied to every cell, with its classes summed by name.

    Args:
        head: tensors of `convert_efficientnet_lite`.
        classes: the name of each class; several classes may share one.
        parts: for some words names that belong to it, as clothes to a person: a cell with such a name shows half as
            much of it and as much of the word, if the image has the word as a tag.

    Raises:
        ValueError: another number of classes.
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
            raise ValueError(f"there are {len(self.names)} names of classes, expected {2**16} at most.")
        if self.head.num_classes != len(classes):
            raise ValueError(f"the head has {self.head.num_classes} classes, expected {len(classes)}.")
        self._sums = torch.zeros(len(classes), len(self.names))
        self._sums[range(len(classes)), [self.names.index(name) for name in classes]] = 1

    @classmethod
    def read(cls, path: str | Path) -> "CellNamer":
        """Of a file that [`~CellNamer.save`] wrote.

        Raises:
            ValueError: there is no such file, or it holds something else.
        """
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 - not iterable
                metadata = {name: json.loads(value) for name, value in file.metadata().items()}
                return cls(tensors, metadata["classes"], metadata.get("parts", {}))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is no file of a classifier, expected the one that prepare_everyday.py writes: {error}"
            ) from error

    def save(self, path: Path) -> None:
        """Writes head, classes and parts as safetensors."""
        tensors = {name: tensor.half() for name, tensor in self.head.state_dict().items()}
        content = save(tensors, {"classes": json.dumps(self.classes), "parts": json.dumps(self.parts)})

        def write(file: BinaryIO) -> None:
            file.write(content)

        write_atomically(path, write)

    @torch.inference_mode()
    def logits(self, feature_map: Tensor) -> Tensor:
        """[B, C, h, w], the backbone's last, to [B, h, w, classes]."""
        return self.head.to(feature_map.device)(feature_map.float())

    def shares(self, logits: Tensor) -> Tensor:
        """Softmax over the classes [..., classes], summed by name [..., names]."""
        return logits.softmax(-1) @ self._sums.to(logits.device)

    def likeliest(self, feature_map: Tensor) -> tuple[Tensor, Tensor]:
        """The `kept` likeliest names of each cell, numbers of `names` [B, h, w, kept], and their shares likewise."""
        shares, names = self.shares(self.logits(feature_map)).topk(self.kept, dim=-1)
        return names, shares

    def names_of_cells(
        self, names: np.ndarray, shares: np.ndarray, tags: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """How much of each cell has which name, {name: [h, w]}, of cells with one that is likely enough.

        Args:
            names, shares: of [`~CellNamer.likeliest`], [h, w, kept].
            tags: of the image.
        """
        shares = np.where(shares.max(-1, keepdims=True) > LEAST_SHARE, shares.astype(np.float32), 0)
        likely = np.unique(names[shares > LEAST_SHARE])
        found = {self.names[name]: np.where(names == name, shares, 0).sum(-1) for name in likely}
        for word in [word for word in self.parts if word in tags]:
            for part in [part for part in self.parts[word] if part in found]:
                found[part] = found[part] / 2
                found[word] = found.get(word, 0) + found[part]
        return found
