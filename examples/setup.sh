# Sourced by run.sh of the examples and of the tests: makes .venv in the repository's root once,
# with this package in it, and puts it first on the PATH. Needs Python 3.11 or newer with venv.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ ! -f "$root/.venv/ready" ]; then
    echo "Installing into $root/.venv (once)" >&2
    "${PYTHON:-python3}" -m venv "$root/.venv"
    # torch first and alone: with the constraint, an installed or local build is taken as it is.
    "$root/.venv/bin/pip" install --quiet --disable-pip-version-check -c "$root/constraints.txt" torch
    "$root/.venv/bin/pip" install --quiet --disable-pip-version-check -c "$root/constraints.txt" \
        -e "$root[test]"
    touch "$root/.venv/ready"
fi
export PATH="$root/.venv/bin:$PATH"
