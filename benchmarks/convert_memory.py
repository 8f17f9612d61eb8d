"""Peak memory and time of the checkpoint conversions on a synthetic checkpoint of real width (hidden size 2048).

    python benchmarks/convert_memory.py [--blocks 6] [--ranks 1 2] [--work DIR] [--out benchmarks/convert_memory.json]

Writes a bf16 checkpoint of the HunyuanVideo-1.5 architecture with fewer blocks (6 blocks: 2.15 GB), then converts it
HF -> Megatron -> HF in fresh processes and records for each rank
* `vm_hwm`: VmHWM, the kernel's peak of ALL resident pages: program, private memory and mapped file pages (which the
  kernel may drop at any time, but counts while they are there);
* `rss_anon`: peak of RssAnon, private memory alone, sampled every 10 ms;
* `after_import`: VmRSS before the conversion starts: the libraries.
All in bytes; `ratio` is the largest vm_hwm over the size of the checkpoint's tensors. Round trips are compared bit by
bit.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

SIZE_LIMIT = 1.3


def main() -> None:
    """Parent: write, convert in fresh processes, compare, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--work", type=Path, default=None, help="scratch directory with room for three checkpoints")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/convert_memory.json"))
    parser.add_argument("--child", nargs=3, metavar=("DIRECTION", "SRC", "DST"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*args.child, out=args.out)
        return
    work = Path(tempfile.mkdtemp(prefix="convert_memory_", dir=args.work))
    try:
        report = measure(args.blocks, args.ranks, work)
    finally:
        shutil.rmtree(work)
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    worst = max(run["ratio"] for run in report["runs"] if run["ranks"] == 1)
    if worst > SIZE_LIMIT:
        sys.exit(f"one process peaks at {worst:.2f} times the checkpoint, the limit is {SIZE_LIMIT}")


def measure(blocks: int, ranks: list[int], work: Path) -> dict:
    """All conversions at all numbers of ranks."""
    size = write_checkpoint(work / "hf", blocks)
    runs = []
    for count in ranks:
        for direction, source, target in (("hf-to-megatron", "hf", "megatron"), ("megatron-to-hf", "megatron", "back")):
            per_rank = convert(direction, work / source, work / target, count, work)
            ratio = round(max(item["vm_hwm"] for item in per_rank) / size, 3)
            runs.append({"direction": direction, "ranks": count, "ratio": ratio, "per_rank": per_rank})
        assert_same(work / "hf", work / "back")
        shutil.rmtree(work / "megatron")
        shutil.rmtree(work / "back")
    return {
        "date": datetime.date.today().isoformat(),
        "machine": {
            "cpu": next(
                (line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), ""
            ),
            "cores": os.cpu_count(),
            "system": platform.platform(),
            "python": platform.python_version(),
        },
        "checkpoint": {"blocks": blocks, "dtype": "bf16", "bytes": size},
        "round_trip": "bit-identical",
        "runs": runs,
    }


def write_checkpoint(directory: Path, blocks: int) -> int:
    """Random bf16 weights in files of 1 GB; returns the bytes of all tensors."""
    import torch

    from megatron_sage.checkpoint.hf import plan_hf_files, write_hf_metadata
    from megatron_sage.checkpoint.keymap import KeyMap
    from megatron_sage.checkpoint.safetensors_io import SafetensorsWriter
    from megatron_sage.model.config import HunyuanVideoConfig

    directory.mkdir()
    config = HunyuanVideoConfig.from_diffusers({"num_layers": blocks}).to_diffusers()
    keymap = KeyMap.from_config(config)
    files = plan_hf_files(keymap, dict.fromkeys(keymap.bindings, torch.bfloat16), "diffusers", 10**9)
    for file in files:
        with SafetensorsWriter(directory / file.name, file.specs) as writer:
            for name, spec in file.specs.items():
                bits = torch.randint(-(2**15), 2**15, spec.shape, dtype=torch.int16)  # NaNs too: bits are bits
                writer.write(name, bits.view(torch.bfloat16))
    write_hf_metadata(directory, files, config, "diffusers")
    return sum(spec.nbytes for file in files for spec in file.specs.values())


def convert(direction: str, source: Path, target: Path, ranks: int, work: Path) -> list[dict]:
    """One conversion in fresh processes; what each rank measured."""
    this = [str(Path(__file__).resolve()), "--child", direction, str(source), str(target), "--out", str(work / "rank")]
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    subprocess.run([sys.executable, *launcher, *this], check=True, env=environment)
    return [json.loads((work / f"rank{rank}.json").read_text()) for rank in range(ranks)]


def child(direction: str, source: str, target: str, out: Path) -> None:
    """In the fresh process: convert while a thread samples private memory."""
    from megatron_sage.checkpoint.convert import DIRECTIONS

    after_import, peak, done = status("VmRSS"), 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, status("RssAnon"))

    sampler = threading.Thread(target=sample)
    sampler.start()
    start = time.monotonic()
    DIRECTIONS[direction](source, target)
    seconds = time.monotonic() - start
    done.set()
    sampler.join()
    result = {
        "rank": int(os.environ.get("RANK", "0")),
        "seconds": round(seconds, 1),
        "after_import": after_import,
        "rss_anon": peak,
        "vm_hwm": status("VmHWM"),
    }
    Path(f"{out}{result['rank']}.json").write_text(json.dumps(result))


def status(field: str) -> int:
    """A memory field of /proc/self/status in bytes."""
    for line in open("/proc/self/status"):
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def assert_same(one: Path, other: Path) -> None:
    """Bit by bit, tensor by tensor."""
    import torch

    from megatron_sage.checkpoint.safetensors_io import SafetensorsDirectory

    a, b = SafetensorsDirectory(one), SafetensorsDirectory(other)
    assert a.specs == b.specs
    for name in a.specs:
        assert torch.equal(a.read(name).view(torch.int16), b.read(name).view(torch.int16)), name


if __name__ == "__main__":
    main()
