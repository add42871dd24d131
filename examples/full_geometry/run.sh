#!/usr/bin/env bash
# Export, prune, plan and build a model of 7B or 13B shapes whose weights are holes in files.
#     ./run.sh [7B|13B] [FOLDER]
set -euo pipefail
size=${1:-7B}
here=$(cd "$(dirname "$0")" && pwd)
out=${2:-$here/out_$size}
source "$here/../setup.sh"
mkdir -p "$out"
cd "$out"
rm -rf checkpoint bundle uniform

python - "$here/../../tests" "$size" <<'PYTHON'
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import checkpoint_factory

shapes, num_shards = {
    "7B": (checkpoint_factory.SPARSE_7B, 3),
    "13B": (checkpoint_factory.SPARSE_13B, 6),
}[sys.argv[2]]
checkpoint_factory.make_sparse(Path("checkpoint"), shapes, num_shards=num_shards)
PYTHON

show() {
    echo
    echo "\$ dllava-export $*"
    dllava-export "$@" 2>&1
}

# RTX builds take 1.7 times the weights in memory: at 13B more than most machines have.
build_options=(--backend tensorrt-rtx --max-input-len 704 --max-kv-cache-capacity 2048)
gpu_memory=24GiB
if [ "$size" = 13B ]; then
    build_options+=(--dry-run)
    gpu_memory=80GiB
fi

echo "$(date --utc +%F), $(nproc) cores, $(awk '/MemTotal/ {printf "%.1f GiB", $2 / 2^20}' /proc/meminfo)"
du -sh --apparent-size checkpoint
du -sh checkpoint
show export checkpoint bundle --image-keep-rate 0.2 --precision fp16 --profile
show sparsify bundle uniform --policy uniform --image-keep-rate 0.3
show inspect bundle
show plan bundle --gpu-memory $gpu_memory --max-input-len 704 --max-new-tokens 1024
show build bundle "${build_options[@]}" --profile
