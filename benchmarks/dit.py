"""Forward and backward of our DiT against diffusers', on the same weights, inputs and threads.

python -m benchmarks.dit [--only NAME ...] [--repeats 3] [--list] [--small]

Each case is a whole model (embedders, blocks, final layer) of one sample. diffusers gets what its pipeline gives it:
texts padded to the encoders' maximum, with masks. Ours gets the same texts without their padding. The outputs are
compared before anything is timed. Both sides run in turn; the ratio is ours / diffusers, repeat by repeat.

Bytes kept for the backward pass are counted by hooks on autograd's saved tensors, each storage once, parameters and
masks left out; the difference of models of three and two blocks, over the tokens that the side really has, is the
number per token and block.
"""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import common
from megatron_sage.model import HunyuanVideoConfig, TextCondition
from megatron_sage.parallel.kept import KeptBytes

FULL = {"num_attention_heads": 16, "attention_head_dim": 128, "rope_axes_dim": (16, 56, 56)}
TINY = {"num_attention_heads": 4, "attention_head_dim": 32, "rope_axes_dim": (8, 12, 12)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    grid: tuple[int, int, int]  # latent frames, height, width
    words: tuple[int, int, int]  # valid tokens of Qwen, ByT5, image
    padded: tuple[int, int, int]  # what diffusers' pipeline fills them up to
    layers: int = 1
    dtype: str = "fp32"
    width: str = "full"
    refiner_layers: int = 2
    backward: bool = True
    repeats: int | None = None

    def config(self, layers: int | None = None) -> dict[str, Any]:
        """A complete diffusers config.json, embedding widths of the released model."""
        width = FULL if self.width == "full" else TINY
        sizes = {"text_embed_dim": 3584, "text_embed_2_dim": 1472, "image_embed_dim": 1152}
        if self.width == "tiny":
            sizes = {"text_embed_dim": 64, "text_embed_2_dim": 48, "image_embed_dim": 32}
        task = "i2v" if self.words[2] else "t2v"
        found = {"num_layers": layers or self.layers, "num_refiner_layers": self.refiner_layers, "task_type": task}
        return HunyuanVideoConfig.from_diffusers({**width, **sizes, **found}).to_diffusers()

    @property
    def video_tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]


RELEASED, REAL, FULL_TEXT = (1000, 256, 729), (280, 20, 0), (1000, 256, 729)
SMALL_GRID = (21, 12, 20)  # 81 frames of 192 x 320
CASES = [
    Case("tiny, 81 frames, short text", (21, 4, 6), (40, 6, 0), (200, 64, 100), 4, width="tiny"),
    Case("tiny, 81 frames, full text", (21, 4, 6), (200, 64, 100), (200, 64, 100), 4, width="tiny"),
    Case("1 block, 192x320x81, short text", SMALL_GRID, REAL, RELEASED, 1),
    Case("1 block, 192x320x81, full text", SMALL_GRID, FULL_TEXT, RELEASED, 1),
    Case("4 blocks, 192x320x81, short text", SMALL_GRID, REAL, RELEASED, 4, dtype="bf16"),
    Case("4 blocks, 192x320x81, full text", SMALL_GRID, FULL_TEXT, RELEASED, 4, dtype="bf16"),
    Case("1 block, 480x848x81, short text", (21, 30, 53), REAL, RELEASED, 1, dtype="bf16", repeats=1),
]


