"""Does test_asga.py notice? Plants one likely mistake at a time into a copy of asga.py and runs the tests until one fails.

    python evidence/mutations.py            about 20 s a mistake on 2 cores, some a minute; exit code 1 where one goes unnoticed
    python evidence/mutations.py radius     only those whose name contains "radius"
"""
import subprocess
import sys
import tempfile
from pathlib import Path
from shutil import copy, copytree

ROOT = Path(__file__).resolve().parent.parent
# name: (text in asga.py, occurring once; what it becomes)
MUTATIONS = {
    "projection: sign flipped": ("share - against))", "share + against))"),
    "projection: always": ("torch.where(conflict & self.project, dot / square, 0)", "torch.where(square > 0, dot / square, 0) * self.project"),
    "projection: by ‖g‖, not ‖g‖²": ("torch.where(conflict & self.project, dot / square, 0)", "torch.where(conflict & self.project, dot / square.sqrt(), 0)"),
    "radius: floor removed": (".clamp(rho_min, rho_max)", ".clamp(max=rho_max)"),
    "radius: log of h, not of 1 + h": ("torch.log1p(gap.clamp(min=0))", "torch.log(gap.clamp(min=0))"),
    "radius: NaN kept": ("torch.where(rho.isnan(), rho_min, rho)", "rho"),
    "radius: gap of the wrong sign": ("gap = perturbed_loss - loss ", "gap = loss - perturbed_loss "),
    "ascent: alpha added": ("torch.where(norm > 0, rho / norm, 0) - self.alpha", "torch.where(norm > 0, rho / norm, 0) + self.alpha"),
    "ascent: no guard at zero": ("torch.where(norm > 0, rho / norm, 0)", "rho / norm"),
    "ascent: opted-out groups too": ('if group.get("perturb", True) for p in group["params"] if p in grad]', 'for p in group["params"] if p in grad]'),
    "restore: subtracts instead of copying": ("torch._foreach_copy_(moved, self.backup)", "torch._foreach_sub_(moved, torch._foreach_mul([grad[p] for p in moved], scale))"),
    "restore: not when the closure raises": ("        finally:\n            torch._foreach_copy_(moved", "        except ZeroDivisionError:\n            pass\n        else:\n            torch._foreach_copy_(moved"),
    "direction: g_p alone": ('share = 1.0 if self.direction == "mean" else 0.0', "share = 0.0"),
    "dropout: new draws in the second pass": ("                torch.set_rng_state(cpu)\n", ""),
    "BatchNorm: not frozen": ("                    buffer.copy_(before)\n", ""),
    "BatchNorm: assigned buffers not put back": ("                    module._buffers[name] = buffer\n", ""),
    "state: radius forgotten": ('self.rho = state_dict["rho"].clone()', "pass"),
    "quantizer: clip off by one": ("low + 2 ** b - 1]", "low + 2 ** b]"),
    "quantizer: floor, not round": ("(wide / s[k]).clamp(n[k], p[k]).round()", "(wide / s[k]).clamp(n[k], p[k]).floor()"),
    "quantizer: gradient passes everywhere": ("inside = clamped == v", "inside = v.abs() >= 0"),
    "quantizer: open at the bounds": ("inside = clamped == v", "inside = (v > n[k]) & (v < p[k])"),
    "quantizer: no LSQ gradient scale": ("scale = pi[k] / (x.numel() * p[k].clamp_min(1)).sqrt()", "scale = pi[k]"),
    "quantizer: step gradient without its mixture weight": ("scale = pi[k] / (x.numel()", "scale = 1 / (x.numel()"),
    "quantizer: λ reversed": ("torch.cat([1 - share, share], 1)", "torch.cat([share, 1 - share], 1)"),
    "quantizer: β not clamped": ("share = share + (share.clamp(0, 1) - share).detach()", "share = share"),
    "quantizer: activations always signed": ("self.set_signed(self.negative)", "self.set_signed(True)"),
    "calibration: overwrites steps": ("if self.steps.isnan().any():", "if True:"),
    "quantizer: steps cross zero": ("torch._foreach_maximum_(self.steps, torch._foreach_mul(self.before, 0.5))", "pass"),
    "budget: single candidates taken for edge layers": ("torch.where(self.kept, self.lo, number)", "torch.where(self.lo < self.hi, number, self.lo)"),
    "compiled: wrong layout": ("return t.as_strided(x.shape, x.stride())", "return t.view(x.shape)"),
    "supernet: activations unquantized": ("quantized = layer.input_quantizer(x)", "quantized = x"),
    "supernet: nested layers twice": ("        with torch._C.DisableTorchFunction():                  #", "        if True:                  #"),
    "supernet: weights read in training": ("    with _evaluating(model):\n        for name, (w, a)", "    if True:\n        for name, (w, a)"),
    "supernet: layers that multiply otherwise pass": ("if not operands.used and", "if False and"),
    "supernet: original changed": ("    model = _copy(model)\n    found = layers_of(model)\n    with", "    found = layers_of(model)\n    with"),
    "supernet: fused transformers": ("        layer.register_forward_pre_hook(_own_forward)\n", ""),
    "supernet: mode not put back": ("            m.training = training", "            m.training = True"),
    "quantizer: step not clamped": ("s.clamp_min_(STEP_MIN)", "pass"),
    "quantizer: gradient of π of the wrong sign": ("(g * (level - levels[0])).sum()", "(g * (levels[0] - level)).sum()"),
    "prepared: rows stay": ("        for q in self.quantizers:\n            q.row = None\n", ""),
    "prepared: idle layers get zeros": ("            for p in idle:\n                p.grad = None\n", ""),
    "prepared: copies keep rows": ('return {**self.__dict__, "row": None}', "return self.__dict__"),
    "prepared: one kind for all": ("kind = len(q.bits), q.relaxation, q.tau, q.steps.device, q.steps.dtype, q.steps.requires_grad", "kind = len(q.bits)"),
    "prepared: uncalibrated too": ("            if q.ready:\n", "            if True:\n"),
    "recompute: nothing": ("if layer.recompute and Recomputed.possible() else", "if False else"),
    "recompute: always": ("if layer.recompute and Recomputed.possible() else", "if Recomputed.possible() else"),
    "recompute: inside checkpoints": ("if layer.recompute and Recomputed.possible() else", "if layer.recompute else"),
    "recompute: weights for activations": ("(q.data_ptr(), q.numel()): q.grad_fn for q in operands", "(q.data_ptr(), q.numel()): operands[-1].grad_fn for q in operands"),
    "recompute: transposed operands as they were": (".as_strided(shape, stride)", ".view(shape)"),
    "step waits: index by a number": ("left, right = t[torch.stack([(first - 1).clamp_min(0), first])]", "left, right = t[(first - 1).clamp_min(0)], t[first]"),
    "step waits: radius read": ("scale = torch.where(norm > 0, rho / norm, 0) - self.alpha", "scale = torch.where(norm > 0, rho / norm, 0).item() - self.alpha\n        scale = torch.tensor(scale)"),
    "restore: copy of another dtype": ("if [(b.shape, b.dtype, b.device) for b in self.backup] != [(p.shape, p.dtype, p.device) for p in moved]:", "if len(self.backup) != len(moved):"),
    "statistics: frozen and unreached layers lose theirs": ("        if m.num_batches_tracked == 0:\n            m.load_state_dict(state)", "        pass"),
    "statistics: the search's policy keeps the supernet's": ("    for net in (run.net, untuned):\n        update", "    for net in (run.net,):\n        update"),
    "statistics: the supernet keeps the training's": ("    for net in (run.net, untuned):\n        update", "    for net in (untuned,):\n        update"),
    "statistics: the transfer keeps full precision's": ("    calibrate(net, job.inputs(4))\n    update_statistics(net, job.inputs(16))\n", "    calibrate(net, job.inputs(4))\n"),
    "uniform: the first layers take what is left": ("draw = torch.rand(len(layer)).tolist()", "draw = [0.0] * len(layer)"),
    "images: their step learned": ("layer.recompute, layer.learn_image_step = recompute, False", "layer.recompute, layer.learn_image_step = recompute, True"),
    "images: their bits not learned": (" and len(layer.input_quantizer.bits) == 1", ""),
    "compiled: one kernel for each state of autocast": ("with torch.autocast(x.device.type, enabled=False):", "if True:"),
    "compiled: rows are views": ("row.detach().clone().requires_grad_", "row.detach().requires_grad_"),
    "run: other checkpoints raise": ("        except (KeyError, ValueError, RuntimeError):\n            raise AsgaError(f\"{checkpoint} is by", "        except ZeroDivisionError:\n            raise AsgaError(f\"{checkpoint} is by"),
    "run: new settings pass": ('{**defaults, **old["settings"]}', '{**settings, **old["settings"]}'),
    "bf16: float32 all the same": ('enabled=precision == "bf16"', "enabled=False"),
    "bisection: one round too few": ("for _ in range(7):", "for _ in range(2):"),
    "cost: groups ignored": ("layer.tally(out.numel() * weight[0].numel())", "layer.tally(out.numel() * weight[0, 0].numel() * x.shape[1])"),
    "cost: second call not counted": ("macs.update({name: macs.get(name, 0) + count})", "macs.update({name: count})"),
    "cost: batch counted": ("LayerCost(count // images,", "LayerCost(count,"),
    "budget: only from above": ("t = self.solve(move, reach)\n        return torch.where((self", "t = self.solve(move, reach).clamp_min(0)\n        return torch.where((self"),
    "budget: range ignored": ("move = lambda t: (bits - t * slope).clamp(self.lo, self.hi)", "move = lambda t: bits - t * slope"),
    "budget: along plain ∇C of weights only": ("self.sizes[0] * bits.flip(0) / cost", "self.sizes[0] * bits / cost"),
    "budget: infeasible accepted": ("if value < least:", "if False:"),
    "knapsack: budget exceeded": ("keep = (cost + least[l + 1] <= limits).all(-1) &", "keep = (cost + least[l + 1] <= limits * 1.02).all(-1) &"),
    "knapsack: fill ignored": ("(potential >= floor)", "(potential >= 0)"),
    "knapsack: greedy": ("found, complete, width = None, False, 500", "found, complete, width = None, False, 1\n        return sweep(1, fill * (not dearest), math.inf, dearest)[0]"),
    "policy: cost unchecked": ("if written != value:", "if False:"),
    "policy: unnamed layers accepted": ("if name in reached and name not in self.layers:", "if False:"),
    "search: no projection": ("        self.optimizer.step(closure)\n        self.project()\n", "        self.optimizer.step(closure)\n"),
    "search: β's gradient dropped": ('groups.append({"params": bits, "lr": settings.lr_beta, "base_lr": settings.lr_beta,', 'groups.append({"params": bits, "lr": 0.0, "base_lr": 0.0,'),
    "run: resumed order differs": ("manual_seed(seed * 1_000_003 + epoch))", "manual_seed(seed * 1_000_003 + epoch + (start > 0)))"),
    "run: optimizer not in the checkpoint": ('return {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}', 'return {"net": self.net.state_dict(), "optimizer": ASGA(self.optimizer.param_groups, torch.optim.SGD, lr=1, rho_min=0, rho_max=1, alpha=0).state_dict()}'),
    "data: 16-bit pictures clipped": ('if image.mode.startswith("I"):', "if False:"),
    "evaluation: frozen modules thaw": ("    with _evaluating(model):\n        for images", "    model.eval()\n    if True:\n        for images"),
    "settings: of another method in the file": ("        vars(self).update(METHODS[self.method])", "        pass"),
    "quantizer: half precision overflows": ("    wide, g, (s, n, p, pi) = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (x, grad, row))",
                                            "    s, n, p, pi = row\n    wide, g = x.float(), grad.float()"),
    "data: digits mirrored": ("return Data(\"digits\", [str(d) for d in range(10)], *parts, 32, False)", "return Data(\"digits\", [str(d) for d in range(10)], *parts, 32, True)"),
    "data: validation in training": ("for mask in (~val, val)]", "for mask in (~val | val, val)]"),
}


