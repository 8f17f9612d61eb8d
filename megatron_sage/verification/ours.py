"""One forward and backward of our model on whole inputs, at any layout, results whole on every rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_sage.model.attention import TokenLayout
from megatron_sage.model.conditions import TextCondition
from megatron_sage.model.transformer import HunyuanVideoDiT
from megatron_sage.parallel.reductions import complete_gradients
from megatron_sage.parallel.sequence import gather, pad_tokens
from megatron_sage.verification.inputs import Inputs

Blocks = list[tuple[dict[int, Tensor], dict[int, Tensor]]]


@dataclass
class Result:
    """Float32, on the CPU. `blocks[i][stream][sample]`: output [valid tokens, H] of block i; stream 0 is the video.

    Blocks are on rank 0 alone, the rest on every rank.
    """

    sample: Tensor  # [B, C_out, T, H, W]
    input_gradient: Tensor | None = None  # of hidden_states; None without grad_output
    blocks: Blocks = field(default_factory=list)


@dataclass
class _MicroBatch:
    """Samples of equal text lengths. A repeated one only fills up the schedule: it counts for nothing."""

    samples: list[int]
    text: TextCondition
    repeated: bool = False


class _Verification:
    """The forward step of a verification, and what it collects on this rank."""

    def __init__(self, chunks: Sequence[HunyuanVideoDiT], inputs: Inputs) -> None:
        self.chunks, self.inputs = chunks, inputs
        self.shard = chunks[0].image_shard(inputs.grid)
        self.batches = _micro_batches(chunks[0], inputs)
        self.length = max(chunks[0].packed_tokens(batch.text, inputs.grid) for batch in self.batches)
        self.current: list[int] = []
        self.videos: list[tuple[list[int], Tensor]] = []
        self.velocities: list[tuple[list[int], Tensor]] = []

    def forward_step(self, iterator: Iterator[_MicroBatch], chunk: HunyuanVideoDiT) -> tuple[Tensor, Any]:
        inputs, batch = self.inputs, next(iterator)
        self.current = [] if batch.repeated else batch.samples
        video = packed = None
        if chunk.pre_process:
            video = self.shard.shard(_tokens(inputs.hidden_states[batch.samples]))
            video.requires_grad_(inputs.grad_output is not None)
            if not batch.repeated:
                self.videos.append((batch.samples, video))
        else:
            assert chunk.input_tensor is not None
            packed = chunk.input_tensor[: chunk.packed_tokens(batch.text, inputs.grid)]
        times = [None if t is None else t[batch.samples] for t in (inputs.timestep, inputs.timestep_r)]
        assert times[0] is not None
        out = chunk(video, times[0], batch.text, inputs.grid, times[1], packed)
        return (out if chunk.post_process else pad_tokens(out, self.length)), lambda out: self._loss(out, batch)

    def _loss(self, velocity: Tensor, batch: _MicroBatch) -> tuple[Tensor, Tensor, None]:
        """sum(velocity * grad_output) over this rank's tokens; Megatron's third value, a count, is not used."""
        count = torch.zeros((), dtype=torch.int32, device=velocity.device)
        if self.inputs.grad_output is None or batch.repeated:
            loss = velocity.sum() * 0.0
        else:
            gradient = self.shard.shard(_tokens(self.inputs.grad_output[batch.samples]))
            loss = (velocity * gradient.to(velocity.dtype)).sum()
        if not batch.repeated:
            self.velocities.append((batch.samples, velocity.detach()))
        return loss, count, None


def _micro_batches(chunk: HunyuanVideoDiT, inputs: Inputs) -> list[_MicroBatch]:
    """Under a pipeline one sample each, for a schedule wants micro-batches of one size, as many as PP divides."""
    stages = chunk.pp_group.size()
    if stages == 1:
        return [_MicroBatch(samples, text) for samples, text in inputs.micro_batches()]
    batches = [
        _MicroBatch([s], TextCondition(*(x[i : i + 1] for x in (text.qwen_BLD, text.byt5_BLD, text.image_BLD))))
        for samples, text in inputs.micro_batches()
        for i, s in enumerate(samples)
    ]
    filling = [_MicroBatch(batches[0].samples, batches[0].text, repeated=True)] * (-len(batches) % stages)
    return batches + filling


def run_ours(
    model: HunyuanVideoDiT | Sequence[HunyuanVideoDiT], inputs: Inputs, observe_blocks: bool = False
) -> Result:
    """The velocity of all samples; with `grad_output`, gradients of sum(sample * grad_output) too.

    Megatron's schedule for the layout runs the micro-batches. The parameters' gradients stay in the model, reduced:
    read them with `gather_named(model, "grad")`. They are summed over the micro-batches in float32 (`main_grad`) where
    the parameters are not.
    """
    chunks = [model] if isinstance(model, HunyuanVideoDiT) else list(model)
    config, groups, backward = chunks[0].config, chunks[0].pg_collection, inputs.grad_output is not None
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.grad, parameter.main_grad = None, None  # type: ignore[attr-defined]
    work = _Verification(chunks, inputs)
    blocks: dict[int, tuple[dict, dict]] = {}
    virtual = config.virtual_pipeline_model_parallel_size
    iterators = [iter(work.batches) for _ in chunks]
    per_token, config.calculate_per_token_loss = config.calculate_per_token_loss, True  # the loss is a plain sum
    with _observed(work, blocks if observe_blocks else None), _float32_sums(chunks):
        get_forward_backward_func(groups.pp.size(), virtual)(
            forward_step_func=work.forward_step,
            data_iterator=iterators if virtual else iterators[0],
            model=chunks,
            num_microbatches=len(work.batches),
            seq_length=work.length * groups.cp.size() * (groups.tp.size() if config.sequence_parallel else 1),
            micro_batch_size=1,
            forward_only=not backward,
        )
    config.calculate_per_token_loss = per_token
    complete_gradients(chunks, groups)
    channels, last = config.out_channels, groups.pp.size() - 1
    result = Result(_whole(work, work.velocities, channels, stage=last))
    if backward:
        gradients = [(samples, video.grad) for samples, video in work.videos if video.grad is not None]
        result.input_gradient = _whole(work, gradients, config.in_channels, stage=0)
    if observe_blocks:
        result.blocks = _blocks_of_all_stages(blocks, config.num_layers, groups.pp)
    return result


def _whole(work: _Verification, parts: list[tuple[list[int], Tensor]], channels: int, stage: int) -> Tensor:
    """The videos put together from the tokens of pipeline stage `stage`, on every rank."""
    chunk, inputs = work.chunks[0], work.inputs
    whole = torch.zeros(inputs.batch, channels, *inputs.grid, device=inputs.hidden_states.device)
    for samples, local in parts:
        whole[samples] = _video(gather(local, work.shard, chunk.token_group), inputs.grid).to(whole.device)
    if chunk.pp_group.size() > 1:
        dist.broadcast(whole, group_src=stage, group=chunk.pp_group)
    return whole.cpu()


@contextmanager
def _float32_sums(chunks: Sequence[HunyuanVideoDiT]) -> Iterator[None]:
    """Inside: gradients of parameters that are not float32 are summed over the micro-batches in float32."""

    def accumulate(parameter: Any) -> None:
        total = 0.0 if parameter.main_grad is None else parameter.main_grad
        parameter.main_grad, parameter.grad = parameter.grad.float() + total, None

    low = [p for chunk in chunks for p in chunk.parameters() if p.requires_grad and p.dtype != torch.float32]
    handles = [parameter.register_post_accumulate_grad_hook(accumulate) for parameter in low]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _observed(work: _Verification, blocks: dict[int, tuple[dict, dict]] | None) -> Iterator[None]:
    """Collects what every block of this rank hands on, whole and without padding; nothing where `blocks` is None."""

    def hook(index: int, chunk: HunyuanVideoDiT) -> Any:
        def collect(block: torch.nn.Module, arguments: tuple, outputs: tuple[Tensor, Tensor]) -> None:
            layout: TokenLayout = arguments[3]
            text_group = chunk.tp_group if chunk.config.sequence_parallel else None
            places = (layout.image, chunk.token_group), (layout.text, text_group)
            for stream, (output, (shard, group)) in enumerate(zip(outputs, places, strict=True)):
                whole = gather(output, shard, group).float().cpu()
                assert blocks is not None
                blocks.setdefault(index, ({}, {}))[stream].update({s: whole[:, i] for i, s in enumerate(work.current)})

        return collect

    handles = [
        block.register_forward_hook(hook(int(index), chunk))
        for chunk in work.chunks
        for index, block in chunk.transformer_blocks.items()
        if blocks is not None
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _blocks_of_all_stages(mine: dict[int, tuple[dict, dict]], number: int, group: dist.ProcessGroup) -> Blocks:
    """In order, on the first stage; empty elsewhere. The tensors are small: a verification's grid."""
    every: list[Any] | None = [None] * group.size() if group.rank() == 0 else None
    dist.gather_object(mine, every, group_dst=0, group=group)
    if every is None:
        return []
    together = {index: streams for stage in every for index, streams in stage.items()}
    return [together[index] for index in range(number)]


def _tokens(video_BCTHW: Tensor) -> Tensor:
    return video_BCTHW.flatten(2).permute(2, 0, 1)


def _video(tokens_SBC: Tensor, grid: tuple[int, int, int]) -> Tensor:
    return tokens_SBC.permute(1, 2, 0).unflatten(2, grid).float().cpu()
