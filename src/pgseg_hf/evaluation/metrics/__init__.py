"""Metrics of label maps: confusion matrices and IoU, group statistics, and refinement by colours."""
