"""The evidence: every run that the five claims need, as command lines of asga.py and of evidence/, and what came out.

    bash reproduce.sh                          all of the scale that fits this machine: small on CPU, full where CUDA is
    bash reproduce.sh --scale small --jobs 2   the same by hand; --list shows the commands, --report only writes the report
    bash reproduce.sh --scale full --only headline,rank

small: resnet20, under 3 hours on 2 cores. full: more networks, budgets and ablations, meant for one GPU. Every run has a folder
under --work and is skipped where its result is there; one that was stopped goes on. At the end come results/reproduce.md, plots, and
every run in compact form (results/reproduce/runs.jsonl). Exit code 1 where a run failed, or where a figure leaves the tolerance around
evidence/reference.json (--accept makes the present figures the reference).
"""
import argparse
import os
import shlex
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
    """A network of the evidence: the same flags for every method. train: of the full-precision weights, on each data set."""
    arch: str
    resolution: int
    train: dict
    search: tuple
    tune: tuple


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


LITE = "evidence/networks.py:efficientnet_lite0"
NETWORKS = {
    "resnet20": Network("resnet20", 32, {"proxy": ("--epochs", 12), "target": ("--epochs", 15), "digits": ("--epochs", 20)},
                        ("--steps", 200), ("--epochs", 1)),
    "lite0": Network(LITE, 64, {"proxy": ("--epochs", 2, "--batch-size", 64, "--lr", 0.02),
                                "target": ("--epochs", 4, "--batch-size", 64, "--lr", 0.02)},
                     ("--steps", 200, "--batch-size", 64), ("--epochs", 1, "--batch-size", 64)),
    **{arch: Network(arch, 64, {data: ("--epochs", 15) for data in ("proxy", "target")}, ("--steps", 400), ("--epochs", 5))
       for arch in ("resnet18", "mobilenet_v2")},
}
# how one minute of resnet20 stretches on the others, roughly, on a CPU
WEIGHT = {"resnet20": 1, "lite0": 1.3, "resnet18": 20, "mobilenet_v2": 20}

# flags of `asga.py search`; a method that is not here is one of evidence/policies.py
SEARCHES = {
    "uniform": ("--method", "uniform", "--random-weights"),
    "asga": (), "joint": ("--method", "joint"), "sam": ("--method", "sam"), "sagm": ("--method", "sagm"),
    "asga-no-implicit": ("--alpha", 0), "asga-no-projection": ("--no-project",), "asga-no-adaptive": ("--no-adaptive",),
    "asga-no-floor": ("--rho-min", 0), "asga-half-steps": ("half",),
    **{f"asga-rho-{r}": ("--no-adaptive", "--rho-min", r, "--rho-max", r) for r in (0.005, 0.01, 0.05, 0.1)},
    "joint-softmax": ("--method", "joint", "--relaxation", "softmax"),
}
HEADLINE = ("uniform", "random", "sensitivity", "joint", "asga")


