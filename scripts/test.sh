#!/usr/bin/env bash
# Everything that must hold, as CI runs it: makes .venv, installs, lints, checks types, runs the tests.
#   bash scripts/test.sh              all tests
#   bash scripts/test.sh -m 'not slow' -k vcd     any pytest arguments: tests only
set -euo pipefail
cd "$(dirname "$0")/.."
EXTRAS=dev source scripts/venv.sh
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [ $# -gt 0 ]; then
  exec python -m pytest "$@"
fi
ruff check .
ruff format --check .
mypy
python -m pytest -n 2 -m "not slow"
# Alone, because they time whole runs or fill both cores by themselves.
OMP_NUM_THREADS=2 python -m pytest -m slow
