"""What the NPR variants require of a configuration; their computation is in `npr.py`."""

from dataclasses import dataclass

SEGMENT_SOURCES = ("groups", "patches", "inputs")


@dataclass(frozen=True)
class VariantSettings:
    """What an NPR variant requires of a configuration, and for training and running such a model.

    Args:
        segment_source, contrastive_pooling, assignment_weight: defaults of the configuration.
        segment_sources: supported segment sources.
        eager_gradients: whether attention defaults to eager in training.
        guards_losses: whether training leaves out prototype losses that are NaN.
        one_text_an_image: whether the losses need exactly one text per image.
    """

    segment_source: str = "groups"
    contrastive_pooling: str = "mean"
    assignment_weight: float = 0.0
    segment_sources: tuple[str, ...] = SEGMENT_SOURCES
    eager_gradients: bool = False
    guards_losses: bool = False
    one_text_an_image: bool = False


# `npr.NPR` adds further variants.
NPR_VARIANTS = {
    "none": VariantSettings(),
    "released": VariantSettings(
        segment_sources=("groups",), eager_gradients=True, guards_losses=True, one_text_an_image=True
    ),
    # Values chosen with examples/ablate_npr.py on three seeds, see examples/ablation.md.
    "corrected": VariantSettings("patches", "groups", 0.2),
}
