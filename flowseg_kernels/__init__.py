"""Fused kernels for generative segmentation by flow matching: see https://arxiv.org/abs/2603.19218 for the method."""

from . import codes as _codes
from .codebook import Codebook
from .codes import grid_centroids, kronecker_centroids
from .functional import (
    class_probabilities,
    decode_confusion,
    distance_correction,
    encode_labels,
    flow_interpolate,
    flow_loss,
    nearest_centroid,
    neural_field,
    top_classes,
)
from .nn import CentroidDecoder, FlowLoss, NeuralFieldDecoder
from .runtime import extension as _extension
from .runtime.backend import BackendUnavailable, available_backends, requested_backend, use_backend

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "CentroidDecoder",
    "Codebook",
    "FlowLoss",
    "NeuralFieldDecoder",
    "available_backends",
    "class_probabilities",
    "decode_confusion",
    "distance_correction",
    "encode_labels",
    "flow_interpolate",
    "flow_loss",
    "grid_centroids",
    "kronecker_centroids",
    "nearest_centroid",
    "neural_field",
    "requested_backend",
    "top_classes",
    "use_backend",
]

# Pickles of whole modules by version 0.1 name flowseg_kernels.codes.Codebook.
_codes.Codebook = Codebook

_extension.say_what_is_missing()
