"""Prototypes of a model's output as maps."""

from typing import Any

import numpy as np
import numpy.typing as npt


def prototype_maps(output: Any, index: int = 0) -> list[npt.NDArray[np.int64]]:
    """Which prototype each patch of an image belongs to, stage by stage: what `draw_groups` draws.

    The prototypes of a later stage describe the groups of the one before; a patch shares in them as it shares in these
    groups.

    Args:
        output: of [`PGSegVisionModel`] with `output_npr=True` and `output_attentions=True`.
        index: number of the image in its batch.

    Returns:
        an int64 [h, w] for each grouping stage, on the grid of the patches.

    Raises:
        ValueError: the output holds no prototypes.
    """
    if not output.npr or output.attentions is None:
        raise ValueError(
            "the output has no prototypes, expected that of a model with npr_variant 'corrected' or 'released', "
            "called with output_npr=True and output_attentions=True."
        )
    maps, patches_KL = [], None
    for stage, attention in zip(output.npr, output.attentions):
        shares_LP = stage.responsibilities[index].detach().double().cpu().numpy()
        assignment_KL = attention[index].detach().double().cpu().numpy()
        if patches_KL is not None:
            shares_LP, assignment_KL = patches_KL.T @ shares_LP, assignment_KL @ patches_KL
        patches_KL = assignment_KL
        maps.append(shares_LP.argmax(axis=1).reshape(output.grouping.shape[-2:]))
    return maps
