#!/bin/bash
# build.sh [NAME...]: compile NAME.cu into bin/NAME for sm_90a. Needs nvcc 12.8 or newer, but no GPU, no torch and no Python.
cd "$(dirname "$0")" || exit 1
mkdir -p bin
for name in ${*:-layouts forward backward interpolate}; do
  standard=c++17
  [ "$name" = interpolate ] && standard=c++20
  nvcc -std=$standard -I../../csrc -O3 -diag-suppress 128,177,550 -gencode=arch=compute_90a,code=sm_90a -cudart static -Xptxas -v \
    -Xlinker -s -Xcompiler -static-libstdc++,-static-libgcc -Xfatbin -compress-all -o "bin/$name" "$name.cu" -lpthread \
    >"bin/$name.log" 2>&1 || { echo "$name did not compile:"; grep -m 20 -E 'error|fatal' "bin/$name.log"; exit 1; }
  echo "$name: $(grep -c -E '[1-9][0-9]* bytes spill stores' "bin/$name.log") kernels spill"
done
