"""Every choice of the method through whole iterations: trust regions, guidance, windows, replay, odd rewards."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sage.errors import UserError
from tests.parallel.pool import run_on_ranks
from tests.training import world

JOB = "tests.training.inspection:inspect"
REWARD = "tests.training.inspection:"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    run_on_ranks(1, "tests.training.world:build", root=folder, matrix_scale=0.7)
    return folder


def run(root: Path, name: str, ranks: int = 1, noise: float = 0.0, **changes: Any) -> dict[str, Any]:
    """Two iterations of two updates by default; what rank 0 wrote down."""
    base = {"training.iterations": 2, "reward.function": f"{REWARD}ByPlace", "kl.schedule": "fixed"}
    arguments = world.overrides(world.settings(root, name, **(base | changes)))
    return run_on_ranks(ranks, JOB, arguments=arguments, processes=ranks, noise=noise)[0]


def untimed(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not key.startswith("seconds/")}


def same_weights(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(np.array_equal(value, other["after"][name]) for name, value in one["after"].items())


def distance(found: dict[str, Any]) -> float:
    return float(np.sqrt(sum(np.square(value).sum() for value in found["change"].values())))


@pytest.fixture(scope="module")
def free(root: Path) -> dict[str, Any]:
    return run(root, "free", **{"kl.strategy": "none"})


@pytest.mark.parametrize("strategy", ["fixed", "step", "moving", "dual"])
def test_each_trust_region_has_its_terms(root: Path, free: dict[str, Any], strategy: str) -> None:
    found = run(root, f"strategy_{strategy}", **{"kl.strategy": strategy, "kl.anchor_interval": 1})
    last = found["rows"][-1]
    assert (last["kl/position"] != 0) == (strategy != "step")
    assert (last["kl/velocity"] != 0) == (strategy in ("step", "dual"))
    assert not same_weights(found, free)
    if strategy == "step":
        assert "anchor_drift" not in found and "reference" not in found["forwards"][0]
    else:
        assert found["anchor_is_initial"] == (strategy == "fixed")
        assert found["anchor_is_policy"] == (strategy != "fixed")


def test_the_position_of_the_dual_kl_may_stay_fixed(root: Path) -> None:
    found = run(root, "dual_fixed", **{"kl.position": "fixed", "kl.anchor_interval": 1})
    assert found["anchor_is_initial"] and not found["anchor_is_policy"]


@pytest.mark.nightly
def test_a_strong_fixed_reference_holds_the_policy(root: Path, free: dict[str, Any]) -> None:
    strong = {"kl.strategy": "fixed", "kl.lambda_max": 1e4, "training.iterations": 6, "optimizer.lr": 1e-3}
    held = run(root, "held", **strong)
    loose = run(root, "loose", **(strong | {"kl.lambda_max": 1e-6}))
    assert held["rows"][-1]["kl/position"] < 0.5 * loose["rows"][-1]["kl/position"]


@pytest.mark.nightly
def test_the_step_term_is_nothing_with_one_update_and_bites_with_two(root: Path) -> None:
    """In the only update of a rollout the policy is the rollout's: KL and gradient of the closed form are zero."""
    options = {"kl.strategy": "step", "kl.step_kl": "closed_form", "kl.lambda_max": 1e3, "optimizer.lr": 1e-3}
    for updates in (1, 4):
        one = {"grpo.updates_per_rollout": updates, "training.iterations": 3}
        term = run(root, f"step_{updates}", **options, **one)
        none = run(root, f"no_step_{updates}", **(options | {"kl.strategy": "none"}), **one)
        if updates == 1:
            assert same_weights(term, none) and all(row["kl/velocity"] == 0 for row in term["rows"])
        else:
            assert not same_weights(term, none)
            assert term["rows"][-1]["kl/velocity"] > 0 and term["rows"][0]["ratio/initial_deviation"] < 1e-6
            largest = [max(row["ratio/max"] - 1 for row in found["rows"]) for found in (term, none)]
            assert largest[0] < largest[1], "the term must hold the policy near the rollout's"


def test_reference_velocities_in_training_are_those_of_the_rollout_phase(root: Path) -> None:
    apart = {"kl.strategy": "dual", "kl.anchor_interval": 100}
    early = run(root, "phase_rollout", **apart)
    late = run(root, "phase_training", **apart, **{"kl.phase": "training"})
    assert same_weights(early, late)
    assert [untimed(row) for row in early["rows"]] == [untimed(row) for row in late["rows"]]
    # 8 samples x 4 steps x 2 branches, once either way; afterwards nothing of it is kept in the training phase
    assert early["forwards"][1]["reference"] == 64 and "reference" not in late["forwards"][1]
    assert early["references_left"] == [4] * 4 and late["references_left"] == [0] * 4


def test_a_reference_in_training_sees_the_anchor_of_the_moment(root: Path) -> None:
    apart = {"kl.strategy": "moving", "kl.anchor_interval": 1, "kl.lambda_max": 10.0}
    early = run(root, "moment_rollout", **apart)
    late = run(root, "moment_training", **apart, **{"kl.phase": "training"})
    assert late["rows"][0]["kl/position"] < early["rows"][0]["kl/position"]  # refreshed between the two updates


