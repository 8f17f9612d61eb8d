"""Configuration of the DiT: a Megatron TransformerConfig that knows the diffusers `config.json` it came from."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from megatron_sage import parallel  # noqa: F401  (prepares the CPU backend before megatron is imported)
from megatron_sage.errors import UserError

from megatron.core.transformer.transformer_config import TransformerConfig  # isort: skip
from megatron_sage.model.stages import balanced_layout, blocks_of_stages, parse_layout  # isort: skip
from megatron_sage.parallel.context import ALLGATHER, AUTO, ULYSSES, choose_backend  # isort: skip

DIFFUSERS_CLASS = "HunyuanVideo15Transformer3DModel"
BYT5_INNER_WIDTH = 2048  # hard-coded in diffusers and in the official code, whatever the model's size
RECOMPUTE = ("none", "selective", "full")
TE_BACKENDS = ("te_p2p", "te_a2a", "te_a2a+p2p")  # Transformer Engine's, GPU only
# A tile's edge, or what Transformer Engine documents for one scale a tensor; mxfp8 and blockwise tensors are gathered
# over TP in whole tiles only.
FP8_ALIGNMENT = {"delayed": 16, "tensorwise": 16, "mxfp8": 32, "blockwise": 128}
CONTEXT_BACKENDS = (AUTO, ULYSSES, ALLGATHER, *TE_BACKENDS)

# diffusers' constructor defaults: what a key that is absent from config.json means
_DIFFUSERS_DEFAULTS: dict[str, Any] = {
    "in_channels": 65,
    "out_channels": 32,
    "num_attention_heads": 16,
    "attention_head_dim": 128,
    "num_layers": 54,
    "num_refiner_layers": 2,
    "mlp_ratio": 4.0,
    "patch_size": 1,
    "patch_size_t": 1,
    "qk_norm": "rms_norm",
    "text_embed_dim": 3584,
    "text_embed_2_dim": 1472,
    "image_embed_dim": 1152,
    "rope_theta": 256.0,
    "rope_axes_dim": (16, 56, 56),
    "target_size": 640,
    "task_type": "i2v",
    "use_meanflow": False,
}
_SAME_NAME = tuple(
    key for key in _DIFFUSERS_DEFAULTS if key not in ("num_attention_heads", "attention_head_dim", "num_layers")
)


@dataclass
class HunyuanVideoConfig(TransformerConfig):
    """TransformerConfig plus the fields of diffusers' HunyuanVideo15Transformer3DModel, under diffusers' names.

    Megatron's `kv_channels` is diffusers' `attention_head_dim`. Build it with `from_diffusers`.
    """

    in_channels: int = 65
    """32 noisy latents, 32 condition latents, 1 mask, in this order."""
    out_channels: int = 32
    patch_size: int = 1
    patch_size_t: int = 1
    num_refiner_layers: int = 2
    mlp_ratio: float = 4.0
    qk_norm: str = "rms_norm"
    text_embed_dim: int = 3584
    text_embed_2_dim: int = 1472
    image_embed_dim: int = 1152
    rope_theta: float = 256.0
    rope_axes_dim: tuple[int, int, int] = (16, 56, 56)
    """Channels of a head that rotate with t, h and w."""
    target_size: int = 640
    task_type: str = "i2v"
    use_meanflow: bool = False
    diffusers_version: str | None = None
    """`_diffusers_version` of the config.json, kept so that it can be written back as it was."""
    context_backend: str = AUTO
    """How attention exchanges tokens over CP; `auto` is resolved on construction."""
    compile_elementwise: bool = False
    """`torch.compile` of what is between the GEMMs and attention (`elementwise.kernels`)."""
    fp8_first_bf16: int = 0
    """Blocks at the beginning of the model that stay bf16 where `fp8` is set. Megatron's `first_last_layers_bf16` is
    not used: it goes by its own block and refuses the delayed recipe."""
    fp8_last_bf16: int = 0
    """Blocks at its end that do."""
    has_cond_embedder: bool = True
    """Makes `finalize_model_grads` sum the timestep embedder's gradients over the pipeline: each stage has a copy."""

    def __post_init__(self) -> None:
        self.rope_axes_dim = tuple(self.rope_axes_dim)  # type: ignore[assignment]  # json has lists
        _validate(self)
        if self.context_backend == AUTO:
            sizes = self.num_attention_heads, self.tensor_model_parallel_size, self.context_parallel_size
            self.context_backend, _ = choose_backend(*sizes)
        # Megatron's rules for FP8 are those of its own block, whose recompute and first and last layers work in
        # another way: it would refuse what this model can do. `config.state_rules` has this model's.
        chosen = self.__dict__["fp8"]
        self.fp8 = None
        super().__post_init__()
        self.fp8 = chosen

    @property
    def fp8_alignment(self) -> int:
        """Of what FP8 GEMMs take, the number of tokens and of features on a rank must be a multiple; 1 without FP8."""
        return 1 if self.fp8 is None else FP8_ALIGNMENT[str(self.fp8_recipe)]

    @property
    def stage_blocks(self) -> list[list[range]]:
        """`[pipeline rank][chunk]` -> indices of its blocks."""
        return blocks_of_stages(self.pipeline_model_parallel_layout, self.num_layers)  # type: ignore[arg-type]

    @classmethod
    def from_diffusers(
        cls,
        config: Mapping[str, Any],
        *,
        tensor: int = 1,
        sequence_parallel: bool = False,
        context: int = 1,
        context_backend: str = AUTO,
        pipeline: int = 1,
        virtual_pipeline: int | None = None,
        pipeline_layout: str | None = None,
        dtype: torch.dtype = torch.float32,
        recompute: str = "none",
        **overrides: Any,
    ) -> "HunyuanVideoConfig":
        """Read a diffusers `config.json`.

        Args:
            config: the parsed json; absent keys mean diffusers' defaults, keys that start with `_` are its bookkeeping.
            tensor: tensor-parallel size.
            sequence_parallel: shard the tokens over TP between attention and MLP; ignored where `tensor` is 1.
            context: context-parallel size.
            context_backend: `auto`, `ulysses`, `allgather`, or one of Transformer Engine's (`te_*`).
            pipeline: pipeline stages, of any number of blocks each.
            virtual_pipeline: chunks of each stage (interleaved schedule); None or 1: one.
            pipeline_layout: the blocks of each stage in Megatron's notation; None: balanced.
            dtype: of all parameters.
            recompute: "full" keeps each block's input only; "selective" recomputes the second half of
                a block (gate, norm, MLP) too; norms, RoPE and heads are made again in every mode, so "layernorm" adds
                nothing. `recompute_modules` among the overrides chooses otherwise ("core_attn").
            overrides: further TransformerConfig fields.

        Raises:
            UserError: another architecture, an unknown key, or values that do not fit together.
        """
        architecture = config.get("_class_name", DIFFUSERS_CLASS)
        if architecture != DIFFUSERS_CLASS:
            raise UserError(f"config.json: _class_name is {architecture!r}, this model is {DIFFUSERS_CLASS!r}")
        given = {key: value for key, value in config.items() if not key.startswith("_")}
        unknown = sorted(set(given) - set(_DIFFUSERS_DEFAULTS))
        if unknown:
            raise UserError(f"config.json: unknown key {unknown[0]!r} for {DIFFUSERS_CLASS}: remove it")
        if recompute not in RECOMPUTE:
            raise UserError(f"recompute: {recompute!r} is not one of {', '.join(RECOMPUTE)}")
        fields = {**_DIFFUSERS_DEFAULTS, **given}
        _check_types(fields)
        heads, head_dim = fields["num_attention_heads"], fields["attention_head_dim"]
        megatron: dict[str, Any] = {
            "num_layers": fields["num_layers"],
            "hidden_size": heads * head_dim,
            "ffn_hidden_size": int(heads * head_dim * fields["mlp_ratio"]),
            "num_attention_heads": heads,
            "kv_channels": head_dim,
            "tensor_model_parallel_size": tensor,
            "sequence_parallel": sequence_parallel and tensor > 1,
            "params_dtype": dtype,
            "bf16": dtype is torch.bfloat16,
            "fp16": dtype is torch.float16,
            "context_parallel_size": context,
            "context_backend": context_backend,
            "diffusers_version": config.get("_diffusers_version"),
            **_FIXED,
            **_pipeline_fields(fields["num_layers"], pipeline, virtual_pipeline, pipeline_layout, dtype),
            **_recompute_fields(recompute),
        }
        return cls(**{**megatron, **{key: fields[key] for key in _SAME_NAME}, **overrides})

    def to_diffusers(self) -> dict[str, Any]:
        """The `config.json` of the same model: all of diffusers' keys, and its bookkeeping."""
        values: dict[str, Any] = {"_class_name": DIFFUSERS_CLASS}
        if self.diffusers_version is not None:
            values["_diffusers_version"] = self.diffusers_version
        for key in _DIFFUSERS_DEFAULTS:
            name = {"attention_head_dim": "kv_channels"}.get(key, key)
            values[key] = getattr(self, name)
        values["rope_axes_dim"] = list(self.rope_axes_dim)
        return values


