"""The evidence: every run that the five claims need, as command lines of asga.py and of evidence/, and what came out.

    bash reproduce.sh                          all of the scale that fits this machine: small on CPU, full where CUDA is
    bash reproduce.sh --scale small --jobs 2   the same by hand; --list shows the commands, --report only writes the report
    bash reproduce.sh --scale full --only headline,rank        runs these sections only; the report is of all that is there
    bash reproduce.sh --scale full --known results/reproduce/runs.jsonl        goes on from another machine's runs

small: resnet20, about 3 hours on 2 cores. full: more networks, budgets and ablations, meant for one GPU. Every run has a folder
under --work and is skipped where its result is there; one that was stopped goes on. At the end come results/reproduce.md, plots, and
every run in compact form (results/reproduce/runs.jsonl). Exit code 1 where a run failed, or where a figure leaves the tolerance around
evidence/reference.json (--accept makes the present figures the reference, where all planned seeds ran).
"""
import argparse
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "evidence")]
import asga  # noqa: E402


class Network(NamedTuple):
    """A network of the evidence: the same flags for every method. resolution: of the images; cost: where budgets are counted;
    train: of the full-precision weights, on each data set. of: the network whose weights and policies it takes, where only the
    tuning differs."""
    arch: str
    resolution: int
    cost: int
    train: dict
    search: tuple
    tune: tuple
    of: str = ""


class Cell(NamedTuple):
    """One policy carried over to one target. share: of the proxy's images."""
    net: str
    budget: str
    method: str
    seed: int
    proxy: str = "proxy"
    target: str = "target"
    share: str = "1.0"


class Job(NamedTuple):
    """One run: a folder under --work, a command, the file that says that it is finished, what it needs, minutes on one core."""
    name: str
    command: tuple
    result: str
    needs: tuple = ()
    minutes: float = 1.0


# glibc hands large blocks back after every step and gets them page by page at the next: a tenth to a fifth of the time of one on a CPU
KEEP_MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(2 ** 25), "MALLOC_TRIM_THRESHOLD_": str(2 ** 34), "MALLOC_TOP_PAD_": str(2 ** 28)}
LITE = "evidence/networks.py:efficientnet_lite0"
LITE0 = Network(LITE, 64, 64, {"proxy": ("--epochs", 2, "--batch-size", 64, "--lr", 0.02), "target": ("--epochs", 4, "--batch-size", 64, "--lr", 0.02)},
                ("--steps", 200, "--batch-size", 64), ("--epochs", 3, "--batch-size", 64))
RESNET20 = Network("resnet20", 32, 32, {"proxy": ("--epochs", 12), "target": ("--epochs", 15), "digits": ("--epochs", 20)},
                   ("--steps", 200), ("--epochs", 1))
NETWORKS = {
    "resnet20": RESNET20,
    # the same network from other full-precision weights, which lie beside the results: a second sample of what all seeds share
    "resnet20b": RESNET20._replace(train={data: (*flags, "--seed", 1) for data, flags in RESNET20.train.items()}),
    "lite0": LITE0,
    # three epochs leave uniform 4 bit 2.5 points below full precision on the target: is it the same after transfer's default of five?
    "lite0long": LITE0._replace(tune=("--epochs", 5, "--batch-size", 64), of="lite0"),
    **{arch: Network(arch, 64, 224, {"proxy": ("--epochs", 4), "target": ("--epochs", 8)}, ("--steps", 400, "--batch-size", 64), ("--epochs", 2))
       for arch in ("resnet18", "mobilenet_v2", "resnet50")},
}
# how one minute of resnet20 stretches on the others, roughly, on a CPU
WEIGHT = {"resnet20": 1, "resnet20b": 1, "lite0": 1.5, "lite0long": 1.5, "resnet18": 2, "mobilenet_v2": 2, "resnet50": 5}

