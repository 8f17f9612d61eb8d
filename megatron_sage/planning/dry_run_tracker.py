"""What a dry run is watched by: live bytes of storages, and floating-point operations, by phase."""

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Tracker(TorchDispatchMode):
    """Live bytes of everything that operators return, each storage once until it is freed.

    All tensors of a dry run are the CPU's: `on_host` says which of them a GPU run keeps in host memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = "build"
        self.device = self.host = 0  # live bytes
        self.peaks: Counter[str] = Counter()  # phase -> the most live bytes on the device
        self.ends: dict[str, int] = {}  # phase -> live bytes when it was left
        self.flops: Counter[tuple[str, str]] = Counter()  # (phase, "gemm" or "attention")
        self._held: dict[int, list[Any]] = {}  # storage -> [bytes, on host, weak reference]

    def enter(self, phase: str) -> None:
        """From now on it is another phase."""
        self.ends[self.phase] = self.device
        self.phase = phase
        self.peaks[phase] = max(self.peaks[phase], self.device)

    def on_host(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count them as host memory, whatever device they are on here."""
        for tensor in tensors:
            held = self._held.get(tensor.untyped_storage()._cdata)
            if held is not None and not held[1]:
                held[1] = True
                self.device -= held[0]
                self.host += held[0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func.overloadpacket
        if packet in flop_registry:
            self.flops[self.phase, "gemm"] += flop_registry[packet](*args, **kwargs, out_val=out)
        elif packet is _ATTENTION or packet is _ATTENTION_BACKWARD:
            shift = packet is _ATTENTION_BACKWARD  # the output's gradient comes first
            query, key = args[shift], args[shift + 1]
            once = 4 * query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2] * query.shape[3]
            self.flops[self.phase, "attention"] += once * 5 // 2 if shift else once
        for item in out if isinstance(out, tuple | list) else (out,):
            if isinstance(item, torch.Tensor):
                self._hold(item)
        return out

    def _hold(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._held or not size:
            return
        self._held[key] = [size, False, weakref.ref(storage, lambda _: self._free(key))]
        self.device += size
        if self.device > self.peaks[self.phase]:
            self.peaks[self.phase] = self.device

    def _free(self, key: int) -> None:
        size, on_host, _ = self._held.pop(key)
        if on_host:
            self.host -= size
        else:
            self.device -= size
