"""Entries of the benchmarks by op: the calls to time and the check of each result. The test files time them."""
