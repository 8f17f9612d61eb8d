"""The peak that MFU is measured against: from logging.peak_tflops, or the data sheet of a card that is known."""

import re

import torch

from megatron_sage.planning.machine import load_gpu

# What CUDA calls the cards whose figures planning/gpus holds. Others of the same name (PCIe, NVL, H20) are slower.
_CARDS = {
    r"NVIDIA H100 80GB HBM3": "h100-80",
    r"NVIDIA H200": "h200",
    r"NVIDIA B200": "b200",
}


def peak_of(device_name: str) -> float | None:
    """Dense bf16 operations a second of a card by its CUDA name; None for a card that is not known."""
    for pattern, gpu in _CARDS.items():
        if re.fullmatch(pattern, device_name):
            return load_gpu(gpu).bf16_flops
    return None


def peak_flops(peak_tflops: float | None) -> tuple[float | None, str]:
    """(operations a second of one device, where the number comes from); None where there is none: no MFU then."""
    if peak_tflops is not None:
        return peak_tflops * 1e12, f"logging.peak_tflops={peak_tflops:g}"
    if not torch.cuda.is_available():
        return None, "no peak is known of a CPU: set logging.peak_tflops for MFU"
    name = torch.cuda.get_device_name()
    found = peak_of(name)
    if found is None:
        return None, f"no peak is known of {name}: set logging.peak_tflops (dense bf16) for MFU"
    return found, f"{found / 1e12:g} TFLOPS, data sheet of {name}"
