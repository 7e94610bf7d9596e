"""Everyday words for images: maps captions, class folders, tags and ImageNet classes to one vocabulary."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pgseg_hf.efficientnet_lite import convert_efficientnet_lite
from pgseg_hf.text_files import read_text, split_lines
from pgseg_hf.training.batches.patch_names import CellNamer

WORDS_FILE = Path(__file__).with_name("everyday_words.json")
# Labels and WordNet ids of the classifier's classes, in order.
IMAGENET_FILE = Path(__file__).parents[1] / "src/pgseg_hf/evaluation/benchmarks/class_names/imagenet.json"
LONGEST_PHRASE = 3
SIDE = 256
IRREGULAR = {"leaves": "leaf", "knives": "knife", "shelves": "shelf", "calves": "calf"}


def plain(text: str) -> list[str]:
    """The words of a text in lower case; a hyphen separates words."""
    return re.findall(r"[a-z]+", text.lower())


def singulars(phrase: str) -> Iterable[str]:
    """A phrase and its possible singulars."""
    yield phrase
    if phrase in IRREGULAR:
        yield IRREGULAR[phrase]
    for ending, instead in (("ies", "y"), ("es", ""), ("s", "")):
        if phrase.endswith(ending) and len(phrase) > len(ending) + 1:
            yield phrase.removesuffix(ending) + instead


class EverydayWords:
    """The vocabulary of `everyday_words.json`; the file's first entry explains each part.

    Raises:
        ValueError: a word stands for two names, a name is unknown, or a name contains a held-out word.
    """

    def __init__(self, content: dict[str, Any]):
        self.synonyms: dict[str, list[str]] = content["names"]
        self.folders: dict[str, dict[str, list[str]]] = content["folders"]
        self.implies: dict[str, list[str]] = content["implies"]
        self.kinds: dict[str, list[str]] = content["kinds"]
        self.parts: dict[str, list[str]] = content["parts"]
        self.licences: dict[str, str] = content["licences"]
        self._classes: dict[str, str | None] = content["classes"]
        self._held_out = re.compile(rf"\b(?:{'|'.join(content['held_out'])})(?:e?s)?\b", re.IGNORECASE)
        self._names: dict[str, str] = {}
        for name, others in self.synonyms.items():
            for word in (name, *others):
                key = " ".join(plain(word))
                if self._names.setdefault(key, name) != name:
                    first = self._names[key]
                    raise ValueError(f"{word!r} stands for both {first!r} and {name!r}, expected one name.")
        self._phrases = {" ".join(plain(phrase)): names for phrase, names in content["phrases"].items()}
        self._tags = {
            source: {tag.lower(): names for tag, names in table.items()}
            for source, table in content["tags"].items()
        }
        self._check(content)

    @classmethod
    def read(cls, path: Path = WORDS_FILE) -> "EverydayWords":
        """Reads the words from a file."""
        return cls(json.loads(path.read_text(encoding="utf-8")))

    def _check(self, content: dict[str, Any]) -> None:
        tables = [
            content["phrases"],
            self.implies,
            self.kinds,
            *self.folders.values(),
            *content["tags"].values(),
        ]
        shown = [name for table in tables for names in table.values() for name in names]
        if unknown := sorted({*shown, *self.implies, *self.kinds, *self.parts} - set(self.synonyms)):
            raise ValueError(f"{unknown} are not names; expected some of 'names', such as 'dog'.")
        words = [word for name, others in self.synonyms.items() for word in (name, *others)]
        words += [name for name in self._classes.values() if name]
        if held := [word for word in words if self.holds_out(word)]:
            raise ValueError(f"{held} contain held-out words, which no training text may have.")

    def holds_out(self, text: str) -> bool:
        """Whether a text contains a word that is reserved for evaluating unseen words."""
        return self._held_out.search(text) is not None

    def name(self, phrase: str) -> str | None:
        """The everyday name that a word or its plural stands for."""
        key = " ".join(plain(phrase))
        return next((self._names[word] for word in singulars(key) if word in self._names), None)

    def of_captions(self, captions: Iterable[str]) -> list[str]:
        """The names that captions mention. The longest phrase counts, so that a hot dog is not a dog."""
        found: dict[str, None] = {}
        for caption in captions:
            words, start = plain(caption), 0
            while start < len(words):
                for length in range(min(LONGEST_PHRASE, len(words) - start), 0, -1):
                    names = self._shown(" ".join(words[start : start + length]))
                    if names is not None:
                        found.update(dict.fromkeys(names))
                        break
                start += length
        return list(found)

    def _shown(self, phrase: str) -> list[str] | None:
        for word in singulars(phrase):
            if word in self._phrases:
                return self._phrases[word]
            if word in self._names:
                return [self._names[word]]
        return None

    def completed(self, names: Iterable[str]) -> list[str]:
        """Names without repetitions, followed by the names that they imply, but without less specific ones."""
        names = list(names)
        implied = [other for name in names for other in self.implies.get(name, ())]
        found = dict.fromkeys([*names, *implied])
        return [name for name in found if found.keys().isdisjoint(self.kinds.get(name, ()))]

    def of_tags(self, source: str, tags: Iterable[str]) -> list[str]:
        """The names of a source's tags; tags without a name are left out."""
        table, found = self._tags.get(source, {}), {}
        for tag in tags:
            key = tag.strip().lower()
            names = table[key] if key in table else [self.name(key)]
            found.update(dict.fromkeys(name for name in names if name))
        return list(found)

    def of_classes(self, labels: Sequence[str], wnids: Sequence[str], wordnet: Path) -> list[str]:
        """A name for each ImageNet class: its own, that of its nearest hypernym with a name, or the label itself.

        Args:
            labels, wnids: the classes, with WordNet ids such as "n02084071".
            wordnet: folder with `data.noun` of WordNet 3.0.
        """
        nouns = read_nouns(wordnet)
        return [self._of_class(label, wnid[1:], nouns) for label, wnid in zip(labels, wnids)]

    def _of_class(self, label: str, synset: str, nouns: dict[str, tuple[list[str], list[str]]]) -> str:
        own = re.split(r" \(| / ", label)[0]
        name = self._classes[label] if label in self._classes else self.name(own)
        if name is None and label not in self._classes:
            words = (word for above in hypernyms(synset, nouns) for word in nouns[above][0])
            name = next((self._names[word] for word in words if word in self._names), None)
        if name is None and self.holds_out(own):
            raise ValueError(f"class {label!r} contains a held-out word; add a name for it to 'classes'.")
        return name or own


