"""Graph passes, in the order in which they run; `README.md` beside them is their table."""

from dllava_export.passes.base import Pass, PassResult, run_passes
from dllava_export.passes.fuse_attention import FuseAttentionPass
from dllava_export.passes.fuse_residual_norm import FuseResidualNormPass
from dllava_export.passes.fuse_rms_norm import FuseRMSNormPass
from dllava_export.passes.fuse_rotary_embedding import FuseRotaryEmbeddingPass
from dllava_export.passes.gather_last_row import GatherLastRowPass
from dllava_export.passes.graph_io import graph_from_model, model_from_graph
from dllava_export.passes.insert_image_selection import InsertImageSelectionPass
from dllava_export.passes.insert_keep_bit import InsertKeepBitPass
from dllava_export.passes.insert_kv_cache import InsertKVCachePass
from dllava_export.passes.insert_output_text_selection import InsertOutputTextSelectionPass
from dllava_export.passes.lower_for_onnxruntime import LowerForOnnxRuntimePass
from dllava_export.passes.lower_for_plugins import LowerForPluginsPass
from dllava_export.passes.lower_for_tensorrt import LowerForTensorRTPass
from dllava_export.passes.pack_projections import PackProjectionsPass
from dllava_export.passes.policies.predictor import PredictorWeights
from dllava_export.passes.replace_token_ids import ReplaceTokenIdsPass

__all__ = [
    "FuseAttentionPass",
    "FuseRMSNormPass",
    "FuseResidualNormPass",
    "FuseRotaryEmbeddingPass",
    "GatherLastRowPass",
    "InsertImageSelectionPass",
    "InsertKVCachePass",
    "InsertKeepBitPass",
    "InsertOutputTextSelectionPass",
    "LowerForOnnxRuntimePass",
    "LowerForPluginsPass",
    "LowerForTensorRTPass",
    "PackProjectionsPass",
    "Pass",
    "PassResult",
    "PredictorWeights",
    "ReplaceTokenIdsPass",
    "graph_from_model",
    "model_from_graph",
    "run_passes",
]
