"""Errors planted into a bundle's files, as a broken export or a damaged disk would leave them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from dllava_export import names
from dllava_export.bundles import layout
from dllava_export.bundles.manifest import read_manifest, write_manifest

__all__ = [
    "change_one_weight",
    "flip_a_keep_bit",
    "plant",
    "renumber_positions",
    "select_one_row_off",
]

Change = Callable[[Path], None]


def plant(source: Path, out: Path, change: Change) -> Path:
    """Copy a bundle, change its files, and write a manifest that takes them for its own."""
    manifest = read_manifest(source)
    shutil.copytree(source, out, copy_function=shutil.copyfile)  # no hard links to `source`
    change(out / layout.LLM_FOLDER)
    write_manifest(out, manifest)
    return out


def change_one_weight(name: str) -> Change:
    """Add 1 to the first element of one float32 weight, in the file that holds it."""

    def change(llm: Path) -> None:
        model = onnx.load(llm / layout.DECODER, load_external_data=False)
        (tensor,) = (t for t in model.graph.initializer if t.name == name)
        entry = {item.key: item.value for item in tensor.external_data}
        with (llm / entry["location"]).open("r+b") as file:
            file.seek(int(entry["offset"]))
            value = np.frombuffer(file.read(4), np.float32) + np.float32(1)
            file.seek(int(entry["offset"]))
            file.write(value.tobytes())

    return change


def select_one_row_off(llm: Path) -> None:
    """Let each row be selected by the score of the row behind it, in both decoders."""
    for name in (layout.DECODER, layout.RECOMPUTE):
        with _Edit(llm / name) as edit:
            (select,) = edit.nodes("SelectTokens", "select_image")
            scores = select.input[0]
            edit.before(
                select,
                edit.node(
                    "Slice", [scores, edit.ints(1), edit.ints(1 << 62), edit.ints(1)], "a"
                ),
                edit.node("Slice", [scores, edit.ints(0), edit.ints(1), edit.ints(1)], "b"),
                helper.make_node("Concat", ["planted/a", "planted/b"], ["planted/ab"], axis=1),
            )
            select.input[0] = "planted/ab"


def flip_a_keep_bit(position: int) -> Change:
    """Turn over the decision about the generated token at one position."""

    def change(llm: Path) -> None:
        with _Edit(llm / layout.DECODER) as edit:
            (invert,) = (n for n in edit.graph.node if n.name.endswith("/is_rejected"))
            limits = [edit.ints(-1), edit.ints(1 << 62), edit.ints(1)]
            edit.before(
                invert,
                edit.node("Slice", [names.POSITION_IDS, *limits], "last"),
                edit.node("Equal", ["planted/last", edit.ints(position)], "is_there"),
                edit.node("Xor", [invert.input[0], "planted/is_there"], "keep"),
            )
            invert.input[0] = "planted/keep"

    return change


def renumber_positions(llm: Path) -> None:
    """Let kept rows take the rotary angles of rows 0, 1, 2, ..., in both decoders."""
    for name in (layout.DECODER, layout.RECOMPUTE):
        with _Edit(llm / name) as edit:
            gathers = [
                node
                for what in ("kept_cos", "kept_sin")
                for node in edit.nodes("GatherTokens", f"select_image/predictor/{what}")
            ]
            kept = gathers[0].input[1]
            zero = numpy_helper.from_array(np.array(0), "planted/zero")
            one = numpy_helper.from_array(np.array(1), "planted/one")
            edit.graph.initializer.extend([zero, one])
            edit.before(
                gathers[0],
                edit.node("Sub", [kept, kept], "zeros"),
                edit.node("Add", ["planted/zeros", "planted/one"], "ones"),
                helper.make_node(
                    "CumSum", ["planted/ones", "planted/one"], ["planted/rows"], exclusive=1
                ),
            )
            for gather in gathers:
                gather.input[1] = "planted/rows"


class _Edit:
    """A model file that is written back at the end of a `with`; new values are `planted/*`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._model = onnx.load(path, load_external_data=False)
        self.graph = self._model.graph

    def __enter__(self) -> _Edit:
        return self

    def __exit__(self, *error: object) -> None:
        self._path.write_bytes(self._model.SerializeToString())

    def nodes(self, op: str, scope: str) -> list[onnx.NodeProto]:
        return [n for n in self.graph.node if n.op_type == op and scope in n.name]

    def node(self, op: str, inputs: list[str], what: str) -> onnx.NodeProto:
        return helper.make_node(op, inputs, [f"planted/{what}"], name=f"planted/{what}")

    def ints(self, value: int) -> str:
        """Add a constant [1] int64; return its name."""
        name = f"planted/ints_{value}_{len(self.graph.initializer)}"
        self.graph.initializer.append(numpy_helper.from_array(np.array([value]), name))
        return name

    def before(self, node: onnx.NodeProto, *added: onnx.NodeProto) -> None:
        """Insert nodes in front of one, so that the order stays topological."""
        index = next(i for i, n in enumerate(self.graph.node) if n.name == node.name)
        for offset, new in enumerate(added):
            self.graph.node.insert(index + offset, new)
