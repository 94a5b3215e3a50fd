#!/usr/bin/env bash
# FSDP2 through accelerate on the GPUs of one host; the recipe's key turns it on, the launcher only starts ranks:
#   GPUS=8 bash scripts/launch/fsdp.sh llava-1.5-7b/instruct train.deepspeed=null
# Port 0 takes a free one, so that several runs share a host. `torchrun --standalone` does the same.
set -euo pipefail
cd "$(dirname "$0")/../.."
exec accelerate launch --num_machines 1 --num_processes "${GPUS:-8}" --main_process_port 0 \
  --mixed_precision no --dynamo_backend no scripts/train.py "$@" train.fsdp=true
