"""Rotary position embedding of the image tokens (diffusers: HunyuanVideo15RotaryPosEmbed)."""

import functools

import torch


@functools.lru_cache(maxsize=16)
def rotary_table(
    grid: tuple[int, int, int], axes_dim: tuple[int, int, int], theta: float, device: torch.device
) -> torch.Tensor:
    """[T*H*W, D/2] complex64: the unit rotation of each channel pair at each (t, h, w), row-major.

    Angles are fp32 as in diffusers: positions are exact there, and a bf16 table would rotate neighbours alike.
    """
    # the table outlives this call: made under inference_mode, it could not be saved for a later backward pass
    with torch.inference_mode(False), torch.no_grad():
        positions = torch.meshgrid(
            *(torch.arange(size, dtype=torch.float32, device=device) for size in grid), indexing="ij"
        )
        angles = [
            torch.outer(position.reshape(-1), 1.0 / theta ** (torch.arange(0, dim, 2, device=device).float() / dim))
            for position, dim in zip(positions, axes_dim, strict=True)
        ]
        angle = torch.cat(angles, dim=1)
        return torch.complex(angle.cos(), angle.sin())


def rotate(x_SBND: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotate the interleaved pairs (2i, 2i+1) of every head (N) by `table` [S, D/2], in fp32."""
    pairs = torch.view_as_complex(x_SBND.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table[:, None, None]).flatten(-2).to(x_SBND.dtype)
