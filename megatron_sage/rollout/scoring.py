"""From finished latents to rewards, the work of a model replica's videos spread over all its ranks."""

import time
from collections.abc import Callable, Iterable, Sequence
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
    lost: np.ndarray | None = None  # float64 [n]: 1 where a remote reward gave no answer; None: it is a local one


@dataclass(frozen=True)
class Share:
    """What this rank decoded of some micro-batches."""

    videos: dict[int, np.ndarray]  # number of the video -> uint8 [F, H, W, 3]
    broken: list[int]  # numbers of videos of this rank that are not finite
    end: int  # number of the first video behind these micro-batches


def whole_latents(x_SBC: torch.Tensor, shape: VideoShape, token_group: dist.ProcessGroup | None) -> torch.Tensor:
    """Latents [B, C, T, H, W] from the shards of `token_group` (None: every rank holds all tokens)."""
    tokens = gather(x_SBC, shape.shard, token_group)
    frames, height, width = shape.grid
    return tokens.permute(1, 2, 0).reshape(tokens.shape[1], shape.channels, frames, height, width)


def decode_share(
    latents: Iterable[torch.Tensor],
    begin: int,
    shape: VideoShape,
    codec: VideoCodec,
    token_group: dist.ProcessGroup | None,
    replica_group: dist.ProcessGroup,
    on_video: Callable[[], None],
    control: Control,
) -> Share:
    """Decode this rank's videos of micro-batches [S, B, C], whose first sample is video `begin`.

    Video j belongs to rank j modulo the size of `replica_group` (the ranks that hold one model): nobody waits while
    one rank decodes everything. A run that is being stopped skips what is left, micro-batch by micro-batch.
    """
    ranks, rank = replica_group.size(), replica_group.rank()
    videos: dict[int, np.ndarray] = {}
    broken: list[int] = []
    number = begin
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
    return Share(videos, broken, number)


def shared_by_owner(table: np.ndarray, device: torch.device, replica_group: dist.ProcessGroup) -> np.ndarray:
    """[rows, n] of a replica's videos from the ranks that own them: float64 sums to which the others add zero."""
    total = torch.from_numpy(table).to(device)
    dist.all_reduce(total, op=dist.ReduceOp.SUM, group=replica_group)
    return total.cpu().numpy()


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

    Each rank decodes and scores the videos that it owns, see `decode_share`. A run that is being stopped skips what is
    left: the caller drops the scores then.
    """
    begin = time.perf_counter()
    control = control or Control()
    share = decode_share(latents, 0, shape, codec, token_group, replica_group, on_video, control)
    middle = time.perf_counter()
    mine = sorted(share.videos)
    table = np.zeros((len(reward.dimensions), share.end))
    table[:, share.broken] = np.nan
    control.enter("reward")
    if mine and not control.signal:
        found = reward([share.videos[j] for j in mine], [prompts[j] for j in mine], fps)
        for row, name in enumerate(reward.dimensions):
            table[row, mine] = found[name]
    total = shared_by_owner(table, latents[0].device, replica_group)
    dimensions = dict(zip(reward.dimensions, total, strict=True))
    return Scores(dimensions, share.videos, middle - begin, time.perf_counter() - middle)
