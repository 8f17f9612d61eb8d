"""Embedders of time, text and image conditions: small, replicated on every tensor-parallel rank.

Module names are diffusers' names, so that these tensors need no renaming in a checkpoint. All of them run on the whole
text on every rank: their gradients are whole, nothing has to be reduced over TP.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from megatron_sage.model.config import BYT5_INNER_WIDTH, HunyuanVideoConfig

SINUSOID_WIDTH = 256


def timestep_sinusoid(timestep_B: torch.Tensor) -> torch.Tensor:
    """[B, 256] fp32, cosines first, of timesteps in [0, 1000].

    The order of the fp32 operations is diffusers': at t near 1000 another order moves the model's output by 4e-6.
    """
    half = SINUSOID_WIDTH // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timestep_B.device) / half
    angle = timestep_B[:, None].float() * torch.exp(exponent)[None]
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class TwoLayerSiLU(nn.Module):
    """Linear, SiLU, Linear (diffusers: TimestepEmbedding, PixArtAlphaTextProjection)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_features, out_features)
        self.linear_2 = nn.Linear(out_features, out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]; the input is cast to the weights' type here, not before."""
        return self.linear_2(F.silu(self.linear_1(x.to(self.linear_1.weight.dtype))))


class TimeEmbedding(nn.Module):
    """temb = MLP(sinusoid(t)), with MeanFlow + MLP_r(sinusoid(t_r)) (diffusers: HunyuanVideo15TimeEmbedding)."""

    def __init__(self, hidden_size: int, use_meanflow: bool) -> None:
        super().__init__()
        self.timestep_embedder = TwoLayerSiLU(SINUSOID_WIDTH, hidden_size)
        self.timestep_embedder_r = TwoLayerSiLU(SINUSOID_WIDTH, hidden_size) if use_meanflow else None

    def forward(self, timestep_B: torch.Tensor, timestep_r_B: torch.Tensor | None) -> torch.Tensor:
        """[B] fp32 timesteps -> [B, H]."""
        temb = self.timestep_embedder(timestep_sinusoid(timestep_B))
        if self.timestep_embedder_r is not None and timestep_r_B is not None:
            temb = temb + self.timestep_embedder_r(timestep_sinusoid(timestep_r_B))
        return temb


