"""Train and run generative segmentation by flow matching, on the kernels of ``flowseg_kernels``."""

__version__ = "0.1.0"
