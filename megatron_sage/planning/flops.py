"""Floating-point operations of a forward and its backward, 2 for each multiply-add, on one rank.

GEMMs are exact (tests compare with torch's FlopCounterMode); attention is analytic: 4 · queries · keys · width forward,
twice that backward for the model, 2.5 times for a fused kernel, which makes the scores once more. Norms, activations
and sums are not counted.
"""

from dataclasses import dataclass

from megatron_sage.model.config import BYT5_INNER_WIDTH, HunyuanVideoConfig
from megatron_sage.model.embeddings import SINUSOID_WIDTH
from megatron_sage.parallel.context import ULYSSES
from megatron_sage.parallel.sequence import TokenShard
from megatron_sage.planning.traffic import Place

FUSED_BACKWARD = 2.5  # of the forward: a fused attention's backward, the scores made again


@dataclass(frozen=True)
class Text:
    """Valid tokens of one branch's text."""

    qwen: int
    glyph: int = 0
    image: int = 0

    @property
    def total(self) -> int:
        """Tokens in the text stream."""
        return self.qwen + self.glyph + self.image


@dataclass(frozen=True)
class Flops:
    """By what runs them: the blocks' GEMMs over tokens (FP8 where that is on), attention, all other GEMMs."""

    blocks: float = 0.0
    attention: float = 0.0
    rest: float = 0.0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.blocks + other.blocks, self.attention + other.attention, self.rest + other.rest)

    def times(self, factor: float) -> "Flops":
        """Of so many."""
        return Flops(self.blocks * factor, self.attention * factor, self.rest * factor)

    @property
    def gemm(self) -> float:
        """All but attention."""
        return self.blocks + self.rest

    @property
    def total(self) -> float:
        """All."""
        return self.gemm + self.attention


@dataclass(frozen=True)
class StageFlops:
    """One branch of one micro-batch through the chunks of a rank."""

    forward: Flops
    backward: Flops
    """What the gradient needs; attention's scores are not counted again."""
    again: Flops
    """What the backward repeats: recomputation, and attention's scores."""
    embedding: Flops
    """Of the text, on the first chunk: the part of `forward` that passes without gradient do once for many."""

    def without_gradient(self, forwards: float, embedded: float) -> Flops:
        """Of so many forwards for which the text was embedded so many times."""
        return self.forward.times(forwards) + self.embedding.times(embedded - forwards)


def model_forward(transformer: HunyuanVideoConfig, video_tokens: int, text: Text) -> Flops:
    """One forward of one video through the whole model; no layout repeats or pads anything."""
    plain = HunyuanVideoConfig.from_diffusers(transformer.to_diffusers())
    return stage_flops(Place(plain, 0, video_tokens, 1), text).forward


def stage_flops(
    place: Place, text: Text, context_rank: int = 0, tensor_rank: int = 0, adapters: bool = False
) -> StageFlops:
    """Of a rank of `place`'s stage; of all ranks the first ones have most real tokens.

    `adapters`: the blocks' own weights are frozen, so their gradients are not computed; the adapters themselves, a
    thousandth, are not counted.
    """
    config = place.config
    forward, backward, again, embedding = Flops(), Flops(), Flops(), Flops()
    stages = config.stage_blocks
    for number, blocks in enumerate(stages[place.stage]):
        virtual = number * len(stages) + place.stage
        for index in blocks:
            block, mlp = _block(place, text, context_rank, index == config.num_layers - 1)
            forward += block
            factor = 1 if adapters else 2
            backward += Flops(block.blocks * factor, block.attention * 2, block.rest * factor)
            again += Flops(attention=block.attention * (FUSED_BACKWARD - 2))
            again += _recomputed(config, block, mlp)
        token_rank = context_rank * place.split + tensor_rank % place.split
        ends, ends_backward = _ends(place, virtual, token_rank)
        forward += ends
        if not adapters:
            backward += ends_backward
        if virtual == 0:
            embedding, embedding_backward, repeated = _embedding(place, text)
            forward += embedding
            if not adapters:
                backward += embedding_backward
                again += repeated
    return StageFlops(forward, backward, again, embedding)


