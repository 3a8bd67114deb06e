#!/usr/bin/env bash
# bash reproduce.sh         the whole evidence (results/reproduce.md): hours, resumable. ASGA_DATA: a folder
#                           with cifar10/ (the proxy) and tinyimagenet50/ (the target). Its flags:
#                           python evidence/reproduce.py --help
# bash reproduce.sh quick   search on digits 0-4, transfer to digits 5-9: minutes, downloads no data
# bash reproduce.sh test    the tests; with ASGA_DATA the real-data ones too
# All make .venv here and install what they need. PYTHON=… chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
python=.venv/bin/python
[[ "${1:-}" != --help ]] || exec sed -n '2,7s/^# //p' reproduce.sh

install() {
  local done=.venv/installed-${1//\//-}
  cmp -s "$1" "$done" || "$python" -m pip install --quiet --disable-pip-version-check -r "$1"
  cp "$1" "$done"
}

"$python" -m pip --version >/dev/null 2>&1 || "${PYTHON:-python3}" -m venv .venv
install requirements.txt
if [ "${1:-}" = quick ]; then
  out=runs/quick-$(date +%Y%m%d-%H%M%S)
  common="--data digits --fp-epochs 12"
  "$python" asga.py search $common --classes 0-4 --budget 3bit --steps 40 --out "$out/search"
  "$python" asga.py transfer "$out/search/policy.json" $common --classes 5-9 --epochs 5 --out "$out/transfer"
  exit
fi
install evidence/requirements.txt
if [ "${1:-}" = test ]; then
  exec "$python" -m pytest test_asga.py evidence -q --durations=5 -p no:cacheprovider "${@:2}"
fi
# glibc gives large blocks back after every step and gets them page by page at the next: a tenth of its time
export MALLOC_ARENA_MAX=1 MALLOC_MMAP_THRESHOLD_=33554432
export MALLOC_TOP_PAD_=268435456 MALLOC_TRIM_THRESHOLD_=17179869184
exec "$python" evidence/reproduce.py "$@"
