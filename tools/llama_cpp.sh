# Which llama.cpp is built, and how: one home for the engine's wheel and for llama-server.
: "${LLAMA_CPP_PYTHON:=0.3.36}"
# Built for every x86-64 CPU with AVX2, not for the one that builds: a kept wheel then runs on the next
# machine, and two machines compute the same. (With -march=native, AMX tiles ended a process by SIGILL
# on a virtual machine that offers AMX and does not let it be used.) CMAKE_ARGS comes later and wins.
LLAMA_CPP_FLAGS="-DGGML_NATIVE=OFF"
LLAMA_CPP_KEPT="${XDG_CACHE_HOME:-$HOME/.cache}/safegene/$LLAMA_CPP_PYTHON-portable"

# Runs a long build without a word, and shows what it said when it fails.
quietly() {
    local log
    log=$(mktemp)
    "$@" >"$log" 2>&1 || { tail -n 60 "$log" >&2; rm -f "$log"; return 1; }
    rm -f "$log"
}
