"""How close floating-point results must come: absolute, unless a name says relative.

Indices, keep bits, lengths and numbers of rows are compared exactly everywhere. Tolerances of
`validate` are its users' (`validation/settings.py`), those of kernels the kernels'
(`plugins/check_kernels.py`).
"""

from __future__ import annotations

__all__ = [
    "DENSE",
    "FLOAT16",
    "FLOAT16_MARGIN",
    "FLOAT16_SCORES",
    "FREQUENCY",
    "GOLDEN",
    "MASKED",
    "PIXELS",
    "RELATIVE",
    "SAME_MODEL",
    "SCORES",
    "TORCH",
    "TRAINED",
]

# Whole models, on logits of up to 7.


# Promised for golden runs of the official code; measured: 3e-6.
GOLDEN = 2e-4
# Promised for transformers' LLaMA on the same weights; measured: 3e-6.
DENSE = 1e-4
# One model run in two ways (in a batch, in one piece or in several): measured 2e-6.
SAME_MODEL = 1e-5
# Promised for float16 against golden float32 logits, while the same tokens are kept.
FLOAT16 = 3e-2
# Scores or logits closer than this may change places in float16.
FLOAT16_MARGIN = 1e-2
# A trained model's logits, in PyTorch and on ONNX Runtime.
TRAINED = 1e-3

# Parts of models.
# One module in PyTorch, whole and in parts, or with rows masked instead of removed.
TORCH = 1e-4
# A softmax, or margins of scores, of some ten values.
MASKED = 1e-6
# Scores of image tokens against golden runs; and in float16.
SCORES = 1e-4
FLOAT16_SCORES = 0.3
# Pixels of about 1 after normalisation, against transformers.
PIXELS = 1e-6
# Beside an absolute one, where values are large.
RELATIVE = 1e-5
# Shares of 4,000 draws: four standard deviations.
FREQUENCY = 0.03
