"""A reference's weights: a copy of the policy, now and then refreshed, that the position KL is measured against.

Each rank keeps only its own shard (TP and PP) of what is trained, in host memory (pinned where there is a GPU), by
option cut further over the DP x CP ranks that hold the same shard. To use it the blocks are streamed through two slots
on the device; to refresh it the shard is copied to the host beside the next rollout. Nothing is gathered for that.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate

from megatron_sage.errors import UserError
from megatron_sage.model.lora import adapters_off
from megatron_sage.model.lora_targets import is_adapter
from megatron_sage.model.transformer import HunyuanVideoDiT
from megatron_sage.parallel.groups import Groups
from megatron_sage.parallel.streaming import Stream, Unit, bit_sum, swapped

_MODULUS = 2**63


class Anchor:
    """This rank's shard of the reference's weights, for all chunks of its pipeline stage.

    Frozen parameters are the policy's for ever: they are neither kept nor swapped.
    """

    def __init__(
        self, chunks: Sequence[HunyuanVideoDiT], groups: Groups, on_device: bool = False, sharded: bool = False
    ) -> None:
        """A copy of the present weights.

        Args:
            on_device: keep the shard whole on the device: a second model there, and nothing to wait for.
            sharded: cut it over the DP x CP ranks that hold the same parameters; they must use it together.
        """
        self.chunks, self.groups, self.on_device, self.sharded = chunks, groups, on_device, sharded
        group = groups.collection.dp_cp if sharded else None
        blocks, rest = _split(chunks)
        self._rest = Unit(rest, group, on_device)
        self._blocks = [[(block, Unit(named, group, on_device)) for block, named in chunk] for chunk in blocks]
        self._side = torch.cuda.Stream(device=self._device)
        self._worker = ThreadPoolExecutor(1, "anchor")
        self._pending: tuple[torch.Tensor, Future[int]] | None = None  # sums of the policy, and of its copy
        self.checksum = 0  # of the last complete copy
        self.refresh()
        self.finish()

    @property
    def _device(self) -> torch.device:
        return next(self.chunks[0].parameters()).device

    @property
    def _units(self) -> list[Unit]:
        return [self._rest, *(unit for blocks in self._blocks for _, unit in blocks)]

    @property
    def kept_bytes(self) -> int:
        """That wait on this rank."""
        return sum(unit.kept.nbytes for unit in self._units)

    def refresh(self) -> None:
        """Begin to copy the policy's present weights. They must not change before `finish`."""
        self.finish()
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            sums = self._sums()
            for unit in self._units:
                unit.store()
            copied = torch.cuda.Event()
            copied.record(self._side)
        self._pending = sums, self._worker.submit(self._kept_sum, copied)

    def finish(self) -> None:
        """Wait for the copy. All ranks call; UserError where replicas, or a copy and its original, differ."""
        if self._pending is None:
            return
        sums, kept = self._pending
        self._pending = None
        self.checksum = self._agree(sums, kept.result())

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside the block the chunks' forwards use the anchor's weights; no gradient may be taken there.

        Policy tensors are put aside by reference and put back, not copied: they come back bit for bit, and the
        optimizer and the gradient buffers never notice. Outside the blocks' forwards their parameters stay the
        policy's.
        """
        self.finish()
        if self.on_device:
            with swapped([(unit, unit.kept) for unit in self._units]):
                yield
            return
        rest = torch.empty(self._rest.bytes, dtype=torch.uint8, device=self._device)
        self._rest.load(rest)
        stream = Stream(self._blocks, self._device)
        try:
            with swapped([(self._rest, rest)]):
                yield
        finally:
            stream.close()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """ "chunk.parameter" -> tensor: views of the shard itself; gathered where it is cut (all ranks call)."""
        self.finish()
        state: dict[str, torch.Tensor] = {}
        for unit in self._units:
            buffer = unit.kept
            if unit.group is not None:
                buffer = torch.empty(unit.bytes, dtype=torch.uint8, device=self._device)
                unit.load(buffer)
                buffer = buffer.cpu()
            names = [place.name for place in unit.places]
            state |= dict(zip(names, unit.views(buffer), strict=True))
        return state

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take over weights of the same names and shapes. All ranks call."""
        self.finish()
        names = {place.name for unit in self._units for place in unit.places}
        if missing := names ^ state.keys():
            raise ValueError(f"anchor: parameters {sorted(missing)[:3]} are not in both the checkpoint and the model")
        for unit in self._units:
            unit.store(state)
        self.checksum = self._agree(self._sums(state), self._kept_sum(None))

    def _sums(self, state: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
        places = [place for unit in self._units for place in unit.places]
        tensors = [p.parameter.data if state is None else state[p.name] for p in places]
        return parameter_sums([p.parameter for p in places], tensors, self.groups, self._device)

    def _kept_sum(self, copied: torch.cuda.Event | None) -> int:
        if copied is not None:
            copied.synchronize()
        return sum(unit.bits() for unit in self._units)

    def _agree(self, sums: torch.Tensor, kept: int) -> int:
        """The checksum; a copy, or the sum of its slices over DP x CP, must have the sum of its original."""
        same = self.groups.collection.dp_cp
        copy = torch.tensor([kept], dtype=torch.int64, device=sums.device)
        if self.sharded:
            dist.all_reduce(copy, op=dist.ReduceOp.SUM, group=same)
        checksum = agreed_checksum(sums, self.groups)
        off = (copy - sums[:1]).abs()
        dist.all_reduce(off, op=dist.ReduceOp.MAX, group=same)
        if int(off):
            raise UserError(
                f"rank {self.groups.rank}: the anchor's copy differs from the policy it was made of (bit sums off by "
                f"{int(off)}): look for failing memory"
            )
        return checksum


class BaseModel:
    """The reference that a run with adapters has for nothing: the frozen weights alone."""

    def __init__(self, chunks: Sequence[HunyuanVideoDiT], groups: Groups) -> None:
        self.chunks = chunks
        base = [p for chunk in chunks for name, p in chunk.named_parameters() if not is_adapter(name)]
        sums = parameter_sums(base, [p.data for p in base], groups, next(chunks[0].parameters()).device)
        self.checksum = agreed_checksum(sums, groups)

    def swapped_in(self) -> AbstractContextManager[None]:
        """Inside the block the adapters are off."""
        return adapters_off(self.chunks)

    def finish(self) -> None:
        """Nothing is ever under way."""


def parameter_sums(
    parameters: Sequence[torch.nn.Parameter], tensors: Sequence[torch.Tensor], groups: Groups, device: torch.device
) -> torch.Tensor:
    """[2] int64 on the device: bit sums of this rank's tensors, and of those that it speaks for in the whole model."""
    own = torch.zeros(2, dtype=torch.int64, device=device)
    for parameter, tensor in zip(parameters, tensors, strict=True):
        value = bit_sum(tensor)
        counts = param_is_not_tensor_parallel_duplicate(parameter, groups.tp)
        counts = counts and not getattr(parameter, "shared", False)  # of pipeline stages' copies one counts
        own += torch.stack([value, value * counts]).to(device)
    return own


def agreed_checksum(sums: torch.Tensor, groups: Groups) -> int:
    """Of the whole model: the same number at every layout if the weights are. All ranks call.

    Over DP x CP, whose ranks hold the same parameters, the sums must be one number, or UserError; over TP x PP those of
    the shards add up.
    """
    span = torch.stack([sums[0], -sums[0]])
    dist.all_reduce(span, op=dist.ReduceOp.MAX, group=groups.collection.dp_cp)
    high, low = span.tolist()
    if high != -low:
        raise UserError(
            f"rank {groups.rank}: the replicas of this shard of the policy differ (bit sums {-low}, {high}): their "
            "updates have come apart; restart from the newest checkpoint and look for a failing device"
        )
    total = sums[1:].clone()
    dist.all_reduce(total, op=dist.ReduceOp.SUM, group=groups.collection.mp)
    return int(total) % _MODULUS


Named = list[tuple[str, torch.nn.Parameter]]


def _split(chunks: Sequence[HunyuanVideoDiT]) -> tuple[list[list[tuple[torch.nn.Module, Named]]], Named]:
    """Trained parameters by block, and all others; named by chunk, for two chunks have copies of the time embedder."""
    blocks: list[list[tuple[torch.nn.Module, Named]]] = []
    rest: Named = []
    for number, chunk in enumerate(chunks):
        found = []
        for index, block in chunk.transformer_blocks.items():
            prefix = f"{number}.transformer_blocks.{index}."
            found.append((block, [(prefix + name, p) for name, p in block.named_parameters() if p.requires_grad]))
        blocks.append(found)
        for name, parameter in chunk.named_parameters():
            if parameter.requires_grad and not name.startswith("transformer_blocks."):
                rest.append((f"{number}.{name}", parameter))
    return blocks, rest
