"""Comparisons made of several training runs: the demo and studies."""
