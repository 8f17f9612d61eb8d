"""The same seed, prompts and configuration give the same run at every layout, down to every gradient."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.parallel import iterations
from tests.parallel.pool import run_on_ranks
from tests.training import world

JOB = "tests.parallel.iterations:job"
#          TP CP PP DP
LAYOUTS = [
    (2, 1, 1, 1),
    (1, 2, 1, 1),
    (1, 1, 2, 1),
    (1, 1, 1, 2),
    (2, 2, 1, 1),
    (2, 1, 2, 1),
    (1, 2, 2, 1),
    (1, 2, 1, 2),
]
NIGHTLY = [(2, 2, 2, 1), (1, 4, 1, 1), (4, 1, 1, 1), (1, 1, 4, 1), (2, 1, 1, 2), (1, 1, 2, 2), (2, 2, 1, 2)]
GUIDANCE = {"guided": 2.0, "unguided": 1.0}
# Other choices of the method at once: what is sent, scored and gathered then has other shapes.
CHOICES = {
    "sampler.num_steps": 4,
    "sampler.sde_window.size": 2,
    "sampler.sde_type": "cps_unnormalized",
    "grpo.cfg_in_training": "distilled",
    "grpo.replay_batch": 3,
    "kl.strategy": "dual",
    "kl.position": "fixed",
    "kl.phase": "training",
    "kl.step_kl": "logprob",
    "reward.watch": "tests.training.world:SteadyReward",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    run_on_ranks(1, "tests.training.world:build", root=folder, matrix_scale=0.7, **iterations.MODEL)
    return folder


@pytest.fixture(scope="module")
def single(root: Path) -> dict[str, dict[str, Any]]:
    """The single process, with and without guidance."""
    return {name: run(root, f"single_{name}", 1, guidance) for name, guidance in GUIDANCE.items()}


def run(root: Path, name: str, processes: int, guidance: float, **changes: Any) -> dict[str, Any]:
    changes = {"sampler.guidance_scale": guidance} | changes
    arguments = world.overrides(iterations.settings(root, name, **changes))
    return run_on_ranks(processes, JOB, timeout=300, arguments=arguments, processes=processes)[0]


def layout(tensor: int, context: int, pipeline: int, data: int) -> dict[str, Any]:
    sizes = {"tensor": tensor, "context": context, "pipeline": pipeline, "data": data}
    return {f"parallel.{key}": value for key, value in sizes.items()}


def assert_same_run(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    """`theirs` is the single process'."""
    assert mine["latents"].keys() == theirs["latents"].keys() == mine["log_prob"].keys()
    for place, latents in theirs["latents"].items():
        assert np.array_equal(mine["latents"][place], latents), f"initial latents of {place}"
        np.testing.assert_allclose(mine["log_prob"][place], theirs["log_prob"][place], rtol=1e-6, atol=0)
    for key in [k for k in theirs["rows"][0] if k.startswith(("reward/", "loss", "grad_norm"))]:
        scale = max(abs(theirs["rows"][0][key]), 1.0 if key.startswith("loss") else 0.0)
        assert mine["rows"][0][key] == pytest.approx(theirs["rows"][0][key], abs=1e-5 * scale), key
    assert_close(mine["gradients"], theirs["gradients"], 1e-5, np.max)
    assert_close(mine["change"], theirs["change"], 1e-3, np.linalg.norm)


def assert_close(mine: dict[str, Any], theirs: dict[str, Any], tolerance: float, size: Any) -> None:
    """|mine - theirs| <= tolerance |theirs| for every parameter, but those whose gradient is zero by mathematics."""
    errors = {}
    for name, value in theirs.items():
        if is_zero_by_mathematics(name):
            continue
        scale = size(np.abs(value))
        errors[name] = size(np.abs(mine[name] - value)) / scale if scale > 0 else float(np.any(mine[name]))
    worst = sorted(errors, key=lambda name: -errors[name])[:5]
    assert errors[worst[0]] <= tolerance, ", ".join(f"{name} {errors[name]:.1e}" for name in worst)


def is_zero_by_mathematics(name: str) -> bool:
    """The refiner's key bias moves all logits of a query alike: its gradient is rounding."""
    return "refiner_blocks" in name and name.endswith("attn.to_k.bias")


