#!/usr/bin/env bash
# bash reproduce.sh         the whole evidence: every run behind results/reproduce.md (hours; --help: scales, sections, jobs; resumable)
#                           ASGA_DATA=DIR: a folder with cifar10/ (the proxy) and tinyimagenet50/ (the target) inside; or --proxy, --target
# bash reproduce.sh quick   search on digits 0-4, transfer to digits 5-9, both tables (minutes on a laptop, no download of data)
# bash reproduce.sh test    the tests; with ASGA_DATA the real-data ones too
# All make .venv here and install requirements.txt where that has not been done. PYTHON=… chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
what=${1:-evidence}
case "$what" in
  quick|test) ;;
  -h|--help) [ -f .venv/requirements.installed ] || { sed -n '2,7s/^# //p' "${BASH_SOURCE[0]##*/}"; exit; }; what=evidence ;;
  evidence|--*) what=evidence; [ "${1:-}" != evidence ] || shift ;;
  *) echo "usage: bash reproduce.sh [quick | test | evidence's flags, see --help]" >&2; exit 2 ;;
esac

.venv/bin/python -m pip --version >/dev/null 2>&1 || "${PYTHON:-python3}" -m venv .venv         # also where that was stopped halfway
if ! cmp -s requirements.txt .venv/requirements.installed; then
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
  cp requirements.txt .venv/requirements.installed
fi
python=.venv/bin/python

if [ "$what" = test ]; then
  exec "$python" -m pytest test_asga.py evidence/test_evidence.py -q --durations=5 -p no:cacheprovider "${@:2}"
fi

if [ "$what" = evidence ]; then
  if ! cmp -s evidence/requirements.txt .venv/evidence.installed; then
    if "$python" -m pip install --quiet --disable-pip-version-check -r evidence/requirements.txt; then
      cp evidence/requirements.txt .venv/evidence.installed
    else
      echo "reproduce: going on without all of evidence/requirements.txt (plots, EfficientNet-Lite0)" >&2
    fi
  fi
  exec "$python" evidence/reproduce.py "$@"
fi

out=runs/quick-$(date +%Y%m%d-%H%M%S)
"$python" asga.py search --data digits --classes 0-4 --budget 3bit --steps 40 --fp-epochs 12 --out "$out/search"
"$python" asga.py transfer "$out/search/policy.json" --data digits --classes 5-9 --fp-epochs 12 --epochs 5 --out "$out/transfer"
