"""Kernels in Triton's interpreter, and TensorRT's plugin registry without its builder."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from dllava_export.plugins.kernel_cases import small_cases

HERE = Path(__file__).parent

# What TensorRT's Python module links against and a CPU machine lacks. The plugin registry itself
# is the lean runtime's.
SHIMS = {
    "libnvinfer.so.11": """
        extern void *getPluginRegistry(void);
        void *getBuilderPluginRegistry(int capability) { return getPluginRegistry(); }
        void *createInferBuilder_INTERNAL(void *a, int b) { return 0; }
        void *createInferRefitter_INTERNAL(void *a, void *b, int c) { return 0; }
        void *createNvOnnxParser_INTERNAL(void *a, void *b, int c) { return 0; }
        void *createNvOnnxParserRefitter_INTERNAL(void *a, void *b, int c) { return 0; }
    """,
    "libnvinfer_plugin.so.11": "int initLibNvInferPlugins(void *a, char *b) { return 1; }",
    "libnvonnxparser.so.11": "int getNvOnnxParserVersion(void) { return 0; }",
}
ALIAS = "import sys, tensorrt_bindings\nsys.modules[__name__] = tensorrt_bindings\n"


@pytest.fixture(scope="session")
def interpreted(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], list[dict[str, np.ndarray]]]:
    """A function from an op to the outputs of its small cases, run once each."""
    folder, known = tmp_path_factory.mktemp("interpreted"), {}

    def outputs(op: str) -> list[dict[str, np.ndarray]]:
        if op not in known:
            file = folder / f"{op}.npz"
            subprocess.run(
                [sys.executable, HERE / "interpreter_worker.py", op, file], check=True
            )
            known[op] = _read(op, file)
        return known[op]

    return outputs


def _read(op: str, file: Path) -> list[dict[str, np.ndarray]]:
    cases = small_cases(op)
    results: list[dict[str, np.ndarray]] = [{} for _ in cases]
    for key, value in np.load(file).items():
        index, name = key.split("/")
        is_bfloat16 = cases[int(index)].dtype == "bfloat16" and value.dtype == np.int16
        results[int(index)][name] = value.view(ml_dtypes.bfloat16) if is_bfloat16 else value
    return results


@pytest.fixture(scope="session")
def tensorrt_registry(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of a process in which `import tensorrt` gives TensorRT 11's real module."""
    found = {
        name: importlib.util.find_spec(name)
        for name in ("tensorrt_bindings", "tensorrt_lean_libs")
    }
    missing = [name for name, spec in found.items() if spec is None]
    if missing or shutil.which("gcc") is None:
        pytest.skip(
            "needs gcc and the wheels tensorrt-cu13-bindings and tensorrt-lean-cu13-libs; "
            f"missing: {missing or 'gcc'}"
        )
    folder = tmp_path_factory.mktemp("tensorrt")
    (folder / "tensorrt").mkdir()
    (folder / "tensorrt" / "__init__.py").write_text(ALIAS, encoding="utf-8")
    lean = found["tensorrt_lean_libs"].submodule_search_locations[0]
    for name, source in SHIMS.items():
        file = folder / f"{name}.c"
        file.write_text(source, encoding="utf-8")
        command = ["gcc", "-shared", "-fPIC", "-o", folder / name, file]
        if name == "libnvinfer.so.11":
            command += [f"-L{lean}", "-l:libnvinfer_lean.so.11", f"-Wl,-rpath,{lean}"]
        subprocess.run(command, check=True)
    return os.environ | {
        "LD_LIBRARY_PATH": str(folder),
        "PYTHONPATH": str(folder),
        "TRITON_CACHE_DIR": str(folder / "triton"),
    }


@pytest.fixture(scope="session", autouse=True)
def triton_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Compiled kernels go to a folder of the tests."""
    patch = pytest.MonkeyPatch()
    patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
    yield
    patch.undo()
