"""Low-rank adapters (LoRA) on the blocks' parallel linears: y = W x + b + alpha / rank * B(A x), all else frozen.

What PEFT means by it: each target, a linear of diffusers' block, has an A [rank, in] and a B [out, rank] of its own,
q, k and v of our fused projection too. Legend: S tokens, B samples, r rank; sizes are this rank's.

How an adapter is spread follows its linear, so that only the r-wide product of A ever crosses ranks:

- column-parallel: A is a copy on each rank, B is cut by output rows. With sequence parallelism A sees this rank's
  tokens and the product is gathered over them; A's gradient is then partial and `finalize_model_grads` sums it over TP
  because of `sequence_parallel`. Without, every rank computes the same product and sums its gradient in the backward.
- row-parallel: A is cut by input columns, B is a copy. The partial products are summed over TP: reduce-scattered over
  the tokens with sequence parallelism (B's gradient is then the partial one), all-reduced without.

Over CP every gradient is partial, as everywhere, and completed by the sum over DP x CP.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megatron_sage.model.lora_targets import LINEARS, AdapterSettings, Split, child_name
from megatron_sage.parallel.device import device

Chunks = Sequence[Any]  # of HunyuanVideoDiT: this rank's part of the model, not in its DDP wrapper


class _Matrix(torch.nn.Module):
    """Gives a parameter PEFT's name: `lora_A.weight`."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight)


class _Pair(torch.nn.Module):
    """A [r, in] and B [out, r] of one target."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor) -> None:
        super().__init__()
        self.lora_A, self.lora_B = _Matrix(a), _Matrix(b)


class LinearAdapters(MegatronModule):
    """The adapters of one linear, called with its input and output."""

    def __init__(
        self,
        linear: Any,
        path: str,
        chosen: list[str],
        name: str,
        settings: AdapterSettings,
        config: TransformerConfig,
        tp_group: dist.ProcessGroup,
    ) -> None:
        """`linear` is our block's module at `path`, `name` this module's own name in the whole model."""
        super().__init__(config=config)
        self.path, self.chosen, self.tp_group = path, chosen, tp_group
        self.scale, self.enabled = settings.alpha / settings.rank, True
        self.targets, self.split = LINEARS[path]
        # the linear's own: the modulation's input is no sequence, whatever the model's configuration says
        self.sequence_parallel: bool = linear.config.sequence_parallel
        out, into = linear.weight.shape
        for target in chosen:
            child = child_name(target)
            a = _initial_a(settings, into, f"{name}.{child}.lora_A.weight", self.split, tp_group)
            self.add_module(child, _Pair(a, torch.zeros(out // len(self.targets), settings.rank)))
        self.to(device=device(), dtype=config.params_dtype)
        for _, pair in self.pairs():
            self._mark(pair)

    def pairs(self) -> Iterator[tuple[str, _Pair]]:
        """(target, its matrices)."""
        for target in self.chosen:
            yield target, getattr(self, child_name(target))

    def _mark(self, pair: _Pair) -> None:
        """The attributes by which Megatron sums a gradient over TP and counts it in the norm once."""
        a, b = pair.lora_A.weight, pair.lora_B.weight
        cut, dim, copy = (b, 0, a) if self.split == "rows" else (a, 1, b)
        set_tensor_model_parallel_attributes(cut, True, dim, 1)
        copy.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """`out` [.., out] with alpha / rank * B(A x) added; `x` [.., in] is what the linear was given."""
        pairs = list(self.pairs())
        a = torch.cat([pair.lora_A.weight for _, pair in pairs])  # one GEMM and one collective for q, k and v
        products = (self._complete(F.linear(x, a)) * self.scale).chunk(len(pairs), dim=-1)
        deltas = {t: F.linear(h, pair.lora_B.weight) for (t, pair), h in zip(pairs, products, strict=True)}
        if len(self.targets) == 1:
            return out + deltas[self.targets[0]]
        # fused rows are [head][q, k, v][channel]
        parts = list(out.unflatten(-1, (-1, len(self.targets), self.config.kv_channels)).unbind(-2))
        for index, target in enumerate(self.targets):
            if target in deltas:
                parts[index] = parts[index] + deltas[target].view_as(parts[index])
        return torch.stack(parts, dim=-2).flatten(-3)

    def _complete(self, product: torch.Tensor) -> torch.Tensor:
        """A x of this rank's tokens or columns -> of all that B's rows on this rank need; sums are over TP."""
        if self.split == "rows":
            if self.sequence_parallel:
                return gather_from_sequence_parallel_region(product, group=self.tp_group)
            return copy_to_tensor_model_parallel_region(product, group=self.tp_group)
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(product, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(product, group=self.tp_group)

    @torch.no_grad()
    def delta(self) -> torch.Tensor:
        """alpha / rank * B A in this rank's rows or columns of the linear's weight, float32; no collective."""
        found = {t: self.scale * pair.lora_B.weight.float() @ pair.lora_A.weight.float() for t, pair in self.pairs()}
        if len(self.targets) == 1:
            return found[self.targets[0]]
        zero = torch.zeros_like(next(iter(found.values())))
        heads = [found.get(target, zero).unflatten(0, (-1, self.config.kv_channels)) for target in self.targets]
        return torch.stack(heads, dim=1).flatten(0, 2)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """For Megatron's distributed checkpoints: any tensor-parallel size loads what another one saved."""
        assert metadata is not None, "the model's own sharded_state_dict gives the groups"
        state = self.state_dict(prefix="", keep_vars=True)
        cut, dim = ("lora_B.weight", 0) if self.split == "rows" else ("lora_A.weight", 1)
        axes = {name: dim for name in state if name.endswith(cut)}
        groups = {"tp_group": self.tp_group, "dp_cp_group": metadata["dp_cp_group"]}
        return make_sharded_tensors_for_checkpoint(state, prefix, axes, sharded_offsets, **groups)


