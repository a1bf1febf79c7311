"""Every kernel compiles for every architecture that the project claims, on a machine that has none of them.

What the interpreter accepts the compiler may not, so this runs without it, in a process of its own.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
DTYPES = ("bfloat16", "float16", "float32")
KERNELS = {
    "partial_stats_kernel",
    "merge_partials_kernel",
    "target_logit_kernel",
    "token_stats_kernel",
    "token_loss_kernel",
    "token_loss_grads_kernel",
    "kept_scale_kernel",
    "rewrite_rows_kernel",
    "rewritten_product_kernel",
    "scale_rows_kernel",
    "dlogits_kernel",
    "target_dlogits_kernel",
    "add_repeated_kernel",
    "logits_kernel",
    "keep_top_k_kernel",
    "joint_stats_kernel",
    "js_sums_kernel",
    "divergence_dlogits_kernel",
}
TYPES = {"target_row_ptr": "*i64", "argmax_ptr": "*i64", "partial_argmax_ptr": "*i32", "top_row_ptr": "*i64"}
OF_TARGETS = ("target_row", "partial_target_logit", "partial_owners")
# All that the loss of few tokens without options has of its kernels' optional pointers.
PLAIN = {"partial_max", "partial_sum_exp", *OF_TARGETS, "max", "level", "dlogits"}
TYPES |= {"inner": "fp32", "outer": "fp32"}
# A launch makes a constant of every 1, and one target of each token is what a cross-entropy has.
_ONE_TARGET = {"K": 1}
# A row's maximum times −log2(e), fused into the difference from a logit's product that was rounded on its own.
ROW_FUSED = r"fma\.rn\.f32\s+%\w+, %\w+, 0fBFB8AA3B, %"


class Compiler:
    """Compiles kernels for one architecture as launches would, and reports what came out."""

    def __init__(self, arch: str) -> None:
        self.arch = arch
        self.report: list[dict[str, Any]] = []

    def build(
        self, kernel: Any, types: dict[str, str], constants: dict[str, Any], options: dict[str, int], about: str
    ) -> None:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from triton.experimental.gluon._runtime import GluonASTSource

        signature = {
            name: "constexpr" if name in constants else types.get(name, "*fp32" if name.endswith("_ptr") else "i32")
            for name in kernel.arg_names
        }
        # As a launch specialises them: 16-byte pointers and strides, and a last dimension of stride 1.
        divisible = {
            (i,): [["tt.divisibility", 16]]
            for i, (name, kind) in enumerate(signature.items())
            if kind.startswith("*") or ("stride_" in name and name not in constants)
        }
        source = GluonASTSource if kernel.is_gluon() else ASTSource
        target = GPUTarget(*TARGETS[self.arch])
        compiled = triton.compile(source(kernel, signature, constants, divisible), target=target, options=options)
        self.report.append(
            {
                "kernel": kernel.__name__,
                "about": about,
                "binary": next((kind for kind in ("cubin", "hsaco") if kind in compiled.asm), None),
                "wgmma": "wgmma" in str(compiled.asm.get("ptx", "")),
                "serialized": _is_serialized(compiled.asm["cubin"]) if self.arch == "sm_90" else False,
                "shared_memory": compiled.metadata.shared,
                "rows_fused": re.search(ROW_FUSED, str(compiled.asm.get("ptx", ""))) is not None,
            }
        )


def compile_matrices(compiler: Compiler, dtypes: Iterable[str]) -> None:
    """Each kernel that reads or writes matrices of such elements."""
    import torch

    from vocab_parallel_fused.kernels import backward
    from vocab_parallel_fused.kernels.configs import has_tensor_descriptors

    usual = has_tensor_descriptors(compiler.arch)
    for name in dtypes:
        dtype = getattr(torch, name)
        cases = {(usual, "identity"), (usual, "softcap"), (usual, "scale"), (False, "softcap")}
        for descriptors, transform in sorted(cases):
            compile_tiles(compiler, dtype, descriptors, transform)
        terms = ("class_weight", "slope", "grad_logit_sum", "scale")
        for transform, present in (("identity", ()), ("softcap", terms)):
            constants = backward._TARGET_LAUNCH | {"TRANSFORM": transform} | _absent(terms, present)
            constants |= {} if present else _ONE_TARGET
            types = TYPES | {"dlogits_ptr": _element(dtype, pointer=True)}
            compiler.build(backward.target_dlogits_kernel, types, constants, {}, f"{dtype} {transform=}")


def compile_others(compiler: Compiler) -> None:
    """The kernels of a few numbers per token."""
    from vocab_parallel_fused.kernels import backward, forward, kept, selection, tokens

    merged = ("target_logit", "owners", "class_sum", "logit_sum", "sum_exp_logit", "argmax")
    for first, present in ((True, ()), (False, merged)):
        constants = {"FIRST": first, **forward._MERGE_LAUNCH} | ({"num_partials": 1} if first else {})
        for prefix in ("", "partial_"):
            constants |= _absent([prefix + name for name in merged], [prefix + name for name in present])
        compiler.build(forward.merge_partials_kernel, TYPES, constants, {}, f"{first=}")
    token_types = TYPES | {
        "part_argmax_ptr": "*i64",
        "target_ptr": "*i64",
        "covered_ptr": "*i32",
        "num_classes_ptr": "*i64",
        "counter_ptr": "*i32",
    }
    # Everything of several ranks, and of few tokens on one an entropy without targets, then a log-probability too.
    of_stats = [name.removesuffix("_ptr") for name in tokens.token_stats_kernel.arg_names if name.endswith("_ptr")]
    always = {"part_max", "part_sum_exp", "max", "sum_exp", "lse", "covered"}
    entropy = {*always, "part_sum_exp_logit", "sum_exp_logit", "expected_logit"}
    log_prob = {"part_target_logit", "part_owners", "target", "target_logit", "owners", "difference"}
    for num_tokens, present, more in (
        (8192, of_stats, {}),
        (128, entropy, _ONE_TARGET),
        (1, entropy | log_prob, _ONE_TARGET),
    ):
        constants: dict[str, Any] = tokens.token_launch(num_tokens) | more | _absent(of_stats, present)
        options = {"num_warps": constants.pop("num_warps")}
        compiler.build(tokens.token_stats_kernel, token_types, constants, options, f"{num_tokens=}")
    one_rank, one_program = ("sizes_ptr", "num_classes_ptr"), ("sums_ptr", "counter_ptr")
    for num_tokens, absent in (
        (8192, ("loss_ptr",)),
        (1024, ("total_ptr", *one_rank, *one_program)),
        *((few, ("loss_ptr", *one_rank, *one_program)) for few in tokens._FEW_TOKENS),
    ):
        constants = tokens.token_launch(num_tokens) | dict.fromkeys(absent)
        constants["MEAN"] = "loss_ptr" in absent
        options = {"num_warps": constants.pop("num_warps")}
        compiler.build(tokens.token_loss_kernel, token_types, constants, options, f"{num_tokens=}")
    compiler.build(tokens.token_loss_grads_kernel, token_types, tokens._GRADS_LAUNCH, {}, "")
    for transform in ("identity", "softcap"):
        constants = kept._SCALE_LAUNCH | {"TRANSFORM": transform} | (_ONE_TARGET if transform == "identity" else {})
        compiler.build(kept.kept_scale_kernel, TYPES | {"exps_ptr": "*bf16"}, constants, {}, transform)
    compiler.build(backward.add_repeated_kernel, TYPES, backward._TARGET_LAUNCH, {}, "")
    constants = {"BLOCK_V": selection._LARGEST_BLOCK, "BLOCK_K": 128}
    compiler.build(selection.keep_top_k_kernel, TYPES, constants, selection._KEEP_LAUNCH, "")


def compile_tiles(compiler: Compiler, dtype: Any, descriptors: bool, transform: str) -> None:
    """Kernels that compute tiles of logits: the plain loss without transform, all at once with a soft cap."""
    import torch

    from vocab_parallel_fused.divergence import Divergence
    from vocab_parallel_fused.kernels import backward, divergence, forward, kept, selection
    from vocab_parallel_fused.kernels.configs import TileConfig, tile_config

    has_bias = transform != "identity"
    precision = "ieee"
    if dtype == torch.float32 and not compiler.arch.startswith("gfx"):
        precision = "tf32" if has_bias else "tf32x3"
    about = f"{dtype} {descriptors=} {transform=}"
    pointer = _element(dtype, pointer=True)
    own_constants = {"TRANSFORM": transform, "USE_DESCRIPTORS": descriptors, "stride_hidden_h": 1, "stride_weight_h": 1}
    own_constants |= {} if has_bias else {"bias_ptr": None}

    def own_types(tile: TileConfig) -> dict[str, str]:
        blocks = {"hidden": tile.block_t, "weight": tile.block_v}
        matrices = {
            name: f"tensordesc<{_element(dtype)}[{rows},{tile.block_h}]>" if descriptors else pointer
            for name, rows in blocks.items()
        }
        # A bias may be fp32 whatever the matrices are.
        bias = "*fp32" if transform == "scale" else pointer
        return {"bias_ptr": bias, "inner": "fp32", "outer": "fp32", **matrices}

    def launch(tile: TileConfig) -> tuple[dict[str, Any], dict[str, int]]:
        kwargs = tile.launch_kwargs()
        options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages")}
        return kwargs | {"PRECISION": precision}, options

    usual = tile_config(compiler.arch, dtype, 8192)
    for num_tokens in (1, 64) if transform == "identity" else ():
        tile = tile_config(compiler.arch, dtype, num_tokens)
        if tile == usual:
            continue
        for kernel in (forward.partial_stats_kernel, backward.dlogits_kernel):
            constants, options = launch(tile)
            names = [name.removesuffix("_ptr") for name in kernel.arg_names if name.endswith("_ptr")]
            constants |= own_constants | _absent(names, PLAIN)
            types = TYPES | own_types(tile) | {"dlogits_ptr": pointer}
            compiler.build(kernel, types, constants, options, f"{about} {num_tokens=}")
    tile = usual
    constants, options = launch(tile)
    constants |= own_constants
    types = TYPES | own_types(tile) | {"dlogits_ptr": pointer, "exps_ptr": pointer}
    for kernel, terms in (
        (
            forward.partial_stats_kernel,
            [
                ("partial_class_sum", "partial_logit_sum"),
                ("partial_sum_exp_logit",),
                ("partial_argmax",),
                ("reference", "exps"),
            ],
        ),
        (backward.dlogits_kernel, [("slope",), ("grad_logit_sum",)]),
    ):
        of_targets = OF_TARGETS if kernel is forward.partial_stats_kernel else ()
        everything = ("class_weight", *of_targets, *(name for term in terms for name in term))
        chosen = [everything if transform == "softcap" else ()]
        if transform == "identity" and dtype != torch.float16:
            chosen += terms
        for present in chosen:
            compiler.build(kernel, types, constants | _absent(everything, present), options, f"{about} {present}")

    gathered = types | {"hidden_ptr": pointer, "weight_ptr": pointer}
    target_constants = {"PRECISION": precision, "ALIGNMENT": 1, **forward.target_launch(compiler.arch, tile)}
    target_constants |= own_constants
    stages = {"num_stages": target_constants.pop("num_stages")}
    target_constants |= _ONE_TARGET if transform == "identity" else {}
    del target_constants["USE_DESCRIPTORS"]
    compiler.build(forward.target_logit_kernel, gathered, target_constants, stages, about)
    if dtype != torch.float16:
        small, small_options = launch(kept._REWRITE_TILE)
        small_types = TYPES | own_types(kept._REWRITE_TILE) | {"dlogits_ptr": pointer}
        compiler.build(kept.rewrite_rows_kernel, small_types, small | own_constants, small_options, about)
        if transform == "identity":
            row_types = {"matrix_ptr": pointer, "out_ptr": pointer}
            compiler.build(kept.scale_rows_kernel, row_types, kept._ROWS_LAUNCH, {}, f"rows, {about}")
            product = dict(kept._PRODUCT_LAUNCH)
            product_options = {name: product.pop(name) for name in ("num_warps", "num_stages")}
            product_types = {"dlogits_ptr": pointer, "weight_ptr": pointer, "out_ptr": pointer}
            product_constants = product | {"PRECISION": precision}
            compiler.build(
                kept.rewritten_product_kernel, product_types, product_constants, product_options, f"rows, {about}"
            )
    if compiler.arch == "sm_90" and dtype != torch.float32 and descriptors:
        compile_for_hopper(compiler, dtype, transform, has_bias=has_bias)
        if transform == "identity":
            compile_matmul(compiler, dtype)
    if transform == "scale":
        compiler.build(selection.logits_kernel, types | {"logits_ptr": "*fp32"}, constants, options, about)
        return

    tile = divergence.narrowed(tile)
    constants, options = launch(tile)
    types = {"dlogits_ptr": pointer}
    for prefix in ("a_", "b_"):
        types |= {prefix + name: kind for name, kind in own_types(tile).items()}
        constants |= {prefix + name: value for name, value in own_constants.items()}
    if transform == "identity":
        for absent in ({}, {"partial_cross_ptr": None}):
            compiler.build(divergence.joint_stats_kernel, types, constants | absent, options, about)
    else:
        compiler.build(divergence.js_sums_kernel, types, constants, options, about)
        for name in get_args(Divergence):
            dlogits = constants | {"DIVERGENCE": name}
            compiler.build(divergence.divergence_dlogits_kernel, types, dlogits, options, f"{about} {name}")


def compile_for_hopper(compiler: Compiler, dtype: Any, transform: str, *, has_bias: bool) -> None:
    import torch

    from vocab_parallel_fused.kernels import hopper_tiles

    pointers = {name for name in hopper_tiles.tiles_kernel.arg_names if name.endswith("_ptr")} - {"counter_ptr"}
    stats = {"partial_max_ptr", "partial_sum_exp_ptr"}
    dlogits = {"max_ptr", "level_ptr", "out"}
    types, launch, options = _hopper_launch(dtype, "hidden", "weight", out_dtype=dtype)
    types |= {"bias_ptr": _element(dtype, pointer=True), "inner": "fp32", "outer": "fp32"}
    for present in (
        stats,
        stats | {"partial_sum_exp_logit_ptr"},
        stats | {f"{name}_ptr" for name in OF_TARGETS},
        stats | {"reference_ptr", "out"},
        dlogits,
        dlogits | {"slope_ptr"},
    )[: None if dtype == torch.bfloat16 else 1]:
        absent = (pointers | {"out"}) - present - ({"bias_ptr"} if has_bias else set())
        constants = launch | {"TRANSFORM": transform, **dict.fromkeys(absent)}
        compiler.build(hopper_tiles.tiles_kernel, types, constants, options, f"{dtype} {transform=} {present}")


def compile_matmul(compiler: Compiler, dtype: Any) -> None:
    """Products for dhidden, whose rows are scaled, and for dweight."""
    import torch

    from vocab_parallel_fused.kernels import hopper_matmul

    for of_dweight, out_dtype, width in itertools.product(
        (False, True), (dtype, torch.float32), (hopper_matmul.BLOCK_N, hopper_matmul._NARROW)
    ):
        types, constants, options = _hopper_launch(
            dtype, "x", "w", x_transposed=of_dweight, w_transposed=True, out_dtype=out_dtype, width=width
        )
        constants |= {"X_TRANSPOSED": of_dweight, "W_TRANSPOSED": True}
        constants |= {"scale_ptr": None} if of_dweight else {}
        about = f"{dtype} {of_dweight=} {out_dtype} {width=}"
        compiler.build(hopper_matmul.matmul_kernel, types, constants, options, about)


def _hopper_launch(
    dtype: Any,
    x: str,
    w: str,
    *,
    x_transposed: bool = False,
    w_transposed: bool = False,
    out_dtype: Any,
    width: int | None = None,
) -> tuple[dict[str, str], dict[str, Any], dict[str, int]]:
    """Types of the descriptors, constants and options."""
    from vocab_parallel_fused.kernels import hopper

    width = hopper.BLOCK_N if width is None else width

    def descriptor(dtype: Any, rows: int, columns: int, swizzle_bytes: int) -> str:
        layout = hopper.swizzled(swizzle_bytes, 8 * dtype.itemsize)
        return f"tensordesc<{_element(dtype)}[{rows}, {columns}],{layout!r}>"

    types = {
        x: descriptor(dtype, *hopper.operand_box(hopper.BLOCK_M // 2, transposed=x_transposed)),
        w: descriptor(dtype, *hopper.operand_box(width, transposed=w_transposed)),
        "out": descriptor(out_dtype, *hopper.store_box(out_dtype.itemsize)),
        "counter_ptr": "*i32",
    }
    constants = dict(hopper.LAUNCH)
    return types, constants, {"num_warps": constants.pop("num_warps")}


def _element(dtype: Any, *, pointer: bool = False) -> str:
    return ("*" if pointer else "") + {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[str(dtype)[6:]]


def _is_serialized(cubin: bytes) -> bool:
    """Whether a product waits for the one before it: the assembler does that, by a third slower, where it cannot follow
    an accumulator."""
    import triton

    disassembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([disassembler, "-c", file.name], capture_output=True, text=True, check=True).stdout
    products = re.findall(r"\bHGMMA\.[^;]*;", text)
    return bool(products) and all("gsb0" in product for product in products)


def _absent(names: Any, present: Any) -> dict[str, None]:
    return {f"{name}_ptr": None for name in names if name not in present}


@pytest.fixture(scope="module")
def compilations() -> Iterator[dict[str, list[subprocess.Popen[str]]]]:
    """All architectures at once. Each is a minute's work for one core; Hopper, which has kernels of its own, is two."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

    def start(*arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, __file__, *arguments], env=environment, **pipes)

    processes = {arch: [start(arch, *DTYPES)] for arch in TARGETS if arch != "sm_90"}
    processes["sm_90"] = [start("sm_90", "bfloat16"), start("sm_90", "float16", "float32")]
    yield processes
    for process in itertools.chain(*processes.values()):
        process.kill()
        process.communicate()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("arch", TARGETS)
