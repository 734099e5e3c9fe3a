"""The k nearest classes of each pixel with their probabilities."""
