"""What bounds the phases of an iteration of the released model on 64 H100, by formulas and a data sheet."""

from pathlib import Path
from typing import Any

from megatron_sage.figures.output import picture, write_csv

RECIPE, GPUS, GPU = "hv15_480p_b_sage_dual", 64, "h100-80"
SIZES = {"480p": (480, 848), "720p": (720, 1280)}
TEXTS = (300, 6)
TRANSFORMER = {"num_attention_heads": 16, "num_layers": 54}
RESOURCES = {"compute": "#0072B2", "memory": "#D55E00", "NVLink": "#009E73", "network": "#CC79A7", "host": "#E69F00",
             "disk": "#999999"}  # fmt: skip
MARKERS = {"480p": "o", "720p": "^"}
COLOURS = {"rollout": "#0072B2", "decode": "#D55E00", "reward": "#E69F00", "reference": "#009E73", "train": "#CC79A7",
           "optimizer": "#000000", "save": "#999999"}  # fmt: skip


def phase_uses() -> list[tuple[str, Any, Any]]:
    """(size, use of a phase, GPU) of the recipe's own layout: TP 8, 8 replicas."""
    from megatron_sage.planning.flops import Text
    from megatron_sage.planning.machine import load_gpu
    from megatron_sage.planning.roofline import uses
    from megatron_sage.recipes import recipe

    gpu, found = load_gpu(GPU), []
    for name, (height, width) in SIZES.items():
        config = recipe(RECIPE)
        config.video.height, config.video.width = height, width
        texts = Text(TEXTS[0]), Text(TEXTS[1])
        found += [(name, use, gpu) for use in uses(config, TRANSFORMER, GPUS, gpu, texts)]
    return found


def roofline(out: Path) -> list[Path]:
    """Makes roofline.csv and roofline.png in `out`."""
    found = phase_uses()
    header = ["size", "phase", "tflop", "device_gb", "nvlink_gb", "network_gb", "host_gb", "disk_gb", "flop_per_byte"]
    rows = []
    for size, use, gpu in found:
        moved = (use.device_bytes, use.nvlink_bytes, use.network_bytes, use.host_bytes, use.disk_bytes)
        seconds = list(use.seconds(gpu).values())
        rows.append([size, use.phase, use.flops / 1e12, *(n / 1e9 for n in moved), use.intensity, *seconds,
                     use.bound(gpu)])  # fmt: skip
    header += [f"{name}_seconds" for name in RESOURCES] + ["bound"]
    table = write_csv(out / "roofline.csv", header, rows)
    image = out / "roofline.png"
    with picture(image, height=5.6) as figure:
        figure.suptitle("Estimated, nothing measured: one rank of 64 H100, TP 8, 8 replicas, 81 frames")
        roof, bars = figure.subplots(1, 2, width_ratios=[1, 1.15])
        _roof(roof, found)
        _bars(bars, [(use, gpu) for size, use, gpu in found if size == "480p"])
    return [table, image]


def _roof(axes: Any, found: list[tuple[str, Any, Any]]) -> None:
    gpu = found[0][2]
    peak, bandwidth = gpu.bf16_flops, gpu.memory_bandwidth
    ridge, ends = peak / bandwidth, (0.1, 1e4)
    axes.loglog([ends[0], ridge, ends[1]], [ends[0] * bandwidth / 1e12, peak / 1e12, peak / 1e12], color="#555555")
    axes.axvline(ridge, color="#555555", linestyle=":", linewidth=1)
    axes.text(ridge * 0.85, 2, f"{ridge:.0f} FLOP/byte", color="#555555", ha="right")
    for size, use, _ in found:
        if use.flops:
            height = min(peak, use.intensity * bandwidth) / 1e12
            label = use.phase if size == "480p" else None
            axes.plot(use.intensity, height, MARKERS[size], color=COLOURS[use.phase], label=label, markersize=8)
    axes.set_title("(a) device memory (○ 480p, △ 720p)")
    axes.set_xlabel("operations a byte of device memory")
    axes.set_ylabel("attainable at the peaks, TFLOP/s")
    axes.legend(loc="lower right")


def _bars(axes: Any, found: list[tuple[Any, Any]]) -> None:
    """One group a phase, one bar a resource: the longest one bounds it."""
    height = 0.8 / len(RESOURCES)
    for place, (name, colour) in enumerate(RESOURCES.items()):
        values = [max(use.seconds(gpu)[name], 1e-9) for use, gpu in found]
        positions = [number + place * height - 0.4 for number in range(len(found))]
        axes.barh(positions, values, height, color=colour, label=name, align="edge")
    axes.set_xscale("log")
    axes.set_xlim(1e-4, None)
    axes.set_yticks(range(len(found)), [use.phase for use, _ in found])
    axes.invert_yaxis()
    axes.set_title("(b) 480p: least seconds an iteration, by resource at its peak")
    axes.set_xlabel("seconds")
    axes.legend(loc="lower right")
