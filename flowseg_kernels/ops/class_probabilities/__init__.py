"""Class probabilities, their logarithms or the logits of every class."""
