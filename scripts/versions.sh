#!/usr/bin/env bash
# The suite on other versions than .venv's, each in an environment of its own: .versions/NAME.
#
#   oldest      Python 3.10, and every bound of pyproject.toml as a pin: torch>=2.10 becomes torch==2.10
#   reference   Python 3.12 and what the reference GPU machine has: torch 2.11.0, Triton 3.6.0; with a numpy that Triton's
#               interpreter takes, and README once more on the numpy of that machine, 2.5
#   newest      Python 3.13 and the newest of everything that the package index gives
#
#   scripts/versions.sh [NAME ...]    those environments, or all; ARGS="what pytest takes" and JOBS=processes, as for make test
#   scripts/versions.sh rehearsal     no suite: all of make gpu at toy size, in the reference environment; OUT=folder
#
# An environment is made once, and brought into line when pyproject.toml or this file has changed; remove .versions/newest
# to take newer releases. Each takes 5 to 8 GB, most of it CUDA, unless PIP_EXTRA_INDEX_URL names an index of CPU builds
# (https://download.pytorch.org/whl/cpu). A Python that is not here is skipped, and the table says so.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/kernels" OMP_NUM_THREADS=1

declare -A python_of=([oldest]=3.10 [reference]=3.12 [newest]=3.13)
readme=(tests/house/test_readme_snippets.py tests/house/test_house.py::test_code_on_pages_runs_and_prints_what_they_say)
logs=out/versions
table="$logs/table.txt"

# The interpreter of a version: on PATH, or among pyenv's.
interpreter() {
    local candidate
    for candidate in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1".*/bin/python; do
        if "$candidate" -c '' 2>/dev/null; then echo "$candidate"; return; fi
    done
    return 1
}

# What an environment's pip may install.
constraints() {
    case "$1" in
        oldest) grep -oE '"[a-z0-9-]+(\[[a-z-]+\])?>=[0-9.]+' pyproject.toml | sed -E 's/"//; s/\[.*\]//; s/>=/==/' | sort -u ;;
        reference) printf '%s\n' torch==2.11.0 triton==3.6.0 'numpy<2.4' ;;
        newest) ;;
    esac
}

make_environment() {
    local folder=".versions/$1" python="$2"
    if [ "$folder/ready" -nt pyproject.toml ] && [ "$folder/ready" -nt scripts/versions.sh ]; then return; fi
    if [ ! -x "$folder/bin/python" ]; then "$python" -m venv "$folder" || return; fi
    constraints "$1" >"$folder/constraints.txt"
    "$folder/bin/python" -m pip install --quiet -c "$folder/constraints.txt" -e ".[dev,data,cogvideox,embeddings]" || return
    if [ "$1" = reference ]; then
        "$folder/bin/python" -m pip install --quiet --no-deps --target "$folder/numpy-2.5" 'numpy==2.5.*' || return
    fi
    touch "$folder/ready"
}

row() { printf '%-22s %s\n' "$@" >>"$table"; }

# One row of the table: a name, versions, and pytest's last line.
run() {
    local name="$1" python=".versions/$2/bin/python" versions
    shift 2
    versions="$("$python" -c 'import importlib.metadata as m, sys
print("Python", sys.version.split()[0], *(f"{name} {m.version(name)}" for name in ("torch", "triton", "numpy")))')"
    echo "versions: $name: $versions"
    "$python" -m pytest -q -n "${JOBS:-2}" -p no:cacheprovider "$@" 2>&1 | tee "$logs/$name.log" || failed=yes
    row "$name" "$(printf '%-55s %s' "$versions" "$(tail -1 "$logs/$name.log")")"
}

if [ "$*" = rehearsal ]; then
    python="$(interpreter 3.12)" || { echo "versions: the rehearsal needs a Python 3.12, on PATH or in pyenv" >&2; exit 1; }
    make_environment reference "$python"
    .versions/reference/bin/python -m benchmarks.gpu --interpret --out "${OUT:-out/gpu-rehearsal}"
    # that machine's numpy runs no kernel in this Triton's interpreter
    PYTHONPATH="$PWD/.versions/reference/numpy-2.5:$PYTHONPATH" .versions/reference/bin/python -m benchmarks.gpu --plan
    exit
fi

mkdir -p "$logs"
: >"$table"
failed=
if [ $# = 0 ]; then set -- oldest reference newest; fi
for name in "$@"; do
    version="${python_of[$name]:?"versions: choose among oldest, reference and newest, not $name"}"
    if ! python="$(interpreter "$version")"; then
        row "$name" "skipped: there is no Python $version, on PATH or in pyenv"
        continue
    fi
    if ! make_environment "$name" "$python"; then
        row "$name" "its packages could not be installed"
        failed=yes
        continue
    fi
    # shellcheck disable=SC2086
    run "$name" "$name" ${ARGS:-}
    if [ "$name" = reference ]; then
        PYTHONPATH="$PWD/.versions/reference/numpy-2.5:$PYTHONPATH" run "reference, numpy 2.5" reference "${readme[@]}"
    fi
done
cat "$table"
[ -z "$failed" ]
