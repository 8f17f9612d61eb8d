"""Hardware and limits of this machine. What is read of the system is a parameter, so that faults can be made."""

import importlib.util
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from megatron_sage.diagnosis.finding import GIB, Finding

MACHINE, NETWORK = "machine", "communication"
SHM_ENOUGH, SHM_LEAST = 1.0, 1 / 16  # GiB; Docker gives 1/16, which NCCL soon fills
SOCKETS_EACH = 8  # of a rank to every other one, over all its groups: an estimate, gloo connects each pair of a group


def machine() -> Iterator[Finding]:
    """Python, system, processor, memory, disk of the present directory."""
    fits = (3, 11) <= sys.version_info[:2] < (3, 13)
    cure = "" if fits else "; 3.11 or 3.12 is needed: PYTHON=python3.12 make clean setup"
    status = "ok" if fits else "failed"
    yield Finding(MACHINE, "python", status, f"{platform.python_version()} ({sys.executable}){cure}")
    yield Finding(MACHINE, "system", "ok", f"{platform.system()} {platform.release()} {platform.machine()}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    yield Finding(MACHINE, "processor", "ok", f"{cores} cores for this process, OMP_NUM_THREADS {threads}")
    if importlib.util.find_spec("psutil"):
        import psutil

        memory = psutil.virtual_memory()
        limit = _container_limit()
        bound = f", container limit {limit / GIB:.1f} GiB" if limit and limit < memory.total else ""
        detail = f"{memory.total / GIB:.1f} GiB, {memory.available / GIB:.1f} GiB available{bound}"
        yield Finding(MACHINE, "memory", "ok", detail)
    yield Finding(MACHINE, "disk", "ok", f"{shutil.disk_usage('.').free / GIB:.1f} GiB free here")


def _container_limit() -> int | None:
    """The control group's memory limit in bytes, which the machine's total does not show."""
    path = Path("/sys/fs/cgroup/memory.max")
    text = path.read_text().strip() if path.is_file() else "max"
    return int(text) if text.isdigit() else None


def files_and_locks(
    world_size: int, rdma: bool, files: int | None = None, locked: int | None = None
) -> Iterator[Finding]:
    """ulimit -n and -l. `files`, `locked` (bytes; -1: unlimited): in place of this process' soft limits."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if files is None else files
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] if locked is None else locked
    need = 256 + SOCKETS_EACH * world_size
    if files != resource.RLIM_INFINITY and files < need:
        detail = f"{files}, about {need} are needed for {world_size} ranks; ulimit -n {max(65536, need)}"
        yield Finding(MACHINE, "open files", "failed", detail)
    else:
        yield Finding(MACHINE, "open files", "ok", f"ulimit -n {_limit(files)}")
    if rdma and locked != resource.RLIM_INFINITY:
        detail = f"{locked // 1024} KiB: RDMA registers memory; ulimit -l unlimited (slurmd: LimitMEMLOCK=infinity)"
        yield Finding(MACHINE, "locked memory", "warning", detail)
    else:
        size = "unlimited" if locked == resource.RLIM_INFINITY else f"{locked // 1024} KiB, enough without RDMA"
        yield Finding(MACHINE, "locked memory", "ok", size)


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


def shared_memory(gpus: int, path: Path = Path("/dev/shm"), free: int | None = None) -> Iterator[Finding]:
    """NCCL's ranks of one node talk through it. `free`: bytes, in place of the file system's."""
    name, cure = "shared memory", "docker run --shm-size=16g (or --ipc=host); mount -o remount,size=16g /dev/shm"
    if not path.is_dir() or not os.access(path, os.W_OK):
        status = "failed" if gpus else "warning"
        yield Finding(NETWORK, name, status, f"{path} is missing or cannot be written; {cure}")
        return
    free = shutil.disk_usage(path).free if free is None else free
    detail = f"{path}: {free / GIB:.2f} GiB free"
    if gpus > 1 and free / GIB <= SHM_LEAST:
        yield Finding(NETWORK, name, "failed", f"{detail}, too little for {gpus} ranks of NCCL; {cure}")
    elif gpus > 1 and free / GIB < SHM_ENOUGH:
        yield Finding(NETWORK, name, "warning", f"{detail}, NCCL may run out of it; {cure}")
    else:
        yield Finding(NETWORK, name, "ok", detail)


def rdma_devices(folder: Path = Path("/sys/class/infiniband")) -> list[tuple[str, str, str, str]]:
    """(device, state, rate, link layer) of every port of every InfiniBand or RoCE card."""
    found = []
    for device in sorted(folder.glob("*")):
        for port in sorted((device / "ports").glob("*")):
            state, rate, layer = (_text(port / name) for name in ("state", "rate", "link_layer"))
            found.append((device.name, state.partition(":")[2].strip() or state, rate, layer))
    return found


def rdma(gpus: int, devices: list[tuple[str, str, str, str]]) -> Iterator[Finding]:
    """What NCCL would send between nodes over."""
    if not devices:
        status = "warning" if gpus else "optional"
        cure = "between nodes NCCL would use TCP: load the card's driver, give a container --device=/dev/infiniband"
        yield Finding(NETWORK, "RDMA", status, "no InfiniBand or RoCE device" + (f"; {cure}" if gpus else ""))
    for name, state, rate, layer in devices:
        if state == "ACTIVE":
            yield Finding(NETWORK, f"RDMA {name}", "ok", f"{layer}, {rate}")
        else:
            detail = f"{layer}, port is {state}: NCCL goes without it; see ibstat {name} (cable, subnet manager)"
            yield Finding(NETWORK, f"RDMA {name}", "warning", detail)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # a port that is being reset; its state is then unknown
        return "unknown"


def gpu_software() -> Iterator[Finding]:
    """Driver, NCCL, flash attention: where there is a GPU."""
    import torch

    if not torch.cuda.is_available():
        yield Finding(NETWORK, "NCCL", "optional", "not used without a GPU")
        return
    driver = _driver()
    yield Finding(
        "torch", "driver", "ok" if driver else "warning", driver or "nvidia-smi does not run; see its message"
    )
    yield Finding(NETWORK, "NCCL", "ok", ".".join(map(str, torch.cuda.nccl.version())))
    flash = torch.backends.cuda.is_flash_attention_available()
    cure = 'this torch was built without it: attention takes more memory; make clean setup TORCH="torch==2.13.0"'
    yield Finding("torch", "flash attention", "ok" if flash else "warning", "torch's own" if flash else cure)
    try:
        yield Finding("optional", "flash-attn", "ok", version("flash-attn"))
    except PackageNotFoundError:
        yield Finding("optional", "flash-attn", "optional", "not installed; torch's or Transformer Engine's is used")


def _driver() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        text = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return ", ".join(sorted(set(text.split())))


def disk(output_dir: str, one: float, kept: int | None, free: int | None = None) -> Iterator[Finding]:
    """Space for checkpoints of `one` bytes, of which `kept` stay (None: all). `free`: in place of the disk's."""
    place = Path(output_dir).absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        yield Finding(
            "run", "output_dir", "failed", f"{output_dir}: {place} cannot be written; choose another output_dir"
        )
        return
    free = shutil.disk_usage(place).free if free is None else free
    detail = f"{output_dir}: {free / GIB:.1f} GiB free, a checkpoint takes about {one / GIB:.2f}"
    if free < 2 * one:  # the newest one stays until the next is whole
        yield Finding("run", "output_dir", "failed", f"{detail}; free space, or choose another output_dir")
    elif kept is None or free < (kept + 1) * one:
        count = "all" if kept is None else str(kept)
        status = "warning" if free < (20 if kept is None else kept + 1) * one else "ok"
        yield Finding("run", "output_dir", status, f"{detail}, {count} of them stay; training.keep_last=3 keeps three")
    else:
        yield Finding("run", "output_dir", "ok", f"{detail}, {kept} of them stay")
