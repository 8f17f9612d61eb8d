"""The double-stream block: joint attention, then an MLP per stream, each gated by adaLN-Zero."""

from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module

from megatron_sage.model.attention import TokenLayout
from megatron_sage.model.config import HunyuanVideoConfig
from megatron_sage.model.elementwise import gated_modulated_norm, gated_residual, kernels, modulated_norm
from megatron_sage.model.norm import AdaModulation, Modulation, modulations
from megatron_sage.model.precision import real_rows
from megatron_sage.model.recompute import run, selective_modules


@dataclass
class DoubleStreamBlockSubmodules:
    """What a spec chooses."""

    modulation_linear: ModuleSpec | type
    attention: ModuleSpec
    mlp: ModuleSpec


class StreamMLP(MLP):
    """Megatron's MLP that knows how many of its tokens are real: in FP8 padding may not take part in a scale."""

    def forward(self, x_SBH: torch.Tensor, local: int, whole: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`local` real tokens of `x`, `whole` of what the first linear makes of it: sequence parallelism gathers."""
        if self.config.fp8 is None:
            return super().forward(x_SBH)
        hidden, bias = self.linear_fc1(real_rows(x_SBH, local))
        return self.linear_fc2(real_rows(self.activation_func(hidden + bias), whole))


class DoubleStreamBlock(MegatronModule):
    """One block (diffusers: HunyuanVideo15TransformerBlock); `norm1*`, `ff*` are its names too.

    The last block has text parameters that nothing uses (its text output is discarded): they are kept for the
    checkpoint's sake and frozen. With a gradient of zero weight decay would shrink them all the same, Muon would step
    on noise, and a gradient bucket that waits for their gradient would wait for ever.
    """

    def __init__(
        self,
        config: HunyuanVideoConfig,
        submodules: DoubleStreamBlockSubmodules,
        pg_collection: ProcessGroupCollection,
        last: bool = False,
    ) -> None:
        super().__init__(config=config)
        self.tp_group = pg_collection.tp
        self.last = last
        self.recompute = selective_modules(config)
        self.ops = kernels(config.compile_elementwise)
        self.norm1 = AdaModulation(config, submodules.modulation_linear, pg_collection)
        self.norm1_context = AdaModulation(config, submodules.modulation_linear, pg_collection)
        self.attn = build_module(submodules.attention, config=config, pg_collection=pg_collection, last=last)
        self.ff, self.ff_context = (
            build_module(
                submodules.mlp, config=config, ffn_hidden_size=config.ffn_hidden_size, tp_group=pg_collection.tp
            )
            for _ in range(2)
        )
        if last:
            for module in (self.ff_context, self.attn.txt_proj, self.attn.txt_q_layernorm):
                module.requires_grad_(False)

    def forward(
        self, image_SBH: torch.Tensor, text_LBH: torch.Tensor, silu_temb_BH: torch.Tensor, layout: TokenLayout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's tokens of both streams in and out; the last block hands the text through untouched."""

        def block(image: torch.Tensor, text: torch.Tensor, silu_temb: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return self._block(image, text, silu_temb, layout)

        full = self.config.recompute_granularity == "full"
        out = run(full, block, image_SBH, text_LBH, silu_temb_BH)
        return out if not self.last else (out[0], text_LBH)

    def _block(
        self, image: torch.Tensor, text: torch.Tensor, silu_temb: torch.Tensor, layout: TokenLayout
    ) -> tuple[torch.Tensor, ...]:
        streams = self.norm1, self.norm1_context
        sequence_parallel, batch = self.config.sequence_parallel, image.shape[1]
        image_mod, text_mod = modulations(silu_temb, streams, self.tp_group, sequence_parallel, batch)
        image_attn, text_attn = self.attn(
            modulated_norm(self.ops, image, image_mod.shift_attn, image_mod.scale_attn),
            modulated_norm(self.ops, text, text_mod.shift_attn, text_mod.scale_attn),
            layout,
        )
        image = self._mlp(self.ff, image, image_attn, image_mod, layout.image.valid, layout.context.valid)
        if text_attn is None:
            return (image,)
        valid = layout.text.valid, layout.text.num_tokens
        return image, self._mlp(self.ff_context, text, text_attn, text_mod, *valid)

    def _mlp(
        self, mlp: torch.nn.Module, x: torch.Tensor, attn: torch.Tensor, mod: Modulation, local: int, whole: int
    ) -> torch.Tensor:
        """The block's second half, from attention's answer on: both residuals, the norm between them, the MLP."""

        def half(x: torch.Tensor, attn: torch.Tensor, *mod: torch.Tensor) -> torch.Tensor:
            gate_attn, shift, scale, gate = mod
            x, normed = gated_modulated_norm(self.ops, x, attn, gate_attn, shift, scale)
            branch, bias = mlp(normed, local, whole)
            return gated_residual(self.ops, x, branch, bias, gate)

        return run("mlp" in self.recompute, half, x, attn, mod.gate_attn, mod.shift_mlp, mod.scale_mlp, mod.gate_mlp)
