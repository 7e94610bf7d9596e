"""Features of images and texts in the joint space, and their similarity.

They are separate from the towers that compute them, so that a batch can be encoded in parts (gradient caching).
Shapes: B images and N texts of this process, K groups, L patches, P prototypes, T tokens, C width, D joint width.
"""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .distributed import gather_features
from .precision import estimation_dtype

# Lower bound of the areas of groups and of 1 - share of a text, so that log odds stay finite.
SMALLEST_SHARE = 1e-4
# Below this log share, share and odds are equal up to float32 rounding.
NEGLIGIBLE_LOG_SHARE = -20.0


class StageFeatures(NamedTuple):
    """What the prototype losses need from a grouping stage.

    centers: [B, K, C], with gradient.
    prototypes: [B, P, C], constants.
    responsibilities: [B, L, P], constants; None if the assignment term has no weight.
    logits: [B, K, L], logits of the soft assignment; None if the assignment term has no weight.
    """

    centers: Tensor
    prototypes: Tensor
    responsibilities: Tensor | None = None
    logits: Tensor | None = None


@dataclass
class ImageFeatures:
    """Images in the joint space, not normalised.

    embeds, segment_embeds: [B, D] and [B, K, D].
    areas: [B, K], each group's share of its image; for mixture pooling.
    patch_embeds, patch_grid: [B, L, D], and height and width of the patch grid [B, 2]; for patch pooling.
    stages: features of the grouping stages.
    """

    embeds: Tensor
    segment_embeds: Tensor
    areas: Tensor | None = None
    patch_embeds: Tensor | None = None
    patch_grid: Tensor | None = None
    stages: tuple[StageFeatures, ...] = ()


@dataclass
class TextFeatures:
    """Texts in the joint space.

    embeds: [N, D], not normalised, with gradient.
    keys: int64 [N, T]; equal rows are equal texts.
    joint: [N, D], embeddings by the head's running statistics, constants; for variants that estimate from them.
    words: [N, T, D], the same for the tokens of words.
    word_mask: bool [N, T].
    prototypes: [N, P, .], constants; for variants that estimate them in the text tower.
    """

    embeds: Tensor
    keys: Tensor
    joint: Tensor | None = None
    words: Tensor | None = None
    word_mask: Tensor | None = None
    prototypes: Tensor | None = None


@dataclass
class TextOwners:
    """Which texts belong to which image.

    num_captions: number of captions. They come first, followed by the images' label texts in the order of the images.
    label_mask: bool [B, M], which labels each image has.
    text_targets: bool [B, num_captions], for captions that images share; if None, caption i belongs to image i.
    patch_targets: [B, h, w, num_captions], share of each cell of an image that shows each caption, where known.
    """

    num_captions: int
    label_mask: Tensor | None = None
    text_targets: Tensor | None = None
    patch_targets: Tensor | None = None

    def caption_owners(self, device: torch.device) -> Tensor:
        """Which captions belong to which image, bool [B, num_captions]."""
        if self.text_targets is not None:
            return self.text_targets.bool()
        return torch.eye(self.num_captions, dtype=torch.bool, device=device)

    def label_owners(self, count: int) -> Tensor:
        """Which label texts belong to which image, bool [B, count]; passing `count` avoids a GPU synchronisation."""
        images = torch.arange(len(self.label_mask), device=self.label_mask.device)
        return images[:, None] == images.repeat_interleave(self.label_mask.sum(1), output_size=count)

    def at_labels(self, rows: Tensor) -> Tensor:
        """Scatters rows of the label texts to their places in [B, M, ...], with zeros elsewhere."""
        placed = rows.new_zeros(*self.label_mask.shape, *rows.shape[1:])
        mask = self.label_mask.view(*self.label_mask.shape, *[1] * (rows.ndim - 1))
        return placed.masked_scatter(mask.expand_as(placed), rows)


def normalized(embeds: Tensor) -> Tensor:
    """Unit vectors in float32 or float64."""
    return nn.functional.normalize(embeds.to(estimation_dtype(embeds.dtype)), dim=-1)


def clamped_scale(log_scale: Tensor, config: Any) -> Tensor:
    """The factor on cosines, in float32 or float64."""
    scale = log_scale.to(estimation_dtype(log_scale.dtype)).exp()
    return scale.clamp(max=float(config.max_logit_scale))


