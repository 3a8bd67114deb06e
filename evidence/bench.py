"""What a step of asga.py costs, beside full precision.

    python evidence/bench.py --out results/bench/resnet18.json          times, memory, compilation; 3 minutes
    python evidence/bench.py --growth --out results/bench/growth.json   by candidates, batch, pixels, depth
    python evidence/bench.py --knapsack                                 time of the exact knapsack
    python evidence/bench.py --table results/bench/*.json               all of it as Markdown

Each round runs each variant once, on one random batch; a ratio is the median over rounds of the ratio in one.
two_pass is SAM in full precision, written here.
"""
import argparse
import copy
import functools
import gc
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import Mock

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import asga  # noqa: E402

TWELVE = tuple(range(2, 14))
VARIANTS = {  # name: method of Bench, arguments, compared with
    "full_precision": ("tuning", {}, ""),
    "two_pass": ("tuning", {"passes": 2}, "full_precision"),
    "transfer": ("tuning", {"bits": 4}, "full_precision"),
    "joint": ("search", {"method": "joint"}, "full_precision"),
    "asga": ("search", {}, "two_pass"),
    "asga_quantizers_off": ("search", {"quantizers": False}, "asga"),
    "asga_image_step_learned": ("search", {"image_step": True}, "two_pass"),
    "asga_3_candidates": ("search", {"bits": (2, 4, 8)}, ""),
    "asga_12_candidates": ("search", {"bits": TWELVE}, "asga_3_candidates"),
    "optimizer_alone": ("optimizer_alone", {}, "asga"),
    "evaluate_full_precision": ("evaluation", {}, ""),
    "evaluate_quantized": ("evaluation", {"bits": 4}, "evaluate_full_precision"),
}


class Bench:
    """One network and batch; tuning … evaluation make variants, which are functions without arguments."""

    def __init__(self, arch, resolution, batch_size, candidates, precision, device):
        self.candidates, self.precision, self.device = candidates, precision, device
        torch.manual_seed(0)
        self.model = asga.build(arch, 10).to(device, memory_format=torch.channels_last)
        x = torch.randn(batch_size, 3, resolution, resolution, device=device)
        self.x = x.contiguous(memory_format=torch.channels_last)
        self.y = torch.randint(10, (batch_size,), device=device)

    def make(self, name):
        method, arguments, _ = VARIANTS[name]
        return getattr(self, method)(**arguments)

    def backward(self, net):
        asga.backward(net, self.x, self.y, F.cross_entropy, self.precision)

    def network(self, bits):
        return asga.quantize(self.model, bits, self.x) if bits else copy.deepcopy(self.model)

    def tuning(self, passes=1, bits=None, rho=0.05):
        """A step of SGD; with two passes, of SAM; with bits, of `asga.py transfer`."""
        net = self.network(bits).train()
        for q in asga.quantizers_of(net)[1:2]:  # the first layer's input
            q.steps.requires_grad_(False)
        groups = asga.parameter_groups(net, 0.01, 1e-4)
        optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=bits is not None)
        params = [p for p in net.parameters() if p.requires_grad]

        def step():
            self.backward(net)
            if passes == 2:
                before = [p.detach().clone() for p in params]
                scale = rho / torch.nn.utils.get_total_norm([p.grad for p in params])
                with torch.no_grad():
                    torch._foreach_add_(params, torch._foreach_mul([p.grad for p in params], scale))
                self.backward(net)
                torch._foreach_copy_([p.data for p in params], before)
            with asga.step_guard(net):
                optimizer.step()
        return step

    def search(self, bits=None, quantizers=True, image_step=False, **settings):
        """asga.Search.step of a search that never ends."""
        bits = bits or self.candidates
        settings = asga.SearchSettings(candidates_w=bits, candidates_a=bits, steps=10 ** 6,
                                       precision=self.precision, **settings)
        plan = asga.plan(self.model, self.x[:1], "3bit" if len(bits) > 1 else f"{bits[0]}bit", settings)
        run = asga.Search(self.model, *plan, settings, [self.x])
        for q in run.quantizers:
            q.enabled = quantizers
            q.steps.requires_grad_(image_step or q.steps.requires_grad)

        def step():
            run.step(self.x, self.y, 0)
        step.run = run
        return step

    def optimizer_alone(self):
        """An ASGA step without passes and base optimizer: perturb, restore, combine, guard, project."""
        run = self.search().run
        params = [p for group in run.optimizer.param_groups for p in group["params"]]
        grads = [torch.randn_like(p) * 1e-3 for p in params]
        run.optimizer.base.step = Mock()

        def closure():
            for p, grad in zip(params, grads):
                p.grad = grad
            return torch.zeros((), device=self.device)

        def step():
            with asga.step_guard(run.net):
                run.optimizer.step(closure)
            run.write(run.budget.project(run.bits()))
        return step

    def evaluation(self, bits=None):
        net = self.network(bits)

        def step():
            with asga.evaluating(net), asga.prepared(net):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                    net(self.x)
        return step


def timed(step, device):
    """Seconds of a step."""
    synchronize = getattr(torch, device.type).synchronize  # torch.cpu's does nothing
    synchronize()
    start = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - start


def interleaved(bench, names, rounds, warm=3):
    """{variant: [seconds]}, after `warm` rounds that do not count."""
    variants, samples = {name: bench.make(name) for name in names}, {name: [] for name in names}
    progress = asga.Progress("rounds", rounds + warm)
    for r in range(rounds + warm):
        for name, step in variants.items():
            samples[name].append(timed(step, bench.device))
        progress.show(r + 1)
    return {name: times[warm:] for name, times in samples.items()}


