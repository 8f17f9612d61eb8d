"""How one checkpoint layout stores what diffusers stores: row rules, exact in both directions."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megatron_sage.checkpoint.keymap import Binding


class Rule(Enum):
    """How a layout stores the diffusers tensors ("parts") of a binding."""

    IDENTITY = "the same tensors"
    CONCAT = "one tensor: rows of part 0, then part 1, ..."
    INTERLEAVE_HEADS = "one tensor: for each head the rows of part 0, part 1, ...; a row slice is a slice of heads"
    SWAP_HALVES = "one tensor, upper and lower half of the rows exchanged"
    FLATTEN = "one tensor, all dimensions but the first as one: a convolution without overlap as a matrix"

    def pack(self, parts: Sequence[Tensor], binding: Binding) -> tuple[Tensor, ...]:
        """The diffusers tensors of `binding` -> tensors of this layout."""
        if self is Rule.CONCAT:
            return (torch.cat(tuple(parts)),)
        if self is Rule.INTERLEAVE_HEADS:
            by_head = [part.unflatten(0, (-1, 1, binding.head_dim)) for part in parts]
            return (torch.cat(by_head, dim=1).flatten(0, 2),)
        if self is Rule.SWAP_HALVES:
            return (torch.cat(tuple(reversed(parts[0].chunk(2)))),)
        if self is Rule.FLATTEN:
            return (parts[0].flatten(1),)
        return tuple(parts)

    def unpack(self, tensors: Sequence[Tensor], binding: Binding) -> tuple[Tensor, ...]:
        """Tensors of this layout -> the diffusers tensors of `binding`; the exact inverse of `pack`."""
        count = len(binding.diffusers)
        if self is Rule.CONCAT:
            return tuple(tensors[0].chunk(count))
        if self is Rule.INTERLEAVE_HEADS:
            by_head = tensors[0].unflatten(0, (-1, count, binding.head_dim))
            return tuple(part.flatten(0, 1) for part in by_head.unbind(1))
        if self is Rule.SWAP_HALVES:
            return self.pack(tensors, binding)  # its own inverse
        if self is Rule.FLATTEN:
            return (tensors[0].unflatten(1, binding.shape[1:]),)
        return tuple(tensors)

    @property
    def fuses(self) -> bool:
        """Whether several diffusers tensors become one."""
        return self in (Rule.CONCAT, Rule.INTERLEAVE_HEADS)
