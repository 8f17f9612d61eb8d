"""Forward and backward of our DiT against diffusers', on the same weights, inputs and threads.

python -m benchmarks.dit [--only WORD ...] [--repeats 3] [--threads 2] [--slow] [--list]

Each case is a whole model (embedders, blocks, final layer) of one sample. diffusers gets what its pipeline gives it:
texts padded to the encoders' maximum, with masks. Ours gets the same texts without their padding. The outputs are
compared before anything is timed. Both sides run in turn; the ratio is ours / diffusers, repeat by repeat.

Bytes kept for the backward pass are counted by hooks on autograd's saved tensors, each storage once, parameters and
masks left out; the difference of models of three and two blocks, over the tokens that the side really has, is the
number per token and block.
"""

import argparse
import dataclasses
import gc
import json
import logging
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from megatron_sage.model import HunyuanVideoConfig, TextCondition
from megatron_sage.model.elementwise import kernels
from megatron_sage.parallel.kept import KeptBytes
from megatron_sage.planning.dry_run_tracker import Tracker

FULL: dict[str, Any] = {"num_attention_heads": 16, "attention_head_dim": 128, "rope_axes_dim": (16, 56, 56)}
TINY: dict[str, Any] = {"num_attention_heads": 4, "attention_head_dim": 32, "rope_axes_dim": (8, 12, 12)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    grid: tuple[int, int, int]  # latent frames, height, width
    words: tuple[int, int, int]  # valid tokens of Qwen, ByT5, image
    padded: tuple[int, int, int]  # what diffusers' pipeline fills them up to
    layers: int
    dtype: str = "bf16"
    wide: bool = True
    recompute: str = "none"
    compiled: bool = False  # ours once more with precision.compile
    once: bool = False  # a forward of each side, once: minutes

    def config(self, layers: int | None = None) -> dict[str, Any]:
        """A complete diffusers config.json; of full width with the released model's embeddings."""
        fields = {**(FULL if self.wide else TINY), "num_layers": layers or self.layers}
        if not self.wide:
            fields |= {"text_embed_dim": 64, "text_embed_2_dim": 48, "image_embed_dim": 32}
        fields["task_type"] = "i2v" if self.words[2] else "t2v"
        return HunyuanVideoConfig.from_diffusers(fields).to_diffusers()

    @property
    def video_tokens(self) -> int:
        """Of one sample."""
        return self.grid[0] * self.grid[1] * self.grid[2]


RELEASED, REAL, WHOLE = (1000, 256, 729), (280, 20, 0), (1000, 256, 729)
TINY_PADDED, TINY_REAL = (200, 64, 100), (40, 6, 0)
TINY_GRID, SMALL, REAL_GRID = (21, 4, 6), (21, 8, 14), (21, 30, 53)  # 81 frames of 64x96, 128x224, 480x848
CASES = [
    Case("tiny, 4 blocks, 64x96x81, short text", TINY_GRID, TINY_REAL, TINY_PADDED, 4, "fp32", False),
    Case("tiny, 4 blocks, 64x96x81, whole text", TINY_GRID, TINY_PADDED, TINY_PADDED, 4, "fp32", False),
    Case("tiny, 4 blocks, short text, recompute", TINY_GRID, TINY_REAL, TINY_PADDED, 4, "fp32", False, "full"),
    Case("1 block, 128x224x81, short text", SMALL, REAL, RELEASED, 1, "fp32"),
    Case("2 blocks, 128x224x81, whole text", SMALL, WHOLE, RELEASED, 2, "fp32"),
]
SLOW = [  # `--slow`: half an hour on two cores
    Case("tiny, 4 blocks, short text, compiled", TINY_GRID, TINY_REAL, TINY_PADDED, 4, "fp32", False, compiled=True),
    Case("2 blocks, 128x224x81, short text, recompute", SMALL, REAL, RELEASED, 2, "fp32", recompute="full"),
    Case("4 blocks, 128x224x81, short text", SMALL, REAL, RELEASED, 4, "fp32"),
    Case("1 block, 128x224x81, short text, bf16", SMALL, REAL, RELEASED, 1, "bf16"),
    Case("1 block, 480x848x81, short text", REAL_GRID, REAL, RELEASED, 1, "fp32", once=True),
]
KEPT = [  # bytes do not depend on the number of tokens: (dtype, recompute)
    ("bf16", "none"),
    ("bf16", "selective"),
    ("bf16", "full"),
    ("fp32", "none"),
]


class Sides:
    """Both models with the same weights, and their inputs."""

    def __init__(self, case: Case, layers: int | None = None) -> None:
        from diffusers import HunyuanVideo15Transformer3DModel

        from megatron_sage.checkpoint.keymap import KeyMap
        from megatron_sage.model.transformer import build_chunks
        from megatron_sage.parallel.groups import initialize

        self.case, self.dtype = case, DTYPES[case.dtype]
        config = case.config(layers)
        torch.manual_seed(0)
        self.theirs = HunyuanVideo15Transformer3DModel.from_config(config).to(self.dtype)
        settings = HunyuanVideoConfig.from_diffusers(config, dtype=self.dtype, recompute=case.recompute)
        (self.ours,) = build_chunks(settings, initialize().collection)
        weights = self.theirs.state_dict()
        state: dict[str, torch.Tensor] = {}
        for binding in KeyMap.from_config(config).bindings:
            parts = binding.convert([weights[name] for name in binding.diffusers], "diffusers", "ours")
            state.update(zip(binding.ours, parts, strict=True))
        self.ours.load_state_dict(state, strict=True)
        if case.recompute == "full":
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

    def compiled(self, yes: bool) -> None:
        """Ours with `precision.compile`, or without."""
        for module in self.ours.modules():
            if hasattr(module, "ops"):
                module.ops = kernels(yes)

    def run_theirs(self) -> torch.Tensor:
        (sample,) = self.theirs(**self.arguments, return_dict=False)
        return _tokens(sample)

    def run_ours(self) -> torch.Tensor:
        return self.ours(self.video_SBC, self.timestep, self.text, self.case.grid)

    def sides(self, backward: bool) -> dict[str, Callable[[], None]]:
        """What is timed: a forward without gradient, or a forward and its backward."""

        def call(run: Callable[[], torch.Tensor], model: torch.nn.Module, yes: bool) -> None:
            self.compiled(yes)
            if not backward:
                with torch.no_grad():
                    run()
                return
            model.zero_grad(set_to_none=True)
            run().backward(self.gradient_SBC)

        found = {
            "ours": partial(call, self.run_ours, self.ours, False),
            "diffusers": partial(call, self.run_theirs, self.theirs, False),
        }
        if self.case.compiled:
            found["compiled"] = partial(call, self.run_ours, self.ours, True)
        return found

    def error(self) -> float:
        """Largest difference of the outputs over the largest output."""
        with torch.no_grad():
            ours, theirs = self.run_ours().float(), self.run_theirs().float()
        return float((ours - theirs).abs().max() / theirs.abs().max())

    def peaks(self) -> dict[str, int]:
        """Most bytes of living tensors in a forward and its backward, beside weights and inputs."""
        found = {}
        for name in ("ours", "diffusers"):
            with Tracker() as tracker:
                self.sides(True)[name]()
            found[name] = max(tracker.peaks.values())
            for model in (self.ours, self.theirs):
                model.zero_grad(set_to_none=True)
        return found

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


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """Equality, seconds and ratios, counted peak."""
    sides = Sides(case)
    found: dict[str, Any] = {
        "case": case.name,
        "dtype": case.dtype,
        "recompute": case.recompute,
        "tokens": {"ours": sides.tokens("ours"), "diffusers": sides.tokens("theirs")},
        "error": sides.error(),
        "ratio": {},
        "seconds": {},
    }
    for name, backward in [("forward", False)] + ([] if case.once else [("forward + backward", True)]):
        if case.once:
            seconds = common.in_turn(sides.sides(backward), 1, warm=False)
        else:
            seconds = common.in_turn(sides.sides(backward), repeats if case.wide else 5 * repeats)  # milliseconds
        found["seconds"][name] = {side: min(values) for side, values in seconds.items()}
        found["ratio"][name] = {
            side: common.ratio(values, seconds["diffusers"]) for side, values in seconds.items() if side != "diffusers"
        }
    if not case.once:
        found["peak_bytes"] = sides.peaks()
    return found


def kept_bytes(dtype: str, recompute: str, grid: tuple[int, int, int] = (5, 12, 20)) -> dict[str, float]:
    """Of full width, per token and block."""
    found: dict[str, float] = {}
    for which in ("ours", "theirs"):
        if which == "theirs" and recompute == "selective":
            continue  # diffusers has no such thing
        kept = []
        for layers in (2, 3):
            sides = Sides(Case("", grid, REAL, (300, 30, 10), layers, dtype, recompute=recompute))
            kept.append(sides.kept(which))
        found[{"theirs": "diffusers"}.get(which, which)] = (kept[1] - kept[0]) / sides.tokens(which)
    return found


def _markdown(cases: list[dict[str, Any]], kept: list[dict[str, Any]]) -> str:
    def ratio(row: dict[str, Any], name: str, side: str = "ours") -> str:
        found = row["ratio"].get(name, {}).get(side)
        return "-" if found is None else f"{found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f})"

    rows = [
        [
            row["case"],
            row["dtype"],
            f"{row['tokens']['ours']:,} / {row['tokens']['diffusers']:,}",
            ratio(row, "forward"),
            ratio(row, "forward + backward"),
            " / ".join(f"{row['seconds'][list(row['seconds'])[-1]][side]:.3g}" for side in ("ours", "diffusers")),
            " / ".join(f"{row['peak_bytes'][side] / 1e6:,.0f}" for side in ("ours", "diffusers"))
            if "peak_bytes" in row
            else "-",
            f"{row['error']:.1e}",
        ]
        for row in cases
    ]
    header = ["case", "type", "tokens", "forward", "forward + backward", "seconds", "peak MB", "difference"]
    text = "Ours / diffusers: time, median of the ratios (smallest to largest).\n\n" + common.table(header, rows)
    compiled = [
        [row["case"], ratio(row, "forward", "compiled"), ratio(row, "forward + backward", "compiled")]
        for row in cases
        if "compiled" in row["ratio"]["forward"]
    ]
    if compiled:
        header = ["case", "forward", "forward + backward"]
        text += "\n`precision.compile`, ours / diffusers:\n\n" + common.table(header, compiled)
    if not kept:
        return text
    text += "\nKept for the backward pass, bytes per token and block of full width:\n\n" + common.table(
        ["type", "recompute", "ours", "diffusers"],
        [
            [k["dtype"], k["recompute"], *(f"{k[s]:,.0f}" if s in k else "-" for s in ("ours", "diffusers"))]
            for k in kept
        ],
    )
    return text


def main() -> None:
    """All cases; JSON and tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="words of the cases' names")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, help="torch's; all cores")
    parser.add_argument("--out", type=Path, help="folder of dit.json and dit.md (benchmarks/)")
    parser.add_argument("--slow", action="store_true", help="the larger cases instead: half an hour on two cores")
    parser.add_argument("--list", action="store_true", help="only the cases' names")
    options = parser.parse_args()
    cases = SLOW if options.slow else CASES
    chosen = [case for case in cases if not options.only or any(word in case.name for word in options.only)]
    if options.list or not chosen:
        sys.exit("\n".join(case.name for case in CASES + SLOW))
    if options.threads:
        torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)  # diffusers' advice about casting
    kinds = [] if options.slow else KEPT
    kept = [{"dtype": dtype, "recompute": recompute, **kept_bytes(dtype, recompute)} for dtype, recompute in kinds]
    found = []
    for case in chosen:
        found.append(measure(case, options.repeats))
        print(json.dumps(found[-1]), flush=True)
        gc.collect()
    content = {"cases": found} | ({"kept": kept} if kept else {})
    name, command = ("dit_slow", "dit --slow") if options.slow else ("dit", "dit")
    common.write(name, content, _markdown(found, kept), options.out, command)


if __name__ == "__main__":
    main()
