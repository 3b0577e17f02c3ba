"""Artifacts in the formats of other programs."""
