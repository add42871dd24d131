#!/usr/bin/env bash
# Install what is needed and run lint, types and all tests, the slow ones too, in two processes.
# Arguments go to pytest.
set -euo pipefail
source "$(cd "$(dirname "$0")" && pwd)/../examples/setup.sh"
cd "$root"
mkdir -p build/installed
ruff check .
ruff format --check .
python tests/installed_layout.py build/installed
(cd build/installed && mypy --cache-dir "$root/.mypy_cache" -p dllava_export)
python -m pytest -m "" -n 2 "$@"
