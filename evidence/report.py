"""From finished runs to results/reproduce.md: tables, paired differences, verdicts, plots. Called by evidence/reproduce.py.

    python evidence/report.py results/reproduce/runs.jsonl        prints the README's part of it
"""
import json
import math
import random
import shutil
import statistics
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import asga  # noqa: E402

REFERENCE = Path(__file__).with_name("reference.json")
MARGIN = {"accuracy": 0.5, "loss": 0.01}                 # "as good as" means not worse than by this (points, cross-entropy)
# Student's t, 97.5 %, for n = 2, 3, … values; beyond that the last one
STUDENT = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)
CURVE = ("loss", "gap", "rho", "grad_norm", "cos", "projected", "beta_distance", "expected_cost")


# ---------------------------------------------------------------------------------------------------------------- runs

def read(path):
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except ValueError as error:
        raise asga.AsgaError(f"{path} is damaged ({error}): delete its folder and run again") from None


def thin(rows, every=10):
    """Means of blocks of `every` steps, and the bits at the end of each."""
    out = []
    for i in range(0, len(rows), every):
        block = rows[i:i + every]
        mean = {k: round(sum(float(r[k]) for r in block) / len(block), 5) for k in CURVE if k in block[0]}
        out.append({"step": block[-1]["step"] + 1, "time": block[-1]["time"], **mean, "bits": block[-1].get("bits")})
    return out


def collect(work, plan, transfers, known=None):
    """{name: one finished run}: its command, metrics, policy, thinned log, and the version of asga.py that made it. known: records
    that are taken as they are."""
    cells, records = {name: cell._asdict() for cell, name in transfers.items()}, {}
    for name, job in plan.jobs.items():
        folder = work / name
        if name in (known or {}):
            records[name] = known[name]
            continue
        if not (folder / job.result).exists() or not all((work / need / plan.jobs[need].result).exists() for need in job.needs):
            continue
        made = (work / f"{name}.log").read_text().splitlines()[:2] if (work / f"{name}.log").exists() else ["", ""]
        record = {"name": name, "command": plan.shown(job), "asga.py": made[1].rpartition(" ")[2], "needs": job.needs, "cell": cells.get(name), "ready": name in plan.ready,
                  "metrics": read(folder / "metrics.json"), "flatness": read(folder / "flatness.json")}
        if record["flatness"]:
            record["flatness"]["run"] = job.needs[0]                                     # no paths of this machine
        policy = read(folder / "policy.json")
        if policy:
            search = policy["search"]
            record["policy"] = {n: (e["w"], e["a"]) for n, e in policy["layers"].items()}
            record.update({k: policy[k] for k in ("cost", "budget", "versions")}, seconds=search.get("seconds"), spent=search.get("spent"),
                          device=search.get("device"))
        if (folder / "log.jsonl").exists() and name.startswith("policy/"):
            rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
            times = [b["time"] - a["time"] for a, b in zip(rows, rows[1:])]
            radii = [r["rho"] for r in rows]
            record.update(log=thin(rows), step_seconds=round(statistics.median(times), 4) if times else None,
                          at_most=sum(r >= max(radii) * (1 - 1e-9) for r in radii) / len(radii),
                          at_least=sum(r <= min(radii) * (1 + 1e-9) for r in radii) / len(radii), radii=[min(radii), max(radii)])
        records[name] = record
    return records


# ---------------------------------------------------------------------------------------------------------- statistics

def spread(values, form=".2f"):
    return f"{statistics.mean(values):{form}}" + (f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else "")


def bootstrap(values, draws=10_000):
    """95 % percentile interval of the mean."""
    generator = random.Random(0)
    means = sorted(statistics.fmean(generator.choices(values, k=len(values))) for _ in range(draws))
    return means[int(0.025 * draws)], means[int(0.975 * draws) - 1]


def student(values):
    """95 % interval of the mean by Student's t; None for a single value."""
    if len(values) < 2:
        return None
    mean, reach = statistics.mean(values), STUDENT[min(len(values) - 2, len(STUDENT) - 1)] * statistics.stdev(values) / math.sqrt(len(values))
    return mean - reach, mean + reach


def verdict(values, margin=0.0):
    """Do paired differences, of which larger is better, show a mean above −margin? Only where the bootstrap's and Student's 95 %
    interval agree: of three values with one sign the bootstrap alone would say so, which chance does in one of four cases."""
    if values and not any(values):
        return "no difference in any seed"
    if len(values) < 3:
        return f"undecided at this n ({len(values)})"
    low, high = (pick(ends) for pick, ends in zip((min, max), zip(bootstrap(values), student(values))))
    return "holds" if low > -margin else "does not hold" if high < -margin else "undecided at this n"


def interval(ends, form):
    return f"[{ends[0]:{form}}, {ends[1]:{form}}]" if ends else "–"


def difference(values, form="+.2f", n=None):
    """"mean [Student's interval]", of three values or more; and of how many values, where these are not n."""
    if not values:
        return "–"
    return f"{statistics.mean(values):{form}}" + (f" {interval(student(values), form)}" if len(values) > 2 else "") \
        + (f" (n = {len(values)})" if n not in (None, len(values)) else "")


