#!/usr/bin/env bash
# Builds llama-server from the llama.cpp tree of tools/setup.sh into .cache/bench, for the tests that
# ask a real one. Like the wheel, the build is kept: the next clone on this machine takes it from there.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${JOBS:=$(nproc)}"
. tools/llama_cpp.sh

[ ! -x .cache/bench/bin/llama-server ] || exit 0
kept="${SAFEGENE_SERVERS:-$LLAMA_CPP_KEPT}/llama-server"
if [ -x "$kept/bin/llama-server" ] && "$kept/bin/llama-server" --version >/dev/null 2>&1; then
    mkdir -p .cache/bench && cp -a "$kept/bin" .cache/bench/
    exit 0
fi
[ -f .cache/llama.cpp/CMakeLists.txt ] ||
    { echo "no llama.cpp sources in .cache/llama.cpp: run tools/setup.sh first" >&2; exit 2; }
command -v cmake >/dev/null ||
    { echo "llama-server is built with cmake (for example: apt install cmake, or pip install cmake)" >&2; exit 2; }

# shellcheck disable=SC2086
quietly cmake -S .cache/llama.cpp -B .cache/bench -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF \
    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_OPENSSL=OFF \
    -DCMAKE_BUILD_RPATH_USE_ORIGIN=ON $LLAMA_CPP_FLAGS ${CMAKE_ARGS:-}
quietly cmake --build .cache/bench --target llama-server -j "$JOBS"
mkdir -p "$kept" && cp -a .cache/bench/bin "$kept/"
