#!/usr/bin/env bash
# What one GPU can show in under nine minutes: CUDA tests, the speed of each method, then training evidence on MNIST.
#   benchmarks/gpu.sh DATA OUT          DATA holds mnist-train.parquet, mnist-test.parquet and tokenizer/ (varkd's own)
#                                     and may hold features/, a feature network fitted to them (else it is fitted)
#   TINY=1 DEVICE=cpu benchmarks/gpu.sh DATA OUT     the same steps with tiny sizes, to try the script without a GPU
#   STEPS="cuda-tests speed" ...        only these
# Every step has its own time limit; a step that fails or is cut is said so in OUT/results.txt, and the next one runs.
set -uo pipefail
data=$1 out=$2 device=${DEVICE:-cuda} python=${PYTHON:-python3} work=${WORK:-/tmp/varkd-gpu}
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$out" "$work"
began=$SECONDS
step() {
  local name=$1 limit=$2; shift 2
  [[ " ${STEPS:-$name} " == *" $name "* ]] || return
  local at=$SECONDS
  timeout "$limit" "$@" >"$out/$name.txt" 2>&1
  local rc=$?
  echo "$name: rc $rc, $((SECONDS - at)) s (of $limit), at $((at - began)) s" | tee -a "$out/results.txt"
}
speed=(--layers 12 24 --dims 768 1024 --batch 32 --updates 4)
zipar=(--layers 24 --dim 1024 --batch 32 --repeats 3)
updates=400 start=2000 kd=1500 teacher=3000 samples=4000 search=1500 seeds='[0,1,2]' workers=12
if [ -n "${TINY:-}" ]; then
  speed=(--layers 1 1 --dims 16 16 --grid 4 --vocab 64 --batch 2 --updates 1)
  zipar=(--layers 1 --dim 16 --grid 6 --batch 2 --repeats 1)
  updates=2 start=2 kd=2 teacher=2 samples=40 search=40 seeds='[0]' workers=2
fi
study=("out=$work/study" "seeds=$seeds" "updates=$updates" "evaluation.num_samples=$samples" "search_samples=$search"
  "pairs.llamagen.data=$work/codes" "pairs.llamagen.teacher=$work/teacher"
  "pairs.llamagen.start_updates=$start" "pairs.llamagen.start.updates=$kd" "evaluation.resamples=50"
  "temperatures=[0.6,0.7,0.8,0.9]" "time_points=4")

step cuda-tests 75 "$python" -m pytest -q -x --maxfail=20 -p no:cacheprovider tests/gpu
step speed 75 "$python" benchmarks/methods.py --device "$device" --precision bf16 "${speed[@]}"
step zipar 45 "$python" benchmarks/zipar.py --device "$device" "${zipar[@]}"
step encode "${ENCODE_LIMIT:-60}" "$python" -m varkd encode "$data/mnist-train.parquet,$data/mnist-test.parquet" \
  --tokenizer "$data/tokenizer" --out "$work/codes" --device "$device"
[ -d "$data/features" ] && cp -r "$data/features" "$work/codes/"   # a fitted feature network, where there is one
step teacher 90 "$python" -m varkd train mnist-teacher "out=$work/teacher" "data=$work/codes" "device=$device" \
  "train.updates=$teacher" 'train.trackers=[]'
# Models of 80k parameters are bound by launches: many processes share the GPU.
OMP_NUM_THREADS=1 step study "${STUDY_LIMIT:-400}" "$python" -m varkd study recipes/study-mnist-gpu.yaml "${study[@]}" \
  "device=$device" "workers=$workers"
[ -f "$work/study/results.json" ] && cp "$work/study/results.json" "$out/"
cp "$work/study/report/index.html" "$out/study.html" 2>/dev/null
tar czf "$out/judged.tar.gz" -C "$work" --exclude='*.safetensors' --exclude='*.png' study 2>/dev/null
[[ " ${STEPS:-study} " == *" study "* ]] || exit 0
"$python" - "$work" <<'END' && tar czf "$out/models.tar.gz" -C "$work" models
import pathlib, sys, varkd
for run in [*pathlib.Path(sys.argv[1]).glob("teacher"), *pathlib.Path(sys.argv[1]).glob("study/*/start*")]:
    if (run / "status.json").is_file():
        varkd.load(run).save(f"{sys.argv[1]}/models/{run.name}")
END
(cd "$work" && find study -name judged.json | sort) >>"$out/results.txt"
echo "total $((SECONDS - began)) s" | tee -a "$out/results.txt"
