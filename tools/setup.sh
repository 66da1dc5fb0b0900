#!/usr/bin/env bash
# Creates $VENV with everything the demo and the tests need, and unpacks the llama.cpp tree that
# matches the built engine into .cache/llama.cpp (its converter scripts are used for HF -> GGUF).
set -euo pipefail
cd "$(dirname "$0")/.."
: "${PYTHON:=python3.11}" "${VENV:=.venv}"
. tools/llama_cpp.sh

say() { printf '\033[1m[setup]\033[0m %s\n' "$*"; }
command -v "$PYTHON" >/dev/null || PYTHON=python3
"$PYTHON" -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' ||
    { echo "safegene needs CPython 3.11 or newer; set PYTHON=/path/to/python3.11" >&2; exit 2; }
command -v c++ >/dev/null || command -v g++ >/dev/null ||
    { echo "safegene builds llama.cpp and needs a C++ compiler (for example: apt install g++)" >&2; exit 2; }

export PIP_DISABLE_PIP_VERSION_CHECK=1
pip() { "$VENV/bin/python" -m pip "$@" 2> >(grep -v "Location 'file:" >&2); }

say "virtual environment in $VENV"
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
pip install -q --upgrade pip setuptools wheel

say "PyTorch (by exact version: that is the CPU build)"
pip install -q torch==2.13.0

mkdir -p .cache/sdist
sdist=.cache/sdist/llama_cpp_python-$LLAMA_CPP_PYTHON.tar.gz
if [ ! -f "$sdist" ]; then
    say "llama.cpp sources (the sdist of llama-cpp-python $LLAMA_CPP_PYTHON)"
    pip download -q --no-deps --no-build-isolation --no-binary llama-cpp-python \
        -d .cache/sdist "llama-cpp-python==$LLAMA_CPP_PYTHON" 2>/dev/null ||
    pip download -q --no-deps --no-binary llama-cpp-python \
        -d .cache/sdist "llama-cpp-python==$LLAMA_CPP_PYTHON"
fi
if [ ! -f .cache/llama.cpp/convert_hf_to_gguf.py ]; then
    rm -rf .cache/llama.cpp .cache/llama.cpp.partial && mkdir -p .cache/llama.cpp.partial
    tar xzf "$sdist" -C .cache/llama.cpp.partial --strip-components=3 --wildcards \
        "llama_cpp_python-*/vendor/llama.cpp/*"
    mv .cache/llama.cpp.partial .cache/llama.cpp
fi

if ! "$VENV/bin/python" -c "import llama_cpp, sys; sys.exit(llama_cpp.__version__ != '$LLAMA_CPP_PYTHON')" 2>/dev/null; then
    # The wheel is kept: the next clone on this machine takes it from there.
    wheels="${SAFEGENE_WHEELS:-$LLAMA_CPP_KEPT}"
    mkdir -p "$wheels"
    if ! ls "$wheels"/llama_cpp_python-"$LLAMA_CPP_PYTHON"-*.whl >/dev/null 2>&1; then
        say "building llama.cpp (about 10 minutes on 2 cores; kept in $wheels)"
        CMAKE_ARGS="-DLLAVA_BUILD=OFF $LLAMA_CPP_FLAGS ${CMAKE_ARGS:-}" \
            quietly "$VENV/bin/python" -m pip wheel -q --no-deps -w "$wheels" "$sdist"
    else
        say "llama.cpp was built before: $wheels"
    fi
    pip install -q "$wheels"/llama_cpp_python-"$LLAMA_CPP_PYTHON"-*.whl
fi

say "safegene and the rest"
quietly "$VENV/bin/python" -m pip install -q -e ".[dev]"
say "ready"