VARIANTS = {
    "keys and values gathered": (2, {"parallel.context": 2, "parallel.context_backend": "allgather"}),
    "interleaved": (2, {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2}),
    "uneven by hand, recomputed": (
        2,
        {"parallel.pipeline": 2, "parallel.pipeline_layout": "Et|t*4L", "precision.recompute": "full"},
    ),
    "no sequence parallelism": (4, {"parallel.tensor": 2, "parallel.sequence": False, "parallel.context": 2}),
}


VARIANT_RUNS = [
    pytest.param(name, marks=pytest.mark.nightly if name == "no sequence parallelism" else []) for name in VARIANTS
]


@pytest.mark.parametrize("variant", VARIANT_RUNS)
def test_other_ways_through_the_same_layout(root: Path, single: dict[str, dict[str, Any]], variant: str) -> None:
    processes, changes = VARIANTS[variant]
    found = run(root, variant.replace(" ", "_").replace(",", ""), processes, GUIDANCE["guided"], **changes)
    assert_same_run(found, single["guided"])


@pytest.fixture(scope="module")
def chosen(root: Path) -> dict[str, Any]:
    return run(root, "single_chosen", 1, GUIDANCE["guided"], **CHOICES)


@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 2, 1),
        (1, 2, 1, 1),
        pytest.param((1, 1, 1, 2), marks=pytest.mark.nightly),
        pytest.param((2, 1, 2, 1), marks=pytest.mark.nightly),
        pytest.param((1, 2, 2, 1), marks=pytest.mark.nightly),
    ],
    ids=str,
)
def test_other_choices_of_the_method(root: Path, chosen: dict[str, Any], sizes: tuple[int, int, int, int]) -> None:
    """A window, batched replay of a distilled branch, a reference asked before each update."""
    name = f"chosen_{'_'.join(map(str, sizes))}"
    found = run(root, name, int(np.prod(sizes)), GUIDANCE["guided"], **CHOICES, **layout(*sizes))
    assert_same_run(found, chosen)
    assert found["rows"][0]["watch/VQ"] == pytest.approx(chosen["rows"][0]["watch/VQ"], rel=1e-6)


@pytest.fixture(scope="module")
def patchy(root: Path) -> dict[str, Any]:
    found = run(root, "single_patchy", 1, 1.0, **PATCHY)
    assert 0 < found["rows"][0]["reward/nonfinite"] < 8
    return found


PATCHY = {"reward.function": "tests.training.world:PatchyReward"}


@pytest.mark.parametrize(
    "sizes",
    [(1, 2, 1, 1), (1, 1, 2, 1), (1, 1, 1, 2), pytest.param((1, 2, 1, 2), marks=pytest.mark.nightly)],
    ids=str,
)
def test_dropped_samples_are_counted_once(root: Path, patchy: dict[str, Any], sizes: tuple[int, int, int, int]) -> None:
    """The gradient is divided by the number of pairs that are left, whatever ranks hold them."""
    name = f"patchy_{'_'.join(map(str, sizes))}"
    found = run(root, name, int(np.prod(sizes)), 1.0, **PATCHY, **layout(*sizes))
    assert found["rows"][0]["reward/nonfinite"] == patchy["rows"][0]["reward/nonfinite"]
    assert_same_run(found, patchy)


UNGUIDED = ((1, 2, 1, 1), (1, 1, 2, 1))  # in `make test`; the others' are nightly
# half a minute each of gloo's latency: nightly; TP x CP and TP x PP stay in test_parity and test_traffic
SLOW = ((2, 2, 1, 1), (2, 1, 2, 1))
RUNS = [
    pytest.param(
        sizes,
        guidance,
        id=f"{'-'.join(map(str, sizes))}-{guidance}",
        marks=[pytest.mark.nightly]
        if sizes in (*NIGHTLY, *SLOW) or (guidance == "unguided" and sizes not in UNGUIDED)
        else [],
    )
    for sizes in LAYOUTS + NIGHTLY
    for guidance in GUIDANCE
]


@pytest.mark.parametrize(("sizes", "guidance"), RUNS)
def test_the_run_of_the_single_process(
    root: Path, single: dict[str, dict[str, Any]], sizes: tuple[int, int, int, int], guidance: str
) -> None:
    name = f"{guidance}_{'_'.join(map(str, sizes))}"
    found = run(root, name, int(np.prod(sizes)), GUIDANCE[guidance], **layout(*sizes))
    assert_same_run(found, single[guidance])
    # 8 videos an iteration, each decoded and scored once, by all ranks alike
    share = 3 * 8 // len(found["decoded"])
    assert found["decoded"] == [share] * len(found["decoded"]) and found["rows"][0]["grad_norm"] > 0.01
