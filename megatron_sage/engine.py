"""Everything a run needs, built once: groups, policy, prompts with their text, codec, reward, step table."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, overload

import torch
import torch.distributed as dist

from megatron_sage import parallel  # noqa: F401  (CPU backend before Megatron)
from megatron_sage.checkpoint.distributed import load_weights
from megatron_sage.checkpoint.staging import on_all_ranks
from megatron_sage.conditioning.codec import DTYPES as VAE_DTYPES
from megatron_sage.conditioning.codec import VideoCodec
from megatron_sage.conditioning.embedding import ImageEmbedding, PromptEmbedding
from megatron_sage.conditioning.prepare import NEGATIVE, fill_cache, load_prompt, open_conditions, share
from megatron_sage.config import Config
from megatron_sage.config.layout import chunks_of_stage
from megatron_sage.config.model_defaults import is_image_to_video
from megatron_sage.data.prompts import PromptRow
from megatron_sage.errors import UserError
from megatron_sage.grpo.equalizer import gradient_scales
from megatron_sage.grpo.schedule import shifted_sigmas
from megatron_sage.grpo.sde import StepCoefficients, is_normalized, step_coefficients
from megatron_sage.grpo.window import window_steps, windowed
from megatron_sage.model.config import HunyuanVideoConfig
from megatron_sage.model.lora import add_adapters
from megatron_sage.model.lora_targets import AdapterSettings
from megatron_sage.model.precision import Quantisation
from megatron_sage.model.transformer import HunyuanVideoDiT, TextCondition, build_chunks
from megatron_sage.parallel import groups as process_groups
from megatron_sage.parallel.control import Control
from megatron_sage.parallel.device import device
from megatron_sage.parallel.groups import Groups
from megatron_sage.reporting.progress import Reporter
from megatron_sage.rollout.policy import Network, Prompt, VideoShape, image_channels
from megatron_sage.rollout.transitions import StepTable
from megatron_sage.training.precision import fp8_fields

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TEMPORAL, SPATIAL = 4, 16  # compression of the HunyuanVideo-1.5 VAE


@dataclass
class Engine:
    """The model and what surrounds it on this rank."""

    config: Config
    groups: Groups
    chunks: list[HunyuanVideoDiT]  # this rank's part of the policy; one, but under the interleaved schedule
    dtype: torch.dtype
    device: torch.device
    shape: VideoShape
    token_group: dist.ProcessGroup | None  # over which video tokens are split; None: every rank holds all
    control: Control = field(default_factory=Control)  # where this rank is; `train` puts one here that can stop it

    @property
    def model_config(self) -> HunyuanVideoConfig:
        """The policy's configuration, the same for all chunks."""
        return self.chunks[0].config

    @cached_property
    def quantisation(self) -> Quantisation:
        """The FP8 layers of the policy; none without FP8."""
        return Quantisation(self.chunks)

    def network(self, guidance: float | None = None) -> Network:
        """The policy with the run's guidance, or another."""
        scale = self.config.sampler.guidance_scale if guidance is None else guidance
        network = Network(self.chunks, self.shape, scale, self.device)
        network.control = self.control
        return network

    def rollout_network(self) -> Network:
        """The policy as the rollout runs it."""
        return self.network(1.0 if self.config.grpo.cfg_in_training == "off" else None)

    def training_network(self) -> Network:
        """The policy as it is trained, and as the reference is asked: both branches, or the conditional one."""
        return self.network(None if self.config.grpo.cfg_in_training == "on" else 1.0)

    def networks(self) -> dict[str, Network]:
        """Phase -> the policy as it is run there."""
        training = self.training_network()
        return {"rollout": self.rollout_network(), "reference pass": training, "training": training}

    def eval(self) -> None:
        """All chunks."""
        for chunk in self.chunks:
            chunk.eval()

    def train(self) -> None:
        """All chunks."""
        for chunk in self.chunks:
            chunk.train()


