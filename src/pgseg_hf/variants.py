"""What the variants of NPR ask of a configuration; what they do is in `npr.py`."""

from dataclasses import dataclass

SEGMENT_SOURCES = ("groups", "patches", "inputs")


@dataclass(frozen=True)
class VariantSettings:
    """What a variant of NPR asks of a configuration, and of those who train and run such a model.

    Args:
        segment_source, contrastive_pooling, assignment_weight: where the configuration does not say.
        segment_sources: those that the variant has.
        eager_gradients: in training attention is eager unless asked otherwise.
        guards_losses: training leaves out prototype losses that are NaN.
        one_text_an_image: the losses need it.
    """

    segment_source: str = "groups"
    contrastive_pooling: str = "mean"
    assignment_weight: float = 0.0
    segment_sources: tuple[str, ...] = SEGMENT_SOURCES
    eager_gradients: bool = False
    guards_losses: bool = False
    one_text_an_image: bool = False


# `npr.NPR` adds those of further variants.
NPR_VARIANTS = {
    "none": VariantSettings(),
    "released": VariantSettings(
        segment_sources=("groups",), eager_gradients=True, guards_losses=True, one_text_an_image=True
    ),
    # What three seeds of examples/ablate_npr.py support, see examples/README.md.
    "corrected": VariantSettings("patches", "groups", 0.2),
}
