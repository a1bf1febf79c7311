"""Fused linear cross-entropy for a vocabulary sharded over a process group."""

from vocab_parallel_fused.functional import linear_cross_entropy
from vocab_parallel_fused.modules import VocabParallelLinearCrossEntropy
from vocab_parallel_fused.options import ComputeOptions
from vocab_parallel_fused.sharding import VocabShard

__version__ = "0.1.0"

__all__ = ["ComputeOptions", "VocabParallelLinearCrossEntropy", "VocabShard", "linear_cross_entropy"]
