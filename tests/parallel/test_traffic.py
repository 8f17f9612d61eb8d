"""Bytes of every collective, counted on running ranks, are those of the formulas."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel import iterations
from tests.parallel.pool import run_on_ranks

MODELS = {
    "16 heads, 5 blocks": iterations.MODEL,
    "8 heads, 4 blocks": {
        "num_attention_heads": 8,
        "attention_head_dim": 12,
        "num_layers": 4,
        "rope_axes_dim": (4, 4, 4),
    },
}


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp("world") for name in MODELS}
    for name, folder in folders.items():
        run_on_ranks(1, "tests.training.world:build", root=folder, **MODELS[name])
    return folders


def train_counted(arguments: list[str], processes: int, pairs: int) -> tuple[Counter, Counter, Counter]:
    """(counted, formula, counted calls) of one update of `pairs` steps of the first micro-batch."""
    from megatron_sage.parallel.traffic import CollectiveCounter
    from megatron_sage.planning import traffic

    trainer = iterations.prepare(arguments, processes)
    trajectories, _ = trainer._roll_out()
    for trajectory in trajectories:
        trajectory.advantage_B = torch.ones(len(trajectory.samples), dtype=torch.float64)
        trajectory.keep(torch.ones(len(trajectory.samples), dtype=torch.bool))
    trainer._reference_pass(trajectories)
    engine, config = trainer.engine, trainer.engine.config
    # two micro-batches of different prompts: the shorter one is filled up to the longer one's size
    visited = [(number, trainer.table.trained_steps[0]) for number in (0, len(trajectories) - 1)][:pairs]
    with CollectiveCounter(engine.groups) as counter:
        trainer.replay.gradients(trajectories, visited, lambda count: None)
    place = traffic.Place(
        engine.model_config,
        engine.groups.pp_rank,
        engine.shape.shard.num_tokens,
        config.sampler.micro_batch,
        engine.groups.dp_size,
    )
    network = engine.network()
    prompts = [trajectories[number].prompt for number, _ in visited]
    longest = max(network.all_packed_tokens(prompt) for prompt in prompts)
    terms = 1 if config.kl.strategy == "none" else 2 if config.kl.step_kl == "logprob" else 3
    expected = traffic.update(place, pairs)
    for prompt in prompts:
        texts = [network.text(prompt, branch).num_tokens for branch in range(network.branches)]
        expected += traffic.micro_batch(place, texts, longest, loss_terms=terms)
    if engine.groups.dp_size == 1:  # else each replica has one prompt
        assert len({prompt.conditional.num_tokens for prompt in prompts}) == 2
    return counter.bytes, expected, counter.calls


QUICK = ("cp2-allgather",)  # of the smaller model
LAYOUTS = {
    "tp2-sp": {"parallel.tensor": 2},
    "tp2": {"parallel.tensor": 2, "parallel.sequence": False, "sampler.guidance_scale": 1.0},
    "cp2-ulysses": {"parallel.context": 2, "kl.step_kl": "closed_form"},
    "cp2-allgather": {"parallel.context": 2, "parallel.context_backend": "allgather", "kl.strategy": "none"},
    "pp2": {"parallel.pipeline": 2},
    "pp2-interleaved": {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2, "sampler.guidance_scale": 1.0},
    "tp2-cp2": {"parallel.tensor": 2, "parallel.context": 2},
    "tp2-cp2-recomputed": {"parallel.tensor": 2, "parallel.context": 2, "precision.recompute": "full"},
    "tp2-selective": {"parallel.tensor": 2, "precision.recompute": "selective"},
    "tp2-pp2": {"parallel.tensor": 2, "parallel.pipeline": 2, "sampler.guidance_scale": 1.0},
    "cp2-pp2": {"parallel.context": 2, "parallel.pipeline": 2},
    "cp2-dp2": {"parallel.context": 2, "parallel.data": 2},
    "pp4": {"parallel.pipeline": 4},
}


CASES = [pytest.param(name, "16 heads, 5 blocks", id=name) for name in LAYOUTS] + [
    pytest.param(name, "8 heads, 4 blocks", id=f"{name}, smaller", marks=[] if name in QUICK else pytest.mark.nightly)
    for name in LAYOUTS
]


@pytest.mark.parametrize(("name", "model"), CASES)
def test_counted_bytes_are_the_formula_s(roots: dict[str, Path], name: str, model: str) -> None:
    """15 video tokens and texts of 1, 3, 6 or 9 words: padding everywhere."""
    from tests.training import world

    changes: dict[str, Any] = {"sampler.num_steps": 2, **LAYOUTS[name]}
    sizes = [changes.get(f"parallel.{key}", 1) for key in ("tensor", "context", "pipeline", "data")]
    ranks = sizes[0] * sizes[1] * sizes[2] * sizes[3]
    arguments = world.overrides(world.settings(roots[model], f"traffic_{name}", **changes))
    function = "tests.parallel.test_traffic:train_counted"
    found = run_on_ranks(ranks, function, arguments=arguments, processes=ranks, pairs=2)
    for rank, (counted, expected, calls) in enumerate(found):
        assert counted == expected, (rank, counted - expected, expected - counted, calls)
        assert counted
