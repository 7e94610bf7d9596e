"""Features of a batch of images and texts in the joint space, and their similarity.

They are kept apart from the towers that make them, so that a batch may be encoded in parts (gradient caching).
Shapes: B images of this process, N texts of this process, K groups, L patches, P prototypes, T tokens, C width, D joint
width.
"""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .distributed import gather_features
from .precision import estimation_dtype

# Areas of groups are at least this, and shares of texts this far from 1, so that log odds stay finite.
SMALLEST_SHARE = 1e-4
# Below it the chance to be seen in one look is its odds, to float32's rounding.
NEGLIGIBLE_LOG_SHARE = -20.0


class StageFeatures(NamedTuple):
    """What the prototype losses need of a grouping stage.

    centers: [B, K, C]; gradient flows into them.
    prototypes: [B, P, C], constants.
    responsibilities: [B, L, P], constants; None where the assignment term has no weight.
    logits: [B, K, L] of the soft assignment; None likewise.
    """

    centers: Tensor
    prototypes: Tensor
    responsibilities: Tensor | None = None
    logits: Tensor | None = None


@dataclass
class ImageFeatures:
    """Images in the joint space, not normalised: `embeds` [B, D], `segment_embeds` [B, K, D], for mixture pooling each
    group's share of the image, `areas` [B, K], for patch pooling `patch_embeds` [B, L, D] with the height and width of
    their grid, `patch_grid` [B, 2], and the stages' parts."""

    embeds: Tensor
    segment_embeds: Tensor
    areas: Tensor | None = None
    patch_embeds: Tensor | None = None
    patch_grid: Tensor | None = None
    stages: tuple[StageFeatures, ...] = ()


@dataclass
class TextFeatures:
    """Texts in the joint space.

    embeds: [N, D], not normalised; gradient flows into them.
    keys: int64 [N, T], equal rows are equal texts.
    joint: [N, D], the same through the head's running statistics, constants; variants that estimate from them.
    words: [N, T, D], the tokens of words likewise.
    word_mask: bool [N, T].
    prototypes: [N, P, .], constants; variants that estimate them with the texts.
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

    num_captions: the first so many texts are captions, the rest the images' label texts, image by image.
    label_mask: bool [B, M], which labels each image has.
    text_targets: bool [B, num_captions], where captions are shared; None: caption i belongs to image i.
    patch_targets: [B, h, w, num_captions], how much of a cell of each image shows each caption, where that is known.
    """

    num_captions: int
    label_mask: Tensor | None = None
    text_targets: Tensor | None = None
    patch_targets: Tensor | None = None

    def caption_owners(self, device: torch.device) -> Tensor:
        """bool [B, num_captions]."""
        if self.text_targets is not None:
            return self.text_targets.bool()
        return torch.eye(self.num_captions, dtype=torch.bool, device=device)

    def label_owners(self, count: int) -> Tensor:
        """bool [B, count], `count` being the number of label texts, which a GPU would have to be asked for."""
        images = torch.arange(len(self.label_mask), device=self.label_mask.device)
        return images[:, None] == images.repeat_interleave(self.label_mask.sum(1), output_size=count)

    def at_labels(self, rows: Tensor) -> Tensor:
        """Rows of the label texts at their places, [B, M, ...], zeros elsewhere."""
        placed = rows.new_zeros(*self.label_mask.shape, *rows.shape[1:])
        mask = self.label_mask.view(*self.label_mask.shape, *[1] * (rows.ndim - 1))
        return placed.masked_scatter(mask.expand_as(placed), rows)


def normalized(embeds: Tensor) -> Tensor:
    """Unit vectors in float32 or better."""
    return nn.functional.normalize(embeds.to(estimation_dtype(embeds.dtype)), dim=-1)


def clamped_scale(log_scale: Tensor, config: Any) -> Tensor:
    """The factor on cosines, in float32 or better."""
    scale = log_scale.to(estimation_dtype(log_scale.dtype)).exp()
    return scale.clamp(max=float(config.max_logit_scale))


@dataclass
class JointImages:
    """Images [B, D] and their groups [B, K, D] as unit vectors of the joint space, for mixture pooling each group's
    share of its image [B, K], and for patch pooling the patches [B, L, D]."""

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
        """Those of all processes, for the losses that need them; not for mixtures."""
        patches = None if self.patches is None else gather_features(self.patches)
        return JointImages(gather_features(self.embeds), gather_features(self.segments), patches=patches)

    def logits(self, text_ND: Tensor, scale: Tensor, config: Any) -> Tensor:
        """Scaled similarity [B, N] with normalised texts, by the configured pooling; by shares it depends on what other
        texts there are."""
        return POOLED[config.contrastive_pooling](self, text_ND, scale, config)

    def patch_log_shares(self, text_ND: Tensor, scale: Tensor) -> Tensor:
        """Log softmax over normalised texts at each patch, [B, L, N]; of the same tensor computed once, as two losses
        need it."""
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
"""From images [B], normalised texts [N, D], their scale and the configuration to logits [B, N]; what each asks of the
model is in `poolings.py`."""


@dataclass
class Scales:
    """What a model compares its features by: factors on cosines in float32 or better, of images with texts and of
    groups with prototypes, the sigmoid loss's bias, and the seeds of the text prototypes [1, P, D]."""

    contrastive: Tensor
    prototype: Tensor | None = None
    bias: Tensor | None = None
    text_seeds: Tensor | None = None


@dataclass
class Batch:
    """What the losses are computed from: the features of this process's images and texts, whom the texts belong to, and
    the configuration and scales of the model that made them."""

    config: Any
    scales: Scales
    images: ImageFeatures
    texts: TextFeatures
    owners: TextOwners

    def __post_init__(self) -> None:
        self.joint = JointImages.normalized(self.images)


def log_odds_of_being_seen(log_shares: Tensor, looks: float) -> Tensor:
    """Log odds that one at least of so many looks, each at a point drawn at random, falls on what has this share of a
    image: of $1-(1-s)^n$."""
    negligible = NEGLIGIBLE_LOG_SHARE - math.log(looks)
    log_shares = log_shares.clamp(max=math.log1p(-SMALLEST_SHARE))
    log_unseen = looks * torch.log1p(-log_shares.clamp(min=negligible).exp())
    odds = torch.log(-torch.expm1(log_unseen)) - log_unseen
    return torch.where(log_shares < negligible, log_shares + math.log(looks), odds)
