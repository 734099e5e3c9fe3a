"""Segment and score with a trained network: files (``predict``), whole splits (``evaluate``), several views of an image."""