class BlockAdapters(MegatronModule):
    """All adapters of one block, hooked to its linears: whatever class a spec chose for them."""

    def __init__(self, block: Any, name: str, last: bool, settings: AdapterSettings) -> None:
        super().__init__(config=block.config)
        self.tp_group = block.tp_group
        for path, chosen in settings.in_block(last):
            linear, child = block.get_submodule(path), child_name(path)
            adapters = LinearAdapters(linear, path, chosen, f"{name}.{child}", settings, block.config, self.tp_group)
            self.add_module(child, adapters)
            linear.register_forward_hook(_hook(adapters))


def _hook(adapters: LinearAdapters) -> Callable[..., Any]:
    def add(linear: torch.nn.Module, arguments: tuple, outputs: tuple) -> tuple | None:
        if not adapters.enabled:
            return None
        out, bias = outputs  # the bias where the caller adds it
        return adapters(arguments[0], out), bias

    return add


def _initial_a(
    settings: AdapterSettings, into: int, name: str, split: Split, tp_group: dist.ProcessGroup
) -> torch.Tensor:
    """This rank's columns of PEFT's initial A: Kaiming-uniform with a = sqrt(5), U(-1, 1) / sqrt(in).

    Drawn whole from (seed, name) and then cut: another layout has the same adapters.
    """
    columns = into * tp_group.size() if split == "columns" else into
    sequence = np.random.SeedSequence([settings.seed, *name.encode()])
    draw = np.random.Generator(np.random.Philox(sequence)).random((settings.rank, columns), dtype=np.float32)
    whole = torch.from_numpy((2 * draw - 1) / np.float32(np.sqrt(columns)))
    return whole if split == "rows" else whole[:, tp_group.rank() * into :][:, :into].contiguous()


def add_adapters(chunks: Chunks, settings: AdapterSettings) -> None:
    """Freeze this rank's chunks and give their blocks adapters, with B = 0: the model computes what it did before.

    Before Megatron's DDP and the optimizer are built, for they look at what is trainable. Raises ValueError where there
    are adapters already.
    """
    if has_adapters(chunks):
        raise ValueError("the model has adapters already")
    for chunk in chunks:
        chunk.requires_grad_(False)
        for index, block in chunk.transformer_blocks.items():
            block.lora = BlockAdapters(block, f"transformer_blocks.{index}.lora", block.last, settings)
        chunk.lora = settings


def has_adapters(chunks: Chunks) -> bool:
    """Whether `add_adapters` was called."""
    return any(getattr(chunk, "lora", None) is not None for chunk in chunks)


@contextmanager
def adapters_off(chunks: Chunks) -> Iterator[None]:
    """Inside the block the model is its base, at no memory; no gradient may be taken there.

    Activation recompute would run the forward again in a backward outside the block, with adapters. Raises ValueError
    where there are no adapters: what is asked for would then be the policy itself.
    """
    if not has_adapters(chunks):
        raise ValueError("the model has no adapters to switch off")
    found = [module for chunk in chunks for module in chunk.modules() if isinstance(module, LinearAdapters)]
    before = [adapters.enabled for adapters in found]
    try:
        for adapters in found:
            adapters.enabled = False
        yield
    finally:
        for adapters, enabled in zip(found, before, strict=True):
            adapters.enabled = enabled


def merging(chunks: Chunks) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that gives this rank's part of W + alpha / rank * B A for an adapted weight, any other as it is.

    Added in float32 and rounded once to the weight's type; one weight at a time, the model stays as it is.
    """
    adapted: dict[int, LinearAdapters] = {}
    for chunk in chunks:
        for block in chunk.transformer_blocks.values():
            for adapters in block.lora.children() if has_adapters([chunk]) else ():
                adapted[id(block.get_submodule(adapters.path).weight)] = adapters

    def merged(parameter: torch.Tensor) -> torch.Tensor:
        weight, adapters = parameter.detach(), adapted.get(id(parameter))
        return weight if adapters is None else (weight.float() + adapters.delta()).to(weight.dtype)

    return merged