@pytest.mark.parametrize(("choice", "forwards"), [("on", (2, 2, 2)), ("off", (1, 1, 1)), ("distilled", (2, 1, 1))])
def test_guidance_in_training_and_its_cost(root: Path, choice: str, forwards: tuple[int, int, int]) -> None:
    found = run(root, f"cfg_{choice}", **{"grpo.cfg_in_training": choice})
    counted = found["forwards"][1]  # the second iteration: the first also measures the noise floor
    per_step = [counted[phase] / (8 * 4) for phase in ("rollout", "reference", "train")]
    assert tuple(per_step) == forwards
    assert max(row["ratio/initial_deviation"] for row in found["rows"]) <= 1e-6
    if choice == "off":
        plain = run(root, "cfg_plain", **{"sampler.guidance_scale": 1.0})
        assert same_weights(found, plain)


def test_the_equalizer_scales_the_gradient_of_each_step(root: Path) -> None:
    from megatron_sage.grpo.equalizer import gradient_scales
    from megatron_sage.grpo.schedule import shifted_sigmas
    from megatron_sage.grpo.sde import step_coefficients

    still = {"optimizer.lr": 0.0}  # the ratio stays 1, no sample is clipped
    found = run(root, "equalized", **still, **{"kl.strategy": "none", "training.iterations": 1})
    scales = gradient_scales(step_coefficients("sage_grpo", shifted_sigmas(4, 3.0), 0.5))
    assert scales.max() > 5 * scales.min()
    for step, (scaled, plain) in found["pull"].items():
        assert scaled / plain == pytest.approx(float(scales[step]), rel=1e-4)


def test_a_window_is_all_that_is_stored_and_trained(root: Path) -> None:
    window = {"sampler.sde_window.size": 2, "sampler.num_steps": 6, "training.iterations": 4}
    found = run(root, "window", **window, **{"sampler.sde_window.stride": 2})
    assert found["steps"] == [[0, 1], [2, 3], [4, 5], [0, 1]] == found["scored"]
    assert found["kept"] == [[0, 1, 2, 6], [2, 3, 4, 6], [4, 5, 6], [0, 1, 2, 6]]
    assert [counted["train"] for counted in found["forwards"]] == [8 * 2 * 2] * 4
    assert max(row["ratio/initial_deviation"] for row in found["rows"]) <= 1e-6


def test_steps_without_noise_are_not_trained(root: Path) -> None:
    found = run(root, "cps", **{"sampler.sde_type": "cps"})
    assert found["steps"][0] == [0, 1, 2]  # the last of four has std 0
    found = run(root, "unnormalized", **{"sampler.sde_type": "cps_unnormalized", "kl.strategy": "step"})
    assert found["steps"][0] == [0, 1, 2] and found["rows"][0]["ratio/initial_deviation"] <= 1e-6


REPLAYS = [
    pytest.param(1, {}, id="one rank"),
    pytest.param(2, {"parallel.pipeline": 2}, id="pp2"),
    pytest.param(2, {"parallel.context": 2}, id="cp2"),
    pytest.param(2, {"parallel.tensor": 2}, id="tp2", marks=pytest.mark.nightly),
    pytest.param(2, {"parallel.data": 2}, id="dp2", marks=pytest.mark.nightly),
]


@pytest.mark.parametrize(("ranks", "layout"), REPLAYS)
def test_batched_replay_has_the_same_gradients(root: Path, ranks: int, layout: dict[str, Any], request: Any) -> None:
    """Two and three pairs at a time, samples of several steps in one forward, a rest that fills no batch."""
    changes = {"training.iterations": 1, "grpo.updates_per_rollout": 1, "kl.step_kl": "closed_form"} | layout
    changes["reward.function"] = "tests.training.world:SteadyReward"  # the ranks of a replica share the videos
    name = request.node.callspec.id.replace(" ", "_")
    one = run(root, f"replay_1_{name}", ranks, **changes)
    for size in (2, 3):
        many = run(root, f"replay_{size}_{name}", ranks, **changes, **{"grpo.replay_batch": size})
        errors, change, size_of_all = {}, 0.0, 0.0
        for key, value in one["gradients"].items():
            if not np.any(value) or ("refiner_blocks" in key and key.endswith("attn.to_k.bias")):
                continue  # zero by mathematics: the refiner's key bias moves all logits of a query alike
            off, whole = np.linalg.norm(many["gradients"][key] - value), np.linalg.norm(value)
            errors[key], change, size_of_all = float(off / whole), change + off**2, size_of_all + whole**2
        worst = max(errors, key=lambda key: errors[key])
        # of the whole gradient; a small one that nearly cancels between samples keeps more of the rounding (1.4e-6)
        assert np.sqrt(change / size_of_all) <= 1e-6 and errors[worst] <= 1e-5, (size, worst, errors[worst])
        assert many["rows"][0]["loss"] == pytest.approx(one["rows"][0]["loss"], abs=1e-6)