def _block(place: Place, text: Text, context_rank: int, last: bool) -> tuple[Flops, float]:
    """Forward of one block, and the part of it that is the MLPs' GEMMs."""
    config, batch = place.config, place.batch
    hidden, tensor, context = config.hidden_size, config.tensor_model_parallel_size, config.context_parallel_size
    rows, words = place.context_tokens * batch, place.text_tokens(text.total) * batch
    through = 0 if last else words  # the last block's text ends behind its keys and values
    qkv = 2 * (rows + words) * hidden * 3 * hidden
    projection = 2 * (rows + through) * hidden * hidden
    mlp = 2 * (rows + through) * 2 * hidden * config.ffn_hidden_size
    modulation = 2 * 2 * place.times * hidden * 6 * hidden
    shard = TokenShard(place.video_tokens, context, context_rank, place.split * config.fp8_alignment)
    keys = place.video_tokens + text.total
    answered = 0 if last else text.total
    if context > 1 and config.context_backend == ULYSSES:
        scores = (place.video_tokens + answered) * keys / context
    else:
        scores = (shard.valid + answered) * keys
    attention = 4 * batch * scores * hidden
    found = Flops((qkv + projection + mlp) / tensor, attention / tensor, modulation / tensor)
    return found, mlp / tensor


def _recomputed(config: HunyuanVideoConfig, block: Flops, mlp: float) -> Flops:
    if config.recompute_granularity == "full":
        return block
    modules = config.recompute_modules or () if config.recompute_granularity == "selective" else ()
    return Flops(mlp if "mlp" in modules else 0, block.attention if "core_attn" in modules else 0)


def _ends(place: Place, virtual: int, token_rank: int) -> tuple[Flops, Flops]:
    """(forward, backward) of what is neither block nor text; the timestep's embedder is whole on every rank.

    Where an input wants no gradient (latents, embeddings, sinusoids) its linear's backward is one GEMM, not two.
    """
    config, hidden = place.config, place.config.hidden_size
    stages = config.stage_blocks
    sinusoid, square = 2 * place.times * SINUSOID_WIDTH * hidden, 2 * place.times * hidden * hidden
    count = 2 if config.use_meanflow else 1
    forward, backward = count * (sinusoid + square), count * (sinusoid + 2 * square)
    if virtual == 0:
        patches = 2 * (place.context_tokens // place.split * place.batch) * config.in_channels * hidden
        forward += patches
        backward += patches
    if virtual == len(stages) * len(stages[0]) - 1:
        parts = config.context_parallel_size * place.split
        valid = TokenShard(place.video_tokens, parts, token_rank, config.fp8_alignment).valid
        last = 2 * square + 2 * valid * place.batch * hidden * config.out_channels
        forward += last
        backward += 2 * last
    return Flops(0.0, 0.0, forward), Flops(0.0, 0.0, backward)


def _embedding(place: Place, text: Text) -> tuple[Flops, Flops, Flops]:
    """(forward, backward, repeated in the backward) of the text's embedders, whole on every TP and CP rank.

    One text for all samples. Behind the refiner's first attention there is a copy of it for each timestep.
    """
    config, hidden, times = place.config, place.config.hidden_size, place.times
    leaves = 2 * times * SINUSOID_WIDTH * hidden + 2 * config.text_embed_dim * hidden * (1 + text.qwen)
    copies = [1 if layer == 0 else times for layer in range(config.num_refiner_layers)]
    inner = 2 * (times + 1) * hidden**2  # second linears of timestep and mean text
    for asked in copies:  # q, k, v, out; an MLP of ratio 4; two gates
        inner += 2 * hidden**2 * (text.qwen * (4 * asked + 8 * times) + 2 * times)
    glyph = text.glyph * (config.text_embed_2_dim + BYT5_INNER_WIDTH + hidden) * BYT5_INNER_WIDTH
    image = text.image * (config.image_embed_dim + hidden) * config.image_embed_dim
    inner += 2 * (glyph + image)
    attention = sum(copies) * 4.0 * text.qwen**2 * hidden
    repeated = leaves + inner
    if text.glyph and not text.image:  # torch stops where nothing more is kept: before the glyphs' last linear
        repeated -= 2 * text.glyph * BYT5_INNER_WIDTH * hidden
    again = Flops(attention=attention * (FUSED_BACKWARD - 2))
    if config.recompute_granularity is not None:
        again += Flops(attention=attention, rest=repeated)
    return Flops(0.0, attention, leaves + inner), Flops(0.0, 2 * attention, leaves + 2 * inner), again
