"""The training path: forward and backward of (micro-batch, step) pairs through Megatron's schedule."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_sage.engine import Engine
from megatron_sage.grpo.order import batch_pairs
from megatron_sage.model.transformer import HunyuanVideoDiT
from megatron_sage.rollout.buffer import MicroTrajectory
from megatron_sage.training.loss import Objective, PairStatistics, share_statistics

Pair = tuple[int, int]  # number of the trajectory, step


class Replay:
    """Gradients of the loss over pairs of a rollout."""

    def __init__(
        self,
        engine: Engine,
        ddp: list[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        objective: Objective,
    ) -> None:
        self.engine, self.ddp, self.optimizer, self.objective = engine, ddp, optimizer, objective

    def clear(self) -> None:
        """Forget all gradients."""
        for chunk in self.ddp:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def batches(self, trajectories: Sequence[MicroTrajectory], pairs: Sequence[Pair]) -> list[list[Pair]]:
        """What goes into one forward each: pairs of one group have one text, so their lengths agree."""
        size = self.engine.config.grpo.replay_batch
        return batch_pairs(pairs, lambda pair: trajectories[pair[0]].group, size)

    def gradients(
        self, trajectories: Sequence[MicroTrajectory], pairs: Sequence[Pair], tick: Callable[[int], None]
    ) -> list[PairStatistics]:
        """Leave the gradients of one update in the buffers; statistics of its pairs, on every pipeline stage.

        `tick` is called with the number of pairs done. A batch has one noise level for each sample: every sample's
        modulation and text refinement are computed with its own timestep.
        """
        engine, groups, control = self.engine, self.engine.groups, self.engine.control
        engine.train()
        self.clear()
        network, settings = engine.training_network(), engine.model_config
        batches = self.batches(trajectories, pairs)
        # one size for all micro-batches of the update: that of its longest text and its largest batch
        length = max(network.all_packed_tokens(trajectories[number].prompt) for number, _ in pairs)
        largest = max(sum(len(trajectories[number].samples) for number, _ in batch) for batch in batches)
        table = self.objective.table

        def forward_step(
            iterator: Iterator[list[Pair]], model: DistributedDataParallel
        ) -> tuple[torch.Tensor, Callable[[torch.Tensor], object]]:
            pairs, chunk = next(iterator), model.module
            if not control.micro_step():
                return _skipped(chunk, length, largest), _no_loss
            batch = [(trajectories[number], step) for number, step in pairs]
            x_SBC = torch.cat([t.latents_SBC[i] for t, i in batch], dim=1) if chunk.pre_process else None
            sizes = [len(t.samples) for t, _ in batch]
            # one noise level a pair, embedded once for its samples; of unequal pairs one a sample
            sigmas = [table.sigmas[i] for (_, i), n in zip(batch, sizes, strict=True) for _ in range(n)]
            if len(set(sizes)) == 1:
                sigmas = sigmas[:: sizes[0]]
            sigma = sigmas[0] if len(batch) == 1 else sigmas
            prompt = batch[0][0].prompt
            out = network.train_forward(model, chunk.vp_stage, x_SBC, sigma, prompt, sum(sizes), length, largest)
            if chunk.vp_stage == network.num_chunks - 1:
                tick(len(pairs))
            return out, partial(self.objective, batch=batch)

        interleaved = settings.virtual_pipeline_model_parallel_size
        iterators = [iter(batches) for _ in self.ddp]
        found = get_forward_backward_func(groups.pp_size, interleaved)(
            forward_step_func=forward_step,
            data_iterator=iterators if interleaved else iterators[0],
            model=self.ddp,
            num_microbatches=len(batches),
            # Megatron divides by these again: what a stage sends is `length` tokens
            seq_length=length * groups.cp_size * (groups.tp_size if settings.sequence_parallel else 1),
            micro_batch_size=largest,
            forward_only=False,
        )
        control.end_phase()
        statistics = [one for batch in found for one in batch]
        statistics = share_statistics(statistics, len(pairs), groups, engine.device)
        ordered = [pair for batch in batches for pair in batch]
        by_pair = dict(zip(ordered, statistics, strict=True))
        return [by_pair[pair] for pair in pairs]


def _skipped(chunk: HunyuanVideoDiT, length: int, largest: int) -> torch.Tensor:
    """What a chunk hands on instead of its forward while a run is being stopped: zeros [length, largest, H].

    They depend on the chunk's input, so that Megatron's backward finds a gradient of it to send back; without one it
    would send nothing, and the stage before would wait for ever. On the last chunk any tensor will do.
    """
    size = (1,) if chunk.post_process else (length, largest, chunk.config.hidden_size)
    if chunk.input_tensor is None or chunk.pre_process:
        parameter = next(chunk.parameters())
        source = torch.zeros((), dtype=chunk.config.params_dtype, device=parameter.device, requires_grad=True)
    else:
        source = chunk.input_tensor.sum() * 0
    return source.new_zeros(size) + source


def _no_loss(out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[PairStatistics]]:
    """Of a skipped micro-step: see `Objective.__call__`."""
    return out.sum(), torch.zeros((), dtype=torch.int32, device=out.device), []
