"""Seconds, operations and bytes of each phase of an iteration at one layout, of its slowest rank.

Nothing overlaps but what the program overlaps by design (the streamed reference): seconds are sums of computing and
communicating at the assumed fractions of the peaks.
"""

from dataclasses import dataclass, field

from megatron_sage.config.schema import Config
from megatron_sage.planning.flops import Flops, StageFlops, Text, model_forward, stage_flops
from megatron_sage.planning.machine import Gpu
from megatron_sage.planning.memory import Memory, optimizer_bytes_per_replica, rank_memory, save_bytes
from megatron_sage.planning.sizes import Count, chunk_counts
from megatron_sage.planning.traffic import Place, Traffic, forward_only, times, update
from megatron_sage.planning.wires import Wires
from megatron_sage.planning.workload import (
    Workload,
    optimizer_traffic,
    reference_traffic,
    rollout_traffic,
    scoring_traffic,
    streamed_bytes,
    training_traffic,
)

TILES = (1 / 0.75) ** 2  # how often a pixel is decoded where tiles overlap by a quarter


@dataclass
class Phase:
    """Of the rank that takes longest (bytes and operations, too)."""

    seconds: float = 0.0
    flops: float = 0.0
    memory_bytes: float = 0.0
    memory_stage: int = 0  # the pipeline stage that needs most memory
    nvlink_bytes: float = 0.0
    network_bytes: float = 0.0
    host_bytes: float = 0.0
    disk_bytes: float = 0.0


@dataclass
class Estimate:
    """Of one layout."""

    phases: dict[str, Phase] = field(default_factory=dict)
    memory: list[Memory] = field(default_factory=list)  # of each stage
    counts: list[Count] = field(default_factory=list)
    model_flops: float = 0.0  # of an iteration, over all ranks, without anything that is computed twice
    busy: float = 1.0  # part of the slots of the rollout's pipeline with a task

    @property
    def seconds(self) -> float:
        """Of one iteration."""
        return sum(phase.seconds for phase in self.phases.values())

    @property
    def worst(self) -> tuple[int, str, float]:
        """(stage, phase, bytes) of the largest need of device memory."""
        found = [(stage, *memory.peak) for stage, memory in enumerate(self.memory)]
        return max(found, key=lambda entry: entry[2])

    @property
    def host_bytes(self) -> float:
        """Host memory of the rank that needs most."""
        return max(sum(memory.host.values()) for memory in self.memory)


def estimate(config: Config, places: list[Place], work: Workload, gpu: Gpu, wires: Wires) -> Estimate:
    """`places`: of each pipeline stage."""
    found = Estimate()
    found.memory = [rank_memory(config, place, work, gpu.assumptions) for place in places]
    found.counts = [sum(chunk_counts(p.config, p.stage, p.lora), Count()) for p in places]
    ranks = [_Rank(config, place, work, gpu, wires) for place in places]
    found.phases = {
        "rollout": _passes(ranks, chained=True),
        "decode": _slowest([rank.decode() for rank in ranks]),
        "reward": Phase(seconds=ranks[0].videos * gpu.assumptions.reward_seconds),
        "reference": _passes(ranks, chained=False) if work.references else Phase(),
        "train": _training(ranks),
        "optimizer": _slowest([rank.optimizer(count) for rank, count in zip(ranks, found.counts, strict=True)]),
        "save": _slowest([rank.save(count) for rank, count in zip(ranks, found.counts, strict=True)]),
    }
    for name, phase in found.phases.items():
        needs = [memory.of_phase(name) for memory in found.memory]
        phase.memory_bytes, phase.memory_stage = max(needs), needs.index(max(needs))
    slots, tasks = work.slots(places[0], chained=True)
    found.busy = tasks / slots
    found.model_flops = _model_flops(places[0], work)
    return found


