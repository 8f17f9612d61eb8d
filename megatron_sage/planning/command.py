"""`megatron-sage plan`: layouts of a number of GPUs by formulas, or one rank of a layout by a dry run."""

import argparse
import json
from pathlib import Path
from typing import Any

from megatron_sage.config.loading import load_config
from megatron_sage.config.schema import ALIASES, Config
from megatron_sage.errors import UserError
from megatron_sage.planning.machine import known_gpus, load_gpu

MAX_GPUS = 65536


def main(argv: list[str]) -> int:
    """Command line of `plan`; see `--help`."""
    options = _parser().parse_intermixed_args(argv)
    config, fixed = _config(options)
    if options.gpus is None or not 1 <= options.gpus <= MAX_GPUS:
        raise UserError(f"--gpus {options.gpus}: give the number of GPUs, 1 to {MAX_GPUS}")
    transformer = transformer_config(config)
    texts = _texts(options)
    if options.dry_run:
        from megatron_sage.planning.dry_run_report import report

        return report(config, transformer, texts, options)
    from megatron_sage.planning.plan import make_plan
    from megatron_sage.planning.printing import as_json, as_text

    plan = make_plan(config, transformer, options.gpus, load_gpu(options.gpu), texts, fixed)
    print(json.dumps(as_json(plan)) if options.json else as_text(plan, options.top))
    return 0 if plan.layouts else 1


def transformer_config(config: Config) -> dict[str, Any]:
    """transformer/config.json of `model.pretrained`; empty, that is HunyuanVideo-1.5, where there is none."""
    path = Path(config.model.pretrained) / "transformer" / "config.json"
    if not config.model.pretrained or not path.is_file():
        return {"num_attention_heads": 16, "num_layers": 54}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}; fetch it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(content).__name__}; fetch it again")
    return content


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-sage plan",
        description="What a run needs on a number of GPUs: all layouts by formulas, or --dry-run: one rank of one "
        "layout, the real code on tensors without data. No GPU and no weights are needed.",
        epilog="Example: megatron-sage plan --recipe hv15_480p_b_sage_dual --gpus 64 --gpu h100-80 parallel.tensor=4",
    )
    parser.add_argument("settings", metavar="CONFIG key=value", nargs="*", help="YAML file, then dotted overrides; "
                        "parallel.* given here fixes that size of the layouts")  # fmt: skip
    parser.add_argument("--recipe", metavar="NAME", help="start from a named run; `megatron-sage recipes list`")
    parser.add_argument("--gpus", type=int, help="number of GPUs")
    parser.add_argument("--gpu", default="h100-80", help=f"{', '.join(known_gpus())}, or a .yaml file (h100-80)")
    parser.add_argument("--text-tokens", type=int, default=300, help="valid Qwen tokens of a prompt (300)")
    parser.add_argument("--glyph-tokens", type=int, default=0, help="valid ByT5 tokens of a prompt (0)")
    parser.add_argument("--image-tokens", type=int, default=0, help="image tokens: 729 in image-to-video (0)")
    parser.add_argument("--negative-tokens", type=int, default=6, help="valid Qwen tokens of the empty prompt (6)")
    parser.add_argument("--top", type=int, default=8, help="layouts to print (8)")
    parser.add_argument("--json", action="store_true", help="print one JSON object with all layouts")
    parser.add_argument("--dry-run", action="store_true", help="run one rank on tensors without data")
    parser.add_argument("--rank", type=int, default=0, help="dry run: which rank (0)")
    parser.add_argument("--steps", type=int, default=2, help="dry run: denoising steps of the rollout (2)")
    return parser


def _config(options: argparse.Namespace) -> tuple[Config, frozenset[str]]:
    """The configuration, and the `parallel` settings that the command line gives."""
    from megatron_sage.recipes import recipe

    paths = [text for text in options.settings if "=" not in text]
    overrides = [text for text in options.settings if "=" in text]
    if len(paths) > 1:
        raise UserError(f"{paths[1]}: one configuration file at most ({paths[0]} is one); overrides are key=value")
    base = recipe(options.recipe) if options.recipe else None
    config = load_config(paths[0] if paths else None, overrides, base)
    keys = [ALIASES.get(text.partition("=")[0].strip(), text.partition("=")[0].strip()) for text in overrides]
    return config, frozenset(key.removeprefix("parallel.") for key in keys if key.startswith("parallel."))


def _texts(options: argparse.Namespace) -> Any:
    from megatron_sage.planning.flops import Text

    for name, least in (("text", 1), ("glyph", 0), ("image", 0), ("negative", 1)):
        value = getattr(options, f"{name}_tokens")
        if value < least:
            raise UserError(f"--{name}-tokens {value}: must be >= {least}")
    conditional = Text(options.text_tokens, options.glyph_tokens, options.image_tokens)
    return conditional, Text(options.negative_tokens, 0, options.image_tokens)
