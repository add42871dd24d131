"""Kernels compiled to PTX and machine code for every GPU generation, without a GPU."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path

import pytest

from dllava_export.errors import BackendError
from dllava_export.plugins import compile_kernel as module
from dllava_export.plugins.check_kernels import plugin_part
from dllava_export.plugins.compile_kernel import (
    COMPUTE_CAPABILITIES,
    MAX_SHARED_BYTES,
    Launch,
    compile_kernel,
    drop_scratch_parameters,
)

pytestmark = pytest.mark.slow

SHAPES_SELECT = {"scores": (2, 640), "token_kind": (2, 640), "slots": (1, 179)}


def select() -> Launch:
    return plugin_part("SelectTokens", "kernel").launch(SHAPES_SELECT, {}, {}, 1)


def gather(dtype: str, *trailing: int) -> Launch:
    shapes = {"data": (2, 640, *trailing), "kept_indices": (2, 179)}
    return plugin_part("GatherTokens", "kernel").launch(shapes, {"data": dtype}, {}, 1)


def predictor(dtype: str, tactic: int) -> Launch:
    widths = (4096, 512, 256, 128, 2)
    shapes = {f"weight_{i + 1}": (widths[i + 1], widths[i]) for i in range(4)}
    descriptor = plugin_part("PredictorHead", "descriptor").DESCRIPTOR
    dtypes = dict.fromkeys((spec.name for spec in descriptor.inputs), dtype)
    kernel = plugin_part("PredictorHead", "kernel")
    shapes["hidden_states"] = (2, 1, 4096)
    return kernel.launch(shapes, dtypes, {"epsilon": 1e-5}, tactic)


def attention(dtype: str, head_dim: int, num_kv_heads: int, tactic: int) -> Launch:
    cache = (2, num_kv_heads, 2100, head_dim)
    shapes = {
        "query": (2, 1, 8 * head_dim),
        "key": (2, 1, num_kv_heads * head_dim),
        "value": (2, 1, num_kv_heads * head_dim),
        "past_key": cache,
        "past_value": cache,
    }
    attributes = {"num_heads": 8, "kv_num_heads": num_kv_heads, "scale": head_dim**-0.5}
    kernel = plugin_part("KVCacheAttention", "kernel")
    return kernel.launch(shapes, dict.fromkeys(shapes, dtype), attributes, tactic)


EVERY_TARGET = {
    "select": select,
    "gather": lambda: gather("float16", 4096),
    "predictor one row": lambda: predictor("float16", 1),
    "predictor tile": lambda: predictor("float16", 2),
    "attention one row": lambda: attention("float16", 128, 8, 1),
    "attention small tile": lambda: attention("bfloat16", 128, 2, 2),
    "attention large tile": lambda: attention("float16", 128, 8, 4),
}


def assemble(ptx: str, compute_capability: int, folder: Path) -> bytes:
    """Return machine code, made by the assembler that comes with Triton."""
    from triton.backends.nvidia.compiler import get_ptxas

    source, out = folder / "kernel.ptx", folder / "kernel.cubin"
    source.write_text(ptx, encoding="utf-8")
    suffix = "a" if compute_capability >= 90 else ""
    command = [
        get_ptxas(compute_capability).path,
        f"--gpu-name=sm_{compute_capability}{suffix}",
    ]
    subprocess.run([*command, source, "-o", out], check=True)
    return out.read_bytes()


@pytest.mark.parametrize("compute_capability", COMPUTE_CAPABILITIES)
@pytest.mark.parametrize("name", EVERY_TARGET)
def test_compiles_for(name: str, compute_capability: int, tmp_path: Path) -> None:
    launch = EVERY_TARGET[name]()
    compiled = compile_kernel(launch, compute_capability)
    assert f".target sm_{compute_capability}" in compiled.ptx
    assert compiled.num_threads == 32 * launch.num_warps
    assert compiled.name == launch.kernel.__name__
    head = compiled.ptx.split(".entry", 1)[1].split(")", 1)[0]
    expected = len(launch.inputs) + len(launch.integers) + len(launch.outputs)
    assert head.count(".param") == expected
    assert assemble(compiled.ptx, compute_capability, tmp_path)[1:4] == b"ELF"


MATRIX = [
    (dtype, head_dim, num_kv_heads, tactic)
    for dtype, head_dim, num_kv_heads, tactic in itertools.product(
        ("float16", "bfloat16", "float32"), (64, 80, 96, 128), (8, 2), (1, 2, 3, 4)
    )
    if not (tactic == 1 and num_kv_heads == 2)
    and not (tactic == 4 and dtype == "float32")
    # Head widths of one padded size differ in masks, groups in a loop's mask: one dtype each.
    and (head_dim == 128 or dtype == "float16")
    and (num_kv_heads == 8 or (head_dim, dtype) == (128, "float16"))
]


@pytest.mark.parametrize(("dtype", "head_dim", "num_kv_heads", "tactic"), MATRIX)
def test_every_attention_fits(
    dtype: str, head_dim: int, num_kv_heads: int, tactic: int
) -> None:
    compiled = compile_kernel(attention(dtype, head_dim, num_kv_heads, tactic), 80)
    assert 0 < compiled.shared_bytes <= MAX_SHARED_BYTES
    wide_loads = compiled.ptx.count("v4.b32") + compiled.ptx.count("cp.async.cg")
    assert wide_loads > 0  # 16 bytes per load: alignment reached the compiler


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: gather("int64"), id="positions"),
        pytest.param(lambda: gather("float32", 128), id="float32 rows"),
        pytest.param(lambda: predictor("float32", 1), id="float32 predictor"),
        pytest.param(lambda: predictor("bfloat16", 2), id="bfloat16 predictor"),
    ],
)
def test_other_dtypes_compile(make: object) -> None:
    assert compile_kernel(make(), 80).ptx


def test_refuses_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SHARED_BYTES", 100)
    with pytest.raises(
        BackendError, match=r"attend_one_row for compute capability 80 needs \d+"
    ):
        compile_kernel(attention("float16", 128, 8, 1), 80)


PTX = """.version 8.7
.visible .entry f(
	.param .u64 f_param_0,
	.param .u32 f_param_1,
	.param .u64 f_param_2
)
{
	ld.param.b64 %rd1, [f_param_0];
	ld.param.b32 %r1, [f_param_1];
}
"""


def test_drops_parameters_that_nothing_reads() -> None:
    expected = PTX.replace("f_param_1,\n\t.param .u64 f_param_2\n", "f_param_1\n")
    assert drop_scratch_parameters(PTX, "f", 2) == expected
    assert drop_scratch_parameters(PTX, "f", 3) == PTX


def test_keeps_parameters_that_are_read() -> None:
    with pytest.raises(BackendError, match="3 parameters and uses f_param_1, expected 1"):
        drop_scratch_parameters(PTX, "f", 1)
