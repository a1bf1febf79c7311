"""Fused linear cross-entropy for a vocabulary sharded over a process group."""

from vocab_parallel_fused import losses
from vocab_parallel_fused.functional import (
    LinearTokenStats,
    LinearTopK,
    linear_cross_entropy,
    linear_distillation,
    linear_token_stats,
    linear_top_k,
)
from vocab_parallel_fused.modules import VocabParallelLinearCrossEntropy
from vocab_parallel_fused.options import ComputeOptions
from vocab_parallel_fused.sharding import VocabShard
from vocab_parallel_fused.vq import VQLinearCrossEntropy

__version__ = "0.1.0"

__all__ = [
    "ComputeOptions",
    "LinearTokenStats",
    "LinearTopK",
    "VQLinearCrossEntropy",
    "VocabParallelLinearCrossEntropy",
    "VocabShard",
    "linear_cross_entropy",
    "linear_distillation",
    "linear_token_stats",
    "linear_top_k",
    "losses",
]
