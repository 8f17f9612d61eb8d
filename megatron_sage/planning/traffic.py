"""Bytes of every collective of training, as formulas (docs/traffic.md); tests count the same on running ranks.

Payloads as `parallel.traffic` defines them, of one rank, by (operation, group).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm

from megatron_sage.errors import UserError
from megatron_sage.model.config import HunyuanVideoConfig
from megatron_sage.model.lora_targets import AdapterSettings
from megatron_sage.parallel.context import ALLGATHER, ULYSSES
from megatron_sage.parallel.sequence import TokenShard
from megatron_sage.planning.sizes import chunk_counts, part_counts

Traffic = Counter[tuple[str, str]]
MASTER = 4  # bytes of a gradient element: DDP reduces in float32
SCALAR = 8  # of a loss term: float64


@dataclass(frozen=True)
class Place:
    """A rank's pipeline stage and what it works on."""

    config: HunyuanVideoConfig
    stage: int
    video_tokens: int
    batch: int
    data: int = 1
    lora: AdapterSettings | None = None
    distributed: bool = False
    """Megatron's distributed optimizer."""
    times: int = 1
    """Timesteps that are embedded, rows of every modulation: one, or one for each pair that is trained together."""

    @property
    def split(self) -> int:
        """Ranks of a TP group that split the tokens."""
        return self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1

    @property
    def element(self) -> int:
        """Bytes of an activation element."""
        return self.config.params_dtype.itemsize

    @property
    def context_tokens(self) -> int:
        """Video tokens of a CP rank, padding included: what a TP group gathers."""
        multiple = self.split * self.config.fp8_alignment
        return TokenShard(self.video_tokens, self.config.context_parallel_size, 0, multiple).local

    def text_tokens(self, text: int) -> int:
        """Text tokens of a TP group, padding included."""
        return TokenShard(text, self.split, 0, self.config.fp8_alignment).padded

    def packed_tokens(self, text: int) -> int:
        """Tokens of this rank that cross a stage boundary for one branch."""
        return (self.context_tokens + self.text_tokens(text)) // self.split


def micro_batch(place: Place, texts: Sequence[int], longest: int | None = None, loss_terms: int = 1) -> Traffic:
    """Forward and backward of one (micro-batch, step) pair.

    Args:
        texts: text tokens of each branch: one without guidance, conditional and unconditional with it.
        longest: tokens of the packed tensor, the schedule's fixed size; None: this micro-batch's own.
        loss_terms: sums over tokens that the loss takes: 1, 2 with a position KL, 3 with a closed-form step KL too.

    Raises UserError for Transformer Engine's attention, whose traffic is not ours to know.
    """
    config, total = place.config, Traffic()
    stages = config.stage_blocks
    _check_backend(config)
    chunks = stages[place.stage]
    for text in texts:
        for number, chunk in enumerate(chunks):
            for last, count in kinds(config, chunk):
                forward, backward = _block(place, text, last)
                total += times(forward + backward + _again(place, text, last, forward), count)
            total += _ends(place, text, number * len(stages) + place.stage)
    packed = longest if longest is not None else sum(place.packed_tokens(text) for text in texts)
    crossing = packed * place.batch * config.hidden_size * place.element
    boundaries = len(stages) * len(chunks) - 1
    # overlapping sends and receives of two ranks need two communicators: Megatron's second rank sends on the world
    group = "world" if len(stages) == 2 and len(chunks) > 1 and place.stage == 1 else "pp"
    for number in range(len(chunks)):
        virtual = number * len(stages) + place.stage
        total["send", group] += crossing * ((virtual < boundaries) + (virtual > 0))
    if place.stage == len(stages) - 1:
        token_group = "tp_cp" if place.split > 1 else "cp"
        if place.split * config.context_parallel_size > 1:
            total["all_reduce", token_group] += loss_terms * SCALAR * place.batch
    return _counted(total)


def forward_only(place: Place, text: int) -> Traffic:
    """One branch of a micro-batch through this rank's chunks without a gradient; what stages send is left out."""
    total = Traffic()
    _check_backend(place.config)
    for chunk in place.config.stage_blocks[place.stage]:
        for last, count in kinds(place.config, chunk):
            total += times(_block(place, text, last)[0], count)
    return _counted(total)


def parameter_gather(place: Place) -> Traffic:
    """Behind a step of the distributed optimizer: the updated weights of each chunk's buffer."""
    if not place.distributed or place.data * place.config.context_parallel_size == 1:
        return Traffic()
    return Traffic({("all_gather", "dp_cp"): place.element * sum(buffer_elements(place))})