class Plan:
    """All jobs, made on demand: to ask for a transfer makes its search, and the weights of both."""

    def __init__(self, data):
        self.data, self.jobs = data, {}

    def add(self, name, command, result, needs=(), minutes=1.0):
        self.jobs.setdefault(name, Job(name, tuple(map(str, command)), result, tuple(needs), minutes))
        return name

    def common(self, net, data):
        return ["--arch", NETWORKS[net].arch, "--resolution", NETWORKS[net].resolution, "--data", self.data[data]]

    def weights(self, net, data):
        return self.add(f"fp/{net}-{data}", ["asga.py", "train", *self.common(net, data), *NETWORKS[net].train[data]], "metrics.json",
                        minutes=30 * WEIGHT[net])

    def policy(self, cell):
        """A search, or another way to a policy; its name."""
        net, network = cell.net, NETWORKS[cell.net]
        name = f"policy/{net}-{cell.proxy}-{cell.budget}-{cell.method}{'' if cell.share == '1.0' else '-' + cell.share}-{cell.seed}"
        flags = [*self.common(net, cell.proxy), "--budget", cell.budget, "--cost-resolution", network.resolution, "--seed", cell.seed]
        if cell.method == "uniform":
            return self.add(name, ["asga.py", "search", *flags, *SEARCHES["uniform"]], "policy.json", minutes=0.7 * WEIGHT[net])
        start = self.weights(net, cell.proxy)
        flags += ["--weights", f"{{work}}/{start}/model.pt"]
        if cell.method not in SEARCHES:
            return self.add(name, ["evidence/policies.py", cell.method, *flags], "policy.json", [start], 2 * WEIGHT[net])
        own = list(SEARCHES[cell.method])
        flags += network.search
        if "half" in own:
            flags[flags.index("--steps") + 1] //= 2
            own.remove("half")
        flags += ["--images", cell.share] if cell.share != "1.0" else []
        minutes = 2.2 if "joint" in cell.method else 4
        return self.add(name, ["asga.py", "search", *flags, *own], "policy.json", [start], minutes * WEIGHT[net])

    def transfer(self, cell):
        policy, start, network = self.policy(cell), self.weights(cell.net, cell.target), NETWORKS[cell.net]
        name = f"transfer/{policy.removeprefix('policy/')}-to-{cell.target}"
        return self.add(name, ["asga.py", "transfer", f"{{work}}/{policy}/policy.json", *self.common(cell.net, cell.target), "--weights",
                               f"{{work}}/{start}/model.pt", "--seed", cell.seed, "--cost-resolution", network.resolution, *network.tune],
                        "metrics.json", [policy, start], 2 * WEIGHT[cell.net])

    def flatness(self, run, data):
        """Sharpness of what a search or transfer left in its folder."""
        name = f"flatness/{run.replace('/', '-')}"
        return self.add(name, ["evidence/flatness.py", f"{{work}}/{run}", "--data", self.data[data]], "flatness.json", [run], 1.5)


def cells(net, budget, methods, seeds, **more):
    return [Cell(net, budget, method, seed, **more) for seed in range(seeds) for method in methods]


def sections(scale):
    """{section: cells}, in the order of running; "rank" and "flatness" are made of them in another way (see main)."""
    full = scale == "full"
    plan = {"headline": cells("resnet20", "2.4bit", HEADLINE, 5),
            "methods": cells("resnet20", "2.4bit", ("flow", "sam", "sagm", "asga-half-steps"), 3),
            "proxy": cells("resnet20", "2.4bit", ("asga", "joint"), 3, proxy="target")
            + cells("resnet20", "2.4bit", ("asga",), 3, proxy="digits") + cells("resnet20", "2.4bit", ("asga",), 3, share="0.01"),
            "radius": cells("resnet20", "2.4bit", ("asga-rho-0.005", "asga-rho-0.1"), 3),
            "plugin": cells("resnet20", "2.4bit", ("loss-weight-joint", "loss-weight-asga"), 3)}
    if full:
        plan["headline"] += cells("lite0", "3bit", HEADLINE, 5) + cells("lite0", "4bit", HEADLINE, 5)
        plan["methods"] += cells("resnet20", "2.4bit", [m for m in SEARCHES if m.startswith("asga-no")] + ["joint-softmax"], 3) \
            + cells("lite0", "3bit", ("flow", "sam", "sagm", "asga-half-steps"), 3) + cells("resnet20", "3bit", HEADLINE, 3)
        plan["proxy"] += cells("resnet20", "2.4bit", ("asga",), 3, share="0.1") + cells("lite0", "3bit", ("asga", "joint"), 3, proxy="target")
        plan["radius"] += cells("resnet20", "2.4bit", ("asga-rho-0.01", "asga-rho-0.05"), 3)
        plan["rank"] = cells("resnet20", "2.4bit", ("random",), 20) + cells("resnet20", "2.4bit", ("random",), 20, target="proxy")
        if asga.torch.cuda.is_available():
            plan["headline"] += [c for net in ("resnet18", "mobilenet_v2") for budget in ("3bit", "4bit") for c in cells(net, budget, HEADLINE, 3)]
    return plan


