"""Training-free refinement of score maps by the colours of the image.

Shapes: C channels of scores, P neighbours, H x W pixels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...values import is_whole, whole_number

# The affinity's bandwidth as a share of the local standard deviation, and the offset that keeps it above 0 in flat
# regions: `models/mods/pamr.py` of the released code.
_BANDWIDTH = 0.1
_EPS = 1e-8

_DIRECTIONS = [(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1) if (row, column) != (0, 0)]


@dataclass(frozen=True)
class PixelAdaptiveRefinement:
    """Pixel-adaptive mask refinement (PAMR): repeatedly replaces each score by a weighted mean over its neighbours, in
    which similar colours have larger weights.

    The neighbours of a pixel p are the 8 pixels around it at each dilation; border pixels are replicated. Let I_p be
    the colour of p, and s_p the sample standard deviation (n - 1) of each channel over the neighbours and p itself,
    which counts once for each dilation. The weight of neighbour q is
    softmax_q(mean over channels of -|I_p - I_q| / (1e-8 + 0.1 s_p)).

    Args:
        iterations: number of iterations; 0 returns the scores unchanged. 10 in the released code, TCL and NACLIP.
        dilations: distances of the neighbours in pixels. 8 and 16 in SCLIP and NACLIP; 1, 2, 4, 8, 12 and 24 in the
            released code and TCL.

    Raises:
        ValueError: an option is out of range.

    Source: Araslanov and Roth, Single-stage semantic segmentation from image labels, CVPR 2020, the section on
    pixel-adaptive mask refinement; formula and defaults of its released code (visinf/1-stage-wseg).
    """

    iterations: int = 10
    dilations: tuple[int, ...] = (8, 16)

    def __post_init__(self) -> None:
        object.__setattr__(self, "iterations", whole_number(self.iterations, "iterations", least=0))
        object.__setattr__(self, "dilations", tuple(self.dilations))
        if not self.dilations or not all(is_whole(value) and value >= 1 for value in self.dilations):
            raise ValueError(
                f"dilations is {self.dilations!r}, expected at least one value, all integers of at least 1."
            )

    @torch.no_grad()
    def __call__(self, scores_CHW: Tensor, image_3HW: Tensor) -> Tensor:
        """Refines the scores of one image.

        Args:
            scores_CHW: float scores; probabilities remain probabilities.
            image_3HW: float image of the same size, from 0 to 1. The weights do not depend on the brightness or
                contrast of a channel.

        Returns:
            float [C, H, W] in the dtype of the scores, within the range of each channel. Needs memory for C + P maps.

        Raises:
            ValueError: wrong shapes or dtypes.
        """
        if scores_CHW.ndim != 3 or image_3HW.shape != (3, *scores_CHW.shape[1:]):
            raise ValueError(
                f"scores have shape {tuple(scores_CHW.shape)} and the image {tuple(image_3HW.shape)}, expected "
                "[C, H, W] and [3, H, W]."
            )
        if not (scores_CHW.is_floating_point() and image_3HW.is_floating_point()):
            raise ValueError(
                f"scores are {scores_CHW.dtype} and the image {image_3HW.dtype}, expected floats."
            )
        # In half precision the weights would not sum to 1, and the error would grow with each iteration.
        dtype = torch.promote_types(scores_CHW.dtype, torch.float32)
        scores = scores_CHW.to(dtype, copy=True)
        if not self.iterations or not scores.numel():
            return scores.to(scores_CHW.dtype)
        weights_PHW = self._weights(image_3HW.to(scores.device, dtype))
        for channel in scores:
            # One channel at a time: its maps fit into the cache, and only one map is padded.
            for _ in range(self.iterations):
                neighbours = self._neighbours(channel[None])
                channel.zero_()
                for weight_HW, neighbour_1HW in zip(weights_PHW, neighbours, strict=True):
                    channel.addcmul_(weight_HW, neighbour_1HW[0])
        return scores.to(scores_CHW.dtype)

    def _weights(self, image_3HW: Tensor) -> Tensor:
        """Weight of each neighbour, [P, H, W]; the weights sum to 1."""
        total, squares = torch.zeros_like(image_3HW), torch.zeros_like(image_3HW)
        # Differences from the pixel itself avoid rounding errors in flat regions.
        for neighbour in self._neighbours(image_3HW):
            difference = neighbour - image_3HW
            total += difference
            squares.addcmul_(difference, difference)
        count = (len(_DIRECTIONS) + 1) * len(self.dilations)
        deviation = ((squares - total.square() / count) / (count - 1)).sqrt()
        scale = -1 / (_EPS + _BANDWIDTH * deviation)
        logits = [
            ((neighbour - image_3HW).abs() * scale).mean(0) for neighbour in self._neighbours(image_3HW)
        ]
        return torch.stack(logits).softmax(0)

    def _neighbours(self, maps_CHW: Tensor) -> list[Tensor]:
        """The maps shifted to each neighbour, [C, H, W], as views of one padded copy."""
        height, width = maps_CHW.shape[1:]
        margin = max(self.dilations)
        padded = nn.functional.pad(maps_CHW[None], [margin] * 4, mode="replicate")[0]
        starts = [
            (margin + row * dilation, margin + column * dilation)
            for dilation in self.dilations
            for row, column in _DIRECTIONS
        ]
        return [padded[:, top : top + height, left : left + width] for top, left in starts]
