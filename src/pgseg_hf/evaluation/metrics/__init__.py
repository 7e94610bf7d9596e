"""How good label maps are: counts of pixels and IoU, figures of the groups, refinement by colours."""
