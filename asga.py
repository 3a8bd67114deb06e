"""ASGA: mixed-precision quantization policies, searched on a small data set and carried over to a large one.

An open reference implementation, in one file and not by the authors, of
    Ma, Ma, Zhou, Xie, He, Lu: "Learning from Loss Landscape: Generalizable Mixed-Precision Quantization via
    Adaptive Sharpness-Aware Gradient Aligning", ICML 2025, arXiv 2505.04877   (cited below as "ASGA")

    python asga.py search                                    bits per layer, found on the proxy set
    python asga.py transfer runs/…/policy.json --data DIR    the same bits on the target set, weights tuned

First the method: quantizer, supernet, cost and budget, ASGA, search.
The paper's symbols: θ = (w, s, β) weights, quantizer steps, real-valued bitwidths; L loss; g its gradient;
ρ radius; h = L_p − L gap; α alignment step; C(β) expected cost, C* budget. "Our choice" marks what it
leaves open; README.md numbers these choices."""
import argparse
import collections
import contextlib
import copy
import dataclasses
import functools
import importlib.util
import io
import itertools
import json
import math
import os
import platform
import re
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

__version__ = "0.2.0"
CANDIDATES = (2, 3, 4, 5, 6, 8)  # bitwidths that a search chooses from
STEP_MIN = 1e-20  # least quantizer step: far below real ones, far above denormal numbers
VERSIONS = {"asga": __version__, "torch": str(torch.__version__), "python": platform.python_version()}

class AsgaError(ValueError):
    """What a user can mend, in one line. The command line exits with 2."""

# ------------------------------
# Quantizer: LSQ, with one candidate bitwidth (deployment) or a mixture of several (search)

def mix_forward(x, row):
    """Σ_k π_k Q_k(x) with Q_k(x) = s_k · clamp(round(x / s_k), n_k, p_k)  (LSQ, Esser et al. 2020, eq. 1-2).
    x: any shape. row: [4, K], float32 or wider: steps s above 0, whole bounds n and p, mixture weights π."""
    s, n, p, pi = row
    wide = x.to(row.dtype)  # half precisions: computed in float32, rounded at the end
    mixed = 0
    for k in range(len(s)):
        mixed = mixed + pi[k] * s[k] * (wide / s[k]).clamp(n[k], p[k]).round()
    return mixed if mixed.dtype == x.dtype else mixed.to(x.dtype)  # torch 2.11 compiles no idle .to

def mix_backward(grad, x, row):
    """The declared straight-through gradients of mix_forward: (∂x, ∂row [4, K]). Rounding's own is zero.
    ∂Q/∂x = 1 where n ≤ x/s ≤ p, else 0.
    ∂Q/∂s = round(x/s) − x/s inside, n below, p above (LSQ eq. 3), times LSQ's gradient scale 1/√(numel · p).
    ∂Q/∂π_k = Q_k − Q_1: as Σπ = 1, what is the same for all k changes nothing, and this spares a sum."""
    s, n, p, pi = row
    wide, grad_wide = x.to(row.dtype), grad.to(row.dtype)
    passed = 0
    values, grad_s, grad_pi = [], [], []
    for k in range(len(s)):
        v = wide / s[k]
        clamped = v.clamp(n[k], p[k])
        level = clamped.round()
        inside = clamped == v
        passed = passed + torch.where(inside, pi[k], 0)
        scale = pi[k] / (x.numel() * p[k]).sqrt()
        grad_s.append(scale * (grad_wide * torch.where(inside, level - v, level)).sum())
        values.append(s[k] * level)
        grad_pi.append((grad_wide * (values[k] - values[0])).sum())
    constant = torch.zeros_like(s)  # n and p are no parameters
    grad_row = torch.stack([torch.stack(grad_s), constant, constant, torch.stack(grad_pi)])
    return (grad_wide * passed).to(x.dtype), grad_row

class FakeQuantize(torch.autograd.Function):
    """Both as one differentiable function. Section "speed" compiles them; a whole network's compiler does."""
    @staticmethod
    def forward(ctx, x, row):
        ctx.save_for_backward(x, row)
        return fused_forward(x, row)

    @staticmethod
    def backward(ctx, grad):
        return fused_backward(grad, *ctx.saved_tensors)

