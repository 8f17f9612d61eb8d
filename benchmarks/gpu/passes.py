"""Sections `rollout`, `anchor` and `offload`: whole passes of a small model, against what they are made of."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.bench import Bench, Row, skipped, timed
from benchmarks.gpu.models import (
    config_of,
    counted_forwards,
    model_flops,
    network_of,
    place_of,
    random_dit,
    random_prompt,
    sde_table,
)
from benchmarks.gpu.sizes import tokens
from megatron_sage.anchor import Anchor
from megatron_sage.model import HunyuanVideoDiT
from megatron_sage.parallel.streaming import Unit
from megatron_sage.planning.sizes import total_parameters
from megatron_sage.planning.workspace import forward_workspace
from megatron_sage.rollout.buffer import MicroTrajectory
from megatron_sage.rollout.policy import Network, Prompt
from megatron_sage.rollout.sampler import Flight, rollout
from megatron_sage.rollout.transitions import StepTable

LATENT = 4  # bytes of a stored latent element: sampler.latent_dtype is fp32


def _obstacle(bench: Bench, copies: int = 1) -> str | None:
    """Of a model of the largest number of blocks, so many times on the device, and a forward of it."""
    config = config_of(bench, max(bench.sizes.blocks))
    model = copies * total_parameters(config) * config.params_dtype.itemsize
    return bench.obstacle(model + forward_workspace(place_of(config, bench.sizes.grid), bench.sizes.text))


def roll_out(network: Network, table: StepTable, prompt: Prompt, **options: Any) -> list[MicroTrajectory]:
    """One sample."""
    return rollout(network, table, [Flight(0, [0], prompt)], seed=0, token_group=None, **options)[0]


def rollout_section(bench: Bench) -> Iterator[Row]:
    """A denoising step with guidance, noise and log-probability, against its blocks alone and against its FLOPs."""
    if why := _obstacle(bench):
        yield skipped("rollout step", why)
        return
    sizes, dit = bench.sizes, random_dit(bench, max(bench.sizes.blocks))
    network, prompt, table = network_of(bench, dit, sizes.grid), random_prompt(bench), sde_table(sizes.steps)
    blocks = list(dit.transformer_blocks.values())
    with counted_forwards(blocks) as count:
        roll_out(network, table, prompt)
    sides = {"steps": lambda: roll_out(network, table, prompt), "blocks": partial(_blocks, bench, dit, prompt)}
    seconds = bench.in_turn(sides)
    of_step = [s / sizes.steps for s in seconds["steps"]]
    of_blocks = [s / sizes.steps for s in seconds["blocks"]]
    flops = model_flops(bench, dit.config, sizes.grid)
    floor = flops / bench.ceilings.get("bf16")
    of = "FLOPs of both branches / best bf16 GEMM"
    yield timed(f"the {len(blocks)} blocks of a step alone", of_blocks, floor, of, flops=flops)
    row = timed("rollout step", of_step, floor, of, flops=flops, blocks_forwards=count[0], steps=sizes.steps)
    beside = [step / blocks - 1 for step, blocks in zip(of_step, of_blocks, strict=True)]
    yield row | {"beside_the_blocks": sorted(beside)[len(beside) // 2]}


@torch.no_grad()
def _blocks(bench: Bench, dit: HunyuanVideoDiT, prompt: Prompt) -> None:
    """Of all steps and both branches, with inputs that lie ready."""
    for text in (prompt.conditional, prompt.unconditional):
        layout = dit._layout(bench.sizes.grid, text, bench.device)
        hidden = dit.config.hidden_size
        inputs = (bench.random(n, 1, hidden) for n in (layout.image.local, layout.text.local))
        image, words = inputs
        temb = bench.random(1, hidden)
        for _ in range(bench.sizes.steps):
            x, y = image, words
            for block in dit.transformer_blocks.values():
                x, y = block(x, y, temb, layout)


def anchor(bench: Bench) -> Iterator[Row]:
    """A reference pass with weights streamed from the host against one with weights on the device, and the copy alone.

    Hidden is the part of the copy that costs no time: 1 - (streamed - resident) / copy alone.
    """
    if why := _obstacle(bench, copies=3):
        yield skipped("reference pass", why)
        return
    sizes, dit = bench.sizes, random_dit(bench, max(bench.sizes.blocks))
    network, prompt = network_of(bench, dit, sizes.grid), random_prompt(bench)
    streamed, resident = (Anchor([dit], bench.groups, on_device=on) for on in (False, True))
    x_SBC = bench.random(tokens(sizes.grid), 1, dit.config.out_channels, dtype=torch.float32)
    sides: dict[str, Callable[[], Any]] = {
        "streamed": lambda: reference_pass(bench, network, prompt, x_SBC, streamed),
        "resident": lambda: reference_pass(bench, network, prompt, x_SBC, resident),
        "copy": partial(_copy, bench, streamed),
    }
    equal = torch.equal(sides["streamed"](), sides["resident"]())
    seconds = bench.in_turn(sides)
    copied = copied_bytes(bench, streamed)
    copying = copied / bench.ceilings.get("to_device")
    flops = sizes.reference_forwards * model_flops(bench, dit.config, sizes.grid)
    computing = flops / bench.ceilings.get("bf16")
    yield timed("copy alone", seconds["copy"], copying, "bytes / pinned bandwidth", bytes=copied)
    yield timed("resident", seconds["resident"], computing, "FLOPs / best bf16 GEMM", flops=flops)
    slower = max(computing, copying)
    row = timed("streamed", seconds["streamed"], slower, "the slower of copy and FLOPs", bytes=copied, equal=equal)
    hidden = [
        1 - (s - r) / c for s, r, c in zip(seconds["streamed"], seconds["resident"], seconds["copy"], strict=True)
    ]
    if not bench.cuda:
        yield row
        yield skipped("part of the copy that is hidden", "without CUDA a copy never runs beside computing")
        return
    yield row | {"hidden": sorted(hidden)[len(hidden) // 2], "hidden_min": min(hidden), "hidden_max": max(hidden)}


@torch.no_grad()
def reference_pass(
    bench: Bench, network: Network, prompt: Prompt, x_SBC: torch.Tensor, reference: Anchor
) -> torch.Tensor:
    """So many velocities with the reference's weights; the last one."""
    with reference.swapped_in():
        for _ in range(bench.sizes.reference_forwards):
            found = [network.forward(0, x_SBC, 0.5, prompt, branch, 1) for branch in range(network.branches)]
    return network.guided(found)


