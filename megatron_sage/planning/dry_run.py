"""One rank of a layout runs an iteration of the real trainer, at full size, on tensors without data."""

import copy
import dataclasses
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch

from megatron_sage.config.schema import Config
from megatron_sage.config.validation import validate_layout
from megatron_sage.engine import build_engine, initialize_groups, iteration_steps
from megatron_sage.errors import UserError
from megatron_sage.model.config import HunyuanVideoConfig
from megatron_sage.model.transformer import TextCondition
from megatron_sage.parallel.traffic import CollectiveCounter
from megatron_sage.planning.dry_run_tracker import Tracker
from megatron_sage.planning.dry_run_world import check_world, fake_world
from megatron_sage.planning.flops import Text
from megatron_sage.reporting.progress import Reporter
from megatron_sage.rollout.policy import Prompt
from megatron_sage.training.optimizer import build_optimizer, wrap
from megatron_sage.training.trainer import Trainer

PLACES = [f"{group}_{what}" for group in ("tp", "cp", "pp", "dp") for what in ("rank", "size")]
DIMENSIONS: tuple[str, ...] = ("VQ", "MQ", "TA")


@dataclasses.dataclass
class DryRun:
    """What one rank did. Bytes of collectives as `parallel.traffic` counts them."""

    rank: int
    world_size: int
    steps: int  # of the rollout
    places: dict[str, int]  # rank and size in each group
    shapes: dict[str, list[int]]
    parameters: int
    trained: int
    peaks: dict[str, int]  # phase -> the most bytes on the device
    ends: dict[str, int]  # phase -> bytes on the device at its end
    host: int  # bytes in host memory at the end
    flops: dict[str, dict[str, int]]  # phase -> gemm, attention
    traffic: dict[str, dict[str, int]]  # phase -> "operation group" -> bytes
    calls: dict[str, dict[str, int]]
    seconds: float


class _Codec:
    """Stands for the VAE: a dry run decodes nothing."""

    def decode(self, latents: torch.Tensor) -> np.ndarray:
        return np.zeros((1, 1, 1, 3), np.uint8)


class _Reward:
    """Made-up scores."""

    dimensions: tuple[str, ...] = DIMENSIONS

    def __call__(self, videos: Sequence[np.ndarray], prompts: Sequence[str], fps: float) -> dict[str, np.ndarray]:
        return {name: np.ones(len(videos)) for name in self.dimensions}


class _Trainer(Trainer):
    """Tells which phase it is in; takes its own rewards for those of all replicas."""

    tracker: Tracker
    counter: CollectiveCounter | None = None  # the innermost
    traffic: dict[str, Counter[tuple[str, str]]]
    calls: dict[str, Counter[tuple[str, str]]]
    steps: Any = None  # of `iteration_steps`: the method's numbers, made where tensors have data

    def _choose_steps(self) -> None:
        self.table, scales = self.steps
        self.objective.use(self.table, scales)

    @contextmanager
    def _phase(self, name: str, total: int) -> Iterator[Any]:
        with self._watched(name), super()._phase(name, total) as tick:
            yield tick

    def _roll_out(self) -> Any:
        with self._watched("rollout"):
            return super()._roll_out()

    def _update(self, trajectories: Any) -> Any:
        with self._watched("optimizer"):  # what is no micro-step: the step, and the statistics behind all of them
            return super()._update(trajectories)

    @contextmanager
    def _watched(self, name: str) -> Iterator[None]:
        """Collectives and bytes inside belong to this phase, but for phases within it."""
        before = self.tracker.phase
        self.tracker.enter(name)
        counter, outer = CollectiveCounter(self.engine.groups), self.counter
        self.counter = counter
        with counter:
            yield
        self.counter = outer
        for total, seen in ((self.traffic, counter.bytes), (self.calls, counter.calls)):
            total.setdefault(name, Counter()).update(seen)
            if outer is not None:  # the phase around it sees these, too
                total.setdefault(before, Counter()).subtract(seen)
        self.tracker.enter(before)

    def _score(self, trajectories: Any) -> Any:
        with self._watched("decode"):
            return super()._score(trajectories)

    def _assign_advantages(self, *arguments: Any) -> None:
        with self._watched("reward"):
            super()._assign_advantages(*arguments)

    def _step(self, statistics: Any) -> list[float]:
        with self._watched("optimizer"):
            found = super()._step(statistics)
            for anchor in self.reference.anchors.values():
                anchor.finish()
        return found


