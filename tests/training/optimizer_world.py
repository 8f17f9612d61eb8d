"""A tiny model with given weights and gradients under any optimizer and layout, and the same steps by torch.optim."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

MODEL = {
    "num_attention_heads": 4,
    "attention_head_dim": 12,
    "num_layers": 2,
    "num_refiner_layers": 1,
    "rope_axes_dim": (4, 4, 4),
    "mlp_ratio": 3.0,
    "text_embed_dim": 10,
    "text_embed_2_dim": 14,
    "image_embed_dim": 6,
}
LARGEST = "context_embedder_2.linear_2.weight"  # 2048 x 2048 in every size of the model
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# diffusers' names of what Muon trains; with these the reference knows nothing of our fused parameters
MUON = ("attn.to_", "attn.add_", "ff.net", "ff_context.net", "norm1.linear", "norm1_context.linear")


@dataclass
class World:
    """Everything on this rank."""

    config: Any
    groups: Any
    chunks: list[Any]
    optimizer: Any
    keymap: Any
    dtype: str
    seed: int


def build(
    seed: int,
    *,
    tensor: int = 1,
    context: int = 1,
    pipeline: int = 1,
    dtype: str = "fp32",
    frozen: str = "-",
    only: str = "",
    whole: bool = False,
    model: dict[str, Any] | None = None,
    weights_seed: int | None = None,
    **settings: Any,
) -> World:
    """A layout of the present world. `frozen`: parameters whose (our) name holds it do not learn, nor those whose
    name lacks `only`, nor the largest one, which is nine tenths of the model, unless `whole` is set."""
    from megatron_sage.checkpoint import configs
    from megatron_sage.checkpoint.keymap import KeyMap
    from megatron_sage.config import Config
    from megatron_sage.model.config import HunyuanVideoConfig
    from megatron_sage.model.transformer import build_chunks
    from megatron_sage.parallel.groups import initialize, shutdown
    from megatron_sage.training.optimizer import build_optimizer, wrap

    try:
        groups = initialize(tensor, context, pipeline)  # the groups of the world before, where its layout was this one
    except ValueError:
        shutdown()
        groups = initialize(tensor, context, pipeline)
    config = Config()
    base = {"lr": 1e-2, "weight_decay": 0.1, "grad_clip": 1.0}
    for name, value in (base | settings).items():
        assert hasattr(config.optimizer, name), name
        setattr(config.optimizer, name, value)
    sizes = MODEL | (model or {})
    layout = {"tensor": tensor, "context": context, "pipeline": pipeline, "sequence_parallel": True}
    chunks = build_chunks(HunyuanVideoConfig.from_diffusers(sizes, dtype=DTYPES[dtype], **layout), groups.collection)
    keymap = KeyMap.from_config(configs.complete(dict(sizes), Path("config.json")))
    world = World(config, groups, chunks, None, keymap, dtype, seed)
    put(world, values(keymap, seed if weights_seed is None else weights_seed, "weights"), lambda p: p.data)
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if frozen in name or only not in name or (name == LARGEST and not whole):
                parameter.requires_grad_(False)
    ddp = wrap(chunks, groups, config.optimizer.distributed)
    world.optimizer = build_optimizer(config, ddp, DTYPES[dtype])
    return world


def values(keymap: Any, seed: int, kind: str) -> dict[str, torch.Tensor]:
    """Whole random tensors by diffusers' names, the same on every rank and layout."""
    found = {}
    for name, shape in keymap.shapes("diffusers").items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {kind} {name}".encode()))
        if len(shape) == 2 and min(shape) == 2048:  # cheaper than 4 million random numbers
            found[name] = torch.outer(*(torch.randn(size, generator=generator) for size in shape)) * 0.3
        else:
            found[name] = torch.randn(shape, generator=generator) * 0.3
    return found