def copied_bytes(bench: Bench, streamed: Anchor) -> int:
    """Of one pass: what is in no block once, the blocks at every forward; the first one's waits for the next forward
    already, so one copy more than there are forwards."""
    blocks = [unit.bytes for chunk in streamed._blocks for _, unit in chunk]
    forwards = 2 * bench.sizes.reference_forwards
    again = blocks[0] if len(blocks) > 1 else 0
    return streamed._rest.bytes + (forwards * sum(blocks) if len(blocks) > 1 else sum(blocks)) + again


def _copy(bench: Bench, streamed: Anchor) -> None:
    units: list[Unit] = [unit for chunk in streamed._blocks for _, unit in chunk]
    buffer = torch.empty(max(u.bytes for u in [*units, streamed._rest]), dtype=torch.uint8, device=bench.device)
    forwards = 2 * bench.sizes.reference_forwards if len(units) > 1 else 1
    streamed._rest.load(buffer[: streamed._rest.bytes])
    for _ in range(forwards):
        for unit in units:
            unit.load(buffer[: unit.bytes])
    if len(units) > 1:
        units[0].load(buffer[: units[0].bytes])


def offload(bench: Bench) -> Iterator[Row]:
    """A rollout with sampler.offload_trajectories off and on: seconds, and bytes that stay on the device."""
    if why := _obstacle(bench):
        yield skipped("offloaded trajectories", why)
        return
    sizes, dit = bench.sizes, random_dit(bench, max(bench.sizes.blocks))
    network, prompt, table = network_of(bench, dit, sizes.grid), random_prompt(bench), sde_table(sizes.steps)
    roll_out(network, table, prompt)  # what stays on the device after the first one is not counted
    kept, left, log_probs = {}, {}, {}
    for on in (False, True):
        base = torch.cuda.memory_allocated() if bench.cuda else 0
        (found,) = roll_out(network, table, prompt, keep_velocity=True, offload=on)
        bench.synchronize()
        left[on] = torch.cuda.memory_allocated() - base if bench.cuda else None
        kept[on] = found.latents_SBC.bytes + found.velocity_SBC.bytes
        log_probs[on] = torch.stack([found.log_prob_B[step] for step in table.trained_steps]).cpu()
        del found
    formula = LATENT * network.shape.elements * (len(table.kept_latents) + len(table.trained_steps))
    seconds = bench.in_turn(
        {str(on): partial(roll_out, network, table, prompt, keep_velocity=True, offload=on) for on in (False, True)}
    )
    flops = sizes.steps * model_flops(bench, dit.config, sizes.grid)
    floor = flops / bench.ceilings.get("bf16")
    copying = formula / bench.ceilings.get("to_host")
    equal = torch.equal(log_probs[False], log_probs[True])
    for on in (False, True):
        details: dict[str, Any] = {"kept_bytes": kept[on], "kept_bytes_formula": formula, "equal": equal}
        details["device_bytes"] = "not known without CUDA" if left[on] is None else left[on]
        if on:
            details |= {"copy_floor_ms": 1e3 * copying}
        name = f"rollout, offload_trajectories={'true' if on else 'false'}"
        yield timed(name, seconds[str(on)], floor, "FLOPs / best bf16 GEMM", flops=flops, **details)
