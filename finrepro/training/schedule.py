"""Learning rate over the steps."""

import math

from finrepro.catalogue.spec import Train


def learning_rate(step: int, settings: Train) -> float:
    """Linear warm-up from 0 over `warmup_steps`, then constant, linear to 0, or a half cosine to
    0 at `max_steps`.
    """
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.lr
    progress = (step - settings.warmup_steps) / max(1, settings.max_steps - settings.warmup_steps)
    return settings.lr * (
        (1 - progress)
        if settings.schedule == "linear"
        else 0.5 * (1 + math.cos(math.pi * progress))
    )
