"""The whole chain improves what it is rewarded for: rollout, scores, advantages, loss, Megatron's optimizer."""

from pathlib import Path

import numpy as np

from tests.parallel.pool import run_on_ranks
from tests.training import world


def test_the_reward_rises(tmp_path: Path) -> None:
    """Brightness of the frames, 16 iterations of 16 videos: 0.55 -> 0.74 when recorded, with a noise of 0.03."""
    run_on_ranks(1, "tests.training.world:build", root=tmp_path)
    changes = {
        "training.iterations": 16,
        "optimizer.lr": 3e-3,
        "grpo.clip_range": 1e-2,
        "grpo.group_size": 8,
        "sampler.micro_batch": 8,
        "sampler.guidance_scale": 1,
        "reward.weights": "{VQ: 1}",
    }
    arguments = world.overrides(world.settings(tmp_path, "learning", **changes))
    rows = run_on_ranks(1, "tests.training.world:train_job", arguments=arguments, processes=1)[0]["rows"]
    rewards = np.array([row["reward/mean"] for row in rows])
    assert rewards[-3:].mean() > rewards[:3].mean() + 0.1
    assert max(row["ratio/initial_deviation"] for row in rows) <= 1e-6
