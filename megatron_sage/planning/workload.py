"""What one iteration does on a rank: how many forwards of what size in which phase, and the bytes that it moves."""

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from megatron_sage.config.schema import Config, position_references
from megatron_sage.grpo.schedule import shifted_sigmas
from megatron_sage.grpo.sde import step_coefficients
from megatron_sage.grpo.trust_region import term_weights
from megatron_sage.parallel.pipeline import plan_slots
from megatron_sage.parallel.sequence import TokenShard
from megatron_sage.planning.flops import Text
from megatron_sage.planning.sizes import chunk_parts, part_counts
from megatron_sage.planning.traffic import (
    SCALAR,
    Place,
    Traffic,
    forward_only,
    micro_batch,
    parameter_gather,
    times,
    update,
)

LATENT, REWARDS = 4, 3  # bytes of a latent on its way; dimensions of the reward (VideoAlign: VQ, MQ, TA)
TEMPORAL, SPATIAL = 4, 16  # compression of the HunyuanVideo-1.5 VAE


@dataclass(frozen=True)
class Workload:
    """One iteration of one model replica."""

    grid: tuple[int, int, int]
    groups: int  # prompts
    flights: int  # micro-batches of the rollout
    batch: int  # samples of each
    steps: int
    trained: int  # steps with a log-probability
    kept: int  # latents of a trajectory that are kept
    rollout_texts: tuple[Text, ...]  # of each branch
    training_texts: tuple[Text, ...]
    updates: int
    replay: int  # pairs of one training forward
    references: tuple[str, ...]  # "fixed", "moving"
    adapters_off: bool  # LoRA: the fixed reference is the frozen model itself
    keeps_velocity: bool
    loss_terms: int
    reference_in_training: bool
    anchor_interval: int
    prompts: int  # whose embeddings wait on the device: all of the run

    @classmethod
    def of(cls, config: Config, data: int, conditional: Text, unconditional: Text) -> "Workload":
        """`data`: model replicas. Every prompt has the same number of text tokens."""
        sampler, kl, video, grpo = config.sampler, config.kl, config.video, config.grpo
        noisy, trained = _noisy_steps(sampler.sde_type, sampler.num_steps, sampler.shift, sampler.eta), 0
        trained = noisy if sampler.sde_window.size is None else sampler.sde_window.size
        both = (conditional, unconditional) if sampler.guidance_scale != 1 else (conditional,)
        _, velocity_weight = term_weights(kl.strategy, kl.position_weight, kl.velocity_weight)
        references = tuple(position_references(kl).values())
        closed = velocity_weight > 0 and kl.step_kl == "closed_form"
        position_weight, _ = term_weights(kl.strategy, kl.position_weight, kl.velocity_weight)
        return cls(
            grid=((video.frames - 1) // TEMPORAL + 1, video.height // SPATIAL, video.width // SPATIAL),
            groups=grpo.prompts_per_iteration // data,
            flights=grpo.prompts_per_iteration // data * grpo.group_size // sampler.micro_batch,
            batch=sampler.micro_batch,
            steps=sampler.num_steps,
            trained=trained,
            kept=len({sampler.num_steps} | {j for i in range(trained) for j in (i, i + 1)}),
            rollout_texts=both if grpo.cfg_in_training != "off" else both[:1],
            training_texts=both if grpo.cfg_in_training == "on" else both[:1],
            updates=grpo.updates_per_rollout,
            replay=grpo.replay_batch,
            references=references,
            adapters_off=config.lora.rank is not None,
            keeps_velocity=closed,
            loss_terms=1 + (position_weight > 0) + closed + ("initial" in position_references(kl)),
            reference_in_training=kl.phase == "training",
            anchor_interval=kl.anchor_interval,
            prompts=_prompts(config),
        )

    @property
    def video_tokens(self) -> int:
        """Of one video."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def pairs(self) -> int:
        """(micro-batch, trained step) pairs of an iteration."""
        return self.flights * self.trained

    @property
    def pairs_of_update(self) -> int:
        """The most that one update has."""
        return -(-self.pairs // self.updates)

    def embedded(self, texts: tuple[Text, ...], branch: int, steps: int) -> int:
        """How often a pass without gradient embeds a branch's text: once a step for each, and one negative for all."""
        shared = branch > 0 and not texts[branch].image  # an image's tokens are part of the negative's text
        return steps * (1 if shared else self.groups)

    @property
    def forwards_of_update(self) -> int:
        """Training forwards of one update; with `replay` pairs of one prompt each, as far as they go."""
        return -(-self.pairs_of_update // self.replay)

    @property
    def streamed_references(self) -> int:
        """References whose weights are not the policy's own."""
        return sum(1 for kind in self.references if not (kind == "fixed" and self.adapters_off))

    @property
    def refreshes(self) -> float:
        """Of the moving anchor, in one iteration."""
        return self.updates / self.anchor_interval if "moving" in self.references else 0.0

    def local_tokens(self, place: Place) -> int:
        """Video tokens of a rank between attentions, padding included."""
        parts = place.config.context_parallel_size * place.split
        return TokenShard(self.video_tokens, parts, 0, place.config.fp8_alignment).local

    def replayed(self, place: Place) -> Place:
        """With the batch of a training forward."""
        return replace(place, batch=place.batch * self.replay, times=self.replay)

    def latent_bytes(self, place: Place) -> int:
        """Of one micro-batch on a rank, float32."""
        return LATENT * self.local_tokens(place) * self.batch * place.config.out_channels

    def slots(self, place: Place, chained: bool) -> tuple[int, int]:
        """(slots of the pipeline's plan, tasks of a stage among them) of a rollout or a reference pass."""
        stages, chunks = len(place.config.stage_blocks), len(place.config.stage_blocks[0])
        flights, steps = (self.flights, self.steps) if chained else (self.pairs, 1)
        branches = len(self.rollout_texts if chained else self.training_texts)
        return _plan_length(flights, steps, branches, stages, chunks, chained), flights * steps * branches * chunks


def _prompts(config: Config) -> int:
    """Lines of the prompt files where they are at hand, else what one iteration takes."""
    files = [Path(name) for name in (config.data.prompts, config.evaluation.prompts) if name]
    lines = sum(path.read_bytes().count(b"\n") for path in files if path.suffix != ".parquet" and path.is_file())
    return max(lines, config.grpo.prompts_per_iteration)


@lru_cache(maxsize=1024)
def _plan_length(flights: int, steps: int, branches: int, stages: int, chunks: int, chained: bool) -> int:
    if not chained and chunks == 1:
        return flights * branches + stages - 1
    return len(plan_slots(flights, steps, branches, stages, chunks, chained))


@lru_cache(maxsize=8)
def _noisy_steps(sde_type: str, steps: int, shift: float, eta: float) -> int:
    return int((step_coefficients(sde_type, shifted_sigmas(steps, shift), eta).std > 0).sum())


def rollout_traffic(place: Place, work: Workload) -> Traffic:
    """Denoising all micro-batches of a replica."""
    total = _passes(place, work, work.rollout_texts, work.flights * work.steps)
    stages = len(place.config.stage_blocks)
    ends = place.stage == stages - 1
    if ends and _token_group(place):
        total["all_reduce", _token_group(place)] += work.pairs * SCALAR * work.batch
    if stages > 1:
        total["broadcast", "pp"] += work.pairs * SCALAR * work.batch
        total["all_reduce", "pp"] += 2 * SCALAR  # how busy the pipeline was
        if ends:  # a flight's next latents, to the first stage
            total["send", "pp"] += work.flights * (work.steps - 1) * work.latent_bytes(place)
    return total


def reference_traffic(place: Place, work: Workload, sharded: bool) -> Traffic:
    """Velocities of all references at all pairs."""
    total = Traffic()
    for _ in work.references:
        total += _passes(place, work, work.training_texts, work.pairs)
    if sharded and place.data * place.config.context_parallel_size > 1:
        total["all_gather", "dp_cp"] += streamed_bytes(place, work)
    return total


def streamed_bytes(place: Place, work: Workload) -> int:
    """Weights of references that pass through the device's slots: every block for every forward, the rest once."""
    forwards = work.pairs * len(work.training_texts)
    total = 0
    if sum(len(blocks) for blocks in place.config.stage_blocks[place.stage]) > 1:
        total = place.element * part_counts(place.config, place.lora)["block"].trained  # fetched at the end, in vain
    for number, blocks in enumerate(place.config.stage_blocks[place.stage]):
        body, rest = chunk_parts(place.config, place.stage, number, place.lora)
        # a single block stays in its slot
        total += place.element * (body.trained * (forwards if len(blocks) > 1 else 1) + rest.trained)
    return total * work.streamed_references * (work.updates if work.reference_in_training else 1)


def scoring_traffic(place: Place, work: Workload) -> Traffic:
    """Finished latents to the ranks that decode them, and their scores."""
    total, stages = Traffic(), len(place.config.stage_blocks)
    tensor, context = place.config.tensor_model_parallel_size, place.config.context_parallel_size
    latents = work.flights * work.latent_bytes(place)
    if stages > 1:
        total["broadcast", "pp"] += latents
    if group := _token_group(place):
        total["all_gather", group] += latents * (place.split * context)
    videos = work.flights * work.batch
    if tensor * context * stages > 1:
        total["all_reduce", "replica"] += SCALAR * REWARDS * videos
    if place.data > 1:
        total["all_gather", "dp"] += SCALAR * (1 + REWARDS) * videos * place.data
        total["all_reduce", "dp"] += 3 * SCALAR
    return total


def training_traffic(place: Place, work: Workload) -> Traffic:
    """Forward and backward of all pairs, and the sums of the gradients, in all updates."""
    whole = work.replayed(place)
    texts = [text.total for text in work.training_texts]
    one = micro_batch(whole, texts, loss_terms=work.loss_terms)
    total = Traffic()
    for number in range(work.updates):
        pairs = (number + 1) * work.pairs // work.updates - number * work.pairs // work.updates
        total += times(one, pairs / work.replay) + update(place, pairs)
    return total


def optimizer_traffic(place: Place, work: Workload, muon: bool) -> Traffic:
    """Statistics, norm, weights; whether the anchors' copies are right."""
    tensor, stages, context = (
        place.config.tensor_model_parallel_size,
        len(place.config.stage_blocks),
        place.config.context_parallel_size,
    )
    total = times(parameter_gather(place), work.updates)
    if place.data > 1:
        total["all_reduce", "dp"] += work.updates * 7 * SCALAR + (8 + 3) * SCALAR
    if muon and tensor > 1:  # Muon gathers the direction of what is split, in fp32
        split = sum(sum(p.matrices for p in chunk_parts(place.config, place.stage, n)) for n in _chunks(place))
        total["all_gather", "tp"] += work.updates * 4 * split * tensor
    every = place.data * tensor * stages * context
    ranks, group = (every, "dist_opt") if place.distributed else (tensor * stages, "mp")
    if ranks > 1:
        total["all_reduce", group] += work.updates * SCALAR  # the gradient's norm
    if every > 1:
        total["all_reduce", "world"] += 4 * work.updates
    return total


def _chunks(place: Place) -> range:
    return range(len(place.config.stage_blocks[0]))


def _passes(place: Place, work: Workload, texts: tuple[Text, ...], forwards: int) -> Traffic:
    """So many forwards of each branch without gradient, with what they send to the next stage."""
    total, stages = Traffic(), place.config.stage_blocks
    boundaries = len(stages) * len(stages[0]) - 1
    for text in texts:
        one = forward_only(place, text.total)
        packed = place.packed_tokens(text.total) * place.batch * place.config.hidden_size * place.element
        sends = sum(number * len(stages) + place.stage < boundaries for number in range(len(stages[0])))
        if sends:
            one["send", "pp"] += sends * packed
        total += times(one, forwards)
    return total


def _token_group(place: Place) -> str:
    """Over which video tokens are split; empty: no other rank has any."""
    if place.split > 1:
        return "tp_cp"
    return "cp" if place.config.context_parallel_size > 1 else ""
