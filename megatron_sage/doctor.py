"""`megatron-sage doctor [CONFIG | DIRECTORY] [key=value ...]`: what a run needs, and whether it is here.

Without arguments the machine; with a configuration its rules, files and disk as well; with a directory its weights;
under torchrun the collectives of all ranks. Exit status 1, and a line that names the piece and the cure, where
something would stop a run; warnings alone are status 0.
"""

import argparse
import dataclasses
import importlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from megatron_sage.diagnosis.asked import given, on_all_ranks
from megatron_sage.diagnosis.finding import GIB, Finding
from megatron_sage.diagnosis.versions import against_lock

# Checked by name where the package runs from a source tree that pip never installed, so that no ranges are recorded.
_REQUIRED = (
    "torch megatron-core einops psutil diffusers transformers accelerate safetensors huggingface-hub "
    "numpy pillow omegaconf PyYAML rich matplotlib av packaging"
).split()
_ABSENT = "not installed"
_SYMBOLS = {"ok": "✓", "optional": "·", "warning": "!", "failed": "✗"}


def main(argv: list[str]) -> int:
    """Prints the findings as text or, with --json, as a list of objects; 0 where a run can work, else 1."""
    options = _parser().parse_intermixed_args(argv)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    found = on_all_ranks(options, _examine) if world_size > 1 else _examine(options)
    return _print(found, options.json) if os.environ.get("RANK", "0") == "0" else int(_failed(list(found)) != [])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-sage doctor",
        description="What this machine has and what will be used; with CONFIG also every rule of a run, its weights "
        "and its disk. Exit status: 0 all is well or only warnings, 1 something would stop a run.",
        epilog="All ranks: torchrun --nproc-per-node 8 -m megatron_sage doctor run.yaml parallel.tensor=8",
    )
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.add_argument("--recipe", metavar="NAME", help="a named run instead of, or under, CONFIG")
    parser.add_argument("--world-size", type=int, metavar="N", help="ranks of the run; default: what the layout needs")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long the collectives are tried (10)")
    parser.add_argument("settings", metavar="CONFIG|DIRECTORY key=value", nargs="*",
                        help="a run's YAML file and overrides, or a model's directory")  # fmt: skip
    return parser


def _print(found: Iterable[Finding], as_json: bool) -> int:
    findings: list[Finding] = []
    section = ""
    for finding in found:
        findings.append(finding)
        if not as_json:
            if finding.section != section:
                section = finding.section
                print(f"{section}")
            print(f"  {_SYMBOLS[finding.status]} {finding.name:<22} {finding.detail}", flush=True)
    failed = _failed(findings)
    if as_json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1))
    for finding in failed:
        print(f"error: {finding.name}: {finding.detail}", file=sys.stderr)
    if not as_json and not failed:
        print("Everything that a run needs is here.")
    return 1 if failed else 0


def _failed(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.status == "failed"]


