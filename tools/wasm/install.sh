#!/usr/bin/env bash
# ONNX Runtime's WebAssembly build for Node, into the folder where export/elsewhere.py looks for it (EDGEQAT_WASM moves it).
#   bash tools/wasm/install.sh [onnxruntime-web version]
set -euo pipefail
for command in node npm; do
  command -v "$command" >/dev/null || { echo "$command is not installed: apt-get install nodejs npm" >&2; exit 1; }
done
folder=${EDGEQAT_WASM:-${XDG_CACHE_HOME:-$HOME/.cache}/edgeqat/wasm}
mkdir -p "$folder"
npm install --prefix "$folder" --no-audit --no-fund --loglevel=error "onnxruntime-web@${1:-1.30.0}"
echo "$folder"
