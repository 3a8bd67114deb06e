"""From finished runs to results/reproduce.md: verdicts, tables, plots; evidence/reproduce.py ends with it.

    python evidence/report.py results/reproduce/runs.jsonl      prints the report of these runs

A run is a dict, a line of runs.jsonl; a transfer has a "cell": network, budget, method, seed, where its
policy came from, where it went. What is compared, and what the tables show, stands in plan.json.
"""
import itertools
import json
import math
import sys
from pathlib import Path
from statistics import mean, median, stdev

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import asga  # noqa: E402

try:
    import numpy as np
    from scipy import stats
except ImportError:
    raise SystemExit("report: error: scipy is missing: pip install -r evidence/requirements.txt") from None

PLAN = json.loads(Path(__file__).with_name("plan.json").read_text())
MARGIN = {"tuned loss": 0.01, "tuned accuracy": 0.5}          # no worse than by this is "as well", "as good"
LOGGED = ("loss", "gap", "rho", "grad_norm", "cos", "projected", "beta_distance")
SHOWN = {"work": "runs/reproduce", "out": "results", "proxy": "PROXY", "target": "TARGET"}


def read(path):
    """What a JSON file holds, None where there is none; of a .jsonl the list of its lines."""
    lines, text = path.suffix == ".jsonl", path.read_text() if path.exists() else ""
    return [json.loads(row) for row in text.splitlines()] if lines else json.loads(text or "null")


def collect(plan, work):
    """{name: record} of the runs that finished in the folder `work`."""
    cells = {name: cell._asdict() for cell, name in plan.transfers.items()}
    records = {}
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
                record |= thinned(rows)
        records[name] = record
    return records


def thinned(rows, every=10):
    """What is kept of a search's log: means of ten steps, and how often the radius was at its ends."""
    log = []
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
    A label is the method, and what its policy was searched on, unless that is all of the proxy: asga:target,
    asga:10%. random→proxy was tuned on the proxy."""
    runs = {}
    for record in records.values():
        if record.get("cell") and record["needs"][0] in records:
            cell, search = record["cell"], records[record["needs"][0]]
            run = measured(record, records) | {"bits": np.array(list(search["policy"].values()))}
            run["M BOPs"] = run["policy_bops"] / 1e6
            # a search counts once: lite0long takes lite0's
            if search["name"].startswith(f"policy/{cell['net']}-"):
                run |= {f"search {key}": value for key, value in measured(search, records).items()}
            source = cell["proxy"] if cell["share"] == "1.0" else f"{float(cell['share']):.0%}"
            label = cell["method"] if source == "proxy" else f"{cell['method']}:{source}"
            label += "" if cell["target"] == "target" else f"→{cell['target']}"
            found = runs.setdefault(f"{cell['net']} {cell['budget']}", {})
            found.setdefault(label, {})[cell["seed"]] = run
    return dict(sorted(runs.items()))


def form(value, measure, sign=""):
    style = next((style for word, style in PLAN["forms"].items() if word in measure), ".3g")
    return f"{value:{sign}{style}}"


def signed(values, ends, measure):
    return f"{form(mean(values), measure, '+')} [{', '.join(form(end, measure, '+') for end in ends)}]"


def student(values):
    """95 % interval of the mean."""
    return stats.ttest_1samp(values, 0).confidence_interval()


def bootstrap(statistic, *samples):
    """95 % percentile interval of a statistic of samples that are drawn together."""
    draws, paired = (9999, False) if len(samples) == 1 else (1999, True)
    found = stats.bootstrap(samples, statistic, n_resamples=draws, paired=paired, rng=0, method="percentile")
    return found.confidence_interval


def verdict(gains, margin=0):
    """Is the mean of paired gains above −margin? Only where both intervals agree: of three values with one
    sign the bootstrap alone would say so, which chance does in one of four cases."""
    if not any(gains):
        return "no difference in any seed"
    (low, high), (least, most) = bootstrap(np.mean, gains), student(gains)
    if len(gains) > 2 and min(low, least) > -margin:
        return "holds"
    return "does not hold" if len(gains) > 2 and max(high, most) < -margin else "undecided at this n"


def alike(one, other, measure):
    """Did both begin with the same full-precision weights, whose training does not repeat across machines?
    Supernets have to be judged by one asga.py besides, as their BatchNorm was treated in two ways."""
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


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    text = "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
    return f"{text}\n" if rows else "Not run.\n"


def verdicts(claims, runs):
    rows = []
    for claim in claims:
        sides, measures = (claim["better"].split(), claim["than"].split()), PLAN["measures"][claim["by"]]
        for one, other, where, measure in itertools.product(*sides, runs, measures):
            found = gains(runs[where].get(one, {}), runs[where].get(other, {}), measure)
            if len(found) > 1:
                by = signed(found, bootstrap(np.mean, found), measure)
                ends = signed(found, student(found), measure).partition(" ")[2]
                holds = verdict(found, MARGIN[measure] if claim.get("as_well") else 0)
                rows.append([claim["claim"], where, f"{one} / {other}", measure, len(found), by, ends, holds])
    return table(["claim", "on", "better / than", "measure", "n", "by [bootstrap]", "[t]", "verdict"], rows)


def spread(runs, measure):
    """"mean ± standard deviation", the latter where the runs differ; of times the median."""
    if measure == "bits":
        pairs = itertools.combinations([run["bits"] for run in runs.values()], 2)
        return f"{mean(np.abs(a - b).mean() for a, b in pairs):.2f}" if len(runs) > 1 else ""
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
    rows = []
    for where, ranked, key in itertools.product(runs, PLAN["ranks"], ("accuracy", "loss")):
        what, one, part, other, its = ranked
        one, other = runs[where].get(one, {}), runs[where].get(other, {})
        seeds = sorted(set(one) & set(other))
        x = [one[seed][f"{part} {key}"] for seed in seeds]
        y = [other[seed][f"{its} {key}"] for seed in seeds]
        if len(seeds) >= 10:
            low, high = bootstrap(lambda x, y: stats.spearmanr(x, y).statistic, x, y)
            found = f"{stats.spearmanr(x, y).statistic:+.2f} [{low:+.2f}, {high:+.2f}]"
            rows.append([where, what, key, len(seeds), found])
    return table(["on", "random policies ranked", "by", "n", "Spearman's correlation [95 %]"], rows)


def plots(runs, folder):
    """Write a PNG for each network and budget; the Markdown that shows them, "" without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        asga.say("no plots, as matplotlib is missing: pip install -r evidence/requirements.txt")
        return ""
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
        "## Claims\n", Path(__file__).with_name("legend.md").read_text(), verdicts(PLAN["headline"], runs),
        "## Policies\n", *(overview({on: runs[on]}, tables["policies"], tables["rivals"]) for on in runs),
        "## Searches\n", overview(runs, tables["searches"]),
        "## Flatness of supernets, on the proxy\n", overview(runs, tables["supernets"]),
        "## Flatness of tuned networks, on the target\n", overview(runs, tables["flatness"]),
        "## Ranks of random policies\n", ranks(runs),
        "## All comparisons\n", verdicts(PLAN["comparisons"], runs)])