def collective_timeout(config: Config) -> int:
    """Seconds that a collective may wait: long enough for the watchdog to report a stall before it fails."""
    return max(1800, int(2 * (config.training.stall_seconds or 0)))


def initialize_groups(config: Config) -> Groups:
    """The process groups of the configured layout."""
    layout = config.parallel
    return process_groups.initialize(
        layout.tensor,
        layout.context,
        layout.pipeline,
        config.seed,
        collective_timeout(config),
        virtual_pipeline=chunks_of_stage(layout),
        hierarchical_context=layout.hierarchical_context,
    )


def model_config(config: Config, transformer: dict[str, Any]) -> HunyuanVideoConfig:
    """The policy's configuration at the configured layout and precision; UserError where they do not fit together."""
    layout = config.parallel
    return HunyuanVideoConfig.from_diffusers(
        transformer,
        tensor=layout.tensor,
        sequence_parallel=layout.sequence,
        context=layout.context,
        context_backend=layout.context_backend,
        pipeline=layout.pipeline,
        virtual_pipeline=layout.virtual_pipeline,
        pipeline_layout=layout.pipeline_layout,
        dtype=DTYPES[config.precision.dtype],
        recompute=config.precision.recompute,
        compile_elementwise=config.precision.compile,
        **fp8_fields(config.precision),
    )


def step_table(sde_type: str, num_steps: int, shift: float, eta: float) -> tuple[StepTable, StepCoefficients]:
    """Schedule and coefficients of one sampler."""
    sigmas = shifted_sigmas(num_steps, shift)
    coefficients = step_coefficients(sde_type, sigmas, eta)
    return StepTable.build(sigmas, coefficients, is_normalized(sde_type)), coefficients


def iteration_steps(config: Config, iteration: int) -> tuple[StepTable, list[float]]:
    """The numbers of each step and its gradient scale (1 without the equalizer) in one iteration's window."""
    sampler, window = config.sampler, config.sampler.sde_window
    sigmas = shifted_sigmas(sampler.num_steps, sampler.shift)
    coefficients = step_coefficients(sampler.sde_type, sigmas, sampler.eta)
    if window.size is not None:
        trained = coefficients.trained_steps()
        steps = window_steps(
            trained,
            window.size,
            window.stride,
            window.strategy,
            window.start,
            window.interval,
            config.seed,
            iteration,
        )
        coefficients = windowed(coefficients, sigmas, steps)
    normalized = is_normalized(sampler.sde_type)
    scales = gradient_scales(coefficients, normalized).tolist() if config.grpo.equalizer else [1.0] * len(sigmas)
    return StepTable.build(sigmas, coefficients, normalized), scales


