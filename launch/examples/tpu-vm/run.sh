#!/usr/bin/env bash
set -euo pipefail
cd "$(dirname "$0")/source"
export TF_CPP_MIN_LOG_LEVEL=1
HF_TOKEN="$(gcloud secrets versions access latest --secret=HF_TOKEN)"
export HF_TOKEN
exec ../venv/bin/python -m t5x_like.launching.supervise \
  --pid-file ../pid \
  --max-restarts 10 \
  --restart-on 42 134 137 143 -- ../venv/bin/python -m t5x_like train ul2:ul2_20b \
  --workdir /mnt/runs/ul2_20b \
  --launcher gcetpu \
  --expect-processes 16 \
  --expect-devices 64 \
  --data.store /mnt/runs/stores
