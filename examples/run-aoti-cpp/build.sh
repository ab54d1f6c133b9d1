#!/bin/sh
# Compile generate.cpp against the libtorch of a Python installation: sh build.sh [python] -> ./generate
set -eu
cd "$(dirname "$0")"
TORCH=$("${1:-python3}" -c 'import os, torch; print(os.path.dirname(torch.__file__))')
"${CXX:-g++}" -std=c++20 -O1 -D_GLIBCXX_USE_CXX11_ABI=1 generate.cpp -o "${OUT:-generate}" \
  -I"$TORCH/include" -I"$TORCH/include/torch/csrc/api/include" \
  -L"$TORCH/lib" -Wl,-rpath,"$TORCH/lib" -Wl,--no-as-needed -ltorch_cpu -lc10 -ltorch
