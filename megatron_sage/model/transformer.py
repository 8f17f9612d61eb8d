"""The HunyuanVideo-1.5 DiT on Megatron-core (diffusers: HunyuanVideo15Transformer3DModel)."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.utils import sharded_state_dict_default

from megatron_sage.errors import UserError
from megatron_sage.model.attention import TokenLayout
from megatron_sage.model.conditions import TextCondition
from megatron_sage.model.config import HunyuanVideoConfig
from megatron_sage.model.embeddings import ByT5Projection, ImageProjection, PatchEmbedding, TimeEmbedding, TokenRefiner
from megatron_sage.model.norm import AdaLayerNormOut
from megatron_sage.model.rope import rotary_table
from megatron_sage.model.specs import local_block_spec
from megatron_sage.parallel.device import device
from megatron_sage.parallel.sequence import TokenShard, pad_tokens

QWEN, BYT5, IMAGE = range(3)  # rows of cond_type_embed


class HunyuanVideoDiT(MegatronModule):
    """Video tokens, timestep and text -> velocity.

    The token embedders and the final layer see this rank's tokens only, so under sequence parallelism their parameters'
    gradients are partial and carry `sequence_parallel = True`: `finalize_model_grads` or
    `allreduce_replicated_gradients` sums them. All other replicated parameters get whole gradients.
    """

    def __init__(
        self, config: HunyuanVideoConfig, pg_collection: ProcessGroupCollection, spec: ModuleSpec | None = None
    ) -> None:
        super().__init__(config=config)
        _check_tensor_parallel_size(config, pg_collection)
        self.model_type = ModelType.encoder_or_decoder  # Megatron's schedules ask for it
        self.pg_collection = pg_collection
        self.tp_group = pg_collection.tp
        self.x_embedder = PatchEmbedding(config)
        self.time_embed = TimeEmbedding(config.hidden_size, config.use_meanflow)
        self.context_embedder = TokenRefiner(config)
        self.context_embedder_2 = ByT5Projection(config)
        self.image_embedder = ImageProjection(config)
        self.cond_type_embed = torch.nn.Embedding(3, config.hidden_size)
        block_spec = spec or local_block_spec()
        self.transformer_blocks = torch.nn.ModuleList(
            build_module(block_spec, config=config, pg_collection=pg_collection, last=index == config.num_layers - 1)
            for index in range(config.num_layers)
        )
        self.norm_out = AdaLayerNormOut(config, pg_collection)
        self.proj_out = torch.nn.Linear(config.hidden_size, config.out_channels)
        self.to(device=device(), dtype=config.params_dtype)
        for module in (self.x_embedder, self.proj_out):
            for parameter in module.parameters():
                parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.register_state_dict_post_hook(_drop_empty_extra_states)

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Megatron's schedules hand a stage its input here; the only stage has none. Raises ValueError for one."""
        if any(x is not None for x in (input_tensor if isinstance(input_tensor, list) else [input_tensor])):
            raise ValueError("set_input_tensor: this model is a single pipeline stage and takes no input tensor")

    def forward(
        self,
        video_SBC: torch.Tensor,
        timestep_B: torch.Tensor,
        text: TextCondition,
        grid: tuple[int, int, int],
        timestep_r_B: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Velocity `noise - x0` at this rank's tokens.

        Args:
            video_SBC: [S_local, B, in_channels], row-major over the grid; S_local = `image_shard(grid).local`.
            timestep_B: [B] float32 in [0, 1000].
            text: conditions of the B samples.
            grid: latent frames, height, width.
            timestep_r_B: [B] float32, MeanFlow's second time; needs `use_meanflow`.

        Returns:
            [S_local, B, out_channels] in the parameters' type; zeros at padding tokens, whose gradient is ignored.
        """
        layout = TokenLayout(
            image=self.image_shard(grid),
            text=self._shard(text.num_tokens),
            rotation=rotary_table(
                tuple(grid), self.config.rope_axes_dim, float(self.config.rope_theta), video_SBC.device
            ),
        )
        self._check_inputs(video_SBC, timestep_B, text, layout.image, timestep_r_B)
        silu_temb_BH = F.silu(self.time_embed(timestep_B, timestep_r_B))
        image_SBH = self.x_embedder(video_SBC.to(self.config.params_dtype))
        text_LBH = self._shard_text(self.embed_text(text, timestep_B), layout.text)
        for block in self.transformer_blocks:
            image_SBH, text_LBH = block(image_SBH, text_LBH, silu_temb_BH, layout)
        # padding is cut off by index, so that no gradient can enter through it
        velocity = self.proj_out(self.norm_out(image_SBH[: layout.image.valid], silu_temb_BH))
        return pad_tokens(velocity, layout.image.local)

    def image_shard(self, grid: tuple[int, int, int]) -> TokenShard:
        """How the video's tokens are cut: over TP with sequence parallelism, not at all without."""
        return self._shard(grid[0] * grid[1] * grid[2])

    def embed_text(self, text: TextCondition, timestep_B: torch.Tensor) -> torch.Tensor:
        """[image | ByT5 | Qwen] tokens, [L, B, H], whole on every rank."""
        dtype = self.config.params_dtype
        kinds = [(QWEN, self.context_embedder(text.qwen_BLD.to(dtype), timestep_B))]
        if text.byt5_BLD.shape[1]:
            kinds.insert(0, (BYT5, self.context_embedder_2(text.byt5_BLD.to(dtype))))
        if text.image_BLD.shape[1]:
            kinds.insert(0, (IMAGE, self.image_embedder(text.image_BLD.to(dtype))))
        rows = self.cond_type_embed.weight
        return torch.cat([tokens + rows[kind] for kind, tokens in kinds], dim=1).transpose(0, 1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """For Megatron's distributed checkpoints: any tensor-parallel size loads what another one saved."""
        metadata = {"dp_cp_group": self.pg_collection.dp_cp, **(metadata or {})}
        tensors: dict[str, Any] = {}
        for name, child in self.named_children():
            # a ModuleList knows nothing of sharding: taken as a whole, its shards would be declared replicas
            parts = (
                [(f"{name}.{index}", part) for index, part in enumerate(child)]
                if isinstance(child, torch.nn.ModuleList)
                else [(name, child)]
            )
            for part_name, part in parts:
                tensors.update(
                    sharded_state_dict_default(
                        part, f"{prefix}{part_name}.", sharded_offsets, metadata, tp_group=self.tp_group
                    )
                )
        return {key: value for key, value in tensors.items() if not key.endswith("_extra_state")}

    def _shard(self, num_tokens: int) -> TokenShard:
        if self.config.sequence_parallel:
            return TokenShard(num_tokens, self.tp_group.size(), self.tp_group.rank())
        return TokenShard(num_tokens, 1, 0)

    def _shard_text(self, text_LBH: torch.Tensor, shard: TokenShard) -> torch.Tensor:
        if not self.config.sequence_parallel:
            return text_LBH
        # the backward pass gathers the ranks' gradients: the embedders, replicated, see the whole one
        return scatter_to_sequence_parallel_region(pad_tokens(text_LBH, shard.padded), group=self.tp_group)

    def _check_inputs(
        self,
        video: torch.Tensor,
        timestep: torch.Tensor,
        text: TextCondition,
        shard: TokenShard,
        timestep_r: torch.Tensor | None,
    ) -> None:
        batch = video.shape[1]
        if video.shape != (shard.local, batch, self.config.in_channels):
            raise UserError(
                f"video tokens have shape {tuple(video.shape)}, expected [{shard.local} tokens of this rank, batch, "
                f"{self.config.in_channels} channels] for {shard.num_tokens} tokens over {shard.parts} rank(s)"
            )
        lengths = [x.shape[0] for x in (timestep, text.qwen_BLD, text.byt5_BLD, text.image_BLD)]
        if lengths != [batch] * 4:
            raise UserError(f"video has batch {batch}; timestep, qwen, byt5 and image have {lengths}: make them equal")
        for name, value in (("timestep", timestep), ("timestep_r", timestep_r)):
            if value is not None and value.dtype in (torch.bfloat16, torch.float16):
                raise UserError(f"{name}: {value.dtype} rounds a time by up to 2 of 1000: pass float32")
        if text.qwen_BLD.shape[1] == 0:
            raise UserError("qwen text: no valid token, its mean would be 0/0: encode an empty prompt as ' '")
        if (timestep_r is not None) != self.config.use_meanflow:
            raise UserError(
                f"timestep_r is {'given' if timestep_r is not None else 'missing'}, the model's use_meanflow is "
                f"{self.config.use_meanflow}: pass timestep_r exactly where use_meanflow is true"
            )


def _check_tensor_parallel_size(config: HunyuanVideoConfig, pg_collection: ProcessGroupCollection) -> None:
    size = pg_collection.tp.size()
    if config.tensor_model_parallel_size != size:
        raise UserError(
            f"parallel.tensor: the configuration says {config.tensor_model_parallel_size}, the process group has "
            f"{size} rank(s): make them equal"
        )


def _drop_empty_extra_states(
    module: torch.nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
) -> None:
    """Megatron's linears add `_extra_state: None` for Transformer Engine's sake: not part of the weights."""
    for key in [key for key, value in state_dict.items() if key.endswith("_extra_state") and value is None]:
        del state_dict[key]
