"""Do the tests notice? Plants likely mistakes, one at a time, into a copy of asga.py's method and runs tests.

    python evidence/mutations.py              many seconds for each; exit code 1 where one goes unnoticed
    python evidence/mutations.py radius       those whose name contains "radius"

Each is tried on its group's tests first, and on the whole of test_asga.py where those notice nothing.
"""
import functools
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from shutil import copy, copytree

ROOT = Path(__file__).resolve().parent.parent
ALL = "not torchvision_family and not broken_image"  # slow, and about other things

# {tests of the group: {name: (text that occurs once in asga.py, what it becomes)}}
MUTATIONS = {
    "fake_quantize or interpolation or beyond_the_range or calibration or which_layers": {
        "quantizer: floor, not round": ("clamp(n[k], p[k]).round()", "clamp(n[k], p[k]).floor()"),
        "quantizer: half precisions stay half": ("wide = x.to(row.dtype)  #", "wide = x  #"),
        "quantizer: gradient beyond the bounds": ("inside = clamped == v", "inside = v == v"),
        "quantizer: ∂s of the wrong sign": ("(inside, level - v, level)", "(inside, v - level, level)"),
        "quantizer: no LSQ gradient scale": ("scale = pi[k] / (x.numel() * p[k]).sqrt()", "scale = pi[k]"),
        "quantizer: ∂π of the wrong sign": ("(values[k] - values[0])", "(values[0] - values[k])"),
        "mixture: λ for 1 − λ": ("[1 - share, share]", "[share, 1 - share]"),
        "mixture: looks down on a candidate": ("(b[:, 1:-1] <= beta)", "(b[:, 1:-1] < beta)"),
        "mixture: β beyond the last has no gradient": (
            "share.detach().clamp(0, 1) + (share - share.detach())", "share.clamp(0, 1)"),
        "calibration: sign of the last batch": ("any(negative)", "negative[-1]"),
        "calibration: no clamp in the error": ("round().clamp(n, p) * steps - few", "round() * steps - few"),
    },
    "original or multiplies or another_shape or which_layers or eval_changes or across_zero or macs_are": {
        "operands: inputs unquantized": ("self.layer.input_quantizer(named", "(named"),
        "operands: weights unquantized": ("self.layer.weight_quantizer(named", "(named"),
        "operands: other shapes too": ('named["weight"].shape == self.layer.operand_shape', "True"),
        "attach: the argument itself": ("    model = copy.deepcopy(model)\n", ""),
        "calibrate: training": ("evaluating(model):\n        for", "torch.no_grad():\n        for"),
        "step_guard: down to zero": ("_foreach_mul(self.before, 0.5)", "_foreach_mul(self.before, 0.0)"),
        "step_guard: not after the update": ("*error):\n        self.clamp()", "*error):\n        pass"),
    },
    "base_optimizer or quadratic or restored or counts or vanishing or draws or conflict or radius": {
        "ascend: α added": ("self.rho / self.norm, 0) - self.alpha", "self.rho / self.norm, 0) + self.alpha"),
        "ascend: no guard at ‖g‖ = 0": ("torch.where(self.norm > 0,", "torch.where(self.norm >= 0,"),
        "ascend: g shares the memory of .grad": ("p.grad = None  # g keeps", "pass  # g keeps"),
        "restore: buffers forgotten": ("torch._foreach_copy_(group, before)", "pass"),
        "restore: not where the closure raises": ("self.restore()\n            raise", "raise"),
        "projection: by ‖g‖, not ‖g‖²": ("dot / norm.square()", "dot / norm"),
        "projection: where both agree too": ("(dot < 0) & (norm > 0)", "(norm > 0)"),
        "direction: no mean": ("0.5 if mean else 1.0", "1.0"),
        "radius: ln h, not ln(1 + h)": ("torch.log1p(torch.as_tensor(gap)", "torch.log(torch.as_tensor(gap)"),
        "radius: no floor": (".clamp(rho_min, rho_max)", ".clamp(max=rho_max)"),
        "radius: −h": ("gap = perturbed_loss - self.loss", "gap = self.loss - perturbed_loss"),
        "one pass: though α is not 0": ("self.rho_max == self.alpha == 0", "self.rho_max == 0"),
        "dropout: the second pass draws anew": (
            "with torch.random.fork_rng([self.rho.device] * self.rho.is_cuda):", "if True:"),
    },
    "from_its_state or each_method or rates_momentum or best_of_all or search_lowers or fast_paths": {
        "state: radius forgotten": ('self.rho.copy_(state["rho"])', "pass"),
        "search: starts elsewhere than on the budget": ("self.write(budget.uniform())", "pass"),
        "search: no projection": ("self.write(self.budget.project(self.bits()))", "pass"),
        "search: statistics move in both passes": ("buffers=buffers, fused", "fused"),
        "search: the perturbation unguarded": ("guard.clamp()  # the", "pass  # the"),
        "search: the images' step is learned": ("images.steps.requires_grad_(len(images.bits) > 1)", "pass"),
        "policy: w and a exchanged": ("(i - w) ** 2 + (j - a) ** 2", "(i - a) ** 2 + (j - w) ** 2"),
    },
    "budget_units or budgets_that or projection_goes or start_is_uniform or knapsack": {
        "budget: bits of kept layers too": ("torch.where(self.kept,", "torch.where(self.kept & False,"),
        "budget: ∇ log C by the bits themselves": ("bits.flip(0) / bops", "bits / bops"),
        "budget: no bound pulls too": ("torch.where(self.limits < math.inf,", "torch.where(self.limits > 0,"),
        "budget: unspent stays": ("met = (self.spent(bits) - 1).abs()", "met = (self.spent(bits) - 1)"),
        "budget: activations that cost nothing fall": ("self.lo[1] = self.hi[1]", "pass"),
        "knapsack: without the dearest": ("while math.nextafter(found[0], 2) < fill:", "while False:"),
        "knapsack: of equal costs any": ("for key in (low, *cost.unbind(1))", "for key in cost.unbind(1)"),
        "knapsack: bound with all of the limit": ("torch.where(trial < 0, fill, 1.0)", "1.0"),
        "knapsack: a narrow sweep is a proof": ("[:width]], False", "[:width]], True"),
    },
    "replayed_equal and handmade": {
        "recorded: rates are numbers": ('group["lr"].fill_(group["base_lr"] * share)',
                                        'group["lr"] = group["base_lr"] * share'),
        "recorded: steps before, in new memory": ("torch._foreach_copy_(self.before, self.steps)",
                                                  "self.before = [s.clone() for s in self.steps]"),
        "recorded: always the first batch": ("torch._foreach_copy_(self.fixed, list(batch))", "pass"),
        "recorded: the row of the last step too": ("self.project).clone()", "self.project)"),
    },
    "step_sees or crops or larger_pictures or killed_search or stopped_command or agree_on_stopping": {
        "stream: each epoch in the same order": ("manual_seed(seed + epoch)", "manual_seed(seed)"),
        "stream: each step the same crops": ("manual_seed(seed + step)", "manual_seed(seed)"),
        "stream: every process the whole batch": ("else batch)[mine]", "else batch)[:]"),
        "stream: each epoch the same large crops": ("seed + epoch * count + number", "seed + number"),
        "stream: goes on with the epoch's start": ("indices(), start % count, None", "indices(), 0, None"),
        "resume: other draws": ('torch.set_rng_state(state["rng"])', "pass"),
        "stop: a late signal is forgotten": (
            "average([stopping])  #", "average([stopping]); self.stopping = stopping  #"),
        "resume: log not cut": ("splitlines(True)[:start]", "splitlines(True)"),
    },
    "an_export or batchnorm_goes or qonnx": {
        "export: a negative γ turns nothing": ("weight * factor.sign()", "weight * 1"),
        "export: integers that do not fit": ("torch.equal(turned, turned.clamp(*grid)) and ", ""),
        "export: biases beyond int32": (" and (moved / (fine * s_x)).abs().max() < 2 ** 31", ""),
        "export: BatchNorm with other readers": ("] == [F.batch_norm]", "][:1] == [F.batch_norm]"),
        "export: a shared layer as one": ("nn.Conv2d) and not others and", "nn.Conv2d) and"),
        "export: a shared BatchNorm as one": (' and len(self.readers[id(norm["bias"])]) == 1', ""),
        "export: the network keeps its biases": ("bias.add_(layer.bias_operand * s * s_x - shift)", "pass"),
        "export: signed inputs as unsigned": ("zero = 128 if n < 0 else 0  #", "zero = 0  #"),
        "export: inputs with the weights' bits": ("steps[0], q_x.grid[1:, 0]", "steps[0], q.grid[1:, 0]"),
        "export: a learned bound is lost": ("if n == 0 == low and high >= 0:", "if n == 0 == low:"),
        "export: one batch size": ('dynamic_axes=dict.fromkeys(names, {0: "batch"})', "dynamic_axes={}"),
    },
    "two_processes": {
        "processes: LSQ's scale of a slice": ("grad.mul_(size ** -0.5)", "pass"),
        "processes: gradients of one's own": (
            "average([loss, *(p.grad for p in net.parameters() if p.grad is not None)])", "average([loss])"),
        "processes: every one counts all": ("split(batch_size)[rank::size]", "split(batch_size)"),
        "processes: they stop apart": ("average([stopping])  #", "pass  #"),
    },
}

