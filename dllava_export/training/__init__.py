"""Train predictors, or a plain LLaVA, on conversations about images.

| module | what |
| --- | --- |
| settings | what a run shall do |
| data | conversations: JSON to token ids, labels and pixel values |
| predictors | predictor modules, sampled decisions |
| masked_attention | attention that leaves out dropped tokens by a factor |
| model | transformers' modules put together, losses |
| loop | steps, log, training state, resuming |
| output | the checkpoint that is written |
| plot | the losses as a picture |
"""

from __future__ import annotations

from dllava_export.training.loop import StepReport, TrainingReport, train_predictors
from dllava_export.training.settings import BadRecordError, TrainingError, TrainingSettings

__all__ = [
    "BadRecordError",
    "StepReport",
    "TrainingError",
    "TrainingReport",
    "TrainingSettings",
    "train_predictors",
]
