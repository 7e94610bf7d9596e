"""Model cards in the Hub's form."""

from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .configuration_pgseg import HUB_TASK, PGSegConfig

RELEASED_LICENSE = "NVIDIA Source Code License (non-commercial), that of the released weights"

_TEMPLATE = """---
{metadata}
---

# {title}

PGSeg (Zhang et al., NeurIPS 2023) segments pictures by words and learns from image-text pairs alone: a GroupViT whose
group tokens are supervised by non-learnable prototypes (NPR).

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

`pipeline(model="{repo_id}", trust_remote_code=True)("photo.jpg", labels=["cat", "dog"])` does it in one call. With
`pip install pgseg-hf` and `import pgseg_hf`, `trust_remote_code` is not needed.

## Model

{architecture}

## Training data and evaluation

{training}

## Intended use and limits

For research on segmentation without masks, and for fine-tuning on one's own image-text pairs. An image shows at most as
many labels as the model has groups in its last stage; labels that resemble no training text are named badly; scores are
no probabilities. Not for decisions about people, nor where an error does harm.

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


def generate_model_card(
    config: PGSegConfig,
    repo_id: str = "path/to/this/folder",
    training: str = "Not recorded by whoever published these weights.",
    license_text: str = "Not stated by whoever published these weights.",
    license_id: str | None = None,
) -> ModelCard:
    """A card that says what the configuration tells and what is passed in, and no more.

    Args:
        config: of the model.
        repo_id: name for `from_pretrained` in the example.
        training: Markdown on data, recipe and figures.
        license_text: sentence on the weights' licence.
        license_id: the Hub's identifier of that licence, `"other"` by default.
    """
    data: dict[str, Any] = {
        "library_name": "transformers",
        "license": license_id or "other",
        "pipeline_tag": HUB_TASK,
        "tags": ["pgseg", "groupvit", "open-vocabulary-segmentation", "weakly-supervised"],
    }
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
