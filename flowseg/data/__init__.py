"""Data: the embedded digit scenes, folders of images and labels, and what turns them into batches."""

from flowseg.data.datasets import SegmentationData, open_data, resolve_labels
from flowseg.data.loader import training_batches

__all__ = ["SegmentationData", "open_data", "resolve_labels", "training_batches"]
