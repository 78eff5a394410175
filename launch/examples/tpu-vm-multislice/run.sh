#!/usr/bin/env bash
set -euo pipefail
cd "$(dirname "$0")/source"
rm -f ../code
code=0
../venv/bin/python -P -m t5x_like.launching.restart_loop \
  --pid-file ../pid \
  --max-restarts 10 \
  --restart-on 42 134 137 143 -- ../venv/bin/python -P -m t5x_like train ul2:ul2_20b \
  --workdir gs://my-bucket/t5x-like/runs/ul2_20b \
  --launcher gcetpu \
  --expect-processes 128 \
  --expect-devices 512 \
  --data.store-dir gs://my-bucket/t5x-like/stores || code=$?
echo "$code" >../code
exit "$code"
