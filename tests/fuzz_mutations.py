"""Seeded mutations of files: bytes, JSON values, safetensors headers, ONNX graphs, state dicts."""

from __future__ import annotations

import copy
import io
import json
import random
import struct
from collections.abc import Callable
from typing import Any

Mutation = Callable[[random.Random, bytes], bytes]

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
_TEXTS = (
    "",
    "a",
    "x" * 5000,
    "../outside/victim",
    "/etc/passwd",
    "a\x00b",
    "\u2028",
    "<image>",
)
_NUMBERS = (0, 1, -1, 3, 255, 2**31, 2**63 - 1, 2**63, 10**40, 0.5, -0.0, 1e-300, 1e300)
_OTHERS = (None, True, False, float("nan"), float("inf"), "\ud800")


def odd_value(rng: random.Random) -> Any:
    """Return a JSON value of any kind."""
    kind = rng.randrange(7)
    if kind == 0:
        return rng.choice(_TEXTS)
    if kind in (1, 2):
        return rng.choice(_NUMBERS)
    if kind == 3:
        return copy.deepcopy(rng.choice(_OTHERS))
    if kind == 4:
        return [odd_value(rng) for _ in range(rng.randrange(4))]
    if kind == 5:
        return {rng.choice(("a", "", "size", "hidden_size")): odd_value(rng)}
    value: Any = 1
    for _ in range(rng.choice((2, 90, 110, 400))):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def mutated_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flip, cut, repeat, insert or replace bytes."""
    kind = rng.randrange(8)
    size = max(1, len(data))
    start = rng.randrange(size)
    end = min(size, start + rng.choice((1, 2, 8, 64, 1000)))
    if kind == 0:
        return data[:start]
    if kind == 1:
        return data[:start] + data[end:]
    if kind == 2:
        return data[:end] + data[start:]
    if kind == 3:
        return data[:start] + bytes(end - start) + data[end:]
    if kind == 4:
        return data[:start] + rng.randbytes(end - start) + data[end:]
    if kind == 5:
        return data[:start] + rng.randbytes(rng.randrange(1, 9)) + data[start:]
    if kind == 6:
        changed = bytearray(data)
        for _ in range(rng.choice((1, 4, 32))):
            changed[rng.randrange(size)] ^= 1 << rng.randrange(8)
        return bytes(changed)
    return rng.choice((b"", b"\xff\xfe", LFS_POINTER, b"\xef\xbb\xbf" + data, data + b"\n{}"))


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Return every (container, key) in a JSON value."""
    found = []
    pending = [value]
    while pending:
        item = pending.pop()
        keys = item.keys() if isinstance(item, dict) else range(len(item))
        for key in keys:
            found.append((item, key))
            if isinstance(item[key], dict | list):
                pending.append(item[key])
    return found


def mutated_value(rng: random.Random, value: Any) -> Any:
    """Replace, remove, double or move values inside a JSON value."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places = _places(value) if isinstance(value, dict | list) else []
        if not places or rng.random() < 0.02:
            return odd_value(rng)
        container, key = rng.choice(places)
        kind = rng.randrange(8)
        if kind == 0 and isinstance(container, dict):
            del container[key]
        elif kind == 1 and isinstance(container, list):
            container *= 2
        elif kind == 2:
            other, other_key = rng.choice(places)
            container[key] = copy.deepcopy(other[other_key])
        else:
            container[key] = odd_value(rng)
    return value


def mutated_json(rng: random.Random, data: bytes) -> bytes:
    """Mutate a JSON text or the value in it."""
    kind = rng.randrange(10)
    if kind == 0:
        return mutated_bytes(rng, data)
    if kind == 1:
        depth = rng.choice((50, 200, 2000, 100_000))
        text = rng.choice(("[", '{"a":')) * depth
        return text.encode()
    if kind == 2:
        text = data.decode()
        number = rng.choice(("1" * 5000, "1e999", "-0", "NaN", '"\\ud800"', "01"))
        return text.replace("1", number, 1).encode()
    try:
        return json.dumps(mutated_value(rng, json.loads(data))).encode()
    except RecursionError:  # odd values inside odd values
        return b"[" * 2000


def mutated_lines(rng: random.Random, data: bytes) -> bytes:
    """Mutate one line of JSON lines, or the whole text."""
    if rng.random() < 0.3:
        return mutated_bytes(rng, data)
    lines = data.splitlines()
    number = rng.randrange(len(lines))
    lines[number] = mutated_json(rng, lines[number])
    return b"\n".join(lines)


def mutated_safetensors(rng: random.Random, data: bytes) -> bytes:
    """Mutate the header of a safetensors file, its entries' places, or any bytes."""
    (length,) = struct.unpack("<Q", data[:8])
    header, values = data[8 : 8 + length], data[8 + length :]
    kind = rng.randrange(4)
    if kind == 0:
        return mutated_bytes(rng, data)
    if kind == 1:
        entries = json.loads(header)
        keys = [key for key in entries if key != "__metadata__"]
        first, second = rng.choice(keys), rng.choice(keys)
        offsets = entries[first]["data_offsets"]
        choice = rng.randrange(4)
        if choice == 0:
            entries[first] = entries[second]
        elif choice == 1:
            offsets[rng.randrange(2)] += rng.choice((-4, 4, 2**40, -(2**40)))
        elif choice == 2:
            del entries[first]
        else:
            entries[first]["shape"] = rng.choice(([], [-1], [2**62, 2**62], [0], [10**30]))
        header = json.dumps(entries).encode()
        if choice == 3:  # a key that stands twice
            header = header[:-1] + b", " + header[1:]
    else:
        header = mutated_json(rng, header)
    claimed = len(header) if rng.random() < 0.95 else rng.choice((0, 2**63, 10**9))
    return struct.pack("<Q", claimed) + header + values


