"""A GPU and its node as numbers: from a YAML file of this package by name, or from a user's own."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_sage.config.loading import bind, nearest
from megatron_sage.errors import UserError

FOLDER = Path(__file__).parent / "gpus"


@dataclass
class Assumptions:
    """What no data sheet says: guesses, printed with every plan. None of them was measured on a GPU."""

    gemm_efficiency: float = 0.6  # achieved over peak, of the GEMMs
    attention_efficiency: float = 0.5  # of attention
    memory_efficiency: float = 0.8  # achieved over peak bandwidth, of the device's memory (the optimizer's step)
    nvlink_efficiency: float = 0.75
    network_efficiency: float = 0.7
    host_efficiency: float = 0.8  # of the copies between host and device
    usable_memory: float = 0.9  # part of the device's memory: the rest is CUDA's, NCCL's and lost to fragmentation
    fused_adam: bool = True  # Transformer Engine's or Apex' Adam, without temporaries of the size of the weights
    reward_model_bytes: float = 5.0e9  # on every device (VideoAlign's released file)
    reward_seconds: float = 0.5  # of one video
    decode_flops_per_pixel: float = 2.52e7  # of the VAE's decoder: counted by FlopCounterMode on the meta device
    decode_bytes_per_pixel: float = 200.0  # its activations, at their peak
    disk_bandwidth: float = 2.0e9  # bytes a second that a node writes
    host_adam_bandwidth: float = 5.0e10  # bytes a second that one process' AdamW on the host goes through


@dataclass
class Gpu:
    """Peaks of one GPU and of the node around it, in bytes and operations a second; bandwidths in one direction."""

    name: str = ""
    source: str = ""  # where the numbers come from
    memory_bytes: float = 0.0
    bf16_flops: float = 0.0  # dense
    fp8_flops: float = 0.0  # dense; 0: none
    memory_bandwidth: float = 0.0
    nvlink_bandwidth: float = 0.0  # of one GPU to the others of its node
    network_bandwidth: float = 0.0  # of one GPU to other nodes
    host_bandwidth: float = 0.0  # of one GPU to host memory
    gpus_per_node: int = 8
    host_memory_bytes: float = 0.0  # of a node
    compute_capability: float = 9.0
    cuda: str = "13.0"
    assumptions: Assumptions = field(default_factory=Assumptions)


def known_gpus() -> list[str]:
    """Names that `load_gpu` takes."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_gpu(name: str) -> Gpu:
    """By name, or from a file that ends in .yaml; UserError, one line, for anything unknown or missing."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        if name not in known_gpus():
            match = nearest(name, known_gpus())
            cure = f"did you mean {match}? " if match else ""
            raise UserError(f"--gpu {name}: unknown; {cure}choose from {', '.join(known_gpus())}, or give a .yaml file")
        path = FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"--gpu {name}: no such file; choose from {', '.join(known_gpus())}, or give a .yaml file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--gpu {path}: not readable as YAML: {' '.join(str(error).split())}") from error
    gpu = bind(Gpu, _filled(Gpu(), content, str(path), ""), "", {})
    _check(gpu, str(path))
    return gpu


def _filled(defaults: Any, content: Any, where: str, prefix: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise UserError(f"--gpu {where}: expects keys such as {prefix}memory_bytes, found {content!r}")
    tree = dataclasses.asdict(defaults)
    for key, value in content.items():
        if key not in tree:
            match = nearest(str(key), tree)
            cure = f"did you mean {match}?" if match else f"known here: {', '.join(tree)}"
            raise UserError(f"--gpu {where}: {prefix}{key}: unknown key; {cure}")
        if key == "assumptions":
            value = _filled(Assumptions(), value or {}, where, "assumptions.")
        elif isinstance(tree[key], float) and isinstance(value, str):
            value = _number(value)  # YAML reads 9.9e14 as text: it wants 9.9e+14
        tree[key] = value
    return tree


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _check(gpu: Gpu, where: str) -> None:
    for key in ("memory_bytes", "bf16_flops", "memory_bandwidth", "nvlink_bandwidth", "network_bandwidth",
                "host_bandwidth", "gpus_per_node", "host_memory_bytes"):  # fmt: skip
        if getattr(gpu, key) <= 0:
            raise UserError(f"--gpu {where}: {key}={getattr(gpu, key)}: must be given, and > 0")
    for key, value in vars(gpu.assumptions).items():
        if key.endswith(("efficiency", "usable_memory")) and not 0 < value <= 1:
            raise UserError(f"--gpu {where}: assumptions.{key}={value}: must be > 0 and <= 1")
        if not key.endswith(("efficiency", "usable_memory")) and value < 0:
            raise UserError(f"--gpu {where}: assumptions.{key}={value}: must be >= 0")
        if key.endswith("bandwidth") and value == 0:
            raise UserError(f"--gpu {where}: assumptions.{key}=0: must be > 0")
