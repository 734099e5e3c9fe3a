#!/bin/bash
# run.sh: check and time every variant of both kernels; a variant that hangs is killed after 5 s. Prints one JSON line per result.
cd "$(dirname "$0")" || exit 1
bin/forward reference >/dev/null
for name in forward backward; do
  count=$("bin/$name" list | wc -l)
  for ((i = 0; i < count; ++i)); do timeout 5 "bin/$name" check time "from=$i" "to=$((i + 1))"; done
done
