"""Other weights for a module's forwards, block by block: host memory -> a slot on the device -> the parameters' data.

A reference model has the policy's shapes and is asked now and then. Its weights wait in (pinned) host memory, one flat
buffer for each unit (a block, or all that is in no block); two slots on the device take turns, so that the next block's
copy runs on a side stream while this one computes. Policy tensors are put aside by reference: nobody notices.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.utils.hooks import RemovableHandle

_ALIGNMENT = 16  # bytes between the beginnings of two tensors of a buffer: their views need it, vectorised copies too


@dataclass(frozen=True)
class _Place:
    """Where one parameter lies in its unit's buffer."""

    name: str
    parameter: torch.nn.Parameter
    begin: int  # bytes
    end: int


class Unit:
    """Parameters that are loaded together, and other weights for them: all, or this rank's slice of them.

    With a `group` of n ranks that hold the same parameters the buffer is cut into n equal slices, whatever tensors
    they cut through; `load` gathers them.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, torch.nn.Parameter]],
        group: dist.ProcessGroup | None = None,
        on_device: bool = False,
    ) -> None:
        """`on_device`: the weights wait where the parameters are, not in host memory."""
        self.group: dist.ProcessGroup | None = None if group is None or group.size() == 1 else group
        self.places: list[_Place] = []
        end = 0
        for name, parameter in named:
            begin = -(-end // _ALIGNMENT) * _ALIGNMENT
            end = begin + parameter.nbytes
            self.places.append(_Place(name, parameter, begin, end))
        ranks, rank = (1, 0) if self.group is None else (self.group.size(), self.group.rank())
        self.slice_bytes = -(-end // (_ALIGNMENT * ranks)) * _ALIGNMENT
        self.bytes, self.start = self.slice_bytes * ranks, rank * self.slice_bytes
        device = named[0][1].device if named else torch.device("cpu")
        where = device if on_device else torch.device("cpu")
        pinned = device.type == "cuda" and where.type == "cpu"
        self.kept = torch.zeros(self.slice_bytes, dtype=torch.uint8, device=where, pin_memory=pinned)

    @torch.no_grad()
    def store(self, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        """Keep this rank's slice of the present parameters, or of `tensors` by name.

        From a GPU the copy is not waited for.
        """
        for place, begin, end in self._overlaps():
            source = place.parameter.data if tensors is None else tensors[place.name]
            part = source.reshape(-1).view(torch.uint8)[begin - place.begin : end - place.begin]
            self.kept[begin - self.start : end - self.start].copy_(part, non_blocking=True)

    def bits(self) -> int:
        """Sum of the bit patterns of all elements in this rank's slice, as whole numbers."""
        total = 0
        for place, begin, end in self._overlaps():
            part = self.kept[begin - self.start : end - self.start].view(place.parameter.dtype)
            total += int(bit_sum(part))
        return total

    def _overlaps(self) -> Iterator[tuple[_Place, int, int]]:
        """Each parameter that reaches into this rank's slice, with the bytes of the buffer where it does."""
        for place in self.places:
            begin, end = max(place.begin, self.start), min(place.end, self.start + self.slice_bytes)
            if begin < end:
                yield place, begin, end

    def load(self, buffer: torch.Tensor) -> None:
        """Fill a uint8 buffer of `bytes` bytes. With a group all its ranks call, in the same order."""
        part = buffer[self.start : self.start + self.slice_bytes]
        part.copy_(self.kept, non_blocking=True)
        if self.group is not None and self.bytes:
            # the weights of this TP and PP shard, one slice from each of its DP x CP replicas
            source = part if buffer.is_cuda else part.clone()  # NCCL gathers in place, gloo is not known to
            dist.all_gather_into_tensor(buffer, source, group=self.group)

    def views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """Of each parameter, in a loaded buffer."""
        return [
            buffer[place.begin : place.end].view(place.parameter.dtype).view(place.parameter.shape)
            for place in self.places
        ]


