"""Loading rewards by import path, and weighing their dimensions."""

import numpy as np
import pytest

from megatron_sage.errors import UserError
from megatron_sage.rewards.composite import weighted
from megatron_sage.rewards.protocol import Reward, load_reward
from megatron_sage.rewards.shapes import ShapesReward


def test_a_class_is_loaded_and_instantiated() -> None:
    reward = load_reward("megatron_sage.rewards.shapes:ShapesReward")
    assert isinstance(reward, ShapesReward) and isinstance(reward, Reward)


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("megatron_sage.rewards.shapes", "module:name"),
        ("", "module:name"),
        ("megatron_sage.no_such:Reward", "cannot import"),
        ("megatron_sage.rewards.shapes:NoSuch", "has no 'NoSuch'"),
        ("megatron_sage.rewards.shapes:FORMS", "callable"),
        ("megatron_sage.rewards.shapes:parse_caption", "dimensions"),
    ],
)
def test_a_path_that_names_no_reward_is_refused_in_one_line(path: str, named: str) -> None:
    with pytest.raises(UserError, match=named) as error:
        load_reward(path)
    assert "\n" not in str(error.value) and repr(path) in str(error.value)


def test_the_weighted_sum() -> None:
    scores = {"VQ": np.array([1.0, 2.0]), "MQ": np.array([0.5, -1.0]), "TA": np.array([0.0, 3.0])}
    np.testing.assert_array_equal(weighted(scores, {"VQ": 0.5, "MQ": 0.5, "TA": 1.0}), [0.75, 3.5])
    np.testing.assert_array_equal(weighted(scores, {"TA": 2.0}), [0.0, 6.0])


def test_nan_stays_nan_even_at_weight_zero() -> None:
    scores = {"VQ": np.array([np.nan, 1.0]), "MQ": np.array([1.0, 1.0])}
    assert np.isnan(weighted(scores, {"VQ": 0.0, "MQ": 1.0})).tolist() == [True, False]


@pytest.mark.parametrize(
    ("weights", "named"), [({}, "empty"), ({"XX": 1.0}, "XX.*VQ"), ({"VQ": float("inf")}, "VQ=inf")]
)
def test_wrong_weights_are_refused(weights: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        weighted({"VQ": np.zeros(1)}, weights)
