#!/usr/bin/env bash
# Check a change: lint, format, types, then the quick tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/install.sh test
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
exec bash launch/test.sh "$@"