def survives(old, new):
    """(True where no test failed, the test that did)."""
    source = (ROOT / "asga.py").read_text()
    if source.count(old) != 1:
        sys.exit(f"asga.py has {source.count(old)} times: {old!r}; mend the list of mutations")
    with tempfile.TemporaryDirectory() as folder:
        copy(ROOT / "test_asga.py", folder)
        copytree(ROOT / "data", Path(folder) / "data", ignore=lambda d, names: [n for n in names if n != "digits.npz"])
        (Path(folder) / "asga.py").write_text(source.replace(old, new))
        skip = [] if "as_strided" in old else ["--deselect", "test_asga.py::test_compiled_equals_plain"]       # it is slow
        done = subprocess.run([sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "test_asga.py", *skip],
                              cwd=folder, capture_output=True, text=True)
        failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        return not failed, (failed or [done.stdout[-200:]])[0].partition("::")[2][:90]


if __name__ == "__main__":
    unnoticed = 0
    if len(sys.argv) > 1 and not any(sys.argv[1] in name for name in MUTATIONS):
        sys.exit(f"no mutation has {sys.argv[1]!r} in its name: " + ", ".join(sorted({name.partition(":")[0] for name in MUTATIONS})))
    for name, (old, new) in MUTATIONS.items():
        if len(sys.argv) < 2 or sys.argv[1] in name:
            alive, by = survives(old, new)
            unnoticed += alive
            print(f"{'UNNOTICED' if alive else 'noticed':10} {name:55} {by}", flush=True)
    print(f"{unnoticed} unnoticed")
    sys.exit(1 if unnoticed else 0)
