"""From finished runs to results/reproduce.md: verdicts, tables, plots; evidence/reproduce.py ends with it.

A run is a line of runs.jsonl; a transfer has a "cell". What is compared and shown stands in plan.json.
"""
import itertools
import json
import math
from pathlib import Path
from statistics import mean, median, stdev

import numpy as np
from common import asga, table
from matplotlib.figure import Figure
from scipy import stats

PLAN = json.loads(Path(__file__).with_name("plan.json").read_text())
MARGIN = {"tuned loss": 0.01, "tuned accuracy": 0.5}  # "as well", "as good"
LOGGED = ("loss", "gap", "rho", "grad_norm", "cos", "projected", "beta_distance")
SHOWN = {"work": "runs/reproduce", "out": "results", "proxy": "PROXY", "target": "TARGET"}

def read(path):
    """What a JSON file holds, None where there is none; of a .jsonl the list of its lines."""
    text = path.read_text() if path.exists() else ""
    return [*map(json.loads, text.splitlines())] if path.suffix == ".jsonl" else json.loads(text or "null")

def collect(plan, work):
    """{name: record} of the runs that finished in the folder `work`."""
    cells, records = {name: cell._asdict() for cell, name in plan.transfers.items()}, {}
    for name, job in plan.jobs.items():
        folder, log = work / name, work / f"{name}.log"
        if not (folder / job.result).exists():
            continue
        record = {"name": name, "command": f"python {job.command.format(**SHOWN)}", "needs": job.needs}
        record |= {"cell": cells.get(name), "asga.py": log.read_text().splitlines()[1].split()[-1]}
        record |= {kind: read(folder / f"{kind}.json") for kind in ("metrics", "flatness")}
        if job.result == "policy.json":
            policy = read(folder / "policy.json")
            record["policy"] = {layer: (bits["w"], bits["a"]) for layer, bits in policy["layers"].items()}
            record |= {key: policy[key] for key in ("cost", "budget", "versions")}
            record |= {key: policy["search"].get(key) for key in ("seconds", "spent", "device")}
            if rows := read(folder / "log.jsonl"):
                record |= thinned(rows, policy["candidates"]["w"])
        records[name] = record
    return records

def thinned(rows, candidates, every=10):
    """What is kept of a search's log: means of ten steps, and how often the radius was at its ends."""
    log = []
    for row in rows:
        inner = np.array(row["bits"])[:, 1:-1]
        row["beta_distance"] = np.abs(inner[..., None] - candidates).min(-1).mean()
    for start in range(0, len(rows), every):
        block = rows[start:start + every]
        means = {key: round(mean(float(row[key]) for row in block), 5) for key in LOGGED}
        log.append({"step": block[-1]["step"] + 1, "bits": block[-1].get("bits"), **means})
    radii, times = (np.array([row[key] for row in rows]) for key in ("rho", "time"))
    at_most, at_least = (np.isclose(radii, end).mean() for end in (radii.max(), radii.min()))
    step = float(median(np.diff(times)))
    return {"log": log, "step_seconds": step, "at_most": at_most, "at_least": at_least}

def flat(tree, prefix=""):
    """{"key key key": value} of nested dicts."""
    values = {}
    for key, value in tree.items():
        values |= flat(value, f"{prefix}{key} ") if isinstance(value, dict) else {prefix + key: value}
    return values

def measured(record, records):
    """All values of a search or transfer by name, those of its log and of evidence/flatness.py included."""
    values = flat(record["metrics"] or {}) | {key: record.get(key) for key in ("seconds", "spent", "asga.py")}
    if found := records.get(f"flatness/{record['name'].replace('/', '-')}"):
        values |= flat(found["flatness"], "flat ")
        values["flat lost to noise"] = values["flat accuracy"] - values["flat noise 0.1"]
    if log := record.get("log"):
        values |= {f"log {key}": mean(row[key] for row in log) for key in LOGGED}
        values |= {key: record[key] for key in ("log", "at_most", "at_least")} | {"steps": log[-1]["step"]}
        values["seconds"] = log[-1]["step"] * record["step_seconds"]
        values["log beta_distance"] = log[-1]["beta_distance"]
    return values

