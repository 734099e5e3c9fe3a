"""HTML reports of a run and of the demo: figures, timings of the kernels, and the page itself."""
