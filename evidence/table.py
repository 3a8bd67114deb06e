"""The README's table of results from the metrics.json of transfers, mean ± standard deviation over seeds.

    python evidence/table.py results/resnet20-3bit          folders tiny-<method>-<seed>/metrics.json inside
"""
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

runs = defaultdict(dict)
for path in sorted(Path(sys.argv[1]).glob("tiny-*-*/metrics.json")):
    _, method, seed = path.parent.name.split("-")
    runs[method][seed] = json.loads(path.read_text())


def cell(values, form):
    spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"


print("| policy | n | G BOPs | full precision | directly after quantizing | after tuning | cross-entropy after tuning |")
print("| --- | --- | --- | --- | --- | --- | --- |")
for method, seeds in sorted(runs.items(), reverse=True):
    get = lambda part, key: [m[part][key] for m in seeds.values()]
    print(f"| {method} | {len(seeds)} | {cell([m['policy_bops'] / 1e9 for m in seeds.values()], '.4f')} | "
          f"{statistics.mean(get('full_precision', 'accuracy')):.2f} | {cell(get('quantized', 'accuracy'), '.2f')} | "
          f"{cell(get('tuned', 'accuracy'), '.2f')} | {cell(get('tuned', 'loss'), '.3f')} |")
if {"asga", "uniform"} <= set(runs):
    common = sorted(set(runs["asga"]) & set(runs["uniform"]))
    for key, unit in (("accuracy", " points"), ("loss", "")):
        pairs = [runs["asga"][s]["tuned"][key] - runs["uniform"][s]["tuned"][key] for s in common]
        print(f"\nasga − uniform after tuning, {key}, paired by seed: {cell(pairs, '+.3f')}{unit} (n = {len(common)}: "
              f"{', '.join(f'{p:+.3f}' for p in pairs)})")
