#!/usr/bin/env bash
# Everything that needs a GPU, in one go of at most 9 minutes: exactness and the gpu tests, DPO against TRL, scoring, the
# quickstart. Results go to $OUT as they come (default: out/gpu), and once more as a page, $OUT/bench-gpu.md, which becomes
# docs/results/bench-gpu.md. A part that no longer fits into the time is left out, and said.
#
#   bash bench/gpu.sh                    all parts, in order
#   bash bench/gpu.sh dpo-short          one part: exact, dpo-short, dpo-long, dpo-spread, scoring,
#                                        dpo-9b, quickstart
#   DEVICE=cpu bash bench/gpu.sh         the same commands on a CPU with tiny shapes, to try the script
#
# SECONDS_LEFT (540) is the time for all parts. Needs the package, TRL and pytest; on a bare machine source what brings them
# first.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=${OUT:-out/gpu} DEVICE=${DEVICE:-cuda} PYTHON=${PYTHON:-python} SECONDS_LEFT=${SECONDS_LEFT:-540}
mkdir -p "$OUT"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONPATH="$PWD/src:$PWD/tests:${PYTHONPATH:-}"
began=$SECONDS

# part NAME SECONDS COMMAND...: runs it if so many seconds are left, into $OUT/NAME.txt
part() {
  local name=$1 needs=$2; shift 2
  [[ -z "$only" || "$only" == "$name" ]] || return 0
  local left=$((SECONDS_LEFT - (SECONDS - began)))
  if ((left < needs)); then
    echo "$name: left out, $left s are left and it takes about $needs" | tee "$OUT/$name.txt"
    return 0
  fi
  echo "== $name"
  local start=$SECONDS
  timeout "$left" "$@" 2>&1 | tee "$OUT/$name.txt" | tail -40
  local status=${PIPESTATUS[0]}
  echo "($name: $((SECONDS - start)) s, exit code $status)" | tee -a "$OUT/$name.txt"
}

only=${1:-}
"$PYTHON" - <<'END' | tee "$OUT/machine.txt"
import importlib.metadata as packages, platform, torch
gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
names = ("torch", "transformers", "trl", "peft", "accelerate", "liger-kernel", "triton")
found = {name: packages.version(name) for name in names if any(True for _ in packages.distributions(name=name))}
print(f"{gpu}, Python {platform.python_version()}, " + ", ".join(f"{name} {version}" for name, version in found.items()))
END

if [[ $DEVICE == cuda ]]; then
  part exact 60 "$PYTHON" -m pytest -q -p no:cacheprovider tests/stages/train/test_gpu.py \
    tests/stages/train/test_memory_plan.py::test_adapters_tuned_on_four_bits_are_merged_into_the_whole_weights
  part dpo-short 100 "$PYTHON" bench/dpo.py --device cuda --rounds 2 --steps 3 --shapes 1024/1024
  part dpo-long 110 "$PYTHON" bench/dpo.py --device cuda --rounds 2 --steps 3 --shapes 4096/1024
  part dpo-spread 70 "$PYTHON" bench/dpo.py --device cuda --rounds 2 --steps 6 --shapes spread
  part scoring 60 "$PYTHON" bench/engines.py --device cuda --rounds 2
  part dpo-9b 120 "$PYTHON" bench/dpo.py --device cuda --model 9b --rounds 1 --steps 2 --checkpointing \
    --shapes 1024/1024 4096/1024 --budgets 16384
else
  part exact 5 "$PYTHON" -m pytest -q -p no:cacheprovider tests/models/attention tests/stages/train/test_batches.py
  part dpo-short 5 "$PYTHON" bench/dpo.py --rounds 1 --steps 2 --dtype float32 --shapes 32/32
  part scoring 5 "$PYTHON" bench/engines.py --rounds 1 --completions 2
fi
part quickstart 60 "$PYTHON" -m croco run recipes/quickstart.toml --set "run.folder=\"$OUT/quickstart\"" \
  --set "runtime.device=\"$DEVICE\""

{
  echo "# On a GPU"
  echo
  echo "Made by \`bash bench/gpu.sh\` on $(cat "$OUT/machine.txt")."
  for name in exact dpo-short dpo-long dpo-spread scoring dpo-9b quickstart; do
    [[ -f "$OUT/$name.txt" ]] || continue
    printf '\n## %s\n\n```\n' "$name"
    tail -60 "$OUT/$name.txt" | cut -c1-200
    echo '```'
  done
} >"$OUT/bench-gpu.md"
echo "the page: $OUT/bench-gpu.md"