def unpaired(one, other, form="+.2f"):
    """The difference of two means that are not paired, with the 95 % interval after Welch."""
    parts = [max(statistics.variance(v), 1e-12) / len(v) for v in (one, other)]                             # all alike: no division by zero
    freedom = int(sum(parts) ** 2 / sum(p ** 2 / (len(v) - 1) for p, v in zip(parts, (one, other))))
    mean, reach = statistics.mean(one) - statistics.mean(other), STUDENT[min(max(freedom, 1), len(STUDENT)) - 1] * math.sqrt(sum(parts))
    return f"{mean:{form}} {interval((mean - reach, mean + reach), form)} (not paired, n = {len(one)} and {len(other)})"


def judged(claim, what, values, form, margin=0.0):
    """A row of the table of verdicts."""
    return (claim, what, len(values), f"{statistics.mean(values):{form}} {interval(bootstrap(values), form)}", interval(student(values), form),
            verdict(values, margin))


def spearman(x, y):
    rank = lambda v: [sum(b < a for b in v) + (sum(b == a for b in v) - 1) / 2 for a in v]
    return statistics.correlation(rank(x), rank(y))


class Runs:
    """Finished transfers by what they are."""

    def __init__(self, records):
        self.records = records
        self.found = {}
        for record in records.values():
            if record.get("cell"):
                c = record["cell"]
                self.found.setdefault((c["net"], c["budget"], c["method"], c["proxy"], c["target"], c["share"]), {})[c["seed"]] = record

    def seeds(self, net, budget, method, proxy="proxy", target="target", share="1.0"):
        """{seed: record of the transfer}"""
        return self.found.get((net, budget, method, proxy, target, share), {})

    def common(self, one, other):
        """Seeds of which both have a run, from the same full-precision weights (training them does not repeat across machines)."""
        start = lambda r: r["metrics"]["full_precision"]["loss"]
        return [s for s in sorted(set(one) & set(other)) if math.isclose(start(one[s]), start(other[s]), rel_tol=1e-4)]

    def alike(self, transfers):
        """Those of {seed: record} that start from the same full-precision weights as most."""
        start = {seed: round(r["metrics"]["full_precision"]["loss"], 4) for seed, r in transfers.items()}
        most = statistics.mode(start.values()) if start else None
        return {seed: r for seed, r in transfers.items() if start[seed] == most}

    def paired(self, one, other, part="tuned", key="accuracy"):
        """one − other by seed; for the loss the sign is turned, so that more is better."""
        sign = -1 if key == "loss" else 1
        return [sign * (one[s]["metrics"][part][key] - other[s]["metrics"][part][key]) for s in self.common(one, other)]

    def supernets(self, one, other):
        """Seeds of which both searches were judged by one asga.py: how a supernet is judged has changed (README, choice 13)."""
        return [s for s in self.common(one, other) if one[s]["asga.py"] == other[s]["asga.py"]]

    def policies(self, transfers):
        return [self.records[t["needs"][0]] for _, t in sorted(transfers.items())]

    def searches(self, *what):
        """{seed: record of the search} of transfers whose policy was searched step by step, for this network: lite0long has lite0's."""
        found = {seed: self.records[t["needs"][0]] for seed, t in self.seeds(*what).items()}
        return {seed: p for seed, p in found.items() if p.get("log") and p["log"][0]["bits"] and p["name"].startswith(f"policy/{what[0]}-")}


def distance(policies):
    """Mean distance of two policies, in bits a tensor, over all pairs."""
    flat = [[b for pair in p["policy"].values() for b in pair] for p in policies]
    pairs = [sum(abs(a - b) for a, b in zip(x, y)) / len(x) for i, x in enumerate(flat) for y in flat[:i]]
    return statistics.mean(pairs) if pairs else math.nan


def settled(log, share=0.1):
    """The step of the first logged row from which on the bits have less than a tenth of their way left (mean over tensors; the way
    counts from the first row)."""
    bits = [sum(row["bits"], []) for row in log]
    left = [statistics.mean(abs(a - b) for a, b in zip(row, bits[-1])) for row in bits]
    return log[max((i + 1 for i, way in enumerate(left) if way > share * left[0]), default=0)]["step"]


# -------------------------------------------------------------------------------------------------------------- tables

def markdown(header, rows):
    lines = ["| " + " | ".join(map(str, r)) + " |" for r in [header, ["---"] * len(header), *rows]]
    return "\n".join(lines) + "\n"


