#!/usr/bin/env bash
# wandb 0.31.0: an offline run that is killed leaves a file without a single record.
#
# What one would guess: what is logged goes to a process of W&B's own (wandb-core), which outlives the program and writes it
# down; so a run of a few seconds that ends by SIGKILL, by a time limit or by os._exit can be synced up to its last step.
# What happens: the program's end ends wandb-core, and what it had not flushed is lost. It flushes every 15 s, so of a run
# of 10 steps nothing is left, and of a longer one the last 15 s are missing. `finish()` writes all, in the end: it may
# return before the file is whole, wandb.teardown() does not.
# What to do: wandb.Settings(x_transaction_log_flush_interval=1.0); on the way out run.finish() and wandb.teardown().
#
# Seen: by default 0 of 10 steps, with an interval of 1 s 9 of 10 (the program is killed 3 s after the last step, whose row
# would have been written with the next one).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check wandb==0.31.0
export WANDB_CACHE_DIR=$folder/cache WANDB_SILENT=true
cat > "$folder/log.py" <<'PY'
import os
import signal
import sys
import time

import wandb

settings = wandb.Settings(console="off", **({"x_transaction_log_flush_interval": 1.0} if sys.argv[2] == "1" else {}))
run = wandb.init(mode="offline", project="p", dir=sys.argv[1], settings=settings)
for step in range(10):
    run.log({"loss": 1.0 / (step + 1)}, step=step)
time.sleep(3)
os.kill(os.getpid(), signal.SIGKILL)
PY
cat > "$folder/count.py" <<'PY'
import glob
import struct
import sys

from wandb.proto import wandb_internal_pb2

(path,) = glob.glob(f"{sys.argv[1]}/wandb/offline-run-*/*.wandb")
data, at, steps, record = open(path, "rb").read(), 7, 0, b""
while at + 7 <= len(data):  # a log as LevelDB has it, behind a header of 7 bytes
    left = 32768 - at % 32768
    if left < 7:
        at += left
        continue
    _, length, part = struct.unpack_from("<IHB", data, at)
    record += data[at + 7 : at + 7 + length]
    at += 7 + length
    if part in (1, 4):
        steps += wandb_internal_pb2.Record.FromString(record).WhichOneof("record_type") == "history"
        record = b""
print(steps)
PY
kept() {
    mkdir "$folder/$1"
    "$folder/venv/bin/python" "$folder/log.py" "$folder/$1" "$1" 2> /dev/null || true
    sleep 5 # wandb-core may take a moment
    "$folder/venv/bin/python" "$folder/count.py" "$folder/$1"
}
default=$(kept default)
often=$(kept 1)
echo "wandb 0.31.0: of 10 steps of a killed offline run the file has $default by default, $often with a flush every second"
[ "$default" -eq 0 ] && [ "$often" -eq 9 ]
