"""Where the tensors live, and what makes megatron-core run where no GPU is.

megatron-core 0.16 is written for CUDA: it asks `torch.cuda` for the current device, random state and streams, writes
`device="cuda"` literals, and recognises parameters by `.type() == "torch.cuda.FloatTensor"`. On a CPU-only machine
`install_cpu_backend` answers those questions for the CPU; with a GPU it does nothing at all. It has to run before the
first `import megatron.core`, which is why importing `megatron_sage.parallel` calls it.

Rules that the replacements obey:
* every patched name gets a function object of its own (torch.compile refuses two torch names bound to one object);
* `torch.cuda.is_available()` stays False, so nobody else is misled into CUDA paths;
* constructors are wrapped one by one instead of with a TorchFunctionMode: a mode costs microseconds on *every* torch
  call of the process and does not reach other threads.
"""

import contextlib
import functools
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch

_CONSTRUCTORS = ("tensor", "zeros", "ones", "empty", "full", "arange", "empty_like", "zeros_like", "ones_like")
_installed = False


def device() -> torch.device:
    """The device of this process' tensors: the current GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def backend() -> str:
    """The torch.distributed backend that belongs to `device()`."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def install_cpu_backend() -> None:
    """Let megatron-core run on CPU tensors and gloo. Idempotent; a no-op where CUDA is available."""
    global _installed
    if _installed or torch.cuda.is_available():
        return
    _installed = True
    _answer_device_queries()
    _answer_random_state_queries()
    _replace_streams()
    _translate_cuda_literals()
    _silence_advice_for_gpus()


def _do_nothing() -> Callable[..., None]:
    """A new function object at every call, see the module docstring."""
    return lambda *args, **kwargs: None


def _answer_device_queries() -> None:
    for name in ("synchronize", "empty_cache", "set_device", "_lazy_init"):
        setattr(torch.cuda, name, _do_nothing())
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]

    def no_properties(*args: Any) -> None:
        # inductor probes the properties and expects exactly this type of refusal on a machine without CUDA
        raise RuntimeError("no CUDA device on this machine")

    torch.cuda.get_device_properties = no_properties  # type: ignore[assignment]


def _answer_random_state_queries() -> None:
    """Megatron's RNG tracker forks "the CUDA generator": here that is torch's default CPU generator."""
    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state = lambda device=None: torch.get_rng_state()
        module.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    torch.cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)  # type: ignore[assignment]
    torch.cuda.default_generators = {torch.device("cpu"): torch.default_generator}  # type: ignore[assignment]
    # without CUDA, _lazy_call only queues the callable for a context that never comes: the state would not be set
    torch.cuda._lazy_call = lambda callable, **kwargs: callable()
    # the tracker warns when "the CPU generator changed" during a fork; here it is the tracked one, so it must change
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


class _NullStream:
    """Stands for torch.cuda.Stream: CPU work is synchronous, so waiting and recording mean nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., None]:
        return _do_nothing()

    def record_event(self, event: Any = None) -> "_NullEvent":
        return event or _NullEvent()


class _NullEvent(_NullStream):
    """Stands for torch.cuda.Event."""


def _replace_streams() -> None:
    torch.cuda.Stream = _NullStream  # type: ignore[misc, assignment]
    torch.cuda.Event = _NullEvent  # type: ignore[misc, assignment]
    torch.cuda.current_stream = lambda *args, **kwargs: _NullStream()
    torch.cuda.default_stream = lambda *args, **kwargs: _NullStream()
    torch.cuda.stream = lambda stream: contextlib.nullcontext()


def _names_cuda(value: Any) -> bool:
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and value.startswith("cuda")


def _translate_cuda_literals() -> None:
    from torch.utils._device import _device_constructors

    # `with torch.device(...)` compares functions with this cached set: fill it while it still holds the originals
    _device_constructors()
    for name in _CONSTRUCTORS:
        setattr(torch, name, _constructor_without_cuda(getattr(torch, name)))

    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    plain_type = torch.Tensor.type

    def type_as_on_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = plain_type(self, *args, **kwargs)
        # the optimizers sort parameters by this string, `torch.cuda.FloatTensor` and so on; a TorchFunctionMode looks
        # the method up by its name, and so comes here a second time
        plain = isinstance(result, str) and not result.startswith("torch.cuda.")
        return result.replace("torch.", "torch.cuda.", 1) if plain else result

    torch.Tensor.type = type_as_on_cuda  # type: ignore[method-assign]


def _constructor_without_cuda(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(original)
    def construct(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = torch.device("cpu")
        return original(*args, **kwargs)

    return construct


def _silence_advice_for_gpus() -> None:
    """Warnings that megatron gives about CUDA libraries and collectives: nothing a user of this machine could heed."""
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    warnings.filterwarnings("ignore", message="Apex is not installed")
    # megatron-core 0.16 calls what torch 2.13 and its own next version rename
    warnings.filterwarnings("ignore", message="`load_state_dict` is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message="full scope is deprecated", category=UserWarning)
    warnings.filterwarnings(
        "ignore", message=".*environment variable CUDA_DEVICE_MAX_CONNECTIONS", category=UserWarning
    )
    # the optimizers look at shards, which are views, for gradients that they put there themselves
    warnings.filterwarnings(
        "ignore", message="The .grad attribute of a Tensor that is not a leaf", category=UserWarning
    )
    # torch 2.13 renames the collectives that megatron-core 0.16 calls
    warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated", category=FutureWarning)
