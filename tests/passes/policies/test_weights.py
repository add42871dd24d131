from __future__ import annotations

import re

import helpers
import numpy as np
import onnx
import pytest

from dllava_export.errors import PreconditionError
from dllava_export.passes.policies.weights import PredictorWeights


def test_gives_constants_and_arrays() -> None:
    weights = PredictorWeights({"image_predictor.a": np.ones(3, np.float16)})
    constant = weights.constant("image_predictor.a")
    assert (constant.name, constant.dtype) == ("image_predictor.a", np.float16)
    assert weights.array("image_predictor.a").dtype == np.float64


def test_tensors_may_lie_elsewhere() -> None:
    tensor = onnx.TensorProto(name="a", data_type=onnx.TensorProto.FLOAT, dims=[2, 3])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    assert PredictorWeights({"a": tensor}).constant("a").shape == [2, 3]


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_counts_blocks(blocks: int) -> None:
    assert helpers.predictor_weights(blocks=blocks).count_blocks() == blocks


def test_says_what_is_missing_and_what_to_do() -> None:
    message = (
        "The checkpoint has no output_text_predictor ('output_text_predictor.x' is missing), "
        "which the policy needs. Use a trained Dynamic-LLaVA checkpoint, or a policy "
        "that needs no training; `dllava-export export --help` lists them."
    )
    with pytest.raises(PreconditionError, match=f"^{re.escape(message)}$"):
        PredictorWeights({}).array("output_text_predictor.x")
