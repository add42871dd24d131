from __future__ import annotations

from api_reference import TARGET, api_reference

import dllava_export


def test_the_reference_is_what_the_code_says():
    message = "Run `python tests/api_reference.py` and commit docs/api.md."
    assert TARGET.read_text(encoding="utf-8") == api_reference(), message


def test_every_public_name_is_described():
    text = TARGET.read_text(encoding="utf-8")
    for name in dllava_export.__all__:
        if not name.startswith("__"):
            assert f"### `{name}" in text or f"| `{name}` |" in text, name
