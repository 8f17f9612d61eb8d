"""Muon for the blocks' matrices: momentum, orthogonalised (Keller Jordan's Muon; learning rate as Moonshot's).

A matrix that tensor parallelism splits is orthogonalised whole: the ranks gather the direction, all compute the same,
and each keeps its slice. Orthogonalising slices would be another optimizer at every layout. Rows that are stacked for
the sake of one GEMM are separate matrices here, as they are separate linear maps of the model: q, k and v of a fused
projection (rows [head][q, k, v][channel]) and the six of a modulation (shift, scale, gate of attention and MLP).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

COEFFICIENTS = (3.4445, -4.775, 2.0315)  # of the quintic iteration: steepest at 0, as in Keller Jordan's Muon
EPS = 1e-7
_WHOLE = ("img_proj.weight", "txt_proj.weight", "linear_fc1.weight", "linear_fc2.weight")


@dataclass(frozen=True)
class Matrix:
    """How a parameter is cut: over TP, and into the linear maps that it stacks."""

    partition_dim: int | None
    """The dimension split over the TP group; None: every rank has the whole."""
    parts: int = 1
    """Linear maps stacked in the rows."""
    outer: int = 1
    """Rows are [outer][parts][inner]: the number of heads for q, k, v."""

    def split(self, whole: torch.Tensor) -> list[torch.Tensor]:
        """[rows, columns] -> the stacked maps, each [rows / parts, columns]."""
        rows, columns = whole.shape
        stacked = whole.view(self.outer, self.parts, -1, columns)
        return [stacked[:, part].reshape(rows // self.parts, columns) for part in range(self.parts)]

    def join(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """The inverse of `split`."""
        columns = maps[0].shape[1]
        return torch.stack([one.view(self.outer, -1, columns) for one in maps], dim=1).reshape(-1, columns)


def matrix_of(name: str, parameter: torch.Tensor, heads: int) -> Matrix | None:
    """How Muon treats a parameter of the model, by its name; None: AdamW's (embedders, final layer, norms, biases)."""
    if not name.startswith("transformer_blocks.") or parameter.ndim != 2:
        return None
    split = getattr(parameter, "partition_dim", -1) if getattr(parameter, "tensor_model_parallel", False) else -1
    partition_dim = split if split >= 0 else None
    if name.endswith("_qkv.weight"):
        return Matrix(partition_dim, parts=3, outer=heads)
    if name.endswith((".norm1.linear.weight", ".norm1_context.linear.weight")):
        return Matrix(partition_dim, parts=6)
    return Matrix(partition_dim) if name.endswith(_WHOLE) else None


def orthogonalize(matrix: torch.Tensor, steps: int, dtype: torch.dtype) -> torch.Tensor:
    """About U·Vᵀ of the matrix' U·S·Vᵀ: Newton-Schulz takes its singular values to between 0.7 and 1.2. `dtype` of it.

    In bf16 as Muon is usually run, and torch.optim.Muon; in fp32 the result is the same on every layout.
    """
    a, b, c = COEFFICIENTS
    x = matrix.to(dtype)
    if tall := x.shape[0] > x.shape[1]:
        x = x.T  # the Gram matrix of the short side is the small one
    x = x / x.norm().clamp(min=EPS)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay, over matrices that may be split over TP.

    An update has the root mean square 0.2 of AdamW's usual one, whatever the matrix' shape (factor
    0.2·√max(rows, columns), arXiv 2502.16982), so one learning rate serves both.

    Args:
        params: one parameter group, or parameters.
        matrices: how each of them, in their order, is cut.
        tp_group: the group over which they are split.
        steps: Newton-Schulz iterations.
        dtype: in which these are computed.
    """

    def __init__(
        self,
        params: Iterable[Any],
        matrices: Sequence[Matrix],
        tp_group: dist.ProcessGroup,
        *,
        lr: float,
        weight_decay: float,
        momentum: float,
        steps: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "steps": steps})
        # by position, not by parameter: with bf16 weights Megatron puts fp32 masters into the groups
        self.matrices, self.tp_group, self.dtype = list(matrices), tp_group, dtype

    def initialize(self) -> None:
        """Zero momentum, so that a checkpoint has it from the beginning."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter.data))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update; `closure` is not used. All ranks of the TP group call: split matrices are gathered."""
        self.initialize()
        places = iter(self.matrices)
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for parameter in group["params"]:
                matrix = next(places)
                gradient = parameter.grad
                if gradient is None:
                    continue
                buffer = self.state[parameter]["momentum_buffer"].lerp_(gradient, 1 - momentum)
                update, scale = self._direction(gradient.lerp(buffer, momentum), matrix, group["steps"])
                parameter.mul_(1 - lr * group["weight_decay"])
                parameter.add_(update, alpha=-lr * scale)

    def _direction(self, update: torch.Tensor, matrix: Matrix, steps: int) -> tuple[torch.Tensor, float]:
        """This rank's slice of the orthogonalised update, and the factor that gives it AdamW's size."""
        size = self.tp_group.size()
        dim = matrix.partition_dim if size > 1 else None
        whole = update
        if dim is not None:
            slices = [torch.empty_like(update) for _ in range(size)]
            dist.all_gather(slices, update.contiguous(), group=self.tp_group)
            whole = torch.cat(slices, dim=dim)
        maps = [orthogonalize(one, steps, self.dtype) for one in matrix.split(whole)]
        scale = 0.2 * math.sqrt(max(maps[0].shape))
        joined = matrix.join(maps)
        return (joined if dim is None else joined.chunk(size, dim=dim)[self.tp_group.rank()]), scale
