#!/usr/bin/env bash
# Every static check, each announced; the exit status tells whether all of them passed. $1: folder of the tools (default .venv/bin).
set -uo pipefail
cd "$(dirname "$0")/.."
bin=${1:-.venv/bin}
status=0
check() {
    printf '== %s\n' "$*"
    "$bin/$@" || status=1
}
check ruff check .
check ruff format --check .
check pyright --pythonpath "$bin/python"
check lint-imports --no-cache
exit $status
