"""Joint attention of the double-stream block: image and text have their own projections and norms, one softmax."""

from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module

from megatron_sage.model.config import HunyuanVideoConfig
from megatron_sage.model.elementwise import kernels
from megatron_sage.model.joint import JointHeads
from megatron_sage.model.precision import real_rows
from megatron_sage.model.recompute import run, selective_modules
from megatron_sage.parallel.sequence import TokenShard, pad_tokens


@dataclass(frozen=True)
class TokenLayout:
    """How many tokens of each stream there are, how they are sharded, and the image tokens' rotations."""

    image: TokenShard
    """Over CP, and over TP with sequence parallelism: what a rank has between attentions."""
    context: TokenShard
    """Over CP alone: what a rank has inside attention, on its heads."""
    text: TokenShard
    """Over TP with sequence parallelism; CP ranks hold the same text tokens."""
    rotations: tuple[torch.Tensor, torch.Tensor]
    """[context.valid, D/2] complex64, of these tokens' global positions; and of all tokens."""


@dataclass
class JointAttentionSubmodules:
    """What a spec chooses."""

    qkv: ModuleSpec | type
    proj: ModuleSpec | type
    qk_norm: ModuleSpec | type
    core: ModuleSpec | type


class JointAttention(MegatronModule):
    """Attention over [image tokens | text tokens], heads divided over TP.

    Fused QKV rows are [head][q, k, v][channel], so a contiguous split of the rows is a split of the heads.

    With sequence parallelism a stream is whole again (on this rank's heads and its context-parallel part) between `qkv`
    and `proj`: there the padding that made it divisible is cut off, and put back after the softmax. Hence no mask. What
    context parallelism exchanges is the core's business.
    """

    def __init__(
        self,
        config: HunyuanVideoConfig,
        submodules: JointAttentionSubmodules,
        pg_collection: ProcessGroupCollection,
        last: bool = False,
    ) -> None:
        super().__init__(config=config)
        self.tp_group = pg_collection.tp
        self.last = last
        self.recompute = selective_modules(config)
        self.ops, self.eps = kernels(config.compile_elementwise), config.layernorm_epsilon
        self.img_qkv, self.txt_qkv = (self._qkv(submodules.qkv) for _ in range(2))
        self.img_proj, self.txt_proj = (self._proj(submodules.proj) for _ in range(2))
        # the words q_layernorm and k_layernorm make Megatron sum these weights' gradients over TP
        self.img_q_layernorm, self.img_k_layernorm, self.txt_q_layernorm, self.txt_k_layernorm = (
            build_module(submodules.qk_norm, config.kv_channels) for _ in range(4)
        )
        self.core = build_module(submodules.core, config=config, pg_collection=pg_collection)

    def _qkv(self, spec: ModuleSpec | type) -> torch.nn.Module:
        return build_module(
            spec,
            self.config.hidden_size,
            3 * self.config.hidden_size,
            config=self.config,
            init_method=self.config.init_method,
            bias=True,
            gather_output=False,
            skip_bias_add=False,
            is_expert=False,
            tp_group=self.tp_group,
        )

    def _proj(self, spec: ModuleSpec | type) -> torch.nn.Module:
        return build_module(
            spec,
            self.config.hidden_size,
            self.config.hidden_size,
            config=self.config,
            init_method=self.config.output_layer_init_method,
            bias=True,
            input_is_parallel=True,
            skip_bias_add=False,
            is_expert=False,
            tp_group=self.tp_group,
        )

    def forward(
        self, image_SBH: torch.Tensor, text_LBH: torch.Tensor, layout: TokenLayout
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """This rank's tokens in and out. The last block's text output is None: nothing reads it."""
        context, num_text = layout.context, layout.text.num_tokens
        if self.config.fp8 is not None:
            image_SBH, text_LBH = real_rows(image_SBH, layout.image.valid), real_rows(text_LBH, layout.text.valid)
        per_head = (-1, 3, self.config.kv_channels)
        image_qkv = self.img_qkv(image_SBH)[0][: context.valid].unflatten(-1, per_head)  # [S, B, N, 3, D]
        text_qkv = self.txt_qkv(text_LBH)[0][:num_text].unflatten(-1, per_head)
        recompute = "core_attn" in self.recompute

        def joint(image_qkv: torch.Tensor, text_qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
            # what is recomputed as a whole keeps nothing that were worth making once more
            rebuild = not (recompute or self.config.recompute_granularity == "full")
            heads = JointHeads(self.ops, self._norms(), self.eps, layout.rotations, self.last, rebuild)
            image_out, text_out = self.core(image_qkv, text_qkv, context, heads)
            return (image_out,) if text_out is None else (image_out, text_out)

        out = run(recompute, joint, image_qkv, text_qkv)
        image_out = self.img_proj(pad_tokens(out[0], context.local))[0]
        return image_out, None if self.last else self.txt_proj(pad_tokens(out[1], layout.text.padded))[0]

    def _norms(self) -> tuple[torch.Tensor, ...]:
        norms = (self.img_q_layernorm, self.img_k_layernorm, self.txt_q_layernorm, self.txt_k_layernorm)
        return tuple(norm.weight for norm in norms)
