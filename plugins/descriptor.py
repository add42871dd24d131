"""What a plugin takes and gives: one description for TensorRT, the kernels and the tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dllava_export.errors import BackendError

__all__ = ["FLOATS", "Descriptor", "Dim", "Shape", "TensorSpec", "num_blocks"]

Dim = Any
"""An extent: an int, or TensorRT's symbolic expression, which takes the same operators."""
Shape = Sequence[Dim]

FLOATS = ("float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One input or output.

    Attributes:
        name: As in the ONNX function and in the kernel's parameters.
        dtypes: NumPy's names of the dtypes it may have. Of an output, empty means "as
            `like`".
        ranks: Numbers of axes it may have; empty means any.
        like: Of an output, the input whose dtype it has.
        aliases: Of an output, the input whose buffer it shares.
    """

    name: str
    dtypes: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()
    like: str = ""
    aliases: str = ""


@dataclasses.dataclass(frozen=True)
class Descriptor:
    """The face of a plugin.

    Attributes:
        op: Name of the op and of the plugin.
        inputs: In the op's order.
        outputs: In the op's order.
        attributes: Name to Python type, in the order in which the plugin takes them.
        output_shapes: Shapes of inputs by name -> shapes of outputs by name.
    """

    op: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    attributes: Mapping[str, type]
    output_shapes: Callable[[Mapping[str, Shape]], dict[str, tuple[Dim, ...]]]

    def output_dtypes(self, dtypes: Mapping[str, str]) -> dict[str, str]:
        """Return dtypes of the outputs.

        Args:
            dtypes: NumPy's name of each input's dtype.

        Raises:
            BackendError: If an input has a dtype that no kernel takes.
        """
        for spec in self.inputs:
            if dtypes[spec.name] not in spec.dtypes:
                raise BackendError(
                    f"Plugin {self.op}: input {spec.name!r} has dtype {dtypes[spec.name]}, "
                    f"expected {' or '.join(spec.dtypes)}. Remove the plugin from the build, "
                    "so that the op's body is used."
                )
        return {
            spec.name: dtypes[spec.like] if spec.like else spec.dtypes[0]
            for spec in self.outputs
        }

    def check_ranks(self, ranks: Mapping[str, int]) -> None:
        """Raise where an input has another number of axes than the plugin takes.

        Raises:
            BackendError: Names the input, its rank and the ranks expected.
        """
        for spec in self.inputs:
            if spec.ranks and ranks[spec.name] not in spec.ranks:
                expected = " or ".join(map(str, spec.ranks))
                raise BackendError(
                    f"Plugin {self.op}: input {spec.name!r} has rank {ranks[spec.name]}, "
                    f"expected {expected}. Lower the model for TensorRT before parsing it; "
                    f"plugins/README.md says how {self.op} is lowered."
                )


def num_blocks(extent: Dim, block: int) -> Dim:
    """Return the number of blocks that cover an extent, at least one.

    A grid may not be empty. Written with operators that TensorRT's expressions have too:
    a comparison counts 1 where it holds.
    """
    return (extent + (extent == 0) + (block - 1)) // block
