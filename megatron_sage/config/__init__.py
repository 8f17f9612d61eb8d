"""Configuration: the tree of settings, how it is read, and the rules that it must keep."""

from megatron_sage.config.loading import dump, load_config
from megatron_sage.config.schema import (
    Config,
    DataConfig,
    EvaluationConfig,
    GrpoConfig,
    KlConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    RewardConfig,
    SamplerConfig,
    SdeWindowConfig,
    TrainingConfig,
    VideoConfig,
)
from megatron_sage.config.validation import data_parallel_size, validate

__all__ = [
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "GrpoConfig",
    "KlConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "RewardConfig",
    "SamplerConfig",
    "SdeWindowConfig",
    "TrainingConfig",
    "VideoConfig",
    "data_parallel_size",
    "dump",
    "load_config",
    "validate",
]
