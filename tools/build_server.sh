#!/usr/bin/env bash
# Builds llama-server from the llama.cpp tree of tools/setup.sh into .cache/bench, for the tests that
# ask a real one. Does nothing when it is there; minutes of both cores when it is not.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${JOBS:=$(nproc)}"

[ ! -x .cache/bench/bin/llama-server ] || exit 0
[ -f .cache/llama.cpp/CMakeLists.txt ] ||
    { echo "no llama.cpp sources in .cache/llama.cpp: run tools/setup.sh first" >&2; exit 2; }
command -v cmake >/dev/null ||
    { echo "llama-server is built with cmake (for example: apt install cmake, or pip install cmake)" >&2; exit 2; }

cmake -S .cache/llama.cpp -B .cache/bench -DCMAKE_BUILD_TYPE=Release -DLLAMA_BUILD_SERVER=ON \
    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_BUILD_APP=OFF \
    -DLLAMA_OPENSSL=OFF >/dev/null
cmake --build .cache/bench --target llama-server -j "$JOBS"