def write(plan, places):
    """Add the finished runs to OUT/reproduce/runs.jsonl, and write OUT/reproduce.md."""
    folder, made, records = places["out"] / "reproduce", collect(plan, places["work"]), {}
    for record in read(folder / "runs.jsonl"):
        # what came of a policy that was searched anew is out of date
        if not any(need in made for need in record["needs"] if not need.startswith("fp/")):
            records[record["name"]] = record
    records |= made
    runs = arranged(records)
    if not runs:
        raise asga.AsgaError(f"{places['work']} and {folder} hold no finished transfer: nothing to report")
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records.values())
    asga.write_atomic(folder / "runs.jsonl", lambda part: part.write_text(lines))
    ran = [f"{name} {len(records.keys() & jobs)}/{len(set(jobs))}" for name, jobs in plan.sections.items()]
    lack = [cell for cell, name in plan.transfers.items() if name not in records]
    lack = sorted({f"{cell.net} {cell.budget} {cell.method}" for cell in lack})
    devices = sorted({record["device"] for record in records.values() if record.get("device")})
    page = (f"# What came out\n\nRuns, of those planned: {', '.join(ran)}. Not run for every seed: "
            f"{', '.join(lack) or 'none'}. Searched on {' and '.join(devices)}. All runs: "
            "[runs.jsonl](reproduce/runs.jsonl).\n\n") + text(runs) + "\n" + plots(runs, folder)
    asga.write_atomic(places["out"] / "reproduce.md", lambda part: part.write_text(page))


if __name__ == "__main__":
    try:
        print(text(arranged({record["name"]: record for record in map(json.loads, open(sys.argv[1]))})))
    except (IndexError, OSError, TypeError, ValueError, KeyError) as error:
        sys.exit(f"report: error: give a runs.jsonl of reproduce.sh ({type(error).__name__}: {error})")