class _Slot:
    """A buffer on the device with the events that order its use: loaded, and no longer read."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.buffer = torch.empty(size, dtype=torch.uint8, device=device)
        self.loaded, self.free = torch.cuda.Event(), torch.cuda.Event()
        self.free.record(torch.cuda.current_stream())
        self.unit: Unit | None = None


class Stream:
    """While it is open, the forward of each block runs with its unit's weights; at most two units are on the device."""

    def __init__(self, chunks: Sequence[Sequence[tuple[torch.nn.Module, Unit]]], device: torch.device) -> None:
        """`chunks`: of each chunk its blocks in the order of their forwards, with their units."""
        self._side = torch.cuda.Stream(device=device)
        largest = max((unit.bytes for blocks in chunks for _, unit in blocks), default=0)
        self._slots = [_Slot(largest, device), _Slot(largest, device)]
        self._turn = 0
        self._hooks: list[RemovableHandle] = []
        self._running: tuple[Unit, list[torch.Tensor]] | None = None  # with the policy's tensors
        for blocks in chunks:
            for number, (block, unit) in enumerate(blocks):
                # After a chunk's last block its first one is expected again. Where another chunk comes instead the
                # copy was in vain, nothing else.
                following = blocks[(number + 1) % len(blocks)][1]
                self._hooks.append(block.register_forward_pre_hook(self._before(unit, following)))
                self._hooks.append(block.register_forward_hook(self._after(unit)))
        self._fetch(chunks[0][0][1])

    def close(self) -> None:
        """Back to the policy's forwards; before the slots go, the last copies into them must have ended."""
        for hook in self._hooks:
            hook.remove()
        self._put_back()  # an error has left a forward
        torch.cuda.current_stream().wait_stream(self._side)

    def _fetch(self, unit: Unit) -> _Slot:
        """Begin to load a unit into the slot that is not in use, unless it is there already."""
        self._turn = 1 - self._turn
        slot = self._slots[self._turn]
        if slot.unit is not unit:
            with torch.cuda.stream(self._side):
                self._side.wait_event(slot.free)
                unit.load(slot.buffer[: unit.bytes])
                slot.loaded.record(self._side)
            slot.unit = unit
        return slot

    def _before(self, unit: Unit, following: Unit) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: object) -> None:
            slot = self._slots[self._turn]
            if slot.unit is not unit:
                slot = self._fetch(unit)
            torch.cuda.current_stream().wait_event(slot.loaded)
            self._running = unit, [place.parameter.data for place in unit.places]
            for place, view in zip(unit.places, unit.views(slot.buffer), strict=True):
                place.parameter.data = view
            if following is not unit:
                self._fetch(following)

        return hook

    def _after(self, unit: Unit) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: object, output: object) -> None:
            self._put_back()
            used = next(slot for slot in self._slots if slot.unit is unit)
            used.free.record(torch.cuda.current_stream())

        return hook

    def _put_back(self) -> None:
        if self._running is not None:
            unit, policy = self._running
            for place, tensor in zip(unit.places, policy, strict=True):
                place.parameter.data = tensor
            self._running = None


@contextmanager
def swapped(units: Sequence[tuple[Unit, torch.Tensor]]) -> Iterator[None]:
    """Inside the block the units' parameters are views of the buffers; the policy's tensors come back by reference."""
    places = [place for unit, _ in units for place in unit.places]
    views = [view for unit, buffer in units for view in unit.views(buffer)]
    policy = [place.parameter.data for place in places]
    try:
        for place, view in zip(places, views, strict=True):
            place.parameter.data = view
        yield
    finally:
        for place, tensor in zip(places, policy, strict=True):
            place.parameter.data = tensor


_PATTERNS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of an element -> whole number


def bit_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum of the elements' bit patterns read as whole numbers, int64 on the tensor's device.

    It does not depend on the order of the elements or on how they are cut: shards' sums add up to the whole's.
    """
    return x.reshape(-1).view(_PATTERNS[x.element_size()]).sum(dtype=torch.int64)
