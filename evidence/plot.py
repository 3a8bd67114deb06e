"""Pictures of runs (matplotlib).

    python evidence/plot.py RUN… [--out DIR]

RUN is a folder of search or transfer, a policy.json, or runs.jsonl:NETWORK of reproduce.py. Of each policy:
bits of weights and activations per layer, and each layer's share of the BOPs (NAME-bits.png). Of a search:
loss, perturbed loss, gap, radius, expected cost over its steps (NAME-search.png). Of several runs: accuracy
over BOPs, methods apart (pareto.png); of transfers the tuned one, of searches the policy's on the proxy."""
import argparse
import collections
import itertools
import json
import math
import statistics
from pathlib import Path

import common
from common import asga
from matplotlib.figure import Figure


def bits(policy):
    """Figure of the bits and the share of the BOPs, layer by layer."""
    names, cost = list(policy.layers), policy.cost
    w, a = zip(*policy.layers.values())
    macs = [policy.sizes[name].macs for name in names]
    share = [100 * m * i * j / cost["bops"] for m, i, j in zip(macs, w, a)]
    place = range(len(names))
    size = min(24, max(6, 0.16 * len(names) + 2)), 4 + 0.06 * max(map(len, names))
    figure = Figure(figsize=size, layout="constrained")
    upper, lower = figure.subplots(2, sharex=True, height_ratios=[2, 1])
    upper.bar(place, w, 0.8, color="lightsteelblue", label="weights")
    upper.plot(place, a, "o", color="firebrick", markersize=4, label="activations (input)")
    upper.set(ylabel="bits", yticks=range(0, max(w + a) + 1, 2), ylim=(0, max(w + a) + 1))
    mean = f"means by MACs {cost['mean_w']:.2f} and {cost['mean_a']:.2f}"
    title = f"{policy.info.get('arch', '')}: {asga.human(cost['bops'])} BOPs, {mean}"
    upper.set_title(title, fontsize=10, loc="left")
    upper.legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=2, frameon=False, fontsize=8)
    lower.bar(place, share, 0.8, color="gray")
    every = math.ceil(len(names) / 90)
    lower.set(ylabel="% of BOPs", xlim=(-1, len(names)), xticks=place[::every])
    lower.set_xticklabels(names[::every], rotation=90, fontsize=7)
    return figure

def search(records):
    """Figure of what a search's log tells."""
    figure = Figure(figsize=(6, 6), layout="constrained")
    rows, steps = figure.subplots(4, sharex=True, height_ratios=[2, 1, 1, 1]), range(len(records))
    panels = [("loss", "perturbed_loss"), ("gap",), ("rho",), ("expected_cost",)]
    for axes, keys in zip(rows, panels):
        for key in keys:
            axes.plot(steps, [record[key] for record in records], linewidth=0.8, label=key.replace("_", " "))
        axes.set_ylabel(keys[0].replace("_", " "), fontsize=8)
        axes.margins(x=0)
    rows[0].legend(frameon=False, fontsize=8)
    cost = [record["expected_cost"] for record in records]
    rows[3].set(xlabel="step", ylim=(0.98 * min(cost), 1.02 * max(cost)))
    return figure

def pareto(points):
    """Figure of {method: [(BOPs, accuracy)]}."""
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    for method, found in sorted(points.items()):
        groups = []
        for bops, accuracy in sorted(found):
            if not groups or bops > 1.03e9 * groups[-1][0][0]:  # of another budget
                groups.append([])
            groups[-1].append((bops / 1e9, accuracy))
        means = [[statistics.mean(column) for column in zip(*group)] for group in groups]
        drawn, = axes.plot(*zip(*means), "-", linewidth=1, label=method)
        axes.plot(*zip(*itertools.chain(*groups)), "o", markersize=3, alpha=0.6, color=drawn.get_color())
    axes.set(xlabel="G BOPs", ylabel="accuracy, %")
    axes.legend(frameon=False)
    return figure

def point(run):
    """(method, BOPs, accuracy) of a finished run's folder."""
    metrics, settings = asga.read_json(run / "metrics.json"), asga.read_json(run / "config.json")["settings"]
    method = settings.get("method")
    if not method:  # a transfer
        method = asga.read_checkpoint(run / "model.pt")["policy"]["search"].get("method", "?")
    return method, metrics["policy_bops"], (metrics.get("tuned") or metrics["policy"])["accuracy"]

def recorded(file, network):
    """[(method, BOPs, accuracy)] of the transfers from proxy to target in a runs.jsonl."""
    records = [json.loads(line) for line in Path(file).read_text().splitlines()]
    found = []
    for record in records:
        cell = record["cell"] or {}
        way = [cell.get(key) for key in ("net", "proxy", "target", "share")]
        if way == [network, "proxy", "target", "1.0"]:
            metrics = record["metrics"]
            found.append((cell["method"], metrics["policy_bops"], metrics["tuned"]["accuracy"]))
    return found

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", nargs="+", type=Path)
    parser.add_argument("--methods", default="", help="in pareto.png only these, like asga,uniform")
    parser.add_argument("--out", type=Path, default=Path("."))
    cfg = parser.parse_args()
    cfg.out.mkdir(parents=True, exist_ok=True)
    points, figures = collections.defaultdict(list), {}
    for run in cfg.run:
        if ".jsonl:" in str(run):
            for method, *place in recorded(*str(run).split(":")):
                points[method].append(place)
            continue
        file, name = (run / "policy.json", run.name) if run.is_dir() else (run, run.stem)
        if file.exists():
            figures[f"{name}-bits.png"] = bits(asga.Policy.load(file))
            lines = (run / "log.jsonl").read_text().splitlines() if (run / "log.jsonl").exists() else []
            if lines:
                figures[f"{name}-search.png"] = search([json.loads(line) for line in lines])
        if (run / "metrics.json").exists():
            method, *place = point(run)
            points[method].append(place)
    points = {key: own for key, own in points.items() if key in cfg.methods.split(",") or not cfg.methods}
    if sum(map(len, points.values())) > 1:
        figures["pareto.png"] = pareto(points)
    if not figures:
        raise asga.AsgaError(f"{cfg.run[0]} has no policy.json and no metrics.json: give a finished run")
    for name, figure in figures.items():
        figure.savefig(cfg.out / name, dpi=110)
        print(cfg.out / name)

if __name__ == "__main__":
    common.run(main)