def _model_flops(place: Place, work: Workload) -> float:
    forwards = {text: model_forward(place.config, work.video_tokens, text).total * work.batch for text in _texts(work)}
    rollout = work.flights * work.steps * sum(forwards[text] for text in work.rollout_texts)
    training = work.pairs * sum(forwards[text] for text in work.training_texts)
    backward = 1 if place.lora is not None else 2
    return place.data * (rollout + training * (len(work.references) + 1 + backward))


def _texts(work: Workload) -> set[Text]:
    return {*work.rollout_texts, *work.training_texts}


class _Rank:
    """A rank of one stage."""

    def __init__(self, config: Config, place: Place, work: Workload, gpu: Gpu, wires: Wires) -> None:
        self.config, self.place, self.work, self.gpu, self.wires = config, place, work, gpu, wires
        replica = wires.tensor * wires.context * wires.pipeline
        self.videos = -(-work.flights * work.batch // replica)  # that this rank decodes, at most

    def stage(self, text: Text, place: Place | None = None) -> StageFlops:
        return stage_flops(place or self.place, text, adapters=self.place.lora is not None)

    def computing(self, flops: Flops) -> float:
        """Seconds."""
        assumed, gpu = self.gpu.assumptions, self.gpu
        eight = self.place.config.fp8 is not None and gpu.fp8_flops
        blocks = flops.blocks / (gpu.fp8_flops if eight else gpu.bf16_flops)
        return (blocks + flops.rest / gpu.bf16_flops) / assumed.gemm_efficiency + flops.attention / (
            gpu.bf16_flops * assumed.attention_efficiency
        )

    def sending(self, traffic: Traffic) -> float:
        """Seconds."""
        inside, outside = self.wires.split(traffic)
        assumed = self.gpu.assumptions
        nvlink = inside / (self.gpu.nvlink_bandwidth * assumed.nvlink_efficiency)
        return nvlink + outside / (self.gpu.network_bandwidth * assumed.network_efficiency)

    def phase(self, seconds: float, flops: float, traffic: Traffic, host: float = 0.0, disk: float = 0.0) -> Phase:
        inside, outside = self.wires.split(traffic)
        return Phase(seconds, flops, 0.0, 0, inside, outside, host, disk)

    def task_seconds(self, texts: tuple[Text, ...]) -> float:
        """One forward without gradient, the mean over the branches."""
        chunks = len(self.place.config.stage_blocks[0])
        total = sum(
            self.computing(self.stage(text).forward) + self.sending(forward_only(self.place, text.total))
            for text in texts
        )
        return total / len(texts) / chunks

    def decode(self) -> Phase:
        video = self.config.video
        flops = self.gpu.assumptions.decode_flops_per_pixel * video.frames * video.height * video.width * self.videos
        if self.config.vae.tiling:
            flops *= TILES
        traffic = scoring_traffic(self.place, self.work)
        return self.phase(self.computing(Flops(rest=flops)) + self.sending(traffic), flops, traffic)

    def optimizer(self, count: Count) -> Phase:
        settings, work, place, gpu = self.config.optimizer, self.work, self.place, self.gpu
        assumed = gpu.assumptions
        split = place.data * place.config.context_parallel_size if place.distributed else 1
        state = optimizer_bytes_per_replica(self.config, place, count)
        moved = step_bytes(self.config, place, count)
        seconds, host, flops = moved / (gpu.memory_bandwidth * assumed.memory_efficiency), 0.0, 0.0
        if settings.offload != "none":
            part = settings.offload_fraction / split
            host += part * 8 * count.trained  # gradients there, weights back
            seconds += part * 2 * state / assumed.host_adam_bandwidth
            seconds += host / (gpu.host_bandwidth * assumed.host_efficiency)
        if settings.ema_decay is not None and settings.ema_device == "host":
            host += place.element * count.trained
            seconds += 12.0 * count.trained / assumed.host_adam_bandwidth
        if settings.name == "muon":
            # each TP rank does all: about 6 operations an element, column and iteration
            flops = 6.0 * count.matrices * wide(place) * place.config.hidden_size * settings.muon_steps
            seconds += self.computing(Flops(rest=flops))
        traffic = optimizer_traffic(place, work, settings.name == "muon")
        host = host * work.updates + work.refreshes * place.element * count.trained  # the anchor's copy is hidden
        return self.phase(seconds * work.updates + self.sending(traffic), flops * work.updates, traffic, host)

    def save(self, count: Count) -> Phase:
        training = self.config.training
        if not training.save_interval:
            return Phase()
        size = save_bytes(self.config, self.place, count)
        share = self.gpu.assumptions.disk_bandwidth / self.gpu.gpus_per_node
        seconds = 0.0 if training.async_save else size / share / training.save_interval
        return self.phase(seconds, 0.0, Traffic(), size if training.async_save else 0.0, size)


def step_bytes(config: Config, place: Place, count: Count) -> float:
    """Of device memory, read and written by one optimizer step."""
    split = place.data * place.config.context_parallel_size if place.distributed else 1
    # gradients twice for norm and check; then state and weights are read and written
    state = optimizer_bytes_per_replica(config, place, count)
    return 8.0 * count.trained + (2 * state + (4 + place.element) * count.trained) / split


def wide(place: Place) -> int:
    """TP ranks, over which a gathered matrix is whole on each."""
    return place.config.tensor_model_parallel_size


def _slowest(phases: list[Phase]) -> Phase:
    return max(phases, key=lambda phase: phase.seconds)


def _passes(ranks: list[_Rank], chained: bool) -> Phase:
    """A rollout (`chained`) or the references': slots of the plan, each as long as its slowest stage."""
    work, config = ranks[0].work, ranks[0].config
    texts = work.rollout_texts if chained else work.training_texts
    slots, _ = work.slots(ranks[0].place, chained)
    slowest = max(ranks, key=lambda rank: rank.task_seconds(texts))
    repeats = 1 if chained else len(work.references)
    forwards = work.flights * work.steps if chained else work.pairs * repeats
    steps = work.steps if chained else work.trained * repeats
    done = [
        slowest.stage(text).without_gradient(forwards, work.embedded(texts, branch, steps)).total
        for branch, text in enumerate(texts)
    ]
    host, seconds = 0.0, repeats * slots * slowest.task_seconds(texts)
    if chained:
        traffic = rollout_traffic(slowest.place, work)
    else:
        sharded = config.kl.anchor_sharded
        traffic = reference_traffic(slowest.place, work, sharded)
        if config.kl.anchor_placement == "host":
            split = slowest.place.data * slowest.wires.context if sharded else 1
            host = streamed_bytes(slowest.place, work) / split
            copying = host / (slowest.gpu.host_bandwidth * slowest.gpu.assumptions.host_efficiency)
            seconds = max(seconds, copying)  # the next block is copied while this one computes
            if sharded:
                seconds += slowest.sending(Traffic({k: v for k, v in traffic.items() if k == ("all_gather", "dp_cp")}))
    return slowest.phase(seconds, sum(done), traffic, host)


def _training(ranks: list[_Rank]) -> Phase:
    """1F1B: the forwards of an update and PP - 1 more (interleaved: 1/chunks of that), then the gradients' sums."""
    work = ranks[0].work
    stages, chunks = len(ranks), len(ranks[0].place.config.stage_blocks[0])
    found = []
    for rank in ranks:
        whole = work.replayed(rank.place)
        parts = [rank.stage(text, whole) for text in work.training_texts]
        flops = [part.forward + part.backward + part.again for part in parts]
        traffic = training_traffic(rank.place, work)
        sums = times(update(rank.place, work.pairs_of_update), work.updates)
        forwards = work.forwards_of_update * work.updates
        inner = Traffic(traffic)
        inner.subtract(sums)
        one = sum(rank.computing(f) for f in flops) + rank.sending(+inner) / max(1, forwards)
        bubbles = work.updates * (stages - 1) / chunks
        seconds = one * (forwards + bubbles) + rank.sending(sums)
        found.append(rank.phase(seconds, forwards * sum(f.total for f in flops), traffic))
    return _slowest(found)
