"""Decoding: the class of the nearest centroid."""
