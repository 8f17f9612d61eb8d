"""How much faster K (micro-batch, step) pairs in one training forward are than one after the other, and how equal.

python benchmarks/batched_replay.py [--repeats 5] [--out benchmarks/batched_replay.json]

The tiny world's checkpoint, one process, one thread; the same pairs for every K, all K in turn within each repeat, so
that a noisy machine slows all of them alike. The ratio is the median over the repeats of (seconds at K = 1 / at K).
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the Trainer is put together by the tests' helper
SIZES = (1, 2, 4, 8)


def trainer(frames: int, micro_batch: int, folder: Path) -> Any:
    """A Trainer on the tiny world with one group rolled out and scored."""
    from tests.parallel.iterations import prepare

    arguments = [
        f"model.pretrained={ROOT / 'examples/tiny_world/model'}",
        f"model.weights={folder / 'megatron'}",
        f"data.prompts={ROOT / 'examples/tiny_world/prompts_train.txt'}",
        f"output_dir={folder / 'run'}",
        "precision.dtype=fp32",
        f"video.frames={frames}",
        "video.height=32",
        "video.width=48",
        "sampler.num_steps=8",
        "sampler.shift=3",
        "sampler.guidance_scale=1",
        f"sampler.micro_batch={micro_batch}",
        "grpo.group_size=4",
        "kl.strategy=none",
    ]
    return prepare(arguments, 1)


def measure(frames: int, micro_batch: int, repeats: int, folder: Path) -> dict[str, Any]:
    """Seconds for all pairs of one group at each K, and the gradient's distance from K = 1.

    The distance over the whole gradient's norm, and over the mean norm of a single pair's: advantages of a group
    cancel, so the sum is smaller than its parts, whose rounding it keeps.
    """
    run = trainer(frames, micro_batch, folder)
    trajectories, _ = run._roll_out()
    rewards, row, _ = run._score(trajectories)
    run._assign_advantages(trajectories, rewards, row)
    pairs = [(number, step) for number in range(len(trajectories)) for step in run.table.trained_steps]
    seconds: dict[int, list[float]] = {size: [] for size in SIZES}
    gradients: dict[int, torch.Tensor] = {}
    for repeat in range(repeats + 1):
        for size in SIZES:
            run.engine.config.grpo.replay_batch = size
            begin = time.perf_counter()
            run.replay.gradients(trajectories, pairs, lambda count: None)
            if repeat:  # the first one warms up
                seconds[size].append(time.perf_counter() - begin)
            else:
                gradients[size] = _gradient(run)
    run.engine.config.grpo.replay_batch = 1
    norms = []
    for pair in pairs:
        run.replay.gradients(trajectories, [pair], lambda count: None)
        norms.append(float(_gradient(run).norm()))
    whole, of_pair = gradients[1].norm(), statistics.fmean(norms)
    return {
        "frames": frames,
        "video_tokens": run.engine.shape.shard.num_tokens,
        "micro_batch": micro_batch,
        "pairs": len(pairs),
        "seconds": {size: statistics.median(values) for size, values in seconds.items()},
        "speedup": {
            size: statistics.median(one / many for one, many in zip(seconds[1], values, strict=True))
            for size, values in seconds.items()
        },
        "gradient_error": {size: float((value - gradients[1]).norm() / whole) for size, value in gradients.items()},
        "error_of_a_pair": {size: float((value - gradients[1]).norm() / of_pair) for size, value in gradients.items()},
    }


def _gradient(run: Any) -> torch.Tensor:
    parameters = [p for chunk in run.engine.chunks for p in chunk.parameters() if p.requires_grad]
    return torch.cat([p.main_grad.flatten().double() for p in parameters])


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    """All sizes; JSON and a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "batched_replay.json"))
    options = parser.parse_args()
    from megatron_sage.checkpoint.convert import hf_to_megatron

    found = []
    with tempfile.TemporaryDirectory() as folder:
        hf_to_megatron(ROOT / "examples/tiny_world/model", Path(folder) / "megatron")
        for frames, micro_batch in ((21, 1), (21, 4), (81, 1), (81, 4)):
            found.append(measure(frames, micro_batch, options.repeats, Path(folder)))
            print(json.dumps(found[-1]), flush=True)
    content = {
        "date": str(date.today()),
        "machine": f"{_cpu()}, one thread, no GPU",
        "torch": torch.__version__,
        "repeats": options.repeats,
        "results": found,
    }
    Path(options.out).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
