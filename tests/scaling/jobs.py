"""The command on the ranks of the pool, as if torchrun had started them."""

import os


def study(arguments: list[str], world: int) -> int:
    import torch.distributed as dist

    from megatron_sage.scaling import command

    before = dict(os.environ)
    os.environ.update(WORLD_SIZE=str(world), RANK=str(dist.get_rank()))
    try:
        return command.main(arguments)
    finally:
        for key in ("WORLD_SIZE", "RANK"):
            os.environ.pop(key)
            if key in before:
                os.environ[key] = before[key]
