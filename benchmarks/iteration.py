"""A whole SAGE-GRPO iteration: ours against a straightforward loop on diffusers' model (`benchmarks/public_loop.py`).

python -m benchmarks.iteration [--cases NAME ...] [--repeats 3] [--small] [--out FOLDER]

Both sides train the same model on the same prompts with the same noise, rewards, order and optimizer, so they must
show the same ratios and gradient norms in every iteration; the benchmark ends where they do not. Rewards are stubbed:
nothing is decoded. The sides run in turn, iteration by iteration, each phase is timed by itself, and what is reported
is the ratio ours / loop. Forwards, videos, runs of the text refiner and operations are counted in the first iteration,
without our measurement of the noise floor, which a run makes once.

Padding decides much at these sizes, where a video has a few hundred tokens. The case "least padding" pads to the
longest prompt alone, and the last table says what padding costs at the released model's sizes.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from benchmarks.public_loop import PublicLoop
from benchmarks.sides import LOOP, PHASES, Padding, Side, our_side, public_side

ROOT = Path(__file__).parents[1]
COUNTED = ("forwards", "videos", "refiner_runs", "refiner_texts", "flops")
# largest difference between the sides: of the ratios, and of the gradient norm relative to it
TOLERANCES = {"ratio/min": 1e-5, "ratio/max": 1e-5, "grad_norm": 1e-3}
ONE_BY_ONE = {"sampler.micro_batch": 1, "grpo.replay_batch": 1}
GROUPED = {"sampler.micro_batch": 4, "grpo.replay_batch": 1}
BATCHED = {"sampler.micro_batch": 4, "grpo.replay_batch": 4}


@dataclass(frozen=True)
class Case:
    """One comparison: a world, its settings, and the fastest of those settings of ours that change the speed alone."""

    name: str
    world: Callable[[Path], tuple[Path, Path]]  # folder -> diffusers directory, prompt file; folder/megatron beside
    padding: Padding | None  # None: to the longest prompt
    settings: dict[str, Any]
    best: dict[str, Any]
    most_repeats: int = 10

    @property
    def ours(self) -> dict[str, dict[str, Any]]:
        """Name of a side -> its settings."""
        return {"ours": self.best, "ours, one by one": ONE_BY_ONE}


def tiny_world(folder: Path) -> tuple[Path, Path]:
    """examples/tiny_world."""
    from megatron_sage.checkpoint.convert import hf_to_megatron

    source = ROOT / "examples" / "tiny_world"
    hf_to_megatron(source / "model", folder / "megatron")
    return source / "model", source / "prompts_train.txt"


def wide_world(folder: Path) -> tuple[Path, Path]:
    """Random, a quarter as wide as the released model, 4 blocks; prompts of 45 to 75 words, half with a title."""
    from megatron_sage.conditioning.words import WordEncoder
    from tests.training import world

    width = {"num_attention_heads": 4, "attention_head_dim": 128, "rope_axes_dim": (16, 56, 56)}
    texts = {"text_embed_dim": 896, "text_embed_2_dim": 368, "image_embed_dim": 288}
    root = world.build(folder, matrix_scale=0.5, num_layers=4, num_refiner_layers=1, **width, **texts)
    WordEncoder(texts["text_embed_dim"], texts["text_embed_2_dim"]).save_pretrained(root / "text_encoder")
    rng, words = np.random.default_rng(0), "a the of slow bright river falls under light camera moves while".split()
    lines = [" ".join(rng.choice(words, rng.integers(45, 76))) for _ in range(8)]
    titled = [f'{line} a sign says "scene {number}"' if number % 2 else line for number, line in enumerate(lines)]
    (folder / "prompts.txt").write_text("\n".join(titled) + "\n")
    return root, folder / "prompts.txt"


def random_world(folder: Path) -> tuple[Path, Path]:
    """The tests' own."""
    from tests.training import world

    return world.build(folder), folder / "prompts.txt"


BASE: dict[str, Any] = {
    "precision.dtype": "fp32",
    "sampler.shift": 5,
    "sampler.guidance_scale": 6,
    "grpo.group_size": 4,
    "kl.strategy": "dual",
    "kl.anchor_interval": 3,
    "seed": 1,
}
TINY = {"video.frames": 81, "video.height": 32, "video.width": 48, "sampler.num_steps": 4, "sampler.shift": 3}
WIDE = {"video.frames": 81, "video.height": 64, "video.width": 80, "sampler.num_steps": 2}
LEAST = {"video.frames": 17, "video.height": 16, "video.width": 48, "sampler.num_steps": 2, "kl.anchor_interval": 1}
CASES = (
    # 32 to 23 as 1000 to 729. No glyphs: their MLP is 2048 wide in every model, here it would be most of the work
    Case("tiny world", tiny_world, Padding(32, 0, 23), TINY, BATCHED),
    Case("tiny world, least padding", tiny_world, None, TINY, BATCHED),
    Case("hidden 512", wide_world, Padding(256, 64, 187), WIDE, GROUPED, 2),  # a quarter of 1000, 256 and 729
    Case("hidden 512, least padding", wide_world, None, WIDE, GROUPED, 2),
)
SMALL = (Case("small", random_world, Padding(16, 8, 5), LEAST, BATCHED),)


