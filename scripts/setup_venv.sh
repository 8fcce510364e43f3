#!/usr/bin/env bash
# Create (once) the virtual environment $1 and install this project into it with the extra $2: core, dev, docs or bench.
# Called by the Makefile, which skips it while the stamp file $1/.installed-$2 is newer than pyproject.toml.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1
extra=$2

fail() {
    printf '\nsetup failed: %s\n' "$1" >&2
    exit 1
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3.13 python3.12 python3.11 python3; do
        if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer was found; install one, or name it: make PYTHON=/path/to/python3.12 ..."
}

if [ ! -x "$venv/bin/pip" ]; then
    python=$(find_python)
    echo "Creating $venv with $("$python" --version)"
    "$python" -m venv "$venv" || fail "$python cannot create virtual environments; on Debian or Ubuntu: apt install python3-venv"
fi
command -v "${CXX:-g++}" >/dev/null || command -v clang++ >/dev/null ||
    echo "note: no C++ compiler (g++ or clang++) was found; the engine will use its slower torch kernels"

target=.
[ "$extra" = core ] || target=".[$extra]"
log="$venv/install-$extra.log"
echo "Installing wager ($extra) into $venv; the log is $log"
# shellcheck disable=SC2086
if ! "$venv/bin/pip" install --disable-pip-version-check --progress-bar off ${PIP_FLAGS:-} -e "$target" >"$log" 2>&1; then
    tail -n 15 "$log" >&2
    fail "pip could not install the dependencies (see the lines above and $log)"
fi
touch "$venv/.installed-$extra"
