"""Models with random weights, inputs of the right shapes, and what the planner says of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.gpu.bench import TYPE, Bench
from benchmarks.gpu.sizes import tokens
from megatron_sage.grpo.schedule import shifted_sigmas
from megatron_sage.grpo.sde import step_coefficients
from megatron_sage.model import HunyuanVideoConfig, HunyuanVideoDiT, TextCondition
from megatron_sage.parallel.kept import KeptBytes
from megatron_sage.planning.flops import Flops, StageFlops, Text, stage_flops
from megatron_sage.planning.saved import block_bytes
from megatron_sage.planning.traffic import Place
from megatron_sage.rollout.policy import Network, Prompt, VideoShape
from megatron_sage.rollout.transitions import StepTable

Grid = tuple[int, int, int]


def config_of(bench: Bench, blocks: int, **options: Any) -> HunyuanVideoConfig:
    """Of a model with so many blocks, bf16."""
    transformer = {**bench.sizes.transformer, "num_layers": blocks}
    return HunyuanVideoConfig.from_diffusers(transformer, dtype=TYPE, **options)


def random_dit(bench: Bench, blocks: int, **options: Any) -> HunyuanVideoDiT:
    """A model none of whose parameters is zero: a new one's gates are, and its blocks would do nothing."""
    dit = HunyuanVideoDiT(config_of(bench, blocks, **options), bench.groups.collection)
    with torch.no_grad():
        for parameter in dit.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.add_(torch.randn_like(parameter), alpha=scale)
    return dit.eval()


def random_text(bench: Bench, words: int) -> TextCondition:
    """Of one sample: Qwen's tokens alone."""
    config = config_of(bench, 1)
    widths = (config.text_embed_dim, config.text_embed_2_dim, config.image_embed_dim)
    return TextCondition(*(bench.random(1, n, width) for n, width in zip((words, 0, 0), widths, strict=True)))


def random_prompt(bench: Bench) -> Prompt:
    """The conditional branch's text, and a short one."""
    return Prompt("", random_text(bench, bench.sizes.text), random_text(bench, bench.sizes.unconditional))


def network_of(bench: Bench, dit: HunyuanVideoDiT, grid: Grid) -> Network:
    """With guidance: two branches."""
    shape = VideoShape(grid, dit.config.out_channels, dit.image_shard(grid))
    return Network([dit], shape, 6.0, bench.device)


def sde_table(steps: int) -> StepTable:
    """The paper's sampler at 480p's shift."""
    sigmas = shifted_sigmas(steps, 5.0)
    return StepTable.build(sigmas, step_coefficients("sage_grpo", sigmas, 0.5))


def place_of(config: HunyuanVideoConfig, grid: Grid) -> Place:
    """One rank, one video."""
    return Place(config, 0, tokens(grid), 1)


def model_flops(bench: Bench, config: HunyuanVideoConfig, grid: Grid) -> float:
    """Of one velocity, both branches."""
    texts = (Text(bench.sizes.text), Text(bench.sizes.unconditional))
    return sum(stage_flops(place_of(config, grid), text).forward.total for text in texts)


@dataclass
class Chain:
    """`blocks` equal blocks of a model, one behind the other, with inputs; none of them is the model's last."""

    bench: Bench
    dit: HunyuanVideoDiT
    grid: Grid
    blocks: int
    compiled: list[Any] | None = None
    image: torch.Tensor = field(init=False)
    text: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        bench, hidden = self.bench, self.dit.config.hidden_size
        self.words = random_text(bench, bench.sizes.text)
        self.layout = self.dit._layout(self.grid, self.words, bench.device)
        # as behind other blocks: padded (FP8), and every input wants a gradient
        self.image = bench.random(self.layout.image.local, 1, hidden).requires_grad_()
        self.text = bench.random(self.layout.text.local, 1, hidden).requires_grad_()
        self.temb = bench.random(1, hidden).requires_grad_()
        self.gradients = bench.random(*self.image.shape), bench.random(*self.text.shape)

    @property
    def modules(self) -> list[Any]:
        """The blocks, or what stands for them."""
        return self.compiled or list(self.dit.transformer_blocks.values())[: self.blocks]

    def run(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Forward."""
        image, text = self.image, self.text
        for block in self.modules:
            image, text = block(image, text, self.temb, self.layout)
        return image, text

    @torch.no_grad()
    def forward(self) -> None:
        """Without gradient."""
        self.run()

    def forward_backward(self) -> None:
        """Gradients are added to those that are there, as in training."""
        torch.autograd.backward(self.run(), self.gradients)

    def kept_bytes(self) -> int:
        """Counted: what a forward keeps for the backward; neither parameters nor what is there anyway."""
        known = (*self.dit.parameters(), *self.layout.rotations, self.temb)
        with KeptBytes(known) as kept:
            out = self.run()
        del out
        return kept.total

    @property
    def recompute(self) -> str:
        """none, selective or full."""
        return self.dit.config.recompute_granularity or "none"

    def flops(self) -> StageFlops:
        """By the planner."""
        return chain_flops(self.bench, self.grid, self.blocks, self.recompute)

    def kept_formula(self) -> float:
        """By the planner: what autograd keeps."""
        return chain_bytes(self.bench, place_of(self.dit.config, self.grid), self.blocks)


def chain_flops(bench: Bench, grid: Grid, blocks: int, recompute: str = "none") -> StageFlops:
    """By the planner: a model with one block more, less the model of its last block alone."""
    more, least = (
        stage_flops(place_of(config_of(bench, n, recompute=recompute), grid), Text(bench.sizes.text))
        for n in (blocks + 1, 1)
    )
    return StageFlops(
        *(_less(getattr(more, k), getattr(least, k)) for k in ("forward", "backward", "again", "embedding"))
    )


def chain_bytes(bench: Bench, place: Place, blocks: int) -> float:
    """By the planner: what autograd keeps of so many blocks."""
    return blocks * block_bytes(place, bench.sizes.text, False)


def _less(a: Flops, b: Flops) -> Flops:
    return a + b.times(-1)


@contextmanager
def counted_forwards(modules: list[torch.nn.Module]) -> Iterator[list[int]]:
    """The single number inside counts the modules' forwards."""
    count = [0]

    def hook(*args: object) -> None:
        count[0] += 1

    handles = [module.register_forward_hook(hook) for module in modules]
    yield count
    for handle in handles:
        handle.remove()
