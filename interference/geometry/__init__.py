"""Geometry of updates in weight space: where models changed, how far, in which directions, and what chance alone would give."""
