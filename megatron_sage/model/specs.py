"""Which classes the DiT is built from."""

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_sage.model.attention import JointAttention, JointAttentionSubmodules
from megatron_sage.model.block import DoubleStreamBlock, DoubleStreamBlockSubmodules
from megatron_sage.model.config import HunyuanVideoConfig
from megatron_sage.model.norm import HeadRMSNorm
from megatron_sage.parallel.context import ALLGATHER, ULYSSES, AllGatherAttention, UlyssesAttention, WholeAttention

CORES: dict[str, type] = {ULYSSES: UlyssesAttention, ALLGATHER: AllGatherAttention}


def block_spec(config: HunyuanVideoConfig) -> ModuleSpec:
    """The block for this configuration: torch's attention kernels, or Transformer Engine's by `context_backend`."""
    if config.context_backend.startswith("te_"):
        from megatron_sage.model.te_attention import te_core  # Transformer Engine exists on GPU machines only

        return local_block_spec(te_core(config))
    if config.context_parallel_size == 1:
        return local_block_spec(WholeAttention)
    return local_block_spec(CORES[config.context_backend])


def local_block_spec(core: ModuleSpec | type = WholeAttention) -> ModuleSpec:
    """A block of Megatron's torch layers, for CPU and GPU, around an attention core."""
    return ModuleSpec(
        module=DoubleStreamBlock,
        submodules=DoubleStreamBlockSubmodules(
            modulation_linear=ColumnParallelLinear,
            attention=ModuleSpec(
                module=JointAttention,
                submodules=JointAttentionSubmodules(
                    qkv=ColumnParallelLinear, proj=RowParallelLinear, qk_norm=HeadRMSNorm, core=core
                ),
            ),
            mlp=ModuleSpec(
                module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
            ),
        ),
    )
