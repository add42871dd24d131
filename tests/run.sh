#!/usr/bin/env bash
# Install what is needed and run lint, types and all tests. Arguments go to pytest.
set -euo pipefail
source "$(cd "$(dirname "$0")" && pwd)/../examples/setup.sh"
cd "$root"
ruff check .
ruff format --check .
mypy dllava_export passes plugins
python -m pytest "$@"
