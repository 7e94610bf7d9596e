"""Model cards for the Hub."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError
from transformers.utils import logging

from .configuration_pgseg import HUB_TASK, PGSegConfig

logger = logging.get_logger(__name__)

RELEASED_LICENSE = "NVIDIA Source Code License (non-commercial), as for the released weights"

_TEMPLATE = """---
{metadata}
---

# {title}

PGSeg (Zhang et al., NeurIPS 2023) segments images by text labels and learns from image-text pairs alone. It is a
GroupViT whose group tokens are supervised by non-learnable prototypes (NPR).

## Use

```python
from transformers import AutoModel, AutoProcessor
from transformers.image_utils import load_image

model = AutoModel.from_pretrained("{repo_id}", trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained("{repo_id}", trust_remote_code=True)
image = load_image("photo.jpg")
outputs = model(**processor(images=image, labels=["cat", "dog"], return_tensors="pt"))
label_map = processor.post_process_semantic_segmentation(outputs, [(image.height, image.width)])[0]
```

`pipeline(model="{repo_id}", trust_remote_code=True)("photo.jpg", labels=["cat", "dog"])` does the same in one call.
With `pip install pgseg-hf` and `import pgseg_hf`, you do not need `trust_remote_code`.

## Model

{architecture}

## Training data and evaluation

{training}

## Intended use and limits

For research on segmentation without masks, and for fine-tuning on your own image-text pairs. A result has at most as
many labels as the model has groups in its last stage. Labels that do not resemble any training text are recognised
poorly. Scores are not probabilities. Do not use the model for decisions about people or where an error does harm.

## Licence

{license}

## Citation

```bibtex
@inproceedings{{zhang2023uncovering,
  title = {{Uncovering Prototypical Knowledge for Weakly Open-Vocabulary Semantic Segmentation}},
  author = {{Zhang, Fei and Zhou, Tianfei and Li, Boyang and He, Hao and Ma, Chaofan and Zhang, Tianjiao
            and Yao, Jiangchao and Zhang, Ya and Wang, Yanfeng}},
  booktitle = {{Advances in Neural Information Processing Systems}},
  year = {{2023}}
}}
```
"""


_PROCESSOR_CARD = """---
library_name: transformers
tags:
- pgseg
---

# {title}

The processor of a PGSeg model. This repository has no weights yet; the model's card replaces this one when they are
pushed.
"""


def processor_card(repo_id: str) -> ModelCard:
    """The card of a repository that has a processor but no model."""
    return ModelCard(_PROCESSOR_CARD.format(title=repo_id.rsplit("/", 1)[-1]))


def is_processor_card(card: ModelCard) -> bool:
    """Whether a card is a [`processor_card`], to be replaced by the model's."""
    return card.text.strip() == processor_card(_title_of(card)).text.strip()


def _title_of(card: ModelCard) -> str:
    return next((line[2:] for line in card.text.splitlines() if line.startswith("# ")), "")


def read_card(name_or_path: str) -> ModelCard | None:
    """Reads the card of a checkpoint in a folder or on the Hub; None if there is no readable one."""
    path = Path(name_or_path)
    try:
        return ModelCard.load(path / "README.md" if path.is_dir() else name_or_path)
    except (HfHubHTTPError, OSError, ValueError) as error:
        logger.warning(f"the model card of {name_or_path} cannot be read: {error}")
        return None


def public_name(name_or_path: str, card: ModelCard | None = None) -> str:
    """A Hub name unchanged; for a folder, the name on its card or the folder's own name."""
    if not Path(name_or_path).exists():
        return name_or_path
    name = (card and getattr(card.data, "model_name", None)) or Path(name_or_path).resolve().name
    return re.sub(r"[^\w.-]+", "-", name)


