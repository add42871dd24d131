"""Write `docs/api.md` from signatures and docstrings: `python tests/api_reference.py`."""

from __future__ import annotations

import logging
from pathlib import Path

import griffe

from dllava_export.backends.registry import DEFAULT_BACKEND

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "docs" / "api.md"

_INTRO = """\
# The Python API

Made by `python tests/api_reference.py` from the code; a test compares. `import dllava_export`
loads nothing: each name is imported when it is used. All errors are `DllavaExportError`s.

"""

# What functions take as `**settings`, or hand out; by section and module.
_SECTIONS = {
    "Functions": {
        "runtime.loading": ["load"],
        "api": [
            "export",
            "sparsify",
            "build",
            "validate",
            "evaluate",
            "inspect",
            "plan",
            "bench",
            "visualize",
            "train_predictors",
        ],
    },
    "Sessions": {
        "runtime.session": ["Session"],
        "runtime.decoding": ["DecodingSession"],
        "runtime.generation": ["Stream"],
        "runtime.chat": ["Chat", "Turn"],
        "runtime.results": [
            "Generation",
            "Piece",
            "TokenLogprob",
            "PrefillResult",
            "DecodeResult",
            "RecomputeResult",
        ],
    },
    "Settings": {
        "runtime.generation": ["GenerationSettings"],
        "sparsity": ["Sparsity"],
        "backends.ort.factory": ["OrtOptions"],
        "backends.trt.factory": ["TrtOptions"],
        "backends.trt.build.build_options": ["BuildOptions"],
        "validation.settings": ["ValidationSettings"],
        "evaluation.settings": ["EvaluationSettings"],
        "cost.planning": ["PlanRequest"],
        "benchmark.bench_settings": ["BenchSettings"],
        "training.settings": ["TrainingSettings"],
    },
}


def api_reference() -> str:
    """Return the text of `docs/api.md`."""
    logging.getLogger("griffe").setLevel(logging.CRITICAL)  # `**settings` has documented parts
    package = griffe.load("dllava_export", search_paths=[str(ROOT)], docstring_parser="google")
    parts = [_INTRO]
    for title, modules in _SECTIONS.items():
        parts.append(f"## {title}\n\n")
        for module, names in modules.items():
            parts += [_described(package[f"{module}.{name}"], "###") for name in names]
    parts.append("## Errors\n\n| error | when |\n| --- | --- |\n")
    for module in ("errors", "evaluation.questions", "training.settings"):
        for name, member in package[module].members.items():
            if isinstance(member, griffe.Class) and name.endswith("Error"):
                assert member.docstring is not None
                when = " ".join(member.docstring.value.partition("\n\n")[0].split())
                parts.append(f"| `{name}` | {when} |\n")
    return "".join(parts)


def _described(entry: griffe.Object | griffe.Alias, heading: str) -> str:
    parts = [f"{heading} `{_signature(entry)}`\n\n"]
    if entry.docstring is not None:
        parts += [_section(section) for section in entry.docstring.parsed]
    if isinstance(entry, griffe.Class):
        for name, member in entry.members.items():
            if name.startswith("_") or not isinstance(
                member, griffe.Function | griffe.Attribute
            ):
                continue
            if isinstance(member, griffe.Attribute) and "property" not in member.labels:
                continue
            parts.append(_described(member, heading + "#"))
    return "".join(parts)


def _signature(entry: griffe.Object | griffe.Alias) -> str:
    if not isinstance(entry, griffe.Function):
        return entry.name
    shown = [
        f"{_star(parameter)}{parameter.name}"
        + ("" if parameter.default is None or _star(parameter) else f"={_default(parameter)}")
        for parameter in entry.parameters
        if parameter.name != "self"
    ]
    kinds = [p.kind for p in entry.parameters if p.name != "self"]
    if griffe.ParameterKind.keyword_only in kinds and "*" not in {s[:1] for s in shown[:1]}:
        place = kinds.index(griffe.ParameterKind.keyword_only)
        if not any(k == griffe.ParameterKind.var_positional for k in kinds):
            shown.insert(place, "*")
    returns = "" if entry.returns is None else f" -> {entry.returns}"
    return f"{entry.name}({', '.join(shown)}){returns}"


def _default(parameter: griffe.Parameter) -> str:
    return str(parameter.default).replace("DEFAULT_BACKEND", repr(DEFAULT_BACKEND))


def _star(parameter: griffe.Parameter) -> str:
    stars = {
        griffe.ParameterKind.var_positional: "*",
        griffe.ParameterKind.var_keyword: "**",
    }
    return "" if parameter.name.startswith("*") else stars.get(parameter.kind, "")


def _section(section: griffe.DocstringSection) -> str:
    if section.kind is griffe.DocstringSectionKind.text:
        return f"{section.value}\n\n"
    lines = []
    for item in section.value:
        text = " ".join(item.description.split())
        name = getattr(item, "name", "") or ""
        if section.kind is griffe.DocstringSectionKind.raises:
            name = str(item.annotation)
        lines.append(f"- `{name}`: {text}\n" if name else f"- {text}\n")
    title = {"parameters": "Arguments", "attributes": "Attributes"}.get(
        section.kind.value, section.kind.value.capitalize()
    )
    return f"{title}:\n\n{''.join(lines)}\n"


if __name__ == "__main__":
    TARGET.write_text(api_reference(), encoding="utf-8")
    print(f"Wrote {TARGET}")
