#!/usr/bin/env bash
# Make .venv and install fedhpc with the given extras, e.g. `bash launch/install.sh report,mpi`. Does nothing when that is done.
#   PYTHON               the interpreter to use (python3)
#   FEDHPC_TORCH_INDEX   index that pip takes torch from (a CPU or CUDA build other than pip's default)
#   FEDHPC_VENV          the folder of the environment (.venv)
#   FEDHPC_CONSTRAINTS   the versions (launch/constraints.txt)
# A torch that the interpreter already has (a cluster's CUDA build) is used as it is.
set -euo pipefail
cd "$(dirname "$0")/.."
extras=${1:-report}
python=${PYTHON:-python3}
venv=${FEDHPC_VENV:-.venv}
constraints=${FEDHPC_CONSTRAINTS:-launch/constraints.txt}
torch=$(grep '^torch==' "$constraints" || echo torch==2.13.0)

"$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' || {
    echo "install: fedhpc needs Python 3.10 to 3.13; set PYTHON to one" >&2
    exit 2
}
if [ ! -x "$venv/bin/python" ]; then
    site=()
    if "$python" -c 'import torch' 2>/dev/null; then site=(--system-site-packages); fi
    "$python" -m venv "${site[@]}" "$venv" || {
        echo "install: '$python -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2
        exit 2
    }
fi
stamp=$venv/installed-$extras
wanted="$PWD $(cat pyproject.toml "$constraints" launch/install.sh | cksum)"
if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then exit 0; fi
echo "install: fedhpc[$extras] into $venv (a few minutes the first time)"
pip=("$venv/bin/python" -m pip install -qq --disable-pip-version-check)
if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
    "${pip[@]}" ${FEDHPC_TORCH_INDEX:+--index-url "$FEDHPC_TORCH_INDEX"} "$torch"
fi
"${pip[@]}" -c "$constraints" -e ".[$extras]"
echo "$wanted" > "$stamp"