def arranged(records):
    """{network and budget: {label: {seed: {measure: value}}}} of all transfers; "search …" is of the search.
    A label: the method, what its policy was searched on if not the proxy, →proxy where it was tuned there."""
    runs = {}
    for record in records.values():
        if record.get("cell") and record["needs"][0] in records:
            cell, search = record["cell"], records[record["needs"][0]]
            own = measured(record, records)
            own["M BOPs"] = own["policy_bops"] / 1e6
            # a search counts once: lite0long takes lite0's
            if search["name"].startswith(f"policy/{cell['net']}-"):
                own |= {f"search {key}": value for key, value in measured(search, records).items()}
            source = cell["proxy"] if cell["share"] == "1.0" else f"{float(cell['share']):.0%}"
            label = cell["method"] if source == "proxy" else f"{cell['method']}:{source}"
            label += "" if cell["target"] == "target" else f"→{cell['target']}"
            found = runs.setdefault(f"{cell['net']} {cell['budget']}", {})
            found.setdefault(label, {})[cell["seed"]] = own
    return dict(sorted(runs.items()))

def form(value, measure, sign=""):
    style = next((style for word, style in PLAN["forms"].items() if word in measure), ".3g")
    return f"{value:{sign}{style}}"

def signed(values, ends, measure):
    return f"{form(mean(values), measure, '+')} [{', '.join(form(end, measure, '+') for end in ends)}]"

def student(values):
    return stats.ttest_1samp(values, 0).confidence_interval()

def bootstrap(statistic, *samples):
    """95 % percentile interval of a statistic of samples that are drawn together."""
    draws, paired = (9999, False) if len(samples) == 1 else (1999, True)
    found = stats.bootstrap(samples, statistic, n_resamples=draws, paired=paired, rng=0, method="percentile")
    return found.confidence_interval

def verdict(gains, margin=0):
    """Is the mean of paired gains above −margin? The bootstrap alone is too sure of three values."""
    if not any(gains):
        return "no difference in any seed"
    (low, high), (least, most) = bootstrap(np.mean, gains), student(gains)
    if len(gains) > 2 and min(low, least) > -margin:
        return "holds"
    return "does not hold" if len(gains) > 2 and max(high, most) < -margin else "undecided at this n"

def alike(one, other, measure):
    """Did both begin with the same full-precision weights? Are supernets judged by the same asga.py?"""
    part = "search " if measure.startswith("search") else ""
    if part and one["search asga.py"] != other["search asga.py"]:
        return False
    return math.isclose(one[f"{part}full_precision loss"], other[f"{part}full_precision loss"], rel_tol=1e-4)

def gains(one, other, measure):
    """By how much `one` is better, seed by seed."""
    sign = 1 if "accuracy" in measure else -1
    pairs = [(one[seed], other[seed]) for seed in sorted(set(one) & set(other))]
    return [sign * (a[measure] - b[measure]) for a, b in pairs
            if measure in a and measure in b and alike(a, b, measure)]

def versus(one, other, measure):
    """"mean gain [95 % by Student]"; by Welch, not paired, where `one` has more seeds of the same weights."""
    found, pairs = gains(one, other, measure), itertools.product(one.values(), other.values())
    if not any(found):
        return ""
    if 1 < len(found) < len(one) and all(alike(a, b, measure) for a, b in pairs):
        sign = 1 if "accuracy" in measure else -1
        a, b = ([sign * run[measure] for run in side.values()] for side in (one, other))
        ends = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
        return f"{signed([mean(a) - mean(b)], ends, measure)} (n = {len(a)} and {len(b)})"
    text = signed(found, student(found), measure) if len(found) > 2 else form(mean(found), measure, "+")
    return text if len(found) == len(one) else f"{text} (n = {len(found)})"

def verdicts(claims, runs, first=False):
    """A row for each comparison; `first`: of each claim only the first pair and measure."""
    rows, end = [], 1 if first else None
    for claim in claims:
        lists = claim["better"].split(), claim["than"].split(), PLAN["measures"][claim["by"]]
        ones, others, measures = (names[:end] for names in lists)
        for one, other, where, measure in itertools.product(ones, others, runs, measures):
            found = gains(runs[where].get(one, {}), runs[where].get(other, {}), measure)
            if len(found) > 1:
                by = signed(found, bootstrap(np.mean, found), measure)
                ends = signed(found, student(found), measure).partition(" ")[2]
                holds = verdict(found, MARGIN[measure] if claim.get("as_well") else 0)
                rows.append([claim["claim"], where, f"{one} / {other}", measure, len(found), by, ends, holds])
    return table(["claim", "on", "better / than", "measure", "n", "by [bootstrap]", "[t]", "verdict"], rows)

