"""Policy `centre`: the patches nearest the middle of the picture stay.

    patch (y, x) of a side x side grid scores -((2 y + 1 - side)^2 + (2 x + 1 - side)^2)

Photographs mostly show there what they are about.
"""

from __future__ import annotations

import math

import numpy as np

from dllava_export import names
from dllava_export.passes.policies.base import ImageArrays, Policy


class CentrePolicy(Policy):
    """Ranks the patches of an image by their distance from its middle."""

    name = "centre"
    help = "patches nearest the middle of the picture"
    image_tokens = "distance from the middle"

    def score(self, builder, rows, weights):
        """Count each sample's patches for itself: images start at different rows."""
        shape, column = list(rows.token_kind.shape), [names.BATCH, 1]

        def step(op, inputs, what, dtype=np.int64, shape=shape, **attributes):
            return builder.op(op, inputs, what, dtype, shape, **attributes)

        image, one, two = (builder.scalar(value, np.int64) for value in (names.IMAGE, 1, 2))
        is_image = step("Equal", [rows.token_kind, image], "is_image", bool)
        counted = step("Cast", [is_image], "counted", to=7)
        patch = step("CumSum", [counted, one], "patch", exclusive=1)
        total = step("ReduceSum", [counted, builder.ints(1)], "total", shape=column)
        total = step("Cast", [total], "total_f32", np.float32, column, to=1)
        side = step("Sqrt", [total], "side_f32", np.float32, column)
        side = step("Cast", [side], "side_or_0", shape=column, to=7)
        side = step("Max", [side, one], "side", shape=column)  # no image here, as in decode
        squares = []
        for op, axis in (("Div", "y"), ("Mod", "x")):
            twice = step("Mul", [step(op, [patch, side], axis), two], f"{axis}_twice")
            offset = step(
                "Sub", [step("Add", [twice, one], f"{axis}_mid"), side], f"{axis}_off"
            )
            squares.append(step("Mul", [offset, offset], f"{axis}_squared"))
        distance = step(
            "Cast", [step("Add", squares, "squared")], "distance", np.float32, to=1
        )
        return step("Neg", [distance], "scores", np.float32)

    def reference(self, rows: ImageArrays, weights):
        """Say the same in NumPy: [n] float32."""
        num_patches = len(rows.position_ids)
        side = max(math.isqrt(num_patches), 1)
        y, x = np.divmod(np.arange(num_patches), side)
        return -((2 * y + 1 - side) ** 2 + (2 * x + 1 - side) ** 2).astype(np.float32)