def methods_table(runs, net, budget):
    """All methods on one network and budget, carried from the proxy to the target."""
    methods = [key[2] for key in runs.found if key[:2] == (net, budget) and key[3:] == ("proxy", "target", "1.0")]
    uniform, joint = (runs.seeds(net, budget, m) for m in ("uniform", "joint"))
    start = {r["metrics"]["full_precision"]["loss"]: r["metrics"]["full_precision"] for m in methods for r in runs.seeds(net, budget, m).values()}

    def versus(own, other, key="accuracy", form="+.2f"):
        values = runs.paired(own, other, key=key)
        if 1 < len(values) < len(own) and len(runs.alike({**own, **{(s,): r for s, r in other.items()}})) == len(own) + len(other):
            # more seeds than the other has, all from the same weights: all of them count
            return unpaired(*([(-1 if key == "loss" else 1) * r["metrics"]["tuned"][key] for r in t.values()] for t in (own, other)), form)
        return difference(values, form, len(own))

    rows = [["full precision", "", "", "", f"{f['accuracy']:.2f}", f"{f['loss']:.4f}", *[""] * 6] for f in start.values()]
    for method in methods:
        own = runs.seeds(net, budget, method)
        get = lambda part, key: [r["metrics"][part][key] for r in own.values()]
        found = runs.policies(own)
        seconds = search_time(runs, net, budget, method) or statistics.median([p["seconds"] for p in found if p.get("seconds")] or [0])
        apart = [distance(runs.policies({s: own[s]}) + runs.policies({s: joint[s]})) for s in own if s in joint]
        rows.append([method, len(own), spread([r["metrics"]["policy_bops"] / 1e6 for r in own.values()], ".1f"),
                     spread(get("quantized", "accuracy")), spread(get("tuned", "accuracy")), spread(get("tuned", "loss"), ".4f"),
                     versus(own, uniform) if method != "uniform" else "",
                     versus(own, joint) if method != "joint" else "",
                     versus(own, joint, "loss", "+.4f") if method != "joint" else "",
                     f"{seconds:.0f}" if seconds and method != "uniform" else "",
                     f"{distance(found):.2f}" if len(found) > 1 else "",
                     f"{statistics.mean(apart):.2f}" if apart and method != "joint" else ""])
    return markdown(["policy", "n", "M BOPs", "before tuning, %", "tuned, %", "tuned, CE", "points more than uniform [95 %]", "points more than joint [95 %]",
                     "CE less than joint [95 %]", "search, s (steps × the median step of its kind)", "bits from one seed's policy to another's", "bits from joint's policy"], rows)


def full_precision_table(runs):
    rows = [[n.removeprefix("fp/"), f"{r['metrics']['full_precision']['accuracy']:.2f}", f"{r['metrics']['full_precision']['loss']:.4f}"]
            for n, r in runs.records.items() if n.startswith("fp/")]
    return markdown(["weights", "accuracy, %", "cross-entropy"], rows)


def ready_table(runs):
    """The policies of results/policies: what they cost, and how far the search came on the proxy's validation images."""
    rows = []
    for name, r in runs.records.items():
        if r.get("ready"):
            m = r["metrics"]
            rows.append((f"`{ready_name(name)}`", f"{asga.human(r['cost']['bops'])}", f"{asga.human(r['cost']['weight_bits'] / 8)}B",
                         f"{r['cost']['mean_w']:.2f} / {r['cost']['mean_a']:.2f}", f"{r['log'][-1]['step']} / {r['seconds']:.0f}",
                         *(f"{m[part]['accuracy']:.2f}" for part in ("full_precision", "supernet", "policy"))))
    return markdown(["policy", "BOPs", "weights", "mean bits w / a", "search, steps / s", "full precision, % (proxy)", "supernet, %",
                     "policy, untuned, %"], rows) if rows else ""


def ready_name(name):
    """policy/NET-proxy-BUDGET-asga-0 → NET-BUDGET.json"""
    net, _, budget = name.removeprefix("policy/").split("-")[:3]
    return f"{net}-{budget}.json"


def compare(runs, claim, what, one, other, part="tuned", margin=None, where=None):
    """Rows of the table of verdicts, on every network and budget (or on `where`). one, other: keywords of Runs.seeds."""
    rows = []
    for net, budget in [where] if where else sorted({key[:2] for key in runs.found}):
        for key, form, unit in (("loss", "+.4f", "−CE"), ("accuracy", "+.2f", "points")):
            values = runs.paired(runs.seeds(net, budget, **one), runs.seeds(net, budget, **other), part, key)
            if values:
                rows.append(judged(claim, f"{net} {budget}: {what}, {unit}", values, form, margin[key] if margin else 0.0))
            elif runs.seeds(net, budget, **one) and runs.seeds(net, budget, **other):
                rows.append((claim, f"{net} {budget}: {what}, {unit}", 0, "–", "–", "not comparable: from other weights, or of other seeds"))
    return rows


def claims(runs):
    """[(claim, what was compared, n, difference, verdict)]; positive differences speak for the claim."""
    rows, asga_ = [], {"method": "asga"}
    for method in ("asga", "joint"):
        rows += compare(runs, "1 a policy of the proxy serves as well as the target's own", f"{method}: from the proxy − from the target",
                        {"method": method}, {"method": method, "proxy": "target"}, margin=MARGIN)
    for method in ("random", "uniform"):
        rows += compare(runs, "1 does a policy without a search serve as well? (then the rows above say little)", f"{method} − asga from the target",
                        {"method": method}, {**asga_, "proxy": "target"}, margin=MARGIN)
    for name, source in (("digits", {"proxy": "digits"}), ("searched on 10 % of the proxy (weights from all of it)", {"share": "0.1"}),
                         ("searched on 1 % of the proxy (weights from all of it)", {"share": "0.01"})):
        rows += compare(runs, "1 a poorer proxy serves as well", f"asga: {name} − all of it", {**asga_, **source}, asga_, margin=MARGIN)
    for other in ("joint", "joint-double-steps", "sam", "sagm"):
        rows += compare(runs, "2 sharpness-aware search generalizes better", f"asga − {other}", asga_, {"method": other})
    for method, other in (("asga", "joint"), ("asga", "joint-double-steps"), ("asga-half-steps", "joint"), ("asga", "sagm")):
        for net, budget in sorted({key[:2] for key in runs.found}):
            own, its = (runs.searches(net, budget, m) for m in (method, other))
            values = [its[s]["metrics"]["supernet"]["loss"] - own[s]["metrics"]["supernet"]["loss"] for s in runs.supernets(own, its)]
            if values:
                rows.append(judged("2 the supernet itself generalizes better (proxy, val; added after the runs)", f"{net} {budget}: {method} − {other}, −CE",
                                   values, "+.4f"))
    for other in ("sensitivity", "flow", "random", "uniform"):
        rows += compare(runs, "2 search with gradients is better than the simple ways", f"asga − {other}", asga_, {"method": other})
        rows += compare(runs, "2 search with gradients is better than the simple ways", f"joint − {other}", {"method": "joint"}, {"method": other})
    for other in ("joint", "sensitivity", "uniform"):
        rows += compare(runs, "2 directly after quantizing", f"asga − {other}", asga_, {"method": other}, "quantized")
    for variant in sorted({key[2] for key in runs.found if key[2].startswith("asga-no")}):
        rows += compare(runs, "2 the parts of ASGA help", f"asga − {variant}", asga_, {"method": variant})
    rows += compare(runs, "5 (in its place) ASGA with half the steps, as many passes as joint, is as good", "asga-half-steps − joint", {"method": "asga-half-steps"},
                    {"method": "joint"}, margin=MARGIN)
    rows += compare(runs, "also: ASGA improves another search (EdMIPS-like, cost as a loss weight)", "with ASGA − without",
                    {"method": "loss-weight-asga"}, {"method": "loss-weight-joint"})
    return rows


