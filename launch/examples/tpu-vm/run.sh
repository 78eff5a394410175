#!/usr/bin/env bash
set -euo pipefail
cd "$(dirname "$0")/source"
export TF_CPP_MIN_LOG_LEVEL=1
HF_TOKEN="$(gcloud secrets versions access latest --secret=HF_TOKEN)"
export HF_TOKEN
rm -f ../code
code=0
../venv/bin/python -P -m t5x_like.launching.restart_loop \
  --pid-file ../pid \
  --max-restarts 10 \
  --restart-on 42 134 137 143 -- ../venv/bin/python -P -m t5x_like train ul2:ul2_20b \
  --workdir gs://my-bucket/t5x-like/runs/ul2_20b \
  --launcher gcetpu \
  --expect-processes 16 \
  --expect-devices 64 \
  --data.store-dir gs://my-bucket/t5x-like/stores || code=$?
echo "$code" >../code
exit "$code"
