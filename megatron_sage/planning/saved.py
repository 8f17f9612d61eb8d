"""What autograd keeps on a rank between the forward and the backward of a micro-batch, by formula.

Unit: a tensor of a stream's tokens. Between attention and MLP a rank has `local` tokens of H channels (its part over
CP, and over TP with sequence parallelism); inside them the `gathered` tokens of its CP rank, H / TP channels.
docs/planning.md lists the tensors.
"""

from dataclasses import dataclass

import torch

from megatron_sage.model.config import HunyuanVideoConfig
from megatron_sage.parallel.context import ALLGATHER, ULYSSES
from megatron_sage.parallel.sequence import TokenShard
from megatron_sage.planning.traffic import Place, kinds

FP32, STATISTICS = 4, 8  # bytes; of a LayerNorm's mean and reciprocal deviation


@dataclass(frozen=True)
class _Stream:
    """Tokens of one stream (video or text) on a rank."""

    local: int
    gathered: int
    valid: int
    """Real ones among the gathered."""


def saved_by_chunks(place: Place, texts: tuple[int, ...], fused_norm: bool = True) -> list[float]:
    """Bytes that each chunk of the rank keeps of one micro-batch, all branches of the guidance (`texts`) together.

    `fused_norm`: RMSNorm keeps its input, as CUDA's kernel does; False: torch's CPU path, which keeps fp32 copies.
    """
    config = place.config
    stages, found = config.stage_blocks, []
    for number, blocks in enumerate(stages[place.stage]):
        virtual, total = number * len(stages) + place.stage, 0.0
        for text in texts:
            for last, count in kinds(config, blocks):
                total += count * block_bytes(place, text, last, fused_norm)
            video = _video(place)
            if virtual == 0:
                total += video.local * place.batch * config.in_channels * place.element
            if virtual == len(stages) * len(stages[0]) - 1:
                norm = 1 if place.element < FP32 else 2
                total += video.local * place.batch * config.hidden_size * place.element * (norm + 1)
        found.append(total)
    return found


def block_bytes(place: Place, text: int, last: bool, fused_norm: bool = True, recomputed: bool = True) -> float:
    """Of one block and one branch; `recomputed=False`: as if nothing were recomputed."""
    config = place.config
    granularity = config.recompute_granularity if recomputed else None
    video, words = _video(place), _words(place, text)
    if granularity == "full":
        return (video.local + words.local) * place.batch * config.hidden_size * place.element
    modules = set(config.recompute_modules or ()) if granularity == "selective" else set()
    total = _attention(place, video, text, last) if "core_attn" not in modules else 0.0
    for stream, cut in ((video, False), (words, last)):
        total += _stream(place, stream, cut, modules, fused_norm)
    return total


def _video(place: Place) -> _Stream:
    gathered = place.context_tokens
    multiple = place.split * place.config.fp8_alignment
    shard = TokenShard(place.video_tokens, place.config.context_parallel_size, 0, multiple)
    return _Stream(gathered // place.split, gathered, shard.valid)


def _words(place: Place, text: int) -> _Stream:
    padded = place.text_tokens(text)
    return _Stream(padded // place.split, padded, text)


def _stream(place: Place, stream: _Stream, cut: bool, modules: set[str], fused_norm: bool) -> float:
    """Outside the attention kernel; `cut`: the last block's text, of which only keys and values are made."""
    config, element = place.config, place.element
    whole = stream.local * place.batch * config.hidden_size * element
    heads = stream.gathered * place.batch * (config.hidden_size // config.tensor_model_parallel_size) * element
    single = element == FP32
    norm = whole  # its input
    if single and "layernorm" not in modules:
        norm += whole + stream.local * place.batch * STATISTICS  # and the normalised input
    total = norm + whole  # and what the projection reads
    total += _head_norms(heads, 1 if cut else 2, element, "layernorm" in modules or fused_norm)
    if cut:
        return total
    total += whole  # attention's answer, which is gated
    if "mlp" in modules:
        return total + 2 * whole
    inner = heads * config.ffn_hidden_size / config.hidden_size
    return total + norm + 2 * whole + 2 * inner


def _head_norms(heads: float, count: int, element: int, fused: bool) -> float:
    """RMSNorm of queries and keys, views of the fused projection."""
    if fused:
        return 3 * heads
    if element == FP32:
        return 3 * heads + count * heads
    return count * 2 * heads * FP32 / element


def _attention(place: Place, video: _Stream, text: int, last: bool) -> float:
    """Queries, keys, values, the answer and its statistics."""
    config, batch, element = place.config, place.batch, place.element
    tensor, context = config.tensor_model_parallel_size, config.context_parallel_size
    channels, heads = config.hidden_size // tensor, config.num_attention_heads // tensor
    asks = 0 if last else text
    if context > 1 and config.context_backend == ULYSSES:
        queries, keys = (place.video_tokens + asks) / context, (place.video_tokens + text) / context
        exchanged = video.gathered + asks
    else:
        queries, keys, exchanged = video.valid + asks, video.valid + text, 0
        if video.gathered != video.valid:
            exchanged = video.gathered  # filled up for the projection
    kept = 2 * queries + 2 * keys + exchanged
    if context > 1 and config.context_backend == ALLGATHER:
        kept += 2 * (video.gathered - video.valid)
    return batch * (kept * channels * element + queries * heads * FP32)


def in_flight(config: HunyuanVideoConfig, stage: int, forwards: int) -> list[int]:
    """Micro-batches whose forward a stage has done and whose backward it has not, at most, of each of its chunks."""
    stages, chunks = len(config.stage_blocks), len(config.stage_blocks[0])
    if chunks == 1:
        return [min(stages - stage, forwards)]
    # interleaved: forwards enter in groups of PP through chunk 0, then chunk 1, ...
    ahead = min((stages - stage - 1) * 2 + (chunks - 1) * stages + 1, forwards * chunks)
    held = [0] * chunks
    for number in range(ahead):
        held[number // stages % chunks] += 1
    return held


def latent_dtype_bytes(name: str) -> int:
    """Of `sampler.latent_dtype`."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name].itemsize
