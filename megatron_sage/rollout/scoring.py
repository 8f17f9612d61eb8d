"""From finished latents to rewards, the work of a model replica's videos spread over all its ranks."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from megatron_sage.conditioning.codec import NonFiniteVideoError, VideoCodec
from megatron_sage.parallel.control import Control
from megatron_sage.parallel.sequence import gather
from megatron_sage.rewards.protocol import Reward
from megatron_sage.rollout.policy import VideoShape


@dataclass(frozen=True)
class Scores:
    """Scores of all videos of a replica, the same on each of its ranks."""

    dimensions: dict[str, np.ndarray]  # name -> float64 [n]
    videos: dict[int, np.ndarray]  # this rank's decoded videos: index -> uint8 [F, H, W, 3]
    decode_seconds: float
    reward_seconds: float


def whole_latents(x_SBC: torch.Tensor, shape: VideoShape, token_group: dist.ProcessGroup | None) -> torch.Tensor:
    """Latents [B, C, T, H, W] from the shards of `token_group` (None: every rank holds all tokens)."""
    tokens = gather(x_SBC, shape.shard, token_group)
    frames, height, width = shape.grid
    return tokens.permute(1, 2, 0).reshape(tokens.shape[1], shape.channels, frames, height, width)


def score(
    latents: Sequence[torch.Tensor],
    prompts: Sequence[str],
    shape: VideoShape,
    codec: VideoCodec,
    reward: Reward,
    fps: float,
    token_group: dist.ProcessGroup | None,
    replica_group: dist.ProcessGroup,
    on_video: Callable[[], None] = lambda: None,
    control: Control | None = None,
) -> Scores:
    """Decode and score videos; `latents` are micro-batches [S, B, C] whose samples are the videos in order.

    Video j belongs to rank j modulo the size of `replica_group` (the ranks that hold one model): nobody waits while
    one rank decodes everything. Scores travel as float64 sums in which all ranks but the owner add zero.
    A run that is being stopped skips what is left, micro-batch by micro-batch: the caller drops the scores then.
    """
    begin = time.perf_counter()
    control = control or Control()
    ranks, rank = replica_group.size(), replica_group.rank()
    videos: dict[int, np.ndarray] = {}
    broken: list[int] = []
    number = 0
    for x_SBC in latents:
        if not control.micro_step():
            number += x_SBC.shape[1]
            continue
        for video in whole_latents(x_SBC, shape, token_group):
            if number % ranks == rank:
                try:
                    videos[number] = codec.decode(video)
                except NonFiniteVideoError:
                    broken.append(number)  # its reward is unknown: not a number, and counted as that
                on_video()
            number += 1
    middle = time.perf_counter()
    mine = sorted(videos)
    table = np.zeros((len(reward.dimensions), number))
    table[:, broken] = np.nan
    control.enter("reward")
    if mine and not control.signal:
        found = reward([videos[j] for j in mine], [prompts[j] for j in mine], fps)
        for row, name in enumerate(reward.dimensions):
            table[row, mine] = found[name]
    total = torch.from_numpy(table).to(latents[0].device)
    dist.all_reduce(total, op=dist.ReduceOp.SUM, group=replica_group)
    dimensions = dict(zip(reward.dimensions, total.cpu().numpy(), strict=True))
    return Scores(dimensions, videos, middle - begin, time.perf_counter() - middle)
