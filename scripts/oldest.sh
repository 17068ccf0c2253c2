#!/usr/bin/env bash
# CogVideoX's tests against the oldest versions that pyproject.toml allows, installed beside the environment's own.
set -euo pipefail
cd "$(dirname "$0")/.."

python=.venv/bin/python
beside=.venv/oldest
if [ ! -d "$beside/diffusers" ]; then
    # Without what they depend on: torch and numpy are the environment's, and the rest is named here.
    "$python" -m pip install --quiet --no-deps --target "$beside" \
        diffusers==0.35.0 transformers==4.56.0 tokenizers==0.22.0 huggingface_hub==0.34.0 accelerate==1.4.0 peft==0.17.0
fi
# Those versions warn of what today's torch calls by other names; that is not what is tested here.
PYTHONPATH="$beside:$PWD:$PWD/kernels" OMP_NUM_THREADS=1 "$python" -m pytest -q -W ignore -m "slow or not slow" \
    tests/test_cogvideox.py tests/test_cogvideox_attention.py tests/test_cogvideox_pipelines.py "$@"
