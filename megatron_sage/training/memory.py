"""Out of memory: what held it, in which phase, and which settings would need less."""

import gc
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import psutil
import torch

from megatron_sage.config import Config
from megatron_sage.errors import OutOfMemory
from megatron_sage.parallel.control import Control
from megatron_sage.parallel.groups import Groups

TEXTS = ("can't allocate memory", "out of memory")  # torch's CPU allocator; CUDA and libraries, not typed
LARGEST = 8
GB, MB = 1024**3, 1024**2


class Hint(NamedTuple):
    """A setting that would help in some phases."""

    key: str
    phases: str
    better: Callable[[Config, Groups], Any]  # a value that needs less memory; None: there is no better one
    why: str


MODEL = "load rollout reference noise floor train optimizer"  # the whole shard and activations are there


def _one(read: Callable[[Config], int]) -> Callable[[Config, Groups], Any]:
    return lambda config, groups: 1 if read(config) > 1 else None


def _unless(read: Callable[[Config], Any], better: Any) -> Callable[[Config, Groups], Any]:
    return lambda config, groups: better if read(config) != better else None


HINTS = (
    Hint("sampler.micro_batch", "rollout reference noise floor train decode", _one(lambda c: c.sampler.micro_batch),
         "samples in one forward"),
    Hint("grpo.replay_batch", "noise floor train", _one(lambda c: c.grpo.replay_batch), "pairs in one forward"),
    Hint("evaluation.samples_per_prompt", "evaluate", _one(lambda c: c.evaluation.samples_per_prompt),
         "the samples of a prompt are one micro-batch"),
    Hint("precision.recompute", "noise floor train", _unless(lambda c: c.precision.recompute, "full"),
         "keeps each block's input only"),
    Hint("sampler.offload_trajectories", "rollout reference noise floor train decode reward",
         _unless(lambda c: c.sampler.offload_trajectories, True), "latents wait in host memory"),
    Hint("precision.dtype", MODEL + " evaluate", _unless(lambda c: c.precision.dtype, "bf16"),
         "halves weights and activations"),
    Hint("kl.anchor_placement", MODEL + " decode reward evaluate", _unless(lambda c: c.kl.anchor_placement, "host"),
         "the reference's weights wait in host memory"),
    Hint("optimizer.distributed", MODEL + " decode reward evaluate",
         lambda c, g: True if not c.optimizer.distributed and g.dp_size * g.cp_size > 1 else None,
         "its state is split over CP·DP"),
    Hint("optimizer.offload", MODEL + " decode reward evaluate",
         lambda c, g: "hybrid" if c.optimizer.offload == "none" else None, "its state waits in host memory"),
    Hint("optimizer.ema_device", MODEL + " decode reward evaluate",
         lambda c, g: "host" if c.optimizer.ema_decay is not None and c.optimizer.ema_device == "device" else None,
         "the moving average waits in host memory"),
    Hint("training.async_save", "save", _unless(lambda c: c.training.async_save, False),
         "writes without a copy in host memory"),
    Hint("parallel.context", "rollout reference noise floor train evaluate", lambda c, g: 2 * c.parallel.context,
         "splits activations; takes as many more processes"),
    Hint("parallel.tensor", MODEL + " evaluate", lambda c, g: 2 * c.parallel.tensor,
         "splits weights and activations; must divide the model's heads"),
    Hint("parallel.pipeline", MODEL + " decode reward save evaluate", lambda c, g: 2 * c.parallel.pipeline,
         "splits the blocks; takes as many more processes"),
    Hint("video.frames", "decode reward", lambda c, g: c.video.frames - 4 if c.video.frames > 4 else None,
         "a whole video is decoded and scored at once"),
)  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU or of the host, from torch, Python or a library."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, Exception) and any(text in str(error) for text in TEXTS)


