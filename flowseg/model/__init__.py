"""The network: a PixNerd-style transformer that generates a pixel neural field for every patch."""

from flowseg.model.backbone import FlowSegModel, build_model
from flowseg.model.pixnerd import LoadReport, load_pixnerd
from flowseg.model.sizes import SIZES, ModelSize

__all__ = ["SIZES", "FlowSegModel", "LoadReport", "ModelSize", "build_model", "load_pixnerd"]
