"""The random generators of a process: nothing of the method draws from them, a user's reward or encoder may.

The method's own noise and orders follow from (seed, iteration, prompt, sample, step) and need no state.
"""

import json
import random

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor

_SIZE = 1 << 16  # bytes for a rank's generators as text, a fixed number so that ranks make up one tensor


def sharded() -> ShardedTensor:
    """Of all ranks: [ranks, bytes] with a row for each; usable again with the same number of ranks only."""
    generators = {
        "python": random.getstate(),
        "numpy": [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],
        "torch": torch.get_rng_state().tolist(),
        "cuda": torch.cuda.get_rng_state().tolist() if torch.cuda.is_available() else None,
    }
    text = json.dumps(generators).encode()
    assert len(text) <= _SIZE, len(text)
    row = torch.zeros(1, _SIZE, dtype=torch.uint8)
    row[0, : len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return ShardedTensor.from_rank_offsets("run.random", row, (0, dist.get_rank(), dist.get_world_size()))


def restore(row: torch.Tensor) -> None:
    """This rank's generators."""
    generators = json.loads(bytes(row.flatten().tolist()).rstrip(b"\0"))
    version, words, gauss = generators["python"]
    random.setstate((version, tuple(words), gauss))
    kind, words, *rest = generators["numpy"]
    np.random.set_state((kind, np.array(words, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.tensor(generators["torch"], dtype=torch.uint8))
    if generators["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(generators["cuda"], dtype=torch.uint8))
