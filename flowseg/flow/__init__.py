"""The flow: its source, the sampling of times, and ODE solvers."""

from flowseg.flow.ode import integrate
from flowseg.flow.source import make_source
from flowseg.flow.time import sample_times

__all__ = ["integrate", "make_source", "sample_times"]