def read_nouns(wordnet: Path) -> dict[str, tuple[list[str], list[str]]]:
    """Words and hypernyms of each noun synset of WordNet.

    Raises:
        ValueError: `data.noun` does not exist.
    """
    path = wordnet / "data.noun"
    if not path.is_file():
        raise ValueError(f"{path} is not a file; expected WordNet 3.0 (Debian: wordnet-base), see --wordnet.")
    nouns = {}
    for line in split_lines(read_text(path)):
        if line.startswith(" "):  # the licence
            continue
        fields = line.split(" | ")[0].split()
        end = 4 + 2 * int(fields[3], 16)
        words = [" ".join(plain(word)) for word in fields[4:end:2]]
        pointers = fields[end + 1 : end + 1 + 4 * int(fields[end])]
        above = [pointers[at + 1] for at in range(0, len(pointers), 4) if pointers[at] in ("@", "@i")]
        nouns[fields[0]] = (words, above)
    return nouns


def hypernyms(synset: str, nouns: dict[str, tuple[list[str], list[str]]]) -> list[str]:
    """A synset and all its hypernyms, nearest first; empty for an unknown synset."""
    found = [synset] if synset in nouns else []
    for each in found:
        found += [above for above in nouns[each][1] if above not in found]
    return found


class Classifier:
    """EfficientNet-Lite with its ImageNet head; probabilities of classes with the same name are summed.

    Args:
        weights: file of the public state dict.
        names: the name of each class.
        parts: names that are parts of another, see `CellNamer`.

    Raises:
        ValueError: the weights are of another model, or the number of classes differs.
    """

    def __init__(self, weights: Path, names: Sequence[str], parts: Mapping[str, Sequence[str]] | None = None):
        public = torch.load(weights, map_location="cpu", weights_only=True)
        self._backbone, head = convert_efficientnet_lite(public)
        self.namer = CellNamer(head, names, parts)
        self.names = self.namer.names

    @torch.inference_mode()
    def shares(self, images: Sequence[Image.Image]) -> Tensor:
        """The share of each name in an image, or in the quadrant that has most of it.

        Args:
            images: RGB images; each is resized to a square of 256 px.

        Returns:
            Shares [B, names] from 0 to 1: the largest of five, the mean softmax over the cells of each quadrant, and
            the softmax of the mean logits.
        """
        squares = [np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for image in images]
        pixels = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).float().sub_(127).div_(128)
        features = self._backbone(pixels.contiguous(memory_format=torch.channels_last)).feature_maps[-1]
        logits = self.namer.logits(features)
        whole, cells = self.namer.shares(logits.mean((1, 2))), self.namer.shares(logits)
        half = cells.shape[1] // 2
        quadrants = [cells[:, a : a + half, b : b + half].mean((1, 2)) for a in (0, half) for b in (0, half)]
        return torch.stack([*quadrants, whole]).amax(0)

    def tags(self, images: Sequence[Image.Image], least: float) -> list[list[str]]:
        """For each image, the names with a share above `least`, largest first."""
        return [
            [self.names[at] for at in row.argsort(descending=True).tolist() if row[at] > least]
            for row in self.shares(images)
        ]