# One comparison for each claim, fixed before the runs (the last two lines were added to the table after them): cross-entropy, as it is less noisy than
# accuracy on few images.
PRIMARY = (("1 a policy of the proxy serves as well as the target's own", "asga: from the proxy − from the target, −CE"),
           ("2 sharpness-aware search generalizes better", "asga − joint, −CE"),
           ("3 flatter minima", "tuned, target: eigenvalue, joint − asga"),
           ("4 adaptive ρ converges faster", "supernet's CE (proxy, val) after the search, fixed 0.05 (sagm) − adaptive"),
           ("5 (in its place) ASGA with half the steps, as many passes as joint, is as good", "asga-half-steps − joint, −CE"),
           ("also: ASGA improves another search (EdMIPS-like, cost as a loss weight)", "with ASGA − without, −CE"),
           ("1 a poorer proxy serves as well", "asga: digits − all of it, −CE"))


VERDICTS = ["claim", "compared", "n", "difference [95 %, bootstrap]", "[95 %, Student]", "verdict"]


def primary(rows):
    return [row for claim, what in PRIMARY for row in rows if row[0] == claim and row[1].endswith(what)]


def flatness_rows(runs):
    """Claim 3: ratios or differences of asga to the others, by seed."""
    found = {}
    for record in runs.records.values():
        if record.get("flatness"):
            found[record["needs"][0]] = record["flatness"]
    table, rows = [], []
    for kind, where in (("policy", "supernet, proxy"), ("transfer", "tuned, target")):
        get = lambda m: {s: found[n] for s, t in runs.seeds("resnet20", "2.4bit", m).items()
                         for n in [t["needs"][0] if kind == "policy" else t["name"]] if n in found}
        measures = {"eigenvalue": lambda f: f["eigenvalue"], "gap at ρ 0.05": lambda f: f["gap"]["0.05"],
                    "points lost to noise σ 0.1": lambda f: f["accuracy"] - f["noise"]["0.1"]}
        kinds = lambda own, what: " / ".join(f"{statistics.mean(f[what][k] for f in own.values()):.2g}" for k in ("weights", "other", "steps", "beta")
                                             if all(k in f[what] for f in own.values()))
        for method in ("joint", "sam", "sagm", "asga"):
            own = get(method)
            if own:
                table.append([where, method, len(own), *(spread([m(f) for f in own.values()], ".3g") for m in measures.values()), kinds(own, "moves"), kinds(own, "cos")])
        for other in ("joint", "sam", "sagm"):
            for name, measure in measures.items():
                a, b = get("asga"), get(other)
                values = [measure(b[s]) - measure(a[s]) for s in runs.common(runs.seeds("resnet20", "2.4bit", "asga"), runs.seeds("resnet20", "2.4bit", other))
                          if s in a and s in b]
                if values:
                    rows.append(judged("3 flatter minima", f"resnet20 2.4bit: {where}: {name}, {other} − asga", values, "+.3g"))
    return markdown(["of", "method", "n", "largest eigenvalue", "gap at ρ = 0.05", "points lost to noise σ = 0.1",
                     "ρ = 0.05 moves weights / BatchNorm and biases / steps / β (bits) by", "cos(g, g_p) of the same"], table), rows


