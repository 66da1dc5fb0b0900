#!/usr/bin/env bash
# What only the tests need, once: Chromium, which looks at the HTML report, and a real llama-server.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! command -v chromium >/dev/null && [ -z "${SAFEGENE_CHROMIUM:-}" ] &&
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "[setup] Chromium (the tests look at the HTML report)"
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null
fi
if [ ! -x .cache/bench/bin/llama-server ]; then
    echo "[setup] building llama-server (minutes, once)"
    bash tools/build_server.sh
fi
