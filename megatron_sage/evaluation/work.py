"""Videos and scores of one checkpoint: whatever is not on the disk yet, over all ranks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_sage.conditioning.codec import NonFiniteVideoError, VideoCodec
from megatron_sage.engine import Engine, step_table
from megatron_sage.errors import UserError
from megatron_sage.evaluation.store import Key, RowLog, read_rows, video_name
from megatron_sage.parallel import noise
from megatron_sage.reporting.progress import Reporter
from megatron_sage.reporting.video import write_mp4
from megatron_sage.rewards.protocol import Reward
from megatron_sage.rollout.policy import Prompt
from megatron_sage.rollout.sampler import Flight, sample_latents
from megatron_sage.rollout.scoring import whole_latents

AT_ONCE = 2  # micro-batches on the way for each pipeline stage: fills it, and bounds what a kill loses


def missing(out: Path, name: str, prompts: int, samples: int) -> list[Key]:
    """(prompt, sample) of the videos without a row, in order."""
    done = read_rows(out, name)
    return [key for key in ((p, s) for p in range(prompts) for s in range(samples)) if key not in done]


def micro_batches(todo: Sequence[Key], samples: int, micro_batch: int) -> list[tuple[int, list[int]]]:
    """(prompt, its samples) of every micro-batch of the whole evaluation in which something is to do.

    The cut never depends on what is finished: the batch that a video is in decides over its last bits, and a resumed
    evaluation must have the same.
    """
    wanted = set(todo)
    found = []
    for prompt in sorted({prompt for prompt, _ in todo}):
        for start in range(0, samples, micro_batch):
            some = list(range(start, min(start + micro_batch, samples)))
            if any((prompt, sample) in wanted for sample in some):
                found.append((prompt, some))
    return found


def make_videos(
    label: str,
    todo: Sequence[Key],
    engine: Engine,
    prompts: Sequence[Prompt],
    codec: VideoCodec,
    reward: Reward,
    out: Path,
    scale: int,
    reporter: Reporter,
) -> None:
    """Sample by the ODE, decode, score and write what is in `todo`, the same list on all ranks. All ranks call.

    Noise is a function of (seed, prompt number, sample): the same for every checkpoint, at every layout, and never
    that of training. Micro-batches are spread over the replicas, decoding and scoring over a replica's ranks. Each
    video is scored alone, for the same reason as in `micro_batches`.
    """
    config, groups = engine.config, engine.groups
    settings, sampler = config.evaluation, config.sampler
    table, _ = step_table("ode", settings.num_steps, sampler.shift, sampler.eta)
    batches = micro_batches(todo, settings.samples_per_prompt, sampler.micro_batch)[groups.dp_rank :: groups.dp_size]
    flights = [Flight(prompt, some, prompts[prompt]) for prompt, some in batches]
    wanted, replica, at_once = set(todo), groups.replica, AT_ONCE * groups.pp_size
    engine.eval()
    log, turn = RowLog(out, label, groups.rank), 0
    with reporter.bar(label, len(flights) * settings.num_steps) as tick:
        for start in range(0, len(flights), at_once):
            some = flights[start : start + at_once]
            network = engine.network()
            found = sample_latents(network, table, some, seed=config.seed, stream=noise.EVALUATION, on_step=tick)
            for flight, x_SBC in zip(some, found, strict=True):
                latents = whole_latents(x_SBC, engine.shape, engine.token_group)  # a collective: on every rank
                for sample, latent in zip(flight.samples, latents, strict=True):
                    key = (flight.group, sample)
                    if key not in wanted:
                        continue
                    if turn % replica.size() == replica.rank():
                        _finish(label, key, latent, flight.prompt.text, codec, reward, config.video.fps, out, scale, log)
                    turn += 1
    log.close()
    dist.barrier(group=dist.group.WORLD)  # every row is on the disk


def _finish(
    label: str,
    key: Key,
    latent: Any,
    text: str,
    codec: VideoCodec,
    reward: Reward,
    fps: float,
    out: Path,
    scale: int,
    log: RowLog,
) -> None:
    """Decode, score, write and note one video [C, T, h, w]; one that is not finite has no file and no scores."""
    try:
        video = codec.decode(latent)
    except NonFiniteVideoError:
        log.append(key, dict.fromkeys(reward.dimensions, float("nan")), None, out)
        return
    found = reward([video], [text], fps)
    scores = {}
    for name in reward.dimensions:
        value = np.asarray(found.get(name, ()), np.float64)
        if value.shape != (1,):
            raise UserError(f"reward: {name} of one video has the shape {list(value.shape)}, expected [1]")
        scores[name] = float(value[0])
    log.append(key, scores, write_mp4(out / video_name(label, key), video, fps, scale=scale), out)