# flags of `asga.py search`; a method that is not here is one of evidence/policies.py
SEARCHES = {
    "uniform": ("--method", "uniform", "--random-weights"),
    "asga": (), "joint": ("--method", "joint"), "sam": ("--method", "sam"), "sagm": ("--method", "sagm"),
    "asga-no-implicit": ("--alpha", 0), "asga-no-projection": ("--no-project",), "asga-no-floor": ("--rho-min", 0),
    "asga-half-steps": (), "joint-double-steps": ("--method", "joint"),
    **{f"asga-rho-{r}": ("--no-adaptive", "--rho-min", r, "--rho-max", r) for r in (0.005, 0.01, 0.1)},
    "joint-softmax": ("--method", "joint", "--relaxation", "softmax"),
}
STEPS = {"asga-half-steps": 0.5, "joint-double-steps": 2}          # of the others' steps
HEADLINE = ("uniform", "random", "sensitivity", "joint", "asga")


class Plan:
    """All jobs, made on demand: to ask for a transfer makes its search, and the weights of both."""

    def __init__(self, data):
        self.data, self.jobs, self.ready, self.sections = data, {}, [], {}

    def add(self, name, command, result, needs=(), minutes=1.0):
        self.jobs.setdefault(name, Job(name, tuple(map(str, command)), result, tuple(needs), minutes))
        return name

    def common(self, net, data):
        return ["--arch", NETWORKS[net].arch, "--resolution", NETWORKS[net].resolution, "--data", self.data[data]]

    def weights(self, net, data):
        net = NETWORKS[net].of or net
        return self.add(f"fp/{net}-{data}", ["asga.py", "train", *self.common(net, data), *NETWORKS[net].train[data]], "metrics.json",
                        minutes=(3 if data == "digits" else 30) * WEIGHT[net])

    def policy(self, cell):
        """A search, or another way to a policy; its name."""
        network = NETWORKS[cell.net]
        net = network.of or cell.net
        name = f"policy/{net}-{cell.proxy}-{cell.budget}-{cell.method}{'' if cell.share == '1.0' else '-' + cell.share}-{cell.seed}"
        flags = [*self.common(net, cell.proxy), "--budget", cell.budget, "--cost-resolution", network.cost, "--seed", cell.seed]
        if cell.method == "uniform":
            return self.add(name, ["asga.py", "search", *flags, *SEARCHES["uniform"]], "policy.json", minutes=0.7 * WEIGHT[net])
        start = self.weights(net, cell.proxy)
        flags += ["--weights", f"{{work}}/{start}/model.pt"]
        search = list(network.search)
        search[1] = int(search[1] * STEPS.get(cell.method, 1))
        minutes = (2.2 if "joint" in cell.method else 4.2) * STEPS.get(cell.method, 1) * WEIGHT[net]
        if cell.method not in SEARCHES:
            more = search if cell.method.startswith("loss-weight") else []
            return self.add(name, ["evidence/policies.py", cell.method, *flags, *more], "policy.json", [start], minutes if more else 2 * WEIGHT[net])
        flags += ["--images", cell.share] if cell.share != "1.0" else []
        return self.add(name, ["asga.py", "search", *flags, *search, *SEARCHES[cell.method]], "policy.json", [start], minutes)

    def transfer(self, cell):
        policy, start, network = self.policy(cell), self.weights(cell.net, cell.target), NETWORKS[cell.net]
        name = f"transfer/{cell.net}{policy.removeprefix(f'policy/{network.of or cell.net}')}-to-{cell.target}"
        return self.add(name, ["asga.py", "transfer", f"{{work}}/{policy}/policy.json", *self.common(cell.net, cell.target), "--weights",
                               f"{{work}}/{start}/model.pt", "--seed", cell.seed, "--cost-resolution", network.cost, *network.tune],
                        "metrics.json", [policy, start], 2 * network.tune[1] * WEIGHT[cell.net])

    def shown(self, job):
        """The command as runs.jsonl has it: without the folders of this machine."""
        names = {path: source.upper() for source, path in self.data.items() if source != "digits"}
        return line(job._replace(command=tuple(names.get(part, part) for part in job.command)), "runs/reproduce")

    def flatness(self, run, data):
        """Sharpness of what a search or transfer left in its folder."""
        name = f"flatness/{run.replace('/', '-')}"
        return self.add(name, ["evidence/flatness.py", f"{{work}}/{run}", "--data", self.data[data]], "flatness.json", [run], 1.5)