def inherited(starts: Sequence[str]) -> tuple[dict[str, Any], str, str]:
    """What a model inherits from the checkpoints that its training started from, folders or Hub names.

    Returns:
        Metadata (base_model, licence, datasets), a text on the licence, and the training data sections of their cards.
    """
    cards = {start: read_card(start) for start in starts}
    fields = {start: card.data.to_dict() if card else {} for start, card in cards.items()}
    names = {start: public_name(start, card) for start, card in cards.items()}
    licenses = [
        {key: of[key] for key in ("license", "license_name", "license_link") if of.get(key)}
        for of in fields.values()
    ]
    several = {"license": "other", "license_name": "several-see-the-card"}
    metadata: dict[str, Any] = {"base_model": list(names.values())} | (
        licenses[0] if all(each == licenses[0] for each in licenses) else several
    )
    if data := sorted({name for of in fields.values() for name in _listed(of.get("datasets"))}):
        metadata["datasets"] = data
    texts = [
        f"`{names[start]}`: {each.get('license_name') or each.get('license') or 'not stated'}"
        for start, each in zip(starts, licenses)
    ]
    taught = [
        f"From the card of `{names[start]}`:\n\n{section}"
        for start, card in cards.items()
        if card is not None and (section := _section_on_data(card))
    ]
    license_text = (
        f"Training started from other weights, whose terms also apply to these: {', '.join(texts)}."
    )
    return metadata, license_text, "\n\n".join(taught)


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _section_on_data(card: ModelCard) -> str:
    """The first section whose title is about training or data, with its headings one level deeper."""
    for section in re.split(r"(?m)^## ", card.text)[1:]:
        title, _, body = section.partition("\n")
        if re.search(r"\b(data|taught|training)\b", title.lower()):
            return re.sub(r"(?m)^#", "##", body.strip())
    return ""


def generate_model_card(
    config: PGSegConfig,
    repo_id: str = "path/to/this/folder",
    training: str = "Not recorded by the publisher of these weights.",
    license_text: str = "Not stated by the publisher of these weights.",
    license_id: str | None = None,
    starts: Sequence[str] = (),
) -> ModelCard:
    """Generates a card from the configuration and the given texts.

    Args:
        config: configuration of the model.
        repo_id: name for `from_pretrained` in the example.
        training: Markdown about data, recipe and results.
        license_text: sentence about the weights' licence.
        license_id: the Hub's identifier of that licence, `"other"` by default.
        starts: checkpoints that training started from, folders or Hub names. The card names them, and repeats their
            licence and what their cards say about data.
    """
    data: dict[str, Any] = {
        "library_name": "transformers",
        "license": license_id or "other",
        "pipeline_tag": HUB_TASK,
        "tags": ["pgseg", "groupvit", "open-vocabulary-segmentation", "weakly-supervised"],
    }
    if starts:
        metadata, license_text, taught = inherited(starts)
        data |= metadata
        training = f"{training}\n\n{taught}".strip()
    vision, text = config.vision_config, config.text_config
    rows = {
        "NPR variant": f"`{config.npr_variant}`",
        "image tower": f"width {vision.hidden_size}, depths {list(vision.depths)}, {vision.num_attention_heads} heads, "
        f"patch {vision.patch_size}, trained at {vision.image_size} px",
        "groups": f"{list(vision.num_output_groups)}",
        "text tower": f"width {text.hidden_size}, {text.num_hidden_layers} blocks, {text.num_attention_heads} heads, "
        f"{text.max_position_embeddings} tokens",
        "joint space": f"{config.projection_dim} dimensions",
    }
    table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
    content = _TEMPLATE.format(
        metadata=ModelCardData(**data).to_yaml(),
        title=repo_id.rsplit("/", 1)[-1] if repo_id != "path/to/this/folder" else "PGSeg",
        repo_id=repo_id,
        architecture=table,
        training=training,
        license=license_text,
    )
    return ModelCard(content)


class WithModelCard:
    """Mixin for a `PreTrainedModel` that adds a model card to its Hub repository."""

    config: PGSegConfig
    name_or_path: str

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """As in `PreTrainedModel`; a repository without a model card first gets a generated one, which inherits from
        the card of the loaded checkpoint."""
        token, private = kwargs.get("token"), kwargs.get("private")
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        has_card = api.file_exists(repo_id, "README.md")
        if has_card and is_processor_card(ModelCard.load(repo_id, token=token)):
            has_card = False
        if not kwargs.get("create_pr") and not has_card:
            starts = [self.name_or_path] if self.name_or_path else []
            generate_model_card(self.config, repo_id, starts=starts).push_to_hub(repo_id, token=token)
        return super().push_to_hub(repo_id, **kwargs)  # type: ignore[misc]