# what the architecture fixes, in TransformerConfig's words
_FIXED: dict[str, Any] = {
    "activation_func": functools.partial(F.gelu, approximate="tanh"),
    "add_bias_linear": True,
    "add_qkv_bias": True,
    "gated_linear_unit": False,
    "bias_activation_fusion": False,
    "qk_layernorm": True,
    "normalization": "LayerNorm",
    "layernorm_epsilon": 1e-6,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "cuda_graph_scope": [],  # the default is a deprecated spelling of this
}


def _pipeline_fields(
    num_layers: int, pipeline: int, virtual: int | None, layout: str | None, dtype: torch.dtype
) -> dict[str, Any]:
    """Megatron's fields for a pipeline; none for a single stage, whatever the other arguments say."""
    if pipeline == 1:
        if (virtual or 1) > 1 or layout is not None:
            raise UserError("parallel.virtual_pipeline and parallel.pipeline_layout need parallel.pipeline > 1")
        return {}
    if layout is None:
        rows = balanced_layout(num_layers, pipeline, virtual or 1)
    else:
        rows = parse_layout(layout, num_layers, pipeline, virtual)
    interleaved = len(rows) > pipeline
    return {
        "pipeline_model_parallel_size": pipeline,
        "virtual_pipeline_model_parallel_size": len(rows) // pipeline if interleaved else None,
        "pipeline_model_parallel_layout": rows,
        "pipeline_dtype": dtype,
        # Two traps of Megatron-core 0.16, neither of which it checks: interleaved with two stages computes wrong
        # numbers unless sends and receives overlap, and with overlap a deallocated output may be sent as garbage.
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        # Before PyTorch 1.13 waiting for a batch of sends and receives waited for nothing (pytorch#82450), so Megatron
        # stops the host behind each exchange unless told that PyTorch is newer.
        "batch_p2p_sync": False,
        "deallocate_pipeline_outputs": False,
    }


