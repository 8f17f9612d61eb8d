"""The one table of parameter names: ours <-> diffusers <-> official, for weights and for gradients.

`diffusers` names are those of `HunyuanVideo15Transformer3DModel`; `official` names those of Tencent's
`HunyuanVideo_1_5_DiffusionTransformer`; `ours` those of `megatron_sage.model.transformer.HunyuanVideoDiT`.
A `Row` describes one module (weight and bias) or one group of modules that a layout stores as a single tensor; a
`Binding` is a row written out for one block and one suffix. Rules act on the first dimension and are linear maps, so
gradients travel through the same table, and a tensor-parallel slice of the inputs gives the slice of the output.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from torch import Tensor

from megatron_sage.checkpoint.rules import Rule

Layout = Literal["ours", "diffusers", "official"]
Names = str | tuple[str, ...]

_BLOCK = "transformer_blocks.{i}."


@dataclass(frozen=True)
class Dimensions:
    """The sizes that the table's symbolic shapes name. Built from a diffusers config.json."""

    num_layers: int
    num_refiner_layers: int
    hidden: int
    head_dim: int
    mlp: int
    patch_in: tuple[int, ...]  # input channels and patch size of the Conv3d
    patch_out: int
    text: int
    glyph: int
    image: int
    use_meanflow: bool

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Dimensions:
        """`config`: a complete diffusers config (see `configs.complete`)."""
        hidden = config["num_attention_heads"] * config["attention_head_dim"]
        patch = (config["patch_size_t"], config["patch_size"], config["patch_size"])
        out_channels = config["out_channels"] or config["in_channels"]
        return cls(
            num_layers=config["num_layers"],
            num_refiner_layers=config["num_refiner_layers"],
            hidden=hidden,
            head_dim=config["attention_head_dim"],
            mlp=int(hidden * config["mlp_ratio"]),
            patch_in=(config["in_channels"], *patch),
            patch_out=out_channels * patch[0] * patch[1] * patch[2],
            text=config["text_embed_dim"],
            glyph=config["text_embed_2_dim"],
            image=config["image_embed_dim"],
            use_meanflow=bool(config["use_meanflow"]),
        )

    def resolve(self, shape: Sequence[str | int]) -> tuple[int, ...]:
        """("6*hidden", "hidden") -> numbers."""
        sizes: list[int] = []
        for item in shape:
            if isinstance(item, int):
                sizes.append(item)
                continue
            factor, _, name = item.rpartition("*")
            value = getattr(self, name)
            sizes.extend(value if isinstance(value, tuple) else [int(factor or 1) * value])
        return tuple(sizes)


@dataclass(frozen=True)
class Row:
    """One line of the table. Paths are module paths with `{i}` for the block; `shape` is that of ONE diffusers weight.

    `split`: how OUR module is cut over tensor-parallel ranks: "rows" (weight and bias), "columns" (weight only) or
    None (a copy on each rank).
    """

    diffusers: Names
    official: Names
    shape: tuple[str | int, ...]
    ours: Names | None = None  # None: the diffusers names
    split: Literal["rows", "columns"] | None = None
    ours_rule: Rule = Rule.IDENTITY
    official_rule: Rule = Rule.IDENTITY
    suffixes: tuple[str, ...] = ("weight", "bias")
    meanflow: bool = False


def _attention(ours: str, qkv: tuple[str, ...], norms: tuple[str, str], out: str) -> tuple[Row, ...]:
    attn, official = _BLOCK + "attn.", "double_blocks.{i}." + ours + "_attn_"
    q_norm, k_norm = (attn + name for name in norms)
    return (
        Row(
            tuple(attn + name for name in qkv),
            (official + "q", official + "k", official + "v"),
            ("hidden", "hidden"),
            ours=f"{attn}{ours}_qkv",
            ours_rule=Rule.INTERLEAVE_HEADS,
            split="rows",
        ),
        Row(attn + out, official + "proj", ("hidden", "hidden"), ours=f"{attn}{ours}_proj", split="columns"),
        Row(q_norm, official + "q_norm", ("head_dim",), ours=f"{attn}{ours}_q_layernorm", suffixes=("weight",)),
        Row(k_norm, official + "k_norm", ("head_dim",), ours=f"{attn}{ours}_k_layernorm", suffixes=("weight",)),
    )


def _mlp(name: str, official: str) -> tuple[Row, ...]:
    mlp, official = _BLOCK + name, "double_blocks.{i}." + official
    return (
        Row(mlp + ".net.0.proj", official + ".fc1", ("mlp", "hidden"), ours=mlp + ".linear_fc1", split="rows"),
        Row(mlp + ".net.2", official + ".fc2", ("hidden", "mlp"), ours=mlp + ".linear_fc2", split="columns"),
    )