def radius_rows(runs):
    """Claim 4: adaptive and fixed ρ, from the logs of the searches. sagm is ASGA at a fixed 0.05 without the explicit projection."""
    table, rows = [], []
    for net, budget in with_radii(runs):
        own = runs.searches(net, budget, "asga")
        for method, fixed in radii(runs):
            found = runs.searches(net, budget, method)
            if not found:
                continue
            last = [statistics.mean(r["loss"] for r in p["log"][-3:]) for p in found.values()]
            table.append([f"{net} {budget}", method, len(found), spread(last, ".4f"), spread([p["metrics"]["supernet"]["loss"] for p in found.values()], ".4f"),
                          spread([p["metrics"]["policy"]["accuracy"] for p in found.values()]), spread([settled(p["log"]) for p in found.values()], ".0f"),
                          f"{min(p['radii'][0] for p in found.values()):.3f} to {max(p['radii'][1] for p in found.values()):.3f}",
                          f"{100 * statistics.mean(p['at_most'] for p in found.values()):.0f} % / {100 * statistics.mean(p['at_least'] for p in found.values()):.0f} %"])
            if not fixed:
                continue
            common = runs.supernets(own, found)
            for what, measure, form in (("supernet's CE (proxy, val) after the search", lambda p: p["metrics"]["supernet"]["loss"], "+.4f"),
                                        ("training loss, mean of all steps (added after the runs)", lambda p: statistics.mean(r["loss"] for r in p["log"]), "+.4f"),
                                        ("steps until the bits have a tenth of their way left", lambda p: settled(p["log"]), "+.0f")):
                values = [measure(found[s]) - measure(own[s]) for s in common]
                if values:
                    rows.append(judged("4 adaptive ρ converges faster", f"{net} {budget}: {what}, {fixed} − adaptive", values, form))
    return markdown(["", "search", "n", "loss, last 30 steps", "supernet, val CE", "policy, untuned, %", "a tenth of the way left at step", "ρ",
                     "at the largest / least"], table), rows


def with_radii(runs):
    """[(net, budget)] that were searched at several fixed radii."""
    return sorted({key[:2] for key in runs.found if key[2].startswith("asga-rho")})


def radii(runs):
    """[(method, its fixed radius in words; "" where it is not fixed)]"""
    others = sorted({key[2] for key in runs.found if key[2].startswith("asga-rho")})
    return [("joint", ""), ("asga", ""), ("sagm", "fixed 0.05 (sagm)"), *((m, f"fixed {m.removeprefix('asga-rho-')}") for m in others)]


def step_time(runs, net, budget, method):
    """Median seconds of a step over all searches with as many passes and the same relaxation as this one: other work slowed some of
    them, and so no more can be told apart here (README's Speed is measured in isolation)."""
    kind = lambda m: ("joint" in m, "loss-weight" in m or "softmax" in m)
    alike = [m for m in {key[2] for key in runs.found} if kind(m) == kind(method)]
    return statistics.median(p["step_seconds"] for m in alike for p in runs.searches(net, budget, m).values())


def search_time(runs, net, budget, method):
    """Seconds of a search: its steps by step_time; None where there were no steps."""
    found = list(runs.searches(net, budget, method).values())
    return found[0]["log"][-1]["step"] * step_time(runs, net, budget, method) if found else None


def speed_rows(runs):
    """Claim 5: what a search costs, and whether its policy is as good as joint's (within the margin of cross-entropy)."""
    rows = []
    for net, budget in sorted({key[:2] for key in runs.found}):
        joint, joints = runs.seeds(net, budget, "joint"), runs.searches(net, budget, "joint")
        for method in ("joint", "joint-double-steps", "sam", "sagm", "asga-half-steps", "asga"):
            own, found = runs.seeds(net, budget, method), list(runs.searches(net, budget, method).values())
            if not found or not joints:
                continue
            flags = found[0]["command"].split()
            steps = found[0]["log"][-1]["step"]
            images = steps * (int(flags[flags.index("--batch-size") + 1]) if "--batch-size" in flags else asga.SearchConfig.batch_size)
            seconds = search_time(runs, net, budget, method)
            values = runs.paired(own, joint, key="loss")
            rows.append([f"{net} {budget}", method, len(found), steps, f"{images:,}", f"{1e3 * seconds / steps:.0f}", f"{seconds:.0f}",
                         f"{seconds / search_time(runs, net, budget, 'joint'):.2f}", difference(values, "+.4f") if method != "joint" else "",
                         verdict(values, MARGIN["loss"]) if method != "joint" else ""])
    return markdown(["", "search", "n", "steps", "images", "ms a step (median of all of its kind)", "s", "of joint's time", "CE less than joint [95 %]", "as good as joint"], rows)


def inside_rows(runs):
    """What the searches with ASGA really did, and the gap between supernet and policy."""
    rows = []
    flat = {record["needs"][0]: record["flatness"] for record in runs.records.values() if record.get("flatness")}
    for net, budget in sorted({key[:2] for key in runs.found}):
        for method in ("joint", "sam", "sagm", "asga"):
            found = list(runs.searches(net, budget, method).values())
            if not found:
                continue
            both = [flat[p["name"]]["policy"] for p in found if "policy" in flat.get(p["name"], {})]
            log = [r for p in found for r in p["log"]]
            mean = lambda key: statistics.mean(r[key] for r in log)
            rows.append([f"{net} {budget}", method, len(found), spread([p["metrics"]["supernet"]["accuracy"] for p in found]),
                         spread([p["metrics"]["policy"]["accuracy"] for p in found]), " → ".join(spread([b[k] for b in both]) for k in ("old", "new")) if both else "", spread([p["log"][-1]["beta_distance"] for p in found]),
                         f"{mean('rho'):.3f}", f"{mean('grad_norm'):.2f}", f"{mean('gap'):.3f}", f"{mean('cos'):.2f}", f"{100 * mean('projected'):.1f} %", "/".join(sorted({p["asga.py"][:4] for p in found}))])
    return markdown(["", "method", "n", "supernet, % (proxy)", "policy untuned, %", "the supernet's BatchNorm statistics → new ones (2,500 images)", "β to nearest candidate", "ρ", "‖g‖", "gap h", "cos(g, g_p)",
                     "projected", "asga.py"], rows)