def spread(runs, measure):
    """"mean ± standard deviation", the latter where the runs differ; of times the median."""
    values = [run[measure] for run in runs.values() if run.get(measure) is not None]
    if "seconds" in measure or len(set(values)) < 2:
        return form(median(values), measure) if values else ""
    return f"{form(mean(values), measure)} ± {form(stdev(values), measure)}"

def overview(runs, measures, rivals=()):
    """A row for each policy that has the first measure: means of all, and what it gains over its rivals."""
    rows = []
    for where, found in runs.items():
        for label, own in found.items():
            own = {seed: run for seed, run in own.items() if measures[0] in run}
            values = [spread(own, measure) for measure in measures]
            values += [versus(own, found.get(rival, {}), measure) for rival, measure in rivals]
            if own:
                rows.append([where, label, len(own), *values])
    gained = [f"{measure}, gain over {rival}" for rival, measure in rivals]
    return table(["on", "policy", "n", *measures, *gained], rows)

def ranks(runs):
    """Do random policies rank on the target as on the proxy?"""
    def spearman(x, y):
        return stats.spearmanr(x, y).statistic

    rows = []
    for where, (what, sides), key in itertools.product(runs, PLAN["ranks"].items(), ("accuracy", "loss")):
        found = [(runs[where].get(label, {}), f"{part} {key}") for label, part in sides]
        seeds = sorted(set.intersection(*[set(own) for own, _ in found]))
        if len(seeds) >= 10:
            both = [[own[seed][measure] for seed in seeds] for own, measure in found]
            low, high = bootstrap(spearman, *both)
            rows.append([where, what, key, len(seeds), f"{spearman(*both):+.2f} [{low:+.2f}, {high:+.2f}]"])
    return table(["on", "random policies ranked", "by", "n", "Spearman's correlation [95 %]"], rows)

def plots(runs, folder):
    """Write a PNG for each network and budget; the Markdown that shows them."""
    shown = "## Every seed\n\n"
    for where, found in runs.items():
        figure = Figure(figsize=(8, 1 + len(found) / 4), layout="constrained")
        axes = figure.subplots()
        axes.set(title=where, xlabel="tuned accuracy, %")
        for label, own in found.items():
            if "→" not in label:
                axes.plot([run["tuned accuracy"] for run in own.values()], [label] * len(own), "o")
        figure.savefig(folder / f"{where.replace(' ', '-')}.png")
        shown += f"![{where}]({folder.name}/{where.replace(' ', '-')}.png)\n"
    return shown

def text(runs):
    """The report without what ran, and without plots."""
    tables = PLAN["tables"]
    return "\n".join([
        "## Claims\n", Path(__file__).with_name("legend.md").read_text(),
        verdicts(PLAN["headline"], runs, first=True),
        "## Policies\n", *(overview({on: runs[on]}, tables["policies"], tables["rivals"]) for on in runs),
        "## Searches\n", overview(runs, tables["searches"]),
        "## Flatness of supernets, on the proxy\n", overview(runs, tables["supernets"]),
        "## Flatness of tuned networks, on the target\n", overview(runs, tables["flatness"]),
        "## Ranks of random policies\n", ranks(runs),
        "## All comparisons\n", verdicts(PLAN["headline"] + PLAN["more"], runs)])

def write(plan, places):
    """Add the finished runs to OUT/reproduce/runs.jsonl, and write OUT/reproduce.md."""
    folder, made = places["out"] / "reproduce", collect(plan, places["work"])
    anew = {name for name in made if not name.startswith("fp/")}  # what came of an older one is out of date
    known = [record for record in read(folder / "runs.jsonl") if anew.isdisjoint(record["needs"])]
    records = {record["name"]: record for record in known} | made
    runs = arranged(records)
    if not runs:
        raise asga.AsgaError(f"{places['work']} and {folder} hold no finished transfer: nothing to report")
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records.values())
    asga.write_atomic(folder / "runs.jsonl", lines)
    ran = [f"{name} {len(records.keys() & jobs)}/{len(set(jobs))}" for name, jobs in plan.sections.items()]
    devices = sorted({record["device"] for record in records.values() if record.get("device")})
    head = f"Runs, of those planned: {', '.join(ran)}. Searched on {' and '.join(devices)}. "
    head += "All runs: [runs.jsonl](reproduce/runs.jsonl)."
    page = f"# What came out\n\n{head}\n\n{text(runs)}\n{plots(runs, folder)}"
    asga.write_atomic(places["out"] / "reproduce.md", page)
