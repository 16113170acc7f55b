#!/usr/bin/env bash
# Runs the contract test on the shared object as it was built, under other versions of torch.
#
#   tests/abi.sh [VERSION...]      default: 2.11.0 newest
#
# PIP_INDEX_URL, or --index-url in PIP_ARGS, says where torch comes from; name an index of CPU builds where those will do.
# ABI_VENVS names the folder that keeps the environments (default: .venvs), PYTHON the interpreter they are made with.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
venvs=${ABI_VENVS:-$root/.venvs}
object=$root/aliasfused/_C.abi3.so
[[ -f $object ]] || { echo "there is no $object: build it with: pip install --no-build-isolation -e ." >&2; exit 1; }
sum=$(sha256sum "$object" | cut -c1-16)

place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
# A copy, so that neither the checkout's path nor a build made meanwhile gets into it.
cp -r "$root/aliasfused" "$root/tests" "$place/"

for version in "${@:-2.11.0 newest}"; do
  for one in $version; do
    environment=$venvs/abi-$one
    [[ $one == newest ]] && torch=torch upgrade=--upgrade || torch=torch==$one upgrade=
    [[ -x $environment/bin/python ]] || "${PYTHON:-python3}" -m venv "$environment"
    # shellcheck disable=SC2086
    "$environment/bin/pip" install --quiet $upgrade ${PIP_ARGS:-} "$torch" numpy pytest
    cd "$place"
    "$environment/bin/python" - "$sum" <<'PYTHON'
import sys, torch, aliasfused
native = aliasfused.backends()[0]
print(f"object {sys.argv[1]} under torch {torch.__version__}, Python {sys.version.split()[0]}: {native.detail or native.reason}")
sys.exit(not native.available)
PYTHON
    "$environment/bin/python" -m pytest -q -p no:cacheprovider tests/test_contract.py -k native
  done
done