def ratio(samples, one, other):
    """Median over rounds."""
    return statistics.median(a / b for a, b in zip(samples[one], samples[other]))


def peak_bytes(bench, name):
    """The most bytes that torch's allocator holds for a variant: what it owns, and what a step adds."""
    def use():
        step = bench.make(name)
        step()
        step()

    gc.collect()
    if bench.device.type == "cuda":
        before = torch.cuda.memory_allocated(bench.device)
        torch.cuda.reset_peak_memory_stats(bench.device)
        use()
        return torch.cuda.max_memory_allocated(bench.device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        use()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    ordered = sorted(events, key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in ordered))


def measure(bench, rounds):
    """{"samples", "peak_bytes", "ratios"} of all variants."""
    samples = interleaved(bench, VARIANTS, rounds)
    ratios = {f"{name}_over_{to}": ratio(samples, name, to) for name, (_, _, to) in VARIANTS.items() if to}
    memory = {name: peak_bytes(bench, name) for name in ("full_precision", "two_pass", "asga", "transfer")}
    for name in list(memory)[1:]:
        ratios[f"memory_{name}_over_full_precision"] = memory[name] / memory["full_precision"]
    return {"samples": samples, "peak_bytes": memory, "ratios": ratios}


def compile_times(argv):
    """Seconds that compilation adds to a process's first step: without a cache, and with the first's."""
    found = {}
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": cache}
        for name in ("cold", "warm"):
            command = [sys.executable, __file__, *argv, "--first-step"]
            found[name] = float(subprocess.check_output(command, env=env))
    return found


def knapsack_times(arch, draws=5):
    """[seconds] of the knapsack over 36 choices a layer, for random β on the budget of 3 bit."""
    device, times = torch.device("cpu"), []
    run = Bench(arch, 224, 1, asga.CANDIDATES, "float32", device).search().run
    for seed in range(draws):
        torch.manual_seed(seed)
        run.write(run.budget.project(2 + 6 * torch.rand_like(run.bits())))
        times.append(timed(run.policy, device))
    return times


def growth(make, rounds):
    """[row] of the cost over candidates, batch, resolution and depth, one of them changed at a time."""
    changes = {"candidates": [(4,), (2, 4, 8), asga.CANDIDATES, TWELVE], "batch_size": [32, 64, 128],
               "resolution": [32, 64, 96], "arch": ["resnet18", "resnet34", "resnet50"]}
    rows = []
    for what, values in changes.items():
        for value in values:
            samples = interleaved(make(**{what: value}), ("two_pass", "asga"), rounds)
            over = ratio(samples, "asga", "two_pass")
            rows.append({"what": what, "value": value, "samples": samples, "asga_over_two_pass": over})
    return rows


def show(results):
    """Markdown: a column for each network; then growth and knapsack."""
    def row(*cells):
        print("| " + " | ".join(map(str, cells)) + " |")

    def milliseconds(times):
        return f"{1e3 * statistics.median(times):.0f} ({1e3 * min(times):.0f}-{1e3 * max(times):.0f})"

    steps = [result for result in results if "ratios" in result]
    if steps:
        row("", *[f"{r['settings']['arch']}, {r['settings']['precision']}" for r in steps])
        row("---", *["---" for r in steps])
        for name in ("full_precision", "two_pass", "joint", "asga", "transfer"):
            row(f"{name}, ms (range)", *[milliseconds(r["samples"][name]) for r in steps])
        for kind in ("ratios", "compile"):
            for name in dict.fromkeys(itertools.chain(*[r[kind] for r in steps])):
                row(name, *[f"{r[kind].get(name, math.nan):.2f}" for r in steps])
    for result in results:
        for entry in result.get("growth", ()):
            times = [milliseconds(entry["samples"][name]) for name in ("two_pass", "asga")]
            row(entry["what"], entry["value"], *times, f"{entry['asga_over_two_pass']:.2f}")
        for arch, times in result.get("knapsack", {}).items():
            row(f"knapsack, {arch}, ms (range)", milliseconds(times))


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", default="resnet18", help="as for asga.py")
    for name, default in (("resolution", 64), ("batch-size", 64), ("rounds", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--candidates", type=int, nargs="+", default=asga.CANDIDATES)
    parser.add_argument("--precision", default="float32", choices=["float32", "bf16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", help="JSON with every sample")
    parser.add_argument("--table", nargs="+", metavar="FILE", help="show what --out wrote")
    for name in ("growth", "knapsack", "first-step"):
        parser.add_argument(f"--{name}", action="store_true")
    args = parser.parse_args(argv)
    if args.table:
        return show([json.loads(Path(name).read_text()) for name in args.table])
    device = torch.device(args.device)
    if args.rounds < 1:
        raise asga.AsgaError(f"--rounds {args.rounds} must be at least 1")
    make = functools.partial(Bench, arch=args.arch, resolution=args.resolution, batch_size=args.batch_size,
                             candidates=tuple(args.candidates), precision=args.precision, device=device)
    if args.first_step:
        step = make().search()
        first, _, *later = [timed(step, device) for _ in range(4)]
        return print(first - min(later))
    result = {"device": asga.describe(device), **asga.versions(), "settings": vars(args)}
    if args.knapsack:
        result["knapsack"] = {arch: knapsack_times(arch) for arch in ("resnet50", "mobilenet_v2")}
    elif args.growth:
        result["growth"] = growth(make, args.rounds)
    else:
        result.update(measure(make(), args.rounds), compile=compile_times(argv))
    print(f"{result['device']}, torch {result['torch']}")
    show([result])
    if args.out:
        asga.write_json(args.out, result)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (asga.AsgaError, OSError, subprocess.CalledProcessError) as error:
        asga.say(f"error: {error}")
        sys.exit(2)
