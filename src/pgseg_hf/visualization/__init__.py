"""Drawing of label maps, groups and scores.

A *label map* is an integer array [H, W]. Without a background its values index the given labels; with one, 0 is
background and label i has value i + 1. A label's colour is chosen by the user or depends only on its index, so a label
has the same colour in every image of a run.
"""

from .colours import group_palette, label_colours, palette
from .heat import heat_map
from .maps import draw_contours, draw_groups, find_contours, indexed_png, overlay, side_by_side
from .prototypes import prototype_maps

__all__ = [
    "draw_contours",
    "draw_groups",
    "find_contours",
    "group_palette",
    "heat_map",
    "indexed_png",
    "label_colours",
    "overlay",
    "palette",
    "prototype_maps",
    "side_by_side",
]
