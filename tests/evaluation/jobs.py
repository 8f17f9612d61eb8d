"""Evaluations of the random tiny world, on ranks of the tests' pool."""

import contextlib
import os
from pathlib import Path
from typing import Any

from tests.training import world

PROMPTS, SAMPLES, STEPS = 3, 3, 3


def arguments(root: Path, out: Path, checkpoints: dict[str, Path], *more: str, **changes: Any) -> list[str]:
    """The command line of `evaluate`; the second micro-batch of a prompt is smaller than the first."""
    settings = {"reward.function": "tests.training.world:BrightnessReward"} | changes
    overrides = world.overrides(world.settings(root, "evaluated", **settings))
    (root / "empty.yaml").write_text("{}\n")
    named = [text for name, path in checkpoints.items() for text in ("--checkpoint", f"{name}={path}")]
    fixed = ["--prompts", str(root / "prompts.txt"), "--samples", str(SAMPLES), "--steps", str(STEPS)]
    return [str(root / "empty.yaml"), *overrides, *fixed, *named, "--out", str(out), *more]


def evaluate_job(argv: list[str], processes: int) -> int:
    """On this rank."""
    from megatron_sage.evaluation.command import main

    with world_size(processes):
        return main(argv)


def calls_job(argv: list[str], processes: int, stop_after: int) -> int:
    """Evaluate, but fail like a full disk at the `stop_after`-th video of this rank."""
    from megatron_sage.evaluation import work

    count, write = 0, work.write_mp4

    def failing(*given: Any, **named: Any) -> Path:
        nonlocal count
        count += 1
        if count > stop_after:
            raise OSError(28, "No space left on device")
        return write(*given, **named)

    work.write_mp4 = failing
    try:
        with contextlib.suppress(OSError):
            return evaluate_job(argv, processes)
        return -1
    finally:
        work.write_mp4 = write


@contextlib.contextmanager
def world_size(processes: int) -> Any:
    """What torchrun would say to the rules."""
    before = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = str(processes)
    try:
        yield
    finally:
        del os.environ["WORLD_SIZE"]
        if before is not None:
            os.environ["WORLD_SIZE"] = before
