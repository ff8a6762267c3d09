#!/bin/sh
# Type-checks the folders under the names they install as. A type checker does not follow the
# import hook of an editable install, so it reads them through links.
set -eu
root=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
links="$root/build/types/translution"
mkdir -p "$links"
for folder in planner models distributed reports cli; do
    ln -sfn "$root/$folder" "$links/$folder"
done
cd -- "$root/build/types"
exec mypy --config-file "$root/pyproject.toml" --cache-dir "$root/.mypy_cache" \
    -p translution.planner -p translution.models -p translution.distributed -p translution.reports -p translution.cli