def rank_rows(runs):
    """Claim 2: do random policies rank on the target as they do on the proxy? On the network that has most of them on both."""
    both = [[runs.alike(runs.seeds(net, budget, "random", target=t)) for t in ("target", "proxy")] for net, budget in sorted({key[:2] for key in runs.found})]
    target, proxy = max(both, key=lambda pair: len(set(pair[0]) & set(pair[1])), default=({}, {}))
    common = sorted(set(target) & set(proxy))
    if len(common) < 5:
        return ""
    net, budget = (target[common[0]]["cell"][key] for key in ("net", "budget"))
    rows, untuned, tuned = [], "quantized", "tuned"
    for what, (one, its), (other, theirs) in (("before tuning, on both", (proxy, untuned), (target, untuned)), ("after tuning, on both", (proxy, tuned), (target, tuned)),
                                              ("proxy before tuning, target after it", (proxy, untuned), (target, tuned)),
                                              ("target before and after tuning", (target, untuned), (target, tuned))):
        for key in ("accuracy", "loss"):
            x, y = ([runs_[s]["metrics"][part][key] for s in common] for runs_, part in ((one, its), (other, theirs)))
            generator, draws = random.Random(0), []
            while len(draws) < 2000:
                pick = generator.choices(range(len(common)), k=len(common))
                if len(set(pick)) > 2:
                    draws.append(spearman([x[i] for i in pick], [y[i] for i in pick]))
            draws.sort()
            rows.append([what, {"accuracy": "accuracy", "loss": "cross-entropy"}[key], len(common), f"{spearman(x, y):+.2f} [{draws[49]:+.2f}, {draws[1949]:+.2f}]"])
    same = [r["metrics"]["tuned"]["loss"] for r in runs.seeds("resnet20", "2.4bit", "flow").values()]
    limit = "" if len(same) < 2 else (
        f"\nTuning has a spread of its own: one and the same policy (flow's) has a standard deviation of {statistics.stdev(same):.4f} of CE over {len(same)} seeds, the "
        f"random policies {statistics.stdev(r['metrics']['tuned']['loss'] for r in target.values()):.4f} on the target: the nearer these are, the less could even a "
        f"perfect proxy reach after tuning.\n")
    return markdown([f"{net} {budget}", "of", "n", "Spearman's correlation [95 %]"], rows) + limit


# --------------------------------------------------------------------------------------------------------------- plots

