"""The moving average against its formula, and in a run: saved, resumed, exported."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_sage.training.ema import Ema
from tests.parallel.pool import run_on_ranks
from tests.training import world

STEADY = {  # see tests/parallel/iterations.py: what makes equal runs equal under Adam
    "reward.function": "tests.training.world:SteadyReward",
    "grpo.updates_per_rollout": 1,
    "kl.schedule": "fixed",
    "optimizer.eps": 1e-5,
    "optimizer.grad_clip": 0.01,
    "sampler.num_steps": 2,
}


class Tiny(torch.nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(5, 3).to(dtype))
        self.frozen = torch.nn.Parameter(torch.randn(4).to(dtype), requires_grad=False)


def test_formula_and_swap() -> None:
    torch.manual_seed(7)
    for dtype, on_host in ((torch.float32, True), (torch.bfloat16, False)):
        chunks = [Tiny(dtype), Tiny(dtype)]
        ema = Ema(chunks, 0.75, on_host)
        wanted = [chunk.weight.detach().double() for chunk in chunks]
        for _ in range(5):
            for number, chunk in enumerate(chunks):
                chunk.weight.data += torch.randn(5, 3).to(dtype)
                wanted[number] = 0.75 * wanted[number] + 0.25 * chunk.weight.detach().double()
            ema.after_step()
        state = ema.state_dict()
        assert list(state) == ["0.weight", "1.weight"]  # frozen ones are their own average
        kept = [(chunk.weight.data_ptr(), chunk.weight.detach().clone()) for chunk in chunks]
        with ema.swapped_in():
            for number, chunk in enumerate(chunks):
                average = state[f"{number}.weight"]
                assert average.dtype == torch.float32
                torch.testing.assert_close(average.double(), wanted[number], rtol=1e-6, atol=1e-6)
                assert torch.equal(chunk.weight, average.to(dtype)) and chunk.weight.dtype == dtype
        for chunk, (place, value) in zip(chunks, kept, strict=True):
            assert chunk.weight.data_ptr() == place and torch.equal(chunk.weight, value)
        other = Ema([Tiny(dtype), Tiny(dtype)], 0.75, on_host)
        other.load_state_dict(state)
        assert all(torch.equal(other.state_dict()[name], value) for name, value in state.items())


def run(root: Path, name: str, ranks: int, **changes: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What a run left behind, and its averaged weights."""
    from safetensors.numpy import load_file

    settings = STEADY | {"optimizer.ema_decay": 0.5} | changes
    arguments = world.overrides(world.settings(root, name, **settings))
    result = run_on_ranks(ranks, "tests.training.world:train_job", arguments=arguments, processes=ranks)[0]
    exported = root / name / "export" / "transformer_ema" / "diffusion_pytorch_model.safetensors"
    return result, load_file(exported)


def test_a_resumed_run_on_two_replicas_is_the_single_one(tmp_path: Path) -> None:
    run_on_ranks(1, "tests.training.world:build", root=tmp_path, matrix_scale=0.7)
    single, average = run(tmp_path, "single", 1, **{"optimizer.ema_device": "device"})
    sharded = {"optimizer.distributed": True, "optimizer.offload": "hybrid", "optimizer.offload_fraction": 0.6}
    run(tmp_path, "two", 2, **sharded, **{"training.iterations": 2})
    resumed, resumed_average = run(tmp_path, "two", 2, **sharded, **{"training.resume": "yes"})
    norms = [[row["grad_norm"] for row in found["rows"]] for found in (single, resumed)]
    np.testing.assert_allclose(norms[1], norms[0], rtol=1e-4)
    start = load_start(tmp_path)
    for found, other in ((single["weights"], resumed["weights"]), (average, resumed_average)):
        change = max(float(np.abs(found[name] - start[name]).max()) for name in found)
        difference = max(float(np.abs(found[name] - other[name]).max()) for name in found)
        assert change > 1e-4 and difference < 1e-3 * change, (difference, change)
    # three iterations of one step from the same weights: the average lags behind the policy
    lag = max(float(np.abs(average[name] - single["weights"][name]).max()) for name in average)
    assert lag > 1e-5


def load_start(root: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(root / "hf" / "transformer" / "diffusion_pytorch_model.safetensors")
