"""Decode and count in one pass: the confusion matrix without a label map."""
