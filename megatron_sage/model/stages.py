"""Which blocks a pipeline stage holds, and which stage holds a parameter.

The blocks are cut by Megatron's pipeline layout, one row for each virtual stage: virtual stage v * PP + p is chunk v of
rank p. The first one also has the embedders, the last one the final layer; the timestep's embedder is on every one.
"""

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from megatron_sage.errors import UserError

TIME_EMBEDDER = "time_embed."  # replicated: every stage modulates, nothing of it is sent
LAST_STAGE = ("norm_out.", "proj_out.")


def balanced_layout(num_layers: int, pipeline: int, virtual: int = 1) -> list[list[str]]:
    """Rows of layer types for any number of blocks; the stages in the middle take what is left over.

    The first stage has the text refiner to run and the last one the final layer and the loss, so they get fewer. Raises
    UserError where there are more virtual stages than blocks.
    """
    stages = pipeline * virtual
    if stages > num_layers:
        raise UserError(
            f"parallel.pipeline={pipeline}: {pipeline} stages · {virtual} chunks = {stages} > {num_layers} blocks of "
            "the model: every one needs a block; use fewer stages or chunks"
        )
    counts = [num_layers // stages] * stages
    middle_first = sorted(range(stages), key=lambda s: (-min(s, stages - 1 - s), -s))
    for stage in middle_first[: num_layers % stages]:
        counts[stage] += 1
    rows = [["decoder"] * count for count in counts]
    rows[0].insert(0, "embedding")
    rows[-1].append("loss")
    return rows


def parse_layout(text: str, num_layers: int, pipeline: int, virtual: int | None) -> list[list[str]]:
    """Rows of a layout in Megatron's notation, e.g. "Et*13|t*14|t*14|t*13L"; UserError names the rule it breaks."""
    cure = 'write e.g. "Et*13|t*14|t*14|t*13L": E embedders, t*n blocks, L final layer, | between stages'
    try:
        rows = rows_of(text)
        names = [[_name(item) for item in row] for row in rows]
    except (AssertionError, KeyError, ValueError, AttributeError) as error:
        raise UserError(f"parallel.pipeline_layout={text}: not a layout ({error}); {cure}") from error
    key = f"parallel.pipeline_layout={text}"
    if len(rows) != pipeline * (virtual or len(rows) // pipeline or 1):
        product = f"{pipeline} stages · {virtual or max(1, len(rows) // pipeline)} chunks"
        raise UserError(f"{key}: {len(rows)} parts between the bars, expected {product}; {cure}")
    flat = [name for row in names for name in row]
    if flat[0] != "embedding" or flat[-1] != "loss" or flat.count("embedding") != 1 or flat.count("loss") != 1:
        raise UserError(f"{key}: must start with the only E and end with the only L; {cure}")
    if set(flat) != {"embedding", "decoder", "loss"} and set(flat) != {"embedding", "loss"}:
        raise UserError(f"{key}: this model has embedders (E), blocks (t) and a final layer (L) only; {cure}")
    if flat.count("decoder") != num_layers:
        raise UserError(f"{key}: holds {flat.count('decoder')} blocks, the model has {num_layers}; {cure}")
    return names


def rows_of(text: str) -> list[list[LayerType]]:
    """Megatron's own reading of the notation."""
    return PipelineParallelLayerLayout.parse_str_to_list(text)


def _name(item: LayerType | str) -> str:
    return item.name if isinstance(item, LayerType) else LayerType[item.strip().lower()].name


def blocks_of_stages(layout: PipelineParallelLayerLayout | None, num_layers: int) -> list[list[range]]:
    """`[pipeline rank][chunk]` -> the global indices of its blocks, in order."""
    if layout is None:
        return [[range(num_layers)]]
    size, chunks = layout.pipeline_model_parallel_size, layout.virtual_pipeline_model_parallel_size
    blocks = [[range(0)] * chunks for _ in range(size)]
    start = 0
    for chunk in range(chunks):
        for rank in range(size):
            count = layout.layout[rank][chunk].count(LayerType.decoder)
            blocks[rank][chunk] = range(start, start + count)
            start += count
    return blocks


def owner(name: str, blocks: list[list[range]]) -> int:
    """The pipeline rank that speaks for a parameter, by its name in the whole model."""
    if name.startswith(LAST_STAGE):
        return len(blocks) - 1
    if not name.startswith("transformer_blocks."):
        return 0
    index = int(name.split(".")[1])
    return next(rank for rank, chunks in enumerate(blocks) if any(index in chunk for chunk in chunks))
