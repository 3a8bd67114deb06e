"""ASGA: mixed-precision quantization policies, searched on a small data set and carried over to a large one.

An open reference implementation, in one file, of
    Ma, Ma, Zhou, Xie, He, Lu: "Learning from Loss Landscape: Generalizable Mixed-Precision Quantization via Adaptive
    Sharpness-Aware Gradient Aligning", ICML 2025, PMLR 267:42081-42095, arXiv 2505.04877   (cited below as "ASGA")

    python asga.py search                                          # bits per layer, found on the proxy set
    python asga.py transfer runs/…/policy.json --data DIR          # the same bits on the target set, weights tuned

Reading order: quantizer, supernet, their fast paths, cost and budget, ASGA optimizer, policy, search, networks, data, runs,
commands.
Symbols are the paper's: θ = (w, s, β) weights, quantizer steps and real-valued bitwidths; L loss; g its gradient;
ρ radius; h = L_p − L gap; α alignment step; C(β) expected cost; C* budget. "Our choice" marks what the paper leaves
open; README.md numbers these choices. Needs torch; pictures and torchvision's networks need torchvision.
"""
import argparse
import contextlib
import copy
import dataclasses
import difflib
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import os
import platform
import re
import shlex
import signal
import socket
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

__version__ = "0.1.0"
CANDIDATES = (2, 3, 4, 5, 6, 8)          # bitwidths that a search chooses from
CLEAR = "\r\x1b[K"                       # a terminal's line, from its start
STEP_MIN = 1e-20                         # least quantizer step that counts: far below any real one, far above denormal numbers


class AsgaError(ValueError):
    """What a user can mend: one line that names the value and the remedy. The command line prints it and exits with 2."""


def say(line):
    """One line to the person at the terminal (stderr: stdout is for results), in place of an unfinished line of progress."""
    print(f"{CLEAR if sys.stderr.isatty() else ''}asga: {line}", file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# Quantizer: LSQ, with one candidate bitwidth (deployment) or a mixture of several (search)
# ----------------------------------------------------------------------------------------------------------------------

def mix_forward(x, row):
    """Σ_k π_k Q_k(x) with Q_k(x) = s_k · clamp(round(x / s_k), n_k, p_k)  (LSQ, Esser et al. 2020, eq. 1-2).

    x: any shape and float dtype. row: [4, K], steps s above zero, integer bounds n and p, mixture weights π. Returns x's
    shape and dtype. Half precisions are computed in float32 and rounded to x's dtype at the end (bfloat16 keeps 8 bits).
    """
    wide, (s, n, p, pi) = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (x, row))
    mixed = 0
    for k in range(len(s)):
        mixed = mixed + (pi[k] * s[k]) * (wide / s[k]).clamp(n[k], p[k]).round()    # whole bounds: rounding may come last
    return mixed.to(x.dtype)


def mix_backward(grad, x, row):
    """The declared straight-through gradients of mix_forward, (∂x, ∂row [4, K]); rounding's true derivative is zero.

    ∂Q/∂x = 1 where n ≤ x/s ≤ p, else 0;  ∂Q/∂s = round(x/s) − x/s inside, n below, p above (LSQ eq. 3), times the LSQ
    gradient scale 1/√(numel·p) (p = 0, the signed 1-bit range, counts as 1);  ∂Q/∂π_k = Q_k − Q_1. Since Σπ = 1 always,
    what is the same for all k changes no gradient of what π is made from, and a difference spares two large sums.
    """
    wide, g, (s, n, p, pi) = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (x, grad, row))
    passed, levels, grad_s = 0, [], []
    for k in range(len(s)):
        v = wide / s[k]
        clamped = v.clamp(n[k], p[k])
        rounded = clamped.round()
        inside = clamped == v
        passed = passed + torch.where(inside, pi[k], 0)
        scale = pi[k] / (x.numel() * p[k].clamp_min(1)).sqrt()
        grad_s.append((g * torch.where(inside, rounded - v, rounded)).sum() * scale)
        levels.append(s[k] * rounded)
    zero = torch.zeros_like(grad_s[0])
    grad_pi = [zero] + [(g * (level - levels[0])).sum() for level in levels[1:]]
    none = [zero] * len(s)                                                                       # n and p are constants
    return (g * passed).to(x.dtype), torch.stack(grad_s + none + none + grad_pi).view(4, -1).to(row.dtype)


class FakeQuantize(torch.autograd.Function):
    """mix_forward and mix_backward as one differentiable function; only x is kept for the backward pass."""

    forward_kernel, backward_kernel = mix_forward, mix_backward                       # compiled: see Fused

    @staticmethod
    def forward(ctx, x, row):
        ctx.save_for_backward(x, row)
        return FakeQuantize.forward_kernel(x, row)

    @staticmethod
    def backward(ctx, grad):
        return FakeQuantize.backward_kernel(grad, *ctx.saved_tensors)


def check_bits(bits, where=""):
    """bits as a sorted tuple of distinct ints in 1…16; one int or several. Raises AsgaError, which begins with `where`."""
    found = tuple(bits) if isinstance(bits, (tuple, list, range)) else (bits,)
    for b in found:
        if isinstance(b, bool) or not isinstance(b, int) or not 1 <= b <= 16:
            raise AsgaError(f"{where}bitwidth {b!r} is not possible: give whole numbers from 1 to 16")
    if not found or len(set(found)) < len(found):
        raise AsgaError(f"{where}candidates {list(found)} must be one or more different bitwidths")
    return tuple(sorted(found))


