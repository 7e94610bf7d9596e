"""Everyday words for images: the word tables, the classifier's shares, and complete runs on tiny fake sources."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import everyday_tags
import numpy as np
import prepare_everyday
import pytest
import torch
from PIL import Image

from pgseg_hf.data.sources import SourceSpec, open_source
from pgseg_hf.efficientnet_lite import EfficientNetLiteBackbone, EfficientNetLiteConfig
from pgseg_hf.images import load_image
from pgseg_hf.training.batches.patch_names import CellNamer

EXAMPLES = Path(__file__).parents[1] / "examples"
HELD_OUT = ("kitten", "automobile", "lawn", "couch", "infant", "pavement")
CAPTIONS = {
    "a.jpg": ["A man in a t-shirt eats a hot dog .", "Two dogs on the LAWN by a red couch ."],
    "b.jpg": ["A kitten sleeps .", "Women with knives"],
    "c.jpg": ["Something happens ."],
}


@pytest.fixture(scope="module")
def words():
    return everyday_tags.EverydayWords.read()


def save_image(path, size=(40, 30), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)


def public_weights(classes, seed=0):
    """A tiny network with random weights and the public names."""
    torch.manual_seed(seed)
    config = EfficientNetLiteConfig(stem_size=8, hidden_sizes=[4, 5, 6, 7, 8, 9, 10], depths=[1] * 7)
    parts = {"expand": ("_expand_conv", "_bn0"), "depthwise": ("_depthwise_conv", "_bn1")}
    parts["project"] = ("_project_conv", "_bn2")
    public = {}
    for name, tensor in EfficientNetLiteBackbone(config).state_dict().items():
        fields = name.split(".")
        if fields[0] == "stem":
            new = f"_conv_stem.{fields[-1]}" if fields[1] == "convolution" else f"_bn0.{fields[-1]}"
        else:
            conv, norm = parts[fields[3]]
            part = conv if fields[4] == "convolution" else norm
            new = f"_blocks.{fields[1]}.{part}.{fields[-1]}"
        public[new] = tensor
    width = 16
    # Features of an untrained network are about 1e-5.
    public["_conv_head.weight"] = 1e5 * torch.randn(width, 10, 1, 1)
    for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
        public[f"_bn1.{name}"] = torch.full((width,), value)
    public["_bn1.num_batches_tracked"] = torch.tensor(0)
    public["_fc.weight"] = torch.randn(classes, width)
    public["_fc.bias"] = torch.zeros(classes)
    return public


@pytest.fixture
def sources(tmp_path):
    """One folder per source, some with unreadable masks."""
    for seed, name in enumerate(CAPTIONS):
        save_image(tmp_path / "flickr" / name, seed=seed)
    save_image(tmp_path / "flickr/no-words.jpg")
    lines = [f"{name}#{row}\t{text}" for name, texts in CAPTIONS.items() for row, text in enumerate(texts)]
    (tmp_path / "token.txt").write_text("\n".join(lines) + "\n")
    for name in ("buildings/1.jpg", "buildings/2.jpg", "buildings/3.jpg", "sea/1.jpg"):
        save_image(tmp_path / "intel" / name)
    save_image(tmp_path / "caltech/airplanes/image_0001.jpg", size=(900, 300))
    save_image(tmp_path / "caltech/chair/image_0001.jpg")
    save_image(tmp_path / "food/images/1.jpg")
    (tmp_path / "food/tags").mkdir()
    (tmp_path / "food/tags/1.jpg.txt").write_text("Tomatoes, chicken ,,yummy,dish")
    save_image(tmp_path / "ccp/images/1.png")
    row = {"file_name": "images/1.png", "tags": ["glasses", "boots", "top"], "mask_file_name": "masks/1.png"}
    (tmp_path / "ccp/metadata.jsonl").write_text(json.dumps(row) + "\n")
    for source in ("flickr", "intel", "caltech", "food", "ccp"):
        (tmp_path / source / "masks").mkdir()
        (tmp_path / source / "masks/1.png").write_bytes(b"never read")
    return tmp_path


def command(sources, *more):
    """The options for all sources."""
    pairs = {
        "flickr8k": "flickr",
        "flickr8k_captions": "token.txt",
        **{name: name for name in ("intel", "caltech", "food", "ccp")},
    }
    listed = [part for option, name in pairs.items() for part in (f"--{option}", str(sources / name))]
    return [*listed, "--output", str(sources / "out"), *more]


def rows_of(folder):
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    return {row["file_name"]: row for row in map(json.loads, lines)}


def test_captions_give_names_of_the_longest_phrases(words):
    assert words.of_captions(["A man in a t-shirt eats a hot dog ."]) == ["person", "shirt", "hot dog"]
    assert words.of_captions(["leaves, bunnies", "a fire truck"]) == ["leaf", "rabbit", "truck"]
    assert words.of_captions(["A boy wearing glasses slides to face the camera"]) == ["person"]


def test_the_words_of_a_source_come_before_the_common_ones(words):
    assert words.of_tags("food", ["chicken", " Tomatoes", "yummy", "orange"]) == ["meat", "tomato", "orange"]
    assert words.of_tags("ccp", ["glasses", "skin"]) == ["sunglasses", "person"]
    assert words.name("chicken") == "bird"


def test_names_come_with_what_they_imply_and_without_what_says_less(words):
    assert words.completed(["beach", "sea", "dog"]) == ["beach", "sea", "dog", "sand", "water", "sky"]
    assert words.completed(["food", "plate", "fruit", "banana"]) == ["plate", "banana", "table"]
    assert words.completed(["food", "sheep"]) == ["food", "sheep"]


def test_no_name_holds_a_held_out_word(words):
    held = [words.holds_out(text) for text in ("Three kittens", "old couches", "a lawnmower")]
    assert held == [True, True, False]
    content = json.loads(everyday_tags.WORDS_FILE.read_text())
    texts = [text for name, others in content["names"].items() for text in (name, *others)]
    assert not [text for text in texts if any(word in text for word in HELD_OUT)]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda content: content["names"]["dog"].append("cat"), "stands for both 'dog' and 'cat'"),
        (lambda content: content["names"]["dog"].append("a fat kitten"), "a fat kitten"),
        (lambda content: content["classes"].update({"lawn mower": "lawn mower"}), "lawn mower"),
        (lambda content: content["folders"]["intel"].update({"sea": ["seaa"]}), "seaa"),
    ],
)
def test_tables_are_checked(change, named):
    content = copy.deepcopy(json.loads(everyday_tags.WORDS_FILE.read_text()))
    content["names"]["dog"].append("cats")  # as a plural of another name
    everyday_tags.EverydayWords(content)
    change(content)
    with pytest.raises(ValueError, match=named):
        everyday_tags.EverydayWords(content)


@pytest.fixture
def wordnet(tmp_path):
    """A boat above a gondola above a small gondola, and a synset without hypernyms."""
    lines = [
        "  1 a licence",
        "00000001 06 n 02 vessel 0 boat 1 000 | a boat",
        "00000002 06 n 01 gondola 0 001 @ 00000001 n 0000 | with | bars",
        "00000003 06 n 01 small_gondola 0 002 ~ 00000009 n 0000 @ 00000002 n 0000 | small",
        "00000004 09 n 01 idea 0 000 | none",
    ]
    (tmp_path / "data.noun").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_classes_take_the_name_of_the_nearest_hypernym(words, wordnet):
    labels = ["small gondola", "idea (thought)", "dogs", "infant bed", "cougar"]
    wnids = ["n00000003", "n00000004", "n00000003", "n00000003", "n00000003"]
    assert words.of_classes(labels, wnids, wordnet) == ["boat", "idea", "dog", "bed", "cougar"]
    with pytest.raises(ValueError, match="lawn chair"):
        words.of_classes(["lawn chair"], ["n00000004"], wordnet)
    with pytest.raises(ValueError, match=r"data\.noun is not a file"):
        words.of_classes(labels, wnids, wordnet / "nowhere")


def test_shares_are_the_largest_of_quadrants_and_whole(tmp_path):
    torch.save(public_weights(5), tmp_path / "weights.pth")
    classifier = everyday_tags.Classifier(tmp_path / "weights.pth", ["cat", "dog", "cat", "tench", "dog"])
    assert classifier.names == ["cat", "dog", "tench"]
    images = [Image.linear_gradient("L").convert("RGB"), Image.new("RGB", (9, 9), "red")]
    shares = classifier.shares(images)
    single = torch.cat([classifier.shares([image]) for image in images])
    torch.testing.assert_close(shares, single)
    assert shares.shape == (2, 3) and shares.max() <= 1 + 1e-5
    assert shares[0].sum() > 1.001, "not the largest of several shares"
    found = classifier.tags(images, 0.3)
    for row, names in zip(shares, found):
        assert set(names) == {name for name, share in zip(classifier.names, row) if share > 0.3}
    with pytest.raises(ValueError, match=r"2 names .*expected 5"):
        everyday_tags.Classifier(tmp_path / "weights.pth", ["cat", "dog"])


def test_a_run_writes_a_folder_that_training_reads(sources, capsys, monkeypatch):
    (sources / "ccp/images/1.png").chmod(0o444)
    (sources / "flickr/broken.jpg").write_bytes(b"broken")
    opened = []
    monkeypatch.setattr(prepare_everyday, "load_image", lambda path: opened.append(path) or load_image(path))
    prepare_everyday.main(command(sources, "--per_class", "2"))
    folder = sources / "out/everyday"
    rows = rows_of(folder)
    assert rows["images/flickr8k/a.jpg"]["tags"] == ["person", "shirt", "hot dog", "dog"]
    assert rows["images/flickr8k/a.jpg"]["captions"] == ["A man in a t-shirt eats a hot dog ."]
    assert rows["images/flickr8k/b.jpg"]["captions"] == ["Women with knives"]
    assert rows["images/flickr8k/c.jpg"]["captions"] == ["Something happens ."]
    assert sum(name.startswith("images/intel/buildings/") for name in rows) == 2
    assert rows["images/intel/sea/1.jpg"]["tags"] == ["sea", "water", "sky"]
    assert rows["images/food/1.jpg"]["tags"] == ["tomato", "meat"]
    assert rows["images/ccp/1.png"]["tags"] == ["sunglasses", "shoe", "shirt"]
    assert "images/flickr8k/no-words.jpg" not in rows
    with Image.open(folder / "images/caltech/airplanes/image_0001.jpg") as image:
        assert image.size == (512, 171) and image.format == "JPEG"
    assert not [word for word in HELD_OUT if word in (folder / "metadata.jsonl").read_text().lower()]

    # No masks are read or copied, and files are linked unless they are read-only.
    assert opened and not [path for path in opened if "masks" in path.parts]
    assert not list(folder.rglob("*mask*")) and "mask" not in (folder / "metadata.jsonl").read_text()
    assert os.path.samefile(folder / "images/flickr8k/a.jpg", sources / "flickr/a.jpg")
    assert not os.path.samefile(folder / "images/ccp/1.png", sources / "ccp/images/1.png")
    assert (folder / "images/ccp/1.png").read_bytes() == (sources / "ccp/images/1.png").read_bytes()

    source = open_source(SourceSpec(path=str(folder)))
    assert len(source) == len(rows)
    record = source[0]
    assert record.image.is_file() and record.tags and record.captions and record.mask is None

    about = json.loads((folder / "words.json").read_text())
    assert about["counts"]["images"] == {"flickr8k": 3, "intel": 3, "caltech": 2, "food": 1, "ccp": 1}
    assert set(about["licences"]) == set(about["counts"]["images"])
    assert "puppy" in about["names"]["dog"]
    said = capsys.readouterr().out
    assert "images/flickr8k/broken.jpg" not in rows and "broken.jpg" in said
    assert "imagenette: left out" in said and "automatic words: left out" in said


def test_the_classifiers_words_are_tags_too(sources, wordnet, monkeypatch):
    torch.save(public_weights(3), sources / "weights.pth")
    classes = {"labels": ["idea", "lawn mower", "small gondola"], "wnids": ["n00000004"] * 2 + ["n00000003"]}
    (sources / "classes.json").write_text(json.dumps(classes))
    monkeypatch.setattr(prepare_everyday, "IMAGENET_FILE", sources / "classes.json")
    more = ["--efficientnet", str(sources / "weights.pth"), "--wordnet", str(wordnet), "--word_share", "0"]
    prepare_everyday.main(command(sources, *more))
    folder = sources / "out/everyday"
    rows = rows_of(folder)
    assert set(rows["images/flickr8k/no-words.jpg"]["tags"]) == {"idea", "mower", "boat", "water"}
    namer = CellNamer.read(folder / "classifier.safetensors")
    assert namer.names == ["idea", "mower", "boat"] and "shirt" in namer.parts["person"]
    assert rows["images/food/1.jpg"]["tags"][:2] == ["tomato", "meat"]
    about = json.loads((folder / "words.json").read_text())
    assert about["names"]["idea"] == [] and "efficientnet" in about["licences"]
    assert "lawn" not in (folder / "words.json").read_text()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, ValueError])
def test_an_interrupted_run_leaves_nothing(sources, monkeypatch, stop):

    def interrupt(*arguments):
        assert list((sources / "out").rglob("*.jpg")), "stopped before anything was written"
        raise stop("stopped")

    monkeypatch.setattr(prepare_everyday, "summary", interrupt)
    with pytest.raises((stop, SystemExit)):
        prepare_everyday.main(command(sources))
    assert not list((sources / "out").iterdir())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "there are no images"),
        (["--intel", "nowhere"], "no class folder of intel"),
        (["--food", "nowhere"], "nowhere/images is not a folder"),
        (["--flickr8k", "images"], "--flickr8k and --flickr8k_captions must"),
        (["--word_share", "1.5"], "--word_share is 1.5"),
    ],
)
def test_wrong_options_are_said(tmp_path, monkeypatch, capsys, arguments, named):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        prepare_everyday.main(["--output", "out", *arguments])
    assert named in str(error.value) + capsys.readouterr().err
    assert not list(tmp_path.rglob("*everyday*"))


def test_the_command_removes_half_a_result_when_it_is_stopped(sources):
    """SIGTERM arrives while the script waits for an image."""
    (sources / "flickr/b.jpg").unlink()
    os.mkfifo(sources / "flickr/b.jpg")
    script = [sys.executable, str(EXAMPLES / "prepare_everyday.py"), *command(sources)]
    process = subprocess.Popen(script, stdout=subprocess.PIPE, text=True)
    assert any(line.startswith("automatic words") for line in process.stdout)
    process.terminate()
    assert process.wait(60) == 143
    assert not list((sources / "out").iterdir())
