#!/usr/bin/env bash
# bash reproduce.sh quick   search on digits 0-4, transfer to digits 5-9, both tables (minutes on a laptop, no download of data)
# bash reproduce.sh test    the tests; with ASGA_DATA=DIR (cifar10/ and tinyimagenet50/ inside) the real-data ones too
# Both make .venv here and install requirements.txt where that has not been done. PYTHON=… chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
what=${1:-}
case "$what" in
  quick|test) ;;
  *) echo "usage: bash reproduce.sh quick|test" >&2; exit 2 ;;
esac

[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
if ! cmp -s requirements.txt .venv/requirements.installed; then
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
  cp requirements.txt .venv/requirements.installed
fi
python=.venv/bin/python

if [ "$what" = test ]; then
  exec "$python" -m pytest test_asga.py -q --durations=5 -p no:cacheprovider "${@:2}"
fi

out=runs/quick-$(date +%Y%m%d-%H%M%S)
"$python" asga.py search --data digits --classes 0-4 --budget 3bit --steps 40 --fp-epochs 12 --out "$out/search"
"$python" asga.py transfer "$out/search/policy.json" --data digits --classes 5-9 --fp-epochs 12 --epochs 5 --out "$out/transfer"