def explain(
    error: BaseException, config: Config, groups: Groups, control: Control, names: dict[int, str]
) -> OutOfMemory:
    """The whole message. `names`: address of a storage -> what it is (`tensor_names`)."""
    phase = control.phase
    cause = (str(error).strip() or type(error).__name__).splitlines()[0]
    lines = [
        f"out of memory in phase {phase} (rank {groups.rank}, iteration {control.iteration}, micro-step "
        f"{control.step}): {cause}",
        memory_line(),
        "largest live tensors (what autograd keeps of a forward has no object in Python and is not among them):",
        *(f"  {line}" for line in largest_tensors(names)),
    ]
    helps = [
        f"  {hint.key}={_read(config, hint.key)} -> {better}: {hint.why}"
        for hint in HINTS
        if _concerns(hint, phase) and (better := hint.better(config, groups)) is not None
    ]
    return OutOfMemory("\n".join([*lines, f"settings that need less memory in phase {phase}:", *helps]))


def _concerns(hint: Hint, phase: str) -> bool:
    """By the phase's first word; every hint where no hint knows the phase."""
    word = phase.split(" ")[0]
    return word in hint.phases.split(" ") or word not in PHASES


PHASES = frozenset(word for hint in HINTS for word in hint.phases.split(" "))


def _read(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def memory_line() -> str:
    """This process and its machine, and its GPU where there is one."""
    machine = psutil.virtual_memory()
    used = psutil.Process().memory_info().rss
    text = f"host: this process {used / GB:.2f} GB, {machine.available / GB:.2f} of {machine.total / GB:.2f} GB free"
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        text += (
            f"; GPU: {allocated / GB:.2f} GB in tensors (peak {torch.cuda.max_memory_allocated() / GB:.2f}), "
            f"{reserved / GB:.2f} GB reserved by torch, {free / GB:.2f} of {total / GB:.2f} GB free"
        )
    return text


def largest_tensors(names: dict[int, str], count: int = LARGEST) -> list[str]:
    """Lines "MB, shape, dtype, device, name" of the tensors behind the largest storages, each storage once."""
    found: dict[int, tuple[int, torch.Tensor]] = {}
    for item in gc.get_objects():
        if not issubclass(type(item), torch.Tensor):  # isinstance would wake lazy proxies up
            continue
        address, size = _storage(item)
        # of the views of a storage, the one that shows most of it
        if size and (address not in found or item.nbytes > found[address][1].nbytes):
            found[address] = (size, item)
    ordered = sorted(found.items(), key=lambda entry: -entry[1][0])[:count]
    return [
        f"{size / MB:10.2f} MB  {list(x.shape)!s:24} {str(x.dtype).removeprefix('torch.')} on {x.device}"
        f"  {names.get(address, '')}".rstrip()
        for address, (size, x) in ordered
    ]


def tensor_names(chunks: Iterable[torch.nn.Module], ddp: Iterable[Any], optimizer: Any) -> dict[int, str]:
    """Addresses of what a run keeps: parameters, gradient buffers, the optimizer's state."""
    names: dict[int, str] = {}
    for wrapped in ddp:
        for number, buffer in enumerate([*wrapped.buffers, *wrapped.expert_parallel_buffers]):
            names[_storage(buffer.grad_data)[0]] = f"gradient buffer {number}"
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(part, "optimizer", None)
        for group in getattr(inner, "param_groups", []):
            names |= {_storage(p)[0]: "optimizer: fp32 weights" for p in group["params"]}
        for state in getattr(inner, "state", {}).values():
            names |= {_storage(x)[0]: f"optimizer: {key}" for key, x in state.items() if isinstance(x, torch.Tensor)}
    for number, chunk in enumerate(chunks):
        prefix = f"chunk {number}: " if number else ""
        names |= {_storage(p)[0]: f"{prefix}{name}" for name, p in chunk.named_parameters()}
    return names


def _storage(x: torch.Tensor) -> tuple[int, int]:
    """(address, bytes); no bytes where a subclass has no storage of its own."""
    try:
        storage = x.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    except (RuntimeError, NotImplementedError):
        return 0, 0
