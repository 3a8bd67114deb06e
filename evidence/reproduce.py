"""The evidence: the runs of evidence/plan.json, each a command of asga.py or of a script beside this one.

    bash reproduce.sh                                   the scale that fits: small on CPU, full where CUDA is
    bash reproduce.sh --scale full --only long,rank     these sections; --list: commands; --report: no runs

small: resnet20, about 3 hours on 2 cores; full: more networks, budgets and ablations, for a GPU. A run has
a folder under --work: a finished one is not run again, a stopped one goes on. The report is of these and of
those in OUT/reproduce/runs.jsonl, unless run anew.
"""
import argparse
import hashlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import report
import torch
from common import ROOT, asga, run

# a policy, searched on a share of the proxy and carried over to the target, if there is one
Cell = namedtuple("Cell", "method seed net budget proxy target share", defaults=("proxy", "target", "1.0"))
# a folder under --work, the command with {work}, {proxy} … in it, the last file it writes, what it needs
Job = namedtuple("Job", "name command result needs")

def entries(kind):
    """The networks or methods of plan.json by name."""
    return {name: entry for names, entry in report.PLAN[kind].items() for name in names.split()}

class Plan:
    """Of a scale: jobs {name: Job}, transfers {cell: name}, sections {section: names}."""

    def __init__(self, scale, out):
        self.networks, self.methods, self.out = entries("networks"), entries("methods"), Path(out)
        self.jobs, self.transfers, self.sections = {}, {}, {}
        for section, methods, seeds, rest in report.PLAN["small"] + report.PLAN["full"] * (scale == "full"):
            choices = [text.split() or [""] for text in rest.values()]
            for seed, method, *chosen in itertools.product(range(seeds), methods.split(), *choices):
                names = self.carry(Cell(method, seed, **dict(zip(rest, chosen))), section == "flatness")
                self.sections.setdefault(section, []).extend(names)

    def add(self, name, result, needs, command):
        self.jobs.setdefault(name, Job(name, f"{command} --out {{work}}/{name}", result, needs))
        return name

    def common(self, net, data):
        place = data if data == "digits" else f"{{{data}}}"
        return f"{self.networks[net]['flags'].format(name=net)} --data {place}"

    def weights(self, net, data):
        """(file, runs that make it). Where it lies beside the report, it is taken: others do not compare."""
        name = f"fp/{net}-{data}"
        if (self.out / "reproduce" / name / "model.pt").exists():
            return f"{{out}}/reproduce/{name}/model.pt", []
        command = f"asga.py train {self.common(net, data)} {self.networks[net]['train'][data]}"
        return f"{{work}}/{name}/model.pt", [self.add(name, "metrics.json", [], command)]

    def policy(self, cell, net):
        network, method = self.networks[net], self.methods[cell.method]
        share = "" if cell.share == "1.0" else f"-{cell.share}"
        name = f"policy/{net}-{cell.proxy}-{cell.budget}-{cell.method}{share}-{cell.seed}"
        command = method["command"].format(name=cell.method, end=cell.method.rpartition("-")[2])
        command += f" {self.common(net, cell.proxy)} --budget {cell.budget} --seed {cell.seed}"
        if cell.method == "uniform":
            return self.add(name, "policy.json", [], command)
        weights, needs = self.weights(net, cell.proxy)
        command += f" --weights {weights}"
        if method["steps"]:
            command += f" --steps {network['steps'] * method['steps']:.0f} {network['search']}"
        command += f" --images {cell.share}" if share else ""
        return self.add(name, "policy.json", needs, command)

    def carry(self, cell, flatness):
        """Plan a search, its transfer, a look at how flat both are, and what they need; the names of all."""
        net = cell.net.removesuffix("long")
        policy = self.policy(cell, net)
        names = [*self.jobs[policy].needs, policy]
        if not cell.target:
            return names
        weights, needs = self.weights(net, cell.target)
        name = f"transfer/{cell.net}{policy.removeprefix(f'policy/{net}')}-to-{cell.target}"
        command = f"asga.py transfer {{work}}/{policy}/policy.json {self.common(net, cell.target)}"
        command += f" --seed {cell.seed} --weights {weights} {self.networks[cell.net]['tune']}"
        self.transfers[cell] = self.add(name, "metrics.json", [policy, *needs], command)
        names += [*needs, name]
        for made, data in ((policy, "proxy"), (name, "target")) if flatness else ():
            command = f"evidence/flatness.py {{work}}/{made} --data {{{data}}}"
            names.append(self.add(f"flatness/{made.replace('/', '-')}", "flatness.json", [made], command))
        return names

