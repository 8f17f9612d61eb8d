"""Which groups leave a node, by the order of the ranks, and what of a collective goes over which wire.

Megatron numbers ranks tp, cp, dp, pp (tp changes first); a node holds consecutive ones. A ring over k ranks of which m
share a node leaves it once, so of the bytes that a rank sends 1/m on average are the network's; of an all-to-all, the
part for ranks of other nodes.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron_sage.parallel.traffic import wire_bytes
from megatron_sage.planning.traffic import Traffic

_AXES = {"pp": (0,), "dp": (1,), "cp": (2,), "tp": (3,), "dp_cp": (1, 2), "tp_cp": (2, 3), "mp": (0, 3),
         "replica": (0, 2, 3), "world": (0, 1, 2, 3), "dist_opt": (0, 1, 2, 3)}  # fmt: skip


@dataclass(frozen=True)
class Wires:
    """Process groups of a layout on nodes of `node` GPUs."""

    tensor: int
    context: int
    data: int
    pipeline: int
    node: int

    def group(self, name: str) -> tuple[int, int]:
        """(ranks, nodes that they are in, of the group that is spread the most)."""
        return _spread((self.pipeline, self.data, self.context, self.tensor), name, self.node)

    def split(self, traffic: Traffic) -> tuple[float, float]:
        """Bytes that a rank sends (over NVLink, over the network)."""
        inside = outside = 0.0
        for (operation, name), payload in traffic.items():
            size, nodes = self.group("pp" if name == "world" and operation == "send" else name)
            if size == 1:
                continue
            sent = wire_bytes(operation, payload, size)
            if nodes == 1:
                part = 0.0
            elif operation == "send":
                part = 1.0
            elif operation == "all_to_all":
                part = (size - size / nodes) / (size - 1)
            else:
                part = nodes / size
            inside, outside = inside + sent * (1 - part), outside + sent * part
        return inside, outside

    def crossing(self) -> list[str]:
        """Groups that leave a node."""
        return [name for name in ("tp", "cp", "dp_cp", "pp") if self.group(name)[1] > 1]


@lru_cache(maxsize=4096)
def _spread(shape: tuple[int, int, int, int], name: str, node: int) -> tuple[int, int]:
    axes = _AXES[name]
    nodes = np.arange(np.prod(shape)).reshape(shape) // node
    members = np.moveaxis(nodes, axes, range(-len(axes), 0)).reshape(-1, int(np.prod([shape[a] for a in axes])))
    members = np.sort(members, axis=1)
    return members.shape[1], int((np.diff(members, axis=1) > 0).sum(axis=1).max(initial=0)) + 1
