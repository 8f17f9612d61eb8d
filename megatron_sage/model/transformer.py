"""The HunyuanVideo-1.5 DiT on Megatron-core (diffusers: HunyuanVideo15Transformer3DModel)."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.utils import sharded_state_dict_default
from torch.utils.checkpoint import checkpoint

from megatron_sage.errors import UserError
from megatron_sage.model.attention import TokenLayout
from megatron_sage.model.conditions import TextCondition
from megatron_sage.model.config import HunyuanVideoConfig
from megatron_sage.model.embeddings import ByT5Projection, ImageProjection, PatchEmbedding, TimeEmbedding, TokenRefiner
from megatron_sage.model.norm import AdaLayerNormOut, for_samples
from megatron_sage.model.precision import QuantisedLinear, runs_fp8
from megatron_sage.model.rope import rotary_table
from megatron_sage.model.specs import block_spec
from megatron_sage.model.stages import TIME_EMBEDDER
from megatron_sage.parallel.device import device
from megatron_sage.parallel.sequence import TokenShard, pad_tokens

QWEN, BYT5, IMAGE = range(3)  # rows of cond_type_embed


class HunyuanVideoDiT(MegatronModule):
    """Video tokens, timestep and text -> velocity.

    One object is one chunk of one pipeline stage: blocks keep their number in the whole model as their name. Every
    chunk has a copy of the timestep's embedder (Megatron's `pipeline_parallel` attribute makes `finalize_model_grads`
    sum their gradients; `shared` makes the gradient norm count one of them), only the first the other embedders, only
    the last the final layer. Without pipeline parallelism that is the whole model.

    The token embedders and the final layer see this rank's tokens only, so under sequence parallelism their parameters'
    gradients are partial and carry `sequence_parallel = True`: `finalize_model_grads` or
    `complete_gradients` sums them over TP. Over CP every gradient is partial; the sum over DP x CP, of which
    data parallelism is a part, completes it.
    """

    def __init__(
        self,
        config: HunyuanVideoConfig,
        pg_collection: ProcessGroupCollection,
        spec: ModuleSpec | None = None,
        vp_stage: int = 0,
    ) -> None:
        super().__init__(config=config)
        self.vp_stage = vp_stage
        _check_group_sizes(config, pg_collection)
        self.model_type = ModelType.encoder_or_decoder  # Megatron's schedules ask for it
        self.pg_collection = pg_collection
        self.tp_group, self.cp_group, self.pp_group = pg_collection.tp, pg_collection.cp, pg_collection.pp
        stages = config.stage_blocks
        self.virtual_stage = vp_stage * len(stages) + self.pp_group.rank()
        self.pre_process = self.virtual_stage == 0
        self.post_process = self.virtual_stage == len(stages) * len(stages[0]) - 1
        self.share_embeddings_and_output_weights = False  # Megatron asks where there is more than one stage
        self.input_tensor: torch.Tensor | None = None
        self.lora: Any = None  # its AdapterSettings once `lora.add_adapters` gave it adapters
        self.time_embed = TimeEmbedding(config.hidden_size, config.use_meanflow)
        if self.pre_process:
            self.x_embedder = PatchEmbedding(config)
            self.context_embedder = TokenRefiner(config)
            self.context_embedder_2 = ByT5Projection(config)
            self.image_embedder = ImageProjection(config)
            self.cond_type_embed = torch.nn.Embedding(3, config.hidden_size)
        spec = spec or block_spec(config)
        self.transformer_blocks = torch.nn.ModuleDict(
            {
                str(index): build_module(
                    spec, config=config, pg_collection=pg_collection, last=index == config.num_layers - 1
                )
                for index in stages[self.pp_group.rank()][vp_stage]
            }
        )
        for index, block in self.transformer_blocks.items():
            for module in block.modules():
                if isinstance(module, QuantisedLinear):
                    module.runs_fp8 = runs_fp8(config, int(index))
        if self.post_process:
            self.norm_out = AdaLayerNormOut(config, pg_collection)
            self.proj_out = torch.nn.Linear(config.hidden_size, config.out_channels)
        self.to(device=device(), dtype=config.params_dtype)
        self._mark_parameters()
        self.register_state_dict_post_hook(_drop_empty_extra_states)

    def _mark_parameters(self) -> None:
        """The attributes by which Megatron knows how a gradient is to be reduced and counted."""
        for name, parameter in self.named_parameters():
            if name.startswith(("x_embedder.", "proj_out.")):
                parameter.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]
            if name.startswith(TIME_EMBEDDER):
                parameter.pipeline_parallel = True  # type: ignore[attr-defined]
                parameter.shared = not self.pre_process  # type: ignore[attr-defined]

    def set_input_tensor(self, input_tensor: torch.Tensor | list[torch.Tensor | None] | None) -> None:
        """Where Megatron's schedules put what the stage before sent, None on the first one."""
        self.input_tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(
        self,
        video_SBC: torch.Tensor | None,
        timestep_B: torch.Tensor,
        text: TextCondition,
        grid: tuple[int, int, int],
        timestep_r_B: torch.Tensor | None = None,
        packed_SBH: torch.Tensor | None = None,
        embedded_LBH: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Velocity `noise - x0` at this rank's tokens, or what the next stage needs.

        Args:
            video_SBC: [S_local, B, in_channels], row-major over the grid; S_local = `image_shard(grid).local`. None on
                all stages but the first.
            timestep_B: [B] float32 in [0, 1000]; or fewer, each for an equal part of the batch, embedded once for it.
            text: conditions of the B samples; or of one, the same for all: embedded once too.
            grid: latent frames, height, width.
            timestep_r_B: [B] float32, MeanFlow's second time; needs `use_meanflow`.
            packed_SBH: [`packed_tokens(text, grid)`, B, H] of the stage before; None on the first stage.
            embedded_LBH: what `embed` gave of this text and timestep, of these weights; None: it is embedded here.

        Returns:
            The last stage: [S_local, B, out_channels] in the parameters' type; zeros at padding tokens, whose gradient
            is ignored. The others: video and text tokens one after the other, [`packed_tokens(text, grid)`, B, H].
        """
        layout = self._layout(grid, text, timestep_B.device)
        silu_temb_BH = F.silu(self.time_embed(timestep_B, timestep_r_B))
        if self.pre_process:
            self._check_inputs(video_SBC, timestep_B, text, layout.image, timestep_r_B)
            assert video_SBC is not None  # checked
            image_SBH = self.x_embedder(video_SBC.to(self.config.params_dtype))
            text_LBH = self.embed(text, timestep_B) if embedded_LBH is None else embedded_LBH
            text_LBH = for_samples(text_LBH, video_SBC.shape[1], dim=1).expand(-1, video_SBC.shape[1], -1)
        else:
            assert packed_SBH is not None, "a stage behind the first takes its input from the one before it"
            image_SBH, text_LBH = packed_SBH.split([layout.image.local, layout.text.local])
        # each rank's rows of the modulations give a part of its gradient: summed here, once for all blocks
        for_blocks = copy_to_tensor_model_parallel_region(silu_temb_BH, group=self.tp_group)
        for block in self.transformer_blocks.values():
            image_SBH, text_LBH = block(image_SBH, text_LBH, for_blocks, layout)
        if not self.post_process:
            return torch.cat([image_SBH, text_LBH])
        # padding is cut off by index, so that no gradient can enter through it
        velocity = self.proj_out(self.norm_out(image_SBH[: layout.image.valid], silu_temb_BH))
        return pad_tokens(velocity, layout.image.local)

    def image_shard(self, grid: tuple[int, int, int]) -> TokenShard:
        """How the video's tokens are cut: over CP, and over TP with sequence parallelism."""
        split = self.tp_group.size() if self.config.sequence_parallel else 1
        place = self.tp_group.rank() if self.config.sequence_parallel else 0
        parts, rank = self.cp_group.size() * split, self.cp_group.rank() * split + place
        return TokenShard(grid[0] * grid[1] * grid[2], parts, rank, self.config.fp8_alignment)

    @property
    def token_group(self) -> dist.ProcessGroup | None:
        """The ranks of a stage that split the video tokens, in the order of the tokens; None: each holds all."""
        if self.config.sequence_parallel:
            return self.pg_collection.tp_cp
        return self.cp_group if self.cp_group.size() > 1 else None

    def packed_tokens(self, text: TextCondition, grid: tuple[int, int, int]) -> int:
        """Tokens of this rank, video and text together, that cross a stage boundary for one forward."""
        return self.image_shard(grid).local + self._text_shard(text).local

    def _layout(self, grid: tuple[int, int, int], text: TextCondition, where: torch.device) -> TokenLayout:
        image = self.image_shard(grid)
        split = self.tp_group.size() if self.config.sequence_parallel else 1
        multiple = split * self.config.fp8_alignment
        context = TokenShard(image.num_tokens, self.cp_group.size(), self.cp_group.rank(), multiple)
        table = rotary_table(tuple(grid), self.config.rope_axes_dim, float(self.config.rope_theta), where)
        # by global index: a rank that began to count at its own first token would see another video
        mine = table[context.start : context.start + context.valid]
        return TokenLayout(image, context, self._text_shard(text), (mine, table))

    def embed(self, text: TextCondition, timestep_B: torch.Tensor) -> torch.Tensor:
        """The text stream's first tokens of this rank, [L_local, B, H]; B is 1 where text and timestep are shared.

        Recomputation, selective or full, makes it again as a whole: the embedders run whole on every TP and CP rank,
        theirs are the only activations that no layout divides. Not by Megatron's checkpoint, which gives parameters no
        gradient where no input wants one.
        """
        if self.config.recompute_granularity is None:
            text_LBH = self.embed_text(text, timestep_B)
        else:
            text_LBH = checkpoint(self.embed_text, text, timestep_B, use_reentrant=False)
        return self._shard_text(text_LBH, self._text_shard(text))

    def embed_text(self, text: TextCondition, timestep_B: torch.Tensor) -> torch.Tensor:
        """[image | ByT5 | Qwen] tokens, [L, B, H], whole on every rank."""
        dtype = self.config.params_dtype
        timestep_B = for_samples(timestep_B, max(text.batch, timestep_B.shape[0]))
        kinds = [(QWEN, self.context_embedder(text.qwen_BLD.to(dtype), timestep_B))]
        if text.byt5_BLD.shape[1]:
            kinds.insert(0, (BYT5, self.context_embedder_2(text.byt5_BLD.to(dtype))))
        if text.image_BLD.shape[1]:
            kinds.insert(0, (IMAGE, self.image_embedder(text.image_BLD.to(dtype))))
        rows, batch = self.cond_type_embed.weight, kinds[-1][1].shape[0]  # only Qwen's tokens depend on the timestep
        embedded = [(tokens + rows[kind]).expand(batch, -1, -1) for kind, tokens in kinds]
        return torch.cat(embedded, dim=1).transpose(0, 1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """For Megatron's distributed checkpoints: any tensor-parallel size loads what another one saved."""
        metadata = {"dp_cp_group": self.pg_collection.dp_cp, **(metadata or {})}
        tensors: dict[str, Any] = {}
        for name, child in self.named_children():
            # a ModuleDict knows nothing of sharding: taken as a whole, its shards would be declared replicas
            parts = (
                [(f"{name}.{index}", part) for index, part in child.items()]
                if isinstance(child, torch.nn.ModuleDict)
                else [(name, child)]
            )
            for part_name, part in parts:
                tensors.update(
                    sharded_state_dict_default(
                        part, f"{prefix}{part_name}.", sharded_offsets, metadata, tp_group=self.tp_group
                    )
                )
        for key, value in tensors.items():
            if key.startswith(f"{prefix}{TIME_EMBEDDER}"):  # the copies behind the first stage's are not saved again
                value.replica_id = (self.virtual_stage, *value.replica_id[1:])
        return {key: value for key, value in tensors.items() if not key.endswith("_extra_state")}

    def _text_shard(self, text: TextCondition) -> TokenShard:
        parts, rank = (self.tp_group.size(), self.tp_group.rank()) if self.config.sequence_parallel else (1, 0)
        return TokenShard(text.num_tokens, parts, rank, self.config.fp8_alignment)

    def _shard_text(self, text_LBH: torch.Tensor, shard: TokenShard) -> torch.Tensor:
        text_LBH = pad_tokens(text_LBH, shard.padded)
        if not self.config.sequence_parallel:
            return text_LBH
        # the backward pass gathers the ranks' gradients: the embedders, replicated, see the whole one
        return scatter_to_sequence_parallel_region(text_LBH, group=self.tp_group)

    def _check_inputs(
        self,
        video: torch.Tensor | None,
        timestep: torch.Tensor,
        text: TextCondition,
        shard: TokenShard,
        timestep_r: torch.Tensor | None,
    ) -> None:
        if video is None:
            raise UserError("video tokens are missing: the first pipeline stage needs them")
        batch = video.shape[1]
        if video.shape != (shard.local, batch, self.config.in_channels):
            raise UserError(
                f"video tokens have shape {tuple(video.shape)}, expected [{shard.local} tokens of this rank, batch, "
                f"{self.config.in_channels} channels] for {shard.num_tokens} tokens over {shard.parts} rank(s)"
            )
        lengths = [x.shape[0] for x in (timestep, text.qwen_BLD, text.byt5_BLD, text.image_BLD)]
        if batch % max(1, lengths[0]) or lengths[1] not in (1, batch) or len(set(lengths[1:])) > 1:
            raise UserError(
                f"video has batch {batch}; timestep, qwen, byt5 and image have {lengths}: make them equal, or 1 where "
                "all samples share it (timesteps: a divisor of the batch, each for an equal part of it)"
            )
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


def build_chunks(config: HunyuanVideoConfig, pg_collection: ProcessGroupCollection) -> list[HunyuanVideoDiT]:
    """This rank's part of the model: one chunk, or several under the interleaved schedule."""
    chunks = range(len(config.stage_blocks[0]))
    return [HunyuanVideoDiT(config, pg_collection, vp_stage=chunk) for chunk in chunks]


def _check_group_sizes(config: HunyuanVideoConfig, pg_collection: ProcessGroupCollection) -> None:
    for key, wanted, group in (
        ("parallel.tensor", config.tensor_model_parallel_size, pg_collection.tp),
        ("parallel.context", config.context_parallel_size, pg_collection.cp),
        ("parallel.pipeline", config.pipeline_model_parallel_size, pg_collection.pp),
    ):
        if wanted != group.size():
            raise UserError(
                f"{key}: the configuration says {wanted}, the process group has {group.size()} rank(s): make them equal"
            )


def _drop_empty_extra_states(
    module: torch.nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
) -> None:
    """Megatron's linears add `_extra_state: None` for Transformer Engine's sake: not part of the weights."""
    for key in [key for key, value in state_dict.items() if key.endswith("_extra_state") and value is None]:
        del state_dict[key]
