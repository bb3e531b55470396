#!/usr/bin/env bash
# What one GPU can show in under nine minutes: CUDA tests, `varkd bench`, the speed of each method, training evidence.
#   benchmarks/gpu.sh DATA OUT          DATA holds codes/ of MNIST with its tokenizer and a feature network (varkd encode,
#                                     varkd evaluate), teacher/ and start/ (runs); and, if there are any, checkouts of the
#                                     official code: llamagen/, var/
#   TINY=1 DEVICE=cpu benchmarks/gpu.sh DATA OUT     the same steps with tiny sizes, to try the script without a GPU
#   STEPS="tests bench" ...             only these: tests bench eager speed compiled study
# The study reads parquet: it needs the `data` extra. Every step has its own time limit; a step that fails or is cut is said so in OUT/results.txt, and the next one runs.
set -uo pipefail
data=$1 out=$2 device=${DEVICE:-cuda} python=${PYTHON:-python3} work=${WORK:-/tmp/varkd-gpu}
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$out" "$work"
began=$SECONDS
step() {
  local name=$1 limit=$2; shift 2
  [[ " ${STEPS:-tests bench eager speed compiled study} " == *" ${name%%-*} "* ]] || return
  local at=$SECONDS
  timeout "$limit" "$@" >"$out/$name.txt" 2>&1
  local rc=$?
  echo "$name: rc $rc, $((SECONDS - at)) s (of $limit), at $((at - began)) s" | tee -a "$out/results.txt"
}
speed=(--layers 12 24 --dims 768 1024 --batch 32 --updates 4)
size=full updates=400 samples=4000 search=1500 seeds='[0,1,2]' workers=12
if [ -n "${TINY:-}" ]; then
  speed=(--layers 1 1 --dims 16 16 --grid 4 --vocab 64 --batch 2 --updates 1)
  size=tiny updates=4 samples=40 search=40 seeds='[0]' workers=2
fi
official=()
[ -d "$data/llamagen" ] && official+=(--llamagen "$data/llamagen")
[ -d "$data/var" ] && official+=(--var "$data/var")

# Three processes: most of a test's time is the CPU's.
pytest=("$python" -m pytest -q -p no:cacheprovider --maxfail=20 tests/gpu)
step tests-updates 100 "${pytest[@]}" -k "an_update" &
step tests-captured 100 "${pytest[@]}" -k "captured" &
step tests-rest 100 "${pytest[@]}" -k "not captured and not an_update" &
wait
step bench "${BENCH_LIMIT:-130}" "$python" -m varkd bench --device "$device" --size $size "${official[@]}" \
  --json "$out/bench.json" --budget "${BENCH_BUDGET:-90}"
VARKD_CUDA_GRAPHS=0 step eager 45 "$python" -m varkd bench rollout --device "$device" --size $size \
  --json "$out/eager.json" --budget 30
step speed 60 "$python" benchmarks/methods.py --device "$device" --precision bf16 "${speed[@]}"
step compiled 60 "$python" benchmarks/methods.py --device "$device" --precision bf16 "${speed[@]}" --compile \
  --methods ce kd varkd
# Models of 0.4M parameters are bound by launches: many processes share the GPU.
OMP_NUM_THREADS=1 step study "${STUDY_LIMIT:-400}" "$python" -m varkd study recipes/study-mnist-gpu.yaml \
  "out=$work/study" "device=$device" "workers=$workers" "seeds=$seeds" "updates=$updates" \
  "evaluation.num_samples=$samples" "search_samples=$search" "pairs.llamagen.data=$data/codes" \
  "pairs.llamagen.teacher=$data/teacher" "pairs.llamagen.init=$data/start"
[ -f "$work/study/results.json" ] && cp "$work/study/results.json" "$out/"
cp "$work/study/report/index.html" "$out/study.html" 2>/dev/null
[ -d "$work/study" ] && tar czf "$out/judged.tar.gz" -C "$work" --exclude='*.safetensors' study
echo "total $((SECONDS - began)) s" | tee -a "$out/results.txt"