def build_engine(config: Config, groups: Groups) -> Engine:
    """The policy with its weights, on this rank's device."""
    settings = model_config(config, read_transformer_config(config.model.pretrained))
    chunks = build_chunks(settings, groups.collection)
    assert config.model.weights is not None  # validated
    load_weights(chunks, config.model.weights)
    if config.lora.rank is not None:
        add_adapters(chunks, adapter_settings(config, config.lora.rank))
    video = config.video
    grid = ((video.frames - 1) // TEMPORAL + 1, video.height // SPATIAL, video.width // SPATIAL)
    shape = VideoShape(grid, settings.out_channels, chunks[0].image_shard(grid))
    return Engine(config, groups, chunks, settings.params_dtype, device(), shape, chunks[0].token_group)


def adapter_settings(config: Config, rank: int) -> AdapterSettings:
    """The adapters of `lora`; alpha null is the rank."""
    alpha = float(rank) if config.lora.alpha is None else config.lora.alpha
    return AdapterSettings(rank, alpha, tuple(config.lora.targets), config.seed)


def read_transformer_config(pretrained: str) -> dict[str, Any]:
    """`transformer/config.json` of a diffusers directory."""
    return json.loads((Path(pretrained) / "transformer" / "config.json").read_text())


def load_codec(config: Config) -> VideoCodec:
    """The VAE on this rank's device, as `vae` says; auto: float32 on a CPU and the run's dtype on a GPU."""
    target, name = device(), config.vae.dtype
    if name == "auto":
        name = "fp32" if target.type == "cpu" else config.precision.dtype
    folder = Path(config.model.pretrained) / "vae"
    return VideoCodec.from_pretrained(folder, target, VAE_DTYPES[name], config.vae.tiling)


def prepare_embeddings(config: Config, groups: Groups, rows: Sequence[PromptRow], negative: str = "") -> None:
    """Let the embedding cache hold all that `rows` need, each rank making its share of what is missing; all ranks call.

    Before `build_engine`: the encoders are as large as the policy and are gone again when this returns. With a full
    cache (`megatron-sage encode`) none is loaded.

    Raises:
        UserError: on all ranks, in one line, for what one of them cannot encode.
    """
    with on_all_ranks():
        check_task(config, rows)
        rows = [PromptRow(negative or NEGATIVE.text), *rows]
        texts, pictures = share(rows, groups.rank, groups.world_size)
        with Reporter(groups.rank == 0).bar("encode", len(texts) + len(pictures)) as tick:
            fill_cache(config, rows, groups.rank, groups.world_size, device(), tick)


def check_task(config: Config, rows: Sequence[PromptRow]) -> None:
    """An image-to-video model wants an image for every prompt, a text-to-video model none: UserError."""
    wanted = is_image_to_video(config.model.pretrained)
    for number, row in enumerate(rows, 1):
        if (row.image is not None) != wanted:
            kind = (
                "image-to-video: every prompt needs an image"
                if wanted
                else "text-to-video: no prompt may have an image"
            )
            raise UserError(
                f"prompt {number} ({row.text[:60]!r}): {config.model.pretrained} is {kind}; change one of them"
            )


class Prompts(Sequence[Prompt]):
    """Prompts on this rank's device, read from the embedding cache when they are asked for.

    All of a large file would not fit: one of 300 tokens takes 2 MB. The last `KEPT` stay.
    """

    KEPT = 64

    def __init__(self, rows: Sequence[PromptRow], read: Callable[[PromptRow], Prompt]) -> None:
        """`read` should remember what it has read."""
        self.rows, self.read = list(rows), read

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, place: int) -> Prompt: ...

    @overload
    def __getitem__(self, place: slice) -> "Prompts": ...

    def __getitem__(self, place: int | slice) -> "Prompt | Prompts":
        return Prompts(self.rows[place], self.read) if isinstance(place, slice) else self.read(self.rows[place])


def encode_prompts(config: Config, engine: Engine, rows: Sequence[PromptRow], negative: str = "") -> Prompts:
    """The rows' conditioning out of the embedding cache (`prepare_embeddings`).

    `negative`: what the unconditional branch reads; it must be in the cache as well, the empty one always is.
    """
    unconditional = PromptRow(negative or NEGATIVE.text)
    conditions = open_conditions(config, [unconditional, *rows])
    without, _ = load_prompt(config, unconditional, conditions)
    shared = _condition(without, None, engine)  # one object, so that a pass embeds it once for all prompts

    @lru_cache(maxsize=Prompts.KEPT)
    def read(row: PromptRow) -> Prompt:
        text, image = load_prompt(config, row, conditions)
        first_frame, other = None, shared
        if image is not None:
            first_frame = image_channels(image.first_frame, engine.shape).to(engine.device)
            other = _condition(without, image, engine)
        return Prompt(row.text, _condition(text, image, engine), other, first_frame)

    return Prompts(rows, read)


def _condition(text: PromptEmbedding, image: ImageEmbedding | None, engine: Engine) -> TextCondition:
    """One text without its padding tokens, batch 1, on the device; with the image's tokens in image-to-video."""
    text = text.valid()
    tokens = torch.zeros(0, engine.model_config.image_embed_dim) if image is None else image.image_embeds
    streams = (text.encoder_hidden_states, text.encoder_hidden_states_2, tokens)
    return TextCondition(*(x[None].to(engine.device, engine.dtype) for x in streams))