def run_all(jobs, work, parallel):
    """Run what has no result yet, `parallel` at a time, needs first; True where all succeeded."""
    env = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // parallel))}
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
                elif len(running) < parallel and all(need in finished for need in jobs[name].needs):
                    waiting.remove(name)
                    folder = work / name
                    folder.parent.mkdir(parents=True, exist_ok=True)
                    command = [part.replace("{work}", str(work)) for part in jobs[name].command] + ["--out", str(folder)]
                    with open(f"{folder}.log", "a") as log:
                        print(shlex.join(["python", *command]), file=log, flush=True)
                        running[name] = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=env, stdout=log, stderr=log,
                                                         start_new_session=True)                    # Ctrl-C reaches it through us
            for name, process in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    (failed if process.returncode else finished).add(name)
                    print(f"{len(finished)}/{len(jobs)} {f'FAILED, see {work / name}.log' if process.returncode else 'done'}: {name}  "
                          f"({(time.monotonic() - began) / 60:.0f} min, about {left():.0f} left)", flush=True)
            time.sleep(0.2)
    except BaseException:
        print("\nstopping: each run saves what it did, the same command goes on", flush=True)
        for process in running.values():
            process.send_signal(signal.SIGINT)
        for process in running.values():
            process.wait()
        raise
    return not failed


def main():
    parser = argparse.ArgumentParser(prog="bash reproduce.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=["small", "full"], default="full" if asga.torch.cuda.is_available() else "small")
    parser.add_argument("--only", default="", help="sections, joined by commas")
    parser.add_argument("--jobs", type=int, default=int(os.environ.get("JOBS", 0)) or min(os.cpu_count() or 1, 4),
                        help="runs side by side (default: JOBS, else one a core, 4 at most)")
    root = Path(os.environ.get("ASGA_DATA", "data"))
    parser.add_argument("--proxy", default=str(root / "cifar10"), help="folder with train/CLASS/* and val/CLASS/*; default $ASGA_DATA/cifar10")
    parser.add_argument("--target", default=str(root / "tinyimagenet50"), help="the same; default $ASGA_DATA/tinyimagenet50")
    parser.add_argument("--work", default="runs/reproduce", help="where the runs are")
    parser.add_argument("--out", default="results", help="where reproduce.md goes")
    parser.add_argument("--list", action="store_true", help="print the commands, run nothing")
    parser.add_argument("--report", action="store_true", help="run nothing, report what is there")
    parser.add_argument("--accept", action="store_true", help="make these figures the reference")
    args = parser.parse_args()
    for name in ("proxy", "target"):
        if not (Path(getattr(args, name)) / "train").is_dir():
            raise asga.AsgaError(f"--{name} {getattr(args, name)} is no folder with train/ and val/: set ASGA_DATA or give --{name} "
                                 f"(without data, `bash reproduce.sh quick` runs on the digits that lie here)")
    if args.jobs < 1:
        raise asga.AsgaError(f"--jobs {args.jobs} must be at least 1")
    planned = sections(args.scale)
    chosen = args.only.split(",") if args.only else [*planned, "flatness"]
    unknown = set(chosen) - {*planned, "flatness"}
    if unknown:
        raise asga.AsgaError(f"--only {unknown.pop()!r}: the sections of {args.scale} are {', '.join([*planned, 'flatness'])}")
    plan = Plan({"proxy": str(Path(args.proxy).resolve()), "target": str(Path(args.target).resolve()), "digits": "digits"})
    transfers = {cell: plan.transfer(cell) for section in chosen for cell in planned.get(section, ())}
    if "flatness" in chosen:
        for cell in cells("resnet20", "2.4bit", ("joint", "sam", "sagm", "asga"), 3):
            transfers[cell] = plan.transfer(cell)
            plan.flatness(plan.policy(cell), "proxy")
            plan.flatness(transfers[cell], "target")
    if any(cell.net == "lite0" for cell in transfers):
        try:
            asga.build(str(ROOT / LITE), 10)
        except asga.AsgaError as error:
            raise asga.AsgaError(f"{error}: pip install -r evidence/requirements.txt, or --scale small")
    work = Path(args.work).resolve()
    if args.list:
        for job in plan.jobs.values():
            print(shlex.join(["python", *(part.replace("{work}", args.work) for part in job.command), "--out", f"{args.work}/{job.name}"]))
        return 0
    print(f"scale {args.scale}: {', '.join(chosen)}; {args.jobs} runs side by side; runs in {args.work}", flush=True)
    complete = args.report or run_all(plan.jobs, work, args.jobs)
    import report
    inside = report.write(work, Path(args.out), plan, transfers, args)
    return 0 if complete and inside else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except asga.AsgaError as error:
        print(f"reproduce: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
