"""The product of Apex that Megatron-Core's ``gradient_accumulation_fusion`` calls, in PyTorch.

Megatron-Core adds a weight's gradient to its fp32 ``main_grad`` inside the product that makes it, with an extension
of Apex that no package index has. Where it is not installed, this module takes its place; it must be imported before
Megatron-Core. On CUDA it is the same cuBLAS product with the same fp32 sums, called through torch.
"""

import sys

import torch
from torch import Tensor


def wgrad_gemm_accum_fp32(input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """``main_grad += grad_outputᵀ · input``: ``[T, in]`` and ``[T, out]`` into ``[out, in]`` fp32."""
    if input.is_cuda and input.dtype != torch.float32:
        torch.addmm(main_grad, grad_output.t(), input, out_dtype=torch.float32, out=main_grad)
    else:  # the CPU has no product of 16-bit matrices with an fp32 result
        main_grad.addmm_(grad_output.t().float(), input.float())


try:
    import fused_weight_gradient_mlp_cuda  # pyright: ignore[reportMissingImports]  # noqa: F401
except ImportError:
    sys.modules["fused_weight_gradient_mlp_cuda"] = sys.modules[__name__]
