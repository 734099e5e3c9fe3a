"""Data: generated scenes (digits, paints), folders of images and label maps, and training batches from both."""

from flowseg.data.datasets import SegmentationData, open_data, resolve_labels
from flowseg.data.loader import training_batches

__all__ = ["SegmentationData", "open_data", "resolve_labels", "training_batches"]