def test_the_noise_floor_is_written_and_guards_the_clip_range(root: Path) -> None:
    run(root, "floor", **{"training.iterations": 1})
    floor = json.loads((root / "floor" / "noise_floor.json").read_text())
    assert floor["steps"].keys() == {"0", "1", "2", "3"} and floor["largest"] == max(floor["steps"].values()) <= 1e-6
    assert (floor["layout"], floor["dtype"], floor["micro_batch"]) == ("TP 1 x CP 1 x PP 1 x DP 1", "fp32", 2)
    with pytest.raises(UserError, match=r"grpo\.clip_range=0\.0001: is below the noise floor"):
        run(root, "noisy", noise=0.5)
    noisy = json.loads((root / "noisy" / "noise_floor.json").read_text())
    assert noisy["largest"] > 1e-4  # and its numbers are there to look at
    allowed = run(root, "allowed", noise=0.5, **{"grpo.allow_clip_below_floor": True})
    assert allowed["rows"][0]["optimizer_steps"] == 2
    assert allowed["rows"][0]["ratio/initial_deviation"] == pytest.approx(noisy["largest"], rel=0.5)


def test_the_noise_floor_leaves_nothing_behind(root: Path) -> None:
    """It runs in the first iteration of every process: a resumed run has it at another place."""
    first = run(root, "floor_a", **{"training.iterations": 2})
    again = run(root, "floor_b", **{"training.iterations": 2, "grpo.allow_clip_below_floor": True})
    assert same_weights(first, again)
    assert first["rows"][0]["grad_norm"] == again["rows"][0]["grad_norm"] > 0


def test_clamped_advantages_are_counted(root: Path) -> None:
    found = run(root, "clamped", **{"grpo.advantage_clip": 1.0, "training.iterations": 1})
    beyond = sum(abs(value) > 1.0 for value in found["advantages"][0])
    assert found["rows"][0]["reward/clamped_advantages"] == beyond > 0


def test_a_watched_reward_is_logged_and_changes_nothing(root: Path) -> None:
    plain = run(root, "unwatched")
    watched = run(root, "watched", **{"reward.watch": f"{REWARD}Reversed"})
    assert same_weights(plain, watched)
    row = watched["rows"][0]
    assert row["watch/VQ"] == pytest.approx(1.5 - row["reward/VQ"]) and row["reward/VQ"] != 0.75
    assert untimed(plain["rows"][0]) == {k: v for k, v in untimed(row).items() if not k.startswith("watch/")}
    with pytest.raises(UserError, match="no such dimension"):
        run(root, "hacked", **{"reward.watch": f"{REWARD}Reversed", "reward.weights": "{watch/VQ: 1.0}"})


def advantages(values: list[float]) -> np.ndarray:
    return (np.array(values) - np.mean(values)) / np.std(values, ddof=1)


SECOND = [0.9, 0.3, 0.5, 0.8]
ODD_REWARDS = {
    "OneNan": ([True, False, True, True], [0.1, None, 0.2, 0.6], {"nonfinite": 1}),
    "OneInfinite": ([True, False, True, True], [0.1, None, 0.2, 0.6], {"nonfinite": 1}),
    "AllEqual": ([True] * 4, [], {"zero_std_groups": 1}),
    "OneFinite": ([False] * 4, [], {"nonfinite": 3, "dropped_groups": 1}),
}


@pytest.mark.parametrize("kind", ODD_REWARDS)
def test_an_odd_reward_through_a_whole_iteration(root: Path, kind: str) -> None:
    """Its sample has no advantage, is not counted, and the gradient is that of the other samples alone."""
    trained, rewards, counts = ODD_REWARDS[kind]
    changes = {"reward.function": f"{REWARD}{kind}", "reward.weights": "{VQ: 1.0}", "sampler.micro_batch": 1}
    found = run(root, f"dropped_{kind}", **changes, **{"grpo.updates_per_rollout": 1})
    assert found["trained"][0] == trained + [True] * 4
    kept = [value for value in rewards if value is not None]
    expected = np.zeros(4)
    if kept:
        expected[[i for i, value in enumerate(rewards) if value is not None]] = advantages(kept)
    np.testing.assert_allclose(found["advantages"][0], [*expected, *advantages(SECOND)], rtol=1e-6)
    row = found["rows"][0]
    for name in ("nonfinite", "zero_std_groups", "dropped_groups"):
        assert row[f"reward/{name}"] == counts.get(name, 0)
    assert row["reward/bad_iterations"] == row["reward/clamped_advantages"] == 0
    if kind in ("OneNan", "OneInfinite"):
        assert row["reward/mean"] == pytest.approx(np.mean([*kept, *SECOND]))
    (every, count), (others, kept_count) = found["without"]["all"], found["without"]["kept"]
    assert count == kept_count == 4 * (sum(trained) + 4)
    for name, value in others.items():
        scale = np.abs(value).max()
        assert np.abs(every[name] - value).max() <= 1e-6 * scale + 1e-12, name
    assert all(np.isfinite(value).all() for value in found["after"].values()) and row["optimizer_steps"] == 1
    assert all(np.isfinite(value) for value in row.values())
