#!/usr/bin/env bash
# The whole story on a CPU, offline: makes .venv, installs, trains both stages, evaluates, writes a report.
#   bash scripts/quickstart.sh [options of `mllm quickstart`]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
mllm quickstart "$@"
