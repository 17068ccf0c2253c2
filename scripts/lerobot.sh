#!/usr/bin/env bash
# Our files under LeRobot's own loader, and LeRobot's under ours: in an environment of its own, .versions/lerobot, for
# lerobot 0.6.1 wants Python 3.12 and torch below 2.12. 6 GB, most of it CUDA, unless PIP_EXTRA_INDEX_URL names an index
# of CPU builds. A Python that is not here is an error.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=.versions/lerobot
if [ ! -f "$folder/ready" ]; then
    for python in python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12.*/bin/python; do
        if "$python" -c '' 2>/dev/null; then break; fi
    done
    "$python" -m venv "$folder"
    "$folder/bin/python" -m pip install --quiet 'torch==2.11.*' 'lerobot[dataset]==0.6.1' pytest
    touch "$folder/ready"
fi
# our package from this folder: its requirements and lerobot's do not go together
PYTHONPATH="$PWD:$PWD/kernels" HF_HUB_OFFLINE=1 "$folder/bin/python" scripts/lerobot_check.py "$@"
