"""Scores without training that several policies share."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from dllava_export.passes.graph_builder import GraphBuilder

_F32 = np.float32


# x -> (A x^2 + B x + C) mod P: a quadratic congruence over a prime just under 2^31. Products
# stay below 2^63 since positions are reduced first.
_PRIME = 2147483647


_HASH_A, _HASH_B, _HASH_C = 48271, 1103515245 % _PRIME, 12345


_TEXT_SALT = 1 << 20


_FIXED_POINT = 1 << 20


def _hash(builder: GraphBuilder, positions: gs.Variable, salt: int) -> gs.Variable:
    """Return pseudo-random numbers in [0, 1), one per position, float32."""
    shape = list(positions.shape)

    def step(op: str, x: gs.Tensor, value: int, what: str) -> gs.Variable:
        constant = builder.scalar(value, np.int64)
        return builder.op(op, [x, constant], what, np.int64, shape)

    x = step("Add", positions, salt + 1, "salted")
    product = step("Mul", x, _HASH_A, "scaled")
    product = step("Add", product, _HASH_B, "shifted")
    product = step("Mod", product, _PRIME, "reduced")
    product = builder.op("Mul", [product, x], "quadratic", np.int64, shape)
    product = step("Mod", step("Add", product, _HASH_C, "mixed"), _PRIME, "hashed")
    number = builder.op("Cast", [product], "number", _F32, shape, to=1)
    prime = builder.scalar(float(_PRIME), _F32)
    return builder.op("Div", [number, prime], "uniform_number", _F32, shape)


def _evenly_spaced(
    builder: GraphBuilder, index: gs.Tensor, kept: gs.Tensor, total: gs.Tensor
) -> gs.Variable:
    """Return 1.0 where floor((i + 1) kept / total) > floor(i kept / total), else 0.0."""
    shape = list(index.shape)
    one = builder.scalar(1, np.int64)
    following = builder.op("Add", [index, one], "following", np.int64, shape)
    parts = []
    for tensor, what in ((following, "up_to"), (index, "before")):
        product = builder.op("Mul", [tensor, kept], f"product_{what}", np.int64, shape)
        parts.append(builder.op("Div", [product, total], f"kept_{what}", np.int64, shape))
    difference = builder.op("Sub", parts, "difference", np.int64, shape)
    return builder.op("Cast", [difference], "scores", _F32, shape, to=1)