class TimeTextEmbedding(nn.Module):
    """The refiner's own condition: MLP(sinusoid(t)) + MLP(mean text) (CombinedTimestepTextProjEmbeddings)."""

    def __init__(self, text_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.timestep_embedder = TwoLayerSiLU(SINUSOID_WIDTH, hidden_size)
        self.text_embedder = TwoLayerSiLU(text_dim, hidden_size)

    def forward(self, timestep_B: torch.Tensor, mean_text_BD: torch.Tensor) -> torch.Tensor:
        """-> [B, H]."""
        return self.timestep_embedder(timestep_sinusoid(timestep_B)) + self.text_embedder(mean_text_BD)


class RefinerAttention(nn.Module):
    """Plain self-attention over one sample's text tokens: no qk norm, no RoPE."""

    def __init__(self, hidden_size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(hidden_size, hidden_size)
        self.to_k = nn.Linear(hidden_size, hidden_size)
        self.to_v = nn.Linear(hidden_size, hidden_size)
        self.to_out = nn.ModuleList([nn.Linear(hidden_size, hidden_size)])

    def forward(self, x_BLH: torch.Tensor) -> torch.Tensor:
        """Same shape."""
        q, k, v = (
            linear(x_BLH).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear in (self.to_q, self.to_k, self.to_v)
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](out.transpose(1, 2).flatten(2))


class LinearSiLU(nn.Module):
    """SiLU(Linear(x)); the linear is called `proj`."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_features, out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        return F.silu(self.proj(x))


class RefinerFeedForward(nn.Module):
    """Linear, SiLU, Linear; `net` has an empty middle where diffusers keeps its dropout, for the names' sake."""

    def __init__(self, hidden_size: int, inner: int) -> None:
        super().__init__()
        self.net = nn.Sequential(LinearSiLU(hidden_size, inner), nn.Identity(), nn.Linear(inner, hidden_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape."""
        return self.net(x)


class RefinerGates(nn.Module):
    """Linear(SiLU(c)) -> gate of attention, gate of MLP (diffusers: HunyuanVideo15AdaNorm; no shift, no scale)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 2 * hidden_size)

    def forward(self, condition_BH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Two [B, 1, H]."""
        gate_attn, gate_mlp = self.linear(F.silu(condition_BH))[:, None].chunk(2, dim=-1)
        return gate_attn, gate_mlp


class RefinerBlock(nn.Module):
    """x += attn(LN(x)) * gate; x += mlp(LN(x)) * gate."""

    def __init__(self, hidden_size: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.attn = RefinerAttention(hidden_size, heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.ff = RefinerFeedForward(hidden_size, 4 * hidden_size)  # the refiner's ratio is 4 whatever mlp_ratio says
        self.norm_out = RefinerGates(hidden_size)

    def forward(self, x_BLH: torch.Tensor, condition_BH: torch.Tensor) -> torch.Tensor:
        """Same shape."""
        gate_attn, gate_mlp = self.norm_out(condition_BH)
        x_BLH = torch.addcmul(x_BLH, self.attn(self.norm1(x_BLH)), gate_attn)
        return torch.addcmul(x_BLH, self.ff(self.norm2(x_BLH)), gate_mlp)


class RefinerBlocks(nn.Module):
    """The refiner's layers, one after the other."""

    def __init__(self, hidden_size: int, heads: int, num_layers: int) -> None:
        super().__init__()
        self.refiner_blocks = nn.ModuleList(RefinerBlock(hidden_size, heads) for _ in range(num_layers))

    def forward(self, x_BLH: torch.Tensor, condition_BH: torch.Tensor) -> torch.Tensor:
        """Same shape."""
        for block in self.refiner_blocks:
            x_BLH = block(x_BLH, condition_BH)
        return x_BLH


class TokenRefiner(nn.Module):
    """Qwen text -> hidden (diffusers: HunyuanVideo15TokenRefiner). Takes valid tokens only, hence no mask."""

    def __init__(self, config: HunyuanVideoConfig) -> None:
        super().__init__()
        self.time_text_embed = TimeTextEmbedding(config.text_embed_dim, config.hidden_size)
        self.proj_in = nn.Linear(config.text_embed_dim, config.hidden_size)
        self.token_refiner = RefinerBlocks(config.hidden_size, config.num_attention_heads, config.num_refiner_layers)

    def forward(self, qwen_BLD: torch.Tensor, timestep_B: torch.Tensor) -> torch.Tensor:
        """[B, L, text_embed_dim] -> [B, L, H]; L >= 1, since the mean over no token is 0/0."""
        condition = self.time_text_embed(timestep_B, qwen_BLD.mean(dim=1, dtype=torch.float32).to(qwen_BLD.dtype))
        return self.token_refiner(self.proj_in(qwen_BLD), condition)


class ByT5Projection(nn.Module):
    """Glyph text -> hidden (diffusers: HunyuanVideo15ByT5TextProjection). LayerNorm eps 1e-5, exact GELU."""

    def __init__(self, config: HunyuanVideoConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.text_embed_2_dim, eps=1e-5)
        self.linear_1 = nn.Linear(config.text_embed_2_dim, BYT5_INNER_WIDTH)
        self.linear_2 = nn.Linear(BYT5_INNER_WIDTH, BYT5_INNER_WIDTH)
        self.linear_3 = nn.Linear(BYT5_INNER_WIDTH, config.hidden_size)

    def forward(self, byt5_BLD: torch.Tensor) -> torch.Tensor:
        """[B, L, text_embed_2_dim] -> [B, L, H]."""
        x = F.gelu(self.linear_1(self.norm(byt5_BLD)))
        return self.linear_3(F.gelu(self.linear_2(x)))


class ImageProjection(nn.Module):
    """SigLIP tokens -> hidden (diffusers: HunyuanVideo15ImageProjection). LayerNorm eps 1e-5, exact GELU."""

    def __init__(self, config: HunyuanVideoConfig) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(config.image_embed_dim, eps=1e-5)
        self.linear_1 = nn.Linear(config.image_embed_dim, config.image_embed_dim)
        self.linear_2 = nn.Linear(config.image_embed_dim, config.hidden_size)
        self.norm_out = nn.LayerNorm(config.hidden_size, eps=1e-5)

    def forward(self, image_BLD: torch.Tensor) -> torch.Tensor:
        """[B, L, image_embed_dim] -> [B, L, H]."""
        return self.norm_out(self.linear_2(F.gelu(self.linear_1(self.norm_in(image_BLD)))))


class PatchEmbedding(nn.Module):
    """Latent channels -> hidden. diffusers' 1x1x1 Conv3d is this linear layer; the weight is stored as [H, C]."""

    def __init__(self, config: HunyuanVideoConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(config.in_channels, config.hidden_size)

    def forward(self, video_SBC: torch.Tensor) -> torch.Tensor:
        """[S, B, C] -> [S, B, H]."""
        return self.proj(video_SBC)