class Sides:
    """Both models with the same weights, and their inputs."""

    def __init__(self, case: Case, recompute: str = "none", layers: int | None = None) -> None:
        from diffusers import HunyuanVideo15Transformer3DModel

        from megatron_sage.checkpoint.keymap import KeyMap
        from megatron_sage.model.transformer import build_chunks
        from megatron_sage.parallel.groups import initialize

        self.case, self.dtype = case, DTYPES[case.dtype]
        config = case.config(layers)
        torch.manual_seed(0)
        self.theirs = HunyuanVideo15Transformer3DModel.from_config(config).to(self.dtype)
        options = {"full": {"recompute": "full"}, "selective": {"recompute": "selective"}}.get(recompute, {})
        settings = HunyuanVideoConfig.from_diffusers(config, dtype=self.dtype, **options)
        (self.ours,) = build_chunks(settings, initialize().collection)
        weights = self.theirs.state_dict()
        state: dict[str, torch.Tensor] = {}
        for binding in KeyMap.from_config(config).bindings:
            parts = binding.convert([weights[name] for name in binding.diffusers], "diffusers", "ours")
            state.update(zip(binding.ours, parts, strict=True))
        self.ours.load_state_dict(state, strict=True)
        if recompute == "full":
            self.theirs.enable_gradient_checkpointing()
        self.theirs.train()
        self.ours.train()
        self._inputs(config)

    def _inputs(self, config: dict[str, Any]) -> None:
        case, generator = self.case, torch.Generator().manual_seed(1)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(self.dtype)

        def mask(valid: int, padded: int) -> torch.Tensor:
            return (torch.arange(padded)[None] < valid).long()

        (qwen, byt5, image), (pad_qwen, pad_byt5, pad_image) = case.words, case.padded
        self.timestep = torch.tensor([936.0])  # bf16 represents it: diffusers casts the time to the weights' type
        self.arguments = {
            "hidden_states": normal(1, config["in_channels"], *case.grid),
            "timestep": self.timestep.to(self.dtype),
            "encoder_hidden_states": normal(1, pad_qwen, config["text_embed_dim"]),
            "encoder_attention_mask": mask(qwen, pad_qwen),
            "encoder_hidden_states_2": normal(1, pad_byt5, config["text_embed_2_dim"]),
            "encoder_attention_mask_2": mask(byt5, pad_byt5),
            "image_embeds": normal(1, pad_image, config["image_embed_dim"]) * float(image > 0),
        }
        self.gradient = normal(1, config["out_channels"], *case.grid)
        self.text = TextCondition(
            self.arguments["encoder_hidden_states"][:, :qwen],
            self.arguments["encoder_hidden_states_2"][:, :byt5],
            self.arguments["image_embeds"][:, :image],
        )
        self.video_SBC = _tokens(self.arguments["hidden_states"])
        self.gradient_SBC = _tokens(self.gradient)

    def run_theirs(self) -> torch.Tensor:
        (sample,) = self.theirs(**self.arguments, return_dict=False)
        return _tokens(sample)

    def run_ours(self) -> torch.Tensor:
        return self.ours(self.video_SBC, self.timestep, self.text, self.case.grid)

    def forward(self, which: str) -> Callable[[], torch.Tensor]:
        run = self.run_ours if which == "ours" else self.run_theirs

        def call() -> torch.Tensor:
            with torch.no_grad():
                return run()

        return call

    def both_ways(self, which: str) -> Callable[[], None]:
        run, model = (self.run_ours, self.ours) if which == "ours" else (self.run_theirs, self.theirs)

        def call() -> None:
            model.zero_grad(set_to_none=True)
            run().backward(self.gradient_SBC)

        return call

    def tokens(self, which: str) -> int:
        """Of all streams, as the side computes them: diffusers' with its padding."""
        return self.case.video_tokens + sum(self.case.words if which == "ours" else self.case.padded)

    def kept(self, which: str) -> int:
        """Bytes of what autograd keeps, each storage once, without parameters and masks."""
        run, model = (self.run_ours, self.ours) if which == "ours" else (self.run_theirs, self.theirs)
        with KeptBytes(model.parameters(), lambda x: x.dtype is not torch.bool) as kept:
            out = run()
        assert out.requires_grad
        return kept.total


def _tokens(video_BCTHW: torch.Tensor) -> torch.Tensor:
    return video_BCTHW.flatten(2).permute(2, 0, 1).contiguous()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile")
    options = parser.parse_args()
    for case in CASES:
        if options.only and not any(word in case.name for word in options.only):
            continue
        sides = Sides(case)
        a, b = sides.forward("ours")(), sides.forward("theirs")()
        print(case.name, "error", float((a - b).abs().max() / b.abs().max()), flush=True)
        for name, make in (("forward", sides.forward), ("fwd+bwd", sides.both_ways)):
            s = common.in_turn({w: make(w) for w in ("ours", "theirs")}, options.repeats)
            print(name, {k: min(v) for k, v in s.items()}, common.ratio(s["ours"], s["theirs"]), flush=True)
        if options.profile:
            from torch.profiler import ProfilerActivity, profile

            for which in ("ours", "theirs"):
                with profile(activities=[ProfilerActivity.CPU]) as prof:
                    sides.both_ways(which)()
                print(
                    which,
                    prof.key_averages().table(sort_by="self_cpu_time_total", row_limit=22, max_name_column_width=48),
                    flush=True,
                )


if __name__ == "__main__":
    main()
