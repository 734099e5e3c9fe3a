"""Decoding and counting in one pass: the confusion matrix without a label map."""