@dataclass
class JointImages:
    """Unit vectors of images [B, D], their groups [B, K, D] and, for patch pooling, their patches [B, L, D] in the
    joint space. For mixture pooling, `areas` [B, K] holds each group's share of its image."""

    embeds: Tensor
    segments: Tensor
    areas: Tensor | None = None
    patches: Tensor | None = None
    _log_shares: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    @classmethod
    def normalized(cls, features: ImageFeatures) -> "JointImages":
        patches = None if features.patch_embeds is None else normalized(features.patch_embeds)
        return cls(normalized(features.embeds), normalized(features.segment_embeds), features.areas, patches)

    def gathered(self) -> "JointImages":
        """The images of all processes, for the losses that need them; does not support mixtures."""
        patches = None if self.patches is None else gather_features(self.patches)
        return JointImages(gather_features(self.embeds), gather_features(self.segments), patches=patches)

    def logits(self, text_ND: Tensor, scale: Tensor, config: Any) -> Tensor:
        """Scaled similarity [B, N] with normalised texts, by the configured pooling. Shares depend on all texts."""
        return POOLED[config.contrastive_pooling](self, text_ND, scale, config)

    def patch_log_shares(self, text_ND: Tensor, scale: Tensor) -> Tensor:
        """Log softmax over normalised texts at each patch, [B, L, N]; cached, because two losses need it."""
        if self._log_shares is None or self._log_shares[0] is not text_ND:
            self._log_shares = text_ND, (scale * (self.patches @ text_ND.T)).log_softmax(dim=2)
        return self._log_shares[1]


def _by_mean(images: JointImages, text_ND: Tensor, scale: Tensor, config: Any) -> Tensor:
    return scale * (images.embeds @ text_ND.T)


def _by_groups(images: JointImages, text_ND: Tensor, scale: Tensor, config: Any) -> Tensor:
    logits_BKN = scale * (images.segments @ text_ND.T)
    return logits_BKN.logsumexp(dim=1) - math.log(logits_BKN.shape[1])


def _by_mixture(images: JointImages, text_ND: Tensor, scale: Tensor, config: Any) -> Tensor:
    logits_BKN = scale * (images.segments @ text_ND.T)
    log_areas_BK = images.areas.to(logits_BKN.dtype).clamp(min=SMALLEST_SHARE).log()
    log_shares_BKN = logits_BKN.log_softmax(dim=2) + log_areas_BK[..., None]
    return log_odds_of_being_seen(log_shares_BKN.logsumexp(dim=1), config.mixture_looks)


def _by_patches(images: JointImages, text_ND: Tensor, scale: Tensor, config: Any) -> Tensor:
    if config.contrastive_loss == "sigmoid":
        log_shares_BLN = images.patch_log_shares(text_ND, scale)
        log_shares_BN = log_shares_BLN.logsumexp(dim=1) - math.log(log_shares_BLN.shape[1])
        return log_odds_of_being_seen(log_shares_BN, config.mixture_looks)
    logits_BLN = scale * (images.patches @ text_ND.T)
    return (logits_BLN.softmax(dim=1) * logits_BLN).sum(dim=1)


POOLED = {"mean": _by_mean, "groups": _by_groups, "mixture": _by_mixture, "patches": _by_patches}
"""Functions of images [B], normalised texts [N, D], the scale and the configuration that return logits [B, N],
without the sigmoid loss's bias. What each pooling requires of the model is in `poolings.py`."""


@dataclass
class Scales:
    """Factors on cosines, of images with texts and of groups with prototypes (float32 or float64), the bias of the
    sigmoid loss, and the initial values of the text prototypes [1, P, D]."""

    contrastive: Tensor
    prototype: Tensor | None = None
    bias: Tensor | None = None
    text_seeds: Tensor | None = None


@dataclass
class Batch:
    """Input of the losses: the features of this process's images and texts, which texts belong to which image, and the
    configuration and scales of the model that computed them."""

    config: Any
    scales: Scales
    images: ImageFeatures
    texts: TextFeatures
    owners: TextOwners

    def __post_init__(self) -> None:
        self.joint = JointImages.normalized(self.images)


def log_odds_of_being_seen(log_shares: Tensor, looks: float) -> Tensor:
    """Log odds of $1-(1-s)^n$, the probability that at least one of n = `looks` random points hits a share s."""
    negligible = NEGLIGIBLE_LOG_SHARE - math.log(looks)
    log_shares = log_shares.clamp(max=math.log1p(-SMALLEST_SHARE))
    log_unseen = looks * torch.log1p(-log_shares.clamp(min=negligible).exp())
    odds = torch.log(-torch.expm1(log_unseen)) - log_unseen
    return torch.where(log_shares < negligible, log_shares + math.log(looks), odds)
