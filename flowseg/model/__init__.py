"""The network: a transformer in the style of PixNerd that generates a neural field of pixels for each patch."""

from flowseg.model.backbone import FlowSegModel, build_model
from flowseg.model.flops import Flops, count_flops
from flowseg.model.pixnerd import LoadReport, load_pixnerd
from flowseg.model.sizes import SIZES, ModelSize

__all__ = ["SIZES", "Flops", "FlowSegModel", "LoadReport", "ModelSize", "build_model", "count_flops", "load_pixnerd"]
