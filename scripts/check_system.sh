#!/bin/sh
# Names the system packages that are missing, with the command that installs them.
# usage: check_system.sh PYTHON
set -u
python=$1
missing=""

if ! command -v "$python" >/dev/null 2>&1; then
    missing="$missing python3 python3-venv python3-dev"
else
    "$python" - <<'PY' || { echo "error: $python is too old: Python 3.11 or newer is needed (make PYTHON=...)" >&2; exit 1; }
import sys
sys.exit(sys.version_info < (3, 11))
PY
    "$python" -c 'import ensurepip, venv' 2>/dev/null || missing="$missing python3-venv"
    "$python" - <<'PY' || missing="$missing python3-dev"
import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))
PY
fi
command -v "${CXX:-g++}" >/dev/null 2>&1 || missing="$missing g++"

if [ -n "$missing" ]; then
    echo "error: these system packages are missing:$missing" >&2
    echo "install them: sudo apt-get install --yes$missing" >&2
    exit 1
fi
if [ ! -e /usr/include/libaio.h ]; then
    echo "note: libaio is missing; only offload to NVMe needs it: sudo apt-get install --yes libaio-dev" >&2
fi
exit 0
