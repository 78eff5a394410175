#!/usr/bin/env bash
set -euo pipefail
cd "$(dirname "$0")"
mkdir -p source
tar --extract --gzip --file=source.tar.gz --directory=source
# Transparent huge pages, which jax recommends on v5e and later.
echo always | sudo tee /sys/kernel/mm/transparent_hugepage/enabled >/dev/null
python3 -m pip install --quiet --user uv
python3 -m uv venv --quiet --clear --python 3.12 venv
python3 -m uv pip install --quiet --python venv/bin/python --constraint source/constraints.txt './source[tpu]'
