"""The network of a run and its codebook, from the settings alone."""

from __future__ import annotations

from flowseg.codes import build_codebook
from flowseg.config import Config
from flowseg.model import FlowSegModel, build_model
from flowseg.model.sizes import check_sizes
from flowseg_kernels import Codebook


def build(config: Config, num_classes: int, *, align_dim: int | None = None) -> tuple[FlowSegModel, Codebook]:
    """Build the network with its initial weights, and its codebook; both on the CPU.

    Args:
        config: settings of the run.
        num_classes: number of codes.
        align_dim: width of the features that REPA aligns with; adds the projector, which only training needs.

    Raises:
        UserError: an unknown network size, or training sizes that are not multiples of its patch size.
    """
    codebook = build_codebook(config.codes, num_classes)
    model = build_model(config, align_dim=align_dim)
    check_sizes(config, model.size.patch_size)
    return model, codebook