@functools.cache
def first_failure(folder, text, select):
    """The name of the first test that fails with this text as asga.py, or ""."""
    (folder / "asga.py").write_text(text)
    command = [sys.executable, *"-B -m pytest -x -q -p no:cacheprovider test_asga.py -k".split(), select]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    try:
        run = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=900)
    except subprocess.TimeoutExpired:
        return "a test that hangs"
    failed = re.findall(r"^FAILED test_asga.py::(\w+)", run.stdout, re.MULTILINE)
    return "".join(failed) or (f"pytest, code {run.returncode}" if run.returncode else "")

def main(word):
    source, began, unnoticed = (ROOT / "asga.py").read_text(), time.monotonic(), 0
    chosen = [(select, name, *change) for select, group in MUTATIONS.items()
              for name, change in group.items() if word in name]
    for _, name, old, _ in chosen:
        if source.count(old) != 1:
            sys.exit(f"{name}: asga.py has {source.count(old)} times {old!r}")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        copy(ROOT / "test_asga.py", folder)
        copytree(ROOT / "data", folder / "data")

        for select, name, old, new in chosen:
            for tests in (select, ALL):
                if found := first_failure(folder, source, tests):
                    sys.exit(f"{found} fails without any mistake")
                if found := first_failure(folder, source.replace(old, new), tests):
                    break
            unnoticed += not found
            print(f"{'noticed' if found else 'UNNOTICED':10}{name:47}{found}", flush=True)
    print(f"{len(chosen)} mistakes, {unnoticed} unnoticed, {time.monotonic() - began:.0f} s")
    return 1 if unnoticed or not chosen else 0

if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else ""))
