"""The network: a PixNerd-style transformer that generates a pixel neural field for every patch."""

from flowseg.model.backbone import FlowSegModel, build_model
from flowseg.model.sizes import SIZES, ModelSize

__all__ = ["SIZES", "FlowSegModel", "ModelSize", "build_model"]