def put(world: World, tensors: dict[str, torch.Tensor], target: Any) -> None:
    """This rank's slices of whole diffusers tensors into `target(parameter)`."""
    for parameter, value in zip(*_slices(world, tensors), strict=True):
        target(parameter).copy_(value)


def _slices(world: World, tensors: dict[str, torch.Tensor]) -> tuple[list[torch.nn.Parameter], list[torch.Tensor]]:
    parameters, found = [], []
    rank, size = world.groups.tp_rank, world.groups.tp_size
    bindings = world.keymap.by_name("ours")
    for chunk in world.chunks:
        for name, parameter in chunk.named_parameters():
            binding = bindings[name]
            parts = [tensors[other] for other in binding.diffusers]
            bounds = binding.slice_bounds(rank, size)
            if bounds is not None:
                parts = [part.narrow(bounds[0], bounds[1], bounds[2] - bounds[1]) for part in parts]
            parameters.append(parameter)
            found.append(binding.convert(parts, "diffusers", "ours")[binding.ours.index(name)])
    return parameters, found


def step(world: World, number: int) -> float:
    """One step on the gradients of that number, as the trainer takes it; the gradient norm."""
    world.optimizer.zero_grad()
    learning = [p for chunk in world.chunks for p in chunk.parameters() if p.requires_grad]
    for parameter in learning:
        parameter.main_grad.zero_()
    gradients = values(world.keymap, world.seed, f"gradients {number}")
    for parameter, value in zip(*_slices(world, gradients), strict=True):
        if parameter.requires_grad:
            parameter.main_grad.copy_(value)
    world.optimizer.prepare_grads()
    norm = float(world.optimizer.get_grad_norm())
    world.optimizer.step_prepared(norm)
    return norm


