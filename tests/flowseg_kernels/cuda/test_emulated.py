"""The tests of the ops on the CUDA kernels, which a CPU runs through csrc/emu: those that are small enough."""
