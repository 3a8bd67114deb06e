"""What a step of asga.py costs, beside full precision.

    python evidence/bench.py --out results/bench/resnet18.json          times and memory; 2 minutes
    python evidence/bench.py --table results/bench/*.json               all of it as Markdown

Each round runs each variant once, on one random batch; a ratio is the median over rounds of the ratio in one.
two_pass is SAM in full precision, written here. It takes the first CUDA device, or the CPU. On CUDA variants
come one after another, with what a step launches, and how long kernels and Python take.
"""
import argparse
import copy
import gc
import itertools
import math
import statistics
import time

import torch
import torch.nn.functional as F
from common import asga, moved, run, table
from torch.profiler import ProfilerActivity, profile

VARIANTS = {  # name: method of Bench, arguments, compared with
    "full_precision": ("tuning", {}, ""),
    "two_pass": ("tuning", {"passes": 2}, "full_precision"),
    "transfer": ("updates", {"bits": 4}, "full_precision"),
    "joint": ("search", {"method": "joint"}, "full_precision"),
    "asga": ("search", {}, "two_pass"),
}
ON_A_CPU = VARIANTS | {
    "asga_3_candidates": ("search", {"bits": (2, 4, 8)}, ""),
    "asga_12_candidates": ("search", {"bits": tuple(range(2, 14))}, "asga_3_candidates"),
}
ON_CUDA = VARIANTS | {
    "two_pass_recorded": ("updates", {"rho": 0.05}, "two_pass"),
    "asga_plain": ("search", {"capture": False}, "two_pass"),
}

class Bench:
    """One network and batch; tuning, updates and search make variants: functions without arguments."""

    def __init__(self, arch, resolution, batch_size, precision, device):
        self.precision, self.device = precision, device
        self.variants = ON_CUDA if device.type == "cuda" else ON_A_CPU
        torch.manual_seed(0)
        self.model = asga.build(arch, 10).to(device, memory_format=torch.channels_last)
        x = torch.randn(batch_size, 3, resolution, resolution, device=device)
        self.x = x.contiguous(memory_format=torch.channels_last)
        self.y = torch.randint(10, (batch_size,), device=device)

    def make(self, name):
        method, arguments, _ = self.variants[name]
        return getattr(self, method)(**arguments)

    def tuning(self, passes=1, rho=0.05):
        """A step of SGD; with two passes, of SAM."""
        net, data = copy.deepcopy(self.model).train(), (self.x, self.y, F.cross_entropy, self.precision)
        optimizer = torch.optim.SGD(asga.parameter_groups(net, 0.01, 1e-4), momentum=0.9)
        params = [*net.parameters()]

        def step():
            asga.backward(net, *data)
            if passes == 2:
                grads = [p.grad for p in params]
                with moved(params, grads, rho / torch.nn.utils.get_total_norm(grads)):
                    asga.backward(net, *data)
            optimizer.step()
        return step

    def updates(self, bits=None, rho=0.0):
        """A step through asga.update: of SAM, or with bits of `asga.py transfer`; recorded on CUDA."""
        net = asga.quantize(self.model, bits, self.x) if bits else copy.deepcopy(self.model)
        for q in asga.quantizers_of(net)[1:2]:  # the first layer's input
            q.steps.requires_grad_(False)
        how = dict(rho_min=rho, rho_max=rho, alpha=0.0, adaptive=False, project=False, direction="perturbed")
        groups, more = asga.parameter_groups(net, 0.01, 1e-4), dict(momentum=0.9, fused=True)
        optimizer = asga.ASGA(groups, torch.optim.SGD, buffers=net.buffers(), **how, **more)
        guard, play = asga.step_guard(net), asga.Captured(self.device)

        def step():
            asga.cosine(optimizer, 0, 1)
            asga.update(net, optimizer, guard, play, self.x, self.y, F.cross_entropy, self.precision)
        return step

    def supernet(self, bits=asga.CANDIDATES, capture=True, **settings):
        """An asga.Search that never ends."""
        settings |= {"candidates_w": bits, "candidates_a": bits, "precision": self.precision}
        settings = asga.SearchSettings(steps=10 ** 6, **settings)
        plan = asga.plan(self.model, self.x[:1], "3bit", settings)
        return asga.Search(self.model, plan, settings, [self.x], capture=capture)

    def search(self, **settings):
        run = self.supernet(**settings)
        return lambda: run.step(self.x, self.y, 0)

