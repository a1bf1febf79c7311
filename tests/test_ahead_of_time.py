"""Every kernel compiles for every architecture that the project claims, on a machine that has none of them.

What the interpreter accepts the compiler may not, so this runs without it, in a process of its own.
"""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


def compile_all(arch: str) -> list[dict[str, Any]]:
    """Compile each kernel in each variant that can be launched on ``arch``; report what came out."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vocab_parallel_fused.kernels import backward, forward, selection
    from vocab_parallel_fused.kernels.configs import has_tensor_descriptors, tile_config

    elements = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    report = []

    def build(
        kernel: Any, types: dict[str, str], constants: dict[str, Any], options: dict[str, int], about: str
    ) -> None:
        signature = {
            name: "constexpr" if name in constants else types.get(name, "*fp32" if name.endswith("_ptr") else "i32")
            for name in kernel.arg_names
        }
        # As a launch specialises them: 16-byte pointers and strides, and a last dimension of stride 1.
        divisible = {
            (i,): [["tt.divisibility", 16]]
            for i, (name, kind) in enumerate(signature.items())
            if kind.startswith("*") or (name.startswith("stride_") and name not in constants)
        }
        compiled = triton.compile(
            ASTSource(kernel, signature, constants, divisible), target=GPUTarget(*TARGETS[arch]), options=options
        )
        report.append(
            {
                "kernel": kernel.__name__,
                "about": about,
                "binary": next((kind for kind in ("cubin", "hsaco") if kind in compiled.asm), None),
                "wgmma": "wgmma" in str(compiled.asm.get("ptx", "")),
            }
        )

    # What a launch may leave out.
    optional = {
        forward.partial_stats_kernel: ("class_weight", "partial_logit_sum", "partial_sum_exp_logit", "partial_argmax"),
        forward.merge_partials_kernel: ("logit_sum", "sum_exp_logit", "argmax"),
        backward.dlogits_kernel: ("class_weight", "slope", "grad_logit_sum"),
        backward.target_dlogits_kernel: ("class_weight", "slope", "grad_logit_sum"),
    }

    def without(kernel: Any, present: tuple[str, ...]) -> dict[str, None]:
        return {f"{name}_ptr": None for name in optional[kernel] if name not in present}

    scalars = {"target_row_ptr": "*i64", "argmax_ptr": "*i64", "partial_argmax_ptr": "*i32"}
    scalars |= {"inner": "fp32", "outer": "fp32"}
    for dtype, element in elements.items():
        tile = tile_config(arch, dtype)
        launch = tile.launch_kwargs()
        options = {name: launch.pop(name) for name in ("num_warps", "num_stages")}
        types = scalars | {f"{name}_ptr": f"*{element}" for name in ("hidden", "weight", "bias", "dlogits")}
        plain, everything, usual = ("identity", False), ("softcap", True), has_tensor_descriptors(arch)
        cases = [(usual, *plain), (usual, *everything), (usual, "scale", True), (False, *everything)]
        for descriptors, transform, has_bias in sorted(set(cases)):
            for name, rows in (("hidden", tile.block_t), ("weight", tile.block_v)):
                types[name] = f"tensordesc<{element}[{rows},{tile.block_h}]>" if descriptors else f"*{element}"
            # fp32 with tf32 products where there is a bias, without them where there is none.
            precision = "tf32" if dtype == torch.float32 and has_bias and not arch.startswith("gfx") else "ieee"
            constants = {**launch, "TRANSFORM": transform, "USE_DESCRIPTORS": descriptors, "PRECISION": precision}
            constants |= {"stride_hidden_h": 1, "stride_weight_h": 1}
            if not has_bias:
                constants["bias_ptr"] = None
            about = f"{element} {descriptors=} {transform=}"
            if has_bias:
                build(selection.logits_kernel, types | {"logits_ptr": "*fp32"}, constants, options, about)
            for kernel in (forward.partial_stats_kernel, backward.dlogits_kernel):
                names = optional[kernel]
                chosen = [names] if transform == "softcap" else [()]
                if transform == "identity" and dtype == torch.bfloat16:
                    chosen += [(name,) for name in names[1:]]
                for present in chosen:
                    build(kernel, types, constants | without(kernel, present), options, f"{about} {present}")
            small = {name: value for name, value in constants.items() if name in forward.target_logit_kernel.arg_names}
            target_launch = forward._TARGET_LAUNCH.copy()
            stages = {"num_stages": target_launch.pop("num_stages")}
            build(forward.target_logit_kernel, types, small | target_launch, stages, about)
        kernel = backward.target_dlogits_kernel
        for transform, present in (("identity", ()), ("softcap", optional[kernel])):
            constants = backward._TARGET_LAUNCH | {"TRANSFORM": transform} | without(kernel, present)
            build(kernel, types, constants, {}, f"{element} {transform=}")
    build(backward.add_repeated_kernel, scalars, backward._TARGET_LAUNCH, {}, "")
    constants = {"BLOCK_V": selection._LARGEST_BLOCK, "BLOCK_K": 128}
    build(selection.keep_top_k_kernel, {"top_row_ptr": "*i64"}, constants, selection._KEEP_LAUNCH, "")
    for first, present in ((True, ()), (False, optional[forward.merge_partials_kernel])):
        absent = {
            f"{prefix}{name}_ptr": None
            for name in optional[forward.merge_partials_kernel]
            if name not in present
            for prefix in ("", "partial_")
        }
        build(forward.merge_partials_kernel, scalars, {"FIRST": first, **forward._MERGE_LAUNCH} | absent, {}, "")
    return report


@pytest.mark.parametrize("arch", TARGETS)
def test_compiles(arch: str) -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, __file__, arch], env=environment, capture_output=True, text=True, check=False, timeout=280
    )
    assert run.returncode == 0, run.stderr[-3000:]
    report = json.loads(run.stdout)
    assert {row["kernel"] for row in report} == {
        "partial_stats_kernel",
        "merge_partials_kernel",
        "target_logit_kernel",
        "dlogits_kernel",
        "target_dlogits_kernel",
        "add_repeated_kernel",
        "logits_kernel",
        "keep_top_k_kernel",
    }
    assert all(row["binary"] == ("hsaco" if arch.startswith("gfx") else "cubin") for row in report)
    if arch == "sm_90":
        # 16-bit products must run on Hopper's own matrix instructions.
        assert all(row["wgmma"] for row in report if row["about"].startswith(("bf16 descriptors", "fp16 descriptors")))


if __name__ == "__main__":
    print(json.dumps(compile_all(sys.argv[1])))