def _recompute_fields(recompute: str) -> dict[str, Any]:
    if recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["layernorm", "mlp"]}
    return {}


def _check_types(fields: Mapping[str, Any]) -> None:
    for key, default in _DIFFUSERS_DEFAULTS.items():
        value = fields[key]
        wanted = {float: (int, float), tuple: (list, tuple)}.get(type(default), (type(default),))
        if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
            raise UserError(f"config.json: {key} is {value!r}, expected a value like {default!r}")
        if type(default) is int and isinstance(value, int) and value < 1:
            raise UserError(f"config.json: {key} is {value}, must be at least 1")


def _validate(config: HunyuanVideoConfig) -> None:
    heads, tensor, head_dim = config.num_attention_heads, config.tensor_model_parallel_size, config.kv_channels
    if heads % tensor:
        raise UserError(
            f"parallel.tensor: {heads} attention heads cannot be divided over tensor={tensor}: choose a divisor"
        )
    context = config.context_parallel_size
    if config.context_backend not in CONTEXT_BACKENDS:
        raise UserError(f"parallel.context_backend={config.context_backend}: choose from {', '.join(CONTEXT_BACKENDS)}")
    if config.context_backend in (ULYSSES, "te_a2a") and heads // tensor % context:
        raise UserError(
            f"parallel.context_backend={config.context_backend}: {heads} heads / tensor {tensor} = {heads // tensor} "
            f"cannot be divided over context={context}: choose allgather, or a context size that divides"
        )
    if head_dim is None or config.hidden_size != heads * head_dim:
        raise UserError(f"config.json: hidden_size {config.hidden_size} is not {heads} heads * {head_dim} channels")
    axes = config.rope_axes_dim
    if len(axes) != 3 or any(axis % 2 for axis in axes) or sum(axes) != head_dim:
        raise UserError(
            f"config.json: rope_axes_dim {list(axes)} must be three even numbers that add up to "
            f"attention_head_dim = {head_dim}"
        )
    if (config.patch_size, config.patch_size_t) != (1, 1):
        raise UserError(
            f"config.json: patch_size {config.patch_size}, patch_size_t {config.patch_size_t}: only 1 is supported, "
            "the released models' value"
        )
    if config.qk_norm != "rms_norm":
        raise UserError(
            f"config.json: qk_norm {config.qk_norm!r} is not supported, the released models have 'rms_norm'"
        )
    supported = {"core_attn", "layernorm", "mlp"}
    if config.recompute_granularity == "selective" and not set(config.recompute_modules or []) <= supported:
        raise UserError(f"recompute_modules: {config.recompute_modules} must be among {sorted(supported)}")
