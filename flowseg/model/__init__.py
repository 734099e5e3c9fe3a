"""The network: a transformer in the style of PixNerd that generates a neural field of pixels for each patch."""

from flowseg.model.backbone import FlowSegModel, build_model
from flowseg.model.pixnerd import LoadReport, load_pixnerd
from flowseg.model.sizes import SIZES, ModelSize

__all__ = ["SIZES", "FlowSegModel", "LoadReport", "ModelSize", "build_model", "load_pixnerd"]
