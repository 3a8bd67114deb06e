"""Do the tests notice? Plants likely mistakes, one at a time, into a copy of asga.py's method and runs tests.

    python evidence/mutations.py              a few seconds for each; exit code 1 where one goes unnoticed
    python evidence/mutations.py radius       those whose name contains "radius"

Each is tried on its group's tests first, and on the whole of test_asga.py where those notice nothing.
"""
import contextlib
import functools
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from shutil import copy, copytree

import hypothesis.strategies  # noqa: F401  imported once, for all children
import pytest
import torch
import torch.utils.flop_counter

ROOT = Path(__file__).resolve().parent.parent
ALL = "not torchvision_family and not broken_image"  # slow, and about other things

# {tests of the group: {name: (text that occurs once in asga.py, what it becomes)}}
MUTATIONS = {
    "fake_quantize or interpolation or beyond_the_range or calibration or which_layers": {
        "quantizer: floor, not round": ("clamp(n[k], p[k]).round()", "clamp(n[k], p[k]).floor()"),
        "quantizer: half precisions stay half": ("wide = x.to(row.dtype)  #", "wide = x  #"),
        "quantizer: gradient beyond the bounds": ("inside = clamped == v", "inside = v == v"),
        "quantizer: none on the bounds": ("inside = clamped == v", "inside = (v > n[k]) & (v < p[k])"),
        "quantizer: ∂s of the wrong sign": ("(inside, level - v, level)", "(inside, v - level, level)"),
        "quantizer: no LSQ gradient scale": ("scale = pi[k] / (x.numel() * p[k]).sqrt()", "scale = pi[k]"),
        "quantizer: ∂π of the wrong sign": ("(values[k] - values[0])", "(values[0] - values[k])"),
        "mixture: λ for 1 − λ": ("[1 - share, share]", "[share, 1 - share]"),
        "mixture: looks down on a candidate": ("(b[:, 1:-1] <= beta)", "(b[:, 1:-1] < beta)"),
        "mixture: β beyond the last has no gradient": (
            "share.detach().clamp(0, 1) + (share - share.detach())", "share.clamp(0, 1)"),
        "mixture: a step below 0 has no gradient": (
            "s.detach().clamp_min(STEP_MIN) + (s - s.detach())", "s.clamp_min(STEP_MIN)"),
        "calibration: sign of the last batch": ("self.set_signed(any(negative))",
                                                "self.set_signed(negative[-1])"),
        "calibration: no clamp in the error": ("round().clamp(n, p) * steps - few", "round() * steps - few"),
    },
    "original or multiplies or another_shape or which_layers or eval_changes or across_zero or macs_are": {
        "operands: inputs unquantized": ("self.layer.input_quantizer(named", "(named"),
        "operands: weights unquantized": ("self.layer.weight_quantizer(named", "(named"),
        "operands: products of other shapes too": (
            'if named["weight"].shape == self.layer.operand_shape:', "if True:"),
        "attach: the argument itself": ("    model = copy.deepcopy(model)\n", ""),
        "attach: fused layers go past it": ("set_fastpath_enabled(False)", "set_fastpath_enabled(True)"),
        "calibrate: in training mode": ("        with evaluating(model):\n            for batch",
                                        "        with torch.no_grad():\n            for batch"),
        "step_guard: down to zero": ("torch._foreach_mul(before, 0.5)", "torch._foreach_mul(before, 0.0)"),
    },
    "base_optimizer or quadratic or restored or counts or vanishing or draws or conflict or radius": {
        "ascend: α added": ("self.rho / self.norm, 0) - self.alpha", "self.rho / self.norm, 0) + self.alpha"),
        "ascend: no guard at ‖g‖ = 0": ("torch.where(self.norm > 0, self.rho / self.norm, 0)",
                                        "self.rho / self.norm"),
        "ascend: g shares the memory of .grad": ("p.grad = None  # g keeps", "pass  # g keeps"),
        "restore: θ moved back, not copied": (
            "torch._foreach_copy_(self.params, self.theta)",
            "torch._foreach_sub_(self.params, torch._foreach_mul(self.g, self.rho / self.norm))"),
        "restore: buffers forgotten": ("buffer.copy_(before)", "pass"),
        "restore: not where the closure raises": ("            self.restore()\n            raise",
                                                  "            raise"),
        "projection: by ‖g‖, not ‖g‖²": ("dot / norm.square()", "dot / norm"),
        "projection: where both agree too": ("(dot < 0) & (norm > 0)", "(norm > 0)"),
        "direction: no mean": ("0.5 if mean else 1.0", "1.0"),
        "radius: ln h, not ln(1 + h)": ("torch.log1p(torch.as_tensor(gap)", "torch.log(torch.as_tensor(gap)"),
        "radius: no floor": (".clamp(rho_min, rho_max)", ".clamp(max=rho_max)"),
        "radius: −h": ("gap = perturbed_loss - self.loss", "gap = self.loss - perturbed_loss"),
        "one pass: though α is not 0": ("self.rho_max == self.alpha == 0", "self.rho_max == 0"),
        "dropout: the second pass draws anew": ("with torch.random.fork_rng(devices):", "if True:"),
    },
    "from_its_state or each_method or rates_momentum or best_of_all or search_lowers or fast_paths": {
        "state: radius forgotten": ('self.rho.copy_(state["rho"])', "pass"),
        "state: groups no longer shared": (
            '("state", "param_groups")})\n        self.param_groups, self.state = ',
            '("state", "param_groups")})\n        _ = '),
        "search: starts elsewhere than on the budget": ("self.write(budget.uniform())", "pass"),
        "search: no projection": ("self.write(self.budget.project(self.bits()))", "pass"),
        "search: statistics move in both passes": ("buffers=buffers, **chosen", "**chosen"),
        "search: steps unguarded": (
            "with step_guard(self.net) as clamp:", "with contextlib.nullcontext(lambda: None) as clamp:"),
        "search: the perturbation unguarded": ("clamp()  # the perturbation", "pass  # the perturbation"),
        "search: the images' step is learned": ("images.steps.requires_grad_(len(images.bits) > 1)", "pass"),
        "policy: w and a exchanged": ("(i - w) ** 2 + (j - a) ** 2", "(i - a) ** 2 + (j - w) ** 2"),
    },
    "budget_units or budgets_that or projection_goes or start_is_uniform or knapsack": {
        "budget: bits of kept layers too": ("torch.where(self.kept, self.lo, number)",
                                            "torch.full_like(self.lo, number)"),
        "budget: ∇ log C by the bits themselves": ("bits.flip(0) / bops", "bits / bops"),
        "budget: a bound that is none pulls too": (
            "torch.where(self.limits < math.inf, self.cost(bits), math.inf)", "self.cost(bits)"),
        "budget: two rounds": ("for _ in range(7):", "for _ in range(2):"),
        "budget: unspent stays": ("met = (self.spent(bits) - 1).abs()", "met = (self.spent(bits) - 1)"),
        "budget: activations that cost nothing fall": ("self.lo[1] = self.hi[1]", "pass"),
        "knapsack: without the dearest": ("while math.nextafter(found[0], 2) < fill:", "while False:"),
        "knapsack: of equal costs any": ("for key in (low, *cost.unbind(1))", "for key in cost.unbind(1)"),
        "knapsack: bound with all of the limit": ("torch.where(trial < 0, fill, 1.0)", "1.0"),
        "knapsack: a narrow sweep is a proof": ("argsort(stable=True)[:width]], False",
                                                "argsort(stable=True)[:width]], True"),
    },
    "step_sees or crops or killed_search or stopped_command": {
        "stream: each epoch in the same order": ("manual_seed(seed + epoch)", "manual_seed(seed)"),
        "stream: each step the same crops": ("manual_seed(seed + step)", "manual_seed(seed)"),
        "stream: goes on with the epoch's start": ("indices(), start % count, None", "indices(), 0, None"),
        "augment: never the last crop": ("torch.randint(2 * pad + 1, ", "torch.randint(2 * pad, "),
        "resume: other draws": ('torch.set_rng_state(state["rng"])', "pass"),
        "resume: log not cut": ("splitlines(True)[:start]", "splitlines(True)"),
        "resume: seconds from zero": ('return state["step"], state["seconds"]', 'return state["step"], 0.0'),
    },
}

