"""What the poolings ask of a model and its training; how they compute is in `features.py`."""

from dataclasses import dataclass

CONTRASTIVE_LOSSES = ("info_nce", "multi_positive", "sigmoid")


@dataclass(frozen=True)
class PoolingSettings:
    """What a pooling needs to know of images and of the loss.

    Args:
        parts: what of an image is compared with texts: "image" (the mean of its segment tokens), "groups" or "patches".
        by_share: with the sigmoid loss the logits are log odds of a text's share of the image among all texts, which
            need no bias.
        losses: contrastive losses that it is for.
    """

    parts: str
    by_share: bool = False
    losses: tuple[str, ...] = CONTRASTIVE_LOSSES

    @property
    def words_compete(self) -> bool:
        """With the sigmoid loss: texts of a batch that no image has take part in the shares, and have no loss."""
        return self.by_share and self.parts == "patches"


POOLINGS = {
    "mean": PoolingSettings("image"),
    "groups": PoolingSettings("groups"),
    "mixture": PoolingSettings("groups", by_share=True, losses=("sigmoid",)),
    "patches": PoolingSettings("patches", by_share=True),
}


def refuse_other_losses(pooling: str, loss: str) -> None:
    """Raises a ValueError for a pooling with a contrastive loss that it is not for."""
    if loss not in POOLINGS[pooling].losses:
        others = ", ".join(name for name, settings in POOLINGS.items() if loss in settings.losses)
        raise ValueError(
            f"contrastive_pooling is {pooling!r} and contrastive_loss {loss!r}, expected "
            f"{' or '.join(map(repr, POOLINGS[pooling].losses))}; or one of the poolings {others}."
        )
