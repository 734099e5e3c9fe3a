"""`pytest bench/`: our kernels and their peers, measured in one run after the results were checked."""
