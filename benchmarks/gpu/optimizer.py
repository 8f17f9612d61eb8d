"""Section `optimizer`: one step of each, against the bytes that it must read and write."""

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.bench import TYPE, Bench, Row, failed, skipped, timed
from benchmarks.gpu.models import config_of, random_dit
from megatron_sage.planning.sizes import Count, chunk_counts

# Bytes of an element that one step cannot avoid. fp32 weights: weight and two moments read and written, gradient read.
FUSED = 4 * (2 + 4 + 1)
# bf16 weights with fp32 masters: master and two moments read and written, the gradient read for its norm and for the
# step, the weight written. Muon has one moment.
ADAM, MUON = 4 * (2 + 4) + 2 * 4 + 2, 4 * (2 + 2) + 2 * 4 + 2
MASTERS = 4 + 4 + 2 + 3 * 4  # bytes of an element on the device: gradient, its copy, weight, master and moments

VARIANTS: dict[str, dict[str, Any]] = {
    "Megatron's AdamW": {},
    "Megatron's AdamW, distributed": {"distributed": True},
    "Megatron's AdamW, distributed, offload=hybrid": {"distributed": True, "offload": "hybrid"},
    "Muon, with AdamW for what is no matrix": {"name": "muon"},
}


def optimizer(bench: Bench) -> Iterator[Row]:
    """torch's fused AdamW on fp32 weights, then the optimizers of a run, as training/optimizer.py builds them."""
    counts = sum(chunk_counts(config_of(bench, bench.sizes.optimizer_blocks), 0), Count())
    if why := bench.obstacle(counts.trained * MASTERS):
        yield skipped("optimizer step", why)
        return
    yield _fused(bench, counts)
    for name, settings in VARIANTS.items():
        host = 16.0 * counts.trained if settings.get("offload") else 0.0  # masters, moments, gradients
        if why := bench.obstacle(counts.trained * MASTERS) or bench.obstacle(host, "host"):
            yield skipped(name, why)
            continue
        try:
            yield _megatron(bench, name, counts, settings)
        except torch.OutOfMemoryError as error:
            yield failed(name, error)


def _fused(bench: Bench, counts: Count) -> Row:
    # one tensor of the trained elements' number: the kernel goes through chunks of tensors of any size
    weight = bench.random(counts.trained, dtype=torch.float32).requires_grad_()
    weight.grad = torch.randn_like(weight)
    adam = torch.optim.AdamW([weight], lr=1e-5, fused=True)
    seconds = bench.seconds(adam.step)
    moved = FUSED * counts.trained
    floor = moved / bench.ceilings.get("memory")
    return timed("torch's fused AdamW, fp32", seconds, floor, OF, parameters=counts.trained, bytes=moved)


OF = "bytes / device memory bandwidth"


def _megatron(bench: Bench, name: str, counts: Count, settings: dict[str, Any]) -> Row:
    from megatron_sage.config.schema import Config, OptimizerConfig
    from megatron_sage.training.optimizer import adam_implementation, build_optimizer, wrap

    config = Config(optimizer=OptimizerConfig(**settings))
    ddp = wrap([random_dit(bench, bench.sizes.optimizer_blocks)], bench.groups, config.optimizer.distributed)
    built = build_optimizer(config, ddp, TYPE)
    for parameter in ddp[0].parameters():
        if parameter.requires_grad:
            parameter.main_grad.normal_()
    seconds = bench.seconds(built.step)
    ranks = bench.groups.dp_size if config.optimizer.distributed else 1
    details = {"parameters": counts.trained, "adam": adam_implementation()}
    memory = bench.ceilings.get("memory")
    if config.optimizer.offload != "none":
        # fp32 gradients go down, fp32 weights come up; the host's own step is not in the floor
        moved = 4.0 * counts.trained / ranks
        floor = moved / min(bench.ceilings.get("to_host"), bench.ceilings.get("to_device"))
        return timed(name, seconds, floor, "bytes one way / host bandwidth", bytes=moved, **details)
    if config.optimizer.name == "adamw":
        moved = ADAM * counts.trained / ranks
        return timed(name, seconds, moved / memory, OF, bytes=moved, **details)
    moved = float(MUON * counts.matrices + ADAM * (counts.trained - counts.matrices))
    flops = newton_schulz_flops(built.chained_optimizers[1].optimizer)
    floor = moved / memory + flops / bench.ceilings.get("bf16")
    of = f"{OF} + FLOPs of Newton-Schulz / best bf16 GEMM"
    return timed(name, seconds, floor, of, bytes=moved, flops=flops, matrices=counts.matrices, **details)


def newton_schulz_flops(muon: Any) -> float:
    """Of one step: each iteration makes the short side's Gram matrix, its square, and their product with the matrix."""
    total = 0.0
    for group in muon.param_groups:
        for parameter, matrix in zip(group["params"], muon.matrices, strict=True):
            rows, columns = parameter.shape
            short, long = sorted((rows // matrix.parts, columns))
            total += matrix.parts * group["steps"] * (4.0 * short**2 * long + 2.0 * short**3)
    return total
