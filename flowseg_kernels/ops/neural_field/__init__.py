"""The pixel neural field: a small generated MLP applied to the pixels of each patch."""
