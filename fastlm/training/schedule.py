"""The learning rate over a run: warm-up, plateau, decay to zero, by a straight line or by half a cosine.

On the plateau the rate does not depend on how long the run is. So a run limited by time need not know its number of
steps until the decay begins: then the pace so far gives it, and it stays fixed. Such a run equals, to the last bit, one
that was given that number of steps from the start.

Zhai et al. 2022 (arXiv:2106.04560, section 3.5) and Hu et al. 2024 (MiniCPM, arXiv:2404.06395, section 4).
"""

from __future__ import annotations

import math


def learning_rate_scale(
    step: int, total_steps: int | None, warmup_steps: int, decay_fraction: float, schedule: str = "linear"
) -> float:
    """The factor on the peak rate at a step counted from 0; `total_steps` None: not known yet, decay has not begun."""
    scale = min(1.0, (step + 1) / max(1, warmup_steps))
    if total_steps is not None:
        decay_steps = max(1, int(total_steps * decay_fraction))
        left = min(1.0, (total_steps - step) / decay_steps)
        scale = min(scale, left if schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * left))
    return scale


def total_steps_when_decay_begins(step: int, decay_fraction: float) -> int:
    """The number of steps of a run whose decay begins at `step`."""
    return max(step + 1, math.ceil(step / (1.0 - decay_fraction))) if decay_fraction < 1.0 else step + 1
