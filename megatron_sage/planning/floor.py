"""The least bytes that the chosen scheme of parallelism moves, and what is moved beyond them (docs/traffic.md).

Derived apart from `planning.traffic`: token counts are real numbers, so nothing is filled up, and modulation, scalars
and statistics cost nothing. Payloads as `parallel.traffic` defines them, of one rank, by (operation, group).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sage.parallel.context import ULYSSES
from megatron_sage.parallel.traffic import wire_bytes
from megatron_sage.planning.sizes import chunk_counts, chunk_parts
from megatron_sage.planning.traffic import MASTER, Place, Traffic, kinds
from megatron_sage.planning.wires import Wires
from megatron_sage.planning.workload import (
    LATENT,
    Workload,
    optimizer_traffic,
    reference_traffic,
    rollout_traffic,
    scoring_traffic,
    training_traffic,
)

PASSES = ("rollout", "reference", "train")  # phases with forwards of the model


class Unpadded(Place):
    """A place whose token counts are real numbers: what the formulas of `traffic` give where everything divides."""

    @property
    def context_tokens(self) -> float:  # type: ignore[override]
        return self.video_tokens / self.config.context_parallel_size

    def text_tokens(self, text: int) -> int:
        return text

    def packed_tokens(self, text: int) -> float:  # type: ignore[override]
        return (self.context_tokens + text) / self.split


@dataclass(frozen=True)
class Setting:
    """What of a run's settings decides the traffic, besides place and workload."""

    sharded: bool = False  # kl.anchor_sharded
    muon: bool = False
    gathers_again: bool = True  # column-parallel inputs are gathered once more for the weights' gradients


def floor_block(place: Place, text: int, last: bool, gathers_again: bool = True) -> tuple[Traffic, Traffic]:
    """(forward, backward) of one block and branch, without what recomputation repeats."""
    config, forward, backward = place.config, Traffic(), Traffic()
    tensor, context = config.tensor_model_parallel_size, config.context_parallel_size
    row = place.batch * config.hidden_size * place.element
    video, words = place.video_tokens / context * row, text * row
    through = 0 if last else words  # the last block makes keys and values of the text, nothing else
    into, out = 2 * video + words + through, 2 * video + 2 * through  # of qkv and fc1; of proj and fc2
    if tensor > 1 and config.sequence_parallel:
        forward["all_gather", "tp"] = into
        forward["reduce_scatter", "tp"] = out
        backward["all_gather", "tp"] = out + (into if gathers_again and place.lora is None else 0)
        backward["reduce_scatter", "tp"] = into
    elif tensor > 1:
        forward["all_reduce", "tp"] = out
        backward["all_reduce", "tp"] = into
    if context > 1 and config.context_backend == ULYSSES:
        heads = (4 * video + through) / tensor
        forward["all_to_all", "cp"] = backward["all_to_all", "cp"] = heads
    elif context > 1:
        heads = 2 * place.video_tokens * row / tensor
        forward["all_gather", "cp"] = backward["all_gather", "cp"] = backward["reduce_scatter", "cp"] = heads
    return forward, backward


def floor_forward(place: Place, text: int) -> Traffic:
    """One branch of a micro-batch through this rank's chunks without a gradient, with what they send on."""
    total = Traffic()
    for chunk in place.config.stage_blocks[place.stage]:
        for last, count in kinds(place.config, chunk):
            total += _scaled(floor_block(place, text, last)[0], count)
    return total + _scaled(_crossing(place, text), _boundaries(place)[0])


def floor_micro_batch(place: Place, texts: Sequence[int], gathers_again: bool = True) -> Traffic:
    """Forward and backward of one training forward, recomputation as it is configured."""
    total = Traffic()
    for text in texts:
        for chunk in place.config.stage_blocks[place.stage]:
            for last, count in kinds(place.config, chunk):
                forward, backward = floor_block(place, text, last, gathers_again)
                total += _scaled(forward + backward + _repeated(place, text, last, forward), count)
        if place.config.sequence_parallel and place.stage == 0:  # the embedders are whole on every rank
            total["all_gather", "tp"] += text * place.times * place.config.hidden_size * place.element
        total += _scaled(_crossing(place, text), sum(_boundaries(place)))
    return total


