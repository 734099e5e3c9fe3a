"""Shared by all ops: backend choice, registration with PyTorch, loading of compiled libraries, argument checks."""
