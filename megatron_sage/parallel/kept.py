"""What autograd keeps between a forward and its backward: counted, and tensors that are made again instead of kept."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

_counters: "list[KeptBytes]" = []  # those that are open


def instead_of(
    tensors: Sequence[torch.Tensor], again: Callable[[], Sequence[torch.Tensor]]
) -> torch.autograd.graph.saved_tensors_hooks:
    """Inside: where an operation keeps one of `tensors`, its place is kept, and read in what `again()` gives then.

    Attention kernels keep their queries, keys and values, which are made cheaply of smaller tensors. A tensor is known
    by its storage, of which a kernel sees any view; fake tensors have one too. What else is kept stays as it is.
    """
    numbers = {x.untyped_storage()._cdata: number for number, x in enumerate(tensors)}

    def pack(x: torch.Tensor) -> Any:
        number = numbers.get(x.untyped_storage()._cdata)
        if number is not None:
            return number, x.shape, x.stride(), x.storage_offset()
        for counter in _counters:  # the innermost hooks alone see what is kept inside them
            counter.count(x)
        return x.detach()  # the kernel's own output, kept as it is, would keep the graph that keeps it

    def unpack(kept: Any) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        number, *place = kept
        return again()[number].as_strided(*place)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class KeptBytes:
    """Inside the block: bytes of what autograd keeps, each storage once, those of `known` tensors not at all."""

    def __init__(
        self, known: Iterable[torch.Tensor] = (), counted: Callable[[torch.Tensor], bool] | None = None
    ) -> None:
        """`counted`: which tensors; None: all."""
        self._known = {x.untyped_storage()._cdata for x in known}
        self._counted = counted or (lambda x: True)
        self._storages: dict[int, torch.UntypedStorage] = {}  # held: a freed one's place would be given to another
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda x: x)

    @property
    def total(self) -> int:
        """Bytes so far."""
        return sum(storage.nbytes() for storage in self._storages.values())

    def count(self, x: torch.Tensor) -> None:
        """This one is kept."""
        storage = x.untyped_storage()
        if storage._cdata not in self._known and self._counted(x):
            self._storages[storage._cdata] = storage

    def __enter__(self) -> "KeptBytes":
        _counters.append(self)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)
        _counters.remove(self)

    def _pack(self, x: torch.Tensor) -> torch.Tensor:
        self.count(x)
        return x.detach()  # x itself, where a node keeps its own output, is a circle that is never freed