class Failures(list):
    """The pytest plugin that lists the tests that failed."""

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.append(report.nodeid.partition("::")[2].partition("[")[0])

    def pytest_collectreport(self, report):
        if report.failed:
            self.append("at import")

def first_failure(folder, select):
    """The name of the first test that fails, or "". In a child: imports of torch would take all the time."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(900)  # a mistake may hang
        os.chdir(folder)
        sys.path.insert(0, folder)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        failures = Failures()
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "test_asga.py", "-k", select], [failures])
        os.write(writer, (failures or ["" if code == 0 else f"pytest itself: {code!r}"])[0].encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        found = pipe.read()
    return found if os.waitpid(child, 0)[1] == 0 else "the process died"

def main(word):
    source, began, count, unnoticed = (ROOT / "asga.py").read_text(), time.monotonic(), 0, 0
    chosen = {select: {name: change for name, change in group.items() if word in name}
              for select, group in MUTATIONS.items()}
    for name, (old, _) in (item for group in chosen.values() for item in group.items()):
        if source.count(old) != 1:
            sys.exit(f"{name}: asga.py has {source.count(old)} times {old!r}")
    torch.set_num_threads(1)
    sys.path.insert(0, str(ROOT))
    with contextlib.suppress(Exception):
        __import__("asga").import_torchvision()
    sys.modules.pop("asga")
    with tempfile.TemporaryDirectory() as folder:
        copy(ROOT / "test_asga.py", folder)
        copytree(ROOT / "data", Path(folder) / "data")

        def write(text):
            (Path(folder) / "asga.py").write_text(text)
            for stale in Path(folder).glob("__pycache__/asga.*"):
                stale.unlink()

        @functools.cache
        def check(select):
            """The tests themselves must pass."""
            write(source)
            if found := first_failure(folder, select):
                sys.exit(f"{found} fails without any mistake")

        for select, group in chosen.items():
            for name, (old, new) in group.items():
                found = ""
                for tests in (select, ALL):
                    if not found:
                        check(tests)
                        write(source.replace(old, new))
                        found = first_failure(folder, tests)
                count, unnoticed = count + 1, unnoticed + (not found)
                print(f"{'noticed' if found else 'UNNOTICED':10}{name:47}{found or ''}", flush=True)
    print(f"{count} mistakes, {unnoticed} unnoticed, {time.monotonic() - began:.0f} s")
    return 1 if unnoticed or not count else 0

if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else ""))