def measure(case: Case, repeats: int, folder: Path) -> dict[str, Any]:
    """Counts, seconds and ratios of one case; `folder` is made."""
    folder.mkdir(parents=True)
    print(case.name, flush=True)
    pretrained, prompts = case.world(folder)
    shared = BASE | case.settings
    paths = {"model.pretrained": pretrained, "model.weights": folder / "megatron", "data.prompts": prompts}
    theirs, loop = public_side(_arguments(shared, paths, folder / "loop"), case.padding)
    sides, trainer = {LOOP: theirs}, None
    for number, (name, changes) in enumerate(case.ours.items()):
        sides[name], trainer = our_side(name, _arguments(shared | changes, paths, folder / f"ours{number}"))
    assert trainer is not None
    seconds = common.in_turn({name: side.__call__ for name, side in sides.items()}, min(repeats, case.most_repeats))
    ours = {name: side for name, side in sides.items() if side is not theirs}
    return {
        "case": case.name,
        "settings": shared,
        "sides": case.ours,
        "padding": _positions(loop),
        "video_tokens": trainer.engine.shape.shard.num_tokens,
        "text_tokens": _text_tokens(trainer),
        "parameters": sum(p.numel() for p in loop.parameters),
        "reference_bytes": reference_bytes(trainer),
        "disagreement": {name: disagreement(side.rows, theirs.rows) for name, side in ours.items()},
        "counts": {name: {phase: dict(found) for phase, found in side.counts.items()} for name, side in sides.items()},
        "seconds": {name: _medians(side) for name, side in sides.items()},
        "ratios": {
            name: {"total": common.ratio(seconds[name], seconds[LOOP])} | _phase_ratios(side, theirs)
            for name, side in ours.items()
        },
    }


def _arguments(settings: dict[str, Any], paths: dict[str, Path], folder: Path) -> list[str]:
    return [f"{key}={value}" for key, value in (settings | paths | {"output_dir": folder}).items()]


def _positions(loop: PublicLoop) -> dict[str, int]:
    """Of the text in every forward."""
    names = {"qwen": "encoder_hidden_states", "byt5": "encoder_hidden_states_2", "image": "image_embeds"}
    return {name: loop.negative[argument].shape[1] for name, argument in names.items()}


def _text_tokens(trainer: Any) -> list[int]:
    """[fewest, most] valid tokens of a prompt."""
    texts = [prompt.conditional for prompt in trainer.prompts]
    lengths = [sum(x.shape[1] for x in (text.qwen_BLD, text.byt5_BLD, text.image_BLD)) for text in texts]
    return [min(lengths), max(lengths)]


def _medians(side: Side) -> dict[str, float]:
    return {phase: statistics.median(one[phase] for one in side.seconds) for phase in (*PHASES, "total")}


def _phase_ratios(ours: Side, theirs: Side) -> dict[str, dict[str, float]]:
    columns = {phase: [[one[phase] for one in side.seconds] for side in (ours, theirs)] for phase in PHASES}
    return {phase: common.ratio(*column) for phase, column in columns.items()}