def cells(net, budget, methods, seeds, **more):
    return [Cell(net, budget, method, seed, **more) for seed in range(seeds) for method in methods]


def sections(scale):
    """{section: cells}, in the order of running. Of "policies" only the search is run; "flatness" looks into its runs as well; "gpu"
    is left out on a CPU, unless named."""
    full, at, b = scale == "full", ("resnet20", "2.4bit"), ("resnet20b", "2.4bit")
    plan = {"headline": cells(*at, HEADLINE, 5),
            "recipe": cells("resnet20", "4bit", ("uniform",), 1),
            "methods": cells(*at, ("flow", "sagm", "asga-half-steps", "joint-double-steps"), 3),
            "proxy": cells(*at, ("asga", "joint"), 3, proxy="target") + cells(*at, ("asga",), 3, proxy="digits"),
            "radius": cells(*at, ("asga-rho-0.1",), 3),
            "plugin": cells(*at, ("loss-weight-joint", "loss-weight-asga"), 3),
            "flatness": cells(*at, ("joint", "asga"), 3),
            "policies": cells("resnet20", "3bit", ("asga",), 1) + cells("resnet20", "4bit", ("asga",), 1)}
    if full:
        plan["seeds"] = cells(*at, ("sagm", "asga-half-steps"), 5) + cells(*at, ("asga",), 5, proxy="target")    # of what the claims are judged by
        plan["headline"] += cells("lite0", "3bit", HEADLINE, 5) + cells("lite0", "4bit", HEADLINE, 5)
        plan["flatness"] = cells(*at, ("joint", "asga"), 5) + cells(*at, ("sam", "sagm"), 3)
        plan["methods"] += cells(*at, ("sam",), 3) + cells(*b, ("uniform", "joint", "asga", "sagm"), 3) \
            + cells(*b, ("asga-no-implicit", "asga-no-projection", "asga-no-floor", "joint-softmax"), 3) + cells("resnet20b", "3bit", HEADLINE, 3) \
            + cells("lite0", "3bit", ("flow", "sam", "sagm", "asga-half-steps", "joint-double-steps"), 3)
        plan["proxy"] += cells(*b, ("asga",), 3, share="0.1") + cells(*b, ("asga",), 3, share="0.01") \
            + cells("lite0", "3bit", ("asga", "joint"), 3, proxy="target")
        plan["long"] = cells("lite0long", "4bit", ("uniform",), 1) + cells("lite0long", "3bit", ("uniform", "joint", "asga"), 3)
        plan["radius"] += cells(*b, ("asga-rho-0.005", "asga-rho-0.01", "asga-rho-0.1"), 3)    # 0.05: sagm
        plan["rank"] = cells(*b, ("random",), 20) + cells(*b, ("random",), 20, target="proxy")
        budgets = ("3bit", "4bit")
        plan["policies"] += [c for net in ("resnet18", "mobilenet_v2") for budget in budgets for c in cells(net, budget, ("asga",), 1)]
        plan["gpu"] = [c for net in ("resnet18", "mobilenet_v2") for budget in budgets for c in cells(net, budget, HEADLINE, 3)] \
            + [c for budget in budgets for c in cells("resnet50", budget, ("asga",), 1)]
    return plan


def planned(scale, data):
    """(Plan, {cell: its transfer}, {section: names of its runs}) of a scale."""
    plan, transfers, names = Plan(data), {}, {}
    for section, wanted in sections(scale).items():
        before = list(plan.jobs)
        if section in ("policies", "gpu"):
            plan.ready += [plan.policy(cell) for cell in wanted if cell.method == "asga" and cell.seed == 0]
        if section == "policies":                                                        # searched, not carried over
            names[section] = list(plan.ready)
            continue
        for cell in wanted:
            transfers[cell] = plan.transfer(cell)
            if section == "flatness":
                plan.flatness(plan.policy(cell), "proxy")
                plan.flatness(transfers[cell], "target")
        names[section] = [name for name in plan.jobs if name not in before] + [transfers[cell] for cell in wanted]
    plan.sections = {section: set(wanted) for section, wanted in names.items()}
    return plan, transfers, names


