"""What autograd keeps on a rank between the forward and the backward of a micro-batch, by formula.

Unit: a tensor of a stream's tokens. Between attention and MLP a rank has `local` tokens of H channels (its part over
CP, and over TP with sequence parallelism); inside them the `gathered` tokens of its CP rank, H / TP channels.
docs/planning.md lists the tensors.
"""

from dataclasses import dataclass

import torch

from megatron_sage.model.config import BYT5_INNER_WIDTH, HunyuanVideoConfig
from megatron_sage.model.embeddings import SINUSOID_WIDTH
from megatron_sage.parallel.context import ULYSSES
from megatron_sage.parallel.sequence import TokenShard
from megatron_sage.planning.flops import Text
from megatron_sage.planning.traffic import Place, kinds

FP32 = 4  # bytes


@dataclass(frozen=True)
class _Stream:
    """Tokens of one stream (video or text) on a rank."""

    local: int
    gathered: int
    valid: int
    """Real ones among the gathered."""


def saved_by_chunks(place: Place, texts: tuple[Text, ...]) -> list[float]:
    """Bytes that each chunk of the rank keeps of one micro-batch, all branches of the guidance (`texts`) together.

    The texts' own embeddings, which wait on the device anyway, are not counted.
    """
    config = place.config
    stages, found = config.stage_blocks, []
    for number, blocks in enumerate(stages[place.stage]):
        virtual, total = number * len(stages) + place.stage, 0.0
        for text in texts:
            for last, count in kinds(config, blocks):
                total += count * block_bytes(place, text.total, last)
            video = _video(place)
            if virtual == 0:
                total += video.local * place.batch * config.in_channels * place.element
                total += embedder_bytes(place, text)
            if virtual == len(stages) * len(stages[0]) - 1:
                # the final norm's input, and what the projection reads
                total += video.local * place.batch * config.hidden_size * place.element * 2
        found.append(total)
    return found


def block_bytes(place: Place, text: int, last: bool, recomputed: bool = True) -> float:
    """Of one block and one branch; `recomputed=False`: as if nothing were recomputed."""
    config = place.config
    granularity = config.recompute_granularity if recomputed else None
    video, words = _video(place), _words(place, text)
    if granularity == "full":
        return (video.local + words.local) * place.batch * config.hidden_size * place.element
    modules = set(config.recompute_modules or ()) if granularity == "selective" else set()
    total = _attention(place, video, text, last) if "core_attn" not in modules else 0.0
    for stream, cut in ((video, False), (words, last)):
        total += _stream(place, stream, cut, modules)
    return total


def embedder_bytes(place: Place, text: Text) -> float:
    """Of one branch's text, between its embeddings and the first block; whole on every TP and CP rank.

    None where they are recomputed, and none with adapters, under which the embedders are frozen. One text for all
    samples; behind the refiner's first attention there is a copy of it for each timestep.
    """
    config, hidden, times = place.config, place.config.hidden_size, place.times
    if config.recompute_granularity is not None or place.lora is not None:
        return 0.0
    # the refiner's condition: sinusoid, mean text, two MLPs, and the sum; then a SiLU and two gates in each layer
    elements = times * (SINUSOID_WIDTH + 3 * hidden) + config.text_embed_dim + 2 * hidden
    elements += config.num_refiner_layers * times * 3 * hidden
    statistics = 0
    for layer in range(config.num_refiner_layers):
        copies = 1 if layer == 0 else times
        # input, norm, q, k, v, answer, projected; sum, norm, MLP of ratio 4 before and behind its SiLU, its answer
        elements += text.qwen * hidden * (7 * copies + 11 * times)
        statistics += text.qwen * copies * config.num_attention_heads
    elements += text.glyph * (config.text_embed_2_dim + 4 * BYT5_INNER_WIDTH)
    elements += text.image * (3 * config.image_embed_dim + hidden)
    return float(elements * place.element + statistics * FP32)


def _video(place: Place) -> _Stream:
    gathered = place.context_tokens
    multiple = place.split * place.config.fp8_alignment
    shard = TokenShard(place.video_tokens, place.config.context_parallel_size, 0, multiple)
    return _Stream(gathered // place.split, gathered, shard.valid)


def _words(place: Place, text: int) -> _Stream:
    padded = place.text_tokens(text)
    return _Stream(padded // place.split, padded, text)


def _stream(place: Place, stream: _Stream, cut: bool, modules: set[str]) -> float:
    """Outside the attention kernel; `cut`: the last block's text, of which only keys and values are made."""
    config, element = place.config, place.element
    whole = stream.local * place.batch * config.hidden_size * element
    heads = stream.gathered * place.batch * (config.hidden_size // config.tensor_model_parallel_size) * element
    # the block's input; what its projection reads; the projection, of which queries, keys and values are made again
    total = 2 * whole + 3 * heads
    if cut:
        return total
    total += whole  # attention's answer, which is gated
    if "mlp" in modules:
        return total
    inner = heads * config.ffn_hidden_size / config.hidden_size
    return total + 2 * whole + 2 * inner  # what the MLP reads and answers; before and behind its activation


def _attention(place: Place, video: _Stream, text: int, last: bool) -> float:
    """The kernel's answer and its statistics; what an exchange gives, in the layout in which the projection has it."""
    config, batch, element = place.config, place.batch, place.element
    tensor, context = config.tensor_model_parallel_size, config.context_parallel_size
    channels, heads = config.hidden_size // tensor, config.num_attention_heads // tensor
    asks = 0 if last else text
    if context > 1 and config.context_backend == ULYSSES:
        queries = (place.video_tokens + asks) / context
        kept = queries + video.gathered + asks
    else:
        queries = kept = float(video.valid + asks)
        if video.gathered != video.valid:
            kept += video.gathered  # filled up for the projection
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
