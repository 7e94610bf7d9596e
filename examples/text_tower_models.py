"""Teacher and student of `distill_text_tower.py`, and maps of their embedding space."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from text_tower_texts import NEUTRAL_FORMS
from torch import Tensor
from torch.nn.functional import normalize
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer, CLIPTokenizer

from pgseg_hf import PGSegTextModelWithProjection
from pgseg_hf.files import folder_written_whole, write_atomically
from pgseg_hf.projection import PGSegProjection

BLOCK = 4096
PROMPT = "a photo of a {}."


class Teacher:
    """Normalised embeddings of a sentence encoder; each is computed once and cached in a folder, in blocks."""

    def __init__(self, folder: str, cache: Path):
        self.folder, self.model = folder, None
        config = (Path(folder) / "config.json").read_text(encoding="utf-8")
        self.size = json.loads(config)["hidden_size"]
        # Another teacher, or other neutral forms, use another cache.
        self.cache = cache / f"{Path(folder).name}-{_digest([config, *NEUTRAL_FORMS])}"
        self.known: dict[str, dict[str, np.ndarray]] = {"texts": {}, "labels": {}}
        for kind, known in self.known.items():
            for path in (self.cache / kind).glob("*.npz"):
                with np.load(path) as block:
                    known.update(zip(block["texts"].tolist(), block["embeds"]))

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Normalised embeddings [N, D] of texts."""
        return self._embed("texts", texts, self._encode)

    def embed_labels(self, labels: Sequence[str]) -> Tensor:
        """Normalised mean embeddings [N, D] over the neutral forms of labels."""

        def encode(block: Sequence[str]) -> Tensor:
            forms = [self._encode([form.format(label) for label in block]) for form in NEUTRAL_FORMS]
            return normalize(torch.stack(forms).mean(0), dim=-1)

        return self._embed("labels", labels, encode)

    def _embed(self, kind: str, texts: Sequence[str], encode: Callable[[Sequence[str]], Tensor]) -> Tensor:
        known = self.known[kind]
        new = [text for text in dict.fromkeys(texts) if text not in known]
        for first in tqdm(range(0, len(new), BLOCK), f"teacher: {len(new)} {kind}", disable=not new):
            block = new[first : first + BLOCK]
            embeds = encode(block).half().numpy()
            arrays = {"texts": np.array(block), "embeds": embeds}
            path = self.cache / kind / f"{_digest(block)}.npz"
            write_atomically(path, lambda file, arrays=arrays: np.savez(file, **arrays))
            known.update(zip(block, embeds))
        return torch.from_numpy(np.stack([known[text] for text in texts])).float()

    @torch.inference_mode()
    def _encode(self, texts: Sequence[str]) -> Tensor:
        if self.model is None:
            self.model = AutoModel.from_pretrained(self.folder, dtype=torch.float32).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        result = torch.empty(len(texts), self.size)
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        for first in range(0, len(order), 256):
            rows = order[first : first + 256]
            of_rows = [texts[row] for row in rows]
            tokens = self.tokenizer(
                of_rows, padding=True, truncation=True, max_length=64, return_tensors="pt"
            )
            with torch.autocast("cpu", torch.bfloat16):
                states = self.model(**tokens).last_hidden_state.float()
            mask = tokens["attention_mask"][..., None]
            result[rows] = normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
        return result


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]


class Student:
    """A tower and its tokenizer."""

    def __init__(self, model: PGSegTextModelWithProjection, tokenizer: CLIPTokenizer):
        self.model, self.tokenizer = model, tokenizer

    def __call__(self, texts: Sequence[str], parts: int = 4) -> Tensor:
        """Embeddings [N, D], not normalised. The transformer encodes the texts in parts of similar length to avoid
        padding; the projection's BatchNorm sees all texts together."""
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        pooled = []
        for rows in torch.tensor(order).chunk(parts):
            # Attention is causal and pooling uses the first end token, so the padding after it needs no mask.
            tokens = self.tokenizer(
                [texts[row] for row in rows], padding=True, truncation=True, return_tensors="pt"
            )
            pooled.append(self.model.text_model(input_ids=tokens["input_ids"]).pooler_output)
        embeds = self.model.text_projection(torch.cat(pooled))
        return embeds[torch.tensor(order).argsort()].float()

    @torch.inference_mode()
    def embed(self, labels: Sequence[str], template: str = PROMPT) -> Tensor:
        """Embeddings [N, D] of labels in evaluation mode, in float32."""
        self.model.eval()
        texts = [template.replace("{}", label) for label in labels]
        return torch.cat([self(texts[first : first + 512]) for first in range(0, len(texts), 512)])

    def save(self, folder: Path) -> None:
        """Writes model and tokenizer; an old folder is replaced once both are complete."""
        with folder_written_whole(folder, replace=True) as unfinished:
            self.model.eval().save_pretrained(unfinished)
            self.tokenizer.save_pretrained(unfinished)


def space_map(embeds: Tensor, kind: str, shrinkage: float) -> tuple[Tensor, Tensor]:
    """The mean [D] of embeddings [N, D] and a symmetric matrix [D, D]: the identity for `centre`, else one that whitens
    them, with shrunk covariance and the same mean variance."""
    mean = embeds.mean(0)
    identity = torch.eye(len(mean), dtype=embeds.dtype)
    if kind == "centre":
        return mean, identity
    centred = (embeds - mean).double()
    covariance = centred.T @ centred / len(centred)
    variance = covariance.diagonal().mean()
    values, vectors = torch.linalg.eigh(
        (1 - shrinkage) * covariance + shrinkage * variance * identity.double()
    )
    return mean, (vectors * (variance / values).sqrt() @ vectors.T).to(embeds.dtype)


@torch.no_grad()
def fold_map(projection: PGSegProjection, mean: Tensor, matrix: Tensor) -> None:
    """Changes a projection so that it returns `matrix @ (x - mean)` instead of x."""
    last = projection[3]
    last.bias.copy_(matrix @ (last.bias - mean))
    last.weight.copy_(matrix @ last.weight)