def filled(job, places):
    """The command as a list, with the folders of this machine."""
    return ["python", *(part.format(**places) for part in job.command.split())]

def start(job, places, threads):
    """The process of a run, which Ctrl-C reaches only through us; its log begins with command and version."""
    version = hashlib.sha256((ROOT / "asga.py").read_bytes()).hexdigest()[:12]
    log, command = Path(f"{places['work'] / job.name}.log"), filled(job, places)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as file:
        print(" ".join(command), f"asga.py {version}", sep="\n", file=file, flush=True)
        return subprocess.Popen([sys.executable, *command[1:]], cwd=ROOT, stdout=file, stderr=file,
                                env=os.environ | {"OMP_NUM_THREADS": threads}, start_new_session=True)

def run_all(jobs, places, parallel):
    """Run what has no result yet, `parallel` at a time; True where all succeeded."""
    work, threads = places["work"], str(max(1, (os.cpu_count() or 1) // parallel))
    finished = {name for name, job in jobs.items() if (work / name / job.result).exists()}
    waiting, running = [name for name in jobs if name not in finished], {}
    try:
        while waiting or running:
            ready = [name for name in waiting if finished.issuperset(jobs[name].needs)]
            for name in ready[:parallel - len(running)]:
                waiting.remove(name)
                running[name] = start(jobs[name], places, threads)
            if not running:
                asga.say(f"left out, as they need a run that failed: {', '.join(waiting)}")
                break
            time.sleep(0.2)
            for name in [name for name, process in running.items() if process.poll() is not None]:
                if running.pop(name).returncode:
                    asga.say(f"failed, see {work / name}.log")
                else:
                    finished.add(name)
                asga.say(f"{len(jobs) - len(waiting) - len(running)} of {len(jobs)} runs")
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
    return finished.issuperset(jobs)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    cuda, data = torch.cuda.is_available(), Path(os.environ.get("ASGA_DATA") or "data")
    parser.add_argument("--scale", choices=["small", "full"], default="full" if cuda else "small")
    parser.add_argument("--only", help="sections, joined by commas; default: all, gpu only where CUDA is")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 4), help="runs side by side")
    folders = {"proxy": data / "cifar10", "target": data / "tinyimagenet50", "work": "runs/reproduce"}
    for name, default in {**folders, "out": "results"}.items():
        parser.add_argument(f"--{name}", type=Path, default=default, help=f"folder; {default}")
    parser.add_argument("--list", action="store_true", help="print the commands, run nothing")
    parser.add_argument("--report", action="store_true", help="run nothing, report what is there")
    args = parser.parse_args()
    plan = Plan(args.scale, args.out)
    places = {name: getattr(args, name).resolve() for name in ("work", "out", "proxy", "target")}
    sections = args.only.split(",") if args.only else [s for s in plan.sections if cuda or s != "gpu"]
    if not set(sections) <= set(plan.sections):
        raise asga.AsgaError(f"--only {args.only}: the sections are {', '.join(plan.sections)}")
    jobs = {name: plan.jobs[name] for section in sections for name in plan.sections[section]}
    if args.list:
        return print("\n".join(" ".join(filled(job, places)) for job in jobs.values()))
    if not args.report and not (args.proxy / "train").is_dir():
        raise asga.AsgaError(f"{args.proxy} holds no train/: set ASGA_DATA, or give --proxy and --target")
    good = args.report or run_all(jobs, places, max(1, args.jobs))
    report.write(plan, places)
    return 0 if good else 1

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: no run outlives this one
    run(main)
