"""Where images and their texts come from: folders, data sets of the Hub, tar shards, synthetic scenes.

Needs `pgseg-hf[train]`.
"""
