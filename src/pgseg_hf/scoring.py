"""The inference recipe: computes a label for every pixel from groups of patches and their affinity with texts.

A *window* is one input of the image encoder: a whole image or a crop. Inside a window every pixel has the class scores
of its group. It is stored as group indices and one row of scores per group, not as pixels x classes.

Shapes: K groups, N labels, H x W pixels of a window or an image, h x w patches.
Source: released `segmentation/evaluation/pgseg_seg.py`, identical to GroupViT's `group_vit_seg.py`.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor, nn

from .values import share

TOP_K = 5
# Number of entries of a chunk of [classes, H, W] floats, 128 MB.
_CHUNK_ENTRIES = 2**25
# Number of entries of a chunk that is reused while it is in the processor's caches.
_CACHED_ENTRIES = 2**20


@dataclass
class WindowScores:
    """Scores of one window: those of the groups and, with a weight above 0, of the patches.

    Args:
        groups: uint8 [H, W] (int32 above 256 groups), the group of each pixel.
        scores: [K, N], or [K, N + 1] with the background as channel 0.
        top, left: row and column of the window's first pixel in the image.
        patch_scores: [N, h, w] or [N + 1, h, w], scores of each patch; None to use only the groups.
        patch_weight: weight of patch scores in a pixel's score, 0 to 1.
        known: [K], probability that a group is a label and not another word that the checkpoint knows, or None.
        patch_known: [h, w], the same for each patch.
    """

    groups: Tensor
    scores: Tensor
    top: int = 0
    left: int = 0
    patch_scores: Tensor | None = None
    patch_weight: float = 0.0
    known: Tensor | None = None
    patch_known: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.patch_weight:
            self.patch_scores = None

    def with_background(self, threshold: float) -> "WindowScores":
        """Adds a background channel in front to scores without one. Background is where `known` is below the threshold,
        or as in [`add_background`] if there is no `known`."""
        patches = self.patch_scores
        if patches is not None:
            known = None if self.patch_known is None else self.patch_known.flatten()
            patches = add_background(patches.flatten(1).T, threshold, known).T.unflatten(1, patches.shape[1:])
        scores = add_background(self.scores, threshold, self.known)
        return replace(self, scores=scores, patch_scores=patches)

    def used(self) -> Tensor:
        """Which channels have a score other than 0, bool [N]."""
        used = (self.scores != 0).any(dim=0)
        return used if self.patch_scores is None else used | (self.patch_scores != 0).flatten(1).any(dim=1)

    def reader(self, channels: Sequence[int]) -> Callable[[slice], Tensor]:
        """Returns a function that maps a slice of the window's rows to the scores [C, rows, W] of its pixels: (1 - w)
        times those of the pixel's group plus w times those of the patches, bilinearly interpolated."""
        of_groups = self.scores[:, channels].T
        stretched = None
        if self.patch_scores is not None:
            stretched = stretch(self.patch_scores[channels], tuple(self.groups.shape))

        def of_rows(rows: slice) -> Tensor:
            groups = self.groups[rows].long()
            places = groups.reshape(1, -1).expand(len(channels), -1)
            scores_CHW = of_groups.gather(1, places).unflatten(1, groups.shape)
            if stretched is None:
                return scores_CHW
            return torch.lerp(scores_CHW, stretched[:, rows], self.patch_weight)

        return of_rows


def average_by_owner(embeds_MD: Tensor, owners: Any) -> Tensor:
    """Averages embeddings of words per label and normalises them, [N, D]. `owners` are the words' labels, ascending
    from 0."""
    index = torch.as_tensor(owners, device=embeds_MD.device)
    sums = embeds_MD.new_zeros(int(index[-1]) + 1, embeds_MD.shape[1])
    return nn.functional.normalize(sums.index_add_(0, index, embeds_MD), dim=-1)


def best_word(logits: Tensor, words_NWD: Tensor) -> Tensor:
    """The largest logit among the W words of each of N labels: [N * W, ...] to [N, ...]."""
    return logits.unflatten(0, words_NWD.shape[:2]).amax(dim=1) if words_NWD.dim() == 3 else logits


