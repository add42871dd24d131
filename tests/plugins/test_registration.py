"""The plugins in TensorRT's own plugin registry, asked what a build asks."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from dllava_export.errors import BackendError
from dllava_export.plugins import PLUGIN_OPS, register_plugins
from dllava_export.plugins.compile_kernel import MAX_SHARED_BYTES
from dllava_export.plugins.registration import current_compute_capability

HALF, INT64 = "float16", "int64"
WIDTHS = (64, 32, 16, 16, 2)
# A negative extent changes from run to run.
PREDICTOR_SHAPES = [[-2, -9, 64], [64], [64]] + [
    shape for i in range(4) for shape in ([WIDTHS[i + 1], WIDTHS[i]], [WIDTHS[i + 1]])
]
HEADS = {"num_heads": 4, "kv_num_heads": 2, "scale": 0.125}
ATTENTION = {
    "op": "KVCacheAttention",
    "attributes": HEADS,
    "shapes": [
        [-3, -20, 256],
        [-3, -20, 128],
        [-3, -20, 128],
        [-3, 2, 90, 64],
        [-3, 2, 90, 64],
        [-3],
        [-3],
    ],
    "dtypes": [*[HALF] * 5, INT64, INT64],
}
SELECT = {
    "op": "SelectTokens",
    "attributes": {},
    "shapes": [[-3, -640], [-3, -640], [1, -179], [-3]],
    "dtypes": ["float32", INT64, INT64, INT64],
}
GATHER = {
    "op": "GatherTokens",
    "attributes": {},
    "shapes": [[-3, -640, 4096], [-3, -179]],
    "dtypes": ["bfloat16", INT64],
}
QUESTIONS = {
    "good": {
        "select": SELECT,
        "gather": GATHER,
        "gather positions": GATHER
        | {"shapes": [[-3, -640], [-3, -179]], "dtypes": [INT64, INT64]},
        "gather nothing": GATHER | {"shapes": [[-3, -640, 4096], [-3, 0]]},
        "predictor": {
            "op": "PredictorHead",
            "attributes": {"epsilon": 1e-5},
            "shapes": PREDICTOR_SHAPES,
            "dtypes": [HALF, *["float32"] * 10],
        },
        "attention": ATTENTION,
    },
    "bad": {
        "not lowered": SELECT | {"shapes": [[-3, -640], [-3, -640], [1], [-3]]},
        "dtype": GATHER | {"dtypes": ["fp8", INT64]},
        "heads": ATTENTION | {"attributes": HEADS | {"num_heads": 3}},
    },
}


@pytest.fixture(scope="module")
def registry(
    tensorrt_registry: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict:
    """What the plugins answered."""
    folder = tmp_path_factory.mktemp("registry")
    questions, out = folder / "questions.json", folder / "answers.json"
    questions.write_text(json.dumps(QUESTIONS), encoding="utf-8")
    worker = Path(__file__).parent / "registry_worker.py"
    subprocess.run([sys.executable, worker, questions, out], check=True, env=tensorrt_registry)
    return json.loads(out.read_text(encoding="utf-8"))


def test_all_are_registered_once(registry: dict) -> None:
    assert registry["version"].startswith("11.")
    assert registry["ops"] == registry["again"] == list(PLUGIN_OPS)
    assert registry["creators"] == sorted(f"dllava::{op} 1" for op in PLUGIN_OPS)


@pytest.mark.parametrize(
    ("name", "dtypes", "shapes", "aliases"),
    [
        ("select", ["INT64"], [[3, 179]], [-1]),
        ("gather", ["BF16"], [[3, 179, 4096]], [-1]),
        ("gather positions", ["INT64"], [[3, 179]], [-1]),
        ("predictor", ["FLOAT", "INT32"], [[2, 9], [2, 9]], [-1, -1]),
        (
            "attention",
            ["HALF"] * 3,
            [[3, 20, 256], [3, 2, 90, 64], [3, 2, 90, 64]],
            [-1, 3, 4],
        ),
    ],
)
def test_outputs(registry: dict, name: str, dtypes: list, shapes: list, aliases: list) -> None:
    answer = registry["answers"][name]
    assert answer["kind"] == "_TemplateAOTPlugin"
    assert (answer["dtypes"], answer["shapes"]) == (dtypes, shapes)
    assert answer["aliases"] == aliases


def test_one_combination_of_dtypes_in_linear_layout(registry: dict) -> None:
    combination = registry["answers"]["predictor"]["combination"]
    dtypes = ["HALF", *["FLOAT"] * 11, "INT32"]
    assert combination == [f"DataType.{dtype} TensorFormat.LINEAR" for dtype in dtypes]


@pytest.mark.parametrize(
    ("name", "kernels", "grids", "integers"),
    [
        ("select", ["select_tokens"], [[3, 1, 1]], [640, 179]),
        ("gather", ["gather_tokens"], [[179, 3, 2]], [640, 179]),
        ("gather positions", ["gather_tokens"], [[1, 3, 1]], [640, 179]),
        ("gather nothing", ["gather_tokens"], [[1, 3, 2]], [640, 0]),
        ("predictor", ["predictor_head"] * 2, [[18, 1, 1], [2, 1, 1]], [18]),
        (
            "attention",
            ["attend_tile"] * 3,
            [[3, 2, 3], [2, 2, 3], [1, 2, 3]],
            [20, 90],
        ),
    ],
)
def test_launches(
    registry: dict, name: str, kernels: list, grids: list, integers: list
) -> None:
    launches = registry["answers"][name]["launches"]
    assert [launch["name"] for launch in launches] == kernels
    assert [[launch[f"grid_{axis}"] for axis in "xyz"] for launch in launches] == grids
    for launch in launches:
        assert launch["integers"] == integers
        assert launch["num_integers"] == len(integers)
        assert launch["block_x"] % 32 == 0
        assert (launch["block_y"], launch["block_z"]) == (1, 1)
        assert 0 <= launch["shared_mem"] <= MAX_SHARED_BYTES
        assert f".reqntid {launch['block_x']}\n" in launch["ptx"]


def test_tactics(registry: dict) -> None:
    tactics = {name: answer["tactics"] for name, answer in registry["answers"].items()}
    assert tactics["attention"] == [2, 3, 4]
    assert tactics["predictor"] == [1, 2]
    assert tactics["select"] == [1]


@pytest.mark.parametrize("name", ["select", "gather", "predictor", "attention"])
def test_parameters_are_inputs_then_integers_then_outputs(registry: dict, name: str) -> None:
    question, answer = QUESTIONS["good"][name], registry["answers"][name]
    for launch in answer["launches"]:
        head = launch["ptx"].split(".entry", 1)[1].split(")", 1)[0]
        kinds = ["u64" if ".u64" in line else "u32" for line in head.splitlines()[1:]]
        expected = ["u64"] * len(question["shapes"]) + ["u32"] * len(launch["integers"])
        assert kinds == expected + ["u64"] * len(answer["shapes"])


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("not lowered", "'slots' has rank 1, expected 2. Lower the model"),
        ("dtype", "'data' has dtype DataType.FP8, expected float32 or float16"),
        ("heads", "3 heads over 2 key heads"),
    ],
)
def test_refuses_what_it_cannot_run(registry: dict, name: str, found: str) -> None:
    assert registry["failures"][name].startswith("BackendError: Plugin ")
    assert found in registry["failures"][name]


def test_refuses_a_tensorrt_without_such_plugins() -> None:
    trt = types.ModuleType("tensorrt_rtx")
    trt.__version__ = "1.7.1"
    with pytest.raises(BackendError, match=r"tensorrt_rtx 1\.7\.1 takes no plugins"):
        register_plugins(trt)


def test_says_where_triton_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    trt = types.ModuleType("tensorrt")
    trt.QuickPluginCreationRequest = object
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(BackendError, match="pip install triton"):
        register_plugins(trt)


def test_says_where_the_gpu_is_missing() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-python")
    if runtime.cudaGetDeviceCount() == (runtime.cudaError_t.cudaSuccess, 1):
        pytest.skip("there is a GPU")
    with pytest.raises(BackendError, match="CUDA says cudaError"):
        current_compute_capability()


def test_importing_the_plugins_imports_no_kernel() -> None:
    code = "import sys, dllava_export.plugins; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout.split() == [b"False"]
    assert importlib.import_module("dllava_export.plugins").__all__ == [
        "PLUGIN_FOLDERS",
        "PLUGIN_OPS",
        "register_plugins",
    ]
