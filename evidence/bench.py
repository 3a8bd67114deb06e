"""What a step of asga.py costs, beside full precision.

    python evidence/bench.py --out results/bench/resnet18.json                      # times, shares, compile time, memory; 3 minutes on 2 cores
    python evidence/bench.py --arch mobilenet_v2 --out results/bench/mobilenet_v2.json
    python evidence/bench.py --growth --out results/bench/growth.json               # cost over candidates, batch, resolution, depth
    python evidence/bench.py --knapsack                                             # time of the exact knapsack
    python evidence/bench.py --table results/bench/*.json                           # the README's table

All variants run in this process, one after the other within each round, on the same random batch, after warm-up and synchronized on
CUDA; a ratio is the median over rounds of the ratio within a round. two_pass is SAM in full precision, written here without asga.py:
forward, backward, perturb, forward, backward, restore, SGD. Memory counts what torch's allocator held at most: the variant's own
parameters, buffers and optimizer state, and what the step added to them.
"""
import argparse
import contextlib
import copy
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import asga  # noqa: E402

THREE, TWELVE = (2, 4, 8), tuple(range(2, 14))


class Bench:
    """Variants of a step on one network and batch; each is a function without arguments."""

    def __init__(self, arch, resolution, batch_size, classes, candidates, precision, device):
        self.resolution, self.candidates, self.precision, self.device = resolution, candidates, precision, device
        torch.manual_seed(0)
        self.model = asga.build(arch, classes).to(device, memory_format=torch.channels_last)
        self.x = torch.randn(batch_size, 3, resolution, resolution, device=device).contiguous(memory_format=torch.channels_last)
        self.y = torch.randint(classes, (batch_size,), device=device)

    def loss(self, model):
        return asga.forward_loss(model, self.x, self.y, F.cross_entropy, self.precision)

    def full_precision(self, passes=1, rho=0.05):
        """A step of SGD; with two passes, of SAM."""
        model = copy.deepcopy(self.model).train()
        params = list(model.parameters())
        optimizer = torch.optim.SGD(asga.parameter_groups(model, 0.01, 1e-4), lr=0.01, momentum=0.9)

        def step():
            optimizer.zero_grad()
            self.loss(model).backward()
            if passes == 2:
                with torch.no_grad():
                    grads = [p.grad for p in params]
                    scale = rho / torch.nn.utils.get_total_norm(grads)
                    backup = [p.clone() for p in params]
                    torch._foreach_add_(params, torch._foreach_mul(grads, scale))
                    del grads
                optimizer.zero_grad()
                self.loss(model).backward()
                with torch.no_grad():
                    torch._foreach_copy_(params, backup)
            optimizer.step()

        step.holds = model, optimizer, []
        return step

    def search(self, candidates=None, quantizers=True, learn_image_step=False, **settings):
        """asga.Search.step, of a search that never ends."""
        candidates = candidates or self.candidates
        chosen = asga.SearchSettings(candidates_w=candidates, candidates_a=candidates, steps=10 ** 6, precision=self.precision, **settings)
        spec = f"{candidates[0]}bit" if len(candidates) == 1 else "3bit"
        run = asga.Search(self.model, *asga.plan(self.model, self.x[:1], spec, chosen), chosen, [self.x])
        asga.set_quantizers(run.net, quantizers)
        for layer in asga.quantized_layers(run.net).values():
            layer.learn_image_step = learn_image_step

        def step():
            run.step(self.x, self.y, F.cross_entropy, 0)

        step.run, step.holds = run, (run.net, run.optimizer, run.optimizer.backup)
        return step

    def transfer(self):
        """A step of quantization-aware tuning, as asga.Job.tune does it, of a policy with one bitwidth a tensor."""
        run = self.search(method="uniform").run
        net = asga.attach_quantizers(run.net, run.policy().choices)
        asga.set_training(net)
        optimizer = torch.optim.SGD(asga.parameter_groups(net, 0.01, 1e-4), lr=0.01, momentum=0.9, nesterov=True)
        guard, prepared = asga.StepGuard(net), asga.Prepared(net)

        def step():
            net.train()
            optimizer.zero_grad()
            with prepared:
                self.loss(net).backward()
            with guard:
                optimizer.step()

        step.holds = net, optimizer, []
        return step

    def evaluation(self, quantized):
        run = self.search(method="uniform").run
        net = asga.attach_quantizers(run.net, run.policy().choices) if quantized else copy.deepcopy(self.model)
        prepared = asga.Prepared(net.eval())

        def step():
            with torch.no_grad(), prepared:
                self.loss(net)

        step.holds = net, None, []
        return step

    def arithmetic(self):
        """(seconds of a search step whose passes cost nothing, seconds of the base optimizer in it): what is left is the
        optimizer's own: perturb, restore, combine, the guard of the steps, the budget's projection, the log's record."""
        run = self.search().run
        run.step(self.x, self.y, F.cross_entropy, 0)
        params = [p for group in run.optimizer.param_groups for p in group["params"] if p.grad is not None]
        for group in run.optimizer.param_groups:
            group["base_lr"] = 0.0
        stored, calls = [[torch.randn_like(p) * 1e-3 for p in params] for _ in range(2)], [0]

        def give(_):
            calls[0] += 1
            for p, g in zip(params, stored[calls[0] % 2]):
                p.grad = g

        def loss(out, y):
            value = torch.zeros((), device=self.device, requires_grad=True)
            value.register_hook(give)
            return value

        run.net, run.prepared = torch.nn.Identity(), contextlib.nullcontext()
        run.net.place = torch.nn.Parameter(torch.zeros((), device=self.device))                     # says on which device it is
        return (lambda: run.step(self.x, self.y, loss, 0)), run.optimizer.base.step


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(variants, rounds, device, warm=3):
    """{name: [seconds]} of `rounds` rounds, each of which runs every variant once."""
    samples = {name: [] for name in variants}
    progress = asga.Progress("rounds", rounds + warm)
    for r in range(rounds + warm):
        for name, step in variants.items():
            synchronize(device)
            start = time.perf_counter()
            step()
            synchronize(device)
            if r >= warm:
                samples[name].append(time.perf_counter() - start)
        progress.show(r + 1)
    return samples


