#!/usr/bin/env bash
# Export a tiny Dynamic-LLaVA checkpoint, look at it, and run it on a picture in both modes.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
source "$here/../setup.sh"
cd "$here"
rm -rf out out.png

echo '$ dllava-export export ../../tests/data/mha out'
dllava-export export ../../tests/data/mha out
echo
echo '$ dllava-export inspect out --plot out.png'
dllava-export inspect out --plot out.png
for mode in cache recompute; do
    echo
    echo "\$ dllava-export run out --image ../cat.png --input-ids 1,-200,15,27 --max-new-tokens 16 --mode $mode"
    dllava-export run out --image ../cat.png --input-ids 1,-200,15,27 --max-new-tokens 16 --mode "$mode"
done
