"""What each pooling requires of a model and its training; the computation is in `features.py`."""

from dataclasses import dataclass

CONTRASTIVE_LOSSES = ("info_nce", "multi_positive", "sigmoid")


@dataclass(frozen=True)
class PoolingSettings:
    """What a pooling requires of images and of the loss.

    Args:
        parts: what is compared with texts: "image" (the mean of its segment tokens), "groups" or "patches".
        by_share: whether the logits of the sigmoid loss are log odds of a text's share of the image, without a bias.
        losses: supported contrastive losses.
    """

    parts: str
    by_share: bool = False
    losses: tuple[str, ...] = CONTRASTIVE_LOSSES

    @property
    def words_compete(self) -> bool:
        """Whether in the sigmoid loss texts that no image has compete for shares, without a loss of their own."""
        return self.by_share and self.parts == "patches"


POOLINGS = {
    "mean": PoolingSettings("image"),
    "groups": PoolingSettings("groups"),
    "mixture": PoolingSettings("groups", by_share=True, losses=("sigmoid",)),
    "patches": PoolingSettings("patches", by_share=True),
}


def refuse_other_losses(pooling: str, loss: str) -> None:
    """Raises a ValueError if a pooling does not support a contrastive loss."""
    if loss not in POOLINGS[pooling].losses:
        others = ", ".join(name for name, settings in POOLINGS.items() if loss in settings.losses)
        raise ValueError(
            f"contrastive_pooling is {pooling!r} and contrastive_loss is {loss!r}, expected the loss "
            f"{' or '.join(map(repr, POOLINGS[pooling].losses))}, or one of the poolings {others}."
        )
