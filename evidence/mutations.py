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
    "calibration: the last batch decides the sign": ("self.negative |= bool((x < 0).any())", "self.negative = bool((x < 0).any())"),
    "compiled: storage offset forgotten": ("t.storage_offset(), (t.numel(),))", "0, (t.numel(),))"),
    "select: always signed": ("Quantizer(bits, bool(self.grid[1, k] < 0)).to", "Quantizer(bits, True).to"),
    "calibration: the first values alone": ("x = x[torch.randint(len(x), (limit,), generator=torch.Generator().manual_seed(0)).to(x.device)]", "x = x[:limit]"),
    "calibration: the last batch alone": ("sample = torch.cat(self.sample)", "sample = self.sample[-1]"),
    "quantize: steps of a weight that changes before its use": ("if plain and layer.weight_quantizer", "if layer.weight_quantizer"),
    "budget: binary units": ('scale = {"k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}', 'scale = {"k": 1e3, "m": 2**20, "g": 2**30, "t": 1e15}'),
    "projection: size along the MACs": ('self.sizes[1] / cost["weight_bits"]', 'self.sizes[0] / cost["weight_bits"]'),
    "tau: not for quantizers": ("_attach(layer, Quantizer(w, True, relaxation, tau), Quantizer(a, None, relaxation, tau))", "_attach(layer, Quantizer(w, True, relaxation), Quantizer(a, None, relaxation))"),
    "quantize: policy not checked": ("        bits_or_policy.check(model, example_inputs)\n", ""),
    "knapsack: a narrow sweep taken for proof": ("index, complete = index[score.argsort(stable=True)[:width]], False", "index = index[score.argsort(stable=True)[:width]]"),
    "keep: names get 4 bits": ("dict.fromkeys(keep, 8)", "dict.fromkeys(keep, 4)"),
    "softmax projection: not along the gradient": ("tilted = lambda t: logits - t * slope * values", "tilted = lambda t: logits - t * values"),
    "calibration: keeps the graph": ("@torch.no_grad()\ndef _run_eval", "def _run_eval"),
    "calibration: never ends after an error": ("        for q in found:\n            q.sample, q.negative = None, False", "        pass"),
    "start: activations free under two bounds": ('["bops" not in self.limits]]', '["weight_bits" in self.limits]]'),
    "candidates: 7 bits too": ("CANDIDATES = (2, 3, 4, 5, 6, 8) ", "CANDIDATES = (2, 3, 4, 5, 6, 7, 8) "),
    "interpolation: β on a candidate looks down": ("low = (b[:, 1:-1] <= beta)", "low = (b[:, 1:-1] < beta)"),
    "compiled: channels_last lost": ("layout = torch.channels_last if last else torch.contiguous_format", "layout = torch.contiguous_format"),
    "prepared: gradients of idle layers erased": ("for p in q.parameters() if p.grad is None]", "for p in q.parameters()]"),
    "calibration: a given sign overruled": ("            if self.auto_sign:\n", "            if True:\n"),
    "calibration: in half precision": ("self.sample.append(x.to(torch.promote_types(x.dtype, torch.float32)))", "self.sample.append(x)"),
    "budget: bits shown as bytes": ('human(v / 8) + "B"', 'human(v) + "B"'),
    "calibration: fails where nothing was seen": ("        if self.sample:\n            if", "        if self.sample is not None:\n            if"),
    "calibration: infinite step": ("if not 0 < top < math.inf: ", "if top == 0: "),
    "calibration: sign remembered": ("        self.sample, self.negative = None, False\n", "        self.sample = None\n"),
    "trace: a vector taken for a batch": ("if torch.is_tensor(a) and a.dim() > 1), 1)", "if torch.is_tensor(a)), 1)"),
    "projection: two bounds, one followed": ("total[0] = total[0] + self.sizes[1]", "total[0] = self.sizes[1]"),
    "calibration: 0/0 at one bit": ("s = torch.where(levels.square().sum() > 0, (x * levels).sum() / levels.square().sum(), s)", "s = (x * levels).sum() / levels.square().sum()"),
    "joint: two passes": ("if not moved or self.rho_max == self.alpha == 0:", "if not moved:"),
    "projection: ‖g‖ of what moves": ("square = (norm if len(moved) == len(g) else wide(torch.nn.utils.get_total_norm(g))).square()", "square = norm.square()"),
    "policy: mean bits exchanged": ("return self._total(lambda s, w, a: s.macs * w) / macs, self._total(lambda s, w, a: s.macs * a) / macs", "return self._total(lambda s, w, a: s.macs * a) / macs, self._total(lambda s, w, a: s.macs * w) / macs"),
    "policy: any layer may have other outputs": ("head = name == list(self.layers)[-1] and size.numel % per_output == 0", "head = size.numel % per_output == 0"),
    "policy: head of other features": ("head = name == list(self.layers)[-1] and size.numel % per_output == 0", "head = name == list(self.layers)[-1]"),
    "sagm: is asga": ('"sagm": {"adaptive": False, "project": False}', '"sagm": {}'),
    "search: direction ignored": ('"adaptive", "project", "direction")}\n', '"adaptive", "project")}\n'),
    "search: adaptive and project ignored": ('("rho_min", "rho_max", "alpha", "adaptive", "project", "direction")}\n', '("rho_min", "rho_max", "alpha", "direction")}\n'),
    "decay: of all but weights": ("groups[p.dim() > 1].append(p)", "groups[p.dim() <= 1].append(p)"),
    "schedule: none": ('group["lr"] = group["base_lr"] * 0.5 * (1 + math.cos(math.pi * done / total))', 'group["lr"] = group["base_lr"]'),
    "outputs: the last": ("return out[0] if isinstance(out, (tuple, list)) else out", "return out[-1] if isinstance(out, (tuple, list)) else out"),
    "bf16: loss too": ('return loss_fn(logits.float() if precision == "bf16" else logits, y)', "return loss_fn(logits, y)"),
    "search: in eval mode": ("        self.net.train()\n        with self.guard", "        with self.guard"),
    "search: gradients add up": ("            self.optimizer.zero_grad()\n            with self.prepared", "            with self.prepared"),
    "policy: least likely bits": ("(-torch.log_softmax(", "(torch.log_softmax("),
    "policy: absolute distance": ("return {b: (b - q.beta.item()) ** 2 for b in q.bits}", "return {b: abs(b - q.beta.item()) for b in q.bits}"),
    "search: example_inputs ignored": ("    if example_inputs is None:\n        example_inputs = each", "    if True:\n        example_inputs = each"),
    "tau: not for the supernet": ("attach_quantizers(model, choices, settings.relaxation, settings.tau)", "attach_quantizers(model, choices, settings.relaxation)"),
    "recompute: flag ignored by the search": ("set_training(self.net, settings.recompute)", "set_training(self.net)"),
    "policy: candidates exchanged": ('"candidates": {"w": list(self.settings.candidates_w), "a": list(self.settings.candidates_a)}', '"candidates": {"a": list(self.settings.candidates_w), "w": list(self.settings.candidates_a)}'),
    "log: farthest candidate": ("distance = (self.values - bits[..., None]).abs().amin(-1)", "distance = (self.values - bits[..., None]).abs().amax(-1)"),
    "start: softmax off the budget": ("        self._write_logits(tilted(t))", "        return"),
    "search: no momentum": ("lr=settings.lr, momentum=settings.momentum,", "lr=settings.lr, momentum=0.0,"),
    "files: written in place": ("        write(part)\n        os.replace(part, path)", "        write(path)"),
    "opt-out: part of a group": ("                if inside & still and inside - still:", "                if False:"),
    "opt-out: the base's ignored": ('group["perturb"] = not inside & still and group.get("perturb", True)', 'group["perturb"] = not inside & still'),
    "state: groups not shared after loading": ("        self.param_groups, self.state = self.base.param_groups, self.base.state\n        self.rho = state", "        self.rho = state"),
    "decay: of bits": ('"base_lr": settings.lr_beta, "weight_decay": 0.0})', '"base_lr": settings.lr_beta, "weight_decay": settings.weight_decay})'),
    "decay: none in the search": ("groups = parameter_groups(self.net, settings.lr, settings.weight_decay)", "groups = parameter_groups(self.net, settings.lr, 0.0)"),
    "default: rho_max": ("rho_max: float = option(0.05,", "rho_max: float = option(0.5,"),
    "search: one batch calibrates": ("for x, _ in itertools.islice(batches, 4)]", "for x, _ in itertools.islice(batches, 1)]"),
    "schedule: stands still in the search": ("cosine(self.optimizer, done, self.settings.steps)", "cosine(self.optimizer, 0, self.settings.steps)"),
    "start: off the budget": ("        return self._write(self.budget.uniform())", "        return"),
    "images: mean and deviation exchanged": ("MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)", "STD, MEAN = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)"),
    "images: never resized": ("if x.shape[-1] != resolution:", "if False:"),
    "augmentation: always mirrors": ("draw(2).bool() & flip", "draw(2).bool()"),
    "augmentation: the same at every step": ("torch.Generator().manual_seed(seed * 1_000_003 + step))", "torch.Generator().manual_seed(seed * 1_000_003))"),
    "order: the same in every epoch": ("torch.Generator().manual_seed(seed * 1_000_003 + epoch))", "torch.Generator().manual_seed(seed * 1_000_003))"),
    "order: the same for every seed": ("torch.Generator().manual_seed(seed * 1_000_003 + epoch))", "torch.Generator().manual_seed(epoch))"),
    "evaluation: mean of means": ('loss += F.cross_entropy(logits, y, reduction="sum").item()', "loss += F.cross_entropy(logits, y).item()"),
    "resume: seconds lost": ("        return before + time.monotonic() - began", "        return time.monotonic() - began"),
    "resume: draws lost": ('        torch.set_rng_state(state["rng"])\n', ""),
    "resume: log doubled": ("log.read_text().splitlines(True)[:start]", "log.read_text().splitlines(True)"),
    "fresh classifier: full rate": ("cfg.fp_lr / (10 if cfg.weights else 1)", "cfg.fp_lr"),
    "transfer: rate and decay exchanged": ("cfg.epochs, cfg.lr, cfg.weight_decay, warmup=0.0", "cfg.epochs, cfg.weight_decay, cfg.lr, warmup=0.0"),
    "metrics: supernet is the policy": ('"supernet": job.evaluate(run.net),\n               "policy": job.evaluate(untuned)', '"supernet": job.evaluate(untuned),\n               "policy": job.evaluate(run.net)'),
    "cost: at the proxy's resolution": ("self.example = check_network(self.model, cfg.arch, len(self.data.classes), self.cost_resolution, self.device)", "self.example = check_network(self.model, cfg.arch, len(self.data.classes), self.resolution, self.device)"),
    "recompute: flag ignored by transfer": ("    set_training(net, cfg.recompute)\n    metrics", "    metrics"),
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
        skip = [] if any(word in old for word in ("as_strided", "storage_offset", "layout =")) else ["--deselect", "test_asga.py::test_compiled_equals_plain"]       # it is slow
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
