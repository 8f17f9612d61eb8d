"""Schedules of lambda against sequences worked out by hand, and laws of the feedback."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sage.grpo.trust_region import FEEDBACKS, KINDS, LambdaController

kl_lists = st.lists(st.floats(-0.1, 0.1), min_size=1, max_size=30)


def _run(controller: LambdaController, kls: list[float]) -> list[float]:
    return [controller.update(kl) for kl in kls]


def test_fixed_by_hand():
    """Nothing but lambda_max, before the first update too, whatever warm-up, target and KL."""
    for warmup in (0, 5):
        controller = LambdaController("fixed", lambda_min=1e-7, lambda_max=3e-6, warmup_steps=warmup, target=1e-4)
        assert [controller.value, *_run(controller, [0.0, 1.0, -1.0, 1e-4, 1e30, 0.0, 0.0])] == [3e-6] * 8


def test_milder_by_hand():
    """(2e-6 - 1e-7) / 4 = 4.75e-7 for each of four updates, then constant, however far the KL is from its target."""
    controller = LambdaController("milder", lambda_min=1e-7, lambda_max=2e-6, warmup_steps=4, window=1, target=1e-3)
    assert controller.value == 1e-7
    values = _run(controller, [9.0, 0.0, 9.0, 0.0, 9.0, 9.0, 0.0])
    assert values == pytest.approx([5.75e-7, 1.05e-6, 1.525e-6, 2e-6, 2e-6, 2e-6, 2e-6], rel=1e-12)
    assert values[3:] == [2e-6] * 4


# Warm-up of 2, window 3, target 1e-3, gain 0.2, bounds 1e-7 and 1e-5.
#   update  KL      mean of the last three    e      clipped
#   1       9e-3    (warm-up)
#   2       1e-3    (warm-up)
#   3       2e-3    (9 + 1 + 2)/3     = 4     3      1
#   4       0.6e-3  (1 + 2 + 0.6)/3   = 1.2   0.2
#   5       0.4e-3  (2 + 0.6 + 0.4)/3 = 1     0
#   6       0.2e-3  (0.6+0.4+0.2)/3   = 0.4  -0.6
#   7       0       (0.4 + 0.2 + 0)/3 = 0.2  -0.8
#   8      -0.5e-3  (0.2 + 0 - 0.5)/3 = -0.1 -1.1   -1
KLS = [9e-3, 1e-3, 2e-3, 0.6e-3, 0.4e-3, 0.2e-3, 0.0, -0.5e-3]
RELAX = [
    5.05e-6,  # 1e-7 + 9.9e-6 / 2
    1e-5,
    8e-6,  # 1e-5 (1 - 0.2)
    7.68e-6,  # 8e-6 (1 - 0.04)
    7.68e-6,  # target met
    8.6016e-6,  # 7.68e-6 (1 + 0.12)
    9.977856e-6,  # 8.6016e-6 (1 + 0.16)
    1e-5,  # 9.977856e-6 (1 + 0.2) = 1.19734272e-5, above lambda_max
]
TIGHTEN = [
    5.05e-6,
    1e-5,
    1e-5,  # 1e-5 (1 + 0.2), above lambda_max
    1e-5,  # 1e-5 (1 + 0.04), above lambda_max
    1e-5,  # target met
    8.8e-6,  # 1e-5 (1 - 0.12)
    7.392e-6,  # 8.8e-6 (1 - 0.16)
    5.9136e-6,  # 7.392e-6 (1 - 0.2)
]


def _two_stage(feedback: str) -> LambdaController:
    return LambdaController("two_stage", 1e-7, 1e-5, 2, 3, 1e-3, 0.2, feedback)


@pytest.mark.parametrize(("feedback", "expected"), [("relax", RELAX), ("tighten", TIGHTEN)])
def test_two_stage_by_hand(feedback, expected):
    controller = _two_stage(feedback)
    assert controller.value == 1e-7
    assert _run(controller, KLS) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("feedback", "expected"),
    [
        # 1e-5 (1 - 0.5), 5e-6 (1 - 0.5) = 2.5e-6 is below the bound, 4e-6 (1 + 0.25), target met,
        # 5e-6 (1 - 0.25) = 3.75e-6 is below it too
        ("relax", [5e-6, 4e-6, 5e-6, 5e-6, 4e-6]),
        # 1e-5 (1 + 0.5) is above the bound, twice, 1e-5 (1 - 0.25), target met, 7.5e-6 (1 + 0.25) = 9.375e-6
        ("tighten", [1e-5, 1e-5, 7.5e-6, 7.5e-6, 9.375e-6]),
    ],
)
def test_bounds_by_hand_with_a_window_of_one(feedback, expected):
    """No warm-up; e = 2 and 2 (clipped to 1), -0.5, 0, 0.5."""
    controller = LambdaController("two_stage", 4e-6, 1e-5, 0, 1, 1e-3, 0.5, feedback)
    assert controller.value == 1e-5
    assert _run(controller, [3e-3, 3e-3, 0.5e-3, 1e-3, 1.5e-3]) == pytest.approx(expected, rel=1e-12)


def test_a_window_longer_than_the_history_averages_what_there_is():
    """Window 10, three values: means 1.5, (1.5 + 0.1)/2 = 0.8 and (1.6 + 2)/3 = 1.2; e = 0.5, -0.2 and 0.2."""
    controller = LambdaController("two_stage", 1e-7, 1e-3, 0, 10, 1e-3, 1.0)
    controller.value = 1e-5
    values = _run(controller, [1.5e-3, 0.1e-3, 2e-3])
    # 1e-5 (1 - 0.5), 5e-6 (1 + 0.2), 6e-6 (1 - 0.2)
    assert values == pytest.approx([5e-6, 6e-6, 4.8e-6], rel=1e-12)


def test_a_value_leaves_the_window_after_its_turn():
    """Window 2, gain 1: means 2, 1.5, 1 (the 2 has left); e = 1, 0.5, 0: times 0, so the bound, times 0.5, times 1."""
    controller = LambdaController("two_stage", 1e-6, 1e-5, 0, 2, 1e-3, 1.0)
    assert _run(controller, [2e-3]) == [1e-6]
    controller.value = 8e-6
    assert _run(controller, [1e-3, 1e-3]) == pytest.approx([4e-6, 4e-6], rel=1e-12)
    assert controller.state_dict()["history"] == [1e-3, 1e-3]


@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_a_target_that_is_met_leaves_lambda_exactly_alone(feedback):
    target = 2.0**-10
    controller = LambdaController("two_stage", 1e-7, 1e-5, 0, 4, target, 0.3, feedback)
    controller.value = 3.3e-6
    assert _run(controller, [target] * 6) == [3.3e-6] * 6
    # 0.5 and 1.5 about the target: single errors, but none in the mean
    assert _run(controller, [0.5 * target])[0] != 3.3e-6
    controller.value = 3.3e-6
    assert _run(controller, [1.5 * target]) == [3.3e-6]


@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_a_wild_kl_moves_lambda_no_further_than_a_clipped_one(feedback):
    for wild, clipped in ((1e30, 2e-3), (-1e30, 0.0)):
        values = []
        for kl in (wild, clipped):
            controller = LambdaController("two_stage", 1e-7, 1e-5, 0, 1, 1e-3, 0.1, feedback)
            controller.value = 1e-6
            values.append(controller.update(kl))
        assert values[0] == pytest.approx(values[1], rel=1e-12)


@given(st.sampled_from(KINDS), st.sampled_from(FEEDBACKS), kl_lists, st.integers(0, 6), st.integers(1, 5))
def test_lambda_never_leaves_its_bounds_and_feedback_moves_it_by_the_gain_at_most(kind, feedback, kls, warmup, window):
    controller = LambdaController(kind, 1e-7, 1e-5, warmup, window, 1e-2, 0.3, feedback)
    values = [controller.value, *_run(controller, kls)]
    assert all(1e-7 <= value <= 1e-5 for value in values)
    for i in range(warmup + 1, len(values)):
        assert 0.7 - 1e-12 <= values[i] / values[i - 1] <= 1.3 + 1e-12
    assert len(controller.state_dict()["history"]) == min(len(kls), window)


@given(st.lists(st.floats(-0.1, 0.1), max_size=5), st.floats(-0.1, 0.1), st.floats(-0.1, 0.1))
def test_more_kl_lowers_lambda_when_relaxing_and_raises_it_when_tightening(past, less, more):
    less, more = min(less, more), max(less, more)
    for feedback in FEEDBACKS:
        pair = [LambdaController("two_stage", 1e-7, 1e-5, 0, 3, 1e-2, 0.3, feedback) for _ in range(2)]
        for controller in pair:
            _run(controller, past)
        low, high = pair[0].update(less), pair[1].update(more)
        assert high <= low if feedback == "relax" else high >= low


@given(st.sampled_from(KINDS), st.sampled_from(FEEDBACKS), kl_lists, st.data())
def test_resumed_from_json_midway_it_continues_as_if_uninterrupted(kind, feedback, kls, data):
    warmup, window = data.draw(st.integers(0, 8)), data.draw(st.integers(1, 6))
    stop = data.draw(st.integers(0, len(kls)))
    whole, first, resumed = (LambdaController(kind, 1e-7, 1e-5, warmup, window, 1e-2, 0.3, feedback) for _ in range(3))
    expected = _run(whole, kls)
    _run(first, kls[:stop])
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert _run(resumed, kls[stop:]) == expected[stop:]
    assert resumed.state_dict() == whole.state_dict()


def test_resumed_by_hand_after_the_fourth_update():
    resumed = _two_stage("relax")
    resumed.load_state_dict({"kind": "two_stage", "updates": 4, "value": 7.68e-6, "history": [1e-3, 2e-3, 0.6e-3]})
    assert _run(resumed, KLS[4:]) == pytest.approx(RELAX[4:], rel=1e-12)


def test_a_saved_state_is_a_copy():
    controller = _two_stage("relax")
    _run(controller, KLS[:3])
    state = controller.state_dict()
    _run(controller, KLS[3:])
    assert state == {"kind": "two_stage", "updates": 3, "value": pytest.approx(8e-6, rel=1e-12), "history": KLS[:3]}


def test_a_shorter_window_on_resuming_keeps_the_latest_values():
    shorter = LambdaController("two_stage", 1e-7, 1e-5, 2, 2, 1e-3, 0.2)
    shorter.load_state_dict({"kind": "two_stage", "updates": 4, "value": 8e-6, "history": [9e-3, 1e-3, 0.4e-3]})
    # (0.4 + 0.6)/2 = 0.5, e = -0.5, 8e-6 (1 + 0.1)
    assert shorter.update(0.6e-3) == pytest.approx(8.8e-6, rel=1e-12)


def test_a_lambda_that_could_die_is_refused():
    with pytest.raises(ValueError, match="never rise again"):
        LambdaController("two_stage", lambda_min=0.0, gain=1.0)