def _examine(options: argparse.Namespace) -> Iterator[Finding]:
    from megatron_sage.diagnosis import machine

    world_size = options.world_size or int(os.environ.get("WORLD_SIZE", "1"))
    devices = machine.rdma_devices()
    yield from machine.machine()
    yield from machine.files_and_locks(world_size, bool(devices))
    packages = list(_packages())
    yield from packages
    absent = {finding.name for finding in packages if finding.detail.startswith(_ABSENT)}
    if "torch" not in absent:
        yield from _torch()
        yield from machine.gpu_software()
        gpus = _gpus()
        yield from machine.rdma(gpus, devices)
        yield from machine.shared_memory(gpus)
        yield from _optional()
    if not absent:  # otherwise the imports below would fail for the reason that is already told
        yield from _choices()
        yield from _self_checks()
        yield from given(options.settings, options.recipe, options.world_size)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _packages() -> Iterator[Finding]:
    """Every required package against the range in this package's own metadata (setup.py)."""
    try:
        declared = [Requirement(line) for line in requires("megatron-sage") or []]
        needed = [r for r in declared if r.marker is None or r.marker.evaluate({"extra": ""})]
    except PackageNotFoundError:
        needed = [Requirement(name) for name in _REQUIRED]
        yield Finding("packages", "megatron-sage", "warning", "runs uninstalled: versions are not checked; make setup")
    for requirement in needed:
        found = _version(requirement.name)
        if found is None:
            yield Finding("packages", requirement.name, "failed", f"{_ABSENT}; make setup")
        elif not requirement.specifier.contains(found, prereleases=True):
            cure = f"{found} does not fit {requirement.specifier}; make setup"
            yield Finding("packages", requirement.name, "failed", cure)
        else:
            yield Finding("packages", requirement.name, "ok", found)
    yield from against_lock(_version)


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _torch() -> Iterator[Finding]:
    import torch
    import torch.distributed as dist

    section = "torch"
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    yield Finding(section, "build", "ok", f"{torch.__version__}, {build}, {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            detail = f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB, compute capability {gpu.major}.{gpu.minor}"
            yield Finding(section, f"GPU {index}", "ok", detail)
    elif shutil.which("nvidia-smi"):
        cure = 'a GPU driver is here but torch cannot use it; make clean setup TORCH="torch==2.13.0"'
        yield Finding(section, "GPU", "warning", cure)
    else:
        yield Finding(section, "GPU", "optional", "none: everything runs on the CPU")
    gloo, nccl = dist.is_gloo_available(), dist.is_nccl_available()
    yield Finding(section, "gloo", "ok" if gloo else "failed", "available" if gloo else "missing from this torch")
    needed = torch.cuda.is_available()
    status = "ok" if nccl else "failed" if needed else "optional"
    yield Finding(section, "nccl", status, "available" if nccl else "missing from this torch")
    yield _torchvision()


def _torchvision() -> Finding:
    """Not needed, but one built for another torch breaks the import of transformers and diffusers."""
    found = _version("torchvision")
    if found is None:
        return Finding("torch", "torchvision", "ok", "absent, as it should be with a CPU torch")
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        cure = f"{found} does not fit this torch ({reason}) and breaks other imports; pip uninstall torchvision"
        return Finding("torch", "torchvision", "failed", cure)
    return Finding("torch", "torchvision", "ok", f"{found}, imports with this torch")


def _optional() -> Iterator[Finding]:
    import torch

    section = "optional"
    engine = _version("transformer-engine")
    if engine is None:
        yield Finding(section, "transformer-engine", "optional", "not installed; extra 'gpu'")
    elif not torch.cuda.is_available():
        yield Finding(section, "transformer-engine", "optional", f"{engine}, unused without a GPU")
    else:
        yield Finding(section, "transformer-engine", "ok", engine)
    yield _apex()
    for distribution, extra in (
        ("deepspeed", "deepspeed"),
        ("nvidia-dali-cuda130", "dali"),
        ("wandb", "wandb"),
        ("ray", "rewards"),
        ("pyarrow", "parquet"),
    ):
        found = _version(distribution)
        absent = f"not installed; extra '{extra}'"
        yield Finding(section, distribution, "ok" if found else "optional", found or absent)


def _apex() -> Finding:
    """NVIDIA Apex is not on PyPI; the package of that name there is a web toolkit that must not be mistaken for it."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return Finding("optional", "apex", "optional", "not installed; only torch's or TE's fused optimizers are used")
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    if not any((folder / "optimizers").is_dir() for folder in folders):
        return Finding("optional", "apex", "warning", "PyPI's apex, which is not NVIDIA's; pip uninstall apex")
    fused = importlib.util.find_spec("amp_C") is not None
    detail = "NVIDIA's" if fused else "NVIDIA's, built without its CUDA extensions: its optimizers cannot be used"
    return Finding("optional", "apex", "ok" if fused else "warning", detail)


def _choices() -> Iterator[Finding]:
    import torch

    section = "will be used"
    gpu = torch.cuda.is_available()
    yield Finding(section, "device", "ok", "GPU, NCCL" if gpu else "CPU, gloo")
    importlib.import_module("megatron_sage.parallel")  # megatron.core can be imported only behind it
    optimizer = importlib.import_module("megatron_sage.training.optimizer")
    host = "DeepSpeed's CPU Adam or torch's AdamW" if importlib.util.find_spec("deepspeed") else "torch's AdamW"
    yield Finding(section, "optimizer", "ok", f"{optimizer.adam_implementation()}; offloaded: {host}")
    kernels = "flash, cuDNN or efficient kernels by shape" if gpu else "CPU kernels"
    yield Finding(section, "attention", "ok", f"torch scaled_dot_product_attention ({kernels})")
    yield _fp8()
    bf16 = not gpu or torch.cuda.is_bf16_supported()
    detail = "supported" if bf16 else "this GPU has none: precision.dtype=fp32"
    yield Finding(section, "bf16", "ok" if bf16 else "warning", detail)


def _fp8() -> Finding:
    """The recipes of precision.fp8 that this machine can run."""
    from megatron_sage.config.state_rules import fp8_obstacle

    recipes = ("tensorwise", "blockwise", "mxfp8", "delayed")
    obstacles = {recipe: fp8_obstacle(recipe) for recipe in recipes}
    able = [recipe for recipe in recipes if obstacles[recipe] is None]
    if able:
        return Finding("will be used", "fp8", "ok", f"can be switched on: {', '.join(able)}; not verified on GPU")
    return Finding("will be used", "fp8", "optional", str(obstacles["tensorwise"]).partition(",")[0])


def _self_checks() -> Iterator[Finding]:
    checks: list[tuple[str, Callable[[], str]]] = [("all_reduce", _check_all_reduce), ("video", _check_video)]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # all ranks are tried instead
        del checks[0]
    for name, check in checks:
        start = time.perf_counter()
        try:
            detail = check()
        except Exception as error:  # whatever breaks is the finding: it is reported, and fails the command
            yield Finding(
                "self-checks", name, "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            )
        else:
            yield Finding("self-checks", name, "ok", f"{detail} ({time.perf_counter() - start:.2f} s)")


def _check_all_reduce() -> str:
    """One process, one sum, over a store in memory: no port, no other process."""
    import torch
    import torch.distributed as dist

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dist.init_process_group(
        backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=60), device_id=None
    )
    try:
        total = torch.ones(4, device=device)
        dist.all_reduce(total, group=dist.group.WORLD)
        if total.sum().item() != 4:
            raise RuntimeError(f"{backend} summed one process' ones to {total.tolist()}")
    finally:
        dist.destroy_process_group()
    return f"{backend}, one process"


def _check_video() -> str:
    """Writes nine small frames as H.264 and counts them again."""
    import av
    import numpy as np

    frames = np.zeros((9, 64, 64, 3), dtype=np.uint8)
    frames[:, 16:48, 16:48] = 255
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "check.mp4")
        with av.open(path, "w") as container:
            stream = container.add_stream("libx264", rate=24)
            stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        with av.open(path) as container:
            count = sum(1 for _ in container.decode(video=0))
    if count != len(frames):
        raise RuntimeError(f"wrote {len(frames)} frames, read {count}")
    return f"H.264, {count} frames written and read"
