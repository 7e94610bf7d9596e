"""Model cards: what they inherit, and what a push to the Hub writes."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from tiny_models import CLIP_TEXT, tiny_config, tiny_model
from transformers import PreTrainedModel
from transformers.processing_utils import ProcessorMixin

import pgseg_hf.model_cards
import pgseg_hf.processing_pgseg
from pgseg_hf import DEFAULT_CHECKPOINT, PGSegModel
from pgseg_hf.model_cards import generate_model_card, processor_card

CARD = """---
license: mit
datasets:
- own/photos
---

# Start

## Use

Nothing here.

## Training data

Ten photos.

### Where from

A garden.
"""


@pytest.fixture
def start(tmp_path):
    folder = tmp_path / "my start"
    folder.mkdir()
    (folder / "README.md").write_text(CARD)
    return str(folder)


def test_a_fine_tuned_model_inherits_licence_base_model_and_data():
    card = generate_model_card(tiny_config(), training="Ours.", starts=[DEFAULT_CHECKPOINT])
    assert card.data.base_model == ["pgseg-small-everyday"]
    assert (card.data.license, card.data.license_name) == ("other", "research-only")
    assert "`pgseg-small-everyday`: research-only" in card.text
    assert "Ours." in card.text and "Flickr8k" in card.text.split("## Training data")[1].split("\n## ")[0]


def test_several_starts_keep_their_terms_apart(start, tmp_path):
    card = generate_model_card(tiny_config(), starts=[start])
    assert (card.data.license, card.data.datasets, card.data.base_model) == (
        "mit",
        ["own/photos"],
        ["my-start"],
    )
    section = card.text.split("## Training data and evaluation")[1].split("\n## ")[0]
    assert "Ten photos." in section and "#### Where from" in section and "Nothing here" not in section
    (tmp_path / "bare").mkdir()
    card = generate_model_card(tiny_config(), starts=[start, str(tmp_path / "bare")])
    assert card.data.license == "other" and card.data.base_model == ["my-start", "bare"]
    assert "`my-start`: mit, `bare`: not stated" in card.text
    assert generate_model_card(tiny_config()).data.base_model is None


@pytest.mark.parametrize("kind", ["new", "fine-tuned", "shipped", "processor"])
def test_the_hub_takes_the_cards(kind):
    card = {
        "new": lambda: generate_model_card(tiny_config(), "owner/name"),
        "fine-tuned": lambda: generate_model_card(tiny_config(), "owner/name", starts=[DEFAULT_CHECKPOINT]),
        "shipped": lambda: ModelCard.load(Path(DEFAULT_CHECKPOINT) / "README.md"),
        "processor": lambda: processor_card("owner/name"),
    }[kind]()
    try:
        card.validate(repo_type="model")
    except ValueError:
        raise  # the card is invalid
    except Exception as error:  # the network fails
        pytest.skip(f"the Hub cannot be reached: {error}")


class Hub:
    """A fake Hub repository that has no card at first."""

    card = None

    def __init__(self, token=None):
        pass

    def create_repo(self, repo_id, **kwargs):
        self.repo_id = repo_id
        return self

    def file_exists(self, repo_id, name):
        return Hub.card is not None


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(Hub, "card", None)
    for module in (pgseg_hf.model_cards, pgseg_hf.processing_pgseg):
        monkeypatch.setattr(module, "HfApi", Hub)
    for owner in (PreTrainedModel, ProcessorMixin):
        monkeypatch.setattr(owner, "push_to_hub", lambda self, repo_id, **kwargs: repo_id)
    monkeypatch.setattr(ModelCard, "push_to_hub", lambda self, repo_id, **kwargs: setattr(Hub, "card", self))
    load = ModelCard.load
    monkeypatch.setattr(
        ModelCard, "load", lambda name, **kwargs: load(name) if Path(name).exists() else Hub.card
    )
    return Hub


def test_neither_order_of_pushing_leaves_a_blank_card(hub, tiny_segmenter):
    model, processor = tiny_model(text_config=CLIP_TEXT), tiny_segmenter.processor
    processor.push_to_hub("owner/name")
    assert "This repository has no weights yet" in hub.card.text and hub.card.data.tags == ["pgseg"]
    model.push_to_hub("owner/name")
    whole = hub.card
    assert "## Training data and evaluation" in whole.text
    processor.push_to_hub("owner/name")
    model.push_to_hub("owner/name")
    assert hub.card is whole


def test_a_model_that_was_loaded_is_pushed_with_its_terms(hub, start):
    tiny_model().save_pretrained(start)
    PGSegModel.from_pretrained(start).push_to_hub("owner/other")
    assert (hub.card.data.license, hub.card.data.base_model) == ("mit", ["my-start"])
