# Sourced by the other scripts: makes .venv once, installs mllm with the extras in EXTRAS (default: train)
# at the versions of constraints.txt, and activates it.
PYTHON=${PYTHON:-python3}
if [ ! -x .venv/bin/python ]; then
  "$PYTHON" -m venv .venv
fi
source .venv/bin/activate
stamp=".venv/.installed-${EXTRAS:-train}"
if [ ! -f "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ constraints.txt -nt "$stamp" ]; then
  echo "installing mllm[${EXTRAS:-train}] into .venv (a few minutes the first time)"
  # torch first and alone: asked for by a range, pip would take the newest build with gigabytes of CUDA.
  python -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' constraints.txt)"
  python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[${EXTRAS:-train}]"
  touch "$stamp"
fi