def reference(world: World, steps: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Whole weights after the steps by torch.optim in one process, fp32, and the gradient norms."""
    settings = world.config.optimizer
    start = values(world.keymap, world.seed, "weights")
    weights = {name: value.to(DTYPES[world.dtype]).float().requires_grad_(True) for name, value in start.items()}
    mine = {
        other
        for chunk in world.chunks
        for name, parameter in chunk.named_parameters()
        if not parameter.requires_grad
        for other in world.keymap.by_name("ours")[name].diffusers
    }
    every: list[Any] = [None] * world.groups.world_size  # another pipeline stage has other parameters
    dist.all_gather_object(every, mine, group=dist.group.WORLD)
    fixed = set().union(*every)
    learning = {name: value for name, value in weights.items() if name not in fixed}
    matrices = [n for n in learning if settings.name == "muon" and _is_muon(n, learning[n])]
    rest = [name for name in learning if name not in matrices]
    groups = [
        {"params": [learning[n] for n in rest if learning[n].ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [learning[n] for n in rest if learning[n].ndim == 1], "weight_decay": 0.0},
    ]
    betas = (settings.beta1, settings.beta2)
    optimizers = [torch.optim.AdamW(groups, lr=settings.lr, betas=betas, eps=settings.eps)]
    pieces = {name: _pieces(name, learning[name]) for name in matrices}
    if matrices:
        optimizers.append(
            torch.optim.Muon(
                [piece for some in pieces.values() for piece in some],
                lr=settings.lr,
                weight_decay=settings.weight_decay,
                momentum=settings.muon_momentum,
                ns_steps=settings.muon_steps,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    norms = []
    for number in range(steps):
        gradients = values(world.keymap, world.seed, f"gradients {number}")
        for name, weight in learning.items():
            weight.grad = gradients[name]
        norms.append(float(sum(gradients[name].square().sum(dtype=torch.float64) for name in learning)) ** 0.5)
        clip = settings.grad_clip or float("inf")
        torch.nn.utils.clip_grads_with_norm_(list(learning.values()), clip, torch.tensor(norms[-1]))
        for name, some in pieces.items():
            for piece, gradient in zip(some, _pieces(name, learning[name].grad), strict=True):
                piece.grad = gradient
        with _muon_in(world.dtype):
            for optimizer in optimizers:
                optimizer.step()
    with torch.no_grad():
        for name, some in pieces.items():
            learning[name].copy_(torch.cat(list(some)))
    return {name: weight.detach() for name, weight in weights.items()}, norms


def _is_muon(name: str, value: torch.Tensor) -> bool:
    return name.startswith("transformer_blocks.") and value.ndim == 2 and any(part in name for part in MUON)


def _pieces(name: str, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The six linear maps of a modulation, or the one of anything else."""
    return tuple(part.detach().clone() for part in value.chunk(6 if ".norm1" in name else 1))


@contextmanager
def _muon_in(dtype: str) -> Iterator[None]:
    """torch's Muon iterates in bf16, whatever the weights are; with fp32 weights ours does in fp32."""
    if dtype == "bf16":
        yield
        return
    with mock.patch.object(torch.Tensor, "bfloat16", lambda self: self.clone()):
        yield


def error(world: World, wanted: dict[str, torch.Tensor]) -> float:
    """The largest difference between this rank's fp32 weights and the wanted, over the largest change from the start.

    Also holds the forward's weights, which other ranks may have computed, against the wanted ones.
    """
    start = values(world.keymap, world.seed, "weights")
    change = max(float((wanted[name] - start[name].to(DTYPES[world.dtype])).abs().max()) for name in wanted)
    worst = 0.0
    rounding = 2**-7 if world.dtype == "bf16" else 0.0
    for parameter, value in zip(*_slices(world, wanted), strict=True):
        held, begin, end = master(world, parameter)
        worst = max(worst, float((held - value.flatten()[begin:end]).abs().max()) if end > begin else 0.0)
        difference = (parameter.detach().float() - value).abs() - rounding * value.abs()
        worst = max(worst, float(difference.max()))
    return worst / change


def master(world: World, parameter: torch.nn.Parameter) -> tuple[torch.Tensor, int, int]:
    """The fp32 weights that this rank's optimizer holds of the parameter, flat, and their range in it."""
    if parameter.requires_grad and world.config.optimizer.distributed:
        distributed = world.optimizer.chained_optimizers[0]
        if parameter not in distributed.model_param_gbuf_map:
            return torch.empty(0), 0, 0
        place = distributed._get_model_param_range_map(parameter)["param"]
        found = distributed._get_main_param_and_optimizer_states(parameter)
        return found["param"].detach().flatten(), place.start, place.end
    held = getattr(parameter, "main_param", parameter).detach().float().flatten()
    return held, 0, held.numel()


def save(world: World, directory: Path) -> None:
    """Weights and optimizer as a run's checkpoint has them."""
    from megatron_sage.checkpoint import saving

    if world.groups.rank == 0:
        directory.mkdir(parents=True)
    dist.barrier(group=dist.group.WORLD)
    saving.save(_sharded(world, loading=False), directory)


def load(world: World, directory: Path) -> None:
    """The counterpart, at any layout."""
    from megatron.core import dist_checkpointing

    loaded = dist_checkpointing.load(_sharded(world, loading=True), str(directory))
    for number, chunk in enumerate(world.chunks):
        chunk.load_state_dict(loaded["policy"][str(number)])
    world.optimizer.load_state_dict(loaded["optimizer"])


def _sharded(world: World, loading: bool) -> dict[str, Any]:
    def shards() -> dict[str, Any]:
        return {str(number): chunk.sharded_state_dict() for number, chunk in enumerate(world.chunks)}

    return {"policy": shards(), "optimizer": world.optimizer.sharded_state_dict(shards(), is_loading=loading)}


def snapshot(world: World) -> list[torch.Tensor]:
    """Weights, masters and moments on this rank, copied."""
    found = [p.detach().clone() for chunk in world.chunks for p in chunk.parameters()]
    for part in world.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                found.append(parameter.detach().clone())
                found += [state[key].detach().clone() for key in sorted(state) if torch.is_tensor(state[key])]
    return found