def floor_update(place: Place) -> Traffic:
    """Gradients of one update: over replicas, and of copies that saw one rank's tokens or heads only."""
    config, total = place.config, Traffic()
    counts = chunk_counts(config, place.stage, place.lora)
    if place.data * config.context_parallel_size > 1:
        operation = "reduce_scatter" if place.distributed else "all_reduce"
        total[operation, "dp_cp"] = MASTER * sum(count.trained for count in counts)
    if config.tensor_model_parallel_size > 1:
        copies = sum(count.norms + (count.local if config.sequence_parallel else 0) for count in counts)
        total["all_reduce", "tp"] = MASTER * copies
    return total


def floor_phases(place: Place, work: Workload, setting: Setting) -> dict[str, Traffic]:
    """The least of every phase of an iteration."""
    rollout, reference, train = Traffic(), Traffic(), Traffic()
    for text in work.rollout_texts:
        rollout += _scaled(floor_forward(place, text.total), work.flights * work.steps)
    stages, local = len(place.config.stage_blocks), place.video_tokens / _splits(place)
    latents = LATENT * local * work.batch * place.config.out_channels
    if stages > 1 and place.stage == stages - 1:  # to the first stage, for the next step
        rollout += _one("send", "pp", work.flights * (work.steps - 1) * latents)
    for text in work.training_texts:
        reference += _scaled(floor_forward(place, text.total), work.pairs * len(work.references))
    if setting.sharded and place.data * place.config.context_parallel_size > 1:
        reference += _one("all_gather", "dp_cp", _streamed(place, work))
    one = floor_micro_batch(work.replayed(place), [text.total for text in work.training_texts], setting.gathers_again)
    train = _scaled(one, work.pairs / work.replay) + _scaled(floor_update(place), work.updates)
    phases = {"rollout": rollout, "reference": reference, "decode": _to_decoders(place, work, latents), "train": train}
    return phases | {"optimizer": _optimizer(place, work, setting.muon)}


def moved_phases(place: Place, work: Workload, setting: Setting) -> dict[str, Traffic]:
    """What the program moves in the same phases."""
    return {
        "rollout": rollout_traffic(place, work),
        "reference": reference_traffic(place, work, setting.sharded),
        "decode": scoring_traffic(place, work),
        "train": training_traffic(place, work),
        "optimizer": optimizer_traffic(place, work, setting.muon),
    }


def excess(place: Place, work: Workload, setting: Setting, wires: Wires) -> dict[str, float]:
    """Bytes that a rank sends in an iteration beyond the floor, by reason.

    padding: tokens that fill ranks up; modulation: what all tokens of a sample share (shift, scale, gate and their
    gradient) over TP; anything else by its phase: copies, scalars, statistics, buffers' alignment.
    """
    moved, least = moved_phases(place, work, setting), floor_phases(place, work, setting)
    exact = moved_phases(Unpadded(**vars(place)), work, setting)
    found = {"padding": 0.0, "modulation": 0.0}
    for phase, traffic in moved.items():
        found["padding"] += sent(traffic, wires) - sent(exact[phase], wires)
        rest = Traffic(exact[phase])
        rest.subtract(least[phase])
        modulation = Traffic({key: n for key, n in rest.items() if key[1] == "tp" and phase in PASSES})
        found["modulation"] += sent(modulation, wires)
        found[phase] = sent(rest, wires) - sent(modulation, wires)
    return found


def sent(traffic: Traffic, wires: Wires) -> float:
    """Bytes that a rank sends at least for these payloads."""
    return sum(wire_bytes(operation, n, size(wires, operation, group)) for (operation, group), n in traffic.items())


