"""`megatron-sage doctor`: what this machine has, what will be used, and whether the pieces work together.

Exit status 1, and a line that names the piece and the cure, where something that a run needs is missing or too old.
"""

import argparse
import dataclasses
import importlib
import importlib.util
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

GIB = 2**30
# Checked by name where the package runs from a source tree that pip never installed, so that no ranges are recorded.
_REQUIRED = (
    "torch megatron-core einops psutil diffusers transformers accelerate safetensors huggingface-hub "
    "numpy pillow omegaconf PyYAML rich matplotlib av packaging"
).split()
_ABSENT = "not installed"
_SYMBOLS = {"ok": "✓", "optional": "·", "warning": "!", "failed": "✗"}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report. status: ok, optional (absent, not needed), warning, failed (a run cannot work)."""

    section: str
    name: str
    status: str
    detail: str


def main(argv: list[str]) -> int:
    """Prints the findings as text or, with --json, as a list of objects; 0 where a run can work, else 1."""
    parser = argparse.ArgumentParser(
        prog="megatron-sage doctor", description="What this machine has and what will be used."
    )
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    options = parser.parse_args(argv)
    findings: list[Finding] = []
    section = ""
    for finding in _examine():
        findings.append(finding)
        if not options.json:
            if finding.section != section:
                section = finding.section
                print(f"{section}")
            print(f"  {_SYMBOLS[finding.status]} {finding.name:<22} {finding.detail}", flush=True)
    failed = [finding for finding in findings if finding.status == "failed"]
    if options.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1))
    for finding in failed:
        print(f"error: {finding.name}: {finding.detail}", file=sys.stderr)
    if not options.json and not failed:
        print("Everything that a run needs is here.")
    return 1 if failed else 0


def _examine() -> Iterator[Finding]:
    yield from _machine()
    packages = list(_packages())
    yield from packages
    absent = {finding.name for finding in packages if finding.detail.startswith(_ABSENT)}
    if "torch" not in absent:
        yield from _torch()
        yield from _optional()
    if not absent:  # otherwise the imports below would fail for the reason that is already told
        yield from _choices()
        yield from _self_checks()


def _machine() -> Iterator[Finding]:
    section = "machine"
    fits = (3, 11) <= sys.version_info[:2] < (3, 13)
    cure = "" if fits else "; 3.11 or 3.12 is needed"
    yield Finding(
        section, "python", "ok" if fits else "failed", f"{platform.python_version()} ({sys.executable}){cure}"
    )
    yield Finding(section, "system", "ok", f"{platform.system()} {platform.release()} {platform.machine()}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    yield Finding(section, "processor", "ok", f"{cores} cores for this process, OMP_NUM_THREADS {threads}")
    if importlib.util.find_spec("psutil"):
        import psutil

        memory = psutil.virtual_memory()
        limit = _container_limit()
        bound = f", container limit {limit / GIB:.1f} GiB" if limit and limit < memory.total else ""
        detail = f"{memory.total / GIB:.1f} GiB, {memory.available / GIB:.1f} GiB available{bound}"
        yield Finding(section, "memory", "ok", detail)
    yield Finding(section, "disk", "ok", f"{shutil.disk_usage('.').free / GIB:.1f} GiB free here")


def _container_limit() -> int | None:
    """The control group's memory limit in bytes, which the machine's total does not show."""
    path = Path("/sys/fs/cgroup/memory.max")
    text = path.read_text().strip() if path.is_file() else "max"
    return int(text) if text.isdigit() else None


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
