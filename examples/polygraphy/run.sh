#!/usr/bin/env bash
# Check the graphs of a bundle with polygraphy: as they are on disk, and as the product runs them.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
source "$here/../setup.sh"
cd "$here"
rm -rf out out_inputs out_decode.json

show() {
    echo
    echo "\$ $*"
    "$@"
}
show dllava-export export ../../tests/data/mha out
show dllava-export validate out --steps 4 --save-inputs out_inputs
show polygraphy run out/llm/model.onnx --onnxrt --dllava-onnxruntime \
    --load-inputs out_inputs/decoder_prefill.json --atol 2e-4 --rtol 1e-4
show polygraphy run out/llm/model.onnx --onnxrt \
    --load-inputs out_inputs/decoder_decode.json --save-outputs out_decode.json
show polygraphy run out/llm/model.onnx --dllava-onnxruntime \
    --load-inputs out_inputs/decoder_decode.json --load-outputs out_decode.json \
    --atol 2e-4 --rtol 1e-4