def mutated_state_dict(rng: random.Random, data: bytes) -> bytes:
    """Mutate the bytes of a `.bin` file, or what it holds."""
    import torch

    if rng.random() < 0.5:
        return mutated_bytes(rng, data)
    state = torch.load(io.BytesIO(data), weights_only=True)
    key = rng.choice(list(state))
    tensor = state[key]
    odd = rng.choice(
        (
            tensor.to(torch.int8),
            tensor.to(torch.complex64),
            tensor.reshape(-1, 1),
            tensor[:0],
            tensor.t() if tensor.dim() == 2 else tensor,
            torch.nn.Parameter(tensor),
            tensor.to("meta"),
            tensor.to_sparse(),
            torch.zeros(1).expand(1 << 40),
            torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
            torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
            {"a": tensor},
            [tensor],
            None,
            3,
            "text",
        )
    )
    kind = rng.randrange(4)
    if kind == 0:
        state[rng.choice((3, None, ("a", 1), b"a", "", "x" * 10**5, True))] = tensor
    elif kind == 1:
        whole = rng.choice((odd, [state], {"state_dict": state}, {"model": odd}))
        state = whole
    else:
        state[key] = odd
    file = io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=rng.random() < 0.9)
    return file.getvalue()


def mutated_onnx(rng: random.Random, data: bytes) -> bytes:
    """Mutate the bytes of an ONNX file, or nodes, names, types and sizes in it."""
    import onnx

    if rng.random() < 0.25:
        return mutated_bytes(rng, data)
    model = onnx.ModelProto.FromString(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        rng.choice(_GRAPH_MUTATIONS)(rng, model)
    return model.SerializeToString()


def _change_node(rng: random.Random, model: Any) -> None:
    nodes = model.graph.node
    node = rng.choice(nodes)
    names = [name for other in nodes for name in (*other.input, *other.output)]
    kind = rng.randrange(8)
    if kind == 0:
        nodes.remove(node)
    elif kind == 1:
        node.op_type = rng.choice([other.op_type for other in nodes] + ["Loop", "", "Nothing"])
    elif kind == 2:
        node.domain = rng.choice(("", "ai.dllava", "com.microsoft", "x"))
    elif kind == 3 and node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice([*names, "", "absent"])
    elif kind == 4 and node.output:
        node.output[rng.randrange(len(node.output))] = rng.choice([*names, ""])
    elif kind == 5 and node.input:
        del node.input[rng.randrange(len(node.input))]
    elif kind == 6:
        nodes.add().CopyFrom(node)
    else:
        node.input.append(rng.choice(names))


def _change_attribute(rng: random.Random, model: Any) -> None:
    nodes = [node for node in model.graph.node if node.attribute]
    if not nodes:
        return
    attribute = rng.choice(rng.choice(nodes).attribute)
    kind = rng.randrange(5)
    if kind == 0:
        attribute.i = rng.choice((-1, 0, 5, 2**31, -(2**63)))
    elif kind == 1:
        attribute.type = rng.randrange(14)
    elif kind == 2:
        attribute.ints.extend([rng.choice((-9, 0, 7, 2**40))])
    elif kind == 3:
        attribute.name = rng.choice(("", "axis", "perm", "to"))
    else:
        attribute.f = rng.choice((float("nan"), 1e38, -1.0))


def _change_tensor(rng: random.Random, model: Any) -> None:
    tensor = rng.choice(model.graph.initializer)
    kind = rng.randrange(8)
    if kind == 0:
        tensor.data_type = rng.choice((0, 1, 7, 8, 9, 10, 16, 17, 22, 99))
    elif kind == 1:
        tensor.dims.extend([rng.choice((0, 2, -1, 2**40))])
    elif kind == 2 and tensor.dims:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice((0, 1, -1, 7, 2**40, 2**62))
    elif kind == 3 and tensor.external_data:
        entry = rng.choice(tensor.external_data)
        entry.value = rng.choice(
            ("", "-1", "x", "99999999999", "../outside/victim", "/etc/passwd")
        )
    elif kind == 4 and tensor.external_data:
        rng.choice(tensor.external_data).key = rng.choice(("location", "offset", "x"))
    elif kind == 5:
        tensor.name = rng.choice(("", "inputs_embeds", model.graph.initializer[0].name))
    elif kind == 6:
        values = [
            rng.choice((0, 1, -1, 10**6, 10**10, 2**62)) for _ in range(rng.randrange(4))
        ]
        tensor.ClearField("raw_data")
        del tensor.external_data[:]
        tensor.data_location = 0
        tensor.data_type = 7
        del tensor.dims[:]
        tensor.dims.append(len(values))
        tensor.int64_data.extend(values)
    else:
        tensor.raw_data = rng.randbytes(rng.randrange(20))


def _change_value(rng: random.Random, model: Any) -> None:
    value = rng.choice([*model.graph.input, *model.graph.output])
    kind = rng.randrange(4)
    if kind == 0:
        value.name = rng.choice(("", "absent", "logits", "past_key_values.0.key"))
    elif kind == 1:
        value.type.tensor_type.elem_type = rng.choice((0, 1, 7, 9, 10, 99))
    elif kind == 2 and value.type.tensor_type.shape.dim:
        rng.choice(value.type.tensor_type.shape.dim).dim_value = rng.choice((0, -1, 4, 2**40))
    else:
        value.type.ClearField("value")


def _add_growth(rng: random.Random, model: Any) -> None:
    """Add a few nodes whose result is as large as all memory, or as long as all time."""
    import numpy as np
    from onnx import helper, numpy_helper

    kind = rng.choice(("Concat", "Range", "Expand", "Tile", "function", "chain"))
    big = rng.choice((10**6, 10**9, 10**12))
    nodes = model.graph.node

    def constant(name: str, value: Any) -> str:
        array = np.array(value, np.int64)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    if kind == "Concat":
        last = constant("fz0", [1])
        for number in range(rng.choice((10, 25, 60))):
            nodes.insert(
                number, helper.make_node(kind, [last, last], [f"fz{number + 1}"], axis=0)
            )
            last = f"fz{number + 1}"
    elif kind == "Range":
        names = [constant("fz0", 0), constant("fz1", big), constant("fz2", 1)]
        nodes.insert(0, helper.make_node(kind, names, ["fz"]))
    elif kind in ("Expand", "Tile"):
        names = [constant("fz0", [1]), constant("fz1", [big])]
        nodes.insert(0, helper.make_node(kind, names, ["fz"]))
    elif kind == "chain":
        last = model.graph.input[0].name
        for number in range(rng.choice((100, 20_000))):
            nodes.add().CopyFrom(helper.make_node("Neg", [last], [f"fz{number}"]))
            last = f"fz{number}"
    else:
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("fz", 1)]
        model.opset_import.append(opsets[1])
        depth = rng.choice((3, 14, 60))
        for number in range(depth):
            inner = f"f{number - 1}" if number or rng.random() < 0.2 else "Identity"
            domain = "fz" if inner != "Identity" else ""
            body = [
                helper.make_node(inner, ["x"], ["z"], domain=domain),
                helper.make_node(inner, ["z"], ["y"], domain=domain),
            ]
            model.functions.append(
                helper.make_function("fz", f"f{number}", ["x"], ["y"], body, opsets)
            )
        source = [model.graph.input[0].name]
        nodes.insert(0, helper.make_node(f"f{depth - 1}", source, ["fz"], domain="fz"))


_GRAPH_MUTATIONS = (
    _change_node,
    _change_node,
    _change_attribute,
    _change_tensor,
    _change_tensor,
    _change_value,
    _add_growth,
)