def buffer_elements(place: Place) -> list[int]:
    """Of each chunk's gradient buffer: the distributed optimizer aligns parameters and cuts the buffer evenly."""
    counts = chunk_counts(place.config, place.stage, place.lora)
    if not place.distributed:
        return [count.trained for count in counts]
    multiple = lcm(place.data * place.config.context_parallel_size, 128)
    return [-(-count.padded // multiple) * multiple for count in counts]


def update(place: Place, pairs: int) -> Traffic:
    """What the gradients of an optimizer step add, whatever the number of its pairs, but for a row of statistics each.

    The step itself: `parameter_gather`.
    """
    config, total = place.config, Traffic()
    stages, replicas = config.stage_blocks, place.data * config.context_parallel_size
    if replicas > 1:
        operation = "reduce_scatter" if place.distributed else "all_reduce"
        total[operation, "dp_cp"] += MASTER * sum(buffer_elements(place))
        total["all_reduce", "dp_cp"] += 4  # the number of pairs, int32
    if len(stages) > 1:
        total["broadcast", "pp"] += 4 + pairs * 10 * SCALAR
    counts = chunk_counts(config, place.stage, place.lora)
    if len(stages) > 1:
        total["all_reduce", "pp"] += MASTER * part_counts(config, place.lora)["time"].trained
    if config.tensor_model_parallel_size > 1:
        copies = sum(count.norms + (count.local if config.sequence_parallel else 0) for count in counts)
        total["all_reduce", "tp"] += MASTER * copies
    return _counted(total)


def _check_backend(config: HunyuanVideoConfig) -> None:
    if config.context_parallel_size > 1 and config.context_backend not in (ULYSSES, ALLGATHER):
        raise UserError(
            f"parallel.context_backend={config.context_backend}: its traffic is unknown; choose ulysses or allgather"
        )


def kinds(config: HunyuanVideoConfig, blocks: range) -> list[tuple[bool, int]]:
    """(whether it is the last block, how many there are): all others are alike."""
    last = config.num_layers - 1 in blocks
    return [(False, len(blocks) - last), (True, int(last))]


def times(traffic: Traffic, factor: float) -> Traffic:
    """Of so many."""
    return Counter({key: round(value * factor) for key, value in traffic.items()})


def _block(place: Place, text: int, last: bool) -> tuple[Traffic, Traffic]:
    """(forward, backward) of one block and branch."""
    config, forward, backward = place.config, Traffic(), Traffic()
    row = place.batch * config.hidden_size * place.element  # one token of the micro-batch
    video, words = place.context_tokens * row, place.text_tokens(text) * row
    # what column-parallel layers take in (qkv, fc1) and row-parallel ones give out (proj, fc2)
    columns = 2 * video + (words if last else 2 * words)
    rows = 2 * video + (0 if last else 2 * words)
    modulation = 2 * 6 * place.times * config.hidden_size * place.element
    forward["all_gather", "tp"] += modulation
    if config.sequence_parallel:
        forward["all_gather", "tp"] += columns
        forward["reduce_scatter", "tp"] += rows
        # inputs once more for the weights' gradients, which frozen ones do not have
        backward["all_gather", "tp"] += rows + (columns if place.lora is None else 0)
        backward["reduce_scatter", "tp"] += columns + modulation
    else:
        forward["all_reduce", "tp"] += rows
        backward["all_reduce", "tp"] += columns
    if config.context_parallel_size > 1:
        heads = row // config.tensor_model_parallel_size
        if config.context_backend == ULYSSES:
            both = 3 * place.context_tokens * heads + (place.context_tokens + (0 if last else text)) * heads
            forward["all_to_all", "cp"] += both
            backward["all_to_all", "cp"] += both
        else:
            gathered = 2 * config.context_parallel_size * place.context_tokens * heads
            forward["all_gather", "cp"] += gathered
            backward["all_gather", "cp"] += gathered  # not kept
            backward["reduce_scatter", "cp"] += gathered
    if config.tensor_model_parallel_size == 1:
        for traffic in (forward, backward):
            for key in [key for key in traffic if key[1] == "tp"]:
                del traffic[key]
    return forward, backward


def _again(place: Place, text: int, last: bool, forward: Traffic) -> Traffic:
    """What recomputation repeats of the forward pass."""
    config, total = place.config, Traffic()
    if config.recompute_granularity == "full":
        return forward
    modules = config.recompute_modules or () if config.recompute_granularity == "selective" else ()
    if "core_attn" in modules:
        total += Counter({key: value for key, value in forward.items() if key[1] == "cp"})
    if "mlp" in modules and config.tensor_model_parallel_size > 1:
        row = place.batch * config.hidden_size * place.element
        tokens = (place.context_tokens + (0 if last else place.text_tokens(text))) * row
        if config.sequence_parallel:
            total["all_gather", "tp"] += tokens
            total["reduce_scatter", "tp"] += tokens
        else:
            total["all_reduce", "tp"] += tokens
    return total


def _ends(place: Place, text: int, virtual: int) -> Traffic:
    """Of a chunk, behind the embedders and in front of the final layer; backward alone."""
    config, total = place.config, Traffic()
    if config.tensor_model_parallel_size == 1:
        return total
    row = place.times * config.hidden_size * place.element
    if place.lora is None:
        total["all_reduce", "tp"] += row  # gradient of SiLU(temb), which all modulations read
    if config.sequence_parallel and virtual == 0:
        total["all_gather", "tp"] += place.text_tokens(text) * row
    if config.sequence_parallel and virtual == len(config.stage_blocks) * len(config.stage_blocks[0]) - 1:
        total["all_reduce", "tp"] += 2 * row  # scale and shift of the final norm
    return total


def _counted(traffic: Traffic) -> Traffic:
    return Counter({key: value for key, value in traffic.items() if value})
