"""From finished latents to scores: at once by a reward of this process, or part by part by a remote one.

While a remote reward scores the videos of one part of a rollout, the next part is denoised.
"""

import concurrent.futures
import math
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from megatron_sage.conditioning.codec import VideoCodec
from megatron_sage.engine import Engine
from megatron_sage.rewards.protocol import Reward
from megatron_sage.rewards.remote import Answer, RemoteReward
from megatron_sage.rollout.buffer import MicroTrajectory
from megatron_sage.rollout.sampler import final_latents
from megatron_sage.rollout.scoring import Scores, decode_share, score, shared_by_owner
from megatron_sage.rollout.transitions import StepTable

Phase = Callable[[str, int], AbstractContextManager[Any]]  # (name, ticks): what the rank does from now on
POLL_SECONDS = 0.2  # between two looks at the stop signal while an answer is waited for


class DirectScoring:
    """A reward of this process: everything is decoded and scored when the rollout has ended."""

    def __init__(self, engine: Engine, codec: VideoCodec, reward: Reward) -> None:
        self.engine, self.codec, self.reward = engine, codec, reward

    def begin(self) -> None:
        """A new iteration."""

    def send(self, table: StepTable, trajectories: list[MicroTrajectory], phase: Phase) -> None:
        """A part of the rollout has ended."""

    def collect(self, table: StepTable, trajectories: list[MicroTrajectory], phase: Phase) -> Scores:
        """Scores of all videos of the replica, the same on each of its ranks."""
        engine, network = self.engine, self.engine.network()
        prompts = _texts(trajectories)
        with phase("decode", _per_rank(prompts, engine)) as tick:
            scores = score(
                [final_latents(network, table, t) for t in trajectories],
                prompts,
                engine.shape,
                self.codec,
                self.reward,
                engine.config.video.fps,
                engine.token_group,
                engine.groups.replica,
                tick,
                engine.control,
            )
            engine.control.end_phase()
        return scores


class ScoringQueue:
    """A reward in other processes: one iteration's videos on their way. All ranks call the same methods in one order.

    Each rank decodes and sends the videos that it owns, numbered through the iteration as without parts, and keeps at
    most `reward.in_flight` parts that are not answered. No score crosses ranks until `collect`.
    """

    def __init__(self, engine: Engine, codec: VideoCodec, reward: RemoteReward) -> None:
        self.engine, self.codec, self.reward = engine, codec, reward
        self.begin()

    def begin(self) -> None:
        """A new iteration; what an earlier one left (it was dropped) is forgotten."""
        self.pending: list[tuple[list[int], Future[Answer]]] = []  # numbers of the videos, their answer
        self.broken: list[int] = []
        self.end = 0  # videos up to now

    def send(self, table: StepTable, trajectories: list[MicroTrajectory], phase: Phase) -> None:
        """Decode this rank's share of a part and submit it; waits only while too many parts are unanswered."""
        engine, network = self.engine, self.engine.network()
        with phase("reward", 1):  # before the part is decoded, not behind it: in_flight bounds what is held
            while len(open_ := self._open()) >= self.reward.settings.in_flight and self._waited(open_):
                pass
        prompts = _texts(trajectories)
        with phase("decode", _per_rank(prompts, engine)) as tick:
            share = decode_share(
                (final_latents(network, table, t) for t in trajectories),
                self.end,
                engine.shape,
                self.codec,
                engine.token_group,
                engine.groups.replica,
                tick,
                engine.control,
            )
        mine = sorted(share.videos)
        if mine and not engine.control.signal:
            videos, texts = [share.videos[j] for j in mine], [prompts[j - self.end] for j in mine]
            self.pending.append((mine, self.reward.submit(videos, texts, engine.config.video.fps)))
        self.broken += share.broken
        self.end = share.end

    def collect(self, table: StepTable, trajectories: list[MicroTrajectory], phase: Phase) -> Scores:
        """Wait for all answers; a run that is being stopped does not wait, and drops the scores."""
        with phase("reward", 1):
            while (open_ := self._open()) and self._waited(open_):
                pass
            names = self.reward.dimensions
            scores = np.zeros((len(names) + 1, self.end))  # the last row: lost
            scores[:-1, self.broken] = np.nan
            for numbers, future in self.pending:
                if future.done():
                    answer = future.result()
                    scores[:-1, numbers] = [answer.scores[name] for name in names]
                    scores[-1, numbers] = answer.lost
            self.pending = []
            total = shared_by_owner(scores, self.engine.device, self.engine.groups.replica)
            self.engine.control.end_phase()
        return Scores(dict(zip(names, total[:-1], strict=True)), {}, 0.0, 0.0, lost=total[-1])

    def _open(self) -> list[Future[Answer]]:
        return [future for _, future in self.pending if not future.done()]

    def _waited(self, futures: list[Future[Answer]]) -> bool:
        """Wait a little for one of them; False where a stop signal says that no answer is wanted any more."""
        control, seen = self.engine.control, self.reward.progress
        concurrent.futures.wait(futures, POLL_SECONDS, concurrent.futures.FIRST_COMPLETED)
        if self.reward.progress != seen:
            control.total += 1  # the watchdog sees that the server is being asked, and is not at the end of its tether
        return not control.signal


def build_scoring(engine: Engine, codec: VideoCodec, reward: Reward) -> DirectScoring | ScoringQueue:
    """By where the reward is."""
    if isinstance(reward, RemoteReward):
        return ScoringQueue(engine, codec, reward)
    return DirectScoring(engine, codec, reward)


def _texts(trajectories: list[MicroTrajectory]) -> list[str]:
    return [t.prompt.text for t in trajectories for _ in t.samples]


def _per_rank(prompts: list[str], engine: Engine) -> int:
    return math.ceil(len(prompts) / engine.groups.replica.size())
