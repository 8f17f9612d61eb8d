"""Which linear layers can have adapters: diffusers' names of them and ours."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

Split = Literal["rows", "columns"]


class Linear(NamedTuple):
    """One of our linears: diffusers' names of what it holds, in order, and how tensor parallelism cuts its weight."""

    targets: tuple[str, ...]
    split: Split


# path in our block -> what it is; targets that do not begin with ff or norm1 stand below `attn.` in diffusers
LINEARS: dict[str, Linear] = {
    "norm1.linear": Linear(("norm1.linear",), "rows"),
    "norm1_context.linear": Linear(("norm1_context.linear",), "rows"),
    "attn.img_qkv": Linear(("to_q", "to_k", "to_v"), "rows"),
    "attn.img_proj": Linear(("to_out.0",), "columns"),
    "attn.txt_qkv": Linear(("add_q_proj", "add_k_proj", "add_v_proj"), "rows"),
    "attn.txt_proj": Linear(("to_add_out",), "columns"),
    "ff.linear_fc1": Linear(("ff.net.0.proj",), "rows"),
    "ff.linear_fc2": Linear(("ff.net.2",), "columns"),
    "ff_context.linear_fc1": Linear(("ff_context.net.0.proj",), "rows"),
    "ff_context.linear_fc2": Linear(("ff_context.net.2",), "columns"),
}
TARGETS = tuple(target for linear in LINEARS.values() for target in linear.targets)
# Nothing reads the last block's text output. Adapters there would only decay.
UNUSED_IN_LAST_BLOCK = frozenset(("add_q_proj", "to_add_out", "ff_context.net.0.proj", "ff_context.net.2"))


@dataclass(frozen=True)
class AdapterSettings:
    """What the adapters of a model are; the whole model's, the same on every rank."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    """Of `TARGETS`."""
    seed: int = 0
    """A's initial values are a function of it and the parameter's name alone, at every layout."""

    def in_block(self, last: bool) -> list[tuple[str, list[str]]]:
        """(path of our linear, its targets with an adapter), in a fixed order."""
        chosen = set(self.targets) - (UNUSED_IN_LAST_BLOCK if last else frozenset())
        named = [(path, [t for t in linear.targets if t in chosen]) for path, linear in LINEARS.items()]
        return [(path, targets) for path, targets in named if targets]


def diffusers_path(target: str) -> str:
    """Of the module inside diffusers' block."""
    return target if target.startswith(("ff", "norm1")) else f"attn.{target}"


def linear_sizes(target: str, hidden: int, mlp: int) -> tuple[int, int]:
    """(inputs, outputs) of diffusers' linear."""
    if target.startswith("norm1"):
        return hidden, 6 * hidden
    if target.startswith("ff"):
        return (hidden, mlp) if target.endswith("proj") else (mlp, hidden)
    return hidden, hidden


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of an adapter's matrix."""
    return ".lora_A." in name or ".lora_B." in name


def child_name(path: str) -> str:
    """A module's name cannot hold a dot."""
    return path.replace(".", "_")
