"""Tensors that live at once inside one block beside what autograd keeps: the largest of a few moments.

Found by listing what lives at the peak of dry runs of the full width; docs/planning.md has how near they come. `local`:
the streams between attentions; `heads`: the same tokens inside attention, this rank's heads; `inner`: inside the MLP;
`gathered`: all channels of the gathered tokens, where sequence parallelism puts the ranks' tokens together.
"""

from dataclasses import dataclass

from megatron_sage.parallel.context import ALLGATHER, ULYSSES
from megatron_sage.planning.saved import block_bytes
from megatron_sage.planning.traffic import Place


@dataclass(frozen=True)
class _Sizes:
    local: float
    heads: float
    inner: float
    gathered: float

    @classmethod
    def of(cls, place: Place, text: int) -> "_Sizes":
        config = place.config
        row = place.batch * config.hidden_size * place.element
        tokens = place.context_tokens + place.text_tokens(text)
        heads = tokens * row / config.tensor_model_parallel_size
        return cls(
            local=tokens / place.split * row,
            heads=heads,
            inner=heads * config.ffn_hidden_size / config.hidden_size,
            gathered=gathered_bytes(place, text),
        )


def gathered_bytes(place: Place, text: int) -> float:
    """Of the video's tokens (or the text's, where they are more) with all channels; 0 without sequence parallelism."""
    if place.split == 1:
        return 0.0
    tokens = max(place.context_tokens, place.text_tokens(text))
    return float(tokens * place.batch * place.config.hidden_size * place.element)


def forward_workspace(place: Place, text: int) -> float:
    """Of a forward without gradient."""
    size, config = _Sizes.of(place, text), place.config
    context = config.context_parallel_size
    single = place.element == 4
    # block's input, its sum with attention's answer, and in fp32 the norm's input, result and sum
    norm = (3 + (2 if single else 6)) * size.local
    # normed input, q, k, v fused, q and k normed, all joined, the answer; Ulysses: spread and received
    attention = 2 * size.local + 9 * size.heads
    if context > 1:
        attention += (6 if config.context_backend == ULYSSES else 2 + 4 * context) * size.heads
    # the inner tensor before and behind its bias; then behind its activation, beside the whole projection
    mlp = max(4 * size.local + 2 * size.inner, 5 * size.local + size.inner + size.gathered)
    return max(norm, attention, mlp)


def backward_workspace(place: Place, text: int) -> float:
    """Of a backward, with what is recomputed for it."""
    size, config = _Sizes.of(place, text), place.config
    single = place.element == 4
    norm = (5 if single else 14) * size.local + size.local  # the fp32 norm and its gradients, and the stream's
    mlp = size.inner + size.gathered
    again = config.recompute_granularity == "selective" and "mlp" in (config.recompute_modules or ())
    # of what is kept of the MLP, when the norm before it has its turn
    freed = 0.0 if again else 2 * size.inner + 2 * size.local
    in_block = max(mlp, norm - freed)
    context = config.context_parallel_size
    if context > 1 and config.context_backend == ALLGATHER:
        # all ranks' keys and values, as they arrive and joined, and their gradients; queries, answers and theirs
        in_block = max(in_block, (6 * context + 4) * size.heads - freed)
    if config.recompute_granularity == "full":
        # the block's input is kept already
        in_block += block_bytes(place, text, False, recomputed=False) - size.local
    elif again:
        in_block = max(in_block, size.local + 2 * size.inner + mlp)
    last = place.stage == len(config.stage_blocks) - 1
    return max(in_block, norm if last else 0.0)  # the final norm comes while everything is kept