def mse_optimal_step(x, n, p):
    """The step s > 0 that minimizes Σ (Q(x) − x)² over the sample x [N] for the integer range [n, p]."""
    s = x.abs().max() / p
    if not 0 < s < math.inf:  # nothing to fit, or not a number
        return torch.full_like(s, 1 / p)
    few = x[::max(1, len(x) // 8192)]
    for grid in (torch.logspace(-2, 0, 32), torch.linspace(0.86, 1.16, 49)):
        steps = (s * grid.to(x))[:, None]  # [G, 1]
        errors = ((few / steps).round().clamp(n, p) * steps - few).square().sum(-1)  # [G]
        s = steps[errors.argmin(), 0]
    for _ in range(4):  # the best s for these levels, and anew
        levels = (x / s).round().clamp(n, p)
        square = levels.square().sum()
        s = torch.where(square > 0, (x * levels).sum() / square, s)
    return s.clamp_min(STEP_MIN)

class Quantizer(nn.Module):
    """Tensor in, fake-quantized tensor out: Q_b(x) for one candidate bitwidth b (plain LSQ), else a mixture.
    bits: one int or several, 2 to 16. signed: integers −2^(b−1) … 2^(b−1)−1 if True, 0 … 2^b−1 if False; if
    None, unsigned where calibration saw no negative value. `beta`, 0-dim, is the bitwidth itself: it mixes
    the two candidates beside it by 1−λ and λ = (β − b_lo)/(b_hi − b_lo) (our choice, after FracBits, Yang &
    Jin 2021). `steps` [K] are learned, NaN until calibrated. `enabled = False` makes it the identity."""

    def __init__(self, bits, signed=None):
        super().__init__()
        self.bits, self.auto_sign = check_bits(bits), signed is None
        self.enabled, self.sample, self.row = True, None, None  # row: its mixture, inside `prepared`
        self.steps = nn.Parameter(torch.full((len(self.bits),), math.nan))
        self.register_buffer("grid", torch.zeros(3, len(self.bits), dtype=torch.int32))  # rows: bits, n, p
        self.set_signed(signed is None or signed)
        beta = torch.tensor(sum(self.bits) / len(self.bits))
        self.beta = nn.Parameter(beta, requires_grad=len(self.bits) > 1)

    def set_signed(self, signed):
        b = torch.tensor(self.bits, dtype=torch.int32)
        low = -(2 ** (b - 1)) if signed else torch.zeros_like(b)
        self.grid.copy_(torch.stack([b, low, low + 2 ** b - 1]))

    def forward(self, x):
        if self.sample is not None:  # calibration looks on, and changes nothing
            self.observe(x.detach())
        elif self.enabled:
            return FakeQuantize.apply(x, self.mixtures([self])[0] if self.row is None else self.row)
        return x

    def observe(self, x, limit=65536):
        """Keep of x whether any value is negative, and at most `limit` values."""
        negative, x = bool((x < 0).any()), x.flatten()
        Fused.largest = max(Fused.largest, len(x))
        if len(x) > limit:
            draw = torch.randint(len(x), (limit,), generator=torch.Generator().manual_seed(0))
            x = x[draw.to(x.device)]
        self.sample.append((negative, x.to(torch.promote_types(x.dtype, torch.float32))))

    @torch.no_grad()
    def calibrate(self, x=None):
        """Set sign and steps from x (any shape), or from what was observed; nothing seen: they stay."""
        if x is not None:
            self.sample = []
            self.observe(x)
        if self.sample:
            negative, values = zip(*self.sample)
            if self.auto_sign:
                self.set_signed(any(negative))
            for k, (_, n, p) in enumerate(self.grid.t().tolist()):
                self.steps[k] = mse_optimal_step(torch.cat(values), n, p)
        self.sample = None

    def select(self, bits):
        """A Quantizer of the same sign with the single candidate `bits` and the step learned for it."""
        k = self.bits.index(bits)
        chosen = Quantizer(bits, bool(self.grid[1, k] < 0)).to(self.steps.device)
        chosen.steps.data = self.steps.data[k:k + 1].clone()
        return chosen

    @staticmethod
    def mixtures(quantizers):
        """[Q, 4, K]: rows (s, n, p, π) of Q quantizers with equally many candidates; K is 2, or 1 for one."""
        s = torch.stack([q.steps for q in quantizers])  # [Q, candidates]
        s = s.to(torch.promote_types(s.dtype, torch.float32))
        b, n, p = torch.stack([q.grid for q in quantizers], 1)
        pi = torch.ones_like(s)
        if s.shape[1] > 1:
            beta = torch.stack([q.beta for q in quantizers])[:, None]  # [Q, 1]
            low = (b[:, 1:-1] <= beta).sum(1, keepdim=True)  # of b_lo, the last one ≤ β
            pair = torch.cat([low, low + 1], 1)
            b, n, p, s = (t.gather(1, pair) for t in (b, n, p, s))
            share = (beta - b[:, :1]) / (b[:, 1:] - b[:, :1])  # λ
            # a perturbed β may stand beyond the last candidate: its value is clamped, its gradient goes on
            share = share.detach().clamp(0, 1) + (share - share.detach())
            pi = torch.cat([1 - share, share], 1)
        s = s.detach().clamp_min(STEP_MIN) + (s - s.detach())  # likewise a step perturbed to or below 0
        return torch.stack([s, n, p, pi], 1)

# ------------------------------
# Supernet: every Conv2d and Linear of any network gets a quantizer on its weight and on its input

class Operands(torch.overrides.TorchFunctionMode):
    """While one layer's own forward runs, F.conv2d(x, w) becomes F.conv2d(Q_a(x), Q_w(w)); F.linear likewise.
    There, and not on `layer.weight`: subclasses may pad by hand or standardize weights, and what hardware
    multiplies must be on the integer grid. Products with weights of another shape stay."""
    names = "input", "weight", "bias", "stride", "padding", "dilation", "groups"

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func not in (F.conv2d, F.linear):
            return func(*args, **(kwargs or {}))
        named = {**dict(zip(self.names, args)), **(kwargs or {})}
        if named["weight"].shape == self.layer.operand_shape:
            named["input"] = self.layer.input_quantizer(named["input"])
            named["weight"] = self.layer.weight_quantizer(named["weight"])
        return func(**named)

def quantized_forward(layer, *args, **kwargs):
    """The layer's own forward, on quantized operands."""
    with Operands(layer):
        return type(layer).forward(layer, *args, **kwargs)

def attach_quantizers(model, choices):
    """A copy of `model`, its layers in choices {name: (bits w, bits a)} quantized, not calibrated. Those that
    are quantized already must get one of their bitwidths, and keep the step learned for it."""
    model = copy.deepcopy(model)
    found = layers_of(model)
    for name, (w, a) in choices.items():
        layer = found[name]
        if not hasattr(layer, "weight_quantizer"):
            pair = Quantizer(w, signed=True), Quantizer(a)
        elif w in layer.weight_quantizer.bits and a in layer.input_quantizer.bits:
            pair = layer.weight_quantizer.select(w), layer.input_quantizer.select(a)
        else:
            raise AsgaError(f"layer {name} is quantized already, not to {w}, {a} bit: take the original")
        layer.operand_shape = layer.weight.shape
        layer.weight_quantizer, layer.input_quantizer = (q.to(layer.weight.device) for q in pair)
        layer.forward = functools.partial(quantized_forward, layer)  # weight and state-dict keys stay
        torch.backends.mha.set_fastpath_enabled(False)  # torch's fused transformer layers would bypass it
    return model

def layers_of(model):
    """{name: layer} of what can be quantized."""
    return {name: m for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}

def quantized_layers(model):
    """{name: layer} of those that have `weight_quantizer` and `input_quantizer`."""
    return {name: m for name, m in layers_of(model).items() if hasattr(m, "weight_quantizer")}

def quantizers_of(model):
    """All quantizers in a model."""
    return [m for m in model.modules() if isinstance(m, Quantizer)]

def calibrate(model, batches):
    """Set all quantizers' steps from full-precision passes of `batches` (tensors or tuples) in eval mode."""
    found = quantizers_of(model)
    for q in found:
        q.sample = []
    with evaluating(model):
        for batch in batches:
            model(*as_args(batch))
    for q in found:
        q.calibrate()

def quantize(model, bits_or_policy, example_inputs, *, keep=8):
    """A quantized, calibrated copy of any nn.Module; the argument stays as it was.
    bits_or_policy: an int; several, or {"w": ints, "a": ints}: candidates of a supernet; or a Policy.
    example_inputs: real data, a tensor or a tuple of arguments; layers that it does not reach stay as they
    are. keep: see edge_bits. A supernet keeps the steps that it learned. AsgaError where a policy does not
    fit. Tune with step_guard."""
    if isinstance(bits_or_policy, Policy):
        bits_or_policy.check(model, example_inputs)
        choices = bits_or_policy.layers
    else:
        bits = bits_or_policy if isinstance(bits_or_policy, dict) else dict.fromkeys("wa", bits_or_policy)
        names = list(trace(model, example_inputs))
        choices = dict.fromkeys(names, (bits["w"], bits["a"]))
        choices.update((name, (b, b)) for name, b in edge_bits(names, keep).items())
    net = attach_quantizers(model, choices)
    if not quantized_layers(model):
        calibrate(net, [example_inputs])
    return net

class step_guard:
    """`with step_guard(model): optimizer.step()`: no quantizer step more than halves or doubles, as one below
    zero would silence its layer."""

    def __init__(self, model):
        self.steps = [q.steps.data for q in quantizers_of(model)]
        self.before = [s.clone() for s in self.steps]

    def __enter__(self):
        if self.steps:
            torch._foreach_copy_(self.before, self.steps)

    def clamp(self):
        if self.steps:
            torch._foreach_maximum_(self.steps, torch._foreach_mul(self.before, 0.5))
            torch._foreach_minimum_(self.steps, torch._foreach_mul(self.before, 2.0))

    def __exit__(self, *error):
        self.clamp()

# ------------------------------
# Cost and budget: bit operations and bytes, and a hard constraint on them

BUDGET_HELP = "3bit (the cost of uniform 3/3), 7.2G (BOPs), 4.5MB (of weights), 0.05x (of the 32-bit BOPs)"
SCALES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}

LayerCost = collections.namedtuple("LayerCost", "macs numel")  # of one image; of the weight

def trace(model, example_inputs):
    """{name: LayerCost} of the Conv2d and Linear that a pass calls, in call order, over all calls."""
    args, macs = as_args(example_inputs), {}
    def count(layer, inputs, out):
        macs[layer] = macs.get(layer, 0) + out.numel() * layer.weight[0].numel() // len(args[0])

    names = {layer: name for name, layer in layers_of(model).items()}
    with evaluating(model), contextlib.ExitStack() as hooks:
        for layer in names:
            hooks.enter_context(layer.register_forward_hook(count))
        model(*args)
    return {names[layer]: LayerCost(total, layer.weight.numel()) for layer, total in macs.items()}

def edge_bits(names, keep):
    """{name: bits} of layers left alone. keep: such a dict; an int, for the first and last layer; or None."""
    if not names:
        raise AsgaError("the network calls no Conv2d and no Linear: there is nothing to quantize")
    kept = {names[0]: keep, names[-1]: keep} if isinstance(keep, int) else keep or {}
    if strange := kept.keys() - set(names):
        raise AsgaError(f"keep: the network has no layer {min(strange)!r}")
    return {name: check_bits(bits, "keep: ")[0] for name, bits in kept.items()}

class Budget:
    """Bounds on the cost of a policy, and the projection that keeps a search on them.
    BOPs_l = macs_l · w_l · a_l, weight bits_l = numel_l · w_l. spec: BUDGET_HELP; a comma joins two. layers:
    {name: LayerCost}. kept: {name: bits} of fixed layers, in "3bit" too. w, a: bits that the others choose
    from. All bits are [2, L]: row 0 weights, row 1 activations. AsgaError for what cannot be met."""

    def __init__(self, spec, layers, kept, w, a, device="cpu"):
        self.spec, self.layers = str(spec), layers
        self.choices = {name: ((kept[name],),) * 2 if name in kept else (w, a) for name in layers}
        ends = [[list(map(end, bits)) for bits in zip(*self.choices.values())] for end in (min, max)]
        self.lo, self.hi = torch.tensor(ends, dtype=torch.float64, device=device)
        self.kept = torch.tensor([name in kept for name in layers], device=device)
        self.sizes = torch.tensor(list(layers.values()), device=device).double().t()  # [2, L]: MACs, numel
        self.limits = self.lo.new_full((2,), math.inf)  # BOPs, weight bits
        for part in self.spec.split(","):
            kind, value = self.parse(part.strip())
            least, most = self.cost(self.lo)[kind].item(), self.cost(self.hi)[kind].item()
            if value < least:
                ends = f"{human(least)} to {human(most)} {('BOPs', 'bits of weights')[kind]}"
                raise AsgaError(f"budget {part!r} = {human(value)} cannot be met: give {ends}")
            self.limits[kind].clamp_(max=value)
        if self.limits[0] == math.inf:
            self.lo[1] = self.hi[1]  # activations cost nothing: they keep their most bits

    def parse(self, text):
        """(0, BOPs) or (1, weight bits): what one bound means."""
        match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([A-Za-z]+)", text)
        number, unit = (float(match[1]), match[2]) if match else (0.0, "")
        prefix, size = unit.lower().removesuffix("bops"), unit[:-1].lower()
        if unit in ("bit", "bits"):
            return 0, self.cost(torch.where(self.kept, self.lo, number))[0].item()
        if unit == "x":
            return 0, number * 32 * 32 * self.sizes[0].sum().item()
        if unit.endswith("B") and size in SCALES:
            return 1, number * SCALES[size] * 8
        if prefix and prefix in SCALES:
            return 0, number * SCALES[prefix]
        raise AsgaError(f"budget {text!r} is not understood: write {BUDGET_HELP}; units K M G T")

    def cost(self, bits):
        """[..., 2] float64: BOPs and weight bits of bits [..., 2, L], expected or whole."""
        w, a = bits.double().unbind(-2)
        macs, numel = self.sizes
        return torch.stack([(macs * w * a).sum(-1), (numel * w).sum(-1)], -1)

    def spent(self, bits):
        """Share of the budget that bits [..., 2, L] cost: the larger one of two bounds. 1 is C = C*."""
        return (self.cost(bits) / self.limits).amax(-1)

    def gradient(self, bits):
        """∇ log C at bits [2, L] → [2, L]; summed over the bounds."""
        bops, weight_bits = torch.where(self.limits < math.inf, self.cost(bits), math.inf)
        slope = self.sizes[0] * bits.flip(0) / bops
        slope[0] += self.sizes[1] / weight_bits
        return slope

    def along(self, bits, slope):
        """The point of the line bits − t · slope, clamped to [lo, hi], that spends 1; without a wait."""
        def at(t):
            return (bits - t * slope).clamp(self.lo, self.hi)
        right = torch.where(slope > 0, (self.hi.max() - self.lo.min()) / slope, 0).max()  # all are at an end
        left = -right
        share = torch.linspace(0, 1, 257, dtype=torch.float64, device=self.lo.device)
        for _ in range(7):
            t = left + (right - left) * share
            first = (self.spent(at(t[:, None, None])) > 1).sum().clamp_max(256)  # that is cheap enough
            left, right = t[torch.stack([(first - 1).clamp_min(0), first])]
        return at(right)

    def project(self, bits):
        """bits moved along ∓∇ log C onto C = C*, within [lo, hi]; as they are if they meet it to 1e-6.
        Both ways: unspent budget is lost accuracy (our choice, in place of a loss weight)."""
        bits = bits.double().clamp(self.lo, self.hi)
        met = (self.spent(bits) - 1).abs() <= 1e-6
        return torch.where(met, bits, self.along(bits, self.gradient(bits)))

    def uniform(self):
        """bits [2, L] of the (fractional) uniform policy that spends 1: where a search starts."""
        return self.along(torch.full_like(self.lo, self.lo.min()), torch.ones_like(self.lo))

    def choose(self, penalties):
        """{name: (w, a)} of least penalty, by the knapsack. penalties: for each layer {(w, a): float}."""
        bounded, values, costs = (self.limits < math.inf).cpu(), [], []
        for (macs, numel), options in zip(self.sizes.t().tolist(), penalties):
            w, a = torch.tensor(list(options), dtype=torch.float64).t()
            costs.append(torch.stack([macs * w * a, numel * w], 1)[:, bounded])
            values.append(torch.tensor(list(options.values()), dtype=torch.float64))
        chosen = knapsack(values, costs, self.limits.cpu()[bounded])
        return {name: list(options)[i] for name, options, i in zip(self.layers, penalties, chosen)}

# ------------------------------
# ASGA optimizer. This section stands alone: copied into a file under `import torch` it works on any model.

def adaptive_radius(gap, rho_min, rho_max):
    """ρ = clip(ln(1 + max(h, 0)), ρ_min, ρ_max)  (ASGA: min(ρ_max, ln(h + 1)); the floor is our choice)."""
    rho = torch.log1p(torch.as_tensor(gap).clamp(min=0))
    return rho.nan_to_num(nan=rho_min, posinf=rho_max).clamp(rho_min, rho_max)

class ASGA(torch.optim.Optimizer):
    """Sharpness-aware gradient aligning around a torch.optim optimizer:  min_θ L(θ) + L_p(θ − α ∇L(θ)).

        1  g   = ∇L(θ)
        2  g_p = ∇L(θ + (ρ/‖g‖ − α) g)          same batch and dropout; θ and `buffers` are put back exactly
        3  if ⟨g_p, g⟩ < 0:  g_p ← g_p − ⟨g_p, g⟩/‖g‖² · g        off with project=False
        4  base optimizer steps along (g + g_p)/2                 along g_p with direction="perturbed"
        5  h = L_p − L;  ρ ← adaptive_radius(h)                   fixed at ρ_max with adaptive=False

    ASGA(model.parameters(), torch.optim.SGD, lr=0.1, rho_min=…, rho_max=…, alpha=…, buffers=model.buffers())

    `step(closure)` is closure, `ascend`, closure, `descend`; the closure clears gradients, runs forward and
    backward and returns the loss. No piece waits for the device: `play` may record them. Without `buffers`
    BatchNorm's statistics move twice. alpha=0, adaptive=False, project=False, direction="perturbed" is SAM
    (Foret et al. 2021); alpha=0, rho_max=0 is the base optimizer, in one pass. `last`: loss, perturbed_loss,
    gap, rho, grad_norm, cos and projected of the last step, as 0-dim tensors."""

    def __init__(self, params, base_class, *, rho_min, rho_max, alpha, adaptive=True, project=True,
                 direction="mean", buffers=(), **base_settings):
        if not 0 <= rho_min <= rho_max < float("inf") or not 0 <= alpha < float("inf"):
            raise ValueError(f"need finite 0 <= rho_min {rho_min} <= rho_max {rho_max}, 0 <= alpha {alpha}")
        if direction not in ("mean", "perturbed"):
            raise ValueError(f"direction {direction!r}: use 'mean' or 'perturbed'")
        self.base = base_class(params, **base_settings)
        super().__init__(self.base.param_groups, self.base.defaults)
        self.param_groups, self.state = self.base.param_groups, self.base.state  # shared, not copied
        self.rho_min, self.rho_max, self.alpha = rho_min, rho_max, alpha
        self.adaptive, self.project, self.direction = adaptive, project, direction
        self.buffers, self.last = {}, {}  # buffers by dtype, so that one kernel copies many
        for b in buffers:
            self.buffers.setdefault(b.dtype, []).append(b)
        self.rho = torch.tensor(float(rho_max), device=self.param_groups[0]["params"][0].device)

    def step(self, closure, play=lambda name, piece, *given: piece(*given)):
        @torch.enable_grad()
        def gradients():
            return closure().detach()

        if self.rho_max == self.alpha == 0:
            return play("step", self.one_pass, play("pass", gradients))
        with torch.random.fork_rng([self.rho.device] * self.rho.is_cuda):  # equal dropout in both passes
            loss = play("first pass", gradients)
        play("ascend", self.ascend, loss)
        try:
            perturbed_loss = play("second pass", gradients)
        except BaseException:
            self.restore()
            raise
        play("descend", self.descend, perturbed_loss)
        return loss

    @torch.no_grad()
    def ascend(self, loss):
        """Keep L, g, θ and the buffers; move θ up by (ρ/‖g‖ − α) g."""
        self.loss = loss
        self.params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.g = [p.grad for p in self.params]
        self.norm = torch.nn.utils.get_total_norm(self.g)
        moving = self.params, *self.buffers.values()
        self.kept = [torch._foreach_mul(group, 1) for group in moving]  # copies, by few kernels
        for p in self.params:
            p.grad = None  # g keeps its memory
        scale = torch.where(self.norm > 0, self.rho / self.norm, 0) - self.alpha
        torch._foreach_add_(self.params, torch._foreach_mul(self.g, scale))

    @torch.no_grad()
    def restore(self):
        """θ and the buffers as they were, bit for bit."""
        for group, before in zip((self.params, *self.buffers.values()), self.kept):
            torch._foreach_copy_(group, before)

    @torch.no_grad()
    def descend(self, perturbed_loss):
        """Put θ back, align g_p with g, let the base optimizer step, set the next radius."""
        self.restore()
        g, norm = self.g, self.norm
        g_p = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        dot = torch.stack([product.sum() for product in torch._foreach_mul(g_p, g)]).sum()
        conflict = (dot < 0) & (norm > 0) & self.project
        against = torch.where(conflict, dot / norm.square(), 0)
        cos = dot / (norm * torch.nn.utils.get_total_norm(g_p)).clamp_min(1e-30)
        mean = self.direction == "mean"  # 3 and 4 at once: (g_p + (1 − against) · g)/2, or g_p − against · g
        direction = torch._foreach_add(g_p, torch._foreach_mul(g, int(mean) - against))
        torch._foreach_mul_(direction, 0.5 if mean else 1.0)
        for p, d in zip(self.params, direction):
            p.grad = d
        self.base.step()
        gap = perturbed_loss - self.loss
        self.last = dict(loss=self.loss, perturbed_loss=perturbed_loss, gap=gap, rho=self.rho.clone(),
                         grad_norm=norm, cos=cos, projected=conflict)
        if self.adaptive:
            self.rho.copy_(adaptive_radius(gap, self.rho_min, self.rho_max))

    @torch.no_grad()
    def one_pass(self, loss):
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm, zero = torch.nn.utils.get_total_norm(grads), torch.zeros_like(loss)
        self.last = dict(loss=loss, perturbed_loss=loss, gap=zero, rho=zero, grad_norm=norm, cos=zero + 1,
                         projected=zero.bool())
        self.base.step()
        return loss

    def state_dict(self):
        """The base optimizer's state and the radius: enough to continue identically."""
        return {**self.base.state_dict(), "rho": self.rho.clone()}

    def load_state_dict(self, state):
        self.rho.copy_(state["rho"])
        self.base.load_state_dict({key: state[key] for key in ("state", "param_groups")})
        self.param_groups, self.state = self.base.param_groups, self.base.state

# ------------------------------
# Search: weights, steps and bits of the supernet together, C(β) = C* after every step

METHODS = {
    "asga": {},
    "sagm": {"adaptive": False, "project": False},
    "sam": {"adaptive": False, "project": False, "alpha": 0.0, "direction": "perturbed"},
    "joint": {"rho_min": 0.0, "rho_max": 0.0, "alpha": 0.0},
    "uniform": {"steps": 0},
}

def option(default, help, choices=None):
    """A field of SearchSettings, with what its command-line flag needs."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})

@dataclasses.dataclass
class SearchSettings:
    """What search() takes as keywords and the command line as flags."""
    method: str = option("asga", "sagm: fixed radius; joint: no sharpness; uniform: no search", list(METHODS))
    steps: int = option(400, "optimization steps")
    candidates_w: tuple = option(CANDIDATES, "bitwidths for weights")
    candidates_a: tuple = option(CANDIDATES, "bitwidths for activations")
    keep: int = option(8, "bits of the first and the last layer")
    rho_min: float = option(0.005, "least radius of the perturbation")
    rho_max: float = option(0.05, "largest radius, fixed with --no-adaptive")
    alpha: float = option(0.001, "step of the implicit gradient alignment")
    adaptive: bool = option(True, "radius follows the gap, rho = ln(1 + h)")
    project: bool = option(True, "remove from g_p what opposes g")
    direction: str = option("mean", "step along (g + g_p)/2, or along g_p", ["mean", "perturbed"])
    lr: float = option(0.01, "learning rate of weights and steps (cosine to zero)")
    lr_beta: float = option(4.0, "learning rate of the bitwidths, in bits")
    momentum: float = option(0.9, "momentum of SGD")
    weight_decay: float = option(1e-4, "weight decay of convolutions and matrices")
    precision: str = option("float32", "bf16: under autocast", ["float32", "bf16"])

    def __post_init__(self):
        self.candidates_w, self.candidates_a = check_bits(self.candidates_w), check_bits(self.candidates_a)
        for field in dataclasses.fields(self):
            name, value, known = field.name, getattr(self, field.name), field.metadata["choices"]
            if known and value not in known:
                raise AsgaError(f"unknown {name} {value!r}: use one of {', '.join(known)}")
            fixed = METHODS[self.method].get(name, value)
            if value not in (fixed, field.default):
                say(f"{name} {value} is not used: method {self.method} is defined by {name} {fixed}")
            setattr(self, name, fixed)
        if self.rho_min > self.rho_max:
            raise AsgaError(f"rho_min {self.rho_min} is above rho_max {self.rho_max}: exchange them")

def plan(model, example_inputs, budget, settings):
    """The Budget of a search; AsgaError if it cannot be met. example_inputs: at the size to deploy."""
    layers, device = trace(model, example_inputs), next(model.parameters(), torch.empty(0)).device
    kept, w, a = edge_bits(list(layers), settings.keep), settings.candidates_w, settings.candidates_a
    return Budget(budget, layers, kept, w, a, device)

def parameter_groups(model, lr, weight_decay, apart=()):
    """SGD groups: weights with decay; biases, normalization, steps without. `apart` is left out."""
    groups, apart = {weight_decay: [], 0.0: []}, set(apart)
    for p in model.parameters():
        if p.requires_grad and p not in apart:
            groups[weight_decay if p.dim() > 1 else 0.0].append(p)
    return [{"params": group, "base_lr": lr, "weight_decay": decay} for decay, group in groups.items()]

def cosine(optimizer, done, total, warmup=0.0):
    """Learning rates of step `done`: cosine from base_lr to zero, after a linear warm-up."""
    share = 0.5 * (1 + math.cos(math.pi * done / total)) * min(1, (done + 1) / (warmup * total + 1))
    for group in optimizer.param_groups:
        group["lr"] = torch.as_tensor(group["lr"]).to(optimizer.rho)  # where a recorded step reads it
        group["lr"].fill_(group["base_lr"] * share)

def first_output(out):
    """The logits of networks that return more (auxiliary heads, named tuples, dicts)."""
    return as_args(tuple(out.values()) if isinstance(out, dict) else out)[0]

def backward(net, x, y, loss_fn, precision):
    """Forward and backward pass; returns the loss. bf16: the network alone under autocast."""
    net.zero_grad()
    with prepared(net):
        with torch.autocast(next(net.parameters()).device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = first_output(net(*as_args(x)))
        loss = loss_fn(logits.float() if precision == "bf16" else logits, y)
        loss.backward()
    size = rank_and_size()[1]
    if size > 1:
        inputs = [layer.input_quantizer.steps.grad for layer in quantized_layers(net).values()]
        for grad in filter(torch.is_tensor, inputs):
            grad.mul_(size ** -0.5)  # LSQ's scale has seen the numel of a slice alone
        average([loss, *(p.grad for p in net.parameters() if p.grad is not None)])
    return loss

def update(net, optimizer, guard, play, x, y, loss_fn, precision):
    """A step of an ASGA optimizer on one batch, its pieces run by `play`, quantizer steps guarded."""
    *x, y = play.inputs(*as_args(x), y)
    def closure():
        guard.clamp()  # the perturbation too: behind a silent layer BatchNorm makes gradients infinite
        return backward(net, x, y, loss_fn, precision)

    net.train()
    with guard:
        optimizer.step(closure, play)

class Search:
    """A copy of `model` as supernet, calibrated by `batches`: step(x, y, done) for done = 0 …; policy()."""

    def __init__(self, model, budget, settings, batches, loss_fn=F.cross_entropy, capture=True):
        self.budget, self.settings, self.loss_fn = budget, settings, loss_fn
        self.net = attach_quantizers(model, budget.choices).to(memory_format=torch.channels_last)
        calibrate(self.net, batches)
        layers = [self.net.get_submodule(name) for name in budget.layers]
        images = layers[0].input_quantizer
        images.steps.requires_grad_(len(images.bits) > 1)  # else it takes their gradient (our choice)
        self.quantizers = [layer.weight_quantizer for layer in layers]
        self.quantizers += [layer.input_quantizer for layer in layers]  # 2L, in the order of bits()
        self.beta = [q.beta for q in self.quantizers if len(q.bits) > 1]
        groups = parameter_groups(self.net, settings.lr, settings.weight_decay, apart=self.beta)
        groups.append({"params": self.beta, "base_lr": settings.lr_beta, "weight_decay": 0.0})
        names = "rho_min", "rho_max", "alpha", "adaptive", "project", "direction", "lr", "momentum"
        chosen = {name: getattr(settings, name) for name in names}
        buffers = [b for name, b in self.net.named_buffers() if "quantizer." not in name]  # those never move
        self.optimizer = ASGA(groups, torch.optim.SGD, buffers=buffers, fused=budget.lo.is_cuda, **chosen)
        self.guard, self.play = step_guard(self.net), Captured(budget.lo.device, capture)
        self.write(budget.uniform())

    def bits(self):
        """β of all quantizers: [2, L], row 0 weights, row 1 activations, layers in network order."""
        return torch.stack([q.beta.detach() for q in self.quantizers]).view(2, -1)

    @torch.no_grad()
    def write(self, bits):
        torch._foreach_copy_([q.beta for q in self.quantizers], list(bits.flatten().float().unbind()))

    def step(self, x, y, done):
        """ASGA step number `done`, and the projection. Returns the log's record, its tensors unread."""
        cosine(self.optimizer, done, self.settings.steps)
        update(self.net, self.optimizer, self.guard, self.play, x, y, self.loss_fn, self.settings.precision)
        row = self.play("project", self.project).clone()
        names = [*self.optimizer.last, "expected_cost"]
        return {**dict(zip(names, row)), "bits": row[len(names):].view(2, -1)}

    def project(self):
        """Bring β back onto the budget. One row of all that the log says of a step."""
        self.write(self.budget.project(self.bits()))
        bits = self.bits()
        row = torch.stack([*self.optimizer.last.values(), self.budget.cost(bits)[0]])
        return torch.cat([row, bits.double().round(decimals=3).flatten()])

    def policy(self, **info):
        """The Policy nearest to the present bits within the budget. info: more keys of the file."""
        if not self.bits().isfinite().all():
            raise AsgaError("the bitwidths are no longer numbers: lower lr or lr_beta")
        penalties = []
        for (w, a), choice in zip(self.bits().t().tolist(), self.budget.choices.values()):
            layer = {(i, j): (i - w) ** 2 + (j - a) ** 2 for i, j in itertools.product(*choice)}
            if self.settings.method == "uniform":  # w = a, where it may; the seed draws who gets more
                for (i, j), draw in zip(layer, torch.rand(len(layer)).tolist()):
                    layer[i, j] += 1e-4 * ((i - j) ** 2 + draw)
            penalties.append(layer)
        limits = zip(("bops", "weight_bits"), self.budget.limits.tolist())
        bounds = {key: limit for key, limit in limits if limit < math.inf}
        info["budget"] = {"spec": self.budget.spec, **bounds}
        info["candidates"] = {"w": self.settings.candidates_w, "a": self.settings.candidates_a}
        return Policy(self.budget.choose(penalties), self.budget.layers, info)

def search(model, batches, loss_fn, budget, *, example_inputs=None, on_step=None, capture=True, **settings):
    """Search a Policy for `model` (full precision, trained; stays as it was) on a proxy data set.
    batches: (inputs, targets) pairs, again and again (a list, a DataLoader); inputs: a tensor or a tuple of
    arguments. loss_fn(outputs, targets) → scalar; of several outputs it gets the first. budget: BUDGET_HELP.
    example_inputs: what MACs are counted on, at the size that you deploy (default: the first image).
    on_step(step, record): called after each. capture: record steps on CUDA. settings: of SearchSettings."""
    settings, device = SearchSettings(**settings), next(model.parameters(), torch.empty(0)).device
    def move(inputs):
        return tuple(t.to(device) for t in as_args(inputs))

    warm = [move(x) for x, _ in itertools.islice(batches, 4)]
    if not warm or iter(batches) is batches:
        raise AsgaError("batches must give (inputs, targets) again and again: give a list or a loader")
    if example_inputs is None:
        example_inputs = [t[:1] for t in warm[0]]
    budget = plan(model, move(example_inputs), budget, settings)
    began, run = time.monotonic(), Search(model, budget, settings, warm, loss_fn, capture)
    stream = itertools.chain.from_iterable(itertools.repeat(batches))
    for done, (x, y) in enumerate(itertools.islice(stream, settings.steps)):
        record = run.step(move(x), y.to(device), done)
        if on_step:
            on_step(done, record)
    seconds, chosen = round(time.monotonic() - began, 3), dataclasses.asdict(settings)
    about = dict(method=settings.method, seconds=seconds, device=describe(device), settings=chosen)
    return run.policy(search=about)

# ==============================
# The method ends here. What follows serves it: policy, speed, networks, data, runs, commands.
# ------------------------------
# Policy: whole bits for every layer, and the file that carries them

def knapsack(values, costs, limits, fill=0.99):
    """Exact multiple-choice knapsack: L ints, the choices of least Σ value [n_l] whose whole costs [n_l, K]
    keep `limits` [K] and spend `fill` of one of them; where none do, the dearest. AsgaError if none fits."""
    costs, limits = [c.double() for c in costs], limits.double().floor()
    found = best_choice(values, costs, limits, fill) or best_choice(values, costs, limits, 0)
    if not found:
        raise AsgaError(f"budget {limits.tolist()} cannot be met by any policy: raise one")
    while math.nextafter(found[0], 2) < fill:  # by bisection: the dearest spends between these two
        middle = max(math.nextafter(found[0], 2), (found[0] + fill) / 2)
        dearer = best_choice(values, costs, limits, middle)
        found, fill = (dearer, fill) if dearer else (found, middle)
    return found[1]

def best_choice(values, costs, limits, fill):
    """(share spent, L ints) of the least value within the limits that spends `fill` of one of them; or None.
    Lagrange's bound Σ_l min(v + μ · share) − Σ μ, best μ ≥ 0 by finer and finer grids (one limit: also
    μ < 0, less fill · μ), says what each choice adds at least. Layer by layer it keeps what is within the
    limits, able to fill, best of its cost, bounded below the best value known; a proof if none had to go."""
    v = nn.utils.rnn.pad_sequence(values, True, math.inf)[..., None]  # [L, n, 1]
    shares = nn.utils.rnn.pad_sequence([c / limits for c in costs], True)  # [L, n, K]
    mu, axis = 1, torch.cat([torch.zeros(1), torch.logspace(-3, 5, 33)]).double()
    axis = torch.cat([-axis, axis]) if len(limits) == 1 else axis
    for spread in (0.8, 0.2, 0.05, 0.01, 0.002):
        trial = mu * torch.cartesian_prod(*[axis] * len(limits)).view(-1, len(limits))  # [T, K]
        spent = (trial * torch.where(trial < 0, fill, 1.0)).sum(1)
        bound = (v + shares @ trial.t()).amin(1).sum(0) - spent  # [T]
        mu, axis = trial[bound.argmax()], torch.linspace(1 - spread, 1 + spread, 17).double()
    excess = v[..., 0] + shares @ mu
    excess = excess - excess.amin(1, keepdim=True)  # [L, n]
    best, found = math.inf, None
    for width in (500, 10_000, 200_000):
        least, most = sum(c.amin(0) for c in costs), sum(c.amax(0) for c in costs)  # [K], of the layers ahead
        cost, low = limits.new_zeros(1, len(limits)), bound.max().view(1)  # [S, K] and [S], of the S kept
        picks, complete = torch.zeros(1, 0, dtype=torch.long), True  # [S, layers behind]
        for c, e in zip(costs, excess):
            least, most = least - c.amin(0), most - c.amax(0)
            cost, low = (cost[:, None] + c).flatten(0, 1), (low[:, None] + e[:len(c)]).flatten()
            reach = ((cost + most).minimum(limits) / limits).amax(1)
            keep = (cost + least <= limits).all(1) & (reach >= fill) & (low <= best + 1e-9)
            index = keep.nonzero()[:, 0]
            for key in (low, *cost.unbind(1)):  # by cost, of equal ones the best first
                index = index[key[index].argsort(stable=True)]
            index = index[cost[index].diff(dim=0, prepend=-1 - limits[None]).any(1)]
            if len(index) > width:
                index, complete = index[low[index].argsort(stable=True)[:width]], False
            cost, low = cost[index], low[index]
            picks = torch.cat([picks[index // len(c)], index[:, None] % len(c)], 1)
        value = sum(v[p] for v, p in zip(values, picks.t()))
        if len(value) and value.min() < best:
            best, i = value.min(dim=0)
            found = (cost[i] / limits).max().item(), picks[i].tolist()
        if complete:
            return found
    say("the policy is the best one found; the knapsack is too large for a proof")
    return found

def check_bits(bits, where=""):
    """bits (an int or several) as a sorted tuple of ints in 2…16; AsgaError begins with `where`."""
    found = tuple(bits) if isinstance(bits, (tuple, list, range)) else (bits,)
    possible = all(type(b) is int and 2 <= b <= 16 for b in found)
    if not found or not possible or len(set(found)) < len(found):
        raise AsgaError(f"{where}bitwidths {list(found)}: give different whole numbers from 2 to 16")
    return tuple(sorted(found))

def write_atomic(path, content):
    """Text, bytes, or what torch.save takes, first beside `path`: a reader never sees half a file."""
    if rank_and_size()[0]:
        return  # the first process alone writes
    part, buffer = Path(f"{path}.part"), io.BytesIO()
    if isinstance(content, (str, bytes)):
        buffer.write(content.encode() if isinstance(content, str) else content)
    else:
        torch.save(content, buffer)
    try:
        part.write_bytes(buffer.getvalue())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)

def read_json(path):
    """The dict in a JSON file; AsgaError where there is none."""
    with refusing(f"{path} is no JSON of asga.py, give another"):
        return {**json.loads(Path(path).read_text())}

def write_json(path, data):
    """Readable JSON: an entry a line, two levels deep."""
    text = re.sub(r"\n {2,}([}\]])", r"\1", json.dumps(data, indent=1))
    write_atomic(path, re.sub(r"\n {3,}", " ", text + "\n"))

class Policy:
    """layers {name: (w, a)}, in network order; sizes {name: LayerCost}; info, the other keys of the file."""

    def __init__(self, layers, sizes=None, info=None):
        self.layers, self.sizes, self.info = layers, sizes or {}, info or {}
        for name, (w, a) in layers.items():
            check_bits(w, f"layer {name}: ") + check_bits(a, f"layer {name}: ")

    @property
    def cost(self):
        """Exact ints bops = Σ macs · w · a and weight_bits = Σ numel · w; means, weighted by MACs."""
        rows = [(*self.sizes[name], w, a) for name, (w, a) in self.layers.items()]
        macs = sum(m for m, *_ in rows)
        return {"bops": sum(m * w * a for m, _, w, a in rows),
                "weight_bits": sum(n * w for _, n, w, _ in rows),
                "mean_w": sum(m * w for m, _, w, _ in rows) / macs,
                "mean_a": sum(m * a for m, _, _, a in rows) / macs}

    @property
    def bops(self):
        return self.cost["bops"]

    def check(self, model, example_inputs=None):
        """AsgaError with a layer that does not fit: of those reached, but the last one's outputs are free."""
        found, where = layers_of(model), f"policy for another network than {type(model).__name__}"
        reached = found if example_inputs is None else trace(model, example_inputs)
        if strange := self.layers.keys() ^ reached.keys():
            raise AsgaError(f"{where}: only one of both uses layer {min(strange)!r}")
        for name, (_, there) in self.sizes.items():
            here, row = found[name].weight.numel(), found[name].weight[0].numel()
            if there % row or there != here and name != list(self.layers)[-1]:
                raise AsgaError(f"{where}: {there} weights in layer {name!r}, here {here}")

    def to_json(self):
        layers = {n: {"w": w, "a": a, **self.sizes[n]._asdict()} for n, (w, a) in self.layers.items()}
        info = {"arch": "", "budget": {}, "candidates": {}, "proxy": {}, "search": {}, "versions": VERSIONS}
        info.update((key, self.info[key]) for key in info.keys() & self.info.keys())
        return {"format": "asga-policy", "version": 1, "layers": layers, "cost": self.cost, **info}

    def save(self, path):
        write_json(path, self.to_json())

    @staticmethod
    def load(path, data=None):
        """The Policy in a file, or in `data` from there; AsgaError says what is wrong with it."""
        data = data or read_json(path)
        with refusing(f"{path} is no policy of a search"):
            layers = {name: (row["w"], row["a"]) for name, row in data["layers"].items()}
            sizes = {name: LayerCost(row["macs"], row["numel"]) for name, row in data["layers"].items()}
            policy = Policy(layers, sizes, data)
            for key, value in policy.to_json().items():
                if data[key] != value:
                    raise ValueError(f"its {key} is {data[key]}, not {value}")
        return policy

# ------------------------------
# Speed: the same results, sooner

class Fused:
    """A formula by torch.compile, one kernel for all layers; itself where that fails or Fused.on is False."""
    on, largest = True, 1

    def __init__(self, formula):
        self.formula, self.compiled, self.seen = formula, None, set()

    def __call__(self, *tensors):
        if torch.compiler.is_compiling() or not Fused.on or torch.is_grad_enabled():
            return self.formula(*tensors)
        *images, row = tensors
        x = images[-1]
        last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        images = [t.contiguous(memory_format=layout) for t in images]
        try:
            self.compiled = self.compiled or torch.compile(self.formula, dynamic=True)
            with torch.autocast(x.device.type, enabled=False):
                if x.is_cuda and (row.shape, x.dtype) not in self.seen:  # it is tuned to its first size
                    self.seen.add((row.shape, x.dtype))
                    self.compiled(*(t.new_zeros(Fused.largest) for t in images), bare(row, row.shape))
                out = self.compiled(*(bare(t, [t.numel()]) for t in images), bare(row, row.shape))
        except Exception as error:
            out = self.formula(*tensors)
            Fused.on = False
            say(f"torch.compile fails here ({type(error).__name__}): quantizers run slower")
            return out
        if torch.is_tensor(out):
            return out.as_strided(x.shape, images[-1].stride())
        return out[0].as_strided(x.shape, images[-1].stride()), out[1]

def bare(t, shape):
    """t's memory, but no view of t: for views dynamo would compile anew in every layer."""
    return t.new_empty(0).set_(t.untyped_storage(), t.storage_offset(), shape)

fused_forward, fused_backward = Fused(mix_forward), Fused(mix_backward)

@contextlib.contextmanager
def prepared(model):
    """`with prepared(model): a pass`: all mixtures are made at once; steps and β must not change inside."""
    groups = {}
    for q in quantizers_of(model):
        groups.setdefault((type(q), len(q.bits), q.steps.requires_grad), []).append(q)
    for group in groups.values():
        for q, row in zip(group, group[0].mixtures(group)):
            q.row = row.clone()  # dynamo guards on the place in a storage
    try:
        yield
    finally:
        for q in quantizers_of(model):
            q.row = None

def rank_and_size():
    """This process's number and how many torchrun started; (0, 1) without it."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if together else (0, 1)

def average(tensors):
    """Give each tensor its mean over all processes, in one all_reduce."""
    size, tensors = rank_and_size()[1], [t.detach() for t in tensors]
    if size > 1 and tensors:
        flat = torch.cat([t.flatten() for t in tensors]) / size
        try:
            torch.distributed.all_reduce(flat)
        except RuntimeError:
            raise AsgaError("another process has ended: its message says why") from None
        pieces = flat.split([t.numel() for t in tensors])
        torch._foreach_copy_(tensors, [piece.view_as(t) for piece, t in zip(pieces, tensors)])

class Captured:
    """Runs the pieces of a step: three times plainly, then as CUDA graphs, recorded once and replayed; always
    plainly on a CPU, with on=False, for a batch of another size, where a recording fails (a line says so)."""

    def __init__(self, device, on=True):
        self.on, self.same, self.steps = on and device.type == "cuda", False, 0
        self.fixed, self.recorded = None, {}
        if self.on:
            self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def inputs(self, *batch):
        """Begin a step; the tensors of its batch in memory that stays."""
        self.steps += 1
        self.fixed = self.fixed or self.on and [t.clone() for t in batch]
        self.same = self.on and [t.shape for t in batch] == [t.shape for t in self.fixed]
        if self.same:
            torch._foreach_copy_(self.fixed, list(batch))
        return self.fixed if self.same else batch

    def __call__(self, name, piece, *arguments):
        try:
            if self.same and self.steps <= 3:
                return self.warm(piece, arguments)
            if self.same and name not in self.recorded:
                self.recorded[name] = self.record(piece, arguments)
        except RuntimeError as error:
            self.on = self.same = False
            say(f"steps are not recorded, and slower: {one_line(error)}")
        if not self.same:
            return piece(*arguments)
        replay, result = self.recorded[name]
        replay()
        return result

    def warm(self, piece, arguments):
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        torch.cuda.set_sync_debug_mode("error" if self.steps == 3 else "default")  # no piece may wait
        try:
            with torch.cuda.stream(self.stream):  # on a side stream, as CUDA wants it
                return piece(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            self.stream.synchronize()

    def record(self, piece, arguments):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self.pool, self.stream):
            result = piece(*arguments)
        return graph.replay, result

# ------------------------------
# Networks: the built-in ResNet-20, torchvision's, or a user's own; their weights

class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a parameter-free shortcut (He et al. 2016, option A)."""
    def __init__(self, cin, cout, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.stride, self.pad = stride, (cout - cin) // 2

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = F.pad(x[:, :, ::self.stride, ::self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(out + shortcut)

class ResNet20(nn.Sequential):
    """The CIFAR ResNet of He et al. 2016 with n = 3: 0.27 million weights, 41 million MACs at 32×32."""
    def __init__(self, num_classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = nn.Sequential(BasicBlock(16, 16), BasicBlock(16, 16), BasicBlock(16, 16))
        self.layer2 = nn.Sequential(BasicBlock(16, 32, 2), BasicBlock(32, 32), BasicBlock(32, 32))
        self.layer3 = nn.Sequential(BasicBlock(32, 64, 2), BasicBlock(64, 64), BasicBlock(64, 64))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(64, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out")

def import_torchvision():
    """torchvision, also where its compiled operators, not needed here, do not fit this torch."""
    try:
        import torchvision
    except ImportError as error:
        raise AsgaError(f"this needs torchvision ({error}): pip install torchvision") from None
    except RuntimeError:  # "operator torchvision::nms does not exist"
        for name in ("torchvision::nms", "torchvision::qnms"):
            torch.library.define(name, "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
    return torchvision

def build(arch, num_classes):
    """The network `arch` with fresh weights; AsgaError where there is none."""
    path, colon, function = arch.rpartition(":")
    if arch == "resnet20":
        return ResNet20(num_classes)
    with refusing(f"--arch {arch!r} gives no network, see --help for what it takes"):
        if not colon:
            return import_torchvision().models.get_model(arch, weights=None, num_classes=num_classes)
        sys.path.insert(0, str(Path(path).resolve().parent))  # it may import its neighbours
        spec = importlib.util.spec_from_file_location("asga_user_network", path)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return getattr(module, function)(num_classes=num_classes).train()

def read_checkpoint(path, arch=""):
    """The dict in a .pt file, of which nothing is executed, or torchvision's of "imagenet"; or AsgaError."""
    try:
        if path == "imagenet":
            return import_torchvision().models.get_model_weights(arch).DEFAULT.get_state_dict()
        return {**torch.load(path, map_location="cpu", weights_only=True)}
    except Exception as error:  # whose first line tells to set weights_only=False
        raise AsgaError(f"{path} holds no state_dict of plain tensors ({type(error).__name__})") from None

def load_weights(model, arch, source, classes):
    """Fill `model` from a file or "imagenet". True where its classifier, of other classes, is not trained."""
    state = read_checkpoint(source, arch)
    trained, own = state.get("classes", classes), model.state_dict()
    for key in ("state", "state_dict", "model_state_dict", "model", "net"):
        state = state[key] if isinstance(state.get(key), dict) else state
    state = {str(key).removeprefix("module."): value for key, value in state.items()}
    strange = [key for key in own.keys() ^ state.keys() if not key.endswith("num_batches_tracked")]
    head = [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    if strange or any(own[key].shape[1:] != state[key].shape[1:] for key in head):
        raise AsgaError(f"weights {source} are of another network than {arch}: see {min(strange or head)!r}")
    own.update((key, state[key]) for key in own.keys() & state.keys() - set(head))
    model.load_state_dict(own)
    return bool(head) or list(trained) != list(classes)

# ------------------------------
# Data: CIFAR-10, handwritten digits, or a folder of images

IN_MEMORY = 4 * 2 ** 30  # bytes: a larger part of a data set is streamed

def read_image(path):
    """An RGB image; AsgaError names a file that holds none."""
    with refusing(f"{path} is no readable image, mend or delete it"):
        return import_torchvision().datasets.folder.default_loader(path)

def on_signals(handler, worker=None):
    """What Ctrl-C and SIGTERM do, in a process or in its data workers."""
    signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGTERM, handler)

class ImageSet:
    """labels [N] and images: uint8 [N, 3, S, S], or a torchvision data set that workers decode."""

    def __init__(self, images, labels, size):
        self.images, self.labels, self.size = images, torch.as_tensor(labels), size
        self.share = 1.0  # of the shorter side, that a square from the middle takes

    def __len__(self):
        return len(self.labels)

    def __getitems__(self, index):
        """(uint8 [B, 3, S, S], labels [B]), or the AsgaError of an image: a worker that raises would hang.
        index: ints; or pairs with a seed, which draws crop and mirror image; those come normalized."""
        if torch.is_tensor(self.images):
            return self.images[index], self.labels[index]
        vision, images = import_torchvision().transforms, []
        middle = vision.Compose([vision.Resize(round(self.size / self.share)), vision.CenterCrop(self.size)])
        random = vision.Compose([vision.RandomResizedCrop(self.size), vision.RandomHorizontalFlip()])
        drawn = isinstance(index[0], list)
        index, seeds = zip(*index) if drawn else (index, index)
        for i, seed in zip(index, seeds):
            try:
                image = self.images[i][0]
            except AsgaError as error:
                return error, None
            if drawn:
                torch.default_generator.manual_seed(seed)  # torch.manual_seed is slow before CUDA is used
            image = vision.functional.pil_to_tensor(random(image) if drawn else middle(image))[None]
            images.append((normalize(image, self.size) if drawn else image)[0].permute(1, 2, 0))
        images = torch.utils.data.default_collate(images).permute(0, 3, 1, 2)  # channels last, shared at once
        return images, self.labels[list(index)]

    def subset(self, mask):
        """The images where the boolean mask [N] is true."""
        index, images = mask.nonzero()[:, 0], self.images
        images = images[index] if torch.is_tensor(images) else torch.utils.data.Subset(images, index.tolist())
        return ImageSet(images, self.labels[index], self.size)

    def load(self, device):
        """Decode everything, once, onto the device, where that is small."""
        if not torch.is_tensor(self.images) and 3 * self.size ** 2 * len(self) <= IN_MEMORY:
            blocks = torch.arange(len(self)).split(256)
            batches = progress(self.batches(blocks, "cpu"), "reading images, block", len(blocks))
            self.images = torch.cat([images for images, _ in batches])
        if torch.is_tensor(self.images):
            self.images, self.labels = self.images.to(device), self.labels.to(device)

    def batches(self, indices, device):
        """(uint8 [B, 3, S, S], labels [B]) on the device, for each index tensor [B] of `indices`."""
        workers = 0 if torch.is_tensor(self.images) else max(1, os.cpu_count() // rank_and_size()[1])
        loader = torch.utils.data.DataLoader(
            self, batch_sampler=map(torch.Tensor.tolist, indices), collate_fn=tuple, num_workers=workers,
            worker_init_fn=functools.partial(on_signals, signal.SIG_IGN), generator=torch.Generator())
        for images, labels in loader:
            if isinstance(images, AsgaError):
                raise images
            yield images.to(device), labels.to(device)

    def stream(self, start, batch_size, device, resolution, seed, style, part=0, parts=1):
        """Endless (x, y) batches from step `start`; k's depends on seed and k, and of each only one part of
        `parts` is decoded. style: flip, crop, imagenet (by the workers, anew in every epoch) or none."""
        if style != "imagenet":
            self.load(device)
        size, seed = min(batch_size, len(self) // parts * parts), seed * 1_000_003
        count, mine = len(self) // size, slice(part * size // parts, (part + 1) * size // parts)

        def indices():
            for epoch in itertools.count(start // count):
                order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed + epoch))
                for number, batch in enumerate(order.split(size)[:count]):
                    seeds = torch.arange(size) + size * (seed + epoch * count + number)
                    yield (torch.stack([batch, seeds], 1) if style == "imagenet" else batch)[mine]

        batches = self.batches(itertools.islice(indices(), start % count, None), device)
        for step, (images, y) in enumerate(batches, start):
            if style in ("flip", "crop"):
                draws = torch.Generator().manual_seed(seed + step)
                images = augment(images, style == "flip", draws, size, mine)
            yield normalize(images, resolution), y

@functools.cache
def statistics(device):
    """ImageNet's mean and deviation, which pretrained networks expect: [2, 3, 1, 1]."""
    rows = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return torch.tensor(rows, device=device)[..., None, None]

def normalize(images, resolution):
    """uint8 [B, 3, S, S] to float32 [B, 3, R, R]; what is float32 already is only resized."""
    mean, std = statistics(images.device)
    x = images
    if images.dtype == torch.uint8:
        x = images.to(torch.float32, memory_format=torch.channels_last).div_(255).sub_(mean).div_(std)
    if x.shape[-1] != resolution:
        x = F.interpolate(x, size=resolution, mode="bilinear", align_corners=False)
    return x.contiguous(memory_format=torch.channels_last)

def augment(images, flip, generator, size, mine):
    """uint8 [B, 3, S, S], those of the slice `mine` of a batch of `size`: random crops, padded by an eighth;
    `flip`: half of them mirrored."""
    b, _, s, _ = images.shape
    pad, side, device = s // 8, torch.arange(s), images.device
    top, left = torch.randint(2 * pad + 1, (2, size, 1), generator=generator)[:, mine]
    mirror = torch.randint(2, (size, 1), generator=generator)[mine].bool() & flip
    rows, columns = side + top, torch.where(mirror, side.flip(0), side) + left  # [B, S]
    rows, columns = rows[:, :, None].to(device), columns[:, None].to(device)
    padded = F.pad(images, (pad,) * 4).permute(0, 2, 3, 1)
    return padded[torch.arange(b, device=device)[:, None, None], rows, columns].permute(0, 3, 1, 2)

def stratified(labels, share):
    """Boolean mask [N]: a random `share` of each class (at least one image), by a fixed seed."""
    mask, generator = torch.zeros(len(labels), dtype=torch.bool), torch.Generator().manual_seed(0)
    for label in labels.unique():
        index = (labels == label).nonzero()[:, 0]
        drawn = index[torch.randperm(len(index), generator=generator)]
        mask[drawn[:max(1, round(share * len(index)))]] = True
    return mask

def digits():
    """UCI handwritten digits, 1,797 real 8x8 images, upsampled to 32x32; a fifth validates."""
    import numpy
    with numpy.load(Path(__file__).resolve().parent / "data" / "digits.npz") as file:
        images, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"]).long()
    images = F.interpolate(images[:, None] * (255 / 16), size=32, mode="bilinear", align_corners=False)
    both = ImageSet(images.round().byte().expand(-1, 3, -1, -1), labels, 32)
    val = stratified(labels, 0.2)
    return list("0123456789"), both.subset(~val), both.subset(val)

def through_torchvision(name, root):
    """CIFAR-10, downloaded into `root`, or a folder, sized as its first image."""
    sets, parts = import_torchvision().datasets, ("train", "val")
    with refusing(f"--data {name!r} is not cifar10, digits or a folder of images"):
        if name == "cifar10":
            train, val = (sets.CIFAR10(root, part == "train", download=True) for part in parts)
        else:
            train, val = (sets.ImageFolder(Path(name) / part, loader=read_image) for part in parts)
    for odd in set(train.classes) ^ set(val.classes):
        raise AsgaError(f"--data {name}: class {odd!r} is in only one of train/ and val/")
    size = min(train[0][0].size)
    return train.classes, ImageSet(train, train.targets, size), ImageSet(val, val.targets, size)

def load_data(name, root, spec=""):
    """(classes, train, val) that --data and --classes name; AsgaError where there is none."""
    classes, train, val = digits() if name == "digits" else through_torchvision(name, root)
    every, chosen = range(len(classes)), []
    for part in (spec or f"0-{every[-1]}").split(","):
        first, _, last = part.partition("-")
        valid = first.isdigit() and (last or first).isdigit()
        found = range(int(first), int(last or first) + 1) if valid else ()
        chosen += found or [-1]  # refused below
    if not set(chosen) <= set(every) or len(set(chosen)) < max(2, len(chosen)):
        raise AsgaError(f"--classes {spec}: name at least two of 0-{every[-1]}, each once, like 0-4,7")
    label = torch.full((len(classes),), -1)
    label[chosen] = torch.arange(len(chosen))
    for part in (train, val):
        part.labels = label[part.labels]
    return [classes[c] for c in chosen], train.subset(train.labels >= 0), val.subset(val.labels >= 0)

# ------------------------------
# Runs: messages, progress, evaluation

def say(line):
    """A line to the person at the terminal: stdout is for results. Of several processes all tell errors."""
    rank = rank_and_size()[0]
    if not rank or line.startswith("error: "):
        print(f"asga: {f'process {rank}: ' if rank else ''}{line}", file=sys.stderr, flush=True)

def one_line(error):
    """The first line of an error's message, or its kind."""
    return (str(error) or type(error).__name__).splitlines()[0]

@contextlib.contextmanager
def refusing(what):
    """Whatever fails inside becomes an AsgaError that says `what` is wrong, and why."""
    try:
        yield
    except Exception as error:
        raise AsgaError(f"{what} ({type(error).__name__}: {one_line(error)})") from error

def human(value):
    """1234567 → '1.235M'."""
    unit = max((unit for unit in SCALES if SCALES[unit] <= value), key=SCALES.get, default="")
    return f"{value / SCALES[unit]:.4g}{unit.upper()}"

def progress(things, what, total, first=0, latest=None):
    """Hand on `things`, numbers first … total − 1, with a line on the time left and the loss in `latest`."""
    start, live = time.monotonic(), sys.stderr.isatty()
    last = start
    for done, thing in enumerate(things, first + 1):
        yield thing
        now = time.monotonic()
        due = done == total and now - start > 1 or now - last > (0.2 if live else 15)
        if due and not rank_and_size()[0]:
            left = round((now - start) / (done - first) * (total - done))
            loss = f"  loss {latest['loss']:.4f}" if latest else ""
            line = f"{what} {done}/{total}{loss}  ETA {left // 60}:{left % 60:02}"
            print(line, end="\x1b[K\r" if live and done < total else "\n", file=sys.stderr, flush=True)
            last = now

@contextlib.contextmanager
def evaluating(model):
    """In eval mode without gradients; the modes of all modules are put back."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for m, training in modes:
            m.training = training

def as_args(inputs):
    """A model's inputs, a tensor or several, as a tuple of arguments."""
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)

def evaluate(model, part, resolution, device, batch_size=64, capture=True):
    """{"accuracy": percent, "loss": cross-entropy} over an ImageSet."""
    part.load(device)
    rank, size = rank_and_size()
    blocks = torch.arange(len(part)).split(batch_size)[rank::size]
    total = torch.zeros(2, dtype=torch.float64, device=device)
    def count(images, y):
        logits = first_output(model(normalize(images, resolution)))
        loss = F.cross_entropy(logits, y, reduction="sum")
        total.add_(torch.stack([(logits.argmax(1) == y).sum(), loss]))

    with evaluating(model), prepared(model):
        play = Captured(device, capture)
        for batch in progress(part.batches(blocks, device), "evaluating, batch", len(blocks)):
            play("batch", count, *play.inputs(*batch))
    average([total])
    right, loss = (size * total).tolist()
    return {"accuracy": 100 * right / len(part), "loss": loss / len(part)}

# ------------------------------
# Export: a quantized network in ONNX, with integers

class Operand(torch.autograd.Function):
    """The identity; in a graph for ONNX an operand: x on the grid (n, p), or integers (of a weight, of a bias
    without a grid), times scale. qonnx: a node Quant."""

    @staticmethod
    def forward(ctx, x, scale, grid, qonnx):
        return x * 1.0

    @staticmethod
    def symbolic(graph, x, scale, grid, qonnx):
        def constant(value, dtype):
            return graph.op("Constant", value_t=torch.tensor(value, dtype=dtype))

        def number(value):
            node = value.node().input().node() if value.node().kind() == "onnx::Cast" else value.node()
            return node.t("value").item() if node.kind() == "onnx::Constant" else math.nan

        def quantized(x):
            zero = 128 if n < 0 else 0  # uint8 everywhere: where types differ onnxruntime computes in float
            ends, zero = [constant(end + zero, torch.uint8) for end in grid], constant(zero, torch.uint8)
            before, most = [*x.node().inputs()] if x.node().kind() == "onnx::Clip" else [], math.inf
            low, high = [*map(number, before[1:]), math.inf, math.inf][:2]
            if n == 0 == low and high >= 0:  # ReLU6, or clamp(min=0): a bound on the integers
                x, most = before[0], high / number(scale)
            levels = graph.op("QuantizeLinear", x, scale, zero)
            if most < p:
                levels = graph.op("Clip", levels, ends[0], constant(round(most), torch.uint8))
            return graph.op("DequantizeLinear", graph.op("Clip", levels, *ends), scale, zero)

        kind, (n, p) = x.type(), grid or (0, 0)
        if qonnx:
            bits = constant((p - n).bit_length(), torch.float32)
            out = graph.op("qonnx.custom_op.general::Quant", x, scale, constant(0, torch.float32), bits,
                           signed_i=int(n < 0), narrow_i=0, rounding_mode_s="ROUND")
        elif kind.dtype().is_floating_point:
            if x.node().kind() == "onnx::Pad":  # by hand; no float is to stand between two products
                inner, *more = x.node().inputs()
                x = graph.op("Pad", quantized(inner), *more, mode_s=x.node().s("mode"))
            out = quantized(x)
        else:
            levels = graph.op("Clip", x, *(constant(end, torch.int8) for end in grid)) if grid else x
            out = graph.op("DequantizeLinear", levels, scale, axis_i=0)
        return out.setType(kind.with_dtype(torch.float32))

class Exporting(torch.overrides.TorchFunctionMode):
    """The first pass in it sees what becomes of products; after `write` a traced pass has integers."""

    def __init__(self, net, qonnx):
        super().__init__()
        self.qonnx, self.layer, self.operands, self.spared = qonnx, None, {}, set()
        self.calls, self.readers = collections.defaultdict(list), collections.defaultdict(list)
        for name, layer in quantized_layers(net).items():
            if (bits := max(layer.weight_quantizer.bits + layer.input_quantizer.bits)) > 8:
                raise AsgaError(f"layer {name} has {bits} bits: no more than 8 can be exported")
            layer.input_quantizer.forward = lambda x: x
            layer.weight_quantizer.forward = functools.partial(self.enter, layer)

    def enter(self, layer, weight):
        self.layer = layer  # whose product comes next
        return weight

    def __torch_function__(self, func, types, args=(), kwargs=None):
        layer, kwargs, self.layer = self.layer, kwargs or {}, None
        if func is F.batch_norm and id(kwargs["bias"]) in self.spared:
            return args[0]
        for key, (x, *more) in self.operands.get(layer, {}).items():
            kwargs[key] = Operand.apply(kwargs[key] if x is None else x, *more, self.qonnx)
        out = func(*args, **kwargs)
        if not self.operands:
            leaves = torch.utils._pytree.tree_leaves
            for t in leaves((args, kwargs)) if any(map(torch.is_tensor, leaves(out))) else ():
                self.readers[id(t)].append((func, args, kwargs))
            if layer:
                self.calls[layer].append((kwargs, out))
        return out

    def write(self, layer):
        """Set a layer's operands. A BatchNorm that alone reads a convolution goes into its scales and bias (a
        negative γ turns integers) where they fit. Biases, the net's too, become whole units of s · s_x."""
        q, q_x = layer.weight_quantizer, layer.input_quantizer
        grid, s, s_x = q.grid[1:, 0].tolist(), q.steps.double(), q_x.steps.double()
        (given, out), *others = self.calls[layer]
        readers, weight = self.readers[id(out)], given["weight"].clone()
        bias = shift = None if self.qonnx else given.get("bias")
        if not self.qonnx:
            weight = (weight / q.steps).clamp(*grid).round().to(torch.int8)
        alone = isinstance(layer, nn.Conv2d) and not others and [f for f, *_ in readers] == [F.batch_norm]
        norm = readers[0][2] if alone and not self.qonnx else {}
        if norm.get("bias") is not None and len(self.readers[id(norm["bias"])]) == 1 and not norm["training"]:
            (_, mean, var), ones = readers[0][1], torch.ones(len(weight), 1, 1, 1, dtype=torch.float64)
            more = norm["eps"], norm["weight"], norm["bias"]
            factor, moved = nn.utils.fuse_conv_bn_weights(ones, bias, mean, var, *more)
            turned, fine = weight * factor.sign(), s * factor.abs().flatten()
            if torch.equal(turned, turned.clamp(*grid)) and (moved / (fine * s_x)).abs().max() < 2 ** 31:
                weight, s, shift, bias = turned.to(torch.int8), fine, moved, norm["bias"]
                self.spared.add(id(bias))
        layer.register_buffer("operand", weight)
        self.operands[layer] = {"input": (None, q_x.steps[0], q_x.grid[1:, 0].tolist()),
                                "weight": (layer.operand, s.float().squeeze(), grid)}
        if shift is not None and (shift / (s * s_x)).abs().max() < 2 ** 31:  # int32 holds it
            layer.register_buffer("bias_operand", (shift / (s * s_x)).round().int())
            self.operands[layer]["bias"] = layer.bias_operand, (s * s_x).float().squeeze(), None
            bias.add_(layer.bias_operand * s * s_x - shift)

def to_onnx(net, example, form="qcdq"):
    """(onnx.ModelProto, the network that it computes: a copy of `net`, its biases rounded). net: quantized, 8
    bits at most. example: inputs [2, …]; other batch sizes fit too. form "qcdq": QuantizeLinear, Clip to the
    bits, DequantizeLinear; weights and biases are integers. "qonnx": nodes Quant, no bias is rounded."""
    import onnx
    net, buffer = copy.deepcopy(net).cpu().eval().requires_grad_(False), io.BytesIO()
    names = "images", "logits"
    with torch.no_grad(), warnings.catch_warnings(action="ignore"), Exporting(net, form == "qonnx") as passes:
        net(example)
        for layer in list(passes.calls):
            passes.write(layer)
        with refusing("torch.onnx cannot export this network"):
            torch.onnx.export(net, (example,), buffer, input_names=names[:1], output_names=names[1:],
                              dynamic_axes=dict.fromkeys(names, {0: "batch"}), opset_version=17, dynamo=False)
    for q in quantizers_of(net):
        del q.forward
    model = onnx.load_from_string(buffer.getvalue())
    for node in [node for node in model.graph.node if node.op_type == "Constant"]:  # qonnx reads initializers
        node.attribute[0].t.name = node.output[0]
        model.graph.initializer.append(node.attribute[0].t)
        model.graph.node.remove(node)
    return model, net

def read_bits(model):
    """{layer: (w, a)} as an exported graph tells; AsgaError for weights beyond them."""
    from onnx.numpy_helper import to_array as read
    found, a = {}, 0
    arrays = {t.name: read(t) for t in model.graph.initializer}
    for node in model.graph.node:  # of each product the input comes before the weight
        values = [arrays.get(name) for name in node.input]
        whole = node.op_type == "Clip" and values[1] is not None and values[1].dtype.itemsize == 1
        if node.op_type == "Quant" or whole:
            n, p = (0, 2 ** int(values[3]) - 1) if node.op_type == "Quant" else map(int, values[1:])
            bits = (p - n).bit_length()
            if values[0] is None:
                a = bits
            else:
                found[node.input[0].removesuffix(".operand")] = bits, a
                if node.op_type == "Clip" and not n <= values[0].min() <= values[0].max() <= p:
                    raise AsgaError(f"{node.input[0]} has integers beyond {n} … {p}")
    return found

def read_onnx(path):
    """(onnx.ModelProto, what export wrote into it)."""
    import onnx
    with refusing(f"{path} is no ONNX file of export"):
        model = onnx.load(path)
        return model, json.loads(model.metadata_props[0].value)

class Runtime(nn.Module):
    """An onnx.ModelProto as a network on the CPU, in onnxruntime (a QONNX one by way of qonnx)."""

    def __init__(self, model, optimize=True):
        super().__init__()
        if any(node.op_type == "Quant" for node in model.graph.node):
            from qonnx.core.modelwrapper import ModelWrapper
            from qonnx.transformation.qonnx_to_qcdq import QuantToQCDQ
            model = ModelWrapper(model).transform(QuantToQCDQ()).model
            model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
            model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "batch"
        import onnxruntime as ort
        options, levels = ort.SessionOptions(), ort.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])

    def forward(self, x):
        return torch.from_numpy(self.session.run(["logits"], {"images": x.contiguous().numpy()})[0])

# ------------------------------
# Commands: a folder each with log and checkpoints; stopped at any step and continued

def describe(device):
    """The machine in a line."""
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu

class Job:
    """A command's device, data and network, checked before it writes; its folder; its loop."""

    def __init__(self, cfg, result, network=True):
        cfg.arch = cfg.arch or "resnet20"
        self.cfg, self.result, (self.rank, self.processes) = cfg, result, rank_and_size()
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        name = auto if cfg.device == "auto" else cfg.device
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name  # torchrun's
        with refusing(f"--device {name} does not work, use cpu"):
            self.device = torch.zeros(1, device=name, dtype=torch.float64).device
        if getattr(cfg, "batch_size", 0) % self.processes:
            raise AsgaError(f"--batch-size {cfg.batch_size} is that of all {self.processes}: give a multiple")
        if self.processes > 1 and self.device.type == "cuda" and cfg.capture:
            cfg.capture = False
            say("steps of several processes are not recorded")
        Fused.on, vision = cfg.compile, ":" not in cfg.arch and cfg.arch != "resnet20"
        self.classes, train, self.val = load_data(cfg.data, cfg.data_root, cfg.classes)
        self.train = train.subset(stratified(train.labels, cfg.images))
        self.resolution = cfg.resolution or (64 if vision else min(self.val.size, 224))
        cost_resolution = cfg.cost_resolution or (224 if vision else self.resolution)
        auto = "crop" if cfg.data == "digits" else "imagenet" if self.val.size > self.resolution else "flip"
        self.style = auto if cfg.augment == "auto" else cfg.augment
        if self.style == "imagenet" and cfg.data == "digits":
            raise AsgaError("--augment imagenet is for pictures in files: digits take crop")
        self.train.size = self.val.size = min(self.val.size, self.resolution)
        self.train.share = self.val.share = 0.875 if self.style == "imagenet" else 1.0
        if not network:
            return
        torch.manual_seed(cfg.seed)
        self.model = build(cfg.arch, len(self.classes)).to(self.device, memory_format=torch.channels_last)
        for resolution in (self.resolution, cost_resolution):
            what = f"{cfg.arch}, {resolution} px: no {len(self.classes)} logits, try another --resolution"
            with refusing(what), evaluating(self.model):
                self.example = torch.zeros(1, 3, resolution, resolution, device=self.device)
                shape = tuple(first_output(self.model(self.example)).shape)
                if shape != (1, len(self.classes)):
                    raise ValueError(f"but {shape}")
        self.untrained = not cfg.weights or load_weights(self.model, cfg.arch, cfg.weights, self.classes)

    def start(self):
        """Make --out. A run with these settings that is there goes on."""
        self.val.load(self.device)  # a broken image shows now
        cfg = self.cfg
        cfg.out = cfg.out or time.strftime("runs/%Y%m%d-%H%M%S")
        settings = {k: v for k, v in vars(cfg).items() if k not in ("function", "out", "capture")}
        self.settings = json.loads(json.dumps(settings))
        self.out, config = Path(cfg.out), Path(cfg.out) / "config.json"
        self.out.mkdir(parents=True, exist_ok=True)
        if (self.out / self.result).exists():  # the last thing that is written
            raise AsgaError(f"--out {cfg.out} holds a finished {self.result}: give another, or delete it")
        old = read_json(config)["settings"] if config.exists() else self.settings
        for key, value in self.settings.items():
            if old.get(key) != value:
                raise AsgaError(f"--out {cfg.out} holds a run with {key} {old.get(key)!r}: give another")
        write_json(config, {"settings": self.settings, "versions": VERSIONS})

    def stream(self, start, *part):
        """From step `start` this process's slices of the batches, or another part (number, of how many)."""
        cfg, part = self.cfg, part or (self.rank, self.processes)
        how = cfg.batch_size, self.device, self.resolution, cfg.seed, self.style
        return self.train.stream(start, *how, *part)

    def inputs(self, count):
        return (x for x, _ in itertools.islice(self.stream(0, 0, 1), count))

    def evaluate(self, net, new_statistics=False):
        average(b for b in net.buffers() if b.is_floating_point())  # BatchNorm's: each process saw its slices
        if new_statistics:  # of BatchNorm, which rounding shifts (our choice)
            torch.optim.swa_utils.update_bn(self.inputs(16), net)
        return evaluate(net, self.val, self.resolution, self.device, capture=self.cfg.capture)

    def tune(self, model, phase, epochs, lr, weight_decay, warmup=0.0, policy=None):
        """Train by SGD; the seconds it took."""
        epoch = max(1, len(self.train) // self.cfg.batch_size)
        total, every = epochs * epoch, 0 if phase == "weights" else epoch * self.cfg.eval_every
        optimizer = ASGA(parameter_groups(model, lr, weight_decay), torch.optim.SGD, **METHODS["joint"],
                         momentum=0.9, nesterov=True, fused=self.device.type == "cuda")
        guard, play = step_guard(model), Captured(self.device, self.cfg.capture)
        best = self.out / "best.pt"  # the network after the epoch of the highest accuracy
        def step(x, y, done):
            cosine(optimizer, done, total, warmup)
            update(model, optimizer, guard, play, x, y, F.cross_entropy, self.cfg.precision)
            record = {"loss": optimizer.last["loss"].clone()}
            if every and (done + 1) % every == 0:
                accuracy, loss = self.evaluate(model).values()
                if not best.exists() or read_checkpoint(best)["accuracy"] < accuracy:
                    self.save("best.pt", model, policy, accuracy=accuracy)
                record.update(epoch=(done + 1) // epoch, accuracy=accuracy, val_loss=loss)
                say("epoch {epoch}: accuracy {accuracy:.2f} %, cross-entropy {val_loss:.4f}".format(**record))
            return record

        return self.loop(phase, total, step, model, optimizer)

    def full_precision(self):
        """Train the network where --weights does not fit; the seconds it took."""
        if not self.untrained:
            return 0.0
        cfg = self.cfg
        say(f"no --weights for these classes: training on {cfg.data} first")
        torch.manual_seed(cfg.seed)
        lr = cfg.fp_lr / 10 if cfg.weights else cfg.fp_lr
        seconds = self.tune(self.model, "weights", cfg.fp_epochs, lr, 5e-4, warmup=0.1)
        self.save("weights.pt", self.model, seconds=seconds)
        return seconds

    def save(self, name, model, policy=None, form="asga-model", **more):
        more.update(format=form, arch=self.cfg.arch, classes=self.classes, resolution=self.resolution)
        more.update(data=(self.cfg.data, self.cfg.data_root, self.cfg.classes), augment=self.style)
        more.update(state=model.state_dict(), policy=policy and policy.to_json())
        write_atomic(self.out / name, more)

    def loop(self, phase, total, step, net, optimizer):
        """step(x, y, done) for all batches; the seconds it took. Records are read at checkpoints alone."""
        checkpoint = self.out / f"{phase}.ckpt"
        log = self.out / ("weights.jsonl" if phase == "weights" else "log.jsonl")
        start, before = 0, 0.0
        if checkpoint.exists():
            state = read_checkpoint(checkpoint)
            net.load_state_dict(state["net"])
            optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["rng"])
            torch.cuda.set_rng_state_all(state["cuda_rng"][:torch.cuda.device_count()])
            start, before = state["step"], state["seconds"]
            say(f"going on with {phase} at step {start}")
        if self.processes > 1 and start < total:
            torch.manual_seed(1_000_003 * self.cfg.seed + self.processes * start + self.rank)  # dropout's
            average(net.parameters())  # should a GPU have rounded
        lines = log.read_text().splitlines(True)[:start] if log.exists() else []
        records, latest, saved = [], {}, time.monotonic()
        began, self.stopping = saved - before, False
        batches = progress(itertools.islice(self.stream(start), total - start), phase, total, start, latest)
        on_signals(self.stop)
        try:
            for done, (x, y) in enumerate(batches, start):
                record, now = step(x, y, done), time.monotonic()
                records.append({"step": done, **record, "time": round(now - began, 3)})
                latest.update(record)
                stopping = torch.tensor(float(self.stopping))
                average([stopping])  # a signal reaches processes at different steps, or amid this line
                if stopping or done + 1 == total or now - saved > 60:
                    lines += self.lines(records)
                    write_atomic(log, "".join(lines))  # first: no checkpoint is ahead of its log
                    state = dict(net=net.state_dict(), optimizer=optimizer.state_dict(), step=done + 1)
                    state.update(rng=torch.get_rng_state(), cuda_rng=torch.cuda.get_rng_state_all())
                    state.update(seconds=time.monotonic() - began)
                    write_atomic(checkpoint, state)
                    records, saved = [], now
                if stopping:
                    raise KeyboardInterrupt(f"stopped in {phase} after step {done + 1} of {total}, all saved")
        finally:
            on_signals(signal.default_int_handler)
        return round(time.monotonic() - began, 3)

    def stop(self, signum, frame):
        self.stopping = True
        if self.processes == 1:
            say("stopping after this step (again: at once)")
            on_signals(signal.default_int_handler)

    def lines(self, records):
        """The log's lines, read from the device in one block; AsgaError where a loss is not finite."""
        for key in [key for key, value in records[0].items() if torch.is_tensor(value)]:
            column = torch.stack([record[key] for record in records]).tolist()
            for record, value in zip(records, column):
                record[key] = value
        for record in records:
            if not math.isfinite(record["loss"]):
                raise AsgaError(f"loss {record['loss']}, step {record['step']}: lower --lr, in another --out")
        return [json.dumps(record) + "\n" for record in records]

    def finish(self, metrics, policy=None):
        write_json(self.out / "metrics.json", metrics)
        if policy:
            policy.save(self.out / "policy.json")  # last: a run that has it is finished
        for checkpoint in self.out.glob("*.ckpt"):
            checkpoint.unlink(missing_ok=True)
        for name, values in metrics.items():
            if isinstance(values, dict):
                print(f"accuracy  {values['accuracy']:.2f} %, cross-entropy {values['loss']:.4f}: {name}")
        print(f"time      {metrics['seconds']:.1f} s, first training {metrics.get('fp_seconds', 0):.1f} s")
        print(f"folder    {self.out}")

def cmd_search(cfg):
    """search a policy on the proxy set"""
    settings = SearchSettings(**{f.name: getattr(cfg, f.name) for f in dataclasses.fields(SearchSettings)})
    vars(cfg).update(vars(settings))
    if not cfg.data:
        cfg.data = "cifar10" if (Path(cfg.data_root) / "cifar-10-batches-py").is_dir() else "digits"
        say(f"no --data: taking {cfg.data}; --data cifar10 downloads it")
    job = Job(cfg, "policy.json")
    budget = plan(job.model, job.example, cfg.budget, settings)
    job.start()
    untrained = cfg.random_weights or cfg.method == "uniform" and not cfg.weights
    fp_seconds = 0.0 if untrained else job.full_precision()
    torch.manual_seed(cfg.seed)
    began = time.monotonic()
    run = Search(job.model, budget, settings, job.inputs(4), capture=cfg.capture)
    seconds = time.monotonic() - began + job.loop("search", settings.steps, run.step, run.net, run.optimizer)
    about = dict(method=cfg.method, seed=cfg.seed, seconds=round(seconds, 3), device=describe(job.device),
                 settings=job.settings)
    proxy = dict(data=cfg.data, classes=len(job.classes), images=len(job.train), resolution=job.resolution)
    policy = run.policy(arch=cfg.arch, proxy=proxy, search=about)
    metrics = {"fp_seconds": fp_seconds, "seconds": about["seconds"], "policy_bops": policy.bops}
    if settings.steps or not untrained:  # else nothing was trained
        metrics["full_precision"] = job.evaluate(job.model)
        metrics["supernet"] = job.evaluate(run.net, new_statistics=True)
        metrics["policy"] = job.evaluate(attach_quantizers(run.net, policy.layers), new_statistics=True)
        job.save("supernet.pt", run.net, form="asga-supernet")
    job.finish(metrics, policy)
    print(" w bits  a bits    MACs  layer")
    for name, (w, a) in policy.layers.items():
        print(f"{w:7} {a:7} {human(policy.sizes[name].macs):>7}  {name}")
    spent = budget.spent(torch.tensor(list(policy.layers.values())).t().to(budget.lo))
    print(f"cost      {human(policy.bops)} BOPs, {human(policy.cost['weight_bits'] / 8)}B of weights")
    print(f"budget    {cfg.budget}, {100 * spent:.2f} % spent")

def cmd_transfer(cfg):
    """tune a network with a policy's bits on the target set"""
    policy = Policy.load(cfg.policy)
    cfg.arch = cfg.arch or policy.info["arch"]
    job = Job(cfg, "metrics.json")
    policy.check(job.model, job.example)
    policy.sizes = trace(job.model, job.example)
    job.start()
    metrics = {"policy_bops": policy.bops, "fp_seconds": job.full_precision()}
    torch.manual_seed(cfg.seed)
    began = time.monotonic()
    net = attach_quantizers(job.model, policy.layers)
    calibrate(net, job.inputs(4))
    quantized_layers(net)[next(iter(policy.layers))].input_quantizer.steps.requires_grad_(False)
    metrics["full_precision"] = job.evaluate(job.model)
    metrics["quantized"] = job.evaluate(net, new_statistics=True)
    seconds = time.monotonic() - began
    seconds += job.tune(net, "transfer", cfg.epochs, cfg.lr, cfg.weight_decay, policy=policy)
    metrics.update(tuned=job.evaluate(net), seconds=round(seconds, 3))
    job.save("model.pt", net, policy)
    job.finish(metrics)

def cmd_train(cfg):
    """train full-precision weights"""
    cfg.data = cfg.data or "cifar10"
    job = Job(cfg, "metrics.json")
    job.start()
    seconds = job.tune(job.model, "train", cfg.epochs, cfg.lr, 5e-4, warmup=0.1)
    job.save("model.pt", job.model)
    job.finish({"full_precision": job.evaluate(job.model), "seconds": seconds})

def open_model(cfg):
    """(Job, network, Policy or None) of a model.pt or .onnx; the data are its run's where cfg names none."""
    exported = cfg.model.endswith(".onnx")
    cfg.device = "cpu" if exported else cfg.device
    model, state = read_onnx(cfg.model) if exported else (None, read_checkpoint(cfg.model))
    if state.get("format") != "asga-model":
        raise AsgaError(f"{cfg.model} is no model.pt of train or transfer and no model.onnx of export")
    if not cfg.data:
        cfg.data, cfg.data_root, cfg.classes = state.get("data", ("", "", ""))
    cfg.arch, cfg.weights, cfg.images, cfg.seed = state["arch"], "", 1.0, 0
    cfg.augment = state.get("augment", "flip") if cfg.data != "digits" else "auto"
    cfg.resolution = cfg.cost_resolution = state["resolution"]
    job = Job(cfg, "", network=not exported)
    if job.classes != state["classes"]:
        raise AsgaError(f"{cfg.model} is of other classes: give its --data and --classes")
    policy = state["policy"] and Policy.load(cfg.model, state["policy"])
    if exported:
        return job, Runtime(model), policy
    with refusing(f"{cfg.model} does not fit {cfg.arch}"):
        net = attach_quantizers(job.model, policy.layers if policy else {})
        net.load_state_dict(state["state"])
    return job, net, policy

def cmd_eval(cfg):
    """accuracy of a model.pt or a model.onnx"""
    job, net, _ = open_model(cfg)
    print("accuracy  {accuracy:.2f} %, cross-entropy {loss:.4f}".format(**job.evaluate(net)))

def cmd_export(cfg):
    """write a model.pt as ONNX, with integers"""
    job, net, policy = open_model(cfg)
    model, rounded = to_onnx(net, torch.zeros(2, 3, job.resolution, job.resolution), cfg.format)
    if read_bits(model) != (policy.layers if policy else {}):
        raise AsgaError(f"{cfg.arch} cannot be exported: the graph has other bits than the policy")
    about = dict(format="asga-model", arch=cfg.arch, classes=job.classes, resolution=job.resolution)
    about.update(augment=job.style, policy=policy and policy.to_json())
    model.metadata_props.add(key="asga", value=json.dumps(about))
    index = torch.linspace(0, len(job.train) - 1, min(1024, len(job.train))).long()
    images = [normalize(x, job.resolution) for x, _ in job.train.batches(index.split(64), "cpu")]
    with evaluating(rounded):
        expected = torch.cat([first_output(rounded(x)) for x in images])
    for state in ("off", "on"):
        runtime = Runtime(model, optimize=state == "on")
        found = torch.cat([runtime(x) for x in images])
        far = (found - expected).abs().amax(1) / expected.abs().max()  # [images]
        agree = 100 * (found.argmax(1) == expected.argmax(1)).double().mean()
        print(f"checked   {len(far)} images, optimization {state}: {agree:.2f} % of labels as in PyTorch;"
              f" outputs differ by {far.max():.1e} of the largest; {(far > 1e-3).sum()} have other roundings")
        if agree < cfg.agree:
            raise AsgaError(f"{cfg.out} is not written: {agree:.2f} % of labels are PyTorch's; see --agree")
    if cfg.format == "qonnx":  # whose tools want whole shapes
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
        model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 1
    write_atomic(cfg.out, model.SerializeToString())
    for name, network in (("model.pt", net), ("as exported", rounded)):
        print("accuracy  {accuracy:.2f} %, cross-entropy {loss:.4f}: ".format(**job.evaluate(network)) + name)
    print(f"file      {cfg.out}, {human(model.ByteSize())}B")

def parse(argv):
    """The flags of a command line, and `function`, its command."""
    top = argparse.ArgumentParser("python asga.py", argparse.SUPPRESS, "Quantization policies by ASGA.")
    commands = top.add_subparsers(prog=top.prog, required=True)
    for function in (cmd_search, cmd_transfer, cmd_train, cmd_eval, cmd_export):
        sub = commands.add_parser(function.__name__[4:], usage=argparse.SUPPRESS, help=function.__doc__,
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
        sub.set_defaults(function=function)
    commands.choices["transfer"].add_argument("policy", help="policy.json of a search")
    commands.choices["eval"].add_argument("model", help="model.pt of train or transfer, model.onnx of export")
    commands.choices["export"].add_argument("model", help="model.pt of transfer")
    commands.choices["export"].set_defaults(device="cpu", compile=False, capture=False)
    def bitwidths(text):
        return tuple(int(part) for part in text.split(","))

    def add(users, help, choices=None, **flags):
        for user, (name, default) in itertools.product(users.split(), flags.items()):
            kind = {"type": bitwidths if isinstance(default, tuple) else type(default), "choices": choices}
            if isinstance(default, bool):
                kind = {"action": argparse.BooleanOptionalAction}
            flag = "--" + name.replace("_", "-")
            commands.choices[user].add_argument(flag, default=default, help=help, **kind)

    fit = "search transfer train"
    every = fit + " eval export"
    add(every, "cifar10, digits, or a folder with train/CLASS/* and val/CLASS/*", data="")
    add(every, "folder of cifar10", data_root="data")
    add(every, "only these classes, like 0-4,7", classes="")
    add(fit + " eval", "cpu, cuda, cuda:1", device="auto")
    add(fit + " eval", "compile the quantizers", compile=True)
    add(fit + " eval", "on CUDA: record the steps in graphs", capture=True)
    add(fit, "resnet20, a torchvision classifier, or file.py:function (num_classes=)", arch="")
    add(fit, "full-precision weights: a file, or imagenet", weights="")
    add(fit, "0: the images', to 224; torchvision: 64, MACs at 224", resolution=0, cost_resolution=0)
    add(fit, "share of the training images", images=1.0)
    add(fit, "auto: flip; digits: crop; pictures larger than the resolution: imagenet (random resized crops)",
        ["auto", "flip", "crop", "imagenet", "none"], augment="auto")
    add(fit, "of the training", batch_size=128, seed=0)
    add(fit, "folder for the results", out="")
    add("search transfer", "of a first training without fitting --weights", fp_epochs=20, fp_lr=0.1)
    add("transfer train", "epochs between two looks at the accuracy; 0: none", eval_every=1)
    add("transfer train", "bf16: under autocast", ["float32", "bf16"], precision="float32")
    add("transfer", "of the tuning", epochs=5, lr=0.01, weight_decay=1e-4)
    add("train", "of the training", epochs=20, lr=0.1)
    add("export", "qcdq: for onnxruntime; qonnx: for FINN, hls4ml", ["qcdq", "qonnx"], format="qcdq")
    add("export", "the file to write", out="model.onnx")
    add("export", "least percentage of labels as in PyTorch (few bits amplify roundings)", agree=99.0)
    add("search", BUDGET_HELP + "; a comma joins two", budget="3bit")
    add("search", "search from random weights", random_weights=False)
    for field in dataclasses.fields(SearchSettings):
        add("search", field.metadata["help"], field.metadata["choices"], **{field.name: field.default})
    cfg = top.parse_args(argv)
    for name, value in vars(cfg).items():
        least = {"images": 1e-9, "batch_size": 1, "epochs": 1, "fp_epochs": 1}.get(name, 0)
        most = 1 if name == "images" else 2 ** 32
        if isinstance(value, (int, float)) and not least <= value <= most:
            top.error(f"{name} {value} is not from {least} to {most}")
    return cfg

def main(argv=None):
    """Run a command line; the exit code."""
    cfg = parse(argv)
    try:
        if "TORCHELASTIC_RUN_ID" in os.environ:  # started by torchrun
            torch.distributed.init_process_group()  # gloo on CPUs, NCCL on GPUs
            if rank_and_size()[0]:
                sys.stdout = open(os.devnull, "w")
        cfg.function(cfg)
        return 0
    except AsgaError as error:
        say(f"error: {error}")
    except ModuleNotFoundError as error:  # of a package that export alone needs
        say(f"error: {error}: pip install onnx onnxruntime qonnx")
    except (OSError, torch.OutOfMemoryError) as error:  # a folder without permission, a full disk or GPU
        say(f"error: {one_line(error)}: make room, or give another path or --batch-size")
    except KeyboardInterrupt as stop:
        say(f"{str(stop) or 'stopped'}; the same command goes on with --out {getattr(cfg, 'out', '')}")
        return 130
    return 2

if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    if rank_and_size()[1] > 1:
        os._exit(code)  # while Python ends, a thread of gloo that still holds a tensor would abort
    sys.exit(code)