_TEXT = "context_embedder.time_text_embed."
_REFINER = "context_embedder.token_refiner.refiner_blocks.{i}."
_REFINER_OFFICIAL = "txt_in.individual_token_refiner.blocks.{i}."

TABLE: tuple[Row, ...] = (
    Row("time_embed.timestep_embedder.linear_1", "time_in.mlp.0", ("hidden", 256)),
    Row("time_embed.timestep_embedder.linear_2", "time_in.mlp.2", ("hidden", "hidden")),
    Row("time_embed.timestep_embedder_r.linear_1", "time_r_in.mlp.0", ("hidden", 256), meanflow=True),
    Row("time_embed.timestep_embedder_r.linear_2", "time_r_in.mlp.2", ("hidden", "hidden"), meanflow=True),
    Row("x_embedder.proj", "img_in.proj", ("hidden", "patch_in"), ours_rule=Rule.FLATTEN, suffixes=("weight",)),
    Row("x_embedder.proj", "img_in.proj", ("hidden",), suffixes=("bias",)),
    # Qwen2.5-VL text and its refiner (MLP ratio 4 and the inner width 2048 of the glyph MLP are constants of the class)
    Row(_TEXT + "timestep_embedder.linear_1", "txt_in.t_embedder.mlp.0", ("hidden", 256)),
    Row(_TEXT + "timestep_embedder.linear_2", "txt_in.t_embedder.mlp.2", ("hidden", "hidden")),
    Row(_TEXT + "text_embedder.linear_1", "txt_in.c_embedder.linear_1", ("hidden", "text")),
    Row(_TEXT + "text_embedder.linear_2", "txt_in.c_embedder.linear_2", ("hidden", "hidden")),
    Row("context_embedder.proj_in", "txt_in.input_embedder", ("hidden", "text")),
    Row(_REFINER + "norm1", _REFINER_OFFICIAL + "norm1", ("hidden",)),
    Row(
        (_REFINER + "attn.to_q", _REFINER + "attn.to_k", _REFINER + "attn.to_v"),
        _REFINER_OFFICIAL + "self_attn_qkv",
        ("hidden", "hidden"),
        official_rule=Rule.CONCAT,
    ),
    Row(_REFINER + "attn.to_out.0", _REFINER_OFFICIAL + "self_attn_proj", ("hidden", "hidden")),
    Row(_REFINER + "norm2", _REFINER_OFFICIAL + "norm2", ("hidden",)),
    Row(_REFINER + "ff.net.0.proj", _REFINER_OFFICIAL + "mlp.fc1", ("4*hidden", "hidden")),
    Row(_REFINER + "ff.net.2", _REFINER_OFFICIAL + "mlp.fc2", ("hidden", "4*hidden")),
    Row(_REFINER + "norm_out.linear", _REFINER_OFFICIAL + "adaLN_modulation.1", ("2*hidden", "hidden")),
    # ByT5 glyph text
    Row("context_embedder_2.norm", "byt5_in.layernorm", ("glyph",)),
    Row("context_embedder_2.linear_1", "byt5_in.fc1", (2048, "glyph")),
    Row("context_embedder_2.linear_2", "byt5_in.fc2", (2048, 2048)),
    Row("context_embedder_2.linear_3", "byt5_in.fc3", ("hidden", 2048)),
    # SigLIP image
    Row("image_embedder.norm_in", "vision_in.proj.0", ("image",)),
    Row("image_embedder.linear_1", "vision_in.proj.1", ("image", "image")),
    Row("image_embedder.linear_2", "vision_in.proj.3", ("hidden", "image")),
    Row("image_embedder.norm_out", "vision_in.proj.4", ("hidden",)),
    Row("cond_type_embed", "cond_type_embedding", (3, "hidden"), suffixes=("weight",)),
    # Double-stream blocks
    Row(_BLOCK + "norm1.linear", "double_blocks.{i}.img_mod.linear", ("6*hidden", "hidden"), split="rows"),
    Row(_BLOCK + "norm1_context.linear", "double_blocks.{i}.txt_mod.linear", ("6*hidden", "hidden"), split="rows"),
    *_attention("img", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "to_out.0"),
    *_attention("txt", ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k"), "to_add_out"),
    *_mlp("ff", "img_mlp"),
    *_mlp("ff_context", "txt_mlp"),
    # The official final layer computes (shift, scale), diffusers (scale, shift).
    Row(
        "norm_out.linear",
        "final_layer.adaLN_modulation.1",
        ("2*hidden", "hidden"),
        official_rule=Rule.SWAP_HALVES,
    ),
    Row("proj_out", "final_layer.linear", ("patch_out", "hidden")),
)


@dataclass(frozen=True)
class Binding:
    """The tensors of one row for one block and one suffix, in every layout."""

    ours: tuple[str, ...]
    diffusers: tuple[str, ...]
    official: tuple[str, ...]
    shape: tuple[int, ...]  # of one diffusers tensor
    head_dim: int
    split_dim: int | None  # dimension of our tensor that tensor parallelism cuts
    ours_rule: Rule
    official_rule: Rule

    def names(self, layout: Layout) -> tuple[str, ...]:
        """The tensor names in `layout`."""
        return getattr(self, layout)

    def rule(self, layout: Layout) -> Rule:
        """How `layout` stores the diffusers tensors."""
        return {"ours": self.ours_rule, "official": self.official_rule, "diffusers": Rule.IDENTITY}[layout]

    def shape_in(self, layout: Layout) -> tuple[int, ...]:
        """Whole shape of each tensor in `layout`."""
        if self.rule(layout) is Rule.FLATTEN:
            return (self.shape[0], math.prod(self.shape[1:]))
        if not self.rule(layout).fuses:
            return self.shape
        return (len(self.diffusers) * self.shape[0], *self.shape[1:])

    def convert(self, tensors: Sequence[Tensor], source: Layout, target: Layout) -> tuple[Tensor, ...]:
        """Tensors in `source` -> tensors in `target`: whole ones, or the same tensor-parallel slice of each."""
        if self.rule(source) is self.rule(target):  # also keeps views of a mapped file views
            return tuple(tensors)
        parts = self.rule(source).unpack(tensors, self)
        return self.rule(target).pack(parts, self)

    def slice_bounds(self, rank: int, size: int) -> tuple[int, int, int] | None:
        """(dim, start, stop) of tensor-parallel rank `rank` of `size` in each DIFFUSERS tensor; None: all of it."""
        if self.split_dim is None or size == 1:
            return None
        length = self.shape[self.split_dim] // size
        return self.split_dim, rank * length, (rank + 1) * length


class KeyMap:
    """All bindings of a model of the given dimensions, and lookups by name."""

    def __init__(self, dimensions: Dimensions) -> None:
        self.bindings = tuple(_bindings(dimensions))

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> KeyMap:
        """`config`: a complete diffusers config."""
        return cls(Dimensions.from_config(config))

    def shapes(self, layout: Layout) -> dict[str, tuple[int, ...]]:
        """Every tensor name of `layout` with its whole shape."""
        return {name: b.shape_in(layout) for b in self.bindings for name in b.names(layout)}

    def by_name(self, layout: Layout) -> dict[str, Binding]:
        """Tensor name in `layout` -> its binding."""
        return {name: b for b in self.bindings for name in b.names(layout)}


def _bindings(dimensions: Dimensions) -> Iterator[Binding]:
    """The rows in the table's order, those of a stack of blocks block by block."""
    for stack, rows in groupby(TABLE, key=_stack):
        members = [row for row in rows if dimensions.use_meanflow or not row.meanflow]
        for index in range(1 if stack is None else getattr(dimensions, stack)):
            for row in members:
                yield from _expand(row, index, dimensions)


def _stack(row: Row) -> str | None:
    """The dimension that counts the blocks of a row."""
    path = row.diffusers if isinstance(row.diffusers, str) else row.diffusers[0]
    if "{i}" not in path:
        return None
    return "num_layers" if path.startswith("transformer_blocks") else "num_refiner_layers"


def _expand(row: Row, index: int, dimensions: Dimensions) -> Iterator[Binding]:
    def names(paths: Names, suffix: str) -> tuple[str, ...]:
        paths = (paths,) if isinstance(paths, str) else paths
        return tuple(f"{path.format(i=index)}.{suffix}" for path in paths)

    weight = dimensions.resolve(row.shape)
    for suffix in row.suffixes:
        shape = weight if suffix == "weight" else weight[:1]
        split_dim = {None: None, "rows": 0, "columns": 1 if suffix == "weight" else None}[row.split]
        yield Binding(
            ours=names(row.ours or row.diffusers, suffix),
            diffusers=names(row.diffusers, suffix),
            official=names(row.official, suffix),
            shape=shape,
            head_dim=dimensions.head_dim,
            split_dim=split_dim,
            ours_rule=row.ours_rule,
            official_rule=row.official_rule,
        )
