#!/bin/sh
# Runs the fast tests with the oldest allowed packages on the oldest Python, and with the newest ones on the newest Python.
# uv chooses the packages; UV_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu spares gigabytes of CUDA.
# usage: test_matrix.sh UV PYTEST_ARGUMENTS...; OLDEST and NEWEST name the interpreters, as versions or paths
set -eu
uv=$1
shift
CDPATH= cd -- "$(dirname -- "$0")/.."
export UV_INDEX_STRATEGY=unsafe-best-match

# The packages that a user's environment has, from a file or the newest; those that only test this project are the newest.
run_with() {
    python=$1 resolution=$2 extras=$3
    shift 3
    folder=build/matrix/$resolution
    mkdir -p "$folder"
    "$uv" venv --quiet --clear --python "$python" "$folder/venv"
    if [ "$resolution" = lowest ]; then
        cp requirements/lowest.txt "$folder/packages.txt"
    else
        "$uv" pip compile --quiet --no-header --no-annotate --python "$folder/venv/bin/python" \
            --extra train --extra report --extra serve --extra tensorboard --extra integrations --output-file "$folder/packages.txt" pyproject.toml
    fi
    "$uv" pip install --quiet --python "$folder/venv/bin/python" --constraint "$folder/packages.txt" \
        --editable ".[train,report,serve,tensorboard,$extras]"
    echo "$("$folder/venv/bin/python" --version), $resolution packages: $(grep -E '^(torch|deepspeed|numpy|pandas|pydantic)==' "$folder/packages.txt" | tr '\n' ' ')"
    PATH="$PWD/$folder/venv/bin:$PATH" "$folder/venv/bin/python" -m pytest "$@"
}

# Today's transformers, accelerate, lightning and timm need newer packages than the oldest ones here.
run_with "${OLDEST:-3.11}" lowest test "$@" --ignore tests/distributed/integrations --ignore tests/models/integrations/replacement \
    --ignore tests/models/integrations/test_huggingface.py --ignore tests/models/integrations/test_timm.py \
    --ignore tests/planner/deepspeed/test_frameworks.py
run_with "${NEWEST:-3.13}" highest integrations,test "$@"
