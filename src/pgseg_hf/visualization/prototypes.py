"""Maps of a model's prototypes."""

from typing import Any

import numpy as np
import numpy.typing as npt


def prototype_maps(output: Any, index: int = 0) -> list[npt.NDArray[np.int64]]:
    """The prototype of each patch for each grouping stage, as a map for `draw_groups`.

    The prototypes of a later stage belong to groups of the previous stage, and are mapped to patches by the patches'
    assignment to these groups.

    Args:
        output: output of [`PGSegVisionModel`] with `output_npr=True` and `output_attentions=True`.
        index: index of the image in the batch.

    Returns:
        an int64 map [h, w] of the patches for each grouping stage.

    Raises:
        ValueError: the output has no prototypes.
    """
    if not output.npr or output.attentions is None:
        raise ValueError(
            "the output has no prototypes; expected the output of a model with npr_variant 'corrected' or 'released', "
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
