"""Videos and scores of one checkpoint: whatever is not on the disk yet, over all ranks."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
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


class Studio:
    """Everything that turns a prompt into a scored file; the weights are those that the engine holds."""

    def __init__(
        self, engine: Engine, codec: VideoCodec, reward: Reward, out: Path, scale: int, reporter: Reporter
    ) -> None:
        """`scale`: pixels of a written clip for each of the model's."""
        self.engine, self.codec, self.reward = engine, codec, reward
        self.out, self.scale, self.reporter = out, scale, reporter

    def make(self, label: str, todo: Sequence[Key], prompts: Sequence[Prompt]) -> None:
        """Sample by the ODE, decode, score and write what is in `todo`, the same list on all ranks. All ranks call.

        Noise is a function of (seed, prompt number, sample): the same for every checkpoint, at every layout, and never
        that of training. Micro-batches are spread over the replicas, decoding and scoring over a replica's ranks.
        """
        engine = self.engine
        config, groups, replica = engine.config, engine.groups, engine.groups.replica
        settings, sampler, wanted = config.evaluation, config.sampler, set(todo)
        table, _ = step_table("ode", settings.num_steps, sampler.shift, sampler.eta)
        batches = micro_batches(todo, settings.samples_per_prompt, sampler.micro_batch)
        mine = batches[groups.dp_rank :: groups.dp_size]
        flights = [Flight(prompt, some, prompts[prompt]) for prompt, some in mine]
        at_once = max(AT_ONCE * groups.pp_size, replica.size() // sampler.micro_batch)
        engine.eval()
        log = RowLog(self.out, label, groups.rank)
        with self.reporter.bar(label, len(flights) * settings.num_steps) as tick:
            for start in range(0, len(flights), at_once):
                some = flights[start : start + at_once]
                network = engine.network()
                found = sample_latents(network, table, some, seed=config.seed, stream=noise.EVALUATION, on_step=tick)
                # All are put together first, a collective: then no rank waits while another decodes.
                whole = [whole_latents(x_SBC, engine.shape, engine.token_group) for x_SBC in found]
                videos = [
                    ((flight.group, sample), flight.prompt.text, latent)
                    for flight, latents in zip(some, whole, strict=True)
                    for sample, latent in zip(flight.samples, latents, strict=True)
                    if (flight.group, sample) in wanted
                ]
                for key, text, latent in videos[replica.rank() :: replica.size()]:
                    self._finish(label, key, text, latent, log)
        log.close()
        dist.barrier(group=dist.group.WORLD)  # every row is on the disk

    def _finish(self, label: str, key: Key, text: str, latent: torch.Tensor, log: RowLog) -> None:
        """Decode, score, write and note one video [C, T, h, w]; one that is not finite has no file and no scores.

        It is scored alone: a resumed evaluation must have the same bits, and a reward's may depend on the batch.
        """
        fps, names = self.engine.config.video.fps, self.reward.dimensions
        try:
            video = self.codec.decode(latent)
        except NonFiniteVideoError:
            log.append(key, dict.fromkeys(names, float("nan")), None, self.out)
            return
        found = self.reward([video], [text], fps)
        scores = {}
        for name in names:
            value = np.asarray(found.get(name, ()), np.float64)
            if value.shape != (1,):
                raise UserError(f"reward: {name} of one video has the shape {list(value.shape)}, expected [1]")
            scores[name] = float(value[0])
        log.append(key, scores, write_mp4(self.out / video_name(label, key), video, fps, scale=self.scale), self.out)
