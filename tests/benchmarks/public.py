"""Jobs on a rank: the public loop and our Trainer through the same run, and how far apart they are."""

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

WORDS = "a red blue slow bright circle falls, moving under the light again".split()
SUMS = ("samples", "loss", "loss/policy", "kl/position", "kl/velocity", "clipped")  # of a pair, beside its ratio


def random_run(root: Path, seed: int) -> tuple[dict[str, Any], Any]:
    """A random small world, and settings under which every term of the method bites: (settings, padding)."""
    from benchmarks.sides import Padding
    from tests.training import world

    draw = random.Random(seed)
    axes = [2 * draw.randint(1, 3) for _ in range(3)]
    world.build(
        root,
        seed,
        num_attention_heads=draw.randint(1, 5),
        attention_head_dim=sum(axes),
        rope_axes_dim=axes,
        num_layers=draw.randint(1, 3),
        num_refiner_layers=draw.randint(1, 2),
    )
    prompts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 12))) for _ in range(5)]
    prompts[seed % 5] += ' and a sign "open"'
    (root / "prompts.txt").write_text("\n".join(prompts) + "\n")
    settings = world.settings(
        root,
        f"seed{seed}",
        **{
            "seed": draw.randint(0, 99),
            "video.frames": 4 * draw.randint(0, 4) + 1,
            "video.height": 16 * draw.randint(1, 3),
            "video.width": 16 * draw.randint(1, 5),
            "sampler.num_steps": draw.randint(2, 3),
            "sampler.micro_batch": 1,
            "grpo.group_size": draw.choice([2, 4]),
            "grpo.clip_range": 2e-4,
            "optimizer.lr": 1e-3,
            # a floor above the rounding of the smallest gradients, which Adam would make steps of full size
            "optimizer.eps": 1e-5,
            "optimizer.grad_clip": 0.01,
            "optimizer.warmup_steps": 2,
            "kl.lambda_max": 1.0,
            "kl.warmup_steps": 2,
        },
    )
    return settings, Padding(draw.randint(31, 36), draw.randint(4, 9), draw.randint(0, 7))


def reward(group: int, sample: int) -> float:
    """Differs from video to video."""
    return float(np.random.default_rng([7, group, sample]).normal())


def patchy_reward(group: int, sample: int) -> float:
    """Here and there no number."""
    return math.nan if (group + sample) % 5 == 0 else reward(group, sample)


def compare(root: Path, seed: int, iterations: int = 3, patchy: bool = False, **changes: Any) -> dict[str, Any]:
    """Both through `iterations`; differences and the loop's metrics. `changes`: of the settings."""
    from benchmarks.sides import our_side, public_side
    from tests.training import world

    settings, padding = random_run(root, seed)
    settings |= changes
    arguments, scores = world.overrides(settings), patchy_reward if patchy else reward
    theirs, loop = public_side(arguments, padding, settings["sampler.micro_batch"], scores)
    ours, trainer = our_side("ours", arguments, scores)
    ours.counting = theirs.counting = False  # torch's counter is slow
    seen: dict[str, Any] = {}
    record(trainer, seen)
    before = {name: p.detach().clone() for name, p in loop.model.named_parameters()}
    found: dict[str, Any] = {"iterations": [], "tokens": trainer.engine.shape.shard.num_tokens}
    for _ in range(iterations):
        seen["pairs"] = []
        ours()
        theirs()
        found["iterations"].append(differences(seen, loop, trainer.table.trained_steps))
    found["rows"] = {"ours": ours.rows, "theirs": theirs.rows}
    found["weights"] = distance_of_weights(trainer, loop, before)
    found["reference_moved"] = moved(loop.reference, before)
    return found


def record(trainer: Any, seen: dict[str, Any]) -> None:
    """Trajectories and the statistics of every pair that is trained on, as `trainer` goes."""
    roll_out, gradients = trainer._roll_out, trainer.replay.gradients

    def rolled_out() -> Any:
        found = roll_out()
        seen["trajectories"] = found[0]
        return found

    def replayed(trajectories: Any, pairs: Any, tick: Any) -> Any:
        found = gradients(trajectories, pairs, tick)
        if trainer.engine.control.phase == "train":  # not for the noise floor
            seen["pairs"] += list(zip(pairs, found, strict=True))
        return found

    trainer._roll_out, trainer.replay.gradients = rolled_out, replayed


def differences(seen: dict[str, Any], loop: Any, steps: list[int]) -> dict[str, float]:
    """Of one iteration, the largest: latents and log-probabilities relative, terms of the pairs absolute."""
    by_place = {(t.group, t.sample): t for t in loop.trajectories}
    latents = log_prob = 0.0
    for trajectory in seen["trajectories"]:
        for column, sample in enumerate(trajectory.samples):
            other = by_place[trajectory.group, sample]
            if not other.trained:
                continue
            for step in {*steps, len(loop.steps)}:
                mine = trajectory.latents_SBC[step][:, column]
                whole = other.latents[step][0].flatten(1).T
                latents = max(latents, float((mine - whole).abs().max() / whole.abs().max()))
            for step in steps:
                mine, whole = trajectory.log_prob_B[step][column], other.log_prob[step][0]
                log_prob = max(log_prob, float((mine - whole).abs() / whole.abs()))
    sums: dict[tuple[int, tuple[int, ...], int], list[float]] = {}
    for trajectory, step, terms in loop.pairs:
        row = [1.0, *(float(terms[name]) for name in SUMS[1:]), float(terms["ratio"])]
        sums[trajectory.group, trajectory.sample, step] = row
    worst = [0.0] * (len(SUMS) + 1)
    for (number, step), statistics in seen["pairs"]:
        trajectory = seen["trajectories"][number]
        rows = [sums.pop((trajectory.group, sample, step), [0.0] * len(worst)) for sample in trajectory.samples]
        total = torch.tensor(rows, dtype=torch.float64).sum(dim=0)
        mine = torch.stack([*statistics.sums[[0, 1, 2, 3, 4, 6]], statistics.ratio_sum])
        worst = [max(a, float(b)) for a, b in zip(worst, (mine - total).abs(), strict=True)]
    assert not sums, "the loop has trained on pairs that ours has not"
    return {"latents": latents, "log_prob": log_prob, **dict(zip((*SUMS, "ratio"), worst, strict=True))}


def distance_of_weights(trainer: Any, loop: Any, before: dict[str, torch.Tensor]) -> float:
    """|ours - theirs| over |what training has changed|, all weights."""
    from megatron_sage.checkpoint.distributed import gather_named

    ours, theirs = dict(gather_named(trainer.engine.chunks, "param")), dict(loop.model.named_parameters())
    assert ours.keys() == theirs.keys()
    apart = sum(float((ours[name] - p.detach()).double().square().sum()) for name, p in theirs.items())
    change = sum(float((p.detach() - before[name]).double().square().sum()) for name, p in theirs.items())
    return math.sqrt(apart / change)


def moved(model: Any, before: dict[str, torch.Tensor]) -> bool:
    """Whether the reference is no longer what training began with."""
    return model is not None and any(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def small_benchmark(folder: Path) -> dict[str, Any]:
    """`python -m benchmarks.iteration --small`, and what its table says."""
    from benchmarks import iteration

    result = iteration.measure(iteration.SMALL[0], 1, folder)
    return {"result": result, "markdown": iteration.markdown([result], iteration.at_real_sizes())}
