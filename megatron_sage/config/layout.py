"""Which layouts there are, said before a process group exists: every refusal shows the equation that fails."""

import importlib.util

from megatron_sage.config.schema import Config, ParallelConfig
from megatron_sage.errors import UserError


def check_world(parallel: ParallelConfig, world_size: int) -> int:
    """Model replicas. Raises UserError where the processes are not TP·CP·PP·DP."""
    for key in ("tensor", "context", "pipeline", "virtual_pipeline", "data"):
        value = getattr(parallel, key)
        if value is not None and value < 1:
            cure = {"data": "null takes what the world size gives", "virtual_pipeline": "null is one chunk a stage"}
            raise UserError(f"parallel.{key}={value}: must be >= 1; {cure.get(key, '1 switches it off')}")
    model = parallel.tensor * parallel.context * parallel.pipeline
    replicas = parallel.data or max(1, world_size // model)
    if world_size != model * replicas:
        product = f"{parallel.tensor}·{parallel.context}·{parallel.pipeline}·{replicas} = {model * replicas}"
        raise UserError(
            f"world size {world_size} ≠ TP·CP·PP·DP = {product}: start {model * replicas} processes (torchrun "
            f"--nproc-per-node {model * replicas}) or change parallel.tensor, context, pipeline or data"
        )
    return replicas


def check_model_layout(parallel: ParallelConfig, heads: int, num_layers: int, here: bool = True) -> None:
    """Raises UserError where a model of these sizes cannot be cut like that. `here`: this machine is to run it."""
    if heads % parallel.tensor:
        fitting = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise UserError(
            f"parallel.tensor={parallel.tensor}: must divide the model's {heads} attention heads; choose from {fitting}"
        )
    _check_context(parallel, heads // parallel.tensor, heads, here)
    if parallel.pipeline == 1:
        for key in ("virtual_pipeline", "pipeline_layout"):
            if getattr(parallel, key) not in (None, 1):
                raise UserError(f"parallel.{key}={getattr(parallel, key)}: needs parallel.pipeline > 1; leave it out")
        return
    from megatron_sage.model.stages import balanced_layout, parse_layout  # imports Megatron: only where it is needed

    if parallel.pipeline_layout is not None:
        parse_layout(parallel.pipeline_layout, num_layers, parallel.pipeline, parallel.virtual_pipeline)
    else:
        balanced_layout(num_layers, parallel.pipeline, parallel.virtual_pipeline or 1)


def _check_context(parallel: ParallelConfig, local_heads: int, heads: int, here: bool) -> None:
    backend, context, inner = parallel.context_backend, parallel.context, parallel.hierarchical_context
    key = f"parallel.context_backend={backend}"
    if backend in ("ulysses", "te_a2a") and local_heads % context:
        raise UserError(
            f"{key}: {heads} heads / tensor {parallel.tensor} = {local_heads} heads cannot be divided over context="
            f"{context}; choose allgather or auto"
        )
    if (backend == "te_a2a+p2p") != (inner is not None):
        cure = "give parallel.hierarchical_context=[a2a ranks, p2p ranks] exactly with te_a2a+p2p"
        raise UserError(f"{key}, parallel.hierarchical_context={inner}: {cure}")
    if inner is not None:
        if len(inner) != 2 or min(inner) < 1 or inner[0] * inner[1] != context:
            product = "·".join(str(size) for size in inner)
            raise UserError(
                f"parallel.hierarchical_context={inner}: {product} must be two sizes whose product is context="
                f"{context}; e.g. [{context}, 1]"
            )
        if local_heads % inner[0]:
            raise UserError(
                f"parallel.hierarchical_context={inner}: {local_heads} heads of a tensor rank cannot be divided "
                f"over {inner[0]} ranks; choose a divisor first"
            )
    if here and backend.startswith("te_"):
        import torch

        missing = [] if torch.cuda.is_available() else ["a GPU"]
        if importlib.util.find_spec("transformer_engine") is None:
            missing.append("the package transformer-engine")
        if missing:
            raise UserError(f"{key}: needs {' and '.join(missing)}; choose ulysses, allgather or auto")


def chunks_of_stage(parallel: ParallelConfig) -> int:
    """Model chunks of a pipeline stage; from the layout's bars where the number is not given."""
    if parallel.virtual_pipeline is None and parallel.pipeline_layout is not None:
        from megatron_sage.model.stages import rows_of

        return max(1, len(rows_of(parallel.pipeline_layout)) // parallel.pipeline)
    return parallel.virtual_pipeline or 1


def check_schedule(config: Config, pairs: int) -> None:
    """Raises UserError where an update's pairs do not fit the interleaved schedule.

    Megatron sends micro-batches through the chunks in groups of PP: a rest would wait for micro-batches that never
    come, or be computed in the wrong order.
    """
    stages, updates = config.parallel.pipeline, config.grpo.updates_per_rollout
    if stages == 1 or chunks_of_stage(config.parallel) == 1:
        return
    if config.grpo.replay_batch > 1:
        raise UserError(
            f"grpo.replay_batch={config.grpo.replay_batch}: the interleaved schedule (parallel.virtual_pipeline="
            f"{chunks_of_stage(config.parallel)}) takes only whole multiples of parallel.pipeline={stages} forwards, "
            "which batches by prompt do not give; set it to 1 or leave parallel.virtual_pipeline out"
        )
    sizes = {(i + 1) * pairs // updates - i * pairs // updates for i in range(updates)}
    for size in sorted(sizes):
        if size % stages:
            raise UserError(
                f"parallel.virtual_pipeline={chunks_of_stage(config.parallel)}: the interleaved schedule needs pairs "
                f"of an update divisible by parallel.pipeline={stages}, but {pairs} pairs / {updates} updates gives "
                f"{size}; change grpo.updates_per_rollout, sampler.num_steps or sampler.micro_batch, or leave it out"
            )
