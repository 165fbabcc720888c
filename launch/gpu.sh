#!/usr/bin/env bash
# Measure on a machine that has a GPU for some minutes and no network. In the root of the repository:
#   bash launch/gpu.sh pack FOLDER [PYTHON]       here: fetch what that machine lacks, as wheels for its Python (3.12)
#   bash launch/gpu.sh run FOLDER [ARGUMENTS]     there: put the wheels beside its own packages, then
#                                                 fedhpc.bench --gpu --json with these arguments, such as --minutes 10
# torch, numpy, h5py, safetensors, tokenizers, huggingface_hub, peft and pytest are taken from that machine.
#   FEDHPC_GPU_PACKAGES   what is fetched instead of 18 MB; bitsandbytes, for a base in 4 bits, has 43 MB more
set -euo pipefail
cd "$(dirname "$0")/.."
usage() { sed -n '2,8p' "$0" >&2; exit 2; }
[[ $# -ge 2 ]] || usage
action=$1 folder=$2
shift 2
case $action in
pack)
    python=${1:-3.12}
    pip=(.venv/bin/python -m pip)
    [[ -x .venv/bin/python ]] || pip=(python3 -m pip)
    version=$(sed -n 's/^transformers==\([^;]*\);.*>=.*/\1/p' launch/constraints.txt)
    default="transformers==$version pydantic pydantic_core annotated-types typing-inspection typing_extensions nltk"
    read -ra packages <<< "${FEDHPC_GPU_PACKAGES:-$default defusedxml}"
    "${pip[@]}" download -q --only-binary=:all: --python-version "$python" --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 \
        --platform manylinux2014_x86_64 --platform any -d "$folder" --no-deps "${packages[@]}"
    "${pip[@]}" wheel -q --no-deps -w "$folder" "rouge-score>=0.1.2" # its newest release has no wheel
    du -sh "$folder"
    ;;
run)
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$folder"/*.whl
    PYTHONPATH=$PWD:$site python3 -m fedhpc.bench --gpu --json "$@"
    ;;
*) usage ;;
esac
