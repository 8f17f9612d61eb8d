"""How a sequence of tokens is cut over the ranks of a group."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F


@dataclass(frozen=True)
class TokenShard:
    """One rank's contiguous slice, by global index, of `num_tokens` tokens padded at the end to a multiple of `parts`.

    The padding exists only because the collectives want equal pieces: it may never reach attention or a statistic.
    Where a slice is cut again over `multiple` ranks (tensor parallelism inside context parallelism), its length is a
    multiple of that: the slices of TokenShard(n, cp * tp, ...) are then those of TokenShard(n, cp, ..., tp), cut.
    """

    num_tokens: int
    parts: int
    rank: int
    multiple: int = 1

    def __post_init__(self) -> None:
        if self.num_tokens < 0 or min(self.parts, self.multiple) < 1 or not 0 <= self.rank < self.parts:
            raise ValueError(
                f"TokenShard(num_tokens={self.num_tokens}, parts={self.parts}, rank={self.rank}, "
                f"multiple={self.multiple}): need num_tokens >= 0, parts >= 1, multiple >= 1 and 0 <= rank < parts"
            )

    @property
    def local(self) -> int:
        """Tokens of one rank, padding included."""
        return -(-self.num_tokens // (self.parts * self.multiple)) * self.multiple

    @property
    def padded(self) -> int:
        """Tokens of all ranks, padding included."""
        return self.local * self.parts

    @property
    def start(self) -> int:
        """Global index of this rank's first token."""
        return self.local * self.rank

    @property
    def valid(self) -> int:
        """Real tokens on this rank; they are its first ones."""
        return self.valid_on(self.rank)

    def valid_on(self, rank: int) -> int:
        """Real tokens on any rank."""
        return min(max(self.num_tokens - self.local * rank, 0), self.local)

    def shard(self, x: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """This rank's `local` tokens of `x`, whose size along `dim` is `num_tokens`; missing ones are zeros."""
        if x.shape[dim] != self.num_tokens:
            raise ValueError(f"dimension {dim} of a tensor {tuple(x.shape)} should hold {self.num_tokens} tokens")
        piece = x.narrow(dim, min(self.start, self.num_tokens), self.valid)
        return pad_tokens(piece, self.local, dim)

    def mask(self) -> torch.Tensor:
        """[local] bool: True where this rank's token is real."""
        return torch.arange(self.local) < self.valid


def pad_tokens(x: torch.Tensor, size: int, dim: int = 0) -> torch.Tensor:
    """`x` with zeros appended along `dim` up to `size`; `x` itself where nothing is missing."""
    missing = size - x.shape[dim]
    if missing == 0:
        return x
    behind = x.dim() - 1 - dim % x.dim()  # F.pad counts pairs from the last dimension backwards
    return F.pad(x, [0, 0] * behind + [0, missing])


def gather(x_local: torch.Tensor, shard: TokenShard, group: dist.ProcessGroup | None, dim: int = 0) -> torch.Tensor:
    """The whole tensor, padding removed, on every rank of `group` (None: they have it). Not differentiable."""
    pieces = x_local.detach().movedim(dim, 0).contiguous()
    if shard.parts > 1:
        whole = pieces.new_empty(shard.padded, *pieces.shape[1:])
        dist.all_gather_into_tensor(whole, pieces, group=group)
        pieces = whole
    return pieces[: shard.num_tokens].movedim(0, dim)
