#!/usr/bin/env bash
# Builds a wheel and an sdist into out/dist and tries both away from this folder: the wheel's command line checks its
# numbers, and the sdist runs tests of its own files.
set -euo pipefail
cd "$(dirname "$0")/.."
python="$PWD/.venv/bin/python"
[ -x "$python" ] || python="${PYTHON:-python3}"
out="$PWD/out/dist"
rm -rf "$out" build # an older build of the folder would put its files into the wheel
mkdir -p "$out"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH

# the package index's build tools where there is one, else those that are here
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$out" . ||
    "$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$out" .
"$python" -c 'import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])' "$out" >"$work/log" 2>&1 ||
    { cat "$work/log" >&2; exit 1; }

"$python" -m pip install --quiet --no-deps --target "$work/wheel" "$out"/*.whl
cd "$work"
export PYTHONPATH="$work/wheel"
"$python" -c 'import canvas_engineering as c; assert c.__file__.startswith("'"$work"'"), c.__file__'
"$python" -m canvas_engineering doctor >doctor.txt || { cat doctor.txt; exit 1; }
"$python" - <<'END'
from canvas_engineering import CanvasLayout, CanvasSchema, CanvasTopology

layout = CanvasLayout(T=2, H=2, W=2, d_model=8, regions={"a": (0, 2, 0, 1, 0, 2), "b": (0, 2, 1, 2, 0, 2)})
CanvasSchema(layout, CanvasTopology.dense(["a", "b"])).to_json("canvas.json")
END
"$python" -m canvas_engineering inspect canvas.json >inspect.txt
"$python" -m canvas_engineering draw canvas.json --out canvas.png
"$python" -m canvas_engineering explore canvas.json --out canvas.html
[ -s canvas.png ] && [ -s canvas.html ]
echo "wheel: doctor's checks pass; inspect, draw and explore run"

tar xzf "$out"/*.tar.gz
cd canvas_engineering-*/
export PYTHONPATH="$PWD:$PWD/kernels"
OMP_NUM_THREADS=1 "$python" -m pytest -q -p no:cacheprovider tests/attention/test_attention.py tests/declare/test_schema.py tests/look/test_explore.py \
    tests/look/test_main.py tests/house/test_setup.py tests/look/test_gallery.py
ls -lh "$out"