def group_scores(
    segment_logits_KN: Tensor,
    image_logits_N: Tensor,
    background_threshold: float | None = None,
    top_k: int = TOP_K,
) -> Tensor:
    """Class scores of each group of one window [K, N], or [K, 1 + N] with a background channel in front.

    Args:
        segment_logits_KN: scaled cosines of segment tokens and labels.
        image_logits_N: scaled similarity of the image and labels; only the labels with the `top_k` largest get scores
            above 0.
        background_threshold: a group is background (1 in that channel) if its best score is below the threshold, or
            below the window's best score if that is lower. Its class scores stay.
        top_k: maximum number of labels per window.

    Raises:
        ValueError: if `top_k` is below 1.
    """
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}, expected at least 1.")
    kept = image_logits_N.topk(min(top_k, image_logits_N.shape[-1])).indices
    masked_KN = torch.full_like(segment_logits_KN, float("-inf"))
    masked_KN[:, kept] = segment_logits_KN[:, kept]
    scores_KN = masked_KN.softmax(dim=-1) * segment_logits_KN.softmax(dim=-1)
    return scores_KN if background_threshold is None else add_background(scores_KN, background_threshold)


def chance_of_labels(label_logits: Tensor, other_logits: Tensor, dim: int) -> Tensor:
    """The probability of all labels together in a softmax over labels and other words along `dim`."""
    return (label_logits.logsumexp(dim) - other_logits.logsumexp(dim)).sigmoid()


def patch_scores(
    patch_logits_Nhw: Tensor,
    image_logits_N: Tensor,
    background_threshold: float | None = None,
    top_k: int = TOP_K,
) -> Tensor:
    """Class scores of each patch, [N, h, w] or with background [1 + N, h, w]: [`group_scores`] of patches."""
    rows_LN = patch_logits_Nhw.flatten(1).T
    scores_LN = group_scores(rows_LN, image_logits_N, background_threshold, top_k)
    return scores_LN.T.unflatten(1, patch_logits_Nhw.shape[1:])


def add_background(scores_KN: Tensor, threshold: float, known_K: Tensor | None = None) -> Tensor:
    """Adds a background channel in front of a window's group scores, [K, 1 + N], see [`group_scores`]. With `known_K`,
    the probability that a group is one of the labels, background is where it is below the threshold."""
    threshold = share(threshold, "background_threshold", "None or ")
    best_K = scores_KN.amax(dim=-1)
    is_background_K = best_K < best_K.amax().clamp(max=threshold) if known_K is None else known_K < threshold
    return torch.cat([is_background_K.to(scores_KN.dtype)[:, None], scores_KN], dim=-1)


def group_map(grouping_Khw: Tensor, size: tuple[int, int]) -> Tensor:
    """The group of each pixel [H, W]: the argmax of the bilinearly interpolated soft grouping."""
    wide = grouping_Khw if grouping_Khw.dtype == torch.float64 else grouping_Khw.float()
    stretched_KHW = nn.functional.interpolate(wide[None], size=size, mode="bilinear", align_corners=False)[0]
    return first_largest(stretched_KHW).to(torch.uint8 if wide.shape[0] <= 256 else torch.int32)


def first_largest(maps_CHW: Tensor) -> Tensor:
    """`argmax(dim=0)`, int64 [H, W], but much faster: along rows instead of strided. Does not handle NaN."""
    return _first_true(maps_CHW == maps_CHW.amax(dim=0)).clamp_(max=len(maps_CHW) - 1)


def _first_true(flags_CHW: Tensor) -> Tensor:
    """The first true channel at each pixel, int64 [H, W]; C if there is none."""
    count = len(flags_CHW)
    dtype = _dtype_to_count(count)
    ranks_C11 = torch.arange(count, 0, -1, dtype=dtype, device=flags_CHW.device)[:, None, None]
    return count - (flags_CHW.to(dtype) * ranks_C11).amax(dim=0).long()