def ratio(samples, one, other, factor=1.0):
    """Median over rounds of one/other."""
    return statistics.median(a / (factor * b) for a, b in zip(samples[one], samples[other]))


def peak_bytes(step, device):
    """The most bytes in use during a step: those that the variant holds between steps, and what the step adds."""
    model, optimizer, more = step.holds
    if optimizer:
        optimizer.zero_grad()
    state = [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)] if optimizer else []
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in [*model.parameters(), *model.buffers(), *state, *(step.run.optimizer.backup if hasattr(step, "run") else more)]}
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        synchronize(device)
        return sum(held.values()) + torch.cuda.max_memory_allocated(device) - before
    quiet, kept = os.open(os.devnull, os.O_WRONLY), os.dup(2)                  # the profiler prints to stderr
    os.dup2(quiet, 2)
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            step()
    finally:
        os.dup2(kept, 2)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return sum(held.values()) + most


def first_step(bench):
    """{"first", "later"}: seconds of the first ASGA step of a process, compilation included, and of a later one."""
    step, times = bench.search(), []
    for _ in range(4):
        start = time.perf_counter()
        step()
        synchronize(bench.device)
        times.append(time.perf_counter() - start)
    return {"first": times[0], "later": statistics.median(times[2:])}


def compile_times(arguments):
    """Seconds that compilation adds to the first step: in a process with an empty cache, and in a second one."""
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor", "TRITON_CACHE_DIR": f"{cache}/triton"}
        found = {}
        for name in ("cold", "warm"):
            out = subprocess.run([sys.executable, __file__, *arguments, "--first-step"], env=env, capture_output=True, text=True)
            if out.returncode:
                raise asga.AsgaError(f"the process that times compilation failed: {out.stderr.splitlines()[-1]}; --no-compile-times")
            times = json.loads(out.stdout.splitlines()[-1])
            found[name] = times["first"] - times["later"]
    return found


def knapsack_times(draws=5):
    """{network: [seconds]} of the exact knapsack over 36 choices a layer, for random β within the budget of 3 bit."""
    found = {}
    for arch in ("resnet50", "mobilenet_v2"):
        settings = asga.SearchSettings()
        budget, kept = asga.plan(asga.build(arch, 1000), torch.zeros(1, 3, 224, 224), "3bit", settings)
        found[arch] = []
        for seed in range(draws):
            beta = budget.project(2 + 6 * torch.rand(2, len(budget.names), generator=torch.Generator().manual_seed(seed)))
            choices = [[(kept[n],)] * 2 if n in kept else [asga.CANDIDATES] * 2 for n in budget.names]
            penalties = [{(w, a): float((w - bw) ** 2 + (a - ba) ** 2) for w in ws for a in as_}
                         for (ws, as_), bw, ba in zip(choices, *beta)]
            start = time.perf_counter()
            budget.choose(penalties)
            found[arch].append(time.perf_counter() - start)
    return found


