"""Builds a folder of images with everyday words from public sources: captions, class folders, tags, and the output of
an ImageNet classifier. No masks are read.

    python examples/prepare_everyday.py --output everyday-data --efficientnet efficientnet-lite0-57934424.pth \
        --flickr8k images --flickr8k_captions Flickr8k.token.txt --intel seg_train --rooms rooms/train \
        --caltech 101_ObjectCategories --imagenette imagenette/train --clothing clothing/train \
        --food food --ccp ccp/train

Each source is optional. `OUTPUT/everyday` appears once it is complete. It has `images/`, `metadata.jsonl` (file_name,
tags, captions, source), `words.json` (names with synonyms, licences, counts) and, with `--efficientnet`, the classifier
as `classifier.safetensors`. Train on it as on any folder: `--data OUTPUT/everyday`.
"""

import argparse
import json
import os
import random
import shutil
import signal
import stat
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from everyday_tags import IMAGENET_FILE, Classifier, EverydayWords
from PIL import Image
from tqdm.auto import trange

from pgseg_hf.command_line import CommandParser
from pgseg_hf.files import folder_written_whole, path_inside, write_json, write_text
from pgseg_hf.images import load_image
from pgseg_hf.text_files import read_text, split_lines

ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
MAX_SIDE = 512
BATCH = 16
SOURCES = {
    "flickr8k": "folder of images",
    "intel": "folder seg_train with one folder per scene",
    "rooms": "folder train with one folder per room of Places365",
    "caltech": "folder 101_ObjectCategories",
    "imagenette": "folder train with one folder per WordNet id",
    "clothing": "folder train with one folder per garment",
    "food": "folder with images/*.jpg and tags/*.jpg.txt",
    "ccp": "folder with metadata.jsonl; only file_name and tags are read",
}
PER_CLASS = {"caltech": 45, "imagenette": 200, "clothing": 200}


@dataclass
class Item:
    """An image of a source with its tags and captions."""

    source: str
    path: Path
    tags: list[str]
    captions: list[str] = field(default_factory=list)

    @property
    def file_name(self) -> str:
        """The path in the new folder, with the class folder where file names repeat among classes."""
        folder = f"{self.path.parent.name}/" if self.source in (*PER_CLASS, "intel", "rooms") else ""
        return f"images/{self.source}/{folder}{self.path.name}"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder in which everyday/ is created")
    for source, what in SOURCES.items():
        add(f"--{source}", type=Path, help=what)
    add("--flickr8k_captions", type=Path, help="Flickr8k.token.txt")
    add("--efficientnet", type=Path, help="state dict of EfficientNet-Lite, for automatic words")
    add("--wordnet", type=Path, default=Path("/usr/share/wordnet"), help="folder of WordNet 3.0's data.noun")
    add("--word_share", type=float, default=0.25, help="smallest share of an image or quadrant for a word")
    add("--per_class", type=int, default=400, help="largest number of images per Intel scene and per room")
    add("--threads", type=int, default=1)
    add("--seed", type=int, default=0, help="seed for choosing images of large classes")
    options = parser.parse_args(arguments)
    if (options.flickr8k is None) != (options.flickr8k_captions is None):
        parser.error("--flickr8k and --flickr8k_captions must be given together.")
    if not 0 <= options.word_share < 1:
        parser.error(f"--word_share is {options.word_share}, expected 0 to 1.")
    if min(options.per_class, options.threads) < 1:
        parser.error("--per_class and --threads must be at least 1.")
    return options


