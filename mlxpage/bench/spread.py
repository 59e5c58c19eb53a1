"""What several runs of the same thing come to."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

# Student's t: so many standard errors hold 95 % of means, by degrees of freedom from 1 on.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160)
_T += (2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056)
_T += (2.052, 2.048, 2.045, 2.042)
_T_OF_MANY = 1.96


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the mean, by Student's t; None of fewer than three values,
    which say too little."""
    if len(values) < 3:
        return None
    degrees = len(values) - 1
    t = _T[degrees - 1] if degrees <= len(_T) else _T_OF_MANY
    half = t * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - half, mean + half


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest, as NumPy's default."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
