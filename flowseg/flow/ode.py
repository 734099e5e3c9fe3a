"""Fixed-step ODE solvers from the source (t = 0) to the colour-coded mask (t = 1)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

METHODS = ("euler", "heun", "midpoint")
MAX_STEPS = 100


def integrate(
    network: Callable[[Tensor, Tensor], Tensor],
    source: Tensor,
    *,
    steps: int = 2,
    method: str = "euler",
    predicts: str = "velocity",
    t_min: float = 1e-3,
    keep_path: bool = False,
) -> Tensor | tuple[Tensor, list[tuple[float, Tensor]]]:
    """Follow the learnt vector field from ``source`` to t = 1 in equal steps.

    An end-point prediction ``xhat`` corresponds to the velocity ``(xhat - x_t) / max(1 - t, t_min)``. The last Euler step
    ends exactly at ``xhat``, so ``xhat`` is assigned, not computed: rounding cannot move it. The last step of Heun's method
    would evaluate this velocity at t = 1, where it is 0/0; with end-point predictions that step is an Euler step.

    Args:
        network: ``(x (B, C, H, W), t (B,)) -> (B, C, H, W)``.
        source: ``(B, C, H, W)``.
        steps: 1 to 100.
        method: ``"euler"`` (one evaluation per step), ``"heun"`` or ``"midpoint"`` (two per step).
        predicts: ``"velocity"`` or ``"endpoint"``.
        t_min: lower limit of the divisor ``1 - t``.
        keep_path: also return the states.

    Returns:
        The field at t = 1, ``(B, C, H, W)``; with ``keep_path`` also a list of ``steps + 1`` pairs ``(t, x)``.

    Raises:
        ValueError: unknown method or prediction, or ``steps`` out of range.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if predicts not in ("velocity", "endpoint"):
        raise ValueError(f"predicts must be 'velocity' or 'endpoint', got {predicts!r}")
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps must be 1 to {MAX_STEPS}, got {steps}")

    def predict(x: Tensor, t: float) -> Tensor:
        return network(x, torch.full((x.shape[0],), t, device=x.device, dtype=torch.float32)).to(x.dtype)

    def velocity(x: Tensor, t: float) -> Tensor:
        out = predict(x, t)
        return (out - x) / max(1.0 - t, t_min) if predicts == "endpoint" else out

    x = source
    path = [(0.0, x)]
    for step in range(steps):
        t, t_next = step / steps, (step + 1) / steps
        dt = t_next - t
        ends = step == steps - 1 and predicts == "endpoint"
        if method == "midpoint":
            x = x + dt * velocity(x + 0.5 * dt * velocity(x, t), t + 0.5 * dt)
        elif ends:
            x = predict(x, t)
        elif method == "heun":
            v = velocity(x, t)
            x = x + 0.5 * dt * (v + velocity(x + dt * v, t_next))
        else:
            x = x + dt * velocity(x, t)
        path.append((t_next, x))
    return (x, path) if keep_path else x
