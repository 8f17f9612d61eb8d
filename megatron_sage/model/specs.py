"""Which classes the DiT is built from."""

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_sage.model.attention import JointAttention, JointAttentionSubmodules, UnmaskedAttention
from megatron_sage.model.block import DoubleStreamBlock, DoubleStreamBlockSubmodules
from megatron_sage.model.norm import HeadRMSNorm


def local_block_spec() -> ModuleSpec:
    """A block of Megatron's torch layers, for CPU and GPU."""
    return ModuleSpec(
        module=DoubleStreamBlock,
        submodules=DoubleStreamBlockSubmodules(
            modulation_linear=ColumnParallelLinear,
            attention=ModuleSpec(
                module=JointAttention,
                submodules=JointAttentionSubmodules(
                    qkv=ColumnParallelLinear, proj=RowParallelLinear, qk_norm=HeadRMSNorm, core=UnmaskedAttention
                ),
            ),
            mlp=ModuleSpec(
                module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
            ),
        ),
    )