def disagreement(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Largest difference over the iterations; RuntimeError where the two did not compute the same."""
    found = {}
    for key, tolerance in TOLERANCES.items():
        scales = [abs(row[key]) if key == "grad_norm" else 1.0 for row in theirs]
        found[key] = max(abs(a[key] - b[key]) / scale for a, b, scale in zip(ours, theirs, scales, strict=True))
        if not found[key] <= tolerance:
            raise RuntimeError(f"{key} differs by {found[key]:.1e}, more than {tolerance}: not the same computation")
    return found


def reference_bytes(trainer: Any) -> dict[str, int]:
    """The loop keeps a second model on the device; ours one on the host, streamed through two slots of a block."""
    (chunk,), (anchor,) = trainer.engine.chunks, trainer.reference.anchors.values()
    blocks = [sum(p.nbytes for p in block.parameters()) for block in chunk.transformer_blocks.values()]
    everything = sum(p.nbytes for p in chunk.parameters())
    return {
        "public loop, device, always": everything,
        "ours, host, always": anchor.kept_bytes,
        "ours, device, reference pass only": everything - sum(blocks) + 2 * max(blocks),
    }


def padded_flops(transformer: dict[str, Any], video_tokens: int, padding: Padding) -> float:
    """One forward of one video through diffusers' model.

    Ours of a text as long as the padding, and what ours leaves out: what the last block's text becomes behind its keys
    and values, and the image projection of no image.
    """
    from megatron_sage.model.config import HunyuanVideoConfig
    from megatron_sage.planning.flops import Text, model_forward

    config = HunyuanVideoConfig.from_diffusers(transformer)
    text = Text(padding.qwen, padding.byt5, padding.image)
    width, tokens = config.hidden_size, text.total
    tail = 2 * tokens * width * (width + 2 * config.ffn_hidden_size) + 4 * tokens * (video_tokens + tokens) * width
    return model_forward(config, video_tokens, text).total + tail


def at_real_sizes() -> list[dict[str, Any]]:
    """Formulas for the released model: operations of both branches of one step, padded, or of 300 and 1 tokens."""
    from megatron_sage.model.config import HunyuanVideoConfig
    from megatron_sage.planning.flops import Text, model_forward

    config, rows = HunyuanVideoConfig.from_diffusers({}), []
    for size, grid in (("480x848x81", (21, 30, 53)), ("720x1280x81", (21, 45, 80)), ("720x1280x121", (31, 45, 80))):
        tokens = grid[0] * grid[1] * grid[2]
        padded = 2 * padded_flops({}, tokens, Padding())
        ours = sum(model_forward(config, tokens, Text(words)).total for words in (300, 1))
        mask = (tokens + sum(vars(Padding()).values())) ** 2
        rows.append({"size": size, "padded": padded, "ours": ours, "ratio": ours / padded, "mask_bytes": mask})
    return rows


def markdown(results: Sequence[dict[str, Any]], real: Sequence[dict[str, Any]]) -> str:
    """All tables."""
    times = []
    for result in results:
        loop = result["seconds"][LOOP]
        shares = [f"{loop[phase] / loop['total']:.0%}" for phase in (*PHASES, "total")]
        times.append([result["case"], f"{LOOP}: share of its iteration", *shares])
        for name, found in result["ratios"].items():
            times.append([result["case"], name, *(_spread(found[phase]) for phase in (*PHASES, "total"))])
    counts = [
        [result["case"], name, phase, *(_figure(found.get(what, 0)) for what in COUNTED)]
        for result in results
        for name, phases in result["counts"].items()
        for phase, found in phases.items()
        if phase != "optimizer"
    ]
    held = [[r["case"], *(f"{size / 1e6:.1f} MB" for size in r["reference_bytes"].values())] for r in results]
    sizes = [
        [r["size"], f"{r['padded'] / 1e15:.3f}", f"{r['ours'] / 1e15:.3f}", f"{r['ratio']:.3f}"]
        + [f"{r['mask_bytes'] / 1e9:.2f} GB"]
        for r in real
    ]
    described = "\n".join(_described(result) for result in results)
    return "\n".join(
        [
            f"## Cases\n\n{described}\n",
            "## Seconds, ours / public loop: median (smallest to largest)\n",
            common.table(["case", "side", *PHASES, "total"], times),
            "## Counts of one iteration\n",
            common.table(["case", "side", "phase", *(what.replace("_", " ") for what in COUNTED)], counts),
            "## The reference's weights\n",
            common.table(["case", *results[0]["reference_bytes"]], held),
            "## What padding costs the released model (formulas): PFLOP of a guided velocity, forward\n",
            common.table(["size", "padded, 1985 text positions", "300 and 1", "ratio", "one mask S x S"], sizes),
        ]
    )


def _described(result: dict[str, Any]) -> str:
    padding, words = " + ".join(map(str, result["padding"].values())), result["text_tokens"]
    settings = ", ".join(f"{key}={value}" for key, value in (result["settings"] | result["sides"]["ours"]).items())
    differences = [found for side in result["disagreement"].values() for found in side.values()]
    return (
        f"- **{result['case']}**: {result['parameters'] / 1e6:.1f} M parameters, {result['video_tokens']} video "
        f"tokens, texts of {words[0]} to {words[1]} tokens padded to {padding}; {settings}. Largest difference between "
        f"the sides: {max(differences):.1e}."
    )


def _spread(found: dict[str, float]) -> str:
    return f"{found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f})"


def _figure(value: int) -> str:
    return f"{value / 1e9:.2f} G" if value >= 1e7 else str(value)


def main() -> None:
    """All cases; JSON and markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="parts of names; all without it")
    parser.add_argument(
        "--repeats", type=int, default=3, help="timed iterations of each side (2 at most of the wide ones)"
    )
    parser.add_argument("--small", action="store_true", help="a random model of seconds, to see that it works")
    parser.add_argument("--out", type=Path, help="folder of the results; beside this file without it")
    options = parser.parse_args()
    known = SMALL if options.small else CASES
    chosen = [case for case in known if not options.cases or any(part in case.name for part in options.cases)]
    if not chosen or options.repeats < 1:
        parser.error(
            f"--cases {options.cases}, --repeats {options.repeats}: know {[c.name for c in known]}, repeats >= 1"
        )
    with tempfile.TemporaryDirectory() as folder:
        results = [measure(case, options.repeats, Path(folder) / str(i)) for i, case in enumerate(chosen)]
    real = at_real_sizes()
    content = {"repeats": options.repeats, "results": results, "released_model": real}
    common.write("iteration", content, markdown(results, real), options.out)


if __name__ == "__main__":
    main()
