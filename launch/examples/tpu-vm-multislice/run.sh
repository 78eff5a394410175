#!/usr/bin/env bash
set -euo pipefail
cd "$(dirname "$0")/source"
exec ../venv/bin/python -m t5x_like.launching.supervise \
  --pid-file ../pid \
  --max-restarts 10 \
  --restart-on 42 134 137 143 -- ../venv/bin/python -m t5x_like train ul2:ul2_20b \
  --workdir /mnt/runs/ul2_20b \
  --launcher gcetpu \
  --expect-processes 128 \
  --expect-devices 512 \
  --data.store /mnt/runs/stores
