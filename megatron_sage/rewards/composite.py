"""One number per clip out of a reward's dimensions; several rewards in one run; one that is only watched."""

from collections.abc import Mapping, Sequence

import numpy as np

from megatron_sage.config.loading import nearest
from megatron_sage.errors import UserError
from megatron_sage.rewards.protocol import Reward, check_scores

WATCH = "watch/"  # before the names of a watched reward's dimensions


class WithWatch:
    """A reward and another that is logged beside it and never trained on.

    A reward that rises while a metric of other making falls is being fooled: the second one must not be among what
    is maximised, so its dimensions carry a prefix that `reward.weights` cannot name.
    """

    def __init__(self, trained: Reward, watched: Reward) -> None:
        self.trained, self.watched = trained, watched
        self.dimensions = (*trained.dimensions, *(WATCH + name for name in watched.dimensions))

    def __call__(self, videos: Sequence[np.ndarray], prompts: Sequence[str], fps: float) -> dict[str, np.ndarray]:
        """Scores of both, {dimension: float64 [n]}."""
        scores = self.trained(videos, prompts, fps)
        watched = self.watched(videos, prompts, fps)
        return scores | {WATCH + name: watched[name] for name in self.watched.dimensions}


class Several:
    """Rewards side by side: the dimensions of all of them, in order."""

    def __init__(self, rewards: Mapping[str, Reward]) -> None:
        """`rewards` by the key that names each in the configuration. UserError where two share a dimension's name."""
        self.rewards = dict(rewards)
        self.dimensions = joined_dimensions({key: reward.dimensions for key, reward in rewards.items()})

    def __call__(self, videos: Sequence[np.ndarray], prompts: Sequence[str], fps: float) -> dict[str, np.ndarray]:
        """Scores of all, {dimension: float64 [n]}; what one of them could not score stays nan."""
        scores: dict[str, np.ndarray] = {}
        for key, reward in self.rewards.items():
            scores |= check_scores(reward(videos, prompts, fps), reward.dimensions, len(videos), key)
        return scores


def joined_dimensions(dimensions: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """All names, in order; `dimensions` by configuration key. UserError where a name stands twice."""
    owner: dict[str, str] = {}
    for key, names in dimensions.items():
        for name in names:
            if name in owner:
                raise UserError(
                    f"{key}: its dimension {name} is also one of {owner[name]}, so a weight would not say which is "
                    "meant; rename it, or score one of the two by reward.watch"
                )
            owner[name] = key
    return tuple(owner)


def check_weights(weights: Mapping[str, float], dimensions: Sequence[str]) -> None:
    """Each weight is of a dimension that there is; UserError with the nearest one."""
    for name, weight in weights.items():
        if name not in dimensions:
            match = nearest(name, dimensions)
            cure = f"did you mean {match}? " if match else ""
            raise UserError(
                f"reward.weights.{name}={weight}: the reward has no such dimension; {cure}"
                f"choose from {', '.join(dimensions)}"
            )


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
