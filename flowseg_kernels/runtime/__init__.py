"""Backend choice, extension loading, argument checks and settings, shared by every op."""
