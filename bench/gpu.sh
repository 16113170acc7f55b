#!/usr/bin/env bash
# Builds, checks and measures on a CUDA machine that has torch, in under 9 minutes and without a network.
#
#   bench/gpu.sh OUTDIR [OPTION OF bench.run]...
#
# What is checked is checked side by side; then what is measured has the machine to itself. Logs and CSV are left in OUTDIR.
# With ALIASFUSED_SO an object built elsewhere is used; without nvcc, the one in place.
# The exit status is not zero when a stage failed; a tool that is not there is said to be missing, and is no failure.
set -u
[ $# -ge 1 ] || { sed -n '2,8p' "$0" >&2; exit 2; }
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
shift
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
object=aliasfused/_C.abi3.so
failed=0
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

say() { echo "$*" | tee -a "$out/summary.log"; }

# stage NAME SECONDS COMMAND...
stage() {
  local name=$1 limit=$2 begin=$SECONDS status
  shift 2
  timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
  status=$?
  case $status in
    0) say "ok       $name  $((SECONDS - begin)) s" ;;
    124 | 137) say "TIMEOUT  $name  $limit s, see $name.log" ;;
    *) say "FAILED   $name  status $status, see $name.log" ;;
  esac
  [ $status -eq 0 ] || failed=1
  return $status
}

missing() { say "missing  $1: $2"; }

have_nvcc() {
  [ -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ] && export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda} && return
  command -v nvcc >/dev/null || "$python" - 2>/dev/null <<'PY'
import glob, nvidia, sys
sys.exit(not any(glob.glob(path + "/*/bin/nvcc") for path in nvidia.__path__))
PY
}

: >"$out/summary.log"
stage machine 40 "$python" - <<'PY' || { tail -n 3 "$out/machine.log"; exit 1; }
import platform, torch
print(platform.platform(), "python", platform.python_version(), "torch", torch.__version__, "cuda", torch.version.cuda)
print(torch.cuda.get_device_name(), "sm_%d%d" % torch.cuda.get_device_capability(), torch.cuda.mem_get_info())
PY
cat "$out/machine.log"
nvidia-smi >"$out/nvidia-smi.log" 2>&1 || missing nvidia-smi "clocks and driver are not recorded"

if [ -n "${ALIASFUSED_SO:-}" ]; then
  stage build 10 cp "$ALIASFUSED_SO" "$object" || exit 1
elif have_nvcc; then
  ALIASFUSED_CUDA_ARCHITECTURES=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
  export ALIASFUSED_CUDA_ARCHITECTURES
  stage build 150 "$python" setup.py build_ext --inplace || exit 1
elif [ -f "$object" ]; then
  missing nvcc "using the object in place, $object"
else
  missing nvcc "and there is no $object; set ALIASFUSED_SO to one built elsewhere"
  exit 1
fi
stage backends 40 "$python" -m aliasfused

checks=()
if "$python" -c 'import pytest' 2>/dev/null; then
  workers=$("$python" -c 'import os, xdist; print("-n", max(1, os.cpu_count() // 3))' 2>/dev/null)
  # shellcheck disable=SC2086
  contract() {
    stage "$1" "$2" env OMP_NUM_THREADS=2 "$python" -m pytest tests/test_contract.py --device cuda -q -p no:cacheprovider \
      $workers -k "$3"
  }
  contract contract 110 "not triton" & checks+=($!)
  # Each of its kernels is compiled when it is first called, which takes longer than all else: one dtype, one layout.
  contract contract_triton 110 "triton and float32-nchw" & checks+=($!)
else
  missing pytest "the contract tests did not run"
fi
sanitizer=$(command -v compute-sanitizer || ls "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer" 2>/dev/null)
if [ -n "$sanitizer" ]; then
  for tool in memcheck racecheck; do
    stage "$tool" 110 "$sanitizer" --tool "$tool" --error-exitcode 1 "$python" -m bench.sanitize & checks+=($!)
  done
else
  missing compute-sanitizer "memcheck and racecheck did not run"
fi
for check in "${checks[@]}"; do wait "$check" || failed=1; done

# What is left of 530 seconds.
left=$((530 - SECONDS))
stage bench "$((left > 30 ? left : 30))" "$python" -m bench.run --device cuda --out "$out" "$@"
[ $failed -eq 0 ] && say "all stages passed in $SECONDS s" || say "some stages failed, after $SECONDS s"
exit $failed
