"""`megatron-sage verify`: is our model, at this layout, the model that diffusers runs on the same weights?

Without --inputs both run on random ragged text-to-video and image-to-video inputs and are compared: output, every
block, every gradient. With --inputs ours runs on the given tensors and --save writes what it computed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from megatron_sage.checkpoint.configs import read_config, transformer_directory
from megatron_sage.checkpoint.convert import OneLineParser
from megatron_sage.checkpoint.distributed import gather_named, key_map, load_hf_weights
from megatron_sage.checkpoint.safetensors_io import SafetensorsWriter, Spec
from megatron_sage.checkpoint.staging import on_all_ranks
from megatron_sage.config import load_config
from megatron_sage.config.layout import check_model_layout, check_world
from megatron_sage.engine import DTYPES, initialize_groups, model_config
from megatron_sage.errors import UserError
from megatron_sage.model.config import DIFFUSERS_CLASS
from megatron_sage.model.transformer import HunyuanVideoDiT, build_chunks
from megatron_sage.parallel.device import device
from megatron_sage.parallel.groups import shutdown
from megatron_sage.verification.inputs import Inputs, random_inputs, read_inputs
from megatron_sage.verification.ours import Result, run_ours
from megatron_sage.verification.reference import (
    Check,
    Reference,
    compare_gradients,
    compare_outputs,
    tolerances,
)

WORST_SHOWN = 5


def main(argv: Sequence[str]) -> int:
    """Returns 0 if ours agrees (or, with --inputs, ran), 1 if not. Raises UserError with one line."""
    args = _parser().parse_intermixed_args(argv)
    settings = load_config(None, ["precision.dtype=fp32", *args.overrides])
    _check_settings(settings, args)
    parallel, precision = settings.parallel, settings.precision
    directory = transformer_directory(args.directory)
    started_here = not dist.is_initialized()
    world = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    check_world(parallel, world)
    shape = read_config(directory, DIFFUSERS_CLASS)
    check_model_layout(parallel, shape["num_attention_heads"], shape["num_layers"])
    groups = initialize_groups(settings)
    try:
        with on_all_ranks():
            config = model_config(settings, shape)
            inputs = read_inputs(args.inputs, config) if args.inputs else None
        model = build_chunks(config, groups.collection)
        load_hf_weights(model, directory)
        console = Console(quiet=groups.rank != 0, width=None if os.isatty(1) else 120, highlight=False)
        console.print(
            f"{directory}: {config.num_layers} blocks, {config.num_attention_heads} heads of {config.kv_channels}; "
            f"tensor={groups.tp_size} sequence={config.sequence_parallel} context={groups.cp_size} "
            f"({config.context_backend}) pipeline={groups.pp_size} chunks={len(model)} data={groups.dp_size} "
            f"dtype={precision.dtype} recompute={precision.recompute} on {groups.world_size} process(es), {device()}"
        )
        if inputs is not None:
            return _run_given(model, inputs, args.save, console)
        return _compare(model, directory, args, console)
    finally:
        if started_here:
            shutdown()


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="megatron-sage verify", description=__doc__)
    parser.add_argument("directory", type=Path, metavar="HF_DIR", help="diffusers transformer directory, or its root")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="parallel.tensor=2 precision.recompute=full")
    parser.add_argument("--inputs", type=Path, help="safetensors file of diffusers' forward arguments and grad_output")
    parser.add_argument("--save", type=Path, help="safetensors file to write: sample, grad_input.*, grad.*")
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs")
    parser.add_argument("--grid", type=int, nargs=3, default=(2, 3, 5), metavar=("T", "H", "W"), help="latent size")
    parser.add_argument("--text-tokens", type=int, default=7, help="random Qwen tokens; half as many glyph tokens")
    parser.add_argument("--image-tokens", type=int, default=5, help="random image tokens (SigLIP has 729)")
    return parser


def _check_settings(settings: Any, args: Any) -> None:
    if settings.precision.dtype not in DTYPES:
        raise UserError(f"precision.dtype={settings.precision.dtype}: must be one of {', '.join(DTYPES)}")
    if args.save and not args.inputs:
        raise UserError("--save: needs --inputs, the tensors to compute on")
    if args.save and not args.save.absolute().parent.is_dir():
        raise UserError(f"--save {args.save}: its directory does not exist; create it first")
    if min(*args.grid, args.text_tokens, args.image_tokens) < 1:
        raise UserError("--grid, --text-tokens, --image-tokens: must be at least 1")


def _run_given(model: list[HunyuanVideoDiT], inputs: Inputs, save: Path | None, console: Console) -> int:
    result = run_ours(model, inputs.to(device()))
    console.print(f"sample {list(result.sample.shape)}: rms {float(result.sample.square().mean().sqrt()):.6g}")
    if inputs.grad_output is None:
        console.print("no grad_output among the inputs: gradients are not computed")
    if save is not None:
        _save(model, result, save)
        console.print(f"wrote {save}")
    return 0


def _save(model: list[HunyuanVideoDiT], result: Result, path: Path) -> None:
    """Whole float32 tensors from rank 0, gathered one by one. All ranks call."""
    tensors = {"sample": result.sample}
    gradients: Iterator[tuple[str, torch.Tensor | None]] = iter(())
    if result.input_gradient is not None:
        tensors["grad_input.hidden_states"] = result.input_gradient
        gradients = gather_named(model, "grad")
    if dist.get_rank() != 0:
        for _ in gradients:
            pass  # takes part in the collectives
        return
    specs = {name: Spec(torch.float32, tuple(tensor.shape)) for name, tensor in tensors.items()}
    if result.input_gradient is not None:
        shapes = key_map(model).shapes("diffusers")
        specs |= {f"grad.{name}": Spec(torch.float32, shape) for name, shape in shapes.items()}
    partial = path.with_name(f".{path.name}.partial")
    try:
        with SafetensorsWriter(partial, specs) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
            for name, gradient in gradients:
                assert gradient is not None  # this is rank 0
                writer.write(f"grad.{name}", gradient)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _compare(model: list[HunyuanVideoDiT], directory: Path, args: Any, console: Console) -> int:
    config = model[0].config
    tolerance, gradient_tolerance = tolerances(config.params_dtype, config.num_layers)
    reference = Reference(directory, device()) if dist.get_rank() == 0 else None
    failed = False
    for image_to_video in (False, True):
        inputs = random_inputs(
            config, tuple(args.grid), args.text_tokens, args.image_tokens, image_to_video, args.seed
        ).to(device())
        ours = run_ours(model, inputs, observe_blocks=True)
        gradients = gather_named(model, "grad")
        if reference is None:
            for _ in gradients:
                pass  # takes part in the collectives
            continue
        checks = compare_outputs(ours, reference.run(inputs), tolerance, gradient_tolerance)
        parameters = compare_gradients(gradients, reference.gradients(), gradient_tolerance)
        failed |= not all(check.passed for check in checks + parameters)
        _print_table("image-to-video" if image_to_video else "text-to-video", checks, parameters, console)
    verdict = torch.tensor([int(failed)], device=device())
    dist.broadcast(verdict, src=0, group=dist.group.WORLD)
    console.print("FAILED: ours differs from diffusers" if failed else "passed: ours agrees with diffusers")
    return int(verdict.item())


def _print_table(title: str, checks: list[Check], parameters: list[Check], console: Console) -> None:
    table = Table("relative error of", "error", "tolerance", "", title=title, title_justify="left")
    bad = sum(not check.passed for check in parameters)
    for check in checks + parameters[: max(WORST_SHOWN, min(bad, 4 * WORST_SHOWN))]:
        table.add_row(check.name, f"{check.error:.2e}", f"{check.tolerance:.1e}", "ok" if check.passed else "FAILED")
    console.print(table)
    console.print(f"{len(parameters) - bad} of {len(parameters)} parameter gradients agree, the worst are shown")