def plots(runs, folder):
    """PNG files; the Markdown that shows them, "" without matplotlib."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("report: no plots, as matplotlib is missing: pip install matplotlib")
        return ""
    shown = []

    def save(figure, name, caption):
        figure.tight_layout()
        figure.savefig(folder / f"{name}.png", dpi=110)
        pyplot.close(figure)
        shown.append(f"![{caption}]({folder.name}/{name}.png)\n\n*{caption}*\n")

    for net, budget in sorted({key[:2] for key in runs.found}):
        methods = [key[2] for key in runs.found if key[:2] == (net, budget) and key[3:] == ("proxy", "target", "1.0")]
        if len(methods) < 2:
            continue
        figure, axes = pyplot.subplots(1, 2, figsize=(9, 0.35 * len(methods) + 1.5), sharey=True)
        for axis, key, label in ((axes[0], "accuracy", "accuracy after tuning, %"), (axes[1], "loss", "cross-entropy after tuning")):
            for i, method in enumerate(methods):
                values = [r["metrics"]["tuned"][key] for r in runs.seeds(net, budget, method).values()]
                axis.plot(values, [i] * len(values), "o", color="tab:gray", alpha=0.6)
                axis.plot(statistics.mean(values), i, "|", color="tab:red", markersize=16, markeredgewidth=2)
            axis.set_xlabel(label)
        axes[0].set_yticks(range(len(methods)), methods)
        save(figure, f"tuned-{net}-{budget}", f"{net}, {budget}: every seed, and the mean (red)")
    for net, budget in with_radii(runs):
        curves = {m: runs.searches(net, budget, m) for m, _ in radii(runs)}
        curves = {m: found for m, found in curves.items() if found}
        same = set.intersection(*map(set, curves.values()))
        if not same:
            continue
        figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.6))
        for method, by_seed in curves.items():
            found = [by_seed[seed] for seed in sorted(same)]
            mean = lambda value: [statistics.mean(values) for values in zip(*([value(p, r) for r in p["log"]] for p in found))]
            steps = [r["step"] for r in found[0]["log"]]
            axes[0].plot(steps, mean(lambda p, r: r["loss"]), label=method)
            second = step_time(runs, net, budget, method)
            axes[1].plot([second * step for step in steps], mean(lambda p, r: r["loss"]))
            axes[2].plot(steps, mean(lambda p, r: statistics.mean(
                abs(a - b) for a, b in zip(sum(r["bits"], []), sum(p["log"][-1]["bits"], [])))))
        for axis, x, y in zip(axes, ("step", "seconds", "step"), ("loss", "loss", "mean distance to the last bits")):
            axis.set_xlabel(x)
            axis.set_ylabel(y)
        axes[0].legend(fontsize=7)
        save(figure, f"convergence-{net}-{budget}", f"{net}, {budget}: loss over steps and seconds (steps × the median time of one with "
             "as many passes), and how far the bits still have to go; means over the seeds that all have. The expected cost is no curve: every step ends on the budget")
        figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.2))
        for found in runs.searches(net, budget, "asga").values():
            for axis, key in zip(axes, ("rho", "gap", "grad_norm")):
                axis.plot([r["step"] for r in found["log"]], [r[key] for r in found["log"]], alpha=0.7)
                axis.set(xlabel="step", ylabel={"rho": "ρ", "gap": "gap h", "grad_norm": "‖g‖"}[key])
        save(figure, f"radius-{net}-{budget}", f"{net}, {budget}, asga: what the adaptive radius did, one line a seed, means of ten steps")
    return "\n".join(shown)


# -------------------------------------------------------------------------------------------------------------- report

def figures(runs):
    """{cell, or full-precision weights: [mean accuracy, its deviation, mean cross-entropy, its deviation, n]} of what the reference holds."""
    full = {name: r["metrics"]["full_precision"] for name, r in runs.records.items() if name.startswith("fp/")}
    out = {name: [round(f["accuracy"], 4), 0.0, round(f["loss"], 4), 0.0, 1] for name, f in full.items()}
    for key, seeds in runs.found.items():
        out[" ".join(key)] = [round(f(values), 4) if len(values) > 1 or f is statistics.mean else 0.0 for what in ("accuracy", "loss")
                              for values in [[r["metrics"]["tuned"][what] for r in seeds.values()]] for f in (statistics.mean, statistics.stdev)]
        out[" ".join(key)].append(len(seeds))
    return out


def outside(now, reference):
    """Lines on what lies further from the reference than three standard errors of the difference and half a point (0.01 of CE)."""
    lines = []
    for key in sorted(set(now) & set(reference)):
        for i, unit, margin, least in ((0, "% accuracy", 0.5, 0.3), (2, "cross-entropy", 0.01, 0.01)):
            tolerance = margin + 3 * max(reference[key][i + 1], least) * math.sqrt(1 / now[key][4] + 1 / reference[key][4])
            if abs(now[key][i] - reference[key][i]) > tolerance:
                lines.append(f"{key}: {now[key][i]:.4g} {unit}, reference {reference[key][i]:.4g} ± {tolerance:.2g}")
    return lines


def recipe(runs):
    """Whether the tuning is long enough: uniform 4-bit against full precision."""
    lines = []
    for net in sorted({key[0] for key in runs.found}):
        own = runs.seeds(net, "4bit", "uniform")
        if own:
            lost = statistics.mean(r["metrics"]["full_precision"]["accuracy"] - r["metrics"]["tuned"]["accuracy"] for r in own.values())
            lines.append(f"{net}: uniform 4-bit ends {lost:+.2f} points below full precision (n = {len(own)}; the recipe aims at 1 or less).")
    return "\n".join(lines) + "\n"


def spent(runs):
    """What the loss-weight searches spent at their end, before the knapsack put them on the budget."""
    shares = {m: [p["spent"] for p in runs.policies(runs.seeds("resnet20", "2.4bit", m))] for m in ("loss-weight-joint", "loss-weight-asga")}
    return "; ".join(f"{m} ended at {spread(v)} of the budget" for m, v in shares.items() if v) + ".\n" if any(shares.values()) else ""


def headline(runs, rows):
    """The claims, and the tables of networks and budgets that all methods ran on."""
    out = [markdown(VERDICTS, primary(rows))]
    for net, budget in sorted({key[:2] for key in runs.found if key[2] == "asga" and key[3:] == ("proxy", "target", "1.0")}):
        out += [f"**{net}, {budget}**\n", methods_table(runs, net, budget)]
    if table := ready_table(runs):
        out += ["**Ready policies**, searched on the proxy by ASGA\n", table]
    return "\n".join(out)


def text(runs, images=""):
    """The report, without its header."""
    flat, flat_claims = flatness_rows(runs)
    radius, radius_claims = radius_rows(runs)
    rows = claims(runs) + flat_claims + radius_claims
    out = ["## The claims, one kind of comparison each\n\nChosen before the runs, but for the last two kinds, which were measured as well and put here afterwards. A positive "
           "difference speaks for the claim; −CE is the cross-entropy with its sign turned. Intervals in the tables of policies are Student's.\n", headline(runs, rows),
           "## Time of a search\n", speed_rows(runs), "Claim 5 in the paper is about other methods (searches 113 to 150 % faster than earlier generalizable ones, on ImageNet networks and GPUs), which "
           "are not built here; what can be tested is whether half the steps, with two passes each, lead to as good a policy.\n",
           "## Full precision\n", full_precision_table(runs), recipe(runs)]
    ranks = rank_rows(runs)
    out += ["## All comparisons\n\nDifferences paired by seed, with the 95 % bootstrap interval of their mean: points of accuracy, and cross-entropy "
            "with its sign turned (−CE). A verdict other than undecided needs Student's interval to agree, as the bootstrap is too sure of few seeds (with three, it "
            "shows their range); of so many rows one in twenty is chance. \"As well\" means not worse by more than 0.5 points or 0.01 CE. All seeds share the "
            "full-precision weights and the validation images, so what those contribute is not in the intervals. sam and sagm have asga's ρ_max.\n",
            markdown(VERDICTS, rows), spent(runs), "## Inside the searches\n\nUp to asga.py bb0d07986629, a supernet is judged by the running statistics of BatchNorm that its "
            "search left, a policy by new ones: so a policy can come out above its supernet. Since then both have new ones. Supernets are compared within one version "
            "alone.\n", inside_rows(runs),
            "## Flatness\n\nRounding absorbs small noise, the more the fewer the bits; budgets are equal here.\n", flat, "## Radius\n\nThe steps until a tenth of the way is left follow from the cosine schedule of the learning rate; "
            "the more often adaptive ρ stands at its upper bound, the less do these runs test claim 4.\n", radius,
            "## Ranks of random policies\n", ranks or "Not tested at this scale.\n"]
    return "\n".join([*out, images])


def missing(transfers, records):
    """A paragraph on the planned transfers that did not run."""
    ran, rows = Counter(), {}
    for cell, name in transfers.items():
        ran[cell._replace(seed=0), name in records] += 1
    for cell, done in ran:
        own, lack = (ran[cell, there] for there in (True, False))
        if lack and not done:
            part = "" if cell.share == "1.0" else f"{float(cell.share):.0%} of the "
            where = f"{cell.net} {cell.budget}" + ("" if cell[4:] == ("proxy", "target", "1.0") else f" ({part}{cell.proxy} → {cell.target})")
            rows.setdefault(where, []).append(f"{cell.method} {own}/{own + lack}")
    return "\nPlanned at this scale and not run (seeds run / planned): " + "; ".join(f"{where}: {', '.join(what)}" for where, what in rows.items()) + ".\n" if rows else ""


def write(records, work, plan, transfers, args):
    """results/reproduce.md and what belongs to it; True where all figures are within the reference's tolerance."""
    out = Path(args.out)
    if not records:
        raise asga.AsgaError(f"{work} holds no finished run: nothing to report")
    complete = len(records) == len(plan.jobs)
    there = out / "reproduce" / "runs.jsonl"
    if not complete and there.exists() and len(records) < (held := len(there.read_text().splitlines())):
        print(f"{out} has a report of {held} runs, this one is of {len(records)}: it goes to {work / 'report'}")
        out = work / "report"
    folder = out / "reproduce"
    folder.mkdir(parents=True, exist_ok=True)
    asga.write_atomic(folder / "runs.jsonl", lambda part: part.write_text("".join(json.dumps(r) + "\n" for r in records.values())))
    for name in records:                                                                # small weights: see reproduce.take_weights
        model = work / name / "model.pt"
        if name.startswith("fp/") and model.exists() and model.stat().st_size < 2 ** 21:
            (folder / name).mkdir(parents=True, exist_ok=True)
            for file in (model, work / name / "metrics.json"):
                shutil.copy(file, folder / name)
    for name in plan.ready:
        if name in records and (work / name / "policy.json").exists():
            (out / "policies").mkdir(exist_ok=True)
            policy = json.loads((work / name / "policy.json").read_text())
            policy["proxy"]["data"] = Path(policy["proxy"]["data"]).name                                   # no paths of this machine
            policy["search"]["settings"].update(data=policy["proxy"]["data"], weights="", out="")
            asga.write_json(out / "policies" / ready_name(name), policy)
    runs = Runs(records)
    now, reference = figures(runs), read(REFERENCE) or {}
    if args.accept:                                                       # where all planned seeds ran: fewer would be held to later
        seeds = Counter(" ".join(cell[:3] + cell[4:]) for cell in transfers)
        reference.update({key: value for key, value in now.items() if key.startswith("fp/") or value[4] == seeds[key]})
        asga.write_json(REFERENCE, reference)
    lines, common = outside(now, reference), set(now) & set(reference)
    devices = sorted({r["device"] for r in records.values() if r.get("device")})
    made = sorted({json.dumps(r["versions"]) for r in records.values() if r.get("versions")})
    sources = sorted({r["asga.py"] for r in records.values()} - {""})
    head = (f"# What came out\n\n`bash reproduce.sh --scale {args.scale}`: {len(records)} of {len(plan.jobs)} runs "
            f"({', '.join(f'{section} {len(names & set(records))}/{len(names)}' for section, names in plan.sections.items())}). Searched on {'; '.join(devices)}; "
            f"{'; '.join(', '.join(f'{k} {v}' for k, v in json.loads(m).items()) for m in made)}; "
            f"asga.py {', '.join(sources)} (first figures of its SHA-256).\nProxy: {Path(args.proxy).name}; target: {Path(args.target).name}. Every run, its "
            f"command, metrics, policy and thinned log: [`reproduce/runs.jsonl`](reproduce/runs.jsonl).\n\n"
            + (f"Against the committed reference ({len(common)} figures, of which {sum(now[key] == reference[key] for key in common)} are the same in all "
               f"digits, as where these runs made it): " + ("**outside the tolerance:** " + "; ".join(lines) if lines else "all within the tolerance.") if common
               else "There is no reference for these figures yet.") + "\n" + missing(transfers, records))
    asga.write_atomic(out / "reproduce.md", lambda part: part.write_text(head + "\n" + text(runs, plots(runs, folder))))
    print(f"{out / 'reproduce.md'}: {len(records)} of {len(plan.jobs)} runs" + "".join(f"\noutside the tolerance: {line}" for line in lines))
    return not lines


if __name__ == "__main__":
    try:
        runs = Runs({r["name"]: r for r in map(json.loads, Path(sys.argv[1]).read_text().splitlines())})
        if not runs.found:
            raise ValueError("it holds no finished transfer")
        print(headline(runs, claims(runs) + flatness_rows(runs)[1] + radius_rows(runs)[1]))
    except (OSError, IndexError, ValueError, KeyError, TypeError) as error:
        print(f"report: error: give a runs.jsonl that reproduce.sh wrote ({type(error).__name__}: {error})", file=sys.stderr)
        sys.exit(2)
