"""How many parameters a rank has, by the key map's shapes and cuts: nothing is built.

A model is five kinds of part: `first` (embedders of tokens and text), `block`, `last` (the last block, whose unused
text parameters are frozen), `final` (final layer) and `time` (the timestep's embedder, a copy in every chunk).
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from megatron_sage.checkpoint.keymap import KeyMap
from megatron_sage.model.config import HunyuanVideoConfig
from megatron_sage.model.lora_targets import LINEARS, AdapterSettings, linear_sizes
from megatron_sage.model.stages import LAST_STAGE, TIME_EMBEDDER

ALIGNMENT = 64  # elements: where a parameter begins in the distributed optimizer's buffer
BLOCKS = "transformer_blocks."
_UNUSED = ("ff_context.", "attn.txt_proj.", "attn.txt_q_layernorm.")


@dataclass(frozen=True)
class Count:
    """Elements of parameters."""

    elements: int = 0
    trained: int = 0
    padded: int = 0
    """Trained, each parameter filled up to `ALIGNMENT`."""
    matrices: int = 0
    """Trained matrices of blocks: Muon's."""
    norms: int = 0
    """Trained copies on every TP rank whose gradient is of this rank's heads: qk-norms."""
    local: int = 0
    """Trained copies whose gradient, with sequence parallelism, is of this rank's tokens."""
    largest: int = 0
    """The largest of Muon's matrices."""

    def __add__(self, other: "Count") -> "Count":
        return Count(
            self.elements + other.elements,
            self.trained + other.trained,
            self.padded + other.padded,
            self.matrices + other.matrices,
            self.norms + other.norms,
            self.local + other.local,
            max(self.largest, other.largest),
        )

    def times(self, number: int) -> "Count":
        """Of so many equal parts."""
        if number == 0:
            return Count()
        return Count(
            self.elements * number,
            self.trained * number,
            self.padded * number,
            self.matrices * number,
            self.norms * number,
            self.local * number,
            self.largest,
        )


def frozen(name: str, num_layers: int) -> bool:
    """Whether it is one of the last block's text parameters, which nothing reads."""
    return name.startswith(tuple(f"{BLOCKS}{num_layers - 1}.{part}" for part in _UNUSED))


def total_parameters(config: HunyuanVideoConfig) -> int:
    """Of the whole model, without adapters."""
    shapes = KeyMap.from_config(config.to_diffusers()).shapes("ours")
    return sum(prod(shape) for shape in shapes.values())


def chunk_counts(config: HunyuanVideoConfig, stage: int, lora: AdapterSettings | None = None) -> list[Count]:
    """Of each chunk of a pipeline stage, on one rank of its TP group."""
    numbers = range(len(config.stage_blocks[stage]))
    return [sum(chunk_parts(config, stage, number, lora), Count()) for number in numbers]


def chunk_parts(
    config: HunyuanVideoConfig, stage: int, chunk: int, lora: AdapterSettings | None = None
) -> tuple[Count, Count]:
    """(blocks, everything else) of one chunk of a pipeline stage, on one rank of its TP group."""
    parts = part_counts(config, lora)
    stages = config.stage_blocks
    blocks, virtual = stages[stage][chunk], chunk * len(stages) + stage
    has_last = config.num_layers - 1 in blocks
    body = parts["block"].times(len(blocks) - has_last) + (parts["last"] if has_last else Count())
    rest = parts["time"]
    if virtual == 0:
        rest += parts["first"]
    if virtual == len(stages) * len(stages[0]) - 1:
        rest += parts["final"]
    return body, rest


def part_counts(config: HunyuanVideoConfig, lora: AdapterSettings | None = None) -> dict[str, Count]:
    """Of each kind of part, on one rank of a TP group."""
    return _part_counts(json.dumps(config.to_diffusers()), config.tensor_model_parallel_size, lora)


@lru_cache(maxsize=64)
def _part_counts(transformer: str, tensor: int, lora: AdapterSettings | None) -> dict[str, Count]:
    config = json.loads(transformer)
    layers = config["num_layers"]
    parts = dict.fromkeys(("first", "block", "last", "final", "time"), Count())
    for binding in KeyMap.from_config(config).bindings:
        name = binding.ours[0]
        kind = _kind(name, layers)
        if kind is None:
            continue
        shape = binding.shape_in("ours")
        elements = prod(shape) // (tensor if binding.split_dim is not None else 1)
        trained = lora is None and not frozen(name, layers)
        matrix = name.startswith(BLOCKS) and len(shape) == 2
        count = _count(elements, trained, matrix, name)
        for _ in binding.ours:
            parts[kind] += count
    if layers == 1:
        parts["block"] = Count()
    if lora is not None:
        hidden = config["num_attention_heads"] * config["attention_head_dim"]
        for kind in ("block", "last"):
            parts[kind] += _adapters(lora, kind == "last", hidden, int(hidden * config["mlp_ratio"]), tensor)
    return parts


def _count(elements: int, trained: bool, matrix: bool, name: str) -> Count:
    if not trained:
        return Count(elements)
    padded = -(-elements // ALIGNMENT) * ALIGNMENT
    norm = "q_layernorm" in name or "k_layernorm" in name
    row_bias = name.startswith(BLOCKS) and name.endswith(("_proj.bias", "linear_fc2.bias"))
    local = row_bias or name.startswith(("x_embedder.", "proj_out."))
    return Count(
        elements,
        trained=elements,
        padded=padded,
        matrices=elements * matrix,
        norms=elements * norm,
        local=elements * (local and not norm),
        largest=elements * matrix,
    )


def _kind(name: str, layers: int) -> str | None:
    """None: a block that is like the first one."""
    if name.startswith(BLOCKS):
        index = int(name.split(".")[1])
        return "last" if index == layers - 1 else "block" if index == 0 else None
    if name.startswith(TIME_EMBEDDER):
        return "time"
    return "final" if name.startswith(LAST_STAGE) else "first"


def _adapters(lora: AdapterSettings, last: bool, hidden: int, mlp: int, tensor: int) -> Count:
    total = Count()
    for path, targets in lora.in_block(last):
        for target in targets:
            into, out = linear_sizes(target, hidden, mlp)
            rows = LINEARS[path].split == "rows"
            a, b = lora.rank * into // (1 if rows else tensor), lora.rank * out // (tensor if rows else 1)
            total += _count(a, True, False, "") + _count(b, True, False, "")
            # the modulation's input is no sequence: every rank has the whole gradient
            total += Count(local=0 if path.startswith("norm1") else a if rows else b)
    return total
