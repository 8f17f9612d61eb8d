"""One number per clip out of a reward's dimensions."""

from collections.abc import Mapping

import numpy as np

from megatron_sage.errors import UserError


def weighted(scores: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """Sum of weight x score over the dimensions named in `weights`, float64 [n].

    NaN stays NaN, also at weight 0: a clip whose score is unknown in one dimension must leave its group's
    statistics, not enter them with a made-up value. Dimensions without a weight are for the logs only.
    """
    if not weights:
        raise UserError("reward.weights is empty: name at least one dimension, e.g. reward.weights.VQ=1.0")
    for name, weight in weights.items():
        if name not in scores:
            raise UserError(f"reward.weights.{name}: the reward has no such dimension; it has {', '.join(scores)}")
        if not np.isfinite(weight):
            raise UserError(f"reward.weights.{name}={weight}: expected a finite number")
    return np.sum([float(weight) * np.asarray(scores[name], np.float64) for name, weight in weights.items()], axis=0)
