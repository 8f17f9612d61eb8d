"""Which classes the DiT is built from."""

from collections.abc import Callable

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_sage.model.attention import JointAttention, JointAttentionSubmodules
from megatron_sage.model.block import DoubleStreamBlock, DoubleStreamBlockSubmodules, StreamMLP
from megatron_sage.model.config import HunyuanVideoConfig
from megatron_sage.model.norm import HeadRMSNorm
from megatron_sage.parallel.context import ALLGATHER, ULYSSES, AllGatherAttention, UlyssesAttention, WholeAttention

CORES: dict[str, type] = {ULYSSES: UlyssesAttention, ALLGATHER: AllGatherAttention}
Linears = tuple[type, type]  # column-parallel, row-parallel


def transformer_engine_linears() -> Linears:
    """Transformer Engine's, which exist on GPU machines only."""
    from megatron_sage.model.te_linear import Fp8ColumnParallelLinear, Fp8RowParallelLinear

    return Fp8ColumnParallelLinear, Fp8RowParallelLinear


fp8_linears: Callable[[], Linears] = transformer_engine_linears  # tests put an emulation in its place


def block_spec(config: HunyuanVideoConfig) -> ModuleSpec:
    """The block for this configuration: torch's attention kernels and linears, or Transformer Engine's.

    `context_backend` chooses the attention, `fp8` the linears.
    """
    linears = (ColumnParallelLinear, RowParallelLinear) if config.fp8 is None else fp8_linears()
    return local_block_spec(_core(config), linears)


def _core(config: HunyuanVideoConfig) -> ModuleSpec | type:
    if config.context_backend.startswith("te_"):
        from megatron_sage.model.te_attention import te_core  # Transformer Engine exists on GPU machines only

        return te_core(config)
    return WholeAttention if config.context_parallel_size == 1 else CORES[config.context_backend]


def local_block_spec(
    core: ModuleSpec | type = WholeAttention, linears: Linears = (ColumnParallelLinear, RowParallelLinear)
) -> ModuleSpec:
    """A block of Megatron's torch layers, for CPU and GPU, around an attention core.

    `linears` are those of the tokens. The modulation's stays torch's: its input is one row a sample, which FP8 kernels
    do not take, and its cost is nothing.
    """
    column, row = linears
    return ModuleSpec(
        module=DoubleStreamBlock,
        submodules=DoubleStreamBlockSubmodules(
            modulation_linear=ColumnParallelLinear,
            attention=ModuleSpec(
                module=JointAttention,
                submodules=JointAttentionSubmodules(qkv=column, proj=row, qk_norm=HeadRMSNorm, core=core),
            ),
            mlp=ModuleSpec(module=StreamMLP, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row)),
        ),
    )