def timed(step):
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else int
    synchronize()
    start = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - start

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
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))

def on_the_device(step):
    """{"launches", "kernels_ms", "python_ms"} of a step on CUDA."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    python = time.perf_counter() - start
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        timed(step)
    found = [event for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [event.time_range.elapsed_us() for event in found]
    return {"launches": len(kernels), "kernels_ms": sum(kernels) / 1e3, "python_ms": 1e3 * python}

def measure(bench, rounds):
    """{"samples", "peak_bytes", "ratios"} of all variants, after some rounds that do not count."""
    samples, ratios, device = {name: [] for name in bench.variants}, {}, {}
    if bench.device.type == "cuda":
        for name in asga.progress(bench.variants, "variants", len(bench.variants)):
            step = bench.make(name)
            samples[name] = [timed(step) for _ in range(rounds + 6)]
            device[name] = on_the_device(step)
            del step  # a recorded one holds all its memory
            gc.collect()
            torch.cuda.empty_cache()
    else:
        variants = {name: bench.make(name) for name in bench.variants}
        for _ in asga.progress(range(rounds + 6), "rounds", rounds + 6):
            for name, step in variants.items():
                samples[name].append(timed(step))
    samples = {name: times[6:] for name, times in samples.items()}
    memory = {name: peak_bytes(bench, name) for name in ("full_precision", "two_pass", "asga")}
    for name, (_, _, to) in bench.variants.items():
        if to:
            ratios[f"{name}_over_{to}"] = statistics.median(a / b for a, b in zip(samples[name], samples[to]))
        if name in memory:
            ratios[f"memory_{name}_over_full_precision"] = memory[name] / memory["full_precision"]
    return {"samples": samples, "peak_bytes": memory, "ratios": ratios, "on_cuda": device}

def show(results):
    """Markdown: a column for each network."""
    def milliseconds(times):
        return f"{1e3 * statistics.median(times):.1f} ({1e3 * min(times):.1f}-{1e3 * max(times):.1f})"

    steps, rows = [result for result in results if "ratios" in result], []
    made = set().union(*[r["samples"] for r in steps])
    for name in [name for name in (*VARIANTS, "two_pass_recorded", "asga_plain") if name in made]:
        times = [r["samples"].get(name, [math.nan]) for r in steps]
        rows.append([f"{name}, ms (range)", *map(milliseconds, times)])
    for name in dict.fromkeys(itertools.chain(*[r.get("on_cuda", {}) for r in steps])):
        for key in ("launches", "kernels_ms", "python_ms"):
            rows.append([f"{name}, {key}", *[f"{r['on_cuda'][name][key]:.1f}" for r in steps]])
    for name in dict.fromkeys(itertools.chain(*[r["ratios"] for r in steps])):
        rows.append([name, *[f"{r['ratios'].get(name, math.nan):.2f}" for r in steps]])
    print(table(["", *[f"{r['settings']['arch']}, {r['settings']['precision']}" for r in steps]], rows))

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", default="resnet18", help="as for asga.py")
    for name, default in (("resolution", 64), ("batch-size", 64), ("rounds", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--precision", default="float32", choices=["float32", "bf16"])
    parser.add_argument("--out", help="JSON with every sample")
    parser.add_argument("--table", nargs="+", metavar="FILE", help="show what --out wrote")
    args = parser.parse_args(argv)
    if args.table:
        return show([asga.read_json(name) for name in args.table])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = {"device": asga.describe(device), **asga.VERSIONS, "settings": vars(args)}
    result |= measure(Bench(args.arch, args.resolution, args.batch_size, args.precision, device), args.rounds)
    print(f"{result['device']}, torch {result['torch']}")
    show([result])
    if args.out:
        asga.write_json(args.out, result)

if __name__ == "__main__":
    run(main)
