"""Squared error against the reshaped flow-matching target, with its gradient from the same pass."""