def with_needs(jobs, names):
    """The jobs of these names and all that they need, in the plan's order."""
    wanted, todo = set(), list(names)
    while todo:
        name = todo.pop()
        if name not in wanted:
            wanted.add(name)
            todo += jobs[name].needs
    return {name: job for name, job in jobs.items() if name in wanted}


def line(job, work):
    return shlex.join(["python", *(part.replace("{work}", str(work)) for part in job.command), "--out", str(Path(work) / job.name)])


def known(path, plan, work):
    """{name: record} of a runs.jsonl that another machine may have made: of what is planned now by the same command, has no result
    in `work`, and needs no policy but such a one."""
    try:
        records, out = {r["name"]: r for r in map(json.loads, Path(path).read_text().splitlines())} if path else {}, {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise asga.AsgaError(f"--known {path}: give a runs.jsonl that reproduce.sh wrote ({type(error).__name__}: {error})") from None
    for name, job in plan.jobs.items():
        if records.get(name, {}).get("command") == plan.shown(job) and not (work / name / job.result).exists() \
                and all(need in out for need in job.needs if not need.startswith("fp/")):
            out[name] = records[name]
    return out


def take_weights(path, plan, work):
    """Put the full-precision weights that lie beside a runs.jsonl where they would be trained: on another CPU training does not
    repeat bit for bit, and only runs from the same weights can be compared."""
    for name, record in known(path, plan, work).items():
        source = Path(path).parent / name
        if name.startswith("fp/") and (source / "model.pt").exists() and not (work / name).exists():
            shutil.copytree(source, work / name)
            Path(f"{work / name}.log").write_text(f"{line(plan.jobs[name], work)}\nasga.py {record['asga.py']}\n")


def check(jobs, work):
    """AsgaError where --work holds a run that was started by another command than is planned now."""
    for job in jobs.values():
        log = work / f"{job.name}.log"
        if log.exists() and (first := log.read_text().partition("\n")[0]) and first != line(job, work):
            raise asga.AsgaError(f"{work / job.name} was made by another command ({first}): delete it and its .log, or give another --work")


def run_all(jobs, work, parallel):
    """Run what has no result yet, `parallel` at a time, needs first; True where all succeeded."""
    version = hashlib.sha256((ROOT / "asga.py").read_bytes()).hexdigest()[:12]
    env = {**KEEP_MEMORY, **os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // parallel))}
    finished = {name for name, job in jobs.items() if (work / name / job.result).exists()}
    waiting = [name for name in jobs if name not in finished]
    running, failed, began = {}, set(), time.monotonic()
    left = lambda: sum(jobs[name].minutes for name in waiting) / parallel
    print(f"{len(finished)} of {len(jobs)} runs are done; the others take about {left():.0f} minutes on a CPU, {parallel} at a time", flush=True)
    try:
        while waiting or running:
            for name in list(waiting):
                if any(need in failed for need in jobs[name].needs):
                    waiting.remove(name)
                    failed.add(name)
                    print(f"left out, as it needs a run that failed: {name}", flush=True)
                elif len(running) < parallel and all(need in finished for need in jobs[name].needs):
                    waiting.remove(name)
                    folder = work / name
                    folder.parent.mkdir(parents=True, exist_ok=True)
                    command = line(jobs[name], work)
                    with open(f"{folder}.log", "a") as log:
                        print(f"{command}\nasga.py {version}", file=log, flush=True)
                        running[name] = subprocess.Popen([sys.executable, *shlex.split(command)[1:]], cwd=ROOT, env=env, stdout=log,
                                                         stderr=log, start_new_session=True)        # Ctrl-C reaches it through us
            for name, process in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    (failed if process.returncode else finished).add(name)
                    print(f"{len(finished)}/{len(jobs)} {f'FAILED, see {work / name}.log' if process.returncode else 'done'}: {name}  "
                          f"({(time.monotonic() - began) / 60:.0f} min, about {left():.0f} left)", flush=True)
            time.sleep(0.2)
    except BaseException:
        print("\nstopping; the same command goes on: searches and training where they were, short runs from their start", flush=True)
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
        raise
    return not failed


def main():
    parser = argparse.ArgumentParser(prog="bash reproduce.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=["small", "full"], default="full" if asga.torch.cuda.is_available() else "small")
    parser.add_argument("--only", default="", help="sections to run, joined by commas: headline, recipe, methods, proxy, radius, plugin, flatness, policies; "
                        "in full also seeds, long, rank and gpu (the last only where CUDA is, unless named)")
    parser.add_argument("--jobs", type=int, default=os.environ.get("JOBS") or min(os.cpu_count() or 1, 4),
                        help="runs side by side (default: JOBS, else one a core, 4 at most)")
    root = Path(os.environ.get("ASGA_DATA") or "data")
    parser.add_argument("--proxy", default=str(root / "cifar10"), help="folder with train/CLASS/* and val/CLASS/*; default $ASGA_DATA/cifar10")
    parser.add_argument("--target", default=str(root / "tinyimagenet50"), help="the same; default $ASGA_DATA/tinyimagenet50")
    parser.add_argument("--work", default="runs/reproduce", help="where the runs are")
    parser.add_argument("--known", help="a runs.jsonl, such as results/reproduce/runs.jsonl: what it holds is reported as it is and not run again "
                        "(but weights and policies where a missing run needs them; small weights lie beside it)")
    parser.add_argument("--out", default="results", help="where reproduce.md goes")
    parser.add_argument("--list", action="store_true", help="print the commands, run nothing")
    parser.add_argument("--report", action="store_true", help="run nothing, report what is there")
    parser.add_argument("--accept", action="store_true", help="these figures become the reference, those of which all planned seeds ran")
    args = parser.parse_args()
    if args.jobs < 1:
        raise asga.AsgaError(f"--jobs {args.jobs} must be at least 1")
    data = {"proxy": str(Path(args.proxy).resolve()), "target": str(Path(args.target).resolve()), "digits": "digits"}
    plan, transfers, names = planned(args.scale, data)
    chosen = [part.strip() for part in args.only.split(",") if part.strip()] or [name for name in names if name != "gpu" or asga.torch.cuda.is_available()]
    for section in chosen:
        if section not in names:
            raise asga.AsgaError(f"--only {section!r}: the sections of {args.scale} are {', '.join(names)}")
    work = Path(args.work).resolve()
    if args.known and not args.list:
        take_weights(args.known, plan, work)
    there = known(args.known, plan, work)
    jobs = with_needs(plan.jobs, [name for section in chosen for name in names[section] if name not in there])
    if args.list:
        print("\n".join(line(job, args.work) for job in jobs.values()))
        return 0
    check(plan.jobs, work)
    complete = True
    if not args.report:
        for name in ("proxy", "target"):
            if not (Path(getattr(args, name)) / "train").is_dir():
                raise asga.AsgaError(f"--{name} {getattr(args, name)} is no folder with train/ and val/: set ASGA_DATA or give --{name} "
                                     f"(without data, `bash reproduce.sh quick` runs on the digits that lie here)")
        if any("lite0" in name for name in jobs):
            try:
                asga.build(str(ROOT / LITE), 10)
            except asga.AsgaError as error:
                raise asga.AsgaError(f"{error}: pip install -r evidence/requirements.txt, or --scale small")
        print(f"scale {args.scale}: {', '.join(chosen)}; {args.jobs} runs side by side; runs in {args.work}", flush=True)
        complete = run_all(jobs, work, args.jobs)
    import report
    return 0 if report.write(report.collect(work, plan, transfers, known(args.known, plan, work)), work, plan, transfers, args) and complete else 1


if __name__ == "__main__":
    for ended in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ended, signal.default_int_handler)                           # as Ctrl-C, so that no run outlives this one
    try:
        sys.exit(main())
    except asga.AsgaError as error:
        print(f"reproduce: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
