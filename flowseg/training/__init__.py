"""Training: :mod:`flowseg.training.trainer` holds the loop, the other modules its parts."""
