#!/bin/sh
# Installs an offline bundle into a folder, without a network, next to the packages that Python already has.
#
# usage: install_offline.sh [--python PYTHON] [--target FOLDER]
#
#   --python  the Python that has torch (default: python3)
#   --target  where the packages go (default: offline-site next to the bundle); a folder that an earlier run of this
#             script filled is replaced
#
# The bundle is the folder of this script, or build/offline of the repository. The packages of the machine stay as they
# are. FOLDER/env.sh puts the new ones in front of them, for the shell that reads it.
set -eu

fail() {
    echo "error: $1" >&2
    exit 2
}

python=python3
target=
while [ $# -gt 0 ]; do
    case $1 in
    --python | --target)
        [ $# -ge 2 ] && [ -n "$2" ] || fail "$1: a value is needed"
        if [ "$1" = --python ]; then python=$2; else target=$2; fi
        shift 2
        ;;
    -h | --help)
        sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "$0"
        exit 0
        ;;
    *) fail "$1: unknown option; --python and --target are allowed" ;;
    esac
done

here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
if [ -f "$here/SHA256SUMS" ] || [ ! -f "$here/../pyproject.toml" ]; then
    bundle=$here
else
    bundle=$(dirname -- "$here")/build/offline
fi
[ -f "$bundle/SHA256SUMS" ] && [ -f "$bundle/MANIFEST" ] ||
    fail "no bundle in $bundle: SHA256SUMS or MANIFEST is missing; 'make offline-bundle' writes one on a machine with a network"

# sha256sum prints "FILE: FAILED" for a damaged file, and "FILE: FAILED open or read" for a missing one.
damaged=$(CDPATH= cd -- "$bundle" && sha256sum --check SHA256SUMS 2>/dev/null | sed -n 's/: FAILED.*//p' | tr '\n' ' ')
[ -z "$damaged" ] || fail "$bundle: damaged or missing: ${damaged% }; copy the bundle again"
(CDPATH= cd -- "$bundle" && sha256sum --check --strict --status SHA256SUMS 2>/dev/null) ||
    fail "$bundle/SHA256SUMS: damaged; copy the bundle again"
for file in "$bundle"/*.whl; do
    grep -qF "  ${file##*/}" "$bundle/SHA256SUMS" || fail "$file: not in SHA256SUMS; copy the bundle again"
done

wanted=$(sed -n 's/^python //p' "$bundle/MANIFEST")
command -v "$python" >/dev/null 2>&1 || fail "--python: $python is not found; name the Python $wanted that has torch"
found=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || fail "--python: $python does not run"
[ "$found" = "$wanted" ] || fail "--python: $python is Python $found; the bundle is for Python $wanted"
"$python" -m pip --version >/dev/null 2>&1 || fail "--python: $python has no pip; install its pip (Debian: python3-pip)"

target=${target:-$(dirname -- "$bundle")/offline-site}
case $target in *:*) fail "--target: $target: a colon is not allowed, it separates the folders in PYTHONPATH" ;; esac
if [ -e "$target" ] && [ ! -f "$target/env.sh" ] && [ -n "$(ls -A "$target" 2>/dev/null || echo file)" ]; then
    fail "--target: $target holds other files; name a new or an empty folder"
fi
mkdir -p -- "$(dirname -- "$target")" || fail "--target: $target: its folder cannot be made"
target=$(CDPATH= cd -- "$(dirname -- "$target")" && pwd)/$(basename -- "$target")

# The wheels are named one by one, without dependencies, an index or settings: pip can neither replace torch nor look
# anywhere else.
new=$target.new.$$
trap 'rm -rf "$new"' EXIT
trap 'exit 130' INT TERM
PIP_CONFIG_FILE=/dev/null "$python" -m pip --isolated --disable-pip-version-check install --quiet \
    --no-index --no-deps --ignore-installed --no-warn-script-location --target "$new" "$bundle"/*.whl || {
    echo "error: pip could not install the wheels of $bundle into $target" >&2
    exit 1
}
quoted=$(printf '%s' "$target" | sed "s/'/'\\\\''/g")
cat >"$new/env.sh" <<ENV
export PYTHONPATH='$quoted'"\${PYTHONPATH:+:\$PYTHONPATH}"
export PATH='$quoted/bin':"\$PATH"
ENV
rm -rf "$target"
mv "$new" "$target"

extras=$(sed -n 's/^extras //p' "$bundle/MANIFEST")
# shellcheck disable=SC2086 # one word for each extra
PYTHONPATH=$target${PYTHONPATH:+:$PYTHONPATH} "$python" "$bundle/offline_check.py" "$target" $extras || exit 1
echo "in each shell: . '$quoted/env.sh'"
