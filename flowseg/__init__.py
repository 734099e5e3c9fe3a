"""Training and sampling for generative segmentation by flow matching, with the kernels of ``flowseg_kernels``."""

__version__ = "0.1.0"
