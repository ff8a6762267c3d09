#!/bin/sh
# Installs the packages of lock files into an environment, each only with a hash that stands there, and then this project.
# usage: install_locked.sh PYTHON LOCK...
#
# torch comes as CPU build if an index of pip has it (PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu), and
# otherwise from PyPI with CUDA's libraries.
set -eu
python=$1
shift
here=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)

install() {
    "$python" -m pip install --quiet --no-deps --no-build-isolation "$@"
}

# The lock files name every package, so pip must choose none itself. What comes as source is built with these.
install --require-hashes --requirement "$here/requirements/build.lock"
if ! errors=$(install --require-hashes --requirement "$here/requirements/torch-cpu.lock" 2>&1); then
    case $errors in
    *"No matching distribution found for torch"*) install --require-hashes --requirement "$here/requirements/torch-cuda.lock" ;;
    *)
        printf '%s\n' "$errors" >&2
        exit 1
        ;;
    esac
fi
for lock; do
    install --require-hashes --requirement "$lock"
done
install --editable "$here"
# Names a package that the locks lack. torchvision is left out on purpose: see lock_requirements.py.
problems=$("$python" -m pip check | grep -v -e '^timm .* requires torchvision, which is not installed' \
    -e '^No broken requirements found') || :
if [ -n "$problems" ]; then
    printf '%s\n' "$problems" >&2
    exit 1
fi