def measure(bench, rounds):
    """The main table's numbers."""
    variants = {"full_precision": bench.full_precision(), "two_pass": bench.full_precision(2), "joint": bench.search(method="joint"),
                "asga": bench.search(), "asga_quantizers_off": bench.search(quantizers=False),
                "asga_image_step_learned": bench.search(learn_image_step=True),
                "asga_recompute": bench.search(recompute=True), "asga_3_candidates": bench.search(THREE),
                "asga_12_candidates": bench.search(TWELVE), "transfer": bench.transfer(),
                "evaluate_full_precision": bench.evaluation(False), "evaluate_quantized": bench.evaluation(True)}
    variants["optimizer_alone"], variants["base_optimizer"] = bench.arithmetic()
    samples = interleaved(variants, rounds, bench.device)
    own = [(a - b) / c for a, b, c in zip(samples["optimizer_alone"], samples["base_optimizer"], samples["asga"])]
    memory = {name: peak_bytes(step, bench.device) for name, step in variants.items() if hasattr(step, "holds")}
    ratios = {
        "asga_over_two_pass": ratio(samples, "asga", "two_pass"),
        "asga_over_twice_full_precision": ratio(samples, "asga", "full_precision", 2),
        "asga_recompute_over_two_pass": ratio(samples, "asga_recompute", "two_pass"),
        "asga_image_step_learned_over_two_pass": ratio(samples, "asga_image_step_learned", "two_pass"),
        "joint_over_full_precision": ratio(samples, "joint", "full_precision"),
        "transfer_over_full_precision": ratio(samples, "transfer", "full_precision"),
        "evaluation_over_full_precision": ratio(samples, "evaluate_quantized", "evaluate_full_precision"),
        "candidates_12_over_3": ratio(samples, "asga_12_candidates", "asga_3_candidates"),
        "optimizer_share": statistics.median(own),
        "quantizer_share": 1 - ratio(samples, "asga_quantizers_off", "asga"),
        "memory_asga_over_full_precision": memory["asga"] / memory["full_precision"],
        "memory_asga_recompute_over_full_precision": memory["asga_recompute"] / memory["full_precision"],
        "memory_two_pass_over_full_precision": memory["two_pass"] / memory["full_precision"],
        "memory_transfer_over_full_precision": memory["transfer"] / memory["full_precision"]}
    return {"samples": samples, "peak_bytes": memory, "ratios": ratios}


