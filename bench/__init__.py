"""Benchmarks: `pytest bench/` times our kernels and their peers in one run and checks each result first."""