def _dtype_to_count(channels: int) -> torch.dtype:
    return torch.uint8 if channels <= 255 else torch.int32


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Starts of windows of `window` pixels along a side of `length` pixels; the last one is moved back to fit."""
    if window < 1 or stride < 1:
        raise ValueError(f"window is {window} and stride is {stride}, expected both at least 1 pixel.")
    if stride > window:
        raise ValueError(
            f"stride is {stride}, expected at most the window's {window} pixels, or some pixels are not covered."
        )
    count = max(length - window + stride - 1, 0) // stride + 1
    return [max(min(index * stride + window, length) - window, 0) for index in range(count)]


def merge_windows(windows: Sequence[WindowScores], size: tuple[int, int]) -> tuple[Tensor, list[int], int]:
    """Averages the windows of one image.

    Memory grows with `size` times the number of labels in any window, at most `top_k` per window.

    Args:
        windows: windows that cover the image.
        size: (H, W) of the image.

    Returns:
        Scores [C, H, W] of the channels that are not 0 everywhere, their ascending indices, and the total number.

    Raises:
        ValueError: if scores are not finite.
    """
    num_channels = windows[0].scores.shape[1]
    parts = [window.scores for window in windows] + [
        window.patch_scores for window in windows if window.patch_scores is not None
    ]
    if not all(part.isfinite().all() for part in parts):
        raise ValueError(
            "the scores of a window are NaN or infinite, expected finite numbers; if the model overflows in float16, "
            "use dtype float32 or bfloat16."
        )
    used = torch.stack([window.used() for window in windows]).any(dim=0)
    channels = used.nonzero()[:, 0]
    total = windows[0].scores.new_zeros(len(channels), *size)
    count = windows[0].scores.new_zeros(1, *size)
    for window in windows:
        height, width = window.groups.shape
        rows, columns = slice(window.top, window.top + height), slice(window.left, window.left + width)
        of_pixels = window.reader(channels.tolist())
        for row in range(0, height, 64):
            part = slice(row, min(row + 64, height))
            total[:, window.top + part.start : window.top + part.stop, columns] += of_pixels(part)
        count[:, rows, columns] += 1
    return total.div_(count), channels.tolist(), num_channels


def best_labels(
    scores_CHW: Tensor,
    channels: Sequence[int],
    num_channels: int,
    target_size: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """The most probable channel of each pixel, after bilinear interpolation to `target_size`.

    The recipe takes the argmax of a softmax, in which scores that differ by less than its rounding are equal; the first
    of these channels wins. Large maps are processed a few channels at a time, so that memory grows with pixels and not
    with pixels x classes; the softmax's sum may then differ in its last bit.

    Args:
        scores_CHW: from [`merge_windows`]; other channels score 0.
        channels: their indices, ascending.
        num_channels: total number of channels.
        target_size: (H, W) of the result; defaults to the size of the scores.

    Returns:
        int64 [H, W], and the largest scores [H, W].
    """
    size = (scores_CHW.shape[1], scores_CHW.shape[2]) if target_size is None else target_size
    if num_channels * size[0] * size[1] <= _CHUNK_ENTRIES:
        return _best_labels_by_rows(stretch(scores_CHW, size), channels, num_channels)
    return _best_labels_by_chunks(scores_CHW, channels, num_channels, size)


def _best_labels_by_chunks(
    scores_CHW: Tensor, channels: Sequence[int], num_channels: int, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Argmax of the softmax over all channels, interpolating a few channels at a time and working row by row."""
    height, width = size
    step = max(1, _CHUNK_ENTRIES // (height * width))
    rows_at_once = max(1, _CACHED_ENTRIES // width)
    strips = [slice(row, row + rows_at_once) for row in range(0, height, rows_at_once)]
    starts = range(0, len(channels), step)
    stretched_once = stretch(scores_CHW, size) if len(starts) == 1 else None

    def parts() -> Iterator[tuple[int, slice, Tensor]]:
        for start in starts:
            chunk = (
                stretch(scores_CHW[start : start + step], size) if stretched_once is None else stretched_once
            )
            yield from ((start, rows, chunk[:, rows]) for rows in strips)

    best = scores_CHW.new_zeros(size)
    for _, rows, part in parts():
        torch.maximum(best[rows], part.amax(dim=0), out=best[rows])
    total = torch.empty_like(best)
    for rows in strips:
        total[rows] = (num_channels - len(channels)) * torch.exp(-best[rows])
    for _, rows, part in parts():
        total[rows] += torch.exp(part - best[rows]).sum(dim=0)
    # Of the unlisted channels, which all score 0, only the first can be an argmax.
    unlisted = next((number for number in range(num_channels) if number not in set(channels)), num_channels)
    labels = torch.empty(size, dtype=_dtype_to_count(num_channels), device=scores_CHW.device)
    for rows in strips:
        is_zero = torch.exp(-best[rows]) / total[rows] == 1 / total[rows]
        labels[rows] = torch.where(is_zero, unlisted, num_channels)
    for start, rows, part in parts():
        as_probable = torch.exp(part - best[rows]) / total[rows] == 1 / total[rows]
        numbers = torch.tensor([*channels[start : start + step], num_channels]).to(labels)
        labels[rows] = torch.minimum(labels[rows], numbers[_first_true(as_probable)])
    del total
    return labels.long(), best


def _best_labels_by_rows(
    scores_CHW: Tensor, channels: Sequence[int], num_channels: int
) -> tuple[Tensor, Tensor]:
    """Argmax of the softmax over all channels. The softmax is only computed for near ties.

    In 16 bits the rounding of torch's softmax depends on the tensor's layout, so near ties may be resolved differently.
    """
    height, width = scores_CHW.shape[1:]
    labels = torch.zeros(height, width, dtype=torch.int64, device=scores_CHW.device)
    best = scores_CHW.new_zeros(height, width)
    if not channels:
        return labels, best
    numbers_C = torch.tensor(channels, device=scores_CHW.device)
    equal_to_softmax = 8 * torch.finfo(scores_CHW.dtype).eps
    step = max(1, _CACHED_ENTRIES // (len(channels) * width)) if scores_CHW.device.type == "cpu" else height
    for start in range(0, height, step):
        rows = slice(start, start + step)
        part = scores_CHW[:, rows]
        best[rows] = part.amax(dim=0)
        high = part >= best[rows] - equal_to_softmax
        unclear = high.sum(dim=0, dtype=_dtype_to_count(len(channels))) > 1
        if len(channels) < num_channels:
            # Unlisted channels score 0.
            unclear |= best[rows] <= equal_to_softmax
        labels[rows] = numbers_C[_first_true(high).clamp_(max=len(channels) - 1)]
        for some in unclear.nonzero().split(max(1, _CACHED_ENTRIES // num_channels)):
            y, x = some.T
            dense = part.new_zeros(num_channels, 1, len(some))
            dense[channels, 0] = part[:, y, x]
            labels[start + y, x] = first_largest(dense.softmax(dim=0))[0]
    return labels, best


def stretch(scores_CHW: Tensor, size: tuple[int, ...]) -> Tensor:
    """Bilinear interpolation of [C, H, W] maps."""
    if tuple(scores_CHW.shape[-2:]) == tuple(size):
        return scores_CHW
    return nn.functional.interpolate(scores_CHW[None], size=size, mode="bilinear", align_corners=False)[0]


def dense_probabilities(
    windows: Sequence[WindowScores], size: tuple[int, int], target_size: tuple[int, int] | None = None
) -> Tensor:
    """Probabilities of all channels at each pixel, [N, H, W] or [N + 1, H, W]: softmax of the windows' interpolated
    mean.

    Uses memory for pixels x classes; for label maps use [`best_labels`].
    """
    scores, channels, num_channels = merge_windows(windows, size)
    dense = scores.new_zeros(num_channels, *size)
    dense[channels] = scores
    return stretch(dense, target_size or size).softmax(dim=0)


@dataclass
class ScoredImage:
    """The windows of an image, with scores for some labels.

    Args:
        size: height and width of the original.
        resized: height and width of the area that the windows cover.
        windows: the windows' scores.
    """

    size: tuple[int, int]
    resized: tuple[int, int]
    windows: list[WindowScores] = field(default_factory=list)

    def with_background(self, threshold: float) -> "ScoredImage":
        """Adds a background channel in front to scores without one."""
        return replace(self, windows=[window.with_background(threshold) for window in self.windows])

    def label_map(self) -> tuple[Tensor, Tensor]:
        """The best label of each pixel of the original, int64 [H, W], and its score [H, W]."""
        scores, channels, count = merge_windows(self.windows, self.resized)
        return best_labels(scores, channels, count, self.size)


def averaged_over_neighbours(images: Iterable[ScoredImage], count: int) -> Iterator[ScoredImage]:
    """Averages scores over consecutive images: each gets the windows of the `count` images around it.

    Raises:
        ValueError: if neighbours have different sizes.
    """
    after = count // 2
    near: deque[ScoredImage | None] = deque([None] * count, maxlen=count)
    for image in chain(images, repeat(None, after)):
        near.append(image)
        middle = near[-1 - after]
        if middle is None:
            continue
        present = [each for each in near if each is not None]
        if len({each.size for each in present}) > 1:
            raise ValueError(
                "averaging over neighbours needs images of one size, got (height, width) "
                f"{', '.join(map(str, sorted({each.size for each in present})))}."
            )
        yield replace(middle, windows=[window for each in present for window in each.windows])
