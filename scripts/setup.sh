#!/usr/bin/env bash
# Makes .venv ready for `make demo`, `make test` and the rest. Run through make, which skips it while it is up to date.
#
#   a fresh machine with a package index   installs torch (CPU build, pinned) and everything else
#   a machine that has torch already       keeps that torch, whatever its build, and adds what is missing
#   a machine without a network            installs only this project and uses the packages that it finds
#   nothing can be installed               the Makefile exports PYTHONPATH=.:kernels, which is enough to run everything
#
# .venv/ready means that every package that the dev and data extras want is there. Without it what there is runs, and
# the next make tries again.
#
# With an argument, the names of extras: adds those extras to a .venv that is ready.
set -euo pipefail
cd "$(dirname "$0")/.."

python="${PYTHON:-python3}"
extra="${1:-}"
stamp=".venv/ready${extra:+-$extra}"

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "setup: Python 3.10 or newer is needed; $python is $("$python" --version). Set PYTHON=/path/to/python3." >&2
    exit 1
}

if [ -n "$extra" ]; then
    if [ -x .venv/bin/python ] && .venv/bin/python -m pip install --quiet -c .venv/constraints.txt -e ".[$extra]"; then
        echo "setup: added $extra"
        touch "$stamp"
    else
        # without the stamp: the next make tries again
        echo "setup: $extra could not be installed; what needs it says so and is skipped" >&2
    fi
    exit 0
fi

if [ ! -x .venv/bin/python ]; then
    # With the system's packages: a GPU machine keeps the torch that was built for its driver.
    "$python" -m venv --system-site-packages .venv || {
        rm -rf .venv
        echo "setup: no virtual environment could be made (on Debian: apt install python3-venv); using $python as it is."
        exit 0
    }
fi
venv=.venv/bin/python

version_of() { "$venv" -c "import importlib.metadata as m; print(m.version('$1'))" 2>/dev/null; }

constraints=.venv/constraints.txt
if torch="$(version_of torch)"; then
    echo "setup: keeping torch $torch"
    echo "torch==$torch" >"$constraints"
    if triton="$(version_of triton)"; then echo "triton==$triton" >>"$constraints"; fi
else
    cp constraints-cpu.txt "$constraints"
    echo "setup: installing $(grep '^torch' "$constraints")"
    "$venv" -m pip install --quiet -c "$constraints" torch || echo "setup: torch could not be installed" >&2
fi

complete=yes
offline=(--quiet --no-index --no-build-isolation)
if "$venv" -m pip install --quiet -c "$constraints" -e ".[dev,data]"; then
    echo "setup: installed canvas-engineering with its dev and data extras"
elif "$venv" -m pip install "${offline[@]}" -e ".[dev,data]"; then
    echo "setup: no package index answered; installed canvas-engineering on the packages that are here, which suffice"
elif "$venv" -m pip install "${offline[@]}" --no-deps -e .; then
    complete=
    echo "setup: no package index answered and packages are missing; installed canvas-engineering alone"
else
    complete=
    echo "setup: nothing could be installed; running from this folder with PYTHONPATH=.:kernels"
fi

"$venv" -c 'import torch' || {
    echo "setup: there is no torch, and none could be installed: install torch>=2.10 for $python and run make again." >&2
    exit 1
}
if [ -n "$complete" ]; then touch "$stamp"; fi
