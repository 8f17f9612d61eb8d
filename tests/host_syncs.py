"""Counts what would make the host wait for a GPU, on a CPU: reads of a tensor's values and copies that block.

On a GPU each of these ends the launching ahead of kernels: the host waits until all that was launched has run. On a CPU
they cost nothing, so no clock shows them; but they pass through PyTorch's dispatcher or its Python functions.
"""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_READING = {  # operators whose result, or its shape, depends on values
    "_local_scalar_dense", "nonzero", "equal", "allclose", "is_nonzero", "masked_select", "_unique", "_unique2",
    "unique_dim", "unique_consecutive", "bincount", "_linalg_check_errors",
}  # fmt: skip
_COPYING = {"tolist", "numpy", "__array__", "cpu"}  # without an operator of their own on a CPU
_HOST = ("control.py",)  # agreements on a stop: one int32 that never was on a device


class HostSyncs:
    """Inside the block, in this thread: `where["file:line operation"]`, and their number, `total`."""

    def __init__(self) -> None:
        self.where: Counter[str] = Counter()
        self._modes = (_Operators(self), _Functions(self))
        self._real: dict[Any, Any] = {}

    @property
    def total(self) -> int:
        return sum(self.where.values())

    def __enter__(self) -> "HostSyncs":
        for owner in (torch.cuda, torch.cuda.Stream, torch.cuda.Event):
            if hasattr(owner, "synchronize"):  # what stands for a stream on a CPU has none
                self._real[owner] = owner.synchronize
                owner.synchronize = self._synchronize
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*exception)
        for owner, function in self._real.items():
            owner.synchronize = function

    def _synchronize(self, *arguments: Any) -> None:
        self.found("synchronize")

    def found(self, what: str) -> None:
        """One more, by the innermost line that is neither PyTorch's nor this file's."""
        frame: Any = sys._getframe()
        while frame is not None and _foreign(frame.f_code.co_filename):
            frame = frame.f_back
        path = Path(frame.f_code.co_filename) if frame is not None else Path("?")
        if path.name not in _HOST:
            self.where[f"{path.name}:{frame.f_lineno if frame else 0} {what}"] += 1


class _Operators(TorchDispatchMode):
    def __init__(self, counter: HostSyncs) -> None:
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        if func.namespace == "aten" and (name in _READING or _by_mask(name, args) or _by_repeats(func, kwargs)):
            self.counter.found(name)
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __init__(self, counter: HostSyncs) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in _COPYING or (name == "to" and _names_device(args[1:], kwargs) and not _does_not_wait(args, kwargs)):
            self.counter.found(name)
        if name in ("tensor", "as_tensor", "asarray") and kwargs.get("device") is not None:
            self.counter.found(name)  # numbers, or an array, from pageable memory
        return func(*args, **kwargs)


def _foreign(path: str) -> bool:
    return path == __file__ or "/torch/" in path or path.startswith("<")


def _by_mask(name: str, args: Any) -> bool:
    """x[mask]: how many there are is known on the device alone. Setting by a mask, x[mask] = tensor, likewise."""
    if name not in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return False
    return any(isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])


def _by_repeats(func: Any, kwargs: Any) -> bool:
    return "repeat_interleave" in func.name() and (kwargs or {}).get("output_size") is None


def _names_device(args: Any, kwargs: Any) -> bool:
    given = [*args, kwargs.get("device"), kwargs.get("other")]
    return any(isinstance(x, torch.device | str | torch.Tensor) for x in given)


def _does_not_wait(args: Any, kwargs: Any) -> bool:
    positional = [x for x in args[1:] if isinstance(x, bool)]  # to(device, dtype, non_blocking, copy)
    return bool(kwargs.get("non_blocking", positional[0] if positional else False))