def images_in(folder: Path) -> list[Path]:
    """The images of a folder, sorted.

    Raises:
        ValueError: the folder does not exist.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; expected one with images.")
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS)


def flickr8k(images: Path, captions: Path, words: EverydayWords) -> list[Item]:
    """All images with captions. A caption with a held-out word is dropped, but its other words still give names."""
    sentences: dict[str, list[str]] = {}
    for line in split_lines(read_text(captions)):
        name, _, caption = line.partition("\t")
        sentences.setdefault(name.split("#")[0], []).append(" ".join(caption.split()))
    items = []
    for path in images_in(images):
        texts = sentences.get(path.name, [])
        kept = [text for text in texts if not words.holds_out(text)]
        items.append(Item("flickr8k", path, words.of_captions(texts), kept))
    return items


def class_folders(source: str, root: Path, words: EverydayWords, most: int, seed: int) -> list[Item]:
    """Images of the class folders that `everyday_words.json` lists; other folders are ignored.

    Raises:
        ValueError: none of these folders exists.
    """
    table = words.folders[source]
    known = [name for name in table if (root / name).is_dir()]
    if not known:
        raise ValueError(f"{root} has no class folder of {source}, expected some of {', '.join(table)}.")
    if missing := [name for name in table if name not in known]:
        print(f"{source}: {root} has no folders {', '.join(missing)}", flush=True)
    items = []
    for name in known:
        paths = images_in(root / name)
        chosen = random.Random(f"{seed} {name}").sample(paths, min(most, len(paths)))
        items += [Item(source, path, table[name]) for path in sorted(chosen)]
    return items


def food(root: Path, words: EverydayWords) -> list[Item]:
    """Images with one tag file each."""
    items = []
    for path in images_in(root / "images"):
        file = root / "tags" / f"{path.name}.txt"
        tags = read_text(file).split(",") if file.is_file() else []
        items.append(Item("food", path, words.of_tags("food", tags)))
    return items


def ccp(root: Path, words: EverydayWords) -> list[Item]:
    """Images of a folder with `metadata.jsonl`; only file names and tags are read."""
    items = []
    for line in split_lines(read_text(root / "metadata.jsonl")):
        row = json.loads(line)
        path = path_inside(root, row["file_name"])
        items.append(Item("ccp", path, words.of_tags("ccp", row["tags"])))
    return items


def collect(options: argparse.Namespace, words: EverydayWords) -> list[Item]:
    """Collects the images of all given sources and prints which sources are missing."""
    items: list[Item] = []
    for source in SOURCES:
        root = getattr(options, source)
        if root is None:
            print(f"{source}: left out, no --{source}", flush=True)
            continue
        if source == "flickr8k":
            found = flickr8k(root, options.flickr8k_captions, words)
        elif source in ("food", "ccp"):
            found = food(root, words) if source == "food" else ccp(root, words)
        else:
            most = PER_CLASS.get(source, options.per_class)
            found = class_folders(source, root, words, most, options.seed)
        print(f"{source}: {len(found):,} images", flush=True)
        items += found
    if not items:
        raise ValueError("there are no images; expected at least one source, such as --intel seg_train.")
    return items


def place(item: Item, image: Image.Image, folder: Path) -> str:
    """Puts an image into the new folder and returns its name.

    An image larger than 512 px is resized and saved as JPEG. Others are hard-linked if possible, but a read-only file
    is copied, because a link would share a protected file.
    """
    target = folder / item.file_name
    target.parent.mkdir(parents=True, exist_ok=True)
    if max(image.size) > MAX_SIDE:
        target, small = target.with_suffix(".jpg"), image.copy()
        small.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
        small.save(target, quality=90)
    elif item.path.is_symlink() or not item.path.stat().st_mode & stat.S_IWUSR:
        shutil.copyfile(item.path, target)
    else:
        try:
            os.link(item.path, target)
        except OSError:  # another disk
            shutil.copyfile(item.path, target)
    return target.relative_to(folder).as_posix()


def write_images(
    items: Sequence[Item], words: EverydayWords, classifier: Classifier | None, least: float, folder: Path
) -> list[dict[str, Any]]:
    """Writes images into a folder and returns its metadata rows. Images without any word are left out, and unreadable
    ones are reported."""
    rows: list[dict[str, Any]] = []
    for start in trange(0, len(items), BATCH, unit=f" x {BATCH} images"):
        batch = []
        for item in items[start : start + BATCH]:
            try:
                batch.append((item, load_image(item.path)))
            except ValueError as error:
                print(f"left out: {error}", flush=True)
        seen = classifier.tags([image for _, image in batch], least) if classifier and batch else [[]] * BATCH
        for (item, image), automatic in zip(batch, seen):
            tags = words.completed([*item.tags, *automatic])
            if tags or item.captions:
                row = {"file_name": place(item, image, folder), "tags": tags, "captions": item.captions}
                rows.append({**row, "source": item.source})
    return rows


def summary(
    rows: Sequence[dict[str, Any]], words: EverydayWords, options: argparse.Namespace
) -> dict[str, Any]:
    """The content of `words.json`: names with synonyms, everyday ones first; licences; counts."""
    tags = Counter(tag for row in rows for tag in row["tags"])
    others = sorted(set(tags) - set(words.synonyms))
    used = [*(source for source in SOURCES if getattr(options, source) is not None)]
    used += ["efficientnet", "wordnet"] if options.efficientnet else []
    return {
        "names": {**words.synonyms, **{name: [] for name in others}},
        "licences": {source: words.licences[source] for source in used},
        "counts": {
            "images": dict(Counter(row["source"] for row in rows)),
            "captions": sum(len(row["captions"]) for row in rows),
            "tags": dict(tags.most_common()),
        },
    }


def run(options: argparse.Namespace) -> Path:
    """Builds the folder, completely or not at all.

    Raises:
        ValueError: a source or the weights cannot be read, no image has a word, or the folder exists.
    """
    torch.set_num_threads(options.threads)
    words = EverydayWords.read()
    with folder_written_whole(options.output / "everyday") as folder:
        items = collect(options, words)
        classifier = None
        if options.efficientnet:
            classes = json.loads(IMAGENET_FILE.read_text(encoding="utf-8"))
            names = words.of_classes(classes["labels"], classes["wnids"], options.wordnet)
            classifier = Classifier(options.efficientnet, names, words.parts)
        else:
            print("automatic words: left out, no --efficientnet", flush=True)
        rows = write_images(items, words, classifier, options.word_share, folder)
        if not rows:
            raise ValueError(f"{len(items)} images have no words; expected captions, tags or classes.")
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text("".join(lines), folder / "metadata.jsonl")
        result = summary(rows, words, options)
        write_json(result, folder / "words.json")
        if classifier is not None:
            classifier.namer.save(folder / "classifier.safetensors")
    counts = result["counts"]
    print(f"{len(rows):,} images, {counts['captions']:,} captions, {len(counts['tags'])} names in use")
    print(", ".join(f"{name} {count}" for name, count in list(counts["tags"].items())[:60]), flush=True)
    return options.output / "everyday"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the script."""
    try:
        print(run(parse_arguments(arguments)))
    except ValueError as error:
        raise SystemExit(f"prepare_everyday.py: {error}") from error


if __name__ == "__main__":
    # SIGTERM also removes the incomplete folder, like Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main()
