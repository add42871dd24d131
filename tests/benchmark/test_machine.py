from __future__ import annotations

import json
import os
import platform

from dllava_export.benchmark.machine import describe_machine


def test_machine_is_described():
    machine = describe_machine()
    assert machine["cores"] == os.cpu_count()
    assert machine["python"] == platform.python_version()
    assert machine["memory_bytes"] > 1 << 28
    assert machine["processor"]
    json.dumps(machine)
