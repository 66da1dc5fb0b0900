#!/usr/bin/env bash
# Builds llama-server from the llama.cpp tree of tools/setup.sh into .cache/bench, for the tests that
# ask a real one. Like the wheel, the build is kept: the next clone on this machine takes it from there.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${JOBS:=$(nproc)}" "${LLAMA_CPP_PYTHON:=0.3.36}"

[ ! -x .cache/bench/bin/llama-server ] || exit 0
kept="${SAFEGENE_SERVERS:-${XDG_CACHE_HOME:-$HOME/.cache}/safegene}/llama-server-$LLAMA_CPP_PYTHON"
if [ -x "$kept/bin/llama-server" ] && "$kept/bin/llama-server" --version >/dev/null 2>&1; then
    mkdir -p .cache/bench && cp -a "$kept/bin" .cache/bench/
    exit 0
fi
[ -f .cache/llama.cpp/CMakeLists.txt ] ||
    { echo "no llama.cpp sources in .cache/llama.cpp: run tools/setup.sh first" >&2; exit 2; }
command -v cmake >/dev/null ||
    { echo "llama-server is built with cmake (for example: apt install cmake, or pip install cmake)" >&2; exit 2; }

cmake -S .cache/llama.cpp -B .cache/bench -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF \
    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_OPENSSL=OFF \
    -DCMAKE_BUILD_RPATH_USE_ORIGIN=ON >/dev/null
cmake --build .cache/bench --target llama-server -j "$JOBS"
mkdir -p "$kept" && cp -a .cache/bench/bin "$kept/"