def test_compiles(arch: str, compilations: dict[str, list[subprocess.Popen[str]]]) -> None:
    pytest.importorskip("triton")
    report = []
    for process in compilations[arch]:
        stdout, stderr = process.communicate()
        assert process.returncode == 0, stderr[-3000:]
        report += json.loads(stdout)
    assert {row["kernel"] for row in report} == KERNELS | (
        {"tiles_kernel", "matmul_kernel"} if arch == "sm_90" else set()
    )
    assert all(row["binary"] == ("hsaco" if arch.startswith("gfx") else "cubin") for row in report)
    # What the table promises of devices like this one, and where it has no entry of its own, of any.
    table = json.loads((Path(__file__).parents[1] / "kernels" / "tiles.json").read_text())
    limit = table.get(arch, table["hip" if arch.startswith("gfx") else "cuda"])["shared_memory_bytes"]
    assert max(row["shared_memory"] for row in report) <= limit
    # exp(z − max) of the largest logit must be exactly 1; where the compiler fuses the other of the two products, it is
    # off by the rounding of z · log2(e), 1e-5 at logits of 100.
    assert not any(row["rows_fused"] for row in report)
    if arch == "sm_90":
        # 16-bit products must run on Hopper's own matrix instructions.
        sixteen_bit = [row for row in report if row["about"].startswith(("torch.bfloat16 d", "torch.float16 d"))]
        large = [row for row in sixteen_bit if "num_tokens=1" not in row["about"]]
        assert large
        assert all(row["wgmma"] for row in large)
        assert not any(row["serialized"] for row in sixteen_bit)


def main(arch: str, *dtypes: str) -> None:
    """Each kernel in variants that cover what a launch on ``arch`` may choose."""
    compiler = Compiler(arch)
    compile_matrices(compiler, dtypes)
    if DTYPES[0] in dtypes:
        compile_others(compiler)
    print(json.dumps(compiler.report))


if __name__ == "__main__":
    main(*sys.argv[1:])