def dry_run(
    config: Config, transformer: dict[str, Any], texts: tuple[Text, Text], gpus: int, rank: int, steps: int
) -> DryRun:
    """Rank `rank` of `gpus`; one iteration with `steps` denoising steps and one prompt on each replica.

    Raises UserError where a real run would be refused, and whatever a real run raises where shapes, groups or settings
    do not fit together.
    """
    check_world(rank, gpus)
    transformer = HunyuanVideoConfig.from_diffusers(transformer).to_diffusers()
    _check(config, gpus, transformer)
    config = shortened(config, gpus, steps, transformer)
    begin = time.perf_counter()
    _Trainer.steps = iteration_steps(config, 0)
    with fake_world(rank, gpus, transformer):
        groups = initialize_groups(config)
        tracker = Tracker()
        with tracker:
            engine = build_engine(config, groups)
            tracker.enter("optimizer state")
            ddp = wrap(engine.chunks, groups, config.optimizer.distributed)
            optimizer = build_optimizer(config, ddp, engine.dtype)
            prompt = Prompt("a prompt", _condition(texts[0], engine), _condition(texts[1], engine))
            tracker.enter("references")
            codec: Any = _Codec()
            trainer = _Trainer(engine, ddp, optimizer, [prompt], codec, _Reward(), Reporter(False))
            trainer.tracker, trainer.traffic, trainer.calls = tracker, {}, {}
            tracker.on_host(_host_tensors(config, trainer))
            trainer.noise_floor = object()  # type: ignore[assignment]  # what it measures needs numbers
            tracker.enter("between")
            trainer.run_iteration()
            tracker.enter("end")
        parameters = [p for chunk in engine.chunks for p in chunk.parameters()]
        return DryRun(
            rank=rank,
            world_size=gpus,
            steps=config.sampler.num_steps,
            places={key: getattr(groups, key) for key in PLACES},
            shapes=_shapes(engine, prompt),
            parameters=sum(p.numel() for p in parameters),
            trained=sum(p.numel() for p in parameters if p.requires_grad),
            peaks=dict(tracker.peaks),
            ends=tracker.ends,
            host=tracker.host,
            flops=_by_phase(tracker.flops),
            traffic={name: _named(found) for name, found in trainer.traffic.items()},
            calls={name: _named(found) for name, found in trainer.calls.items()},
            seconds=time.perf_counter() - begin,
        )


def shortened(config: Config, gpus: int, steps: int, transformer: dict[str, Any]) -> Config:
    """One prompt a replica and `steps` denoising steps, or the least number above that keeps all rules."""
    for number in range(min(steps, config.sampler.num_steps), config.sampler.num_steps):
        found = _shortened(config, gpus, number)
        with suppress(UserError):
            validate_layout(found, gpus, transformer)
            return found
    found = _shortened(config, gpus, config.sampler.num_steps)
    validate_layout(found, gpus, transformer)
    return found


def _shortened(config: Config, gpus: int, steps: int) -> Config:
    config = copy.deepcopy(config)
    parallel = config.parallel
    data = parallel.data or max(1, gpus // (parallel.tensor * parallel.context * parallel.pipeline))
    config.grpo.prompts_per_iteration = data
    config.sampler.num_steps = steps
    config.precision.compile = False  # the same operations and kept tensors; a compiler wants data
    window = config.sampler.sde_window
    if window.size is not None:
        window.size, window.start = min(window.size, config.sampler.num_steps), 0
    config.reward.url = config.reward.overlap_groups = None
    config.data.prompts, config.evaluation.prompts = "", None
    config.model.pretrained = config.model.pretrained or "none"
    config.model.weights = config.model.weights or "none"
    return config


def _check(config: Config, gpus: int, transformer: dict[str, Any]) -> None:
    validate_layout(config, gpus, transformer)
    if config.precision.fp8 != "none" or config.parallel.context_backend.startswith("te_"):
        raise UserError("--dry-run: Transformer Engine's kernels have no form without data; set precision.fp8=none and "
                        "parallel.context_backend=auto")  # fmt: skip
    if config.optimizer.offload == "deepspeed":
        raise UserError("--dry-run: DeepSpeed's kernel wants data; set optimizer.offload=hybrid")


def _condition(text: Text, engine: Any) -> TextCondition:
    model = engine.model_config
    sizes = (
        (text.qwen, model.text_embed_dim),
        (text.glyph, model.text_embed_2_dim),
        (text.image, model.image_embed_dim),
    )
    return TextCondition(*(torch.empty(1, tokens, width, dtype=engine.dtype) for tokens, width in sizes))


def _host_tensors(config: Config, trainer: Trainer) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for anchor in trainer.reference.anchors.values():
        if not getattr(anchor, "on_device", True):
            found += [unit.kept for unit in anchor._units]  # type: ignore[union-attr]
    if trainer.ema is not None and config.optimizer.ema_device == "host":
        found += trainer.ema.state_dict().values()
    if config.optimizer.offload != "none":
        for part in trainer.optimizer.chained_optimizers:  # type: ignore[attr-defined]
            inner = part.optimizer
            for optimizer in inner.sub_optimizers[: 1 if config.optimizer.offload_fraction < 1 else None]:
                for group in optimizer.param_groups:
                    found += group["params"]
                for state in optimizer.state.values():
                    found += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return found


def _shapes(engine: Any, prompt: Prompt) -> dict[str, list[int]]:
    network, config = engine.training_network(), engine.model_config
    batch, local = engine.config.sampler.micro_batch, engine.shape.shard.local
    found = {
        "latents_SBC": [local, batch, engine.shape.channels],
        "video_SBH": [local, batch, config.hidden_size],
        "packed_SBH": [network.all_packed_tokens(prompt), batch, config.hidden_size],
        "blocks": [len(chunk.transformer_blocks) for chunk in engine.chunks],
    }
    for name, parameter in next(iter(engine.chunks[0].transformer_blocks.values())).named_parameters():
        if name.endswith(".weight") and parameter.ndim == 2:
            found[name] = list(parameter.shape)
    return found


def _by_phase(flops: Counter[tuple[str, str]]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for (phase, kind), value in flops.items():
        found.setdefault(phase, {})[kind] = int(value)
    return found


def _named(counter: Counter[tuple[str, str]]) -> dict[str, int]:
    return {f"{operation} {group}": value for (operation, group), value in counter.items() if value}
