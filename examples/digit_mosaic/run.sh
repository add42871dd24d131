#!/usr/bin/env bash
# Export the trained checkpoint, ask it about a picture it has never seen, and draw what it kept.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
source "$here/../setup.sh"
cd "$here"
rm -rf out out.png

echo '$ dllava-export export checkpoints/sparse out --precision fp32'
dllava-export export checkpoints/sparse out --precision fp32
echo
echo '$ dllava-export evaluate out sample/questions.json --show-answers all'
dllava-export evaluate out sample/questions.json --show-answers all
echo
echo '$ dllava-export visualize out --image sample/images/00000.png --prompt "Describe every digit with its place." -o out.png'
dllava-export visualize out --image sample/images/00000.png \
    --prompt "Describe every digit with its place." -o out.png
