"""Write the README's table of policies from the policies themselves.

`python tests/policy_table.py` replaces what stands between the markers.
"""

from __future__ import annotations

import re
from pathlib import Path

from dllava_export.passes.policies.registry import NO_POLICY, POLICIES

TARGET = Path(__file__).parents[1] / "README.md"
_BLOCK = re.compile(r"(<!-- policies -->\n).*?(<!-- end of policies -->\n)", re.DOTALL)


def policy_table(text: str) -> str:
    """Return the page with a table of today's built-in policies."""
    rows = [("policy", "image tokens", "generated tokens", "needs"), ("---",) * 4]
    for name in POLICIES.names():
        policy = POLICIES.find_built_in(name)
        if policy is not None:
            rows.append(
                (f"`{name}`", policy.image_tokens, policy.generated_tokens, policy.needs)
            )
    rows.append((f"`{NO_POLICY}`", "all kept", "all kept", "nothing"))
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    return _BLOCK.sub(lambda found: f"{found[1]}{table}{found[2]}", text)


if __name__ == "__main__":
    page = TARGET.read_text(encoding="utf-8")
    TARGET.write_text(policy_table(page), encoding="utf-8")
    print(f"Wrote {TARGET}")
