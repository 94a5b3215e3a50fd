#!/usr/bin/env bash
# Several hosts with DeepSpeed's own launcher, started on the first of them:
#   bash scripts/launch/deepspeed.sh llava-1.5-7b/instruct train.deepspeed=ds_configs/zero3.json
# A second run on the same hosts needs a port of its own: PORT=29501 bash scripts/launch/deepspeed.sh ...
# On one host: deepspeed --num_gpus 8 --master_port 29501 scripts/train.py RECIPE
set -euo pipefail
cd "$(dirname "$0")/../.."
exec deepspeed --hostfile scripts/launch/hostfile --master_port "${PORT:-29500}" scripts/train.py "$@"