def mse_optimal_step(x, n, p):
    """The step s > 0 (0-dim tensor) that minimizes Σ (Q(x) − x)² over the sample x [N] for the integer range [n, p].

    A logarithmic grid of clips finds the basin, a fine one its floor; alternating least squares (fix the levels, solve for
    s) refines that, and cannot make it worse.
    """
    top = x.abs().max() / max(p, 1)
    if not 0 < top < math.inf:                                       # nothing to fit (all zero), or not a number
        return torch.full_like(top, 1 / max(p, 1))
    few = x[:: max(1, len(x) // 8192)]
    s = top
    for grid in (torch.logspace(-2, 0, 32), torch.linspace(0.86, 1.16, 49)):
        steps = s * grid.to(x)                                                                              # [G]
        levels = (few / steps[:, None]).round().clamp(n, p)                                                 # [G, N]
        s = steps[(levels * steps[:, None] - few).square().sum(-1).argmin()]
    for _ in range(4):
        levels = (x / s).round().clamp(n, p)
        s = torch.where(levels.square().sum() > 0, (x * levels).sum() / levels.square().sum(), s)
    return s.clamp_min(STEP_MIN)


class Quantizer(nn.Module):
    """Tensor in, fake-quantized tensor of the same shape out: Q_b(x) for one candidate bitwidth b (plain LSQ), a mixture
    Σ_b π_b Q_b(x) for several. The supernet of the search and the deployed network are made of this one class.

    bits: one int or several (1…16). signed: True [−2^(b−1), 2^(b−1)−1], False [0, 2^b−1], None: unsigned where calibration
    saw no negative value. relaxation, where several candidates:
      "interpolate" (our choice, after FracBits, Yang & Jin 2021): `beta`, 0-dim, is the bitwidth itself; the two candidates
          beside it are mixed with λ = (β − b_lo)/(b_hi − b_lo). On a candidate that one alone speaks; ∂/∂β looks up (on the last, down).
      "softmax" (EdMIPS, Cai & Vasconcelos 2020): `logits` [K], π = softmax(logits / tau) over all candidates.
    `steps` [K] are learned. They start at the MSE-optimal clip of calibration data (calibrate, or else the first tensor
    seen), never from ones, and are NaN until then. `enabled = False` makes it the identity.
    """

    def __init__(self, bits, signed=None, relaxation="interpolate", tau=1.0):
        super().__init__()
        if relaxation not in ("interpolate", "softmax"):
            raise AsgaError(f"unknown relaxation {relaxation!r}: use 'interpolate' or 'softmax'")
        self.bits, self.relaxation, self.tau = check_bits(bits), relaxation, tau
        self.enabled, self.sample, self.ready = True, None, False
        self.auto_sign, self.row = signed is None, None
        count = len(self.bits)
        self.steps = nn.Parameter(torch.full((count,), math.nan))                               # s
        self.register_buffer("grid", torch.zeros(3, count, dtype=torch.int32))                  # rows: bits, n, p; exact also in .half()
        self.set_signed(signed is None or signed)
        if count == 1:
            self.register_buffer("beta", torch.tensor(float(self.bits[0])))
        elif relaxation == "interpolate":
            self.beta = nn.Parameter(torch.tensor(sum(self.bits) / count))                      # β
        else:
            self.logits = nn.Parameter(torch.zeros(count))                                      # z

    def set_signed(self, signed):
        """Choose the integer ranges: signed or unsigned."""
        b = torch.tensor(self.bits, dtype=self.grid.dtype)
        low = -(2 ** (b - 1)) if signed else torch.zeros_like(b)
        self.grid.copy_(torch.stack([b, low, low + 2 ** b - 1]))

    def expected_bits(self):
        """E[b] = Σ π_b b, 0-dim; for "interpolate" this is β itself."""
        return (torch.softmax(self.logits / self.tau, 0) * self.grid[0]).sum() if hasattr(self, "logits") else self.beta

    def calibrated(self):
        """Whether the steps are set. Asks the device until they are, not at every step."""
        self.ready = self.ready or not self.steps.isnan().any().item()
        return self.ready

    def _load_from_state_dict(self, *args):
        self.ready = False                                          # what is loaded may be from before calibration
        super()._load_from_state_dict(*args)

    def forward(self, x):
        if not self.enabled or not x.numel():                       # nothing to round, as where an expert gets no tokens
            return x
        if x.is_nested:                                             # what nn.TransformerEncoder makes of padded batches in eval mode
            if x.layout == torch.jagged:
                return torch.nested.nested_tensor_from_jagged(self(x.values()), x.offsets(), x.lengths())
            return torch.nested.as_nested_tensor([self(t) for t in x.unbind()])
        if self.sample is not None:                                 # calibration looks on, and changes nothing
            self.observe(x.detach())
            return x
        if not self.calibrated():
            self.calibrate(x)
        # the row [s, n, p, π] that mix_forward takes: made here, or for all quantizers of the model at once (Prepared)
        shared = self.row is not None and self.row.device == x.device                           # not in replicas on other devices
        return FakeQuantize.apply(x, self.row if shared else mixtures([self])[0])

    def __getstate__(self):
        return {**self.__dict__, "row": None}

    def observe(self, x, limit=65536):
        """Keep at most `limit` values of x (drawn evenly, by a fixed seed) for calibrate(), and whether any was negative."""
        negative, x = bool((x < 0).any()), x.flatten()
        if len(x) > limit:
            x = x[torch.randint(len(x), (limit,), generator=torch.Generator().manual_seed(0)).to(x.device)]
        self.sample.append((negative, x.to(torch.promote_types(x.dtype, torch.float32))))        # into a list that replicas share

    @torch.no_grad()
    def calibrate(self, x=None):
        """Set sign and steps from x (any shape), or from what was observed. Nothing seen: stays uncalibrated."""
        if x is not None:
            self.sample = []
            self.observe(x.detach())
        if self.sample:
            if self.auto_sign:
                self.set_signed(any(negative for negative, _ in self.sample))
            sample = torch.cat([values.to(self.steps.device) for _, values in self.sample])
            for k, (_, n, p) in enumerate(self.grid.t().tolist()):
                self.steps[k] = mse_optimal_step(sample, n, p)
        self.sample = None

    def select(self, bits):
        """A Quantizer of the same sign with the single candidate `bits` and the step learned for it."""
        if bits not in self.bits:
            raise AsgaError(f"{bits} bit was not among the candidates {list(self.bits)}")
        k = self.bits.index(bits)
        chosen = Quantizer(bits, bool(self.grid[1, k] < 0)).to(self.steps.device)
        chosen.steps.data = self.steps.data[k:k + 1].clone()
        chosen.enabled, chosen.auto_sign = self.enabled, self.auto_sign
        return chosen

    def extra_repr(self):
        return f"bits={self.bits}, relaxation={self.relaxation!r}"


def mixtures(quantizers):
    """[Q, 4, K']: for each of Q quantizers of one kind the steps s, bounds n and p, and weights π of the candidates in its
    mixture; K' is 2 for "interpolate"."""
    first = quantizers[0]
    s = torch.stack([q.steps for q in quantizers])                                                           # [Q, K]
    s = s.to(torch.promote_types(s.dtype, torch.float32))
    b, n, p = torch.stack([q.grid for q in quantizers], 1)                                                   # [Q, K] each
    if len(first.bits) == 1:
        pi = torch.ones_like(s)
    elif first.relaxation == "softmax":
        pi = torch.softmax(torch.stack([q.logits for q in quantizers]) / first.tau, 1)
    else:
        beta = torch.stack([q.beta for q in quantizers])[:, None]                                            # [Q, 1]
        low = (b[:, 1:-1] <= beta).sum(1, keepdim=True)                                        # of b_lo, the last one ≤ β
        index = torch.cat([low, low + 1], 1)
        b, n, p, s = (t.gather(1, index) for t in (b, n, p, s))
        share = (beta - b[:, :1]) / (b[:, 1:] - b[:, :1])                                                    # λ
        share = share + (share.clamp(0, 1) - share).detach()      # a perturbed β may stand beyond the last candidate
        pi = torch.cat([1 - share, share], 1)
    with torch.no_grad():
        s.clamp_min_(STEP_MIN)                           # a perturbation may carry a step to or below zero: no division by that
    return torch.stack([s, n, p, pi], 1)


# ----------------------------------------------------------------------------------------------------------------------
# Supernet: every Conv2d and Linear of any network gets a quantizer on its weight and one on its input
# ----------------------------------------------------------------------------------------------------------------------

class Operands(torch.overrides.TorchFunctionMode):
    """While one layer's own forward runs, F.conv2d(x, w) becomes F.conv2d(Q_a(x), Q_w(w)), and F.linear likewise, where w has
    the shape of its weight. It acts there and not on `weight` and the layer's input because subclasses pad by hand or
    standardize their weights: what must be on the integer grid is what the hardware multiplies.
    """

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.conv2d and func is not F.linear:
            return func(*args, **kwargs)
        names = dict(zip(("input", "weight", "bias", "stride", "padding", "dilation", "groups"), args), **kwargs)
        x, weight, layer = names.pop("input"), names.pop("weight"), self.layer
        if weight.shape != layer.operand_shape:
            return func(*args, **kwargs)
        layer.multiplied = True
        fixed = not (layer.learn_image_step or x.requires_grad) and len(layer.input_quantizer.bits) == 1

        def product(x, weight):
            with torch._C.DisableTorchFunction():              # a layer that holds other layers must not see their calls
                with torch.no_grad() if fixed else contextlib.nullcontext():
                    quantized = layer.input_quantizer(x)
                return func(quantized, layer.weight_quantizer(weight), **names)

        if layer.recompute:                                    # the quantized operands live no longer than the product
            out = checkpoint(product, x, weight, use_reentrant=False, preserve_rng_state=False)
        else:
            out = product(x, weight)
        if layer.tally is not None:
            layer.tally(out.numel() * weight[0].numel())
        return out


class QuantizedLayer:
    """Mixed into the class of a layer (see `twin`): same weight, same state-dict keys, same forward, quantized operands."""

    tally, recompute, learn_image_step = None, False, True                          # see trace, and set_training
    multiplied = False                                          # ever: stochastic depth may leave a layer out

    def forward(self, *args, **kwargs):
        with Operands(self):
            out = super().forward(*args, **kwargs)
        if not self.multiplied and self.tally is None and self.weight_quantizer.enabled:
            raise AsgaError(f"a {type(self).__mro__[2].__name__} does not multiply by its weight through F.conv2d or F.linear, so it "
                            f"cannot be quantized: give example_inputs, and it stays in full precision")
        return out

    def __reduce__(self):                                      # the mixed class has no importable name: pickle its parts
        return _revive, (type(self).__mro__[2],), self.__dict__


@functools.cache
def twin(kind):
    """The quantized twin of a layer class, Conv2d, Linear, or any subclass of them."""
    return type(f"Quantized{kind.__name__}", (QuantizedLayer, kind), {"__module__": kind.__module__})


def _revive(kind):
    layer = twin(kind)
    return layer.__new__(layer)


def layers_of(model):
    """{name: module} of what can be quantized, in the order of registration."""
    if any(map(nn.parameter.is_lazy, model.parameters())):
        raise AsgaError(f"{type(model).__name__} has lazy layers, whose sizes are not known yet: run a batch through it first")
    return {name: m for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}


def quantized_layers(model):
    """{name: layer} of a quantized model's layers; each has `weight_quantizer` and `input_quantizer`."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLayer)}


def quantizers_of(model):
    """All quantizers in a model."""
    return [m for m in model.modules() if isinstance(m, Quantizer)]


def set_quantizers(model, enabled):
    """Switch all quantizers of a model on or off. Without them it computes bit for bit what the original computes."""
    for q in quantizers_of(model):
        q.enabled = enabled


def _own_forward(layer, args):
    """A hook that does nothing. Its presence keeps torch from its fused transformer layers, which would bypass ours."""


def _attach(layer, weight_quantizer, input_quantizer):
    if not isinstance(layer, QuantizedLayer):
        layer.operand_shape = layer.weight.shape
        layer.__class__ = twin(type(layer))
        layer.register_forward_pre_hook(_own_forward)
    layer.weight_quantizer = weight_quantizer.to(layer.weight.device)
    layer.input_quantizer = input_quantizer.to(layer.weight.device)


@torch.no_grad()                                               # else scripted parameters are no leaves any more
def _copy(model):
    """deepcopy, also of networks that keep a computed tensor (an activation, old weight_norm), which deepcopy refuses."""
    computed = {id(t): t.detach().clone() for m in model.modules() for t in torch.utils._pytree.tree_leaves(vars(m))
                if torch.is_tensor(t) and t.grad_fn is not None}
    copied = copy.deepcopy(model, computed)
    for p, original in zip(copied.parameters(), model.parameters()):
        p.requires_grad_(original.requires_grad)
    return copied


def _as_args(example_inputs):
    return example_inputs if isinstance(example_inputs, (tuple, list)) else (example_inputs,)


@contextlib.contextmanager
def _evaluating(model):
    """In eval mode; modes are put back. Even to read a weight changes some networks while they train (spectral norm)."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training


@torch.no_grad()
def _run_eval(model, args):
    """model(*args) in eval mode, without a trace."""
    with _evaluating(model):
        return model(*args)


class LayerCost(NamedTuple):
    """Multiply-accumulates of one image through one layer, and the numbers in its weight."""
    macs: int
    numel: int


def trace(model, example_inputs):
    """{name: LayerCost} of every Conv2d and Linear that one eval forward pass really multiplies with, in call order.

    example_inputs: a tensor [N, C, H, W] or a tuple of arguments. MACs are per image, counted at the operands, so
    groups, strides, padding by hand and repeated calls are right. The model is left as it was.
    """
    model, macs = _copy(model), {}
    found = layers_of(model)
    for name, layer in found.items():
        if not isinstance(layer, QuantizedLayer):
            _attach(layer, Quantizer(8), Quantizer(8))
        layer.tally = lambda count, name=name: macs.update({name: macs.get(name, 0) + count})
    set_quantizers(model, False)
    args = _as_args(example_inputs)
    _run_eval(model, args)
    images = next((len(a) for a in torch.utils._pytree.tree_leaves(args) if torch.is_tensor(a) and a.dim() > 1), 1)
    return {name: LayerCost(count // images, found[name].weight.numel()) for name, count in macs.items()}


def edge_bits(names, keep):
    """{name: bits} of the layers that a search leaves alone. keep: an int, the bits of the first and the last layer;
    {name: bits}; a name or several (8 bits each); or None, no layer.
    """
    if not names:
        raise AsgaError("the network uses no Conv2d and no Linear layer: there is nothing to quantize")
    if keep is None:
        return {}
    if isinstance(keep, int):
        kept = dict.fromkeys([names[0], names[-1]], keep)
    else:
        if not isinstance(keep, (str, dict, list, tuple, set, frozenset)):
            raise AsgaError(f"keep {keep!r} is not understood: give bits, names of layers, {{name: bits}}, or None")
        kept = dict(keep) if isinstance(keep, dict) else dict.fromkeys([keep] if isinstance(keep, str) else keep, 8)
    for name, bits in kept.items():
        check_bits((bits,), "keep: ")
        if name not in names:
            raise AsgaError(f"keep names layer {name!r}, which the network lacks: its layers are {', '.join(names)}")
    return kept


def quantize(model, bits_or_policy, *, keep=8, example_inputs=None, relaxation="interpolate", tau=1.0):
    """A quantized copy of any nn.Module; the argument stays as it was.

    bits_or_policy: an int (that many bits everywhere); several ints, or {"w": ints, "a": ints}: the candidates of a
    supernet; or a Policy. keep: see edge_bits (a policy names every layer, so it is not used there). example_inputs (a
    tensor or a tuple of arguments, real data): calibrates all steps at once, finds the order of the layers, and leaves
    layers whose weight no F.conv2d or F.linear of their own forward uses in full precision. Without it each activation
    quantizer calibrates itself on the first tensor that it sees. A supernet quantized again with a policy keeps the steps
    that it learned.
    BatchNorm's statistics stay those of full precision: see update_statistics. Tune with StepGuard.
    Raises AsgaError where policy and network do not fit.
    """
    found = layers_of(model)
    if isinstance(bits_or_policy, Policy):
        bits_or_policy.check(model, example_inputs)
        choices = bits_or_policy.choices
    elif quantized_layers(model):
        raise AsgaError("the network is quantized already: quantize the original, or give a policy")
    else:
        reached = list(trace(model, example_inputs)) if example_inputs is not None else list(found)
        pair = bits_or_policy if isinstance(bits_or_policy, dict) else {"w": bits_or_policy, "a": bits_or_policy}
        if set(pair) != {"w", "a"}:
            raise AsgaError(f"bits {pair} are not understood: give an int, several, {{'w': …, 'a': …}}, or a Policy")
        kept = edge_bits(reached, keep)
        choices = {name: ((kept[name],),) * 2 if name in kept else (pair["w"], pair["a"]) for name in reached}
    net = attach_quantizers(model, choices, relaxation, tau)
    if quantized_layers(model):                                # a supernet: its steps are learned
        return net
    if example_inputs is not None:
        calibrate(net, [example_inputs])
    for layer in quantized_layers(net).values():               # the others: at the first call, on the operand that they make
        plain = type(layer).__mro__[2].forward in (nn.Conv2d.forward, nn.Linear.forward)
        if plain and layer.weight_quantizer.steps.isnan().any():
            with _evaluating(layer):
                layer.weight_quantizer.calibrate(layer.weight)
    return net


def attach_quantizers(model, choices, relaxation="interpolate", tau=1.0):
    """A copy of `model` whose layers named in choices {name: (candidates w, candidates a)} are quantized, not calibrated.
    Layers that are quantized already must get one candidate each, and keep the step learned for it."""
    model = _copy(model)
    found = layers_of(model)
    with _evaluating(model):
        for name, (w, a) in choices.items():
            layer, w, a = found[name], check_bits(w), check_bits(a)
            if not isinstance(layer, QuantizedLayer):
                _attach(layer, Quantizer(w, True, relaxation, tau), Quantizer(a, None, relaxation, tau))
            else:
                _attach(layer, layer.weight_quantizer.select(*w), layer.input_quantizer.select(*a))
    return model


def set_training(net, recompute=False):
    """How our own loops train a quantized network. recompute: layers keep their plain operands and quantize them again in the
    backward pass. Where a layer's input needs no gradient (images) and has one bitwidth, its step stays as calibrated: to
    learn it takes the gradient by the images, which nothing else needs.
    """
    for layer in quantized_layers(net).values():
        layer.recompute, layer.learn_image_step = recompute, False


class StepGuard:
    """`with StepGuard(model): optimizer.step()`: no quantizer step more than halves or doubles in one update. A step is a
    scale: one too large update of it, across zero, would silence its layer for good. Otherwise nothing changes."""

    def __init__(self, model):
        self.quantizers = quantizers_of(model)

    @torch.no_grad()
    def __enter__(self):
        self.steps = [q.steps for q in self.quantizers if q.calibrated()]            # the others calibrate themselves inside
        self.before = [s.clone() for s in self.steps]

    @torch.no_grad()
    def __exit__(self, *error):
        if self.steps:
            torch._foreach_maximum_(self.steps, torch._foreach_mul(self.before, 0.5))
            torch._foreach_minimum_(self.steps, torch._foreach_mul(self.before, 2.0))


def calibrate(model, batches):
    """Set the steps of all quantizers of a model from full-precision passes over a few `batches` (each a tensor or a tuple
    of arguments; up to 65,536 values of each stay in memory for every quantizer), in eval mode. Quantizers that no batch
    reaches stay as they were.
    """
    found = [q for q in quantizers_of(model) if q.enabled]
    for q in found:
        q.sample = []
    try:
        for batch in batches:
            _run_eval(model, _as_args(batch))
        for q in found:
            q.calibrate()
    finally:
        for q in found:
            q.sample = None


@torch.no_grad()
def update_statistics(model, batches):
    """Estimate BatchNorm's running statistics anew from `batches` (as for calibrate), in training mode: rounding shifts what
    layers put out, and at 2 or 3 bits the old statistics fit it badly (our choice). Unreached layers keep theirs, and so do
    frozen parts: those in eval mode where the model trains. Not torch's update_bn, which resets what frozen layers compute with.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None]
    frozen = [m for m in model.modules() if model.training and not m.training]
    with _evaluating(model), Prepared(model):                                                 # puts the modes back
        model.train()
        for m in frozen:
            m.training = False
        before = [(m, copy.deepcopy(m.state_dict()), m.momentum) for m in norms if m.training]
        complete = False
        try:
            for m, _, _ in before:
                m.reset_running_stats()
                m.momentum = None                                                             # the mean over all batches
            for batch in batches:
                model(*_as_args(batch))
            complete = True
        finally:
            for m, state, momentum in before:
                m.momentum = momentum
                if not complete or m.num_batches_tracked == 0:
                    m.load_state_dict(state)


# ----------------------------------------------------------------------------------------------------------------------
# Fast paths of quantizers and supernet: the same results, sooner. Skip them at first reading.
# ----------------------------------------------------------------------------------------------------------------------

class Fused:
    """Runs mix_forward or mix_backward through torch.compile: the quantizer is memory traffic, and a fused kernel reads
    x once. All layers share one kernel: x is flattened, its size is dynamic, steps and bounds are tensors. Without a
    compiler (C++ on CPU, Triton on CUDA) the same formula runs eagerly, and one line says so. Fused.on = False forbids it.
    """
    on = True

    def __init__(self, formula):
        self.formula, self.compiled = formula, None

    def __call__(self, *tensors):
        if not Fused.on or torch.is_grad_enabled() or torch.compiler.is_compiling():   # grad mode: double backward
            return self.formula(*tensors)
        x, row = tensors[-2:]                                               # last in both formulas
        last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        x = x.contiguous(memory_format=layout)

        def flat(t):                       # in memory order; no view and detached: dynamo guards on both, and would recompile
            t = t.detach().contiguous(memory_format=layout)
            return t.new_empty(0).set_(t.untyped_storage(), t.storage_offset(), (t.numel(),))

        def shaped(t):
            return t.as_strided(x.shape, x.stride())

        try:
            self.compiled = self.compiled or torch.compile(self.formula, dynamic=True)
            with torch.autocast(x.device.type, enabled=False):                     # one kernel inside and outside of autocast
                out = self.compiled(*(flat(t) for t in tensors[:-1]), row.detach())
        except Exception as error:                                                    # whatever a toolchain can raise
            out = self.formula(*tensors)                                              # raises again if the input is at fault
            Fused.on = False
            say(f"torch.compile does not work here ({type(error).__name__}); quantizers run eagerly: same results, slower")
            return out
        return shaped(out) if torch.is_tensor(out) else (shaped(out[0]), *out[1:])


FakeQuantize.forward_kernel, FakeQuantize.backward_kernel = Fused(mix_forward), Fused(mix_backward)


class Prepared:
    """`with Prepared(model): forward and backward pass`: the mixtures of all quantizers of a model are made at once, one
    operation for all instead of one for each. Inside, steps and bitwidths must not change. Same results, sooner.

    Each quantizer gets its row as a leaf; the gradients that rows collected go on to steps and bitwidths at the end, so that
    the backward pass may come in several parts (checkpointing) or leave layers out (whose gradients stay None).
    """

    def __init__(self, model):
        self.quantizers = quantizers_of(model)

    def __enter__(self):
        groups, self.rows = {}, []
        for q in self.quantizers:
            if q.ready:
                kind = len(q.bits), q.relaxation, q.tau, q.steps.device, q.steps.dtype, q.steps.requires_grad
                groups.setdefault(kind, []).append(q)
        for group in groups.values():
            for q, row in zip(group, mixtures(group).unbind()):
                q.row = row.detach().clone().requires_grad_(row.requires_grad)      # no view: dynamo would recompile for it
                self.rows.append((q, row))

    def __exit__(self, kind, *error):
        used = [(row, q.row.grad) for q, row in self.rows if q.row.grad is not None]
        idle = [p for q, _ in self.rows if q.row.grad is None for p in q.parameters() if p.grad is None]
        for q in self.quantizers:
            q.row = None
        self.rows = []
        if used and kind is None:
            torch.autograd.backward(*zip(*used))
            for p in idle:
                p.grad = None


# ----------------------------------------------------------------------------------------------------------------------
# Cost and budget: bit operations and bytes, a hard constraint on them, and the exact way back to whole bits
# ----------------------------------------------------------------------------------------------------------------------

BUDGET_HELP = "3bit (the cost of uniform 3/3), 7.2G (BOPs; K M G T), 4.5MB (size; KB MB GB), 0.05x (of the 32-bit BOPs)"
FILL = 0.99                              # a discrete policy spends at least this share of the budget, where one can


def human(value):
    """1234567 → '1.235M'."""
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if value >= factor:
            return f"{value / factor:.4g}{unit}"
    return f"{value:.4g}"


class Budget:
    """Bounds on the cost of a policy over given layers, and the projection that keeps a search on them.

    BOPs_l = macs_l · w_l · a_l, weight bits_l = numel_l · w_l. spec: see BUDGET_HELP; several are joined by commas ("3bit,
    4.5MB"). layers: {name: LayerCost}. lo, hi: [2, L], the least and largest bits of each layer (row 0 weights, row 1
    activations; equal where a layer is fixed). kept: names of the layers that "3bit" leaves at their bits. Raises
    AsgaError for an unreadable spec and for one that cannot be met.
    """

    def __init__(self, spec, layers, lo, hi, kept=()):
        self.spec, self.names = str(spec), list(layers)
        self.kept = torch.tensor([name in kept for name in layers], device=lo.device)
        self.lo, self.hi = lo.double().clone(), hi.double()
        # [2, L]: rows are MACs and numel, float64: exact up to 2^53
        self.sizes = torch.tensor([[c.macs for c in layers.values()], [c.numel for c in layers.values()]],
                                  dtype=torch.float64, device=lo.device)
        self.limits = {}                                                # {"bops": …, "weight_bits": …}, one or both
        for part in self.spec.split(","):
            kind, value = self._parse(part.strip())
            if kind in self.limits:
                raise AsgaError(f"budget {self.spec!r} bounds {kind} twice: give one bound on BOPs, one on the size")
            least, most = (self.cost(bits)[kind].item() for bits in (self.lo, self.hi))
            if value > most * (1 + 1e-9):
                say(f"budget {part.strip()!r} is more than the dearest policy costs: nothing has to be given up for it")
            if value < least:
                unit = (lambda v: human(v) + " BOPs") if kind == "bops" else (lambda v: human(v / 8) + "B")
                raise AsgaError(f"budget {part.strip()!r} = {unit(value)} cannot be met: with these candidates the network "
                                f"takes {unit(least)} to {unit(most)}")
            self.limits[kind] = value
        if "bops" not in self.limits:
            self.lo[1] = self.hi[1]                                     # activations cost nothing: they keep their most bits

    def _parse(self, text):
        match = re.fullmatch(r"(\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+)\s*([A-Za-z]*)", text)
        number, unit = (float(match[1]), match[2].lower()) if match else (0, "")
        scale = {"k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
        if number > 0 and math.isfinite(number):
            if unit in ("bit", "bits"):
                return "bops", self.cost(torch.where(self.kept, self.lo, number))["bops"].item()
            if unit == "x":
                return "bops", number * 32 * 32 * self.sizes[0].sum().item()
            if unit.removesuffix("bops") in scale:
                return "bops", number * scale[unit.removesuffix("bops")]
            if unit == "b" or len(unit) == 2 and unit[1] == "b" and unit[0] in scale:
                return "weight_bits", number * scale.get(unit[0], 1) * 8
        raise AsgaError(f"budget {text!r} is not understood: write {BUDGET_HELP}")

    def cost(self, bits):
        """{"bops", "weight_bits"} of bits [..., 2, L], expected or whole; each [...], float64."""
        bits = bits.double()
        return {"bops": (self.sizes[0] * bits[..., 0, :] * bits[..., 1, :]).sum(-1),
                "weight_bits": (self.sizes[1] * bits[..., 0, :]).sum(-1)}

    def spent(self, bits):
        """Share of the budget that bits [2, L] cost: the larger one where two bounds are given. 1 is C = C*."""
        cost = self.cost(bits)
        return torch.stack([cost[kind] / limit for kind, limit in self.limits.items()]).amax(0)

    def gradient(self, bits):
        """∇ log C at bits [2, L] → [2, L]; summed over the bounds."""
        cost, total = self.cost(bits), torch.zeros_like(bits)
        if "bops" in self.limits:
            total = total + self.sizes[0] * bits.flip(0) / cost["bops"]
        if "weight_bits" in self.limits:
            total[0] = total[0] + self.sizes[1] / cost["weight_bits"]
        return total

    def solve(self, move, reach):
        """The t in [−reach, reach] where move(t) spends 1, from below: bits that fall as t grows (a step against the cost's
        gradient; in uniform() minus the bitwidth). move takes t [T, 1, 1] and gives [T, 2, L]. Each round looks at 257 points
        at once, which is 8 of bisection. Tensors throughout: the device is never asked. Where all of the range costs too
        little, t = −reach."""
        left, right = -reach, reach
        share = torch.linspace(0, 1, 257, dtype=torch.float64, device=self.lo.device)
        for _ in range(7):
            t = left + (right - left) * share
            first = (self.spent(move(t[:, None, None])) > 1).sum().clamp_max(256)                    # point that is cheap enough
            left, right = t[torch.stack([(first - 1).clamp_min(0), first])]
        return right

    def project(self, bits):
        """bits [2, L] moved along ∓∇ log C onto C = C*, within [lo, hi]; as they are where they meet it to 1e-6.

        Both ways: unspent budget is lost accuracy (our choice, in place of a loss weight). Returns float64.
        """
        bits = bits.double().clamp(self.lo, self.hi)
        slope = self.gradient(bits)
        reach = torch.where(slope > 0, (self.hi - self.lo) / slope, 0).max()            # there every layer is at an end
        move = lambda t: (bits - t * slope).clamp(self.lo, self.hi)
        t = self.solve(move, reach)
        return torch.where((self.spent(bits) - 1).abs() <= 1e-6, bits, move(t))

    def project_logits(self, logits, values, tau):
        """The same for softmax mixtures: logits [2, L, K] of the candidates `values` [2, L, K] → logits that spend 1, by
        exponential tilting z ← z − t · slope · b: the nearest distribution in the sense of the Kullback-Leibler divergence.
        """
        expected = lambda z: (torch.softmax(z / tau, -1) * values).sum(-1)
        logits, values = logits.double(), values.double()
        slope = self.gradient(expected(logits))[..., None]
        reach = 100 * tau / torch.where(slope > 0, slope, math.inf).min()
        tilted = lambda t: logits - t * slope * values
        t = self.solve(lambda t: expected(tilted(t[..., None])), reach)
        return torch.where((self.spent(expected(logits)) - 1).abs() <= 1e-6, logits, tilted(t))

    def uniform(self):
        """bits [2, L] of the (fractional) uniform policy that spends 1: where a search starts."""
        move = lambda t: (-t).clamp(self.lo, self.hi)                                         # t: the bitwidth, negative
        return move(self.solve(move, self.hi.max()))

    def choose(self, penalties):
        """{name: (w, a)}: the whole-bit policy of least total penalty within the budget that spends FILL of it.

        penalties: for each layer {(w, a): float} over its possible bits. Exact (see knapsack).
        """
        options = [list(p) for p in penalties]
        sizes = self.sizes.t().long().tolist()
        columns = {"bops": lambda size, w, a: size[0] * w * a, "weight_bits": lambda size, w, a: size[1] * w}
        costs = [torch.tensor([[columns[kind](size, w, a) for kind in self.limits] for w, a in option])
                 for size, option in zip(sizes, options)]
        values = [torch.tensor(list(p.values()), dtype=torch.float64) for p in penalties]
        chosen = knapsack(values, costs, list(self.limits.values()))
        return {name: option[i] for name, option, i in zip(self.names, options, chosen)}


def lagrangian(values, costs, limits, fill):
    """(a lower bound of the knapsack's optimum, L tensors [n_l]: what each choice adds to it at least).

    Σ_l min (v + Σ_k μ_k ĉ_k) − Σ_k μ_k, with shares ĉ of the budgets, never exceeds the optimum for μ ≥ 0; nor does it for
    μ < 0, where there is one budget, with −μ · fill. It is concave in μ: a grid, refined around its best point, makes it tight.
    """
    shares = [c.double() / limits for c in costs]
    pad = lambda rows, value: nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
    table_v, table_c = pad(values, math.inf), pad(shares, 0.0)                                         # [L, n], [L, n, K]
    axis = torch.cat([torch.zeros(1), torch.logspace(-3, 5, 33)]).double()
    trial = torch.cartesian_prod(*[axis] * len(limits)).view(-1, len(limits))                                   # μ [T, K]
    if len(limits) == 1:
        trial = torch.cat([trial, -trial])
    for spread in (0.8, 0.2, 0.05, 0.01, 0.002):
        dual = (table_v[..., None] + table_c @ trial.t()).amin(1).sum(0) - (trial * torch.where(trial < 0, fill, 1.0)).sum(1)
        mu = trial[dual.argmax()]
        near = torch.linspace(1 - spread, 1 + spread, 17).double()
        trial = mu * torch.cartesian_prod(*[near] * len(limits)).view(-1, len(limits))
    excess = [v + s @ mu for v, s in zip(values, shares)]
    return float(dual.max()), [e - e.min() for e in excess]


def knapsack(values, costs, limits, fill=FILL):
    """Exact multiple-choice knapsack: one choice i_l per layer with the least Σ values[l][i_l] such that the costs stay
    within `limits` and spend at least `fill` of them (of one of them, where there are two). Where no choice does, the
    dearest one within the limits, the least value among equally dear ones. Raises AsgaError where nothing is cheap enough.

    values: L tensors [n_l], float. costs: L tensors [n_l, K], int64. limits: K numbers. Returns L ints.

    Layer by layer, the largest first, all partial sums are kept that could still lead to the optimum: within the limits,
    able to reach the fill, not beaten by one of equal cost, and with a Lagrangian lower bound below the best known
    solution. A first pass with few states finds such a solution; a pass that had to drop none proves it.
    """
    limits = torch.tensor([math.floor(limit) for limit in limits])                                     # [K] int64
    share = lambda cost: (cost.double() / limits).amax(-1)                                                # of the budget
    order = sorted(range(len(costs)), key=lambda l: -float(share(costs[l].amax(0) - costs[l].amin(0))))
    costs, values = [costs[l] for l in order], [values[l].double() for l in order]
    least = torch.stack([c.amin(0) for c in costs] + [torch.zeros_like(limits)]).flip(0).cumsum(0).flip(0)   # [L+1, K]
    most = torch.stack([c.amax(0) for c in costs] + [torch.zeros_like(limits)]).flip(0).cumsum(0).flip(0)
    if (least[0] > limits).any():
        raise AsgaError(f"budget {limits.tolist()} cannot be met: the cheapest policy costs {least[0].tolist()}")

    bound, excess = lagrangian(values, costs, limits, fill)

    def sweep(width, floor, best, dearest):
        """The best state (value, spent, choices) of those that spend `floor` with a bound below `best`, or None; and whether
        no state was dropped for want of width."""
        # a state is a choice for the layers so far: its cost [K], its excess over the bound, its value
        cost, over, value = torch.zeros(1, len(limits), dtype=torch.int64), torch.zeros(1).double(), torch.zeros(1).double()
        history, complete = [], True
        for l, (c, e, v) in enumerate(zip(costs, excess, values)):
            cost, over, value = ((old[:, None] + new[None]).flatten(0, 1) for old, new in ((cost, c), (over, e), (value, v)))
            potential = share((cost + most[l + 1]).minimum(limits))
            keep = (cost + least[l + 1] <= limits).all(-1) & (potential >= floor) & (bound + over <= best + 1e-9)
            index = keep.nonzero()[:, 0]
            for key in (value, *cost.unbind(1)):                     # by cost, among equal costs the least value first
                index = index[key[index].argsort(stable=True)]
            first = torch.ones(len(index), dtype=torch.bool)
            first[1:] = (cost[index][1:] != cost[index][:-1]).any(-1)
            index = index[first]
            if len(index) > width:
                score = -potential[index] if dearest else over[index]
                index, complete = index[score.argsort(stable=True)[:width]], False
            if not len(index):
                return None, complete
            cost, over, value = cost[index], over[index], value[index]
            history.append((index // len(v), index % len(v)))
        spent, picks = share(cost), []
        i = int(torch.where(spent == spent.max(), value, math.inf).argmin() if dearest else value.argmin())
        result = float(value[i]), float(spent[i])
        for parent, choice in reversed(history):
            picks.append(int(choice[i]))
            i = int(parent[i])
        return (*result, picks[::-1]), complete

    def optimum(dearest):
        found, complete, width = None, False, 500
        while not complete and width < 1e6:
            floor, best = (found[1] if found else 0, math.inf) if dearest else (fill, found[0] if found else math.inf)
            result, complete = sweep(width, floor, best, dearest)
            rank = lambda r: (-r[1], r[0]) if dearest else r[0]
            found = min((r for r in (found, result) if r), key=rank, default=None)
            width *= 20
        if not complete:
            say("the knapsack is too large to prove its optimum; the best policy found is used")
        return found

    found = optimum(False) or optimum(True)
    if found is None:
        raise AsgaError(f"budget {limits.tolist()} cannot be met: no policy keeps all of its bounds at once")
    return [i for _, i in sorted(zip(order, found[2]))]


# ----------------------------------------------------------------------------------------------------------------------
# ASGA optimizer. This section stands alone: copied into a file under `import torch` it works on any model.
# ----------------------------------------------------------------------------------------------------------------------

def adaptive_radius(gap, rho_min, rho_max):
    """ρ = clip(ln(1 + max(h, 0)), ρ_min, ρ_max)  (ASGA: min(ρ_max, ln(h + 1)); the floor is our choice).

    gap: h, a number or a tensor. Returns a tensor within the bounds for every h; a gap that is no number tells nothing
    about sharpness, so it gets the cautious ρ_min.
    """
    gap = gap if torch.is_tensor(gap) else torch.tensor(gap, dtype=torch.float64)
    rho = torch.log1p(gap.clamp(min=0))
    return torch.where(rho.isnan(), rho_min, rho).clamp(rho_min, rho_max)


class ASGA(torch.optim.Optimizer):
    """Sharpness-aware gradient aligning around any torch.optim optimizer:  min_θ L(θ) + L_p(θ − α ∇L(θ)).

        1  g   = ∇L(θ)
        2  g_p = ∇L(θ + (ρ/‖g‖ − α) g)         same batch and dropout draws, buffers (BatchNorm) frozen, θ restored exactly
        3  if ⟨g_p, g⟩ < 0:  g_p ← g_p − ⟨g_p, g⟩/‖g‖² · g                   explicit alignment, off with project=False
        4  base optimizer steps along (g + g_p)/2
        5  h = L_p − L;  ρ ← adaptive_radius(h)                                fixed at ρ_max with adaptive=False

    base_optimizer: an optimizer over the same parameters, or a class or function that makes one from them
    (ASGA(model.parameters(), torch.optim.SGD, lr=0.1, …): other keywords go there). Groups with `perturb=False` stay
    where they are in step 2; ‖g‖ in step 2 is the one global L2 norm over all that are moved. step(closure) calls the
    closure twice; as for LBFGS it clears gradients, runs forward and backward, and returns the loss.

    Switches: direction="perturbed" steps along g_p alone; with it, alpha=0, adaptive=False and project=False this is SAM
    (Foret et al. 2021). alpha=0 and rho_max=0 is the base optimizer itself, in one pass.
    `last` holds the last step's loss, perturbed_loss, gap h, rho (as used), grad_norm ‖g‖, cos(g, g_p) and projected, as
    0-dim tensors: reading one waits for the device, the step does not. `rho` is the radius of the next step; the first
    step takes ρ_max.
    """

    def __init__(self, params, base_optimizer, *, rho_min, rho_max, alpha, adaptive=True, project=True, direction="mean",
                 **base_settings):
        if not 0 <= rho_min <= rho_max < float("inf") or not 0 <= alpha < float("inf"):
            raise ValueError(f"need 0 <= rho_min <= rho_max and 0 <= alpha, all finite; got {rho_min}, {rho_max}, {alpha}")
        if direction not in ("mean", "perturbed"):
            raise ValueError(f"direction {direction!r}: use 'mean' or 'perturbed'")
        params = list(params)
        groups = params if not params or isinstance(params[0], dict) else [{"params": params}]
        groups = [{**group, "params": [group["params"]] if torch.is_tensor(group["params"]) else
                   [p[1] if isinstance(p, tuple) else p for p in group["params"]]} for group in groups]   # named_parameters()
        if isinstance(base_optimizer, torch.optim.Optimizer):
            if base_settings:
                raise ValueError(f"{', '.join(base_settings)}: base_optimizer is made already, give it its settings there")
            still = {id(p) for group in groups if not group.get("perturb", True) for p in group["params"]}
            given = {id(p) for group in groups for p in group["params"]}
            if given != {id(p) for group in base_optimizer.param_groups for p in group["params"]}:
                raise ValueError("base_optimizer holds other parameters than params: give both the same ones")
            for group in base_optimizer.param_groups:
                inside = {id(p) for p in group["params"]}
                if inside & still and inside - still:
                    raise ValueError("perturb=False covers part of a group of base_optimizer: give it groups of its own")
                group["perturb"] = not inside & still and group.get("perturb", True)
            self.base = base_optimizer
        else:
            self.base = base_optimizer(groups, **base_settings)
        if isinstance(self.base, torch.optim.LBFGS):
            raise ValueError("LBFGS calls the closure itself, and would never see the combined gradient: use another base_optimizer")
        if any(group.get("maximize") for group in self.base.param_groups):
            raise ValueError("maximize=True: sharpness is defined for a loss that is minimized; negate the loss instead")
        super().__init__(self.base.param_groups, self.base.defaults)
        self.param_groups, self.state = self.base.param_groups, self.base.state                          # shared, not copied
        self.rho_min, self.rho_max, self.alpha = rho_min, rho_max, alpha
        self.adaptive, self.project, self.direction = adaptive, project, direction
        self.rho, self.last, self.backup = torch.tensor(rho_max, dtype=torch.float64), {}, []

    @torch.no_grad()
    def step(self, closure=None):
        if closure is None:
            raise ValueError("ASGA takes two passes a step: give step() a closure that returns the loss")
        closure = torch.enable_grad()(closure)
        dense = lambda t: t.to_dense() if t.is_sparse else t
        wide = lambda t: t.to(torch.promote_types(t.dtype, torch.float32))           # half precisions overflow in norms and products
        length = lambda tensors: torch.nn.utils.get_total_norm([wide(t) for t in tensors])
        params = [p for group in self.param_groups for p in group["params"]]
        draws = torch.get_rng_state(), [(d, torch.cuda.get_rng_state(d)) for d in {p.device for p in params if p.is_cuda}]
        loss = closure()
        if loss is None:
            raise ValueError("the closure returned nothing: it clears gradients, runs forward and backward, and returns the loss")
        loss = torch.as_tensor(loss).detach().reshape(())
        # 1: g; of views (of a bucket of DistributedDataParallel) a copy, as the second pass writes there
        grad = {p: dense(p.grad.clone() if p.grad._is_view() else p.grad) for p in params if p.grad is not None}
        moved = [p for group in self.param_groups if group.get("perturb", True) for p in group["params"] if p in grad]
        if not moved or self.rho_max == self.alpha == 0:
            norm = length(grad.values())
            self.last = dict(loss=loss, perturbed_loss=loss, gap=loss - loss, rho=torch.zeros_like(norm), grad_norm=norm,
                             cos=torch.ones_like(norm), projected=torch.zeros_like(norm, dtype=torch.bool))
            self.base.step()
            return loss

        norm = length([grad[p] for p in moved])
        rho = self.rho = self.rho.to(norm)
        scale = torch.where(norm > 0, rho / norm, 0) - self.alpha
        if [(b.shape, b.dtype, b.device) for b in self.backup] != [(p.shape, p.dtype, p.device) for p in moved]:
            self.backup = [torch.empty_like(p) for p in moved]          # kept: fresh memory takes longer than the copy itself
        torch._foreach_copy_(self.backup, moved)
        for p in params:
            p.grad = None
        try:                                                                                               # 2: g_p
            torch._foreach_add_(moved, torch._foreach_mul([grad[p] for p in moved], scale))
            perturbed_loss = torch.as_tensor(self._second_pass(closure, draws)).detach().reshape(())
        finally:
            torch._foreach_copy_(moved, self.backup)

        both = [p for p in params if p in grad or p.grad is not None]           # no gradient in one of the passes: zero
        g = [grad[p] if p in grad else torch.zeros_like(p) for p in both]
        g_p = [dense(p.grad) if p.grad is not None else torch.zeros_like(p) for p in both]
        dot = torch.stack([(wide(a) * wide(b)).sum() for a, b in zip(g_p, g)]).sum()                                         # ⟨g_p, g⟩
        square = (norm if len(moved) == len(g) else length(g)).square()
        product = square.sqrt() * length(g_p)                                                                # ‖g‖ · ‖g_p‖
        conflict = (dot < 0) & (square > 0)
        against = torch.where(conflict & self.project, dot / square, 0)                  # ⟨g_p, g⟩/‖g‖², where it is negative
        share = 1.0 if self.direction == "mean" else 0.0                       # 3 and 4 at once: (g_p + (1 − against) · g)/2
        if share or self.project:
            mixed = torch._foreach_mul(g, share - against)          # not into g_p: autograd lets two gradients share memory
            torch._foreach_add_(mixed, g_p)
            g_p = mixed
        if share:
            torch._foreach_mul_(g_p, 0.5)
        for p, direction in zip(both, g_p):
            p.grad = direction
        gap = perturbed_loss - loss                                                                          # 5: h
        self.last = dict(loss=loss, perturbed_loss=perturbed_loss, gap=gap, rho=rho, grad_norm=norm,
                         cos=torch.where(product > 0, dot / product, 0), projected=conflict & self.project)
        self.base.step()
        if self.adaptive:
            self.rho = adaptive_radius(gap, self.rho_min, self.rho_max)
        return loss

    def _second_pass(self, closure, draws):
        """closure() with the random draws of the first pass; what it does to buffers of the modules that it calls is undone."""
        saved = {}

        def save(module, args):                 # with all that is inside: compiled and scripted modules call no hooks there
            for m in module.modules() if module not in saved else ():
                saved.setdefault(m, [(name, b, b.clone()) for name, b in m._buffers.items() if b is not None and m.training])

        hook = torch.nn.modules.module.register_module_forward_pre_hook(save)
        cpu, cuda = draws
        try:
            with torch.random.fork_rng(devices=[device for device, _ in cuda], device_type="cuda"):
                torch.set_rng_state(cpu)
                for device, state in cuda:
                    torch.cuda.set_rng_state(state, device)
                return closure()
        finally:
            hook.remove()
            for module, buffers in saved.items():
                for name, buffer, before in buffers:
                    if 0 not in buffer.stride():                                     # expanded ones cannot be written
                        buffer.copy_(before)
                    module._buffers[name] = buffer

    def __getstate__(self):      # torch's would keep the groups alone: copies need all, but not the `step` that a scheduler wrapped
        return {key: value for key, value in self.__dict__.items() if key != "step"}

    def state_dict(self):
        """The base optimizer's state and the radius: enough to continue identically."""
        return {**self.base.state_dict(), "rho": self.rho.clone()}

    def load_state_dict(self, state_dict):
        perturb = [group.get("perturb", True) for group in self.param_groups]
        self.base.load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        self.param_groups, self.state = self.base.param_groups, self.base.state
        for group, before in zip(self.param_groups, perturb):
            group.setdefault("perturb", before)
        self.rho = state_dict.get("rho", self.rho).clone()               # a plain base optimizer's state has none


# ----------------------------------------------------------------------------------------------------------------------
# Policy: the bits of every layer, and the file that carries them
# ----------------------------------------------------------------------------------------------------------------------

def write_atomic(path, write):
    """write(temporary path), then move it into place: a reader never sees half a file."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        write(part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:                               # RuntimeError: torch.save, on a full disk
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise AsgaError(f"cannot write {path} ({reason}): make room, or give --out a folder that you may write to")
    finally:
        if part.is_file():
            part.unlink()


def write_json(path, data):
    """Readable JSON, written atomically: the outermost dict, and any dict of dicts, one entry a line."""
    spread = lambda v, depth: isinstance(v, dict) and v and (depth == 0 or any(isinstance(i, dict) for i in v.values()))

    def lines(value, depth=0):
        if not spread(value, depth):
            return json.dumps(value, default=lambda v: v.item())                        # numbers of numpy and torch
        pad = "  " * (depth + 1)
        return "{\n" + ",\n".join(f"{pad}{json.dumps(k)}: {lines(v, depth + 1)}" for k, v in value.items()) + f"\n{pad[2:]}}}"

    write_atomic(path, lambda part: part.write_text(lines(data) + "\n"))


@dataclasses.dataclass
class Policy:
    """Bits of every quantized layer, in network order: what a search finds and a transfer uses.

    layers: {name: (w, a)}. sizes: {name: LayerCost}, of the network that it was made for. info: the other keys of the file
    ("arch", "budget", "candidates", "proxy", "search").
    """
    layers: dict
    sizes: dict = dataclasses.field(default_factory=dict)
    info: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for name, bits in self.layers.items():
            if not isinstance(bits, (tuple, list)) or len(bits) != 2:
                raise AsgaError(f"layer {name}: {bits!r} is not a pair of bitwidths (weights, activations)")
            for b in bits:
                check_bits((b,), f"layer {name}: ")
        self.layers = {name: tuple(bits) for name, bits in self.layers.items()}

    @property
    def choices(self):
        """{name: ((w,), (a,))}, for attach_quantizers."""
        return {name: ((w,), (a,)) for name, (w, a) in self.layers.items()}

    def _total(self, each):
        missing = [name for name in self.layers if name not in self.sizes]
        if missing:
            raise AsgaError(f"the policy does not know the MACs of layer {missing[0]}: call policy.measure(model, inputs)")
        return sum(each(self.sizes[name], w, a) for name, (w, a) in self.layers.items())

    @property
    def bops(self):
        """Σ macs · w · a, an exact int: bit operations of one image."""
        return self._total(lambda size, w, a: size.macs * w * a)

    @property
    def weight_bits(self):
        """Σ numel · w: bits of all quantized weights."""
        return self._total(lambda size, w, a: size.numel * w)

    @property
    def mean_bits(self):
        """(mean w, mean a), weighted by MACs."""
        macs = max(1, self._total(lambda size, w, a: size.macs))
        return self._total(lambda s, w, a: s.macs * w) / macs, self._total(lambda s, w, a: s.macs * a) / macs

    def measure(self, model, example_inputs):
        """The same bits with the MACs and sizes of `model` at these inputs (another resolution, other classes), checked."""
        sizes, found = trace(model, example_inputs), layers_of(model)
        self._fit(model, sizes)
        with _evaluating(model):                                         # to look at a normalized weight can change it
            sizes = {name: sizes.get(name) or LayerCost(0, found[name].weight.numel()) for name in self.layers}
        return Policy(self.layers, sizes, self.info)

    def check(self, model, example_inputs=None):
        """Raises AsgaError with the first layer that does not fit `model`: its name or its number of weights. The last
        layer may have another number of outputs: the target has its own classes. Layers that no forward pass reaches
        need no bits; only with example_inputs can that be known."""
        self._fit(model, trace(model, example_inputs) if example_inputs is not None else layers_of(model))

    def _fit(self, model, reached):
        found = layers_of(model)
        for name in self.layers:
            if name not in found:
                near = difflib.get_close_matches(name, found, 1)
                raise AsgaError(f"policy for another network: it has bits for layer {name!r}, which "
                                f"{type(model).__name__} lacks" + (f" (nearest: {near[0]!r})" if near else ""))
        for name in found:
            if name in reached and name not in self.layers:
                raise AsgaError(f"policy for another network: {type(model).__name__} has a layer {name!r} without bits in it "
                                f"(if no forward pass calls it, give example_inputs)")
        for name, size in ((name, self.sizes[name]) for name in self.layers if name in self.sizes):
            with _evaluating(found[name]):
                numel, per_output = found[name].weight.numel(), found[name].weight[0].numel()
            head = name == list(self.layers)[-1] and size.numel % per_output == 0
            if size.numel != numel and not head:
                raise AsgaError(f"policy for another network: layer {name!r} has {numel} weights, {size.numel} in the policy")

    def to_json(self):
        """The file's content as a dict."""
        w, a = self.mean_bits
        layers = {name: {"w": bits[0], "a": bits[1], **self.sizes[name]._asdict()} for name, bits in self.layers.items()}
        info = {key: self.info.get(key, {}) for key in ("budget", "candidates", "proxy", "search")}
        return {"format": "asga-policy", "version": 1, "arch": self.info.get("arch", ""), "layers": layers,
                "cost": {"bops": self.bops, "weight_bits": self.weight_bits, "mean_w": w, "mean_a": a},
                **info, "versions": self.info.get("versions", versions())}

    def save(self, path):
        write_json(path, self.to_json())

    @staticmethod
    def load(path):
        """Read and check a policy file; AsgaError says what is wrong with it."""
        try:
            data = json.loads(Path(path).read_text())
        except OSError as error:
            raise AsgaError(f"cannot read policy {path}: {error.strerror}; a search writes one as policy.json")
        except ValueError as error:
            raise AsgaError(f"policy {path} is not JSON ({error}); a search writes one as policy.json")
        return Policy.from_json(data, path)

    @staticmethod
    def from_json(data, path="policy"):
        if not isinstance(data, dict) or data.get("format") != "asga-policy":
            raise AsgaError(f"{path} is not an ASGA policy: its \"format\" is not \"asga-policy\"")
        if data.get("version") != 1:
            raise AsgaError(f"{path} has policy version {data.get('version')!r}; this asga.py reads version 1")
        if not isinstance(data.get("arch"), str):
            raise AsgaError(f"{path} has {data.get('arch')!r} as \"arch\": it must name the network")
        layers = data.get("layers")
        if not isinstance(layers, dict) or not layers:
            raise AsgaError(f"{path} has no \"layers\": they map each layer's name to w, a, macs and numel")
        for name, entry in layers.items():
            for key in ("w", "a", "macs", "numel"):
                value = entry.get(key) if isinstance(entry, dict) else None
                if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                    raise AsgaError(f"{path}: layer {name!r} needs a whole number as {key!r}, not {value!r}")
        info = {key: data[key] for key in ("arch", "budget", "candidates", "proxy", "search", "versions") if key in data}
        try:
            policy = Policy({name: (e["w"], e["a"]) for name, e in layers.items()},
                            {name: LayerCost(e["macs"], e["numel"]) for name, e in layers.items()}, info)
        except AsgaError as error:
            raise AsgaError(f"{path}: {error}")
        cost = data.get("cost")
        for key, value in (("bops", policy.bops), ("weight_bits", policy.weight_bits)):
            written = cost.get(key) if isinstance(cost, dict) else None
            if written != value:
                raise AsgaError(f"{path}: its layers cost {value} {key}, its \"cost\" says {written}: edited by hand? "
                                f"Correct the one that is wrong")
        return policy


def versions():
    """What made a file."""
    return {"asga": __version__, "torch": str(torch.__version__), "python": platform.python_version()}


# ----------------------------------------------------------------------------------------------------------------------
# Search: weights, steps and bits of the supernet together, C(β) = C* after every step
# ----------------------------------------------------------------------------------------------------------------------

def option(default, help, **more):
    """A dataclass field whose documentation makes its command-line flag."""
    return dataclasses.field(default=default, metadata={"help": help, **more})


def check_finite(settings, names):
    """AsgaError for the first of these settings that is negative, infinite or no number."""
    for name in names:
        if not 0 <= getattr(settings, name, 0) < math.inf:
            raise AsgaError(f"{name.replace('_', '-')} {getattr(settings, name)} must be a finite number, 0 or more")


METHODS = {
    "asga": {},
    "sagm": {"adaptive": False, "project": False},
    "sam": {"adaptive": False, "project": False, "alpha": 0.0, "direction": "perturbed"},
    "joint": {"rho_min": 0.0, "rho_max": 0.0, "alpha": 0.0},
    "uniform": {"steps": 0},
}


RECOMPUTE_HELP = "quantized tensors are made again in the backward pass: less memory, more time, same results"
PRECISIONS = ("float32", "bf16")
PRECISION_HELP = "of activations and products while training; bf16 is torch's autocast"


@dataclasses.dataclass
class SearchSettings:
    """What search() takes as keywords and the command line as flags."""
    method: str = option("asga", "asga; or with parts switched off: sagm (fixed radius, implicit alignment), sam, joint (no "
                         "sharpness, one pass); or uniform (no search)", choices=list(METHODS))
    steps: int = option(400, "optimization steps")
    candidates_w: tuple = option(CANDIDATES, "bitwidths for weights")
    candidates_a: tuple = option(CANDIDATES, "bitwidths for activations")
    keep: int = option(8, "bits of the first and the last layer, which no search touches")
    relaxation: str = option("interpolate", "how bitwidths become real numbers", choices=["interpolate", "softmax"])
    tau: float = option(1.0, "temperature of the softmax relaxation")
    rho_min: float = option(0.005, "least radius of the perturbation")
    rho_max: float = option(0.05, "largest radius; the fixed one with --no-adaptive")
    alpha: float = option(0.001, "step of the implicit gradient alignment")
    adaptive: bool = option(True, "radius follows the gap, rho = ln(1 + h)")
    project: bool = option(True, "remove from g_p what opposes g")
    direction: str = option("mean", "step along the mean of g and g_p, or along g_p alone", choices=["mean", "perturbed"])
    lr: float = option(0.01, "learning rate of weights and quantizer steps (cosine to zero)")
    lr_beta: float = option(4.0, "learning rate of the bitwidths, in bits (cosine to zero)")
    momentum: float = option(0.9, "momentum of SGD")
    weight_decay: float = option(1e-4, "weight decay of convolution and matrix weights")
    precision: str = option("float32", PRECISION_HELP, choices=PRECISIONS)
    recompute: bool = option(False, RECOMPUTE_HELP)

    def __post_init__(self):
        self.candidates_w, self.candidates_a = check_bits(self.candidates_w), check_bits(self.candidates_a)
        for field in dataclasses.fields(self):
            known, value = field.metadata.get("choices"), getattr(self, field.name)
            if known and value not in known:
                raise AsgaError(f"unknown {field.name} {value!r}: use one of {', '.join(known)}")
        for name, value in METHODS[self.method].items():                     # recorded is what runs
            given = getattr(self, name)
            if given not in (value, type(self).__dataclass_fields__[name].default):
                say(f"{name} {given} is not used: method {self.method} is defined by {name} {value}")
            setattr(self, name, value)
        if isinstance(self.keep, (set, frozenset)):
            self.keep = sorted(self.keep)                                    # for JSON
        if self.steps < 1 and self.method != "uniform":
            raise AsgaError(f"steps {self.steps} leaves nothing to search: give at least 1")
        check_finite(self, ("rho_min", "rho_max", "alpha", "lr", "lr_beta", "momentum", "weight_decay"))
        if self.rho_min > self.rho_max:
            raise AsgaError(f"rho_min {self.rho_min} is above rho_max {self.rho_max}: exchange them, or set both")
        if not 0 < self.tau < math.inf:
            raise AsgaError(f"tau {self.tau} must be a finite number above 0")


def parameter_groups(model, lr, weight_decay):
    """SGD groups: weights with decay; biases, normalization and quantizer steps without. β and z are left out."""
    groups = {True: [], False: []}
    for name, p in model.named_parameters():
        if p.requires_grad and not name.endswith(("quantizer.beta", "quantizer.logits")):
            groups[p.dim() > 1].append(p)
    return [{"params": params, "lr": lr, "base_lr": lr, "weight_decay": weight_decay if decay else 0.0}
            for decay, params in groups.items() if params]


def cosine(optimizer, done, total):
    """Learning rates of all groups for step `done` of `total`: cosine from base_lr to zero, nothing to save or restore."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * 0.5 * (1 + math.cos(math.pi * done / total))


def first_output(out):
    """The logits of networks that return more (auxiliary heads, named tuples, dicts)."""
    if isinstance(out, dict):
        return next(iter(out.values()))
    return out[0] if isinstance(out, (tuple, list)) else out


def forward_loss(net, x, y, loss_fn, precision):
    """The loss of one forward pass, computed in float32. In "bf16" the pass runs under autocast: weights, steps, β and the
    optimizer stay float32."""
    with torch.autocast(next(net.parameters()).device.type, torch.bfloat16, enabled=precision == "bf16"):
        logits = first_output(net(*_as_args(x)))
    return loss_fn(logits.float() if precision == "bf16" else logits, y)


def plan(model, example_inputs, budget, settings):
    """(Budget, {name: bits} of fixed layers) of a search, before any training; raises AsgaError where it cannot be met.

    example_inputs decide at which resolution MACs are counted: the one that will be deployed.
    """
    if quantized_layers(model):
        raise AsgaError("the network is quantized already: search on the original")
    layers = trace(model, example_inputs)
    kept = edge_bits(list(layers), settings.keep)
    left = [name for name in layers_of(model) if name not in layers]
    if left:
        say(f"not quantized, as no forward pass calls them, or not for F.conv2d or F.linear: {', '.join(left)}")
    other = [name for name, m in model.named_modules() if not isinstance(m, nn.Conv2d)
             and isinstance(m, (nn.modules.conv._ConvNd, nn.MultiheadAttention, nn.RNNBase, nn.Bilinear))]
    if other:
        say(f"in full precision and outside the budget, as they are no Conv2d and no Linear: {', '.join(other)}")
    device = next(model.parameters()).device                    # a layer was found, so there are parameters
    ends = [[[kept.get(name, end(c)) for name in layers] for c in (settings.candidates_w, settings.candidates_a)]
            for end in (min, max)]
    return Budget(budget, layers, *torch.tensor(ends, dtype=torch.float64, device=device), kept), kept


class Search:
    """A supernet on its way to a policy: step(x, y, loss_fn, done) for done = 0 … settings.steps − 1, policy() at any time.

    model: full-precision network (stays as it was). budget, kept: of plan(). batches: inputs to calibrate with.
    """

    def __init__(self, model, budget, kept, settings, batches):
        self.budget, self.settings = budget, settings
        candidates = (settings.candidates_w, settings.candidates_a)
        choices = {name: ((kept[name],),) * 2 if name in kept else candidates for name in budget.names}
        self.net = attach_quantizers(model, choices, settings.relaxation, settings.tau)
        calibrate(self.net, batches)
        layers = quantized_layers(self.net)
        self.quantizers = [[getattr(layers[name], kind) for name in budget.names]                           # [2][L]
                           for kind in ("weight_quantizer", "input_quantizer")]
        self.free = [q for row in self.quantizers for q in row if len(q.bits) > 1]
        self.values = nn.utils.rnn.pad_sequence([q.grid[0] for row in self.quantizers for q in row], batch_first=True)
        self.values = self.values.view(2, len(budget.names), -1)                           # candidates [2, L, K], 0: it has fewer
        set_training(self.net, settings.recompute)
        self._start()
        self.guard, self.prepared = StepGuard(self.net), Prepared(self.net)
        bits = [q.beta if hasattr(q, "beta") else q.logits for q in self.free]
        groups = parameter_groups(self.net, settings.lr, settings.weight_decay)
        if bits:
            groups.append({"params": bits, "lr": settings.lr_beta, "base_lr": settings.lr_beta, "weight_decay": 0.0})
        chosen = {key: getattr(settings, key) for key in ("rho_min", "rho_max", "alpha", "adaptive", "project", "direction")}
        self.optimizer = ASGA(groups, torch.optim.SGD, lr=settings.lr, momentum=settings.momentum,
                              **chosen)

    def bits(self):
        """E[b] of all quantizers: [2, L], row 0 weights, row 1 activations, layers in network order."""
        return torch.stack([torch.stack([q.expected_bits().detach() for q in row]) for row in self.quantizers])

    @torch.no_grad()
    def _start(self):
        if self.settings.relaxation == "interpolate":
            return self._write(self.budget.uniform())
        most = self.budget.hi.new_full((), 50.0 * self.settings.tau)
        free = (self.budget.lo < self.budget.hi)[..., None]                                     # the others at their most bits
        tilted = lambda t: torch.where(self.values > 0, torch.where(free, -t, most) * self.values, -math.inf)
        expected = lambda t: (torch.softmax(tilted(t) / self.settings.tau, -1) * self.values).sum(-1)
        t = self.budget.solve(lambda t: expected(t[..., None]), most)
        self._write(tilted(t))

    @torch.no_grad()
    def project(self):
        """Back onto the budget."""
        if self.settings.relaxation == "interpolate":
            return self._write(self.budget.project(self.bits()))
        self._write(self.budget.project_logits(self._logits(), self.values, self.settings.tau))

    def _write(self, values):
        """β [2, L], or z [2, L, K], into the quantizers that have several candidates."""
        pairs = [(q.beta, v) if hasattr(q, "beta") else (q.logits, v[:len(q.bits)])
                 for row, vs in zip(self.quantizers, values) for q, v in zip(row, vs.unbind()) if len(q.bits) > 1]
        if pairs:
            torch._foreach_copy_(*map(list, zip(*pairs)))

    def _logits(self):
        """z [2, L, K]; −∞ where a quantizer has fewer candidates, 0 for a single one."""
        rows = [q.logits.detach() if len(q.bits) > 1 else torch.zeros_like(q.steps) for row in self.quantizers for q in row]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-math.inf).view_as(self.values)

    def step(self, x, y, loss_fn, done):
        """One ASGA step and the projection; `done` steps came before it. Returns the log's record, tensors unread."""
        cosine(self.optimizer, done, self.settings.steps)

        def closure():
            self.optimizer.zero_grad()
            with self.prepared:
                loss = forward_loss(self.net, x, y, loss_fn, self.settings.precision)
                loss.backward()
            return loss

        self.net.train()
        with self.guard:
            self.optimizer.step(closure)
        self.project()
        bits = self.bits()
        distance = (self.values - bits[..., None]).abs().amin(-1)
        return {**self.optimizer.last, "expected_cost": self.budget.cost(bits)["bops"],
                "beta_distance": distance.sum() / max(1, len(self.free)), "bits": bits.double().round(decimals=3)}

    def policy(self, **info):
        """The whole-bit Policy nearest to the present bits within the budget (exact knapsack). info: keys of the file."""
        if not self.bits().isfinite().all():
            raise AsgaError("the bitwidths are no longer numbers, as the loss was none: lower lr or lr_beta, check the data")
        rows = [[self._penalty(q) for q in row] for row in self.quantizers]
        penalties = [{(w, a): pw + pa for w, pw in ws.items() for a, pa in as_.items()} for ws, as_ in zip(*rows)]
        if self.settings.method == "uniform":       # equal bits for w and a, where it may; between whole bits the seed chooses layers
            for layer in penalties:
                draw = torch.rand(len(layer)).tolist()
                layer.update({(w, a): p + 1e-4 * ((w - a) ** 2 + r) for ((w, a), p), r in zip(layer.items(), draw)})
        sizes = {name: LayerCost(*size) for name, size in zip(self.budget.names, self.budget.sizes.t().long().tolist())}
        info = {"budget": {"spec": self.budget.spec, **self.budget.limits},
                "candidates": {"w": list(self.settings.candidates_w), "a": list(self.settings.candidates_a)}, **info}
        return Policy(self.budget.choose(penalties), sizes, info)

    def _penalty(self, q):
        if hasattr(q, "logits"):
            return dict(zip(q.bits, (-torch.log_softmax(q.logits.detach().double() / q.tau, 0)).tolist()))
        return {b: (b - q.beta.item()) ** 2 for b in q.bits}

    def state_dict(self):
        return {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state):
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])


def search(model, batches, loss_fn, budget, *, example_inputs=None, on_step=None, **settings):
    """Search a Policy for `model` (full precision, trained; stays as it was) on a proxy data set.

    batches: (inputs, targets) pairs that can be iterated again and again (a list, a DataLoader), on any device; inputs are
    a tensor or a tuple of arguments. loss_fn(outputs, targets) → scalar; of several outputs it gets the first.
    budget: BUDGET_HELP. settings: fields of SearchSettings. example_inputs: what MACs are counted on, the first input of the
    first batch by default: give one of the resolution that you will deploy. on_step(step, record): called after each step.
    Raises AsgaError for settings and budgets that make no sense, before any training.
    """
    settings = SearchSettings(**settings)
    once = AsgaError("batches can be read only once: give a list or a DataLoader, not a generator")
    if iter(batches) is batches:
        raise once
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    each = lambda change, v: torch.utils._pytree.tree_map(lambda t: change(t) if torch.is_tensor(t) else t, v)
    move = lambda v: each(lambda t: t.to(device), v)
    warm = [move(x) for x, _ in itertools.islice(batches, 4)]
    if not warm:
        raise AsgaError("batches is empty: a search needs (inputs, targets) pairs")
    if example_inputs is None:
        example_inputs = each(lambda t: t[:1] if t.dim() else t, _as_args(warm[0]))
    budget, kept = plan(model, move(example_inputs), budget, settings)
    began, run = time.monotonic(), Search(model, budget, kept, settings, warm)

    def stream():
        while True:
            count = 0
            for count, pair in enumerate(batches, 1):
                yield pair
            if not count:
                raise once

    for done, (x, y) in enumerate(itertools.islice(stream(), settings.steps)):
        record = run.step(move(x), move(y), loss_fn, done)
        if on_step:
            on_step(done, record)
    return run.policy(search={"method": settings.method, "seconds": round(time.monotonic() - began, 3), "device": describe(device),
                              "settings": dataclasses.asdict(settings)})


# ----------------------------------------------------------------------------------------------------------------------
# Networks: the built-in ResNet-20, torchvision's, or a user's own; and their weights
# ----------------------------------------------------------------------------------------------------------------------

class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a parameter-free shortcut (He et al. 2016, option A)."""

    def __init__(self, cin, cout, stride):
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


class ResNet20(nn.Module):
    """The CIFAR ResNet of He et al. 2016 with n = 3: 20 layers, 0.27 million weights, 41 million MACs at 32×32."""

    def __init__(self, num_classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        stage = lambda cin, cout, stride: nn.Sequential(
            BasicBlock(cin, cout, stride), BasicBlock(cout, cout, 1), BasicBlock(cout, cout, 1))
        self.layer1, self.layer2, self.layer3 = stage(16, 16, 1), stage(16, 32, 2), stage(32, 64, 2)
        self.fc = nn.Linear(64, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out")

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))                       # [B, 16, H, W]
        x = self.layer3(self.layer2(self.layer1(x)))              # [B, 64, H/4, W/4]
        return self.fc(x.mean((2, 3)))                            # [B, classes]


@functools.cache
def import_torchvision():
    """torchvision, also where its compiled operators do not fit this torch: none of them is needed here."""
    try:
        import torchvision
    except ImportError as error:
        raise AsgaError(f"this needs torchvision, which does not import ({error}): pip install torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import_torchvision.library = library                                   # its definitions live as long as it does
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        import torchvision
        say("this torchvision has no compiled operators for this torch; declared the missing ones (not needed here)")
    return torchvision


def is_torchvision(arch):
    """Whether `arch` names a torchvision model (anything but resnet20 and file.py:function)."""
    return arch != "resnet20" and ":" not in arch


def build(arch, num_classes):
    """The network `arch` with freshly initialized weights: resnet20, a torchvision classification model by name, or
    path/to/file.py:function (called with num_classes=). Raises AsgaError."""
    if arch == "resnet20":
        return ResNet20(num_classes)
    if is_torchvision(arch):
        models = import_torchvision().models
        known = models.list_models(module=models)
        if arch not in known:
            near = difflib.get_close_matches(arch, ["resnet20", *known], 3)
            raise AsgaError(f"unknown arch {arch!r}: use resnet20, a torchvision model"
                            f"{' (' + ', '.join(near) + '?)' if near else ''}, or path/to/file.py:function")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                        # googlenet and inception announce a slow initialization
            return models.get_model(arch, weights=None, num_classes=num_classes)
    path, _, function = arch.rpartition(":")
    if not Path(path).is_file():
        raise AsgaError(f"arch {arch!r}: there is no file {path} here; give --arch path/to/file.py:function")
    sys.path.insert(0, str(Path(path).resolve().parent))                        # it may import its neighbours
    try:
        spec = importlib.util.spec_from_file_location("asga_user_network", path)
        module = sys.modules["asga_user_network"] = importlib.util.module_from_spec(spec)     # dataclasses look it up there
        spec.loader.exec_module(module)
        if not hasattr(module, function):
            raise AsgaError(f"arch {arch!r}: {path} has no function {function!r}")
        model = getattr(module, function)(num_classes=num_classes)
    except AsgaError:
        raise
    except Exception as error:                                                   # whatever somebody's file can raise
        raise AsgaError(f"arch {arch!r}: {type(error).__name__}: {' '.join(str(error).split())}; it must give a network when "
                        f"called with num_classes={num_classes}")
    finally:
        sys.path.pop(0)
    if not isinstance(model, nn.Module):
        raise AsgaError(f"arch {arch!r} returned a {type(model).__name__}: it must return an nn.Module")
    layers_of(model)                                                              # refuses lazy ones
    return model


def place(model, device):
    """The model on the device, in the memory format of the images; torch refuses that where a tensor has five dimensions."""
    flat = all(t.dim() < 5 for t in itertools.chain(model.parameters(), model.buffers()))
    return model.to(device, memory_format=torch.channels_last) if flat else model.to(device)


def check_network(model, arch, num_classes, resolution, device, batch=0):
    """An input [1, 3, R, R] that the network takes; AsgaError where it does not, gives no [1, num_classes], or, with
    `batch`, does not take a batch of that size in training."""
    try:
        x = torch.zeros(1, 3, resolution, resolution, device=device)
        out = first_output(_run_eval(model, (x,)))
        if batch:
            with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
                _copy(model).train()(x.expand(batch, -1, -1, -1))
    except Exception as error:                                                   # whatever somebody's network can raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise AsgaError(f"{arch} does not take {resolution}x{resolution} images, {max(1, batch)} at a time ({reason}): try "
                        f"another --resolution, --cost-resolution or --batch-size")
    if not torch.is_tensor(out) or tuple(out.shape) != (1, num_classes):
        raise AsgaError(f"{arch} returns {tuple(out.shape) if torch.is_tensor(out) else type(out).__name__} for one image, not "
                        f"(1, {num_classes}): it must give one logit per class")
    return x


def load_weights(model, arch, source, classes=()):
    """Fill `model` from a file (a state dict, or a checkpoint of ours) or from "imagenet" (torchvision's pretrained ones).
    A classifier head for another number of classes, or, where the file names its classes, for others than `classes`, stays as
    initialized, and one line says so: then the result is True. Raises AsgaError."""
    trained = []
    if source == "imagenet":
        if not is_torchvision(arch):
            raise AsgaError(f"--weights imagenet is for torchvision models; {arch} has none: give a file")
        state = download_weights(arch)
    else:
        state = read_checkpoint(source)
        if state.get("policy") or state.get("format") == "asga-supernet":
            raise AsgaError(f"{source} is a quantized network: give the full-precision weights that it came from")
        trained = state.get("classes", []) if state.get("format") == "asga-model" else []
        for key in ("state", "state_dict", "model_state_dict", "model", "net"):
            state = state[key] if isinstance(state.get(key), dict) else state
    own = model.state_dict()
    prefix = "" if any(key.startswith("module.") for key in own) else r"((module|_orig_mod)\.)*"                # parallel, averaged, compiled
    state = {re.sub("^" + prefix, "", str(key)): value for key, value in state.items() if torch.is_tensor(value) and key != "n_averaged"}
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unknown = [key for key in state if key not in own]
    other = [key for key in own if key in state and own[key].shape != state[key].shape]
    head = all(own[key].dim() and state[key].dim() and own[key].shape[1:] == state[key].shape[1:] for key in other)
    if len({(len(own[key]), len(state[key])) for key in other} if head else ()) > 1 or not head or missing or unknown:
        what = (f"it lacks {missing[0]!r}" if missing else f"it has {unknown[0]!r}, which the network lacks" if unknown else
                f"{other[0]!r} has shape {tuple(state[other[0]].shape)}, the network {tuple(own[other[0]].shape)}")
        raise AsgaError(f"weights {source} are of another network than {arch}: {what}")
    if not other and trained and classes and list(classes) != trained:        # as many, but others: what depends on their number
        with torch.random.fork_rng([]):
            larger = build(arch, len(classes) + 1).state_dict()
        other = [key for key in own if larger[key].shape != own[key].shape]
    if other:
        what = f"{len(state[other[0]])} classes" + (" of other names" if len(state[other[0]]) == len(own[other[0]]) else "")
        say(f"{source} was trained for {what}: the classifier ({other[0].rpartition('.')[0]}) is replaced by a fresh one for "
            f"{len(own[other[0]])}")
    with torch.no_grad():                                        # not load_state_dict: some networks ask there for what files lack
        for key in own.keys() & state.keys() - set(other):
            own[key].copy_(state[key])
    return bool(other)


def download_weights(arch):
    """State dict of torchvision's pretrained weights; AsgaError where they cannot be had within seconds of silence."""
    models = import_torchvision().models
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)
    try:
        state = models.get_model_weights(arch).DEFAULT.get_state_dict(progress=sys.stderr.isatty())
        return {re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d)\.", r"\1\2.", key): value for key, value in state.items()}   # old names
    except (OSError, RuntimeError, AttributeError) as error:
        raise AsgaError(f"cannot fetch ImageNet weights of {arch} ({error}): give --weights FILE, a state dict")
    finally:
        socket.setdefaulttimeout(before)


def read_checkpoint(path):
    """The dict in a .pt file; AsgaError where there is none."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise AsgaError(f"cannot read {path}: {error.strerror or error}")
    except Exception:                                                            # whatever broken bytes can raise
        raise AsgaError(f"{path} is not a PyTorch file of plain tensors: save a state dict with torch.save")
    if not isinstance(state, dict):
        raise AsgaError(f"{path} holds a {type(state).__name__}, not a state dict: save model.state_dict()")
    return state


# ----------------------------------------------------------------------------------------------------------------------
# Data: CIFAR-10, handwritten digits, or a folder of images; decoded once where memory allows, augmented in batches
# ----------------------------------------------------------------------------------------------------------------------

DIGITS = Path(__file__).resolve().parent / "data" / "digits.npz"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)         # ImageNet's, which pretrained networks expect, for all sets


def read_image(path, look):
    """look(the opened PIL image); AsgaError names a file that is no readable image."""
    from PIL import Image
    try:
        with Image.open(path) as image:
            return look(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise AsgaError(f"{path} is not a readable image ({str(error).splitlines()[0]}): mend or delete it")


def _ignore_interrupts(worker):
    for s in (signal.SIGINT, signal.SIGTERM):                  # sent to the whole group: they are for the main process
        signal.signal(s, signal.SIG_IGN)


def _stack(images):
    """A batch of decoded images, or the error of the first one that could not be decoded."""
    return next((image for image in images if isinstance(image, AsgaError)), None) or torch.stack(images)


def memory_size(limit=Path("/sys/fs/cgroup/memory.max")):
    """Bytes of memory that the machine has, or less where a container is limited (cgroup v2)."""
    limit = limit.read_text().strip() if limit.exists() else "max"
    return min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), math.inf if limit == "max" else int(limit))


class ImageSet(torch.utils.data.Dataset):
    """One part (train or val) of a data set: images as a uint8 tensor [N, 3, S, S], or as paths, and labels [N].

    Paths are decoded at first use into memory, where a quarter of the machine's is enough; larger sets stream through
    DataLoader workers. `size`: side S at which images are kept; the network's resolution is reached in batches.
    """

    def __init__(self, images, labels, size):
        self.images, self.labels, self.size = images, torch.as_tensor(labels), size

    def __len__(self):
        return len(self.labels)

    def subset(self, index):
        images = self.images[index] if torch.is_tensor(self.images) else [self.images[i] for i in index.tolist()]
        return ImageSet(images, self.labels[index], self.size)

    def decode(self, i):
        """uint8 [3, S, S]: the shorter side resized to S, the centre cut out."""
        def fit(image):
            if image.mode.startswith("I"):                        # 16-bit grey: convert() alone clips it to 255
                image = image.convert("I").point(lambda v: v * (1 / 256)).convert("L")
            if image.mode == "F":
                raise ValueError("floating-point pixels: what is white is not known")
            image = image.convert("RGB")
            scale = self.size / min(image.size)
            if scale != 1:
                image = image.resize([max(self.size, round(side * scale)) for side in image.size], resample=2)     # bilinear
            left, top = ((side - self.size) // 2 for side in image.size)
            return image.crop((left, top, left + self.size, top + self.size)).tobytes()

        pixels = torch.frombuffer(bytearray(read_image(self.images[i], fit)), dtype=torch.uint8)
        return pixels.view(self.size, self.size, 3).permute(2, 0, 1)

    def __getitem__(self, i):
        try:
            return self.decode(i)
        except AsgaError as error:                     # a worker process would wrap it in a traceback: hand it over instead
            return error

    def load(self, device):
        """Decode everything, once, onto the device where it fits there."""
        if not torch.is_tensor(self.images):
            if len(self) * 3 * self.size ** 2 > memory_size() / 4:
                return
            progress = Progress("reading images", len(self))
            images = torch.empty(len(self), 3, self.size, self.size, dtype=torch.uint8)
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                for i, image in enumerate(pool.map(self.decode, range(len(self)))):
                    images[i] = image
                    progress.show(i + 1)
            self.images = images
        if device.type == "cuda" and self.images.numel() <= torch.cuda.get_device_properties(device).total_memory / 4:
            self.images = self.images.to(device)

    def batches(self, indices, device):
        """(uint8 images [B, 3, S, S], labels [B]) on the device, for each index tensor [B] of `indices`."""
        self.load(device)
        if torch.is_tensor(self.images):
            for index in indices:
                yield self.images[index.to(self.images.device)].to(device), self.labels[index].to(device)
            return
        plan_, order = itertools.tee(indices)
        loader = torch.utils.data.DataLoader(self, batch_sampler=(i.tolist() for i in plan_), collate_fn=_stack,
                                             num_workers=os.cpu_count(), worker_init_fn=_ignore_interrupts,
                                             pin_memory=device.type == "cuda",
                                             generator=torch.Generator())      # the global one is the network's
        for images, index in zip(loader, order):
            if isinstance(images, AsgaError):
                raise images
            yield images.to(device, non_blocking=True), self.labels[index].to(device)


@functools.cache
def channel_statistics(device):
    """(mean, deviation) [3, 1, 1], on the device once and not in every batch."""
    return [torch.tensor(v, device=device).view(3, 1, 1) for v in (MEAN, STD)]


def normalize(images, resolution):
    """uint8 [B, 3, S, S] → float32 [B, 3, R, R], ImageNet's mean and deviation."""
    mean, std = channel_statistics(images.device)
    x = (images.float() / 255 - mean) / std
    if x.shape[-1] != resolution:
        x = F.interpolate(x, size=resolution, mode="bilinear", align_corners=False)
    return x.contiguous(memory_format=torch.channels_last)                # what convolutions on CPU run fastest on


def augment(images, flip, generator):
    """Random crops of the image padded by an eighth of its side, one per image, and mirror images: uint8 [B, 3, S, S]."""
    b, _, s, _ = images.shape
    pad = s // 8
    draw = lambda high: torch.randint(high, (b,), generator=generator)
    top, left, mirror = draw(2 * pad + 1), draw(2 * pad + 1), draw(2).bool() & flip
    rows, columns = (torch.arange(s) + offset[:, None] for offset in (top, left))                              # [B, S]
    columns = torch.where(mirror[:, None], columns.flip(1), columns)
    at = lambda index, *shape: index.to(images.device).view(b, *shape)
    padded = F.pad(images, (pad,) * 4)
    return padded[at(torch.arange(b), 1, 1, 1), torch.arange(3, device=images.device).view(1, 3, 1, 1),
                  at(rows, 1, s, 1), at(columns, 1, 1, s)]


class Data(NamedTuple):
    """A data set: its name as given, names of its classes, the two parts, its own image size (None: mixed), mirroring."""
    name: str
    classes: list
    train: ImageSet
    val: ImageSet
    size: int | None
    flip: bool


def class_subset(spec, count):
    """[indices] of "0-4,7" out of `count` classes."""
    if not spec:
        return list(range(count))
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", spec):
        raise AsgaError(f"--classes {spec!r} is not understood: write numbers and ranges, like 0-4,7")
    chosen = []
    for part in spec.split(","):
        first, _, last = part.partition("-")
        if int(last or first) < int(first):
            raise AsgaError(f"--classes {spec!r}: {part} runs backwards; write {last}-{first}")
        chosen += range(int(first), min(int(last or first), max(int(first), count)) + 1)        # no list of 0-4000000000
    if max(chosen) >= count or len(set(chosen)) < len(chosen):
        raise AsgaError(f"--classes {spec!r}: the set has classes 0 to {count - 1}; name each once")
    return chosen


def subset_of(part, classes):
    """The images of some classes of an ImageSet, labels counted anew from 0."""
    label = torch.full((int(part.labels.max()) + 1,), -1)
    label[classes] = torch.arange(len(classes))
    index = (label[part.labels] >= 0).nonzero()[:, 0]
    part = part.subset(index)
    part.labels = label[part.labels]
    return part


def stratified(labels, share, seed=0):
    """Boolean mask [N]: a random `share` of each class (at least one image), by a fixed seed."""
    mask, generator = torch.zeros(len(labels), dtype=torch.bool), torch.Generator().manual_seed(seed)
    for label in labels.unique():
        index = (labels == label).nonzero()[:, 0]
        mask[index[torch.randperm(len(index), generator=generator)][:max(1, round(share * len(index)))]] = True
    return mask


def digits():
    """UCI handwritten digits, 1,797 real 8×8 images, upsampled to 32×32; a fifth of each class is for validation."""
    if not DIGITS.exists():
        raise AsgaError(f"--data digits needs {DIGITS}, which comes with the repository beside asga.py: copy it there")
    import numpy
    with numpy.load(DIGITS) as file:
        images, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"]).long()
    images = F.interpolate(images[:, None].float() * (255 / 16), size=32, mode="bilinear", align_corners=False)
    images = images.round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    val = stratified(labels, 0.2)
    parts = [ImageSet(images[mask], labels[mask], 32) for mask in (~val, val)]
    return Data("digits", [str(d) for d in range(10)], *parts, 32, False)


def cifar10_reachable(root):
    """True where CIFAR-10 is on disk or its host answers within seconds (a name look-up alone can hang for minutes)."""
    if (Path(root) / "cifar-10-batches-py").is_dir():
        return True
    answer = []

    def ask():
        try:
            socket.create_connection(("www.cs.toronto.edu", 443), timeout=4).close()
            answer.append(True)
        except OSError:
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(5)
    return bool(answer)


def cifar10(root):
    """CIFAR-10 (Krizhevsky 2009) through torchvision's loader, downloaded into `root` where it is not there."""
    if not cifar10_reachable(root):
        raise AsgaError(f"cifar10 is not in {root} and its server does not answer: give --data-root, --data DIR (a folder "
                        f"train/CLASS/*, val/CLASS/*) or --data digits")
    datasets = import_torchvision().datasets
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)
    try:
        found = [datasets.CIFAR10(root, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise AsgaError(f"cannot get cifar10 into {root} ({str(error).splitlines()[0]}): try again, or give --data DIR")
    finally:
        socket.setdefaulttimeout(before)
    parts = [ImageSet(torch.from_numpy(d.data).permute(0, 3, 1, 2).contiguous(), d.targets, 32) for d in found]
    return Data("cifar10", found[0].classes, *parts, 32, True)


def image_folder(name):
    """A folder train/CLASS/*, val/CLASS/* (torchvision's ImageFolder)."""
    ImageFolder = import_torchvision().datasets.ImageFolder
    found = []
    for part in ("train", "val"):
        folder = Path(name) / part
        if not folder.is_dir():
            raise AsgaError(f"--data {name}: there is no folder {folder}; images lie in train/CLASS/* and val/CLASS/*")
        try:
            found.append(ImageFolder(folder))
        except FileNotFoundError as error:
            raise AsgaError(f"--data {folder}: {str(error).splitlines()[0]} Put images there, or remove the folder")
    if found[0].classes != found[1].classes:
        odd = sorted(set(found[0].classes) ^ set(found[1].classes))[0]
        raise AsgaError(f"--data {name}: class {odd!r} is in only one of train/ and val/")
    sides = set()
    for path, _ in found[0].samples[::max(1, len(found[0]) // 32)]:
        sides.update(read_image(path, lambda image: image.size))
    size = sides.pop() if len(sides) == 1 else None
    parts = [ImageSet([path for path, _ in f.samples], f.targets, size) for f in found]
    return Data(str(name), found[0].classes, *parts, size, True)


def load_data(name, root, classes=""):
    """The Data that --data and --classes name; AsgaError where there is none."""
    if name not in ("digits", "cifar10") and not Path(name).is_dir():
        raise AsgaError(f"unknown data set {name!r}: use cifar10, digits, or a folder with train/CLASS/* and val/CLASS/*")
    data = digits() if name == "digits" else cifar10(root) if name == "cifar10" else image_folder(name)
    chosen = class_subset(classes, len(data.classes))
    if len(chosen) < 2:
        raise AsgaError(f"--data {name} {classes and '--classes ' + classes} has {len(chosen)} class: give at least two")
    return data._replace(classes=[data.classes[c] for c in chosen],
                         train=subset_of(data.train, chosen), val=subset_of(data.val, chosen))


# ----------------------------------------------------------------------------------------------------------------------
# Runs: one folder each; progress, log, checkpoints; stopped at any step and continued
# ----------------------------------------------------------------------------------------------------------------------

class Stopped(Exception):
    """Ctrl-C or SIGTERM, after what was done is on disk."""


class Progress:
    """A line with what is done, numbers and the time left: rewritten on a terminal, else a plain line now and then."""

    def __init__(self, what, total, done=0):
        self.what, self.total, self.first = what, total, done
        self.start, self.last, self.live = time.monotonic(), time.monotonic(), sys.stderr.isatty()

    def begin(self, done):
        """Time from here on: what came before (reading images, compiling) says nothing about the rest."""
        self.first, self.start = done, time.monotonic()

    def show(self, done, **numbers):
        now = time.monotonic()
        if now - self.last < (0.2 if self.live else 15) and done < self.total:
            return
        if done <= self.first or done == self.total and now - self.start < 1:
            print(CLEAR if self.live else "", end="", file=sys.stderr, flush=True)                # of a short phase nothing stays
            return
        self.last = now
        left = round((now - self.start) / max(1, done - self.first) * (self.total - done))
        text = f"{self.what} {done}/{self.total}" + "".join(f"  {k} {v}" for k, v in numbers.items())
        text += f"  ETA {left // 60}:{left % 60:02}" if done < self.total else f"  {now - self.start:.0f} s"
        print(CLEAR + text if self.live else text, end="" if self.live and done < self.total else "\n",
              file=sys.stderr, flush=True)


class Run:
    """The folder of one command. A run with the same settings in the same folder goes on where it was stopped."""

    def __init__(self, out, command, cfg, result):
        self.out = Path(out)
        settings, defaults = (json.loads(json.dumps(dataclasses.asdict(c))) for c in (cfg, type(cfg)()))
        settings.pop("out", None)
        files = {key: hashlib.sha256(Path(settings[key]).read_bytes()).hexdigest()[:16] for key in ("policy", "weights")
                 if settings.get(key) and Path(settings[key]).is_file()}               # a name alone may hold something else by now
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            old = json.loads((self.out / "config.json").read_text()) if (self.out / "config.json").exists() else None
            if old is not None and not isinstance(old.get("settings") if isinstance(old, dict) else None, dict):
                raise ValueError("its config.json is not one of ours")
        except (OSError, ValueError) as error:
            raise AsgaError(f"--out {out} cannot be used ({error}): give another folder")
        if (self.out / result).exists():                                              # written last: the run was finished
            raise AsgaError(f"--out {out} holds a finished {result}: give another folder, or delete it first")
        if old is not None:
            old["settings"] = {**defaults, **old["settings"]}                          # by a version that lacked some of them
            other = [k for k, v in settings.items() if old["settings"][k] != v]
            if old.get("command") != command or other:
                what = f"{other[0]} {old['settings'][other[0]]!r}" if other else f"command {old.get('command')!r}"
                raise AsgaError(f"--out {out} holds an unfinished run with {what}: give another folder, or delete it")
            for key, content in old.get("files", {}).items():
                if content != files.get(key):
                    raise AsgaError(f"--out {out} holds an unfinished run from another content of {settings[key]}: give another "
                                    f"folder, or delete it")
        write_json(self.out / "config.json", {"command": command, "settings": settings, "files": files, "versions": versions()})

    def loop(self, phase, total, stream, step, objects, report):
        """Run step(x, y, done) for each batch of stream(start) until `total`; returns the seconds that it took.

        Each step returns a record of numbers and small tensors; they are read and logged in blocks, so that a step does
        not wait for the device. objects: {name: has state_dict}, in the checkpoint with the random state. report(record)
        → {name: text} for the progress line. SIGINT and SIGTERM end it after the present step; a second one at once.
        """
        checkpoint, log = self.out / f"{phase}.ckpt", self.out / ("log.jsonl" if phase != "weights" else "weights.jsonl")
        start, before = self._restore(checkpoint, objects)
        if start > total:
            raise AsgaError(f"{checkpoint} has done {start} steps of what are {total} now: the data have changed; give another --out")
        asked = []
        if start:
            say(f"going on with {phase} at step {start} of {total}")
        kept = log.read_text().splitlines(True)[:start] if log.exists() else []
        write_atomic(log, lambda part: part.write_text("".join(kept)))

        def save(done):
            state = {name: thing.state_dict() for name, thing in objects.items()}
            state.update(step=done, seconds=before + time.monotonic() - began, rng=torch.get_rng_state(),
                         cuda_rng=torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])
            write_atomic(checkpoint, lambda part: torch.save(state, part))

        def flush(done):
            lines = []
            for record in pending:
                record = {k: v.tolist() if torch.is_tensor(v) else v for k, v in record.items()}
                if not math.isfinite(record["loss"]):
                    raise AsgaError(f"loss became {record['loss']} at step {record['step']} of {phase}: give a lower learning "
                                    f"rate or other weights, in a new --out")
                lines.append(json.dumps(record) + "\n")
            pending.clear()
            try:
                with open(log, "a") as file:
                    file.writelines(lines)
            except OSError as error:
                raise AsgaError(f"cannot write {log} ({error.strerror}): make room")
            progress.show(done, **report(record))

        def ask(signum, frame):
            if asked:
                raise KeyboardInterrupt
            asked.append(signum)
            say("stopping after this step (again: at once)")

        main = threading.current_thread() is threading.main_thread()
        previous = [(s, signal.signal(s, ask)) for s in (signal.SIGINT, signal.SIGTERM)] if main else []
        began = flushed = saved = time.monotonic()
        pending, progress = [], Progress(phase, total, start)
        try:
            for done, (x, y) in enumerate(itertools.islice(stream(start), total - start), start):
                record = step(x, y, done)
                now = time.monotonic()
                if done == start:
                    progress.begin(done + 1)
                pending.append({"step": done, **record, "time": round(before + now - began, 3)})
                due = now - saved > 60 or done + 1 == total or asked
                if now - flushed > 0.5 or due:
                    flush(done + 1)                                         # first, so that no checkpoint is ahead of its log
                    flushed = now
                if due:
                    save(done + 1)
                    saved = now
                if asked:
                    raise Stopped(f"stopped in {phase} after step {done + 1} of {total}, all of it saved")
        finally:
            for s, handler in previous:
                signal.signal(s, handler)
        return before + time.monotonic() - began

    def _restore(self, checkpoint, objects):
        """(steps done, seconds that they took) of a checkpoint, its states put back; (0, 0) where there is none."""
        if not checkpoint.exists():
            return 0, 0.0
        try:
            state = read_checkpoint(checkpoint)
        except AsgaError:
            raise AsgaError(f"{checkpoint} cannot be read: delete it to start this phase again")
        try:
            for name, thing in objects.items():
                thing.load_state_dict(state[name])
        except (KeyError, ValueError, RuntimeError):
            raise AsgaError(f"{checkpoint} is by another version of asga.py: delete it to start this phase again, or give "
                            f"another --out")
        torch.set_rng_state(state["rng"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda_rng"][:torch.cuda.device_count()])             # fewer may be visible now
        return state["step"], state["seconds"]

    def finish(self, phase):
        """The phase's result is written: its checkpoint can go."""
        (self.out / f"{phase}.ckpt").unlink(missing_ok=True)


def training_stream(part, batch_size, device, resolution, seed, style):
    """start → endless (x, y) batches from step `start` on: what step k sees depends on seed and k alone, so a run that was
    stopped goes on identically. style: "flip" (crops and mirror images), "crop", or "none"."""
    size = min(batch_size, len(part))
    per_epoch = len(part) // size

    def indices(start):
        for step in itertools.count(start):
            epoch, k = divmod(step, per_epoch)
            if k == 0 or step == start:
                order = torch.randperm(len(part), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
            yield order[k * size:(k + 1) * size]

    def stream(start):
        for step, (images, y) in enumerate(part.batches(indices(start), device), start):
            if style != "none":
                images = augment(images, style == "flip", torch.Generator().manual_seed(seed * 1_000_003 + step))
            yield normalize(images, resolution), y

    return stream


@torch.no_grad()
def evaluate(model, part, resolution, device, batch_size=64):
    """{"accuracy": percent, "loss": mean cross-entropy} over an ImageSet, in eval mode; the model stays as it was."""
    right, loss, done, progress, prepared = 0, 0.0, 0, Progress("evaluating", len(part)), Prepared(model)
    with _evaluating(model):
        for images, y in part.batches(torch.arange(len(part)).split(batch_size), device):
            with prepared:
                logits = first_output(model(normalize(images, resolution)))
            right += (logits.argmax(1) == y).sum().item()
            loss += F.cross_entropy(logits, y, reduction="sum").item()
            done += len(y)
            progress.show(done, accuracy=f"{100 * right / done:.2f} %")
    return {"accuracy": 100 * right / len(part), "loss": loss / len(part)}


# ----------------------------------------------------------------------------------------------------------------------
# Commands
# ----------------------------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Common:
    """Flags of every command."""
    data: str = option("", "cifar10, digits, or a folder with train/CLASS/* and val/CLASS/*")
    data_root: str = option("data", "where cifar10 is, or is downloaded to")
    classes: str = option("", "only these classes, like 0-4,7")
    device: str = option("auto", "cpu, cuda, cuda:1; auto takes CUDA where it is")
    compile: bool = option(True, "run the quantizer through torch.compile where a compiler is there")


@dataclasses.dataclass
class Training(Common):
    """Flags of every command that trains."""
    arch: str = option("resnet20", "resnet20, a torchvision model's name, or path/to/file.py:function")
    weights: str = option("", "full-precision weights: a file, or imagenet (torchvision's); a classifier for other classes is replaced")
    resolution: int = option(0, "side of the images in pixels (default: 64 for torchvision models, else the images' own)")
    images: float = option(1.0, "share of the training images, drawn per class by a fixed seed")
    augment: str = option("auto", "crops and mirror images; auto mirrors all but digits",
                          choices=["auto", "flip", "crop", "none"])
    batch_size: int = option(128, "images a step")
    seed: int = option(0, "of weights, order and augmentation")
    out: str = option("", "folder for what is made (default runs/<time>-<arch>-<data>)")
    precision: str = option("float32", PRECISION_HELP, choices=PRECISIONS)


@dataclasses.dataclass
class Pretraining(Training):
    """Flags of the commands that start from full-precision weights."""
    fp_epochs: int = option(20, "epochs of the full-precision training that comes first without --weights, or where the "
                                "classifier of --weights has other classes")
    fp_lr: float = option(0.1, "its learning rate; a tenth of it with --weights")
    cost_resolution: int = option(0, "side at which MACs are counted: that of deployment (default: 224 for torchvision "
                                  "models, else --resolution)")


@dataclasses.dataclass
class SearchConfig(SearchSettings, Pretraining):
    """Flags of search."""
    budget: str = option("3bit", BUDGET_HELP + "; join two with a comma")
    random_weights: bool = option(False, "search from random weights (not recommended)")


@dataclasses.dataclass
class TransferConfig(Pretraining):
    """Flags of transfer."""
    policy: str = option("", "policy.json of a search", positional=True)
    arch: str = option("", "default: the policy's")
    epochs: int = option(5, "epochs of quantization-aware tuning")
    lr: float = option(0.01, "learning rate of weights and quantizer steps (SGD with momentum 0.9, cosine to zero)")
    weight_decay: float = option(1e-4, "weight decay of convolution and matrix weights")
    recompute: bool = option(False, RECOMPUTE_HELP)


@dataclasses.dataclass
class TrainConfig(Training):
    """Flags of train."""
    epochs: int = option(20, "epochs of full-precision training")
    lr: float = option(0.1, "learning rate (SGD with momentum 0.9, warm-up, cosine to zero)")


@dataclasses.dataclass
class EvalConfig(Common):
    """Flags of eval."""
    model: str = option("", "model.pt of train or transfer", positional=True)
    compile: bool = option(False, "run the quantizer through torch.compile: pays where there are many images")


def pick_device(name):
    """The torch.device of --device; AsgaError where it does not work."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device, dtype=torch.float64).item()
    except (RuntimeError, AssertionError, TypeError) as error:              # torch without CUDA; a device without float64
        raise AsgaError(f"--device {name} cannot be used here ({str(error).splitlines()[0]}): use --device cpu")
    return device


def describe(device):
    """The machine in a line."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def peak_memory(device):
    """The most memory in use so far, in words."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**20:.0f} MiB on the GPU"
    import resource
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (20 if sys.platform == 'darwin' else 10):.0f} MiB of the process"


class Job:
    """What train, search and transfer share: device, data, network, resolution, all checked before anything is written."""

    def __init__(self, cfg, command):
        self.cfg, self.name = cfg, command
        for name, least in (("batch_size", 1), ("fp_epochs", 1), ("resolution", 0), ("epochs", 1)):
            if getattr(cfg, name, least) < least:
                raise AsgaError(f"--{name.replace('_', '-')} {getattr(cfg, name)} must be at least {least}")
        check_finite(cfg, ("lr", "fp_lr", "weight_decay"))
        if not 0 <= cfg.seed < 2 ** 32:
            raise AsgaError(f"--seed {cfg.seed} must be a whole number from 0 to {2 ** 32 - 1}")
        if not 0 < cfg.images <= 1:
            raise AsgaError(f"--images {cfg.images} must be a share of the training images, above 0 and at most 1")
        Fused.on = cfg.compile
        self.device = pick_device(cfg.device)
        here = Path(cfg.out or "runs").absolute()
        while not here.exists():
            here = here.parent
        if not here.is_dir() or not os.access(here, os.W_OK):
            raise AsgaError(f"--out {cfg.out or 'runs'} cannot be written ({here} is no folder that you may write to): give "
                            f"another")
        self.data = load_data(cfg.data, cfg.data_root, cfg.classes)
        own = self.data.size or 64
        self.resolution = cfg.resolution or (64 if is_torchvision(cfg.arch) else own)
        if not cfg.resolution and not self.data.size:
            say(f"images differ in size or are not square: taking them at {self.resolution} pixels (--resolution changes that)")
        for part in (self.data.train, self.data.val):
            part.size = min(self.data.size or self.resolution, self.resolution)
        self.train = self.data.train
        if cfg.images < 1:
            self.train = self.train.subset(stratified(self.train.labels, cfg.images).nonzero()[:, 0])
        self.style = ("flip" if self.data.flip else "crop") if cfg.augment == "auto" else cfg.augment
        torch.manual_seed(cfg.seed)
        self.model = place(build(cfg.arch, len(self.data.classes)), self.device)
        check_network(self.model, cfg.arch, len(self.data.classes), self.resolution, self.device,
                      batch=min(cfg.batch_size, len(self.train), 2))
        self.cost_resolution = getattr(cfg, "cost_resolution", self.resolution) or (
            224 if is_torchvision(cfg.arch) else self.resolution)
        self.example = check_network(self.model, cfg.arch, len(self.data.classes), self.cost_resolution, self.device)
        self.fresh_head = bool(cfg.weights) and load_weights(self.model, cfg.arch, cfg.weights, self.data.classes)

    def start(self, result):
        """Make --out and its config.json."""
        cfg = self.cfg
        label = f"{Path(cfg.arch).name.partition(':')[2] or cfg.arch}-{Path(cfg.data).name}"
        self.data.val.load(self.device)                          # a broken image shows now, not when all is done
        cfg.out = cfg.out or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{label}"
        self.run = Run(cfg.out, self.name, cfg, result)

    def command(self, *words):
        """The line to type next, with the data flags of this run where `words` end with --data."""
        cfg = self.cfg
        if words[-1] == "--data":
            words += (cfg.data, *(["--data-root", cfg.data_root] if cfg.data_root != "data" else []),
                      *(["--classes", cfg.classes] if cfg.classes else []))
        return shlex.join(["python", "asga.py", *map(str, words)])

    def stream(self):
        return training_stream(self.train, self.cfg.batch_size, self.device, self.resolution, self.cfg.seed, self.style)

    def inputs(self, count):
        """The images of the first `count` batches."""
        return (x for x, _ in itertools.islice(self.stream()(0), count))

    def steps(self, epochs):
        return epochs * max(1, len(self.train) // self.cfg.batch_size)

    def evaluate(self, model):
        return evaluate(model, self.data.val, self.resolution, self.device)

    def tune(self, model, phase, epochs, lr, weight_decay, warmup):
        """SGD with momentum and a cosine schedule; seconds that it took. Also the full-precision training."""
        total = self.steps(epochs)
        groups = parameter_groups(model, lr, weight_decay)
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)
        guard, prepared = StepGuard(model), Prepared(model)

        def step(x, y, done):
            model.train()
            cosine(optimizer, done, total)
            for group in optimizer.param_groups:
                group["lr"] *= min(1, (done + 1) / (warmup * total + 1))
            optimizer.zero_grad()
            with prepared:
                loss = forward_loss(model, x, y, F.cross_entropy, self.cfg.precision)
                loss.backward()
            with guard:
                optimizer.step()
            return {"loss": loss.detach()}

        return self.run.loop(phase, total, self.stream(), step, {"model": model, "optimizer": optimizer},
                             lambda record: {"loss": f"{record['loss']:.4f}"})

    def full_precision(self):
        """Full-precision weights of this very data set, kept in --out for the next run: trained where none were given, tuned
        at a tenth of the rate where the given ones had another classifier. Returns the seconds."""
        cfg, kept = self.cfg, self.run.out / "weights.pt"
        if kept.exists():
            load_weights(self.model, cfg.arch, kept)
            return read_checkpoint(kept).get("seconds", 0.0)              # a file of the user's own has none
        if cfg.weights and not self.fresh_head:
            return 0.0
        say(f"{'the classifier is fresh: tuning' if cfg.weights else 'no --weights: training'} {cfg.arch} in full precision on "
            f"{self.data.name} first")
        torch.manual_seed(cfg.seed)
        seconds = self.tune(self.model, "weights", cfg.fp_epochs, cfg.fp_lr / (10 if cfg.weights else 1), 5e-4, warmup=0.1)
        self.save(kept, self.model, seconds=round(seconds, 3))
        self.run.finish("weights")
        say(f"full-precision weights: {seconds:.0f} s, kept in {kept} for --weights")
        return seconds

    def save(self, path, model, policy=None, form="asga-model", **more):
        """A checkpoint that eval and --weights read."""
        state = {**more, "format": form, "arch": self.cfg.arch, "classes": list(self.data.classes),
                 "resolution": self.resolution, "state": model.state_dict(), "policy": policy and policy.to_json()}
        write_atomic(path, lambda part: torch.save(state, part))


def table(rows, header):
    """Columns aligned; the first to the left, the others to the right."""
    rows = [header, *[[str(cell) for cell in row] for row in rows]]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
                     for row in rows)


def show_policy(policy, budget):
    """The table of layers, and what the policy costs."""
    print(table([(name, human(policy.sizes[name].macs), w, a) for name, (w, a) in policy.layers.items()],
                ("layer", "MACs", "w bits", "a bits")))
    uniform = budget.uniform()
    reference, mean = uniform[:, ~budget.kept].mean(1).tolist(), (uniform * budget.sizes[0]).sum(1) / budget.sizes[0].sum()
    w, a = policy.mean_bits
    limits = ", ".join(f"{human(v)} BOPs" if k == "bops" else f"{human(v / 8)}B" for k, v in budget.limits.items())
    spent = budget.spent(torch.tensor(list(policy.layers.values()), device=budget.lo.device).t()).item()
    print(f"cost               {human(policy.bops)} BOPs (Σ MACs·w·a), {human(policy.weight_bits / 8)}B of weights")
    print(f"budget             {budget.spec} = {limits}; {100 * spent:.2f} % spent")
    print(f"mean bits          w {w:.2f}, a {a:.2f} (weighted by MACs, first and last layer included)")
    print("uniform reference  " + "/".join("fixed" if math.isnan(b) else f"{b:.2f}" for b in reference)
          + " bits (w/a) in the searched layers, mean w {:.2f}, a {:.2f}".format(*mean.tolist()))


def cmd_search(cfg):
    """Search a policy on the proxy set."""
    if not cfg.data:
        cfg.data = "cifar10"
        if not cifar10_reachable(cfg.data_root):
            cfg.data = "digits"
            say(f"cifar10 is not in {cfg.data_root} and its server does not answer: falling back to digits (--data DIR)")
    if cfg.random_weights and cfg.weights:
        raise AsgaError(f"--random-weights with --weights {cfg.weights}: give one of them")
    job = Job(cfg, "search")
    budget, kept = plan(job.model, job.example, cfg.budget, cfg)
    job.start("policy.json")
    if cfg.random_weights:
        say("warning: searching from random weights; a policy found so is rarely worth carrying over")
        fp_seconds = 0.0
    else:
        fp_seconds = job.full_precision()
    torch.manual_seed(cfg.seed)
    began = time.monotonic()
    run = Search(job.model, budget, kept, cfg, job.inputs(4))
    seconds = time.monotonic() - began
    if cfg.steps:
        seconds += job.run.loop("search", cfg.steps, job.stream(),
                                lambda x, y, done: run.step(x, y, F.cross_entropy, done), {"search": run},
                                lambda r: {"loss": f"{r['loss']:.4f}", "cost": f"{human(r['expected_cost'])}BOPs"})
    policy = run.policy(
        arch=cfg.arch, versions=versions(),
        proxy={"data": job.data.name, "classes": len(job.data.classes), "images": len(job.train),
               "resolution": job.resolution},
        search={"method": cfg.method, "seed": cfg.seed, "seconds": round(seconds, 3), "device": describe(job.device),
                "settings": dataclasses.asdict(cfg)})
    untuned = attach_quantizers(run.net, policy.choices)
    for net in (run.net, untuned):
        update_statistics(net, job.inputs(16))
    metrics = {"full_precision": job.evaluate(job.model), "supernet": job.evaluate(run.net),
               "policy": job.evaluate(untuned), "policy_bops": policy.bops,
               "fp_seconds": round(fp_seconds, 3), "seconds": round(seconds, 3)}
    out = job.run.out
    job.save(out / "supernet.pt", run.net, form="asga-supernet")
    write_json(out / "metrics.json", metrics)
    policy.save(out / "policy.json")
    job.run.finish("search")
    show_policy(policy, budget)
    print(f"accuracy           {metrics['full_precision']['accuracy']:.2f} % full precision, "
          f"{metrics['supernet']['accuracy']:.2f} % supernet, "
          f"{metrics['policy']['accuracy']:.2f} % the policy, taken from it without tuning ({job.data.name}, val)")
    print(f"search time        {seconds:.1f} s ({cfg.steps} steps; full-precision training {fp_seconds:.1f} s apart)")
    print(f"peak memory        {peak_memory(job.device)}")
    print(f"next               {job.command('transfer', out / 'policy.json')} --data DIR")


def cmd_transfer(cfg):
    """Carry a policy to the target set: quantize, calibrate, tune weights and steps, never the bits."""
    policy = Policy.load(cfg.policy)
    cfg.arch = cfg.arch or policy.info.get("arch", "")
    if not cfg.arch:
        raise AsgaError(f"{cfg.policy} names no network: give --arch")
    if not cfg.data:
        raise AsgaError("transfer needs --data: the target set, cifar10, digits, or a folder")
    job = Job(cfg, "transfer")
    searched, policy = policy.bops, policy.measure(job.model, job.example)
    job.start("metrics.json")
    fp_seconds = job.full_precision()
    torch.manual_seed(cfg.seed)
    began = time.monotonic()
    net = attach_quantizers(job.model, policy.choices)
    calibrate(net, job.inputs(4))
    update_statistics(net, job.inputs(16))
    set_training(net, cfg.recompute)
    metrics = {"full_precision": job.evaluate(job.model), "quantized": job.evaluate(net)}
    seconds = time.monotonic() - began + job.tune(net, "transfer", cfg.epochs, cfg.lr, cfg.weight_decay, warmup=0.0)
    metrics.update(tuned=job.evaluate(net), policy_bops=policy.bops, fp_seconds=round(fp_seconds, 3),
                   seconds=round(seconds, 3))
    out = job.run.out
    job.save(out / "model.pt", net, policy)
    write_json(out / "metrics.json", metrics)
    job.run.finish("transfer")
    rows = [(label, f"{metrics[key]['accuracy']:.2f} %", f"{metrics[key]['loss']:.4f}") for label, key in
            (("full precision", "full_precision"), ("quantized", "quantized"), ("tuned", "tuned"))]
    print(table(rows, (f"{cfg.arch} on {job.data.name} (val)", "accuracy", "cross-entropy")))
    w, a = policy.mean_bits
    print(f"cost  {human(policy.bops)} BOPs at {job.cost_resolution} px (the search's network: {human(searched)}), "
          f"{human(policy.weight_bits / 8)}B of weights, mean bits w {w:.2f} a {a:.2f}")
    print(f"time  {seconds:.1f} s (full-precision training {fp_seconds:.1f} s apart); peak memory {peak_memory(job.device)}")
    print(f"next  {job.command('eval', out / 'model.pt', '--data')}")


def cmd_train(cfg):
    """Train full-precision weights, where a user has none."""
    cfg.data = cfg.data or "cifar10"
    job = Job(cfg, "train")
    job.start("metrics.json")
    seconds = job.tune(job.model, "train", cfg.epochs, cfg.lr, 5e-4, warmup=0.1)
    metrics = {"full_precision": job.evaluate(job.model), "seconds": round(seconds, 3)}
    job.save(job.run.out / "model.pt", job.model)
    write_json(job.run.out / "metrics.json", metrics)
    job.run.finish("train")
    print(f"accuracy  {metrics['full_precision']['accuracy']:.2f} % ({job.data.name}, val), {seconds:.1f} s")
    size = ["--resolution", cfg.resolution] if cfg.resolution else []
    print(f"next      {job.command('search', '--arch', cfg.arch, *size, '--weights', job.run.out / 'model.pt', '--data')}")


def cmd_eval(cfg):
    """Accuracy of a model.pt."""
    state = read_checkpoint(cfg.model)
    if state.get("format") != "asga-model":
        raise AsgaError(f"{cfg.model} is no checkpoint of asga.py: eval takes the model.pt of train or transfer")
    if not cfg.data:
        raise AsgaError("eval needs --data: cifar10, digits, or a folder")
    Fused.on, device = cfg.compile, pick_device(cfg.device)
    data = load_data(cfg.data, cfg.data_root, cfg.classes)
    if list(data.classes) != state["classes"]:
        raise AsgaError(f"{cfg.model} knows the classes {', '.join(state['classes'])[:80]}; --data {cfg.data} "
                        f"{cfg.classes and '--classes ' + cfg.classes} has {', '.join(data.classes)[:80]}")
    model = place(build(state["arch"], len(data.classes)), device)
    try:
        if state["policy"]:
            model = attach_quantizers(model, Policy.from_json(state["policy"], cfg.model).choices)
        model.load_state_dict(state["state"])
    except (KeyError, RuntimeError) as error:                                    # KeyError: no such layer any more
        raise AsgaError(f"{cfg.model} does not fit {state['arch']} as it is now: {str(error).splitlines()[-1].strip()}")
    data.val.size = min(data.size or state["resolution"], state["resolution"])
    metrics = evaluate(model, data.val, state["resolution"], device)
    print(f"accuracy {metrics['accuracy']:.2f} %  cross-entropy {metrics['loss']:.4f}  ({len(data.val)} images of {data.name}, "
          f"val, {state['resolution']} px, {'quantized' if state['policy'] else 'full precision'})")


COMMANDS = {"search": (cmd_search, SearchConfig), "transfer": (cmd_transfer, TransferConfig),
            "train": (cmd_train, TrainConfig), "eval": (cmd_eval, EvalConfig)}


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""
    def error(self, message):
        self.exit(2, f"asga: error: {message} ({self.prog} --help lists all)\n")


def parse(argv):
    """(command function, its filled-in config)."""
    parser = Parser("python asga.py", description="Mixed-precision quantization policies by ASGA.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))

    def whole(text):
        try:
            return check_bits([int(part) for part in text.split(",")])
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is no list of bitwidths like 2,3,4 ({error})")

    for name, (function, config) in COMMANDS.items():
        sub = commands.add_parser(name, help=function.__doc__, description=function.__doc__, allow_abbrev=False)
        for field in dataclasses.fields(config):
            default = ",".join(map(str, field.default)) if field.type is tuple else field.default
            more = {"help": field.metadata["help"] + (f" (default: {default})" if default not in ("", 0) else ""),
                    "default": default}
            if field.metadata.get("positional"):
                sub.add_argument(field.name, help=more["help"])
                continue
            if field.type is bool:
                more["action"] = argparse.BooleanOptionalAction
            elif field.type is tuple:
                more.update(type=whole, metavar="2,3,…")
            else:
                more.update(type=field.type, choices=field.metadata.get("choices"))
                if not more["choices"]:
                    more["metavar"] = field.type.__name__.upper()
            sub.add_argument("--" + field.name.replace("_", "-"), **more)
    values = vars(parser.parse_args(argv))
    function, config = COMMANDS[values.pop("command")]
    return function, config(**values)


def main(argv=None):
    """The command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    cfg = None
    try:
        function, cfg = parse(argv)
        function(cfg)
    except AsgaError as error:
        say(f"error: {error}")
        return 2
    except OSError as error:                                   # a folder that may not be looked into, a name that is too long
        if error.filename is None:
            raise
        say(f"error: {error.filename} cannot be used ({error.strerror}): give another path")
        return 2
    except (RuntimeError, MemoryError) as error:
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not known and "can't allocate memory" not in str(error):                                       # torch's on a CPU
            raise
        remedy = "lower --batch-size or --resolution" if hasattr(cfg, "batch_size") else "give --device cpu"
        say(f"error: out of memory ({str(error).partition(chr(10))[0] or 'MemoryError'}): {remedy}")
        return 2
    except (Stopped, KeyboardInterrupt) as stop:
        out = getattr(cfg, "out", "")
        where = [] if "--out" in argv or not out else ["--out", out]
        where += [] if "--data" in argv or not getattr(cfg, "data", "") else ["--data", cfg.data]
        say(f"{str(stop) or 'stopped'}; go on with: python asga.py {shlex.join([*argv, *where])}")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