def growth(args, make, rounds):
    """[row] of the cost over candidates, batch, resolution and depth, one of them changed at a time."""
    changes = [("candidates", {"candidates": c}) for c in ((4,), THREE, (2, 3, 4, 5, 6, 8), TWELVE)]
    changes += [("batch", {"batch_size": b}) for b in (args.batch_size // 2, args.batch_size, args.batch_size * 2)]
    changes += [("resolution", {"resolution": r}) for r in (32, 64, 96)]
    changes += [("depth", {"arch": a}) for a in ("resnet18", "resnet34", "resnet50")]
    rows = []
    for what, change in changes:
        bench = make(**change)
        samples = interleaved({"full_precision": bench.full_precision(), "two_pass": bench.full_precision(2), "asga": bench.search()},
                              rounds, bench.device)
        value = next(iter(change.values()))
        rows.append({"what": what, "value": len(value) if what == "candidates" else value, "samples": samples,
                     "asga_over_two_pass": ratio(samples, "asga", "two_pass")})
        print(f"{what:11} {rows[-1]['value']!s:>9}   two passes {1e3 * statistics.median(samples['two_pass']):8.1f} ms   "
              f"asga {1e3 * statistics.median(samples['asga']):8.1f} ms   ratio {rows[-1]['asga_over_two_pass']:.3f}", flush=True)
    return rows


def show(result, batch_size):
    """The table for people."""
    rows = []
    for name, times in result["samples"].items():
        middle = statistics.median(times)
        rows.append((name, f"{1e3 * middle:.1f}", f"{1e3 * min(times):.1f}-{1e3 * max(times):.1f}",
                     f"{batch_size / middle:.0f}" if name in result["peak_bytes"] else "",
                     f"{result['peak_bytes'][name] / 2 ** 20:.0f}" if name in result["peak_bytes"] else ""))
    print(asga.table(rows, ("variant", "median ms", "range", "images/s", "peak MiB")))
    print()
    print(asga.table([(name, f"{value:.3f}") for name, value in result["ratios"].items()], ("ratio", "")))


def readme_table(files):
    """The README's tables as Markdown: one column for each result, then the growth."""
    try:
        results = [json.loads(Path(f).read_text()) for f in files]
    except (OSError, ValueError) as error:
        raise asga.AsgaError(f"--table takes files that --out wrote: {error}")
    row = lambda name, cells: print("| " + " | ".join([name, *cells]) + " |")
    milliseconds = lambda times: f"{1e3 * statistics.median(times):.0f} ({1e3 * min(times):.0f}-{1e3 * max(times):.0f})"
    steps = [r for r in results if "ratios" in r]
    if steps:
        row("", [f"{r['settings']['arch']}, {r['settings']['precision']}" for r in steps])
        row("---", ["---"] * len(steps))
        for name in ("full_precision", "two_pass", "joint", "asga", "transfer"):
            row(f"{name}, ms (range)", [milliseconds(r["samples"][name]) for r in steps])
        for name in steps[0]["ratios"]:
            row(name, [f"{100 * r['ratios'][name]:.1f} %" if "share" in name else f"{r['ratios'][name]:.2f}" for r in steps])
        for name in ("cold", "warm"):
            row(f"compile, {name}, s", [f"{r['compile'][name]:.1f}" if "compile" in r else "" for r in steps])
    for result in (r for r in results if "growth" in r):
        print()
        row("changed", ["to", "two passes, ms (range)", "ASGA step, ms (range)", "ratio"])
        row("---", ["---"] * 4)
        for entry in result["growth"]:
            row(entry["what"], [str(entry["value"]), *(milliseconds(entry["samples"][name]) for name in ("two_pass", "asga")),
                                f"{entry['asga_over_two_pass']:.2f}"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", default="resnet18", help="resnet20, a torchvision model, or file.py:function")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--candidates", default=",".join(map(str, asga.CANDIDATES)))
    parser.add_argument("--precision", default="float32", choices=["float32", "bf16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", default="", help="JSON with every sample")
    parser.add_argument("--growth", action="store_true", help="cost over candidates, batch, resolution and depth instead")
    parser.add_argument("--knapsack", action="store_true", help="time of the knapsack instead")
    parser.add_argument("--no-compile-times", action="store_true", help="leave out the two processes that time compilation")
    parser.add_argument("--first-step", action="store_true", help="what those processes do")
    parser.add_argument("--table", nargs="+", metavar="FILE", help="print the README's table from results")
    args = parser.parse_args()
    if args.table:
        return readme_table(args.table)
    device = asga.pick_device(args.device)
    for name in ("resolution", "batch_size", "classes", "rounds"):
        if getattr(args, name) < 1:
            raise asga.AsgaError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    try:
        candidates_given = asga.check_bits([int(b) for b in args.candidates.split(",")])
    except ValueError as error:
        raise asga.AsgaError(f"--candidates {args.candidates!r}: give bitwidths like 2,3,4 ({error})")

    def make(arch=args.arch, resolution=args.resolution, batch_size=args.batch_size, candidates=None):
        return Bench(arch, resolution, batch_size, args.classes, candidates or candidates_given, args.precision, device)

    result = {"command": " ".join(["python", "evidence/bench.py", *sys.argv[1:]]), "device": asga.describe(device), "torch": torch.__version__,
              "threads": torch.get_num_threads(), "python": platform.python_version(), "settings": {k: v for k, v in vars(args).items() if k not in ("out", "table")}}
    if args.first_step:
        print(json.dumps(first_step(make())))
        return
    print(f"{result['device']}, torch {result['torch']}: {args.arch}, {args.resolution} px, batch {args.batch_size}, "
          f"{args.precision}\n")
    if args.knapsack:
        result["knapsack"] = knapsack_times()
        for arch, times in result["knapsack"].items():
            print(f"knapsack {arch}: median {statistics.median(times):.2f} s, most {max(times):.2f} s of {len(times)}")
    elif args.growth:
        result["growth"] = growth(args, make, args.rounds)
    else:
        result.update(measure(make(), args.rounds))
        if asga.Fused.on and not args.no_compile_times:
            result["compile"] = compile_times([f"--{k.replace('_', '-')}={getattr(args, k)}" for k in
                                               ("arch", "resolution", "batch_size", "classes", "candidates", "precision", "device")])
        show(result, args.batch_size)
        if "compile" in result:
            print(f"\ncompilation adds to the first step {result['compile']['cold']:.1f} s, with a full cache {result['compile']['warm']:.1f} s")
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        asga.write_atomic(args.out, lambda part: part.write_text(json.dumps(result) + "\n"))


if __name__ == "__main__":
    try:
        main()
    except asga.AsgaError as error:
        print(f"bench: error: {error}", file=sys.stderr)
        sys.exit(2)
