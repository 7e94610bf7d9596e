"""The distillation example: its sources, its loss, its map of the space, and complete runs with a tiny teacher."""

import json
import random

import distill_text_tower
import numpy as np
import pytest
import text_tower_models
import text_tower_texts
import torch
from tiny_models import tiny_config, tiny_texts
from torch.nn.functional import normalize
from transformers import AutoTokenizer, BertConfig, BertModel, BertTokenizer, CLIPTokenizer

from pgseg_hf import PGSegTextModelWithProjection

NOUNS = {
    "kitten": "05",
    "wombat": "05",
    "idea": "09",
    "fire_engine": "06",
    "hat": "06",
    "box": "06",
    "foot": "08",
}
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A random teacher that reads letters, a WordNet of a few nouns, captions of two images, and some vectors."""
    folder = tmp_path_factory.mktemp("sources")
    torch.manual_seed(0)
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    BertTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}).save_pretrained(
        folder / "teacher"
    )
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(pieces), **sizes)).save_pretrained(folder / "teacher")

    wordnet = folder / "wordnet"
    wordnet.mkdir()
    data = [
        f"{row:08d} {file} n 01 {noun} 0 000 | a {noun} to see; not \n"
        for row, (noun, file) in enumerate(NOUNS.items())
    ]
    data.append("00000099 18 n 01 Einstein 0 000 | a person; \n")
    index = [f"{noun} n 1 0 1 1 {row:08d}  \n" for row, noun in enumerate(NOUNS)] + [
        "einstein n 1 0 1 0 00000099  \n"
    ]
    (wordnet / "data.noun").write_text("  1 a licence  \n" + "".join(data))
    (wordnet / "index.noun").write_text("  1 a licence  \n" + "".join(index))
    (wordnet / "index.adj").write_text("red a 1 0 1 0 00000001  \n")
    (wordnet / "noun.exc").write_text("feet foot\n")
    (wordnet / "cntlist.rev").write_text("kitten%1:05:00:: 1 7\nred%3:00:00:: 1 9\n")

    captions = folder / "captions"
    captions.mkdir()
    (captions / "Flickr_8k.trainImages.txt").write_text("1.jpg\n")
    (captions / "Flickr8k.token.txt").write_text("1.jpg#0\tA red hat on a Kitten .\n2.jpg#0\tA wombat .\n")
    words = ["the", "red", "hat", "kitten", "man", "boy"]
    vectors = {word: [*np.eye(6)[row].tolist(), 1.0, row] for row, word in enumerate(words)}
    (folder / "glove.json").write_text(json.dumps({"dimensions": 6, "words": words, "vectors": vectors}))
    return folder


def test_what_the_sources_hold(sources):
    wordnet = text_tower_texts.read_wordnet(sources / "wordnet")
    assert set(wordnet.concrete) == {noun.replace("_", " ") for noun in NOUNS}
    assert not wordnet.concrete["idea"] and wordnet.concrete["fire engine"]
    assert wordnet.glosses["hat"] == "a hat to see"
    assert wordnet.counts == {"kitten": 7}
    assert wordnet.adjectives == {"red"}
    assert text_tower_texts.read_captions(sources / "captions") == ["a red hat on a kitten."]


def test_plurals():
    nouns = ["cat", "box", "lady", "toy", "foot", "jeans", "glass", "bus"]
    plurals = ["cats", "boxes", "ladies", "toys", "feet", "jeans", "glasses", "buses"]
    assert [text_tower_texts.plural(noun, {"foot": "feet"}) for noun in nouns] == plurals
    assert text_tower_texts.plural("fire engine", {}) == "fire engines"


def test_no_training_text_holds_a_held_out_word(sources, tmp_path):
    wordnet = text_tower_texts.read_wordnet(sources / "wordnet")
    glove_words, vectors = text_tower_texts.read_glove(sources / "glove.json", tmp_path)
    assert glove_words[2] == "hat" and vectors.shape == (6, 6)
    arguments = (wordnet, glove_words, text_tower_texts.read_captions(sources / "captions"))
    bank = text_tower_texts.build_bank(*arguments, max_nouns=250, held_out=60)
    assert bank == text_tower_texts.build_bank(*arguments, max_nouns=250, held_out=60)
    assert len(bank.held_out) == 60
    held_out = set(bank.held_out)
    for text in [*bank.labels, *bank.texts]:
        assert held_out.isdisjoint(text_tower_texts.word_groups(text)), text
    assert len(bank.labels) == len(bank.plurals) == len(bank.weights)
    assert len(text_tower_texts.EVERYDAY) == len(set(text_tower_texts.EVERYDAY)) == 150
    names = {name for _, name in text_tower_texts.SYNONYMS}
    assert len(text_tower_texts.SYNONYMS) == 40 and names <= set(text_tower_texts.EVERYDAY)


def test_loss_is_least_at_the_targets_and_feels_their_structure():
    loss = distill_text_tower.distillation_loss
    targets = normalize(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    assert loss(targets, targets, 1.0, 0.1).item() == pytest.approx(0, abs=1e-6)
    assert loss(2 * targets, targets, 1.0, 0.1).item() == pytest.approx(0.1, abs=1e-6)
    # The cosines with the targets are equal, but the similarities within the batch differ.
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)))[0]
    rotated = targets @ rotation
    structure = loss(rotated, targets, 1.0, 0.1) - loss(rotated, targets, 0.0, 0.1)
    assert structure.item() == pytest.approx(0, abs=1e-5)
    assert (loss(targets.flip(0), targets, 1.0, 0.1) - loss(targets.flip(0), targets, 0.0, 0.1)).item() > 0.1


@pytest.mark.parametrize("kind", ["centre", "whiten"])
@torch.no_grad()
def test_folded_map_is_the_applied_map(kind):
    model = PGSegTextModelWithProjection(tiny_config()).double().eval()
    texts = tiny_texts(20, seed=3)
    before = model(texts)
    mean, matrix = text_tower_models.space_map(before, kind, shrinkage=0.2)
    text_tower_models.fold_map(model.text_projection, mean, matrix)
    after = model(texts)
    torch.testing.assert_close(after, (before - mean) @ matrix.T)
    torch.testing.assert_close(after.mean(0), torch.zeros(8).double(), atol=1e-9, rtol=0)
    variances = (
        torch.linalg.eigvalsh(after.T @ after),
        torch.linalg.eigvalsh((before - mean).T @ (before - mean)),
    )
    spreads = [values[-1] / values.mean() for values in variances]
    assert spreads[0] < spreads[1] / 1.5 if kind == "whiten" else spreads[0] == pytest.approx(spreads[1])


@pytest.mark.parametrize("start", ["glove", "teacher"])
def test_whole_run_and_a_second_look(sources, tmp_path, capsys, start):
    arguments = (
        f"--teacher {sources}/teacher --wordnet {sources}/wordnet --captions {sources}/captions "
        f"--glove {sources}/glove.json --cache {sources}/cache --max_nouns 250 --held_out 20 --merges 300 --context 12 "
        f"--width 16 --layers 1 --head_width 16 --steps 3 --batch_size 16 --token_embeddings {start}"
    ).split()
    main, folder = distill_text_tower.main, tmp_path / "tower"
    main([*arguments, "--output_dir", str(folder)])
    output = capsys.readouterr().out
    assert "20 nouns held out" in output and "| cosine, held-out nouns |" in output
    assert f"{folder}: a tower of" in output
    assert [path.name for path in tmp_path.iterdir()] == ["tower"]
    model = PGSegTextModelWithProjection.from_pretrained(folder)
    for kind in (CLIPTokenizer, AutoTokenizer):
        tokenizer = kind.from_pretrained(folder)
        assert (len(tokenizer), tokenizer.model_max_length) == (model.config.text_config.vocab_size, 12)
    tokens = tokenizer(["a cat", "a cat with a hat"], padding=True, return_tensors="pt")
    assert model(**tokens).shape == (2, 24)

    # Nothing is embedded twice, and a finished tower gives the same figures.
    teacher_files = sorted((sources / "cache").rglob("*"))
    evaluate = [*arguments, "--evaluate", str(folder), "--fold=centre"]
    main([*evaluate, "--output_dir", f"{tmp_path}/centred"])
    assert sorted((sources / "cache").rglob("*")) == teacher_files
    table = output[output.index("| as its") : output.index("\n\n", output.index("| as its"))]
    assert table in capsys.readouterr().out
    centred = PGSegTextModelWithProjection.from_pretrained(tmp_path / "centred")
    assert not torch.equal(centred.text_projection[3].bias, model.text_projection[3].bias)
    with pytest.raises(SystemExit):
        main(evaluate)
    assert "--output_dir is missing" in capsys.readouterr().err


def test_tokens_of_known_words_start_from_their_vectors():
    tokenizer = distill_text_tower.default_tokenizer(12, 2000)
    model = PGSegTextModelWithProjection(tiny_config(text_config={"vocab_size": len(tokenizer)}))
    vectors = {word: torch.randn(6) for word in ("cat", "dog", "house", "wombat")}
    assert distill_text_tower.start_token_embeddings(model, tokenizer, vectors, std=0.1) == 3
    rows = model.get_input_embeddings().weight[
        [tokenizer.convert_tokens_to_ids(f"{word}</w>") for word in ("cat", "dog", "house")]
    ]
    known = torch.stack([vectors[word] for word in ("cat", "dog", "house")])
    known = known - known.mean(0)
    ours, theirs = rows @ rows.T, known @ known.T
    torch.testing.assert_close(ours / ours.trace(), theirs / theirs.trace())
    assert rows.std(correction=0).item() == pytest.approx(0.1, rel=0.1)


def test_label_in_template_has_its_plural_one_time_in_five():
    bank, rng = text_tower_texts.TextBank(labels=["foot"], plurals=["feet"]), random.Random(0)
    drawn = [distill_text_tower.in_template(bank, 0, rng) for _ in range(2000)]
    assert 0.15 < sum("feet" in text for text in drawn) / 2000 < 0.25
    assert all(("foot" in text) != ("feet" in text) for text in drawn)