def size(wires: Wires, operation: str, group: str) -> int:
    """Ranks of a group; Megatron's second of two interleaved stages sends on the world's communicator."""
    return wires.group("pp" if (operation, group) == ("send", "world") else group)[0]


def _repeated(place: Place, text: int, last: bool, forward: Traffic) -> Traffic:
    """What recomputation repeats."""
    config, total = place.config, Traffic()
    if config.recompute_granularity == "full":
        return forward
    modules = config.recompute_modules or () if config.recompute_granularity == "selective" else ()
    if "core_attn" in modules:
        total += Traffic({key: n for key, n in forward.items() if key[1] == "cp"})
    if "mlp" in modules and config.tensor_model_parallel_size > 1:
        tokens = place.video_tokens / config.context_parallel_size + (0 if last else text)
        operations = ("all_gather", "reduce_scatter") if config.sequence_parallel else ("all_reduce",)
        row = place.batch * config.hidden_size * place.element
        total += Traffic({(operation, "tp"): tokens * row for operation in operations})
    return total


def _splits(place: Place) -> int:
    """Ranks over which the video's tokens are split between attentions."""
    return place.config.context_parallel_size * place.split


def _crossing(place: Place, text: int) -> Traffic:
    """A branch's packed tokens of this rank."""
    tokens = place.video_tokens / _splits(place) + text / place.split
    return Traffic({("send", "pp"): tokens * place.batch * place.config.hidden_size * place.element})


def _boundaries(place: Place) -> tuple[int, int]:
    """(chunks of this rank with a chunk behind them, with one before): tokens go on, gradients go back."""
    stages = place.config.stage_blocks
    if len(stages) == 1:
        return 0, 0
    places = [number * len(stages) + place.stage for number in range(len(stages[0]))]
    return sum(n < len(stages) * len(stages[0]) - 1 for n in places), sum(n > 0 for n in places)


def _streamed(place: Place, work: Workload) -> float:
    """Sharded references: the blocks' weights for every forward (a single block stays), the rest once."""
    forwards, total = work.pairs * len(work.training_texts), 0.0
    for number, blocks in enumerate(place.config.stage_blocks[place.stage]):
        body, rest = chunk_parts(place.config, place.stage, number, place.lora)
        total += place.element * (body.trained * (forwards if len(blocks) > 1 else 1) + rest.trained)
    return total * work.streamed_references * (work.updates if work.reference_in_training else 1)


def _to_decoders(place: Place, work: Workload, latents: float) -> Traffic:
    """Each finished video once to the rank that decodes it: over the stages, then over those that split its tokens."""
    stages, total = len(place.config.stage_blocks), Traffic()
    if stages > 1 and place.stage == stages - 1:
        total += _one("send", "pp", work.flights * latents * (stages - 1) / stages)
    if _splits(place) > 1:
        total += _one("all_to_all", "tp_cp" if place.split > 1 else "cp", work.flights * latents / stages)
    return total


def _optimizer(place: Place, work: Workload, muon: bool) -> Traffic:
    """Updated weights to the replicas; Muon's directions, in fp32."""
    config, total = place.config, Traffic()
    if place.distributed and place.data * config.context_parallel_size > 1:
        trained = sum(count.trained for count in chunk_counts(config, place.stage, place.lora))
        total["all_gather", "dp_cp"] = work.updates * place.element * trained
    if muon and config.tensor_model_parallel_size > 1:
        parts = (chunk_parts(config, place.stage, n) for n in range(len(config.stage_blocks[0])))
        matrices = sum(part.matrices for pair in parts for part in pair)
        total["all_gather", "tp"] = work.updates * MASTER * matrices * config.tensor_model_parallel_size
    return total


def _one(operation: str, group: str, payload: float) -> Traffic:
    return Counter({(operation, group): payload})  # type: ignore[dict-item]


def _scaled(traffic: Traffic, factor: float) -> Traffic:
    """Not rounded: a floor is a real number."""
    return Counter({key: value * factor for key, value in traffic.items() if value * factor})  # type: ignore[misc]
