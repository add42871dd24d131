"""The README's table of policies is that of today."""

from __future__ import annotations

from policy_table import TARGET, policy_table

from dllava_export.passes.policies.registry import POLICIES


def test_the_table_is_that_of_the_policies() -> None:
    text = TARGET.read_text(encoding="utf-8")
    assert text == policy_table(text), "Run `python tests/policy_table.py`."


def test_every_policy_has_a_row() -> None:
    table = policy_table("<!-- policies -->\n<!-- end of policies -->\n")
    for name in (*POLICIES.names(), "none"):
        assert table.count(f"\n| `{name}` | ") == 1
