"""What must hold of asga.py, against oracles that do not use it.

    bash reproduce.sh test            or            python -m pytest test_asga.py

ASGA_DATA names a folder with cifar10/ and tinyimagenet50/ for the tests on real data.
"""
import contextlib
import copy
import functools
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

import asga
from asga import ASGA, AsgaError, LayerCost, Policy, Quantizer, quantize, search

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=60,
                          suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
settings.load_profile("ci")
HERE = Path(__file__).resolve().parent
DATA = os.environ.get("ASGA_DATA", "")
real_data = pytest.mark.skipif(not DATA or not (Path(DATA) / "cifar10" / "val").is_dir(),
                               reason="ASGA_DATA names no folder with cifar10/ and tinyimagenet50/")
try:
    torchvision = asga.import_torchvision()
except AsgaError:
    torchvision = None
needs_torchvision = pytest.mark.skipif(torchvision is None, reason="torchvision is not installed")
compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(not compiler, reason="no C++ compiler")
CPU = torch.device("cpu")
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
on_devices = pytest.mark.parametrize("device", DEVICES)
torch.backends.cudnn.deterministic = True

@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """Tests run the plain formulas; the ones about the compiler switch it on."""
    monkeypatch.setattr(asga.Fused, "on", False)
    torch.backends.mha.set_fastpath_enabled(True)  # as in a fresh process
    torch.manual_seed(0)

def snapshot(module):
    """{name: copy} of all that a module holds."""
    return {name: t.clone() for name, t in module.state_dict().items()}

def same(one, other):
    """Whether two dicts of tensors are equal, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)

# ------------------------------------------------------------------------------------------------ Quantizer

def levels(bits, signed):
    return (-2 ** (bits - 1), 2 ** (bits - 1) - 1) if signed else (0, 2 ** bits - 1)

def quantizer(bits, signed, steps, dtype=torch.float64, device="cpu"):
    q = Quantizer(bits, signed).to(device, dtype)
    q.steps.data.copy_(torch.as_tensor(steps, dtype=dtype))
    return q

def rounded(x, q, bits, signed=True):
    """torch's own fake quantization of x, by the only step of the quantizer q."""
    return torch.fake_quantize_per_tensor_affine(x, q.steps.item(), 0, *levels(bits, signed))

def surrogate(x, s, bits, signed):
    """Q, ∂Q/∂x, ∂Q/∂s of LSQ, element by element in plain Python (the gradient scale included)."""
    n, p = levels(bits, signed)
    q, dx, ds = [], [], []
    for v in (x / s).tolist():
        r = min(max(round(v), n), p)  # Python rounds ties to even, as torch does
        q.append(r * s)
        dx.append(1.0 if n <= v <= p else 0.0)
        ds.append((n if v < n else p if v > p else r - v) / math.sqrt(x.numel() * p))
    return [torch.tensor(t, dtype=torch.float64) for t in (q, dx, ds)]

@on_devices
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8, 16])
@pytest.mark.parametrize("step", [1.0, 0.37, 1e-9, 2.0 ** 20])
def test_one_candidate_is_fake_quantize_with_the_declared_gradients_at_every_edge(bits, signed, step, device):
    n, p = levels(bits, signed)
    k = torch.arange(max(n, -20), min(p, 20) + 1, dtype=torch.float64)  # and ties, bounds, beside and beyond:
    bounds = [n, p, n - 0.5, p + 0.5, n - 1, p + 1, 1e3 * p + 7, 1e3 * n - 7, 0.0, -0.0]
    x = torch.cat([k, k + 0.5, k + 0.25, torch.tensor(bounds, dtype=torch.float64)]) * step
    expected, dx, ds = (t.to(device) for t in surrogate(x, step, bits, signed))
    x = x.to(device).requires_grad_()
    q, g = quantizer(bits, signed, step, device=device), torch.randn_like(x)
    out = q(x)
    out.backward(g)
    assert torch.equal(out, expected)
    if math.log2(step).is_integer():  # else torch's 1/s may round a tie the other way
        assert torch.equal(out.float(), rounded(x.float(), q, bits, signed))
    assert torch.equal(x.grad, g * dx)  # exactly 1 or 0, on the bounds too
    torch.testing.assert_close(q.steps.grad, (g * ds).sum()[None], rtol=1e-10, atol=1e-12)

@given(st.integers(2, 8), st.booleans(), st.floats(1e-3, 1e3), st.integers(0, 10 ** 6))
def test_forward_is_fake_quantize_on_random_tensors_monotone_and_idempotent(bits, signed, step, seed):
    x = torch.randn(257, generator=torch.Generator().manual_seed(seed)) * step * 2 ** bits
    q = quantizer(bits, signed, step, torch.float32)
    y = q(x)
    off_ties = ((x / step) % 1 - 0.5).abs() > 1e-4
    torch.testing.assert_close(y[off_ties], rounded(x, q, bits, signed)[off_ties], rtol=1e-6, atol=0)
    assert torch.equal(q(y), y) and (q(x.sort().values).diff() >= 0).all() and len(y.unique()) <= 2 ** bits
    half = x.bfloat16()  # is computed in float32
    assert torch.equal(q(half), q(half.float()).bfloat16())

@given(st.floats(2, 8), st.booleans(), st.integers(0, 10 ** 6))
@example(3.0, True, 0)  # on a candidate the gradient looks upwards
@example(8.0, True, 0)  # on the last one down
def test_interpolation_and_all_its_gradients(beta, signed, seed):
    bits, generator = (2, 3, 5, 8), torch.Generator().manual_seed(seed)
    steps = torch.rand(4, generator=generator, dtype=torch.float64) + 0.05
    x = (torch.randn(60, generator=generator, dtype=torch.float64) * 3).requires_grad_()
    q, g = quantizer(bits, signed, steps), torch.randn(60, generator=generator, dtype=torch.float64)
    q.beta.data.fill_(beta)
    out = q(x)
    out.backward(g)
    lo = max(i for i in range(3) if bits[i] <= beta)
    lam = (beta - bits[lo]) / (bits[lo + 1] - bits[lo])
    a, dxa, dsa = surrogate(x.detach(), steps[lo].item(), bits[lo], signed)
    b, dxb, dsb = surrogate(x.detach(), steps[lo + 1].item(), bits[lo + 1], signed)
    torch.testing.assert_close(out, (1 - lam) * a + lam * b)
    torch.testing.assert_close(x.grad, g * ((1 - lam) * dxa + lam * dxb))
    expected = torch.zeros(4, dtype=torch.float64)
    expected[lo], expected[lo + 1] = (1 - lam) * (g * dsa).sum(), lam * (g * dsb).sum()
    torch.testing.assert_close(q.steps.grad, expected)
    torch.testing.assert_close(q.beta.grad, (g * (b - a)).sum() / (bits[lo + 1] - bits[lo]))

@pytest.mark.parametrize("beta,alone,lo,hi", [
    (-9, 2, 2, 4), (2, 2, 2, 4), (4, 4, 4, 8), (8, 8, 4, 8), (99, 8, 4, 8)])
def test_on_a_candidate_and_beyond_the_range_that_one_speaks_and_the_gradient_goes_on(beta, alone, lo, hi):
    """A perturbation may carry β anywhere, and a step to zero or below: no NaN, and the way back is known."""
    q, x = quantizer((8, 2, 4), False, torch.tensor([0.9, 0.3, 0.05]), torch.float32), torch.randn(100)
    q.beta.data.fill_(beta)
    out = q(x)
    assert q.bits == (2, 4, 8) and torch.equal(out, q.select(alone)(x))
    torch.testing.assert_close(out, rounded(x, q.select(alone), alone, False))
    out.sum().backward()
    torch.testing.assert_close(q.beta.grad, (q.select(hi)(x).sum() - q.select(lo)(x).sum()) / (hi - lo))
    for step in (0.0, -0.1):
        q, x = quantizer((3, 4), True, step, torch.float32), torch.randn(20, requires_grad=True)
        q(x).backward(x.detach().sign())
        assert q.steps.grad.sum() > 0
        assert all(t.isfinite().all() for t in (q(x), x.grad, q.steps.grad, q.beta.grad))

SAMPLES = {
    "normal": lambda: [torch.randn(4000)],
    "after a ReLU": lambda: [torch.randn(4000).relu()],
    "an outlier": lambda: [torch.cat([torch.randn(4000), torch.tensor([60.0])])],
    "signed batch first": lambda: [torch.randn(3000) * 10, torch.rand(3000)],
    "more than is kept": lambda: [torch.cat([torch.rand(70_000) * 1e-3, torch.rand(70_000)])]}

@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", SAMPLES)
def test_calibration_finds_sign_and_mse_optimal_step_of_all_that_it_was_shown(name, bits):
    batches, q, fixed = SAMPLES[name](), Quantizer(bits), Quantizer(bits, True)
    seen = torch.cat(batches)
    for _ in range(2):  # the second time as if it were the first
        asga.calibrate(nn.Sequential(q, fixed), batches)
    n, p = levels(bits, bool((seen < 0).any()))
    assert q.grid[1:, 0].tolist() == [n, p]  # unsigned where nothing was negative
    assert fixed.grid[1:, 0].tolist() == list(levels(bits, True))  # a sign that was given stays
    steps = torch.cat([q.steps.detach(), torch.linspace(1e-4, 1, 2000) * seen.abs().max() / p])
    errors = torch.stack([((seen / s).round().clamp(n, p) * s - seen).square().sum() for s in steps])
    assert errors[0] <= 1.05 * errors[1:].min() + 1e-6
    q.calibrate(torch.zeros(10))  # nothing to fit: 1 is the largest level
    assert q.steps.item() == pytest.approx(1 / (2 ** bits - 1))

# ------------------------------------------------------------------------------------------------- Supernet

def standardized(weight):
    weight = weight - weight.mean((1, 2, 3), keepdim=True)
    return weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5)

class SamePadConv(nn.Conv2d):
    """Pads by hand, standardizes its weights and names its arguments, as networks in the wild do."""

    def forward(self, x):
        return F.conv2d(input=F.pad(x, (0, 1, 0, 1)), weight=standardized(self.weight), bias=self.bias,
                        stride=self.stride)

class Handmade(nn.Module):
    def __init__(self, num_classes=7):
        super().__init__()
        self.head = nn.Linear(24, num_classes)  # registered first, called last
        self.stem = SamePadConv(3, 12, 3, stride=2)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=2, dilation=2, groups=12, bias=False)
        self.grouped = nn.Conv2d(12, 24, (3, 1), groups=3, padding_mode="reflect", padding=(1, 0))
        self.bn = nn.BatchNorm2d(12)
        self.again = nn.Conv2d(24, 24, 1)  # called twice
        self.unused = nn.Linear(5, 5)
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        x = F.relu(self.bn(self.depthwise(self.stem(x))))
        x = self.again(F.relu(self.again(self.grouped(x))))
        return self.head(self.drop(x.mean((2, 3))))

def shared_layers():
    """One convolution in two blocks."""
    conv = nn.Conv2d(3, 3, 3, padding=1)
    blocks = [nn.Sequential(conv, nn.BatchNorm2d(3), nn.ReLU()) for _ in range(2)]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(108, 5))

NETWORKS = {
    "resnet20": (asga.ResNet20, (4, 3, 32, 32)), "handmade": (Handmade, (4, 3, 24, 24)),
    "shared": (shared_layers, (4, 3, 6, 6)),  # in eval mode torch would go past the layers of a transformer:
    "transformer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (2, 5, 8))}
if torchvision:
    NETWORKS["mobilenet_v2"] = lambda: asga.build("mobilenet_v2", 10), (4, 3, 64, 64)

def bits_of(net):
    found = asga.quantized_layers(net)
    return {name: (layer.weight_quantizer.bits, layer.input_quantizer.bits) for name, layer in found.items()}

@on_devices
@pytest.mark.parametrize("name", NETWORKS)
def test_with_quantizers_off_the_network_is_the_original_bit_for_bit(name, device):
    make, shape = NETWORKS[name]
    model, x = make().to(device), torch.randn(shape, device=device)
    before = snapshot(model)
    net = quantize(model, (2, 4, 8), x)
    assert same(model.state_dict(), before) and not asga.quantized_layers(model)  # the argument stays
    assert same({key: net.state_dict()[key] for key in before}, before)
    twin = copy.deepcopy(net).eval()
    assert not torch.equal(net.eval()(x), model.eval()(x)) and torch.equal(net(x), twin(x))  # they are on
    for q in asga.quantizers_of(net):
        q.enabled = False
    for train in (False, True):
        outputs = []
        for each in (model, net):
            torch.manual_seed(1)  # dropout
            outputs.append(each.train(train)(x))
            outputs[-1].square().sum().backward()
        assert torch.equal(*outputs)
    for key, p in model.named_parameters():
        assert p.grad is None or torch.equal(p.grad, net.get_parameter(key).grad)
    assert same({key: net.state_dict()[key] for key in before}, model.state_dict())
    assert not torch.equal(twin(x), model.eval()(x))  # a copy has its own quantizers

def test_what_is_quantized_is_what_the_convolution_multiplies():
    conv, x = SamePadConv(3, 8, 3), torch.randn(2, 3, 9, 9)
    net = quantize(nn.Sequential(conv), 3, x, keep=None)
    weight = rounded(standardized(conv.weight), net[0].weight_quantizer, 3)
    padded = rounded(F.pad(x, (0, 1, 0, 1)), net[0].input_quantizer, 3)
    torch.testing.assert_close(net(x), F.conv2d(padded, weight, conv.bias))

class Adapted(nn.Linear):
    """Adds a product with a vector."""

    def forward(self, x):
        return super().forward(x) + F.linear(x, self.weight[:1].detach())

def test_products_with_weights_of_another_shape_stay_in_full_precision():
    layer, x = Adapted(6, 4), torch.randn(5, 6)
    net = quantize(nn.Sequential(layer), 3, x, keep=None)
    weight = rounded(layer.weight, net[0].weight_quantizer, 3)
    expected = F.linear(rounded(x, net[0].input_quantizer, 3), weight, layer.bias)
    torch.testing.assert_close(net(x), expected + F.linear(x, layer.weight[:1]))

def test_which_layers_get_which_bits_signs_and_steps():
    model, x = Handmade(), torch.randn(4, 3, 24, 24)
    model.head.weight.data.abs_()  # weights are signed, whatever they are
    net = quantize(model, (2, 4), x)
    edge, inner = ((8,), (8,)), ((2, 4), (2, 4))  # no pass multiplies with "unused": in full precision
    assert bits_of(net) == {"head": edge, "stem": edge, "depthwise": inner, "grouped": inner, "again": inner}
    assert bits_of(quantize(model, {"w": (2, 3), "a": 5}, x, keep=None))["head"] == ((2, 3), (5,))
    found = bits_of(quantize(model, 3, x, keep={"again": 6}))
    assert found["again"] == ((6,), (6,)) and found["stem"] == ((3,), (3,))
    signed = [bool((layer.input_quantizer.grid[1] < 0).any()) for layer in (net.stem, net.grouped, net.head)]
    assert signed == [True, False, True] and (net.head.weight_quantizer.grid[1] < 0).all()
    net.grouped.weight_quantizer.steps.data.copy_(torch.tensor([0.5, 0.125]))
    layers = {name: (8, 8) if name in ("stem", "head") else (4, 2) for name in bits_of(net)}
    fixed = quantize(net, Policy(layers), x)  # a supernet keeps the steps that it learned
    assert bits_of(fixed) == {name: ((w,), (a,)) for name, (w, a) in layers.items()}
    assert fixed.grouped.weight_quantizer.steps.item() == 0.125

def test_eval_changes_nothing_and_modes_survive_also_a_batch_that_fails():
    x = torch.randn(2, 3, 24, 24)
    net = quantize(Handmade(), (2, 4, 8), x)
    before, out = snapshot(net), net.eval()(x)
    net.train()
    net.bn.eval()
    asga.trace(net, x)
    with asga.evaluating(net):
        assert torch.equal(net(x), out) and not net(x).requires_grad
    with pytest.raises(RuntimeError):
        asga.trace(net, torch.randn(2, 5, 24, 24))
    assert net.training and net.drop.training and not net.bn.training
    assert torch.equal(net.eval()(x), out) and same(before, net.state_dict())

@pytest.mark.parametrize("step", [-1.0, 0.0, 1e-9, 1e9])
def test_no_update_carries_a_step_across_zero(step):
    net = quantize(Handmade(), (2, 4), torch.randn(4, 3, 24, 24))
    expected = snapshot(net)
    with asga.step_guard(net), torch.no_grad():
        net.again.weight_quantizer.steps.fill_(step)
        net.again.input_quantizer.steps.mul_(1.9)
    expected["again.weight_quantizer.steps"] *= 2.0 if step > 1 else 0.5
    expected["again.input_quantizer.steps"] *= 1.9
    assert same(net.state_dict(), expected)

QUANTIZE_REFUSES = [
    *((Handmade, bits, {}, "whole numbers from 2 to 16") for bits in (1, 17, 2.5, True, (2, 2), "4")),
    (Handmade, (), {}, "different whole numbers"), (lambda: nn.BatchNorm2d(3), 4, {}, "nothing to quantize"),
    (Handmade, {"w": 4, "a": 99}, {}, "bitwidths .99.: give"), (Handmade, 4, {"keep": 99}, "keep: bitwidths"),
    (Handmade, 4, {"keep": {"conv9": 8}}, "no layer 'conv9'"),
    (lambda: quantize(Handmade(), 4, torch.randn(2, 3, 24, 24)), 3, {}, "quantized already"),
    (Handmade, Policy({"stem": (4, 4)}), {}, "another network"),
    (asga.ResNet20, Policy({"stem": (4, 4)}), {}, "another network")]

@pytest.mark.parametrize("make,bits,more,words", QUANTIZE_REFUSES)
def test_quantize_refuses_what_does_not_fit_in_one_line(make, bits, more, words):
    with pytest.raises(AsgaError, match=words) as refusal:
        quantize(make(), bits, torch.randn(2, 3, 24, 24), **more)
    assert "\n" not in str(refusal.value)

# ------------------------------------------------------------------------------------------ Cost and budget

@pytest.mark.parametrize("name", NETWORKS)
def test_macs_are_those_of_torchs_flop_counter_in_call_order(name):
    make, shape = NETWORKS[name]
    model, x = make(), torch.randn(shape)
    found = asga.trace(model, x)
    with FlopCounterMode(display=False) as counter:
        model(x)
    paths, expected = dict(model.named_modules(remove_duplicate=False)), []
    for path, operations in counter.get_flop_counts().items():
        if isinstance(paths.get(path.partition(".")[2]), (nn.Conv2d, nn.Linear)):
            expected.append(sum(operations.values()) // (2 * len(x)))
    assert [layer.macs for layer in found.values()] == expected
    assert all(layer.numel == model.get_submodule(name).weight.numel() for name, layer in found.items())
    if name == "handmade":
        assert found["stem"] == (12 * 12 * 12 * 27, 324)  # (24 + 1 − 3) / 2 + 1 pixels in each direction

SIZES = {"a": (100, 10), "b": (1000, 200), "c": (350, 4000), "d": (70, 30)}
LAYERS = {name: LayerCost(*size) for name, size in SIZES.items()}

def make_budget(spec, layers=LAYERS, fixed=("a",)):
    """Of 2 to 8 bits; fixed layers have 8."""
    return asga.Budget(spec, layers, dict.fromkeys(fixed, 8), (2, 8), (2, 8))

def cost(bits, layers=LAYERS):
    """BOPs and weight bits of bits [2, L]."""
    rows = list(zip(layers.values(), *bits.tolist()))
    return [sum(c.macs * w * a for c, w, a in rows), sum(c.numel * w for c, w, a in rows)]

def share(budget, bits, layers=LAYERS):
    """Of the budget, that bits spend."""
    return max(spent / limit for spent, limit in zip(cost(bits, layers), budget.limits.tolist()))

THREE = 100 * 64 + 1420 * 9  # 3/3, the fixed layer at its 8/8
NO = math.inf
UNITS = {"3bit": (THREE, NO), "2.4 bits": (100 * 64 + 1420 * 2.4 ** 2, NO), "8bit": (64 * 1520, NO),
         "0.05x": (0.05 * 1024 * 1520, NO), ".05x": (0.05 * 1024 * 1520, NO), "0.02M": (2e4, NO),
         "20 kBOPs": (2e4, NO), "2KB": (NO, 16_000), "1700B": (NO, 13_600), "4.5MB": (NO, 36e6),
         "3bit,20K": (THREE, NO), "3bit, 2KB": (THREE, 16_000), "2KB,3bit": (THREE, 16_000)}
NONSENSE = "", "3", "3 furlongs", "-3bit", "nanbit", "bit", "3bit;2KB", "4.5Mb"
BAD_BUDGETS = {**dict.fromkeys(NONSENSE, "not understood"),
               **dict.fromkeys(("0bit", "1bit", "1K", "0.001x"), "12.08K to 97.28K BOPs"),
               **dict.fromkeys(("1KB", "3bit,1KB"), "8.54K to 33.92K bits")}

@pytest.mark.parametrize("spec", UNITS)
def test_budget_units(spec):
    budget, bits = make_budget(spec), torch.tensor([[8.0, 2, 3, 4], [8, 5, 6, 7]])
    assert budget.limits.tolist() == pytest.approx(UNITS[spec], rel=1e-12)
    assert budget.cost(bits).tolist() == cost(bits)

@pytest.mark.parametrize("spec", BAD_BUDGETS)
def test_budgets_that_make_no_sense_or_cannot_be_met_are_refused_in_one_line(spec):
    with pytest.raises(AsgaError, match=BAD_BUDGETS[spec]) as refusal:
        make_budget(spec)
    assert "\n" not in str(refusal.value)

@given(st.floats(2.01, 7.9), st.sampled_from(["{}bit", "{}bit,1.7KB", "1.7KB"]), st.integers(0, 10 ** 6))
def test_projection_goes_along_the_gradient_of_the_cost_onto_the_budget_both_ways(b, spec, seed):
    budget = make_budget(spec.format(b))
    bits = torch.rand(2, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 10
    out = budget.project(bits)
    assert share(budget, out) == pytest.approx(1, abs=1e-6)
    assert (out >= budget.lo).all() and (out <= budget.hi).all()
    assert torch.equal(budget.project(out), out)  # leaves alone what meets it
    start = bits.clamp(budget.lo, budget.hi)
    macs, numel = torch.tensor(list(LAYERS.values()), dtype=torch.float64).t()
    slope = torch.zeros(2, 4, dtype=torch.float64)  # ∇ log C, of both bounds
    if "bit" in spec:
        slope += macs * start.flip(0) / cost(start)[0]
    if "KB" in spec:
        slope[0] += numel / cost(start)[1]
    left, right = -1e6, 1e6  # bisection
    for _ in range(100):
        middle = (left + right) / 2
        dear = share(budget, (start - middle * slope).clamp(budget.lo, budget.hi)) > 1
        left, right = (middle, right) if dear else (left, middle)
    torch.testing.assert_close(out, (start - right * slope).clamp(budget.lo, budget.hi), rtol=0, atol=2e-5)

@pytest.mark.parametrize("spec,uniform", [
    ("2bit", 2), ("2.4bit", 2.4), ("5.5bit", 5.5), ("3bit,2KB", None), ("2KB", None)])
def test_the_start_is_uniform_and_spends_all(spec, uniform):
    budget = make_budget(spec)
    start = budget.uniform()
    assert share(budget, start) == pytest.approx(1, rel=1e-6) and torch.equal(budget.project(start), start)
    inner = start[:, 1:] if "bit" in spec else start[:1, 1:]
    torch.testing.assert_close(inner, torch.full_like(inner, uniform or start[0, 1].item()))
    if spec == "2KB":  # activations cost nothing: they keep their most bits
        assert (start[1] == 8).all() and (budget.project(torch.full((2, 4), 3.0))[1] == 8).all()
    rich = make_budget("900G")  # more than there is to spend
    for bits in (rich.uniform(), rich.project(start)):
        torch.testing.assert_close(bits, rich.hi)

def brute_force(values, costs, limits, fill):
    """What the best choice has, by trying all: (0, its value, 0), or (1, −share, value) where none fills."""
    best = None
    for picks in itertools.product(*(range(len(v)) for v in values)):
        total = [sum(int(c[i][k]) for c, i in zip(costs, picks)) for k in range(len(limits))]
        if any(t > limit for t, limit in zip(total, limits)):
            continue
        spent = max(t / limit for t, limit in zip(total, limits))
        value = sum(float(v[i]) for v, i in zip(values, picks))
        key = (0, value, 0) if spent >= fill else (1, -spent, value)
        best = key if best is None or key < best else best
    return best

@given(st.data(), st.integers(1, 4), st.integers(1, 2), st.sampled_from([0.5, 0.9, 0.99, 1.0]))
@settings(max_examples=200)
def test_knapsack_equals_brute_force(data, layers, kinds, fill):
    sizes = [data.draw(st.integers(1, 5)) for _ in range(layers)]
    number = st.integers(0, data.draw(st.sampled_from([3, 40, 10 ** 6])))
    costs = [torch.tensor([[data.draw(number) for _ in range(kinds)] for _ in range(n)]) for n in sizes]
    penalty = st.integers(0, 50)
    values = [torch.tensor([data.draw(penalty) / 4 for _ in range(n)], dtype=torch.float64) for n in sizes]
    most = [sum(int(c[:, k].max()) for c in costs) for k in range(kinds)]
    limits = [data.draw(st.integers(1, max(2, top))) for top in most]
    expected = brute_force(values, costs, limits, fill)
    if expected is None:
        with pytest.raises(AsgaError, match="cannot be met"):
            asga.knapsack(values, costs, torch.tensor(limits), fill)
        return
    picks = asga.knapsack(values, costs, torch.tensor(limits), fill)
    chosen = [[t[i:i + 1] for t, i in zip(kind, picks)] for kind in (values, costs)]
    assert brute_force(*chosen, limits, fill) == pytest.approx(expected)

def best_of_all(values, costs, limits, fill):
    """The least value of all choices within the limits that fill: every sum at once."""
    total, cost = torch.zeros(1).double(), torch.zeros(1, len(limits)).double()
    for v, c in zip(values, costs):
        total, cost = (total[:, None] + v).flatten(), (cost[:, None] + c).flatten(0, 1)
    spent = (cost / limits).amax(1)
    return total[(spent <= 1) & (spent >= fill)].min().item()

@pytest.mark.parametrize("seed,kinds,fill", [(1, 1, 0.999983), (2, 1, 0.999983), (3, 2, 0.99), (5, 2, 0.99)])
def test_knapsack_whose_fill_few_of_two_million_choices_meet_or_that_dislikes_what_is_dear(seed, kinds, fill):
    """The first, narrow sweep finds none of them or not the best: that is no proof."""
    g = torch.Generator().manual_seed(seed)
    costs = [torch.randint(1, 10 ** 6, (8, kinds), generator=g) for _ in range(7)]
    values = [torch.rand(8, generator=g).double() + (kinds - 1) * c.double().sum(1) / 5e5 for c in costs]
    limits = (1.1 ** (kinds - 1) * sum(c.double().mean(0) for c in costs)).long()
    picks = asga.knapsack(values, costs, limits, fill)
    expected = best_of_all(values, costs, limits, fill)
    assert sum(float(v[i]) for v, i in zip(values, picks)) == pytest.approx(expected, abs=1e-9)

def test_knapsack_of_many_layers_equals_dynamic_programming():
    g = torch.Generator().manual_seed(6)  # of whose choices the first sweep finds a good one alone
    costs = [torch.randint(1, 1000, (8, 1), generator=g) for _ in range(16)]
    values = [torch.rand(8, generator=g).double() for _ in costs]
    limit = int(1.3 * sum(c.double().mean() for c in costs))
    least = torch.full((limit + 1,), math.inf).double()  # of all choices at each cost
    least[0] = 0.0
    for v, c in zip(values, costs):
        moved = [F.pad(least[:-k] + value, (k, 0), value=math.inf) for value, k in zip(v, c[:, 0].tolist())]
        least = torch.stack(moved).amin(0)
    picks = asga.knapsack(values, costs, torch.tensor([limit]), 0.9)
    found = sum(float(v[i]) for v, i in zip(values, picks))
    assert found == pytest.approx(least[math.ceil(0.9 * limit):].min().item(), abs=1e-9)

# ------------------------------------------------------------------------------------------- ASGA optimizer

def closure_of(optimizer, loss):
    def closure():
        optimizer.zero_grad(set_to_none=False)  # in place: a gradient that is kept must not share this memory
        value = loss()
        value.backward()
        return value
    return closure

def small_net(device="cpu"):
    """A network, and a function that gives its loss on fixed data."""
    torch.manual_seed(0)
    features = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5)
    net = nn.Sequential(*features, nn.Flatten(), nn.Linear(8 * 36, 5)).to(device)
    x, y = torch.randn(16, 3, 8, 8).to(device), torch.randint(5, (16,)).to(device)
    return net, lambda: F.cross_entropy(net(x), y)

def make(params, base=torch.optim.SGD, **more):
    return ASGA(params, base, **{"lr": 0.1, "rho_min": 0.1, "rho_max": 0.1, "alpha": 0.0, **more})

BASES = {"sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}),
         "adamw": (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1})}
SAM = {"rho_min": 0.0, "rho_max": 0.25, "adaptive": False, "project": False, "direction": "perturbed"}

def sam_step(optimizer, closure):
    """Sharpness-aware minimization as Foret et al. write it down, with ρ = 0.25."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    closure()
    norm = torch.stack([p.grad.norm() for p in params]).norm()
    before = [p.detach().clone() for p in params]
    for p in params:
        p.data.add_(p.grad * (0.25 / norm))
    closure()
    for p, kept in zip(params, before):
        p.data.copy_(kept)
    optimizer.step()

@on_devices
@pytest.mark.parametrize("name", BASES)
def test_switched_off_it_is_the_base_optimizer_and_half_off_sam_bit_for_bit(name, device):
    base, more = BASES[name]

    def trained(train, optimize, step):
        net, loss = small_net(device)
        optimizer = optimize(net.train(train).parameters())
        torch.manual_seed(3)
        for _ in range(5):
            step(optimizer, closure_of(optimizer, loss))
        return net.state_dict()

    def alike(one, other):
        if device == "cuda":  # whose kernels add in another order now and then
            return all(torch.allclose(one[key], other[key], rtol=1e-3, atol=1e-4) for key in one)
        return same(one, other)

    plain = trained(True, lambda p: base(p, **more), base.step)
    assert alike(plain, trained(True, lambda p: make(p, base, rho_min=0.0, rho_max=0.0, **more), ASGA.step))
    plain = trained(False, lambda p: base(p, **more), sam_step)  # no dropout here
    assert alike(plain, trained(False, lambda p: make(p, base, **SAM, **more), ASGA.step))

@pytest.mark.parametrize("project,adaptive,rho,alpha", [
    (True, True, 0.25, 0.05), (False, False, 0.125, 0.0), (True, False, 4.0, 0.01), (True, True, 0.5, 0.5),
    (True, True, 0.0, 0.05)])
def test_two_steps_on_a_quadratic_equal_the_closed_form(project, adaptive, rho, alpha):
    """L = ½ θᵀAθ + bᵀθ in float64, A symmetric positive definite."""
    m, (b, t) = torch.randn(6, 6, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    A, theta, radius, seen = m @ m.T / 6 + 0.1 * torch.eye(6), nn.Parameter(t.clone()), rho, []
    low = min(0.01, rho)
    optimizer = make([theta], rho_min=low, rho_max=rho, alpha=alpha, project=project, adaptive=adaptive)

    def L(v):
        seen.append(v.detach().clone())
        return 0.5 * v @ A @ v + b @ v

    for _ in range(2):
        optimizer.step(closure_of(optimizer, lambda: L(theta)))
        ascended = seen[-1]
        g = A @ t + b
        ascent = t + (radius / g.norm() - alpha) * g
        gp = A @ ascent + b
        h, dot = (L(ascent) - L(t)).item(), gp @ g
        assert {name: value.item() for name, value in optimizer.last.items()} == pytest.approx({
            "loss": L(t).item(), "perturbed_loss": L(ascent).item(), "gap": h, "rho": radius,
            "grad_norm": g.norm().item(), "cos": (dot / gp.norm() / g.norm()).item(),
            "projected": project and dot.item() < 0})
        if project and dot < 0:
            gp = gp - dot / (g @ g) * g
        t = t - 0.1 * (g + gp) / 2
        torch.testing.assert_close(ascended, ascent, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(theta.detach(), t, rtol=1e-12, atol=1e-14)
        expected = min(max(math.log(1 + max(h, 0)), low), rho) if adaptive else rho
        radius = optimizer.rho.item()  # kept in float32
        assert radius == pytest.approx(expected, rel=1e-6)

@on_devices
@pytest.mark.parametrize("fail_in", [1, 2, None])
def test_weights_and_buffers_are_restored_bit_for_bit_also_when_the_closure_raises(fail_in, device):
    net, loss = small_net(device)
    once, seen = small_net(device), []
    optimizer = make(net.parameters(), lr=0.0, rho_max=0.5, alpha=0.01, buffers=net.buffers())

    def failing():
        seen.append(snapshot(net))
        value = loss()  # BatchNorm's statistics move before the failure
        if len(seen) == fail_in:
            raise KeyboardInterrupt
        return value

    with pytest.raises(KeyboardInterrupt) if fail_in else contextlib.nullcontext():
        optimizer.step(closure_of(optimizer, failing))
    assert len(seen) == (fail_in or 2)
    assert fail_in == 1 or not torch.equal(seen[0]["0.weight"], seen[1]["0.weight"])  # it had been perturbed
    once[1]()
    assert same(net.state_dict(), once[0].state_dict())  # statistics moved once
    net.eval()
    optimizer.step(closure_of(optimizer, loss))
    assert same(net.state_dict(), once[0].state_dict())  # and not in eval mode

def test_a_parameter_without_gradient_stays_and_one_without_in_the_second_pass_counts_as_zero_there():
    a, b, never = (nn.Parameter(torch.tensor([value])) for value in (1.0, 3.0, 5.0))
    optimizer, seen = make([a, b, never], lr=0.5, project=False), []

    def loss():
        seen.append(b.item())
        return a.sum() if len(seen) == 2 else a.sum() + 2 * b.sum()

    optimizer.step(closure_of(optimizer, loss))
    assert never.item() == 5.0 and never.grad is None and a.item() == pytest.approx(0.5)
    assert b.item() == pytest.approx(3.0 - 0.5 * (2 + 0) / 2)
    assert seen[1] != 3.0

@pytest.mark.parametrize("scale", [0.0, 1e-44, 1e-30, 1e-25])
def test_zero_and_vanishing_gradients_give_no_nan(scale):
    w = nn.Parameter(torch.ones(3))
    optimizer = make([w], rho_max=2.0, alpha=0.01)
    for _ in range(2):
        optimizer.step(closure_of(optimizer, lambda: -(scale * w.square()).sum()))
    assert torch.allclose(w, torch.ones(3))
    assert all(value.float().isfinite() for value in optimizer.last.values())

@on_devices
def test_both_passes_see_the_same_dropout_draws(device):
    w, masks = nn.Parameter(torch.ones(1000, device=device)), []

    def loss():
        masks.append(F.dropout(w, 0.5))
        return masks[-1].square().sum()

    for optimizer in [make([w])] * 2:
        optimizer.step(closure_of(optimizer, loss))
    equal = [torch.equal(masks[i] != 0, masks[i + 1] != 0) for i in range(3)]
    assert equal == [True, False, True]  # and the draws go on

@pytest.mark.parametrize("more,words", [
    ({"rho_min": 0.2}, "rho_min.*<= rho_max"), ({"rho_max": math.nan}, "rho"), ({"alpha": -1}, "alpha"),
    ({"direction": "meen"}, "direction 'meen': use 'mean' or 'perturbed'")])
def test_optimizer_settings_out_of_the_question_are_refused(more, words):
    with pytest.raises(ValueError, match=words):
        make([nn.Parameter(torch.ones(2))], **more)

def test_the_optimizer_section_stands_alone(tmp_path):
    source = (HERE / "asga.py").read_text()
    section = re.search(r"# -+\n# ASGA optimizer.*?\n(.*?)\n# -{30,}\n", source, re.S)[1]
    script = "import torch\n" + section + """
w = torch.nn.Parameter(torch.tensor([2.0]))
optimizer = ASGA([w], torch.optim.SGD, lr=0.5, rho_min=0.1, rho_max=0.1, alpha=0.0)
def closure():
    w.grad = 2 * w.detach()
    return (w ** 2).sum()
optimizer.step(closure)
print(round(w.item(), 6))
"""
    (tmp_path / "alone.py").write_text(script)
    out = subprocess.run([sys.executable, "alone.py"], cwd=tmp_path, capture_output=True, text=True)
    assert out.stdout.strip() == str(round(2 - 0.5 * (4 + 4.2) / 2, 6)), out.stderr

# ------------------------------------------------------------------------------------- Alignment and radius

@given(st.integers(0, 10 ** 6), st.floats(0.5, 50))
def test_projection_removes_the_conflict_and_nothing_else(seed, rho):
    """On indefinite quadratics with a large radius g_p often opposes g; SGD, lr = 1, shows the direction."""
    gen = torch.Generator().manual_seed(seed)
    m = torch.randn(5, 5, generator=gen, dtype=torch.float64)
    A, start = (m + m.T) / 2, torch.randn(5, generator=gen, dtype=torch.float64)
    g = A @ start
    assume(g.norm() > 1e-3)
    theta = nn.Parameter(start.clone())
    optimizer = make([theta], lr=1.0, rho_min=rho, rho_max=rho, direction="perturbed")
    optimizer.step(closure_of(optimizer, lambda: 0.5 * theta @ A @ theta))
    taken = start - theta.detach()  # g_p after the projection
    gp = A @ (start + optimizer.rho.double() * g / g.norm())
    small = 1e-9 * (gp.norm().item() + 1)
    conflict = (gp @ g).item() < 0
    assert taken @ g >= -small * g.norm() and taken.norm() <= gp.norm() + small
    expected = gp - (gp @ g) / (g @ g) * g if conflict else gp
    torch.testing.assert_close(taken, expected, rtol=0, atol=small)
    assert bool(optimizer.last["projected"]) == conflict

@given(st.floats(), st.floats(), st.floats(0, 1), st.floats(0, 1))
@example(math.nan, 1.0, 0.1, 0.2)
def test_radius_stays_within_its_bounds_for_every_float_and_is_monotone(gap, other, one, two):
    lo, hi = sorted((one, two))
    gaps = torch.tensor([gap, other], dtype=torch.float64)
    rho, another = (asga.adaptive_radius(h, lo, hi).item() for h in gaps)
    assert lo <= rho <= hi and (rho <= another or not gap <= other)
    if math.isnan(gap):
        assert rho == lo  # says nothing about sharpness: the cautious one
    else:
        exact = math.log1p(max(gap, 0)) if gap < math.inf else math.inf
        assert rho == pytest.approx(min(max(exact, lo), hi), rel=1e-12, abs=1e-300)

# ----------------------------------------------------------------------------------------- Search (library)

def toy_batches(n=6, device="cpu"):
    """Classes are told by their colour."""
    g = torch.Generator().manual_seed(0)
    classes = torch.randint(7, (n, 16), generator=g)
    images = 4 * torch.randn(7, 3, 1, 1, generator=g)[classes] + torch.randn(n, 16, 3, 24, 24, generator=g)
    return list(zip(images.to(device), classes.to(device)))

def started(model=None, spec="3bit", x=None, capture=True, **chosen):
    """A Search that is ready for its first step."""
    model, chosen = model or Handmade(), asga.SearchSettings(**chosen)
    x = toy_batches(device=next(model.parameters()).device)[0][0] if x is None else x
    run = asga.Search(model, asga.plan(model, x[:1], spec, chosen), chosen, [x], capture=capture)
    for group in run.optimizer.param_groups:
        group["fused"] = True  # the SGD that CUDA has; whole commands run the other one
    return run

@on_devices
@pytest.mark.parametrize("more", [{"method": method} for method in asga.METHODS] + [
    {"candidates_w": (4,), "candidates_a": (2, 3, 8)}, {"precision": "bf16"}])
def test_search_lowers_the_loss_on_the_budget_at_every_step_and_keeps_the_model(more, device):
    model, records = Handmade().to(device), []
    before, layers = snapshot(model), asga.trace(model, torch.randn(1, 3, 24, 24, device=device))
    limit = make_budget("3.3bit", layers, ("stem", "head")).limits[0].item()
    policy = search(model, toy_batches(), F.cross_entropy, "3.3bit", steps=24, lr=0.3, lr_beta=30.0,
                    on_step=lambda *row: records.append(row), **more)
    assert [step for step, _ in records] == list(range(0 if "uniform" in more.values() else 24))
    for _, record in records:
        assert record["expected_cost"].item() == pytest.approx(limit, rel=1e-6)
        assert not any(t.requires_grad for t in record.values())
    losses = [record["loss"].item() for _, record in records]
    assert not losses or sum(losses[-6:]) < 0.97 * sum(losses[:6])
    assert 0.97 * limit < policy.bops <= limit == policy.info["budget"]["bops"]
    assert policy.sizes == layers and policy.layers["stem"] == policy.layers["head"] == (8, 8)
    assert same(model.state_dict(), before) and model.training

@on_devices
def test_a_search_goes_on_from_its_state_bit_for_bit(device):
    def run(steps, state=None):
        torch.manual_seed(0)
        one = started(Handmade().to(device), steps=6, rho_max=0.5)
        if state:
            one.write(torch.full((2, 5), 4.0))
            one.net.load_state_dict(state[0])
            one.optimizer.load_state_dict(state[1])
        for done in steps:
            torch.manual_seed(done)
            record = one.step(*toy_batches(device=device)[done], done)
        return copy.deepcopy((one.net.state_dict(), one.optimizer.state_dict(), record, one.policy().layers))

    whole, rest = run(range(6)), run(range(3, 6), run(range(3)))
    assert same(whole[0], rest[0]) and same(whole[2], rest[2]) and whole[3] == rest[3]

METHODS = {"asga": (0.01, 0.2, 0.03, True, True, "mean"), "sagm": (0.01, 0.2, 0.03, False, False, "mean"),
           "sam": (0.01, 0.2, 0.0, False, False, "perturbed"), "joint": (0.0, 0.0, 0.0, True, True, "mean")}

@pytest.mark.parametrize("method", METHODS)
def test_each_method_is_the_optimizer_that_its_name_says(method, capsys):
    rates = {"rho_min": 0.01, "rho_max": 0.2, "alpha": 0.03, "lr": 0.0, "lr_beta": 0.0}
    run = started(Handmade().eval(), method=method, **rates)
    names = "rho_min", "rho_max", "alpha", "adaptive", "project", "direction"
    assert tuple(getattr(run.optimizer, name) for name in names) == METHODS[method]
    assert tuple(getattr(run.settings, name) for name in names) == METHODS[method]  # recorded is what runs
    assert ("alpha 0.03 is not used" in capsys.readouterr().err) == (method in ("sam", "joint"))
    calls, norms = [], []
    run.net.stem.register_forward_hook(lambda layer, *_: calls.append(layer.training))
    for done in range(2):
        torch.manual_seed(1)  # dropout
        record = run.step(*toy_batches()[0], done)
        norms.append(record["grad_norm"].item())
    assert calls == [True] * (2 if method == "joint" else 4)
    assert run.net.bn.num_batches_tracked == 2  # statistics move once a step
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)  # gradients are cleared

def test_rates_momentum_and_decay_of_each_parameter_guarded_steps_and_the_image_step_that_stays():
    run = started(lr=1e4, lr_beta=8.0, momentum=0.7, weight_decay=0.01, steps=4, candidates_w=(2, 8))
    names, before = {p: name for name, p in run.net.named_parameters()}, snapshot(run.net)
    record, seen = run.step(*toy_batches()[0], 2), set()  # half of the way: half the rate
    for group in run.optimizer.param_groups:
        assert group["momentum"] == 0.7 and not group["nesterov"]
        for name in map(names.get, group["params"]):
            seen.add(name)
            assert group["lr"] == pytest.approx(4.0 if name.endswith(".beta") else 5e3)
            assert (group["weight_decay"] == 0.01) == (name.endswith("weight") and name != "bn.weight"), name
    still = "stem.input_quantizer.steps"
    assert {name for name in names.values() if run.net.get_parameter(name).requires_grad} == seen
    assert still not in seen and torch.equal(before[still], run.net.get_parameter(still))
    betas = [run.net.again.weight_quantizer.beta.item(), run.net.again.input_quantizer.beta.item()]
    steps = [(p, name) for p, name in names.items() if name.endswith("steps")]
    ratio = torch.cat([p.detach() / before[name] for p, name in steps])
    assert ratio.min() == 0.5 and ratio.max() <= 2  # guarded: without, this rate carries steps across zero
    column = list(run.budget.layers).index("again")
    assert record["bits"][:, column].tolist() == pytest.approx(betas, abs=6e-4)

def test_whole_bits_are_the_best_of_all_policies_that_spend_the_budget():
    candidates, x = (2, 3, 4, 6, 8), torch.randn(4, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 3))
    run = started(model, "3.7bit", x, keep=None, candidates_w=candidates, candidates_a=candidates)
    pairs, macs = torch.cartesian_prod(*[torch.tensor(candidates)] * 2), [36 * 216, 16 * 576, 4 * 288]
    for seed in range(6):
        wish = 2 + 4 * torch.rand(2, 3, generator=torch.Generator().manual_seed(seed))
        run.write(wish)
        values = [(pairs - wish[:, k].double()).square().sum(1) for k in range(3)]
        costs = [count * pairs.prod(1, keepdim=True) for count in macs]
        expected = best_of_all(values, costs, torch.tensor([3.7 ** 2 * sum(macs)]), 0.99)
        found = torch.tensor(list(run.policy().layers.values()))
        assert (found - wish.t().double()).square().sum().item() == pytest.approx(expected)

def test_macs_are_counted_at_the_resolution_that_is_deployed_and_inputs_may_be_several():
    class Two(Handmade):
        def forward(self, x, factor):
            return super().forward(x * factor), None  # the first output counts

    batches = [((x, torch.ones(16, 1, 1, 1)), y) for x, y in toy_batches()]
    deployed = torch.zeros(1, 3, 48, 48), torch.ones(1)
    policy = search(Two(), batches, F.cross_entropy, "3bit", steps=1, example_inputs=deployed)
    assert policy.sizes == asga.trace(Handmade(), deployed[0])

SEARCH_REFUSES = [
    ({"method": "foo"}, "unknown method 'foo': use one of"), ({"precision": "fp8"}, "unknown precision"),
    ({"direction": "foo"}, "unknown direction"), ({"candidates_a": 0}, "bitwidths .0."),
    ({"rho_min": 0.2}, "rho_min 0.2 is above"),
    ({"budget": "1bit"}, "to .* BOPs"), ({"keep": {"conv9": 8}}, "conv9"), ({"batches": []}, "again and"),
    ({"batches": iter(toy_batches())}, "again and"), ({"model": nn.Flatten()}, "no Conv2d"),
    ({"loss_fn": lambda out, y: F.cross_entropy(out, y) * math.nan}, "no longer numbers")]

@pytest.mark.parametrize("change,words", SEARCH_REFUSES)
def test_searches_that_make_no_sense_are_refused_in_one_line(change, words):
    usual = {"batches": toy_batches(), "loss_fn": F.cross_entropy, "budget": "3bit", "steps": 1}
    with pytest.raises(AsgaError, match=words) as refusal:
        search(**{"model": Handmade(), **usual, **change})
    assert "\n" not in str(refusal.value)

# ------------------------------------------------------------------------------------------- Recorded steps

class Tape(TorchDispatchMode):
    """A CUDA graph for the CPU: operations, as they ran once, run again on the same memory."""
    waits = {torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select,
             torch.ops.aten._unique2, torch.ops.aten.lift_fresh}  # the last: a number goes to the device
    def __init__(self):
        super().__init__()
        self.operations, self.done = [], False
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        masks = [t for t in tree_leaves(args) if torch.is_tensor(t) and t.dtype == torch.bool]
        by_mask = func.overloadpacket is torch.ops.aten.index and masks
        if func.overloadpacket in self.waits or by_mask or kwargs.get("generator") is not None:
            raise RuntimeError(f"{func} cannot be recorded")
        out = func(*args, **kwargs)
        memory = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs, out))
        self.operations.append((func, *memory))
        return out

    def replay(self):
        """The first time nothing: recorded is what ran."""
        for func, args, kwargs, out in self.operations * self.done:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs))):
                if torch.is_tensor(old) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        self.done = True

class Played(asga.Captured):
    def __init__(self, device, on=True):
        super().__init__(device, on)
        self.on = on

    def warm(self, piece, arguments):
        return piece(*arguments)

    def record(self, piece, arguments):
        with Tape() as tape:
            result = piece(*arguments)
        return tape.replay, result

@on_devices
@pytest.mark.parametrize("name,more", [
    ("handmade", {}), ("handmade", {"method": "joint"}), ("handmade", {"precision": "bf16"}),
    pytest.param("resnet18", {}, marks=needs_torchvision),
    pytest.param("mobilenet_v2", {}, marks=needs_torchvision)])
def test_steps_that_are_replayed_equal_plain_ones(name, more, device, monkeypatch):
    """What a piece keeps as a Python number or in new memory would show; so would a wait for the device."""
    steps = 6 if device == "cpu" else 20
    if device == "cpu":
        monkeypatch.setattr(asga, "Captured", Played)
    model = Handmade() if name == "handmade" else torchvision.models.get_model(name, num_classes=7)
    batches, found = [[t[:6] for t in batch] for batch in toy_batches(steps, device)], []
    batches[4] = [t[:4] for t in batches[4]]  # another size: a plain step
    for capture in (False, True):
        chosen = dict(steps=steps, lr=0.1, lr_beta=8.0, rho_max=0.5, **more)
        run = started(model.to(device), capture=capture, **chosen)
        torch.manual_seed(1)
        records = [run.step(x, y, done) for done, (x, y) in enumerate(batches)]
        found.append((torch.stack([record["loss"] for record in records]), run.net.state_dict(), records[-1]))
    assert len(run.play.recorded) == (3 if "method" in more else 5)
    assert len(set(found[0][0].tolist())) == steps
    if device == "cpu":
        assert same(found[0][1], found[1][1]) and same(found[0][2], found[1][2])
    limit = 1e-4 if "precision" not in more else 0.05
    torch.testing.assert_close(found[0][0], found[1][0], rtol=limit, atol=limit)

@pytest.mark.parametrize("parts", [(Played, asga.Captured), (asga.Captured, Played)])
def test_a_recorded_run_goes_on_plainly_and_the_other_way_round(parts, monkeypatch):
    def run(play, steps, state=None):
        monkeypatch.setattr(asga, "Captured", play)
        torch.manual_seed(0)
        one = started(steps=10, rho_max=0.5)
        if state:
            one.net.load_state_dict(state[0])
            one.optimizer.load_state_dict(state[1])
        for done in steps:
            torch.manual_seed(done)
            one.step(*toy_batches(10)[done], done)
        return copy.deepcopy((one.net.state_dict(), one.optimizer.state_dict()))

    first, second = parts
    whole = run(asga.Captured, range(10))
    assert same(whole[0], run(second, range(5, 10), run(first, range(5)))[0])

def test_a_loss_that_waits_for_the_device_is_not_recorded(monkeypatch, capsys):
    def waiting(logits, y):
        return F.cross_entropy(logits, y) * (1 if logits.sum().item() else 2)
    monkeypatch.setattr(asga, "Captured", Played)
    records = []
    search(Handmade(), toy_batches(), waiting, "3bit", steps=6, on_step=lambda *row: records.append(row))
    assert len(records) == 6 and capsys.readouterr().err.count("steps are not recorded") == 1

# ----------------------------------------------------------------------------------------------- Fast paths

def outcome(net, x, precision="float32", prepared=False):
    """Output, loss and gradients of all parameters of a pass in training."""
    net.zero_grad()
    torch.manual_seed(1)  # dropout
    with asga.prepared(net) if prepared else contextlib.nullcontext():
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
            out = net(x)
        loss = F.cross_entropy(out.float(), torch.arange(len(x), device=x.device) % 7)
        loss.backward()
    return [out.detach(), loss.detach(), *(p.grad for p in net.parameters() if p.grad is not None)]

def supernets(x):
    """Networks of quantizers in the states that a search brings them into."""
    model = Handmade().to(x.device, memory_format=torch.channels_last)
    for bits in ((2, 3, 5, 8), {"w": (2, 4), "a": (2, 3, 4, 8)}, 3):
        yield quantize(model, bits, x)
    net = quantize(model, (2, 3, 5, 8), x)  # as a perturbation leaves it: beyond range, below zero
    for i, q in enumerate(asga.quantizers_of(net)):
        q.beta.data.add_([-3.0, 0.2, 3.7][i % 3] if len(q.bits) > 1 else 0)
        q.steps.data.mul_(1 + 0.3 * torch.randn_like(q.steps))
    net.again.weight_quantizer.steps.data[:2] = -0.01
    yield net

@on_devices
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
def test_fast_paths_change_no_result(precision, compiled, device):
    x = torch.randn(6, 3, 24, 24, device=device).to(memory_format=torch.channels_last)
    for net in supernets(x):
        asga.Fused.on = False
        plain = outcome(net, x, precision)
        asga.Fused.on = compiled
        fast = outcome(net, x, precision, prepared=True)
        assert asga.Fused.on is compiled, "the compiled formula failed and fell back"
        assert all(q.row is None and q(x).stride() == x.stride() for q in asga.quantizers_of(net))
        rounding = 1e-6 if not compiled else 1e-4 if precision == "float32" else 3e-2
        for a, b in zip(plain, fast, strict=True):  # relative to the largest
            assert (a - b).abs().max() <= rounding * a.abs().max() + 1e-7

@needs_compiler
def test_a_quantized_network_compiles_as_a_whole():
    torch._dynamo.reset()
    features, x = (nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)), torch.randn(6, 3, 9, 9)
    model = nn.Sequential(*features, nn.Flatten(), nn.Linear(200, 7))
    for bits in (3, (2, 4, 8)):
        net = quantize(model, bits, x)
        plain = outcome(net, x)
        fast = outcome(torch.compile(net, fullgraph=True), x)
        for a, b in zip(plain, fast, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)

@needs_compiler
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_few_kernels_serve_all_layers(monkeypatch, precision):
    """Each kind of mixture and dtype has its kernel: with many, dynamo would give up, in silence."""
    torch._dynamo.reset()
    monkeypatch.setattr(asga, "fused_forward", asga.Fused(asga.mix_forward))
    monkeypatch.setattr(asga, "fused_backward", asga.Fused(asga.mix_backward))
    asga.Fused.on, limit = True, 4 if precision == "float32" else 6
    x = torch.randn(6, 3, 24, 24)
    with torch._dynamo.config.patch(recompile_limit=limit, fail_on_recompile_limit_hit=True):
        for net in itertools.islice(supernets(x), 2):
            outcome(net, x, precision, prepared=True)
            with torch.no_grad():
                net.eval()(x)
    assert asga.Fused.on

def test_no_compiler_costs_one_line_and_no_result(monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("no compiler")

    q, x = quantizer((2, 4), True, 0.3, torch.float32), torch.randn(50)
    expected = q(x)
    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(asga, "fused_forward", asga.Fused(asga.mix_forward))
    asga.Fused.on = True
    assert torch.equal(q(x), expected) and not asga.Fused.on and torch.equal(q(x), expected)
    assert len(capsys.readouterr().err.splitlines()) == 1

def test_the_perturbation_silences_no_layer():
    """A step moved across zero would put out zeros, and BatchNorm behind it make gradients infinite."""
    blocks = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)) for _ in range(8)]
    ends = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)]
    model, seen = nn.Sequential(nn.Conv2d(3, 8, 3), *blocks, *ends), []
    x, y = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    run = started(model, "4bit", x, rho_min=5.0, rho_max=5.0)
    found = asga.quantizers_of(run.net)
    before = [q.steps.detach().clone() for q in found]
    run.net.register_forward_pre_hook(lambda *_: seen.append([q.steps.clone() for q in found]))
    record = run.step(x, y, 0)
    assert all((s > 0).all() and (s >= b / 2).all() and (s <= b * 2).all() for s, b in zip(seen[1], before))
    assert any(not torch.equal(s, b) for s, b in zip(seen[1], before)) and record["cos"].isfinite()

# --------------------------------------------------------------------------------------------------- policy

class Small(nn.Module):
    """Three layers that a pass calls and one that none does; `head` is registered first and called last."""

    def __init__(self, classes=7, middle=24):
        super().__init__()
        self.head = nn.Linear(middle, classes)
        self.stem = nn.Conv2d(3, 12, 3, stride=2)
        self.mid = nn.Conv2d(12, middle, 3, groups=3)
        self.spare = nn.Linear(5, 5)

    def forward(self, x):
        return self.head(self.mid(F.relu(self.stem(x))).mean((2, 3)))

# of Small at 24 px, counted by hand: multiply-accumulates and weights
SIZES = {"stem": (11 * 11 * 12 * 27, 324), "mid": (9 * 9 * 24 * 36, 864), "head": (168, 168)}
BITS = {"stem": (8, 8), "mid": (3, 4), "head": (2, 5)}

def small_policy():
    """Small, an input of it, a policy for it."""
    model, x = Small(), torch.randn(2, 3, 24, 24)
    info = {"arch": "small", "budget": {"spec": "3bit"}, "candidates": {"w": [2, 3], "a": [4]},
            "proxy": {"data": "d"}, "search": {"seed": 4}, "versions": {"asga": "0.0"}}
    return model, x, Policy(BITS, asga.trace(model, x), info)

def test_policy_file_has_the_keys_and_costs_of_the_design(tmp_path):
    model, x, policy = small_policy()
    policy.save(tmp_path / "p.json")
    data = json.loads((tmp_path / "p.json").read_text())
    keys = "arch budget candidates cost format layers proxy search version versions"
    assert sorted(data) == keys.split()
    assert {key: data[key] for key in policy.info} == policy.info
    assert (data["format"], data["version"]) == ("asga-policy", 1)
    assert list(data["layers"]) == list(SIZES)                                              # in network order
    for name, entry in data["layers"].items():
        assert list(entry) == ["w", "a", "macs", "numel"]
        assert tuple(entry.values()) == BITS[name] + SIZES[name]
    entries = data["layers"].values()
    macs = sum(entry["macs"] for entry in entries)
    assert data["cost"] == {
        "bops": sum(e["macs"] * e["w"] * e["a"] for e in entries),
        "weight_bits": sum(e["numel"] * e["w"] for e in entries),
        "mean_w": pytest.approx(sum(e["macs"] * e["w"] for e in entries) / macs),
        "mean_a": pytest.approx(sum(e["macs"] * e["a"] for e in entries) / macs)}
    again = Policy.load(tmp_path / "p.json")
    assert again.to_json() == policy.to_json() and again.layers == BITS
    again.check(model, x)

def test_policy_of_another_network_is_refused():
    model, x, policy = small_policy()
    for other in (asga.ResNet20(), model):                               # without inputs all layers count
        with pytest.raises(AsgaError, match="another network"):
            policy.check(other)
    with pytest.raises(AsgaError, match="another network.* 'mid'"):
        Policy({"stem": (8, 8), "head": (8, 8)}).check(model, x)
    with pytest.raises(AsgaError, match="another network.* 'mid'"):
        policy.check(Small(middle=30), x)
    policy.check(Small(classes=3), x)                                      # the target's classes are its own
    turned = Policy(dict(reversed(BITS.items())), policy.sizes)            # but only the last layer's outputs
    with pytest.raises(AsgaError, match="'head'"):
        turned.check(Small(classes=3), x)

def edited(change):
    """A policy's file after change(its content)."""
    data = copy.deepcopy(small_policy()[2].to_json())
    change(data)
    return json.dumps(data)

@pytest.mark.parametrize("content,words", [
    ("{", "line 1"),
    ("[1]", "list"),
    (edited(lambda d: d.update(format="onnx")), "onnx"),
    (edited(lambda d: d.update(version=2)), "2"),
    (edited(lambda d: d["layers"]["mid"].update(w=2)), "bops"),
    (edited(lambda d: d["layers"]["mid"].update(numel=5)), "weight_bits"),
    (edited(lambda d: d["layers"]["mid"].update(w=17)), "layer mid: .*17"),
    (edited(lambda d: d["layers"]["mid"].update(w="3")), "layer mid"),
    (edited(lambda d: d["layers"]["mid"].pop("a")), "'a'"),
    (edited(lambda d: d.pop("cost")), "cost")])
def test_damaged_policies_are_refused_in_one_line(content, words, tmp_path):
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(AsgaError, match=f"^[^\n]*p.json[^\n]*{words}[^\n]*$"):
        Policy.load(tmp_path / "p.json")

# ------------------------------------------------------------------------------------- networks and weights

def test_resnet20_is_the_one_of_the_paper():
    """Without its branch a block is its shortcut: every second pixel, new channels zero on both sides."""
    net, x = asga.ResNet20(10).eval(), torch.rand(2, 16, 8, 8)
    sizes = asga.trace(net, torch.zeros(1, 3, 32, 32))
    assert len(sizes) == 20 and sum(size.macs for size in sizes.values()) == 40_551_040
    for block in (*net.layer1, net.layer2[0]):
        nn.init.zeros_(block.bn2.weight)
    torch.testing.assert_close(net.layer1(x), x)
    expected = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8))
    torch.testing.assert_close(net.layer2[0](x), expected)

# the smallest member of each torchvision family, and the side of its images
FAMILIES = dict.fromkeys((
    "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "mnasnet0_5",
    "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet18", "resnext50_32x4d",
    "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11", "wide_resnet50_2"), 48)
FAMILIES.update(alexnet=64, inception_v3=299, maxvit_t=224, vit_b_32=224)

def shorten(name, model):
    """Fewer of the blocks that are large and alike, so that a step takes seconds."""
    if name in ("alexnet", "vgg11"):
        model.classifier = nn.Linear(9216 if name == "alexnet" else 25088, 10)
    if name == "vit_b_32":
        model.encoder.layers = model.encoder.layers[:2]
    if name == "wide_resnet50_2":
        model.layer3, model.layer4 = model.layer3[:2], model.layer4[:1]

@needs_torchvision
@pytest.mark.filterwarnings("ignore:The default weight init")
@pytest.mark.parametrize("name", FAMILIES)
def test_each_torchvision_family_is_searched_and_is_itself_with_quantizers_off(name):
    model, records = asga.build(name, 10), []
    side = FAMILIES[name]
    count = {224: 1, 299: 2}.get(side, 8)  # fewer leave BatchNorm no variance, and gradients explode
    x, y = torch.randn(count, 3, side, side), torch.arange(count)
    shorten(name, model)
    for p in model.parameters():
        if p.dim() > 1 and not p.any():                     # vit's head starts as zeros, and hides the rest
            nn.init.normal_(p, std=0.1)
    torch.optim.swa_utils.update_bn([x], model)
    net, model = quantize(model, 4, x).eval(), model.eval()
    with torch.no_grad():
        original, rounded = model(x), net(x)
        for q in asga.quantizers_of(net):
            q.enabled = False
        assert torch.equal(net(x), original) and not torch.equal(rounded, original)

    def on_step(done, record):
        records.append(record)

    policy = search(model, [(x, y)], F.cross_entropy, "4bit", steps=1, on_step=on_step)
    limit = policy.info["budget"]["bops"]
    assert 0.99 * limit <= policy.bops <= limit
    assert records[0]["expected_cost"].item() == pytest.approx(limit, rel=1e-6)
    assert records[0]["loss"].isfinite() and records[0]["perturbed_loss"].isfinite()

NET = """
import os
from torch import nn
from width import width

class Net(nn.Sequential):
    passes = 0

    def forward(self, x):
        Net.passes += self.training
        if self.training and Net.passes == int(os.environ.get("STOP_AT", -1)):
            os.kill(os.getpid(), int(os.environ["STOP_WITH"]))
        return super().forward(x)

def net(num_classes):
    return Net(nn.Conv2d(3, width, 3, 2), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3),
               nn.Dropout(0.2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))

def number(num_classes):
    return num_classes

def four(num_classes):
    return net(4)
"""

def workshop(folder):
    """A folder with a network of one's own that stops itself when told, in a file with a neighbour."""
    (folder / "width.py").write_text("width = 8\n")
    (folder / "net.py").write_text(NET)
    (folder / "__pycache__").mkdir()
    return folder

def weight_forms(state):
    """The files that hold a state dict in the wild."""
    return {"plain": state, "parallel": {f"module.{key}": value for key, value in state.items()},
            "old": {key: value for key, value in state.items() if "num_batches" not in key},
            "trainer": {"epoch": 3, "state_dict": state}, "net": {"net": state}, "model": {"model": state},
            "nested": {"model_state_dict": state}}

@pytest.mark.parametrize("form", weight_forms({}))
def test_weights_are_read_in_their_usual_forms(form, tmp_path):
    source, target = asga.ResNet20(10).state_dict(), asga.ResNet20(10)
    torch.save(weight_forms(source)[form], tmp_path / "w.pt")
    assert asga.load_weights(target, "resnet20", tmp_path / "w.pt", list("abcdefghij")) is False
    assert all(torch.equal(value, source[name]) for name, value in target.state_dict().items())

def test_weights_tell_whether_their_classifier_has_to_be_trained(tmp_path):
    names, source = list("abcdefghij"), asga.ResNet20(10)
    torch.save({"format": "asga-model", "classes": names, "state": source.state_dict()}, tmp_path / "ours.pt")
    for classes, untrained in ((names, False), (names[::-1], True), (names[:4], True)):
        target = asga.ResNet20(len(classes))
        fresh = target.fc.weight.clone()
        assert asga.load_weights(target, "resnet20", tmp_path / "ours.pt", classes) is untrained
        assert torch.equal(target.conv1.weight, source.conv1.weight)
        assert torch.equal(target.fc.weight, source.fc.weight if len(classes) == 10 else fresh)

@pytest.mark.parametrize("content", [
    Small(middle=30).state_dict(), {**Small().state_dict(), "2.weight": torch.ones(1)}, {"model": 3}, {},
    {"state": torch.ones(1)}, {1: torch.ones(1)}])
def test_weights_of_another_network_are_refused(content, tmp_path):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(AsgaError, match="another network"):
        asga.load_weights(Small(), "mine", tmp_path / "w.pt", range(7))

# ----------------------------------------------------------------------------------------------------- data

def test_digits_are_split_by_class_and_classes_can_be_chosen():
    classes, train, val = asga.load_data("digits", "data")
    assert len(train) + len(val) == 1797 and train.images.shape[1:] == (3, 32, 32)
    for part, share in ((train, 0.8), (val, 0.2)):
        counts = part.labels.bincount()
        assert len(counts) == 10 and ((counts / 179.7 - share).abs() < 0.03).all()
    names, _, some = asga.load_data("digits", "data", "5-6,9")
    assert names == ["5", "6", "9"] and set(some.labels.tolist()) == {0, 1, 2}
    assert torch.equal(some.images[some.labels == 2], val.images[val.labels == 9])
    labels = torch.tensor([0] * 40 + [1] * 20 + [2])
    mask = asga.stratified(labels, 0.1)
    assert [mask[labels == label].sum().item() for label in range(3)] == [4, 2, 1]
    assert not mask[:4].all() and torch.equal(mask, asga.stratified(labels, 0.1))    # drawn, always the same

def test_augmentation_gives_all_crops_and_mirror_images_only_where_they_may():
    image = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    padded = F.pad(image, (2,) * 4)
    crops = [padded[:, i:i + 16, j:j + 16] for i in range(5) for j in range(5)]
    straight = {bytes(crop.flatten().tolist()) for crop in crops}
    mirrored = {bytes(crop.flip(2).flatten().tolist()) for crop in crops}
    for flip, expected in ((False, straight), (True, straight | mirrored)):
        out = asga.augment(image.expand(1500, 3, 16, 16), flip, torch.Generator().manual_seed(0),
                           1500, slice(None))
        assert {bytes(one.flatten().tolist()) for one in out[:, 0]} == expected
        assert torch.equal(out[:, 0], out[:, 1]) and torch.equal(out[:, 0], out[:, 2])

def test_what_a_step_sees_depends_on_seed_and_step_alone():
    part = asga.ImageSet(torch.randint(256, (22, 3, 16, 16), dtype=torch.uint8), range(22), 16)

    def read(seed, style="crop", start=0, count=8, batch=5):
        return list(itertools.islice(part.stream(start, batch, CPU, 16, seed, style), count))

    whole = read(7)
    for (x, y), (x_late, y_late) in zip(whole[3:], read(7, start=3, count=5), strict=True):
        assert torch.equal(x, x_late) and torch.equal(y, y_late)
    epochs = [torch.cat([y for _, y in steps]).tolist() for steps in (whole[:4], whole[4:])]
    assert all(len(set(epoch)) == 20 for epoch in epochs) and epochs[0] != epochs[1]
    assert not torch.equal(read(8)[0][1], whole[0][1])                           # another seed, another order
    assert [len(y) for _, y in read(7, batch=64, count=3)] == [22] * 3           # fewer images than a batch
    x, y = read(7, style="none")[0]
    assert torch.equal(x, asga.normalize(part.images[y], 16)) and not torch.equal(x, whole[0][0])
    one = asga.ImageSet(part.images[:1].expand(22, -1, -1, -1), range(22), 16)
    crops = {x.numpy().tobytes() for x, _ in itertools.islice(one.stream(0, 5, CPU, 16, 7, "crop"), 8)}
    assert len(crops) == 8                                                       # anew in each step

def test_evaluation_is_the_mean_over_all_images():
    model, right, loss = asga.ResNet20(10), 0, 0.0
    images, labels = torch.randint(256, (20, 3, 8, 8), dtype=torch.uint8), torch.arange(20) % 10
    found = asga.evaluate(model, asga.ImageSet(images, labels, 8), 8, CPU, batch_size=7)
    assert model.training and not model.bn1.num_batches_tracked
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]     # ImageNet's
    with torch.no_grad():
        model.eval()
        for image, label in zip(images, labels.tolist(), strict=True):
            logits = model(((image / 255 - mean) / std)[None])[0]
            right += logits.argmax().item() == label
            loss -= logits.log_softmax(0)[label].item() / 20
    assert found == {"accuracy": 5 * right, "loss": pytest.approx(loss, rel=1e-4)}

def save_image(path, width, height, mode="RGB"):
    """A file of noise."""
    from PIL import Image
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = bytes(torch.randint(256, (height * width * len(mode.replace("P", "RGB")),)).tolist())
    image = Image.frombytes(mode.replace("P", "RGB"), (width, height), pixels)
    (image.quantize(16) if mode == "P" else image).save(path)

def make_folder(root, sizes=((20, 20),)):
    """An ImageFolder data set."""
    for part, name, i in itertools.product(("train", "val"), ("cat", "dog"), range(8)):
        save_image(root / part / name / f"{i}.png", *sizes[i % len(sizes)])
    return root

@needs_torchvision
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
@pytest.mark.parametrize("width,height", [(31, 24), (24, 31), (16, 16), (10, 40)])
def test_images_become_rgb_squares_from_their_centre(width, height, mode, tmp_path):
    from PIL import Image
    make_folder(tmp_path, sizes=((width, height),))
    save_image(tmp_path / "train/cat/0.png", width, height, mode)
    _, train, _ = asga.load_data(str(tmp_path), "data")
    train.size = 16
    train.load(CPU)
    short = min(width, height)
    wide, high = 16 * width // short, 16 * height // short
    image = Image.open(tmp_path / "train/cat/0.png").convert("RGB").resize((wide, high), Image.BILINEAR)
    left, top = round((wide - 16) / 2), round((high - 16) / 2)
    pixels = image.crop((left, top, left + 16, top + 16)).tobytes()
    expected = torch.tensor(list(pixels), dtype=torch.uint8).view(16, 16, 3).permute(2, 0, 1)
    assert train.images.dtype == torch.uint8 and torch.equal(train.images[0], expected)

@needs_torchvision
def test_sets_beyond_memory_stream_the_same_batches(tmp_path, monkeypatch):
    make_folder(tmp_path, sizes=((31, 24), (20, 20), (16, 40)))
    results = []
    for limit in (asga.IN_MEMORY, 0):
        monkeypatch.setattr(asga, "IN_MEMORY", limit)
        classes, train, val = asga.load_data(str(tmp_path), "data")
        assert classes == ["cat", "dog"] and train.size == 24
        train.size = val.size = 16
        draws = torch.get_rng_state()
        batches = list(itertools.islice(train.stream(1, 6, CPU, 16, 3, "flip"), 4))
        assert torch.equal(torch.get_rng_state(), draws)                       # those are the network's
        assert torch.is_tensor(train.images) == bool(limit)
        results.append(batches + list(val.batches(torch.arange(16).split(5), CPU)))
    for (x, y), (x_streamed, y_streamed) in zip(*results, strict=True):
        assert torch.equal(x, x_streamed) and torch.equal(y, y_streamed)

@needs_torchvision
def test_larger_pictures_than_the_resolution_are_cropped_by_the_recipe_for_imagenet(tmp_path, monkeypatch):
    from PIL import Image
    make_folder(tmp_path, sizes=((80, 60), (60, 90)))
    line = f"train --data {tmp_path} --batch-size 4 --no-compile --device cpu --resolution "
    assert asga.Job(asga.parse((line + "60").split()), "").style == "flip"
    assert asga.Job(asga.parse((line + "32 --augment flip").split()), "").style == "flip"
    job = asga.Job(asga.parse((line + "32").split()), "")
    assert job.style == "imagenet"
    (images, _), = job.val.batches([torch.arange(2)], CPU)
    for image, path, (wide, high) in zip(images, ("cat/0.png", "cat/1.png"), ((49, 37), (37, 55))):
        resized = Image.open(tmp_path / "val" / path).resize((wide, high), Image.BILINEAR)  # 37 = 32/0.875
        left, top = round((wide - 32) / 2), round((high - 32) / 2)
        pixels = list(resized.crop((left, top, left + 32, top + 32)).tobytes())
        expected = torch.tensor(pixels, dtype=torch.uint8).view(32, 32, 3).permute(2, 0, 1)
        assert torch.equal(image, expected)
    whole = list(itertools.islice(job.stream(0), 10))  # 4 steps are an epoch
    assert not torch.is_tensor(job.train.images)  # they are decoded and drawn anew
    for x, y in (whole[0], whole[9]):
        assert x.shape == (4, 3, 32, 32) and len(y) == 4
    again, = itertools.islice(job.stream(9), 1)
    halves = [next(job.stream(9, part, 2)) for part in range(2)]
    for i in range(2):
        assert torch.equal(again[i], whole[9][i]) and torch.equal(torch.cat([h[i] for h in halves]), again[i])
    found = torch.cat([x for x, _ in whole])
    assert len(found.flatten(1).unique(dim=0)) == 40  # no draw twice

# ----------------------------------------------------------------- runs: stopped at any step, and continued

FLAGS = " --data digits --classes 0-3 --images 0.2 --batch-size 16 --no-compile --device cpu"
SEARCH = "search --arch net.py:net --fp-epochs 2 --steps 8 --lr-beta 20 --out s" + FLAGS
TRANSFER = "transfer s/policy.json --weights s/weights.pt --epochs 2 --out t" + FLAGS

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a search, s, and a transfer, t, that nothing stopped."""
    folder = workshop(tmp_path_factory.mktemp("finished"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert asga.main(SEARCH.split()) == 0
        assert asga.main(TRANSFER.split()) == 0
    return folder

@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder with a network of one's own, and in it."""
    monkeypatch.chdir(tmp_path)
    return workshop(tmp_path)

def timeless(data):
    """What a file holds, comparable and without times."""
    if isinstance(data, dict):
        return {key: timeless(value) for key, value in data.items() if "seconds" not in key and key != "time"}
    return data.tolist() if torch.is_tensor(data) else data

def contents(run):
    """{name: content} of all files of a run."""
    found = {}
    for path in run.iterdir():
        if path.suffix == ".pt":
            found[path.name] = timeless(torch.load(path, weights_only=True))
        else:
            texts = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            found[path.name] = [timeless(json.loads(text)) for text in texts]
    return found

# in passes: 14 for weights, then two for a step of the search; 16 for a transfer's statistics, then its steps
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at,phase", [(9, "weights at step 9"), (21, "search at step 4"),
                                      (19, "transfer at step 3")])
def test_a_stopped_command_goes_on_bit_for_bit(at, phase, signum, finished, here, monkeypatch, capsys):
    line, out = (TRANSFER, "t") if "transfer" in phase else (SEARCH, "s")
    if out == "t":
        shutil.copytree(finished / "s", "s")
    monkeypatch.setenv("STOP_AT", str(at))
    monkeypatch.setenv("STOP_WITH", str(int(signum)))
    assert asga.main(line.split()) == 130
    assert f"after step {phase.split()[-1]} of" in (err := capsys.readouterr().err)
    assert f"the same command goes on with --out {out}\n" in err
    assert not Path(out, "policy.json").exists() and not Path(out, "metrics.json").exists()
    monkeypatch.delenv("STOP_AT")
    assert asga.main(line.split()) == 0
    assert f"going on with {phase}" in capsys.readouterr().err
    assert contents(here / out) == contents(finished / out)

def test_a_signal_while_processes_agree_on_stopping_is_not_lost(here, monkeypatch, capsys):
    calls, real = itertools.count(), asga.average
    def average(tensors):
        tensors = list(tensors)
        if [t.dim() for t in tensors] == [0] and next(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        real(tensors)

    monkeypatch.setattr(asga, "average", average)
    assert asga.main(SEARCH.split()) == 130
    assert "after step 4 of" in capsys.readouterr().err  # the next one

HURRIED = """
import itertools, sys, time, asga
quarters = itertools.count(0, 15)
def clock():
    return float(next(quarters))
time.monotonic = clock
sys.exit(asga.main(sys.argv[1:]))
"""

def test_a_killed_search_goes_on_from_its_checkpoint_bit_for_bit(finished, here, capsys):
    told = {"STOP_AT": str(14 + 2 * 7), "STOP_WITH": str(int(signal.SIGKILL)), "PYTHONPATH": str(HERE)}
    killed = subprocess.run([sys.executable, "-c", HURRIED, *SEARCH.split()], env={**os.environ, **told})
    assert killed.returncode == -signal.SIGKILL
    done = torch.load("s/search.ckpt", weights_only=True)["step"]
    with open("s/log.jsonl", "a") as log:
        log.write('{"step": 6, "lo')                                     # killed amid a line
    assert 0 < done < 8 and asga.main(SEARCH.split()) == 0
    assert f"going on with search at step {done}" in capsys.readouterr().err
    assert contents(here / "s") == contents(finished / "s")

def test_a_second_signal_ends_at_once_and_a_run_without_out_tells_its_folder(here, monkeypatch, capsys):
    def kill_twice(pid, signum):
        signal.raise_signal(signum)
        signal.raise_signal(signum)

    monkeypatch.setattr(os, "kill", kill_twice)
    monkeypatch.setenv("STOP_AT", "9")
    monkeypatch.setenv("STOP_WITH", str(int(signal.SIGINT)))
    assert asga.main(SEARCH.replace("--out s", "").split()) == 130
    folder = re.search(r"goes on with --out (runs/[\d-]+)\n", capsys.readouterr().err)[1]
    assert Path(folder, "config.json").exists() and not Path(folder, "weights.ckpt").exists()

@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("name", ["config.json", "weights.pt", "weights.ckpt", "weights.jsonl", "log.jsonl",
                                  "search.ckpt", "supernet.pt", "policy.json"])
def test_a_full_disk_is_one_line_and_leaves_what_can_be_continued(name, finished, here, capsys):
    Path("s").mkdir()
    Path("s", f"{name}.part").symlink_to("/dev/full")
    refused(capsys, SEARCH, "No space left on device")
    assert not list(Path("s").glob(f"{name}*"))
    assert asga.main(SEARCH.split()) == 0
    assert contents(here / "s") == contents(finished / "s")

def test_what_a_folder_holds_decides_whether_a_run_may_use_it(finished, here, capsys):
    shutil.copytree(finished / "s", "s")
    refused(capsys, SEARCH, "--out s holds a finished policy.json")
    Path("s/policy.json").unlink()
    refused(capsys, SEARCH + " --seed 1", "run with seed 0")
    Path("s/config.json").write_text("{")
    refused(capsys, SEARCH, "s/config.json")
    shutil.copy(finished / "s/config.json", "s")
    torch.save({"net": Evil()}, "s/search.ckpt")
    refused(capsys, SEARCH, "search.ckpt")
    assert not Path("ran").exists()
    Path("s/search.ckpt").unlink()
    assert asga.main(SEARCH.split()) == 0
    assert contents(here / "s") == contents(finished / "s")

# --------------------------------------------------------------------------------------------------- export

def made_up(model):
    """`model` with BatchNorms that have seen something; every third γ is negative."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t in (m.weight, m.running_var):
                t.data.uniform_(0.5, 2)
            for t in (m.bias, m.running_mean):
                t.data.uniform_(-1, 1)
            m.weight.data[::3] *= -1
    return model.eval()

def mixed(model, x, most=6):
    """Quantized to bits that differ from layer to layer, and these."""
    names = list(asga.trace(model, x))
    layers = {name: (2 + i % (most - 1), most - i % 3) for i, name in enumerate(names)}
    return quantize(model, Policy(layers), x), list(layers.values())

def products(model):
    """[(bits w, bits a)] of an ONNX graph's products, read backwards from each; checks the integers."""
    onnx = pytest.importorskip("onnx")
    made = {out: node for node in model.graph.node for out in node.output}
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        pair = []
        for name in node.input[1::-1] if node.op_type in ("Conv", "Gemm", "MatMul") else ():
            while name in made and made[name].op_type in ("DequantizeLinear", "Transpose", "Identity"):
                name = made[name].input[0]
            clip = made.get(name)
            if clip is None or clip.op_type != "Clip":
                break
            n, p = (int(arrays[end]) for end in clip.input[1:])
            pair.append(math.log2(p - n + 1))
            if clip.input[0] in arrays:
                weight = clip.input[0]
                assert arrays[weight].dtype == "int8" and n == -(p + 1)
                assert n <= arrays[weight].min() and arrays[weight].max() <= p
            else:
                first = made[clip.input[0]]  # a ReLU6 is a bound of its own
                first = made[first.input[0]] if first.op_type == "Clip" else first
                assert first.op_type == "QuantizeLinear"
        if len(pair) == 2:
            found[weight] = tuple(pair)
    return list(found.values())

def run_onnx(model, x, optimize=True):
    ort = pytest.importorskip("onnxruntime")
    options, level = ort.SessionOptions(), ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": x.numpy()})[0])

def normalized(cin, cout, **more):
    return nn.Sequential(nn.Conv2d(cin, cout, 3, **more), nn.BatchNorm2d(cout))

class PreActivated(nn.Module):
    """What the first convolution gives goes through a BatchNorm, and past it: they cannot become one."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv, self.head = normalized(6, 6, padding=1), nn.Linear(6 * 64, 4)

    def forward(self, x):
        x = self.stem(x)
        return self.head(torch.flatten(x + self.conv(F.relu6(self.bn(x))), 1))

class Mixer(nn.Module):
    """Matrices on tensors of three dimensions."""

    def __init__(self):
        super().__init__()
        self.patches, self.mix, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.head((x + F.gelu(self.mix(x))).mean(1))

class Clipped(nn.Module):
    """Activations with bounds of many kinds, and padding by hand for one convolution and for two."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(i, 4, 3, padding=1) for i in (3, 4, 4, 4))
        self.head, self.bound = nn.Linear(4, 5), nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        x = F.pad(3 * F.relu6(2 * self.a(x)).clamp(max=4), (0, 1, 0, 1))
        x = F.pad(self.b(x).clamp(min=0.1), (1, 0, 1, 0)) + F.relu6(self.c(x))[..., :1, :1]
        x = self.c(self.b(x).clamp(min=0))
        x = F.pad(F.relu6(5 * self.d(x)), (1, 1, 1, 1))
        x = self.d(x.clamp(0.2, 3)) + F.relu6(self.b(F.hardtanh(x, 0, 2))) + self.c(F.hardtanh(x, -1, 2))
        x = x + 9 * self.c(torch.clamp(99 * x, torch.zeros(()), self.bound))
        return self.head(x.mean((2, 3)))

def one_norm():
    """A BatchNorm behind two convolutions: it cannot be a part of both."""
    norm = nn.BatchNorm2d(6)
    return nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.ReLU(), nn.Conv2d(6, 6, 3), norm)

EXPORTED = {**NETWORKS, "one_norm": (one_norm, (4, 3, 8, 8)), "clipped": (Clipped, (4, 3, 8, 8)),
            "preactivated": (PreActivated, (4, 3, 8, 8)), "mixer": (Mixer, (4, 3, 16, 16))}
del EXPORTED["transformer"]  # which torch.onnx does not export
if torchvision:
    for arch in ("resnet18", "mobilenet_v3_small", "shufflenet_v2_x1_0"):
        EXPORTED[arch] = functools.partial(asga.build, arch, 10), (4, 3, 64, 64)

@pytest.mark.parametrize("name", EXPORTED)
def test_an_export_has_the_policys_integers_and_gives_the_networks_outputs(name):
    pytest.importorskip("onnx")
    make, shape = EXPORTED[name]
    x = torch.randn(8, *shape[1:])
    model = made_up(make())
    if name in ("preactivated", "shared", "one_norm"):  # what forbids to fold is the readers alone
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.data.abs_()
    net, bits = mixed(model, x)
    before = snapshot(net)
    exported, rounded_net = asga.to_onnx(net, x[:2])
    assert same(snapshot(net), before)
    assert products(exported) == bits and list(asga.read_bits(exported).values()) == bits
    if name == "one_norm":
        assert [node.op_type for node in exported.graph.node].count("BatchNormalization") == 2
    for each in (x, x[:5]):  # other sizes of a batch than the traced one
        expected = rounded_net(each)
        for optimize in (False, True):
            far = (run_onnx(exported, each, optimize) - expected).abs().amax(1) > 1e-3 * expected.abs().max()
            assert far.double().mean() <= 0.5  # one rounding that flips moves all after it, in few images

@pytest.mark.parametrize("gamma,low,stays", [(0.5, -7, False), (-0.5, -7, False), (-0.5, -8, True),
                                             (1e-12, -7, True), (0.0, -7, True)])
def test_a_batchnorm_goes_into_scales_and_bias_unless_integers_do_not_fit(gamma, low, stays):
    onnx = pytest.importorskip("onnx")
    model, x = made_up(normalized(2, 3, bias=False)), torch.rand(5, 2, 9, 9)
    model[1].weight.data.copy_(torch.tensor([1.0, gamma, 2.0]))
    net = quantize(model, 4, x, keep=None)
    q, s_x = net[0].weight_quantizer, net[0].input_quantizer.steps.item()
    weights = torch.randint(-7, 8, (3, 2, 3, 3))
    weights[1, 0, 0] = torch.tensor([low, 7, 3])
    net[0].weight.data.copy_(weights * q.steps)
    exported, after = asga.to_onnx(net, x[:2])
    kinds = [node.op_type for node in exported.graph.node]
    assert ("BatchNormalization" in kinds) == stays
    arrays = [torch.tensor(onnx.numpy_helper.to_array(t)) for t in exported.graph.initializer]
    found = next(t for t in arrays if t.dim() == 4)
    turned = weights if stays else weights * torch.tensor([1.0, gamma, 2.0]).sign().view(-1, 1, 1, 1)
    assert found.dtype == torch.int8 and torch.equal(found.float(), turned.float())
    whole = [t for t in arrays if t.dtype == torch.int32]
    assert len(whole) == (not stays)
    if not stays:
        bn = after[1]
        factor = bn.weight / (bn.running_var + bn.eps).sqrt()
        unit = q.steps * factor.abs() * s_x
        torch.testing.assert_close(whole[0] * unit, bn.bias - bn.running_mean * factor)
        assert ((bn.bias - model[1].bias).abs() <= 0.501 * unit).all()
    torch.testing.assert_close(run_onnx(exported, x), after(x), rtol=1e-4, atol=1e-4)

def test_qonnx_is_executed_by_qonnx_and_costs_what_the_policy_says():
    onnx_exec = pytest.importorskip("qonnx.core.onnx_exec")
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.transformation.infer_shapes import InferShapes
    from qonnx.util.inference_cost import inference_cost
    model, x = made_up(nn.Sequential(normalized(3, 6), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=2), nn.Flatten(),
                                     nn.Linear(6 * 16, 4))), torch.randn(1, 3, 8, 8)
    net, bits = mixed(model, x)
    exported, after = asga.to_onnx(net, x.expand(2, -1, -1, -1), "qonnx")
    assert same({key: after.state_dict()[key] for key in snapshot(net)}, snapshot(net))
    assert list(asga.read_bits(exported).values()) == bits
    exported.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    wrapped = ModelWrapper(exported).transform(InferShapes())
    out = torch.from_numpy(onnx_exec.execute_onnx(wrapped, {"images": x.numpy()})["logits"])
    torch.testing.assert_close(out, net(x), rtol=1e-4, atol=1e-4)
    counted = inference_cost(wrapped, discount_sparsity=False)["total_cost"]["total_bops"]
    sizes = asga.trace(model, x)
    assert counted == sum(size.macs * w * a for size, (w, a) in zip(sizes.values(), bits))

@pytest.mark.parametrize("form", ["qcdq", "qonnx"])
def test_export_writes_a_file_that_eval_judges_like_the_checkpoint(form, finished, here, capsys):
    pytest.importorskip("qonnx" if form == "qonnx" else "onnxruntime")
    assert asga.main(f"export {finished}/t/model.pt --out t.onnx --format {form}".split()) == 0
    out = capsys.readouterr().out
    agreed = re.findall(r"checked +(\d+) images, optimization (?:on|off): ([\d.]+) %", out)
    assert len(agreed) == 2 and all(int(n) >= 1000 or float(share) >= 99 for n, share in agreed), out
    expected = re.search(r"accuracy +([\d.]+) %.*as exported", out)[1]
    assert asga.main("eval t.onnx --data digits --classes 0-3".split()) == 0
    assert abs(float(re.search(r"([\d.]+) %", capsys.readouterr().out)[1]) - float(expected)) <= 1

def test_what_cannot_be_exported_is_one_line_and_leaves_no_file(finished, here, monkeypatch, capsys):
    pytest.importorskip("onnxruntime")
    line = f"export {finished}/t/model.pt --out t.onnx"
    refused(capsys, "eval net.py.onnx --data digits", "net.py.onnx is no ONNX file")
    real = asga.Runtime.forward
    monkeypatch.setattr(asga.Runtime, "forward", lambda self, x: real(self, x).flip(1))
    capsys.readouterr()
    assert asga.main(line.split()) == 2 and "see --agree" in capsys.readouterr().err
    monkeypatch.setattr(asga.Runtime, "forward", real)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "onnx", None)
        refused(capsys, line, "pip install onnx onnxruntime qonnx")
    net = quantize(Small(10), 9, torch.randn(2, 3, 16, 16))
    with pytest.raises(AsgaError, match="has 9 bits"):
        asga.to_onnx(net, torch.randn(2, 3, 16, 16))
    monkeypatch.setattr(torch.onnx, "export", lambda *a, **k: 1 / 0)
    refused(capsys, line, "division by zero")
    assert not Path("t.onnx").exists()

# ---------------------------------------------------------------------------------------- several processes

TWO = """
import os
import torch
from torch import nn

class Failing(nn.Linear):
    passes = 0

    def forward(self, x):
        Failing.passes += self.training
        if Failing.passes > 3 and os.environ.get("RANK") == "1":
            raise torch.OutOfMemoryError("no memory on this one")
        return super().forward(x)

def plain(num_classes, last=nn.Linear, norm=nn.Identity):
    features = nn.Conv2d(3, 8, 3, 2), norm(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)
    return nn.Sequential(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), last(8, num_classes))

def normalized(num_classes):
    return plain(num_classes, norm=nn.BatchNorm2d)

def failing(num_classes):
    return plain(num_classes, last=Failing)
"""

distributed = pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")

def torchrun(line, processes=2):
    """A started command in so many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, str(HERE / "asga.py"), *line.split()], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)

def losses(folder, name="log.jsonl"):
    return [json.loads(line)["loss"] for line in Path(folder, name).read_text().splitlines()]

@pytest.fixture
def two(here):
    Path("two.py").write_text(TWO)

FEW = " --data digits --classes 0-4 --batch-size 48 --fp-epochs 1 --no-compile --device cpu --arch two.py:"

@distributed
def test_two_processes_are_one_at_the_same_batch(two, capsys):
    weights = " --weights asga/weights.pt"
    search = "search --steps 10 --budget 6bit --candidates-w 5,6,8 --candidates-a 5,6,8"
    search += " --lr 0.003 --lr-beta 0.4"  # of few bits one flips, and all after it
    lines = {"asga": search, "joint": search + " --method joint" + weights,
             "transfer": "transfer asga/policy.json --epochs 1 --lr 0.003" + weights}
    for name, line in lines.items():
        assert asga.main((line + FEW + f"plain --out {name}").split()) == 0
        out, err = (done := torchrun(line + FEW + f"plain --out {name}2")).communicate(timeout=100)
        assert done.returncode == 0, err
        assert len(re.findall("^folder ", out, re.MULTILINE)) == 1  # one process tells
        assert losses(name)[:10] == pytest.approx(losses(name + "2")[:10], abs=1e-5)
        files = [torch.load(Path(folder, "model.pt" if name == "transfer" else "supernet.pt"))["state"]
                 for folder in (name, name + "2")]
        for key, value in files[0].items():
            torch.testing.assert_close(value, files[1][key], rtol=0, atol=1e-5)
        if name != "transfer":
            one, other = (Policy.load(f"{folder}/policy.json").layers for folder in (name, name + "2"))
            assert one == other
        one, other = (asga.read_json(f"{folder}/metrics.json") for folder in (name, name + "2"))
        assert one["full_precision"] == pytest.approx(other["full_precision"], rel=1e-5)  # of unequal slices
    done = torchrun(f"eval transfer/model.pt {FEW.split('--batch')[0]} --device cpu", 3)
    assert "%.2f %%" % asga.read_json("transfer/metrics.json")["tuned"]["accuracy"] in done.communicate()[0]

@distributed
def test_two_processes_stop_together_go_on_as_one_and_end_together(two, capsys):
    line = "train --epochs 300" + FEW.replace("--fp-epochs 1 ", "") + "normalized --out t"
    run = torchrun(line)
    while not Path("t/best.pt").exists() and run.poll() is None:  # it is amid its steps
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert "after step" in err, err
    step = int(re.search(r"after step (\d+) of", err)[1])
    assert torch.load("t/train.ckpt")["step"] == step == len(losses("t"))
    capsys.readouterr()
    assert asga.main((line + " --epochs 301").split()) == 2 and "epochs 300" in capsys.readouterr().err
    left = json.loads(Path("t/config.json").read_text())
    left["settings"]["epochs"] = 1 + step // 10
    Path("t/config.json").write_text(json.dumps(left))
    assert asga.main((line + f" --epochs {1 + step // 10}").split()) == 0
    assert f"going on with train at step {step}" in capsys.readouterr().err
    began = time.monotonic()
    run = torchrun("train --epochs 3" + FEW.replace("--fp-epochs 1 ", "") + "failing --out f")
    _, err = run.communicate(timeout=60)
    assert run.returncode and time.monotonic() - began < 40
    assert "asga: process 1: error: no memory on this one" in err and "asga: error: another process" in err
    run = torchrun("train" + FEW.replace("48 --fp-epochs 1", "49") + "plain --out g")
    assert "--batch-size 49" in run.communicate(timeout=60)[1] and run.returncode and not Path("g").exists()

# ------------------------------------------------------------------------------------- command line: errors

class Evil:
    """Makes the folder `ran` where a pickle of it is trusted."""

    def __reduce__(self):
        return os.mkdir, ("ran",)

def refused(capture, line, words):
    """The command ends with code 2 and one line with these words on stderr."""
    capture.readouterr()
    try:
        code = asga.main(line.split())
    except SystemExit as stop:                                                                      # argparse
        code = stop.code
    out, err = capture.readouterr()
    errors = [text for text in err.splitlines() if "error: " in text]
    assert code == 2 and out == "" and len(errors) == 1 and words in errors[0], err
    assert "Traceback" not in err and "usage" not in err, err

@pytest.fixture(scope="module")
def wrong_files(tmp_path_factory, finished):
    folder = workshop(tmp_path_factory.mktemp("wrong"))
    (folder / "file").write_text("x")
    small_policy()[2].save(folder / "small.json")
    torch.save({"a": Evil()}, folder / "evil.pt")
    torch.save(Small(10).state_dict(), folder / "small.pt")
    shutil.copy(finished / "s/supernet.pt", folder)
    shutil.copy(finished / "t/model.pt", folder / "tuned.pt")
    return folder

ERRORS = [
    ("search --data nowhere", "'nowhere'"),
    ("search --data digits --arch net.py:missing", "missing"),
    ("search --data digits --arch net.py:number", "net.py:number"),
    ("search --data digits --arch net.py:four", "(1, 4)"),
    ("search --data digits --arch net.py:net --resolution 4", "4 px"),
    ("search --data digits --budget 1bit", "cannot be met"),
    ("search --data digits --budget 4.5Mb", "4.5Mb"),
    ("search --data digits --budget 3furlongs", "3furlongs"),
    ("search --data digits --lr nan", "nan"),
    ("search --data digits --seed -1", "seed"),
    ("search --data digits --batch-size 0", "batch"),
    ("search --data digits --images 0", "images"),
    ("search --data digits --cost-resolution 1000000", "1000000 px"),
    ("search --data digits --device cuda:99", "cuda:99"),
    ("search --data digits --classes 3-40", "3-40"),
    ("search --data digits --classes 3", "at least two"),
    ("search --data digits --weights file", "file holds no"),
    ("search --data digits --weights evil.pt", "evil.pt"),
    ("search --data digits --weights small.pt", "another network"),
    ("search --data digits --weights supernet.pt", "another network"),
    ("search --data digits --out file/run", "file/run"),
    ("transfer none.json --data digits", "none.json"),
    ("transfer small.json --data digits --arch resnet20", "another network"),
    ("eval evil.pt --data digits", "evil.pt"),
    ("eval tuned.pt --data digits --classes 1-4", "tuned.pt is of other classes"),
]

@pytest.mark.parametrize("line,words", ERRORS)
def test_what_users_can_mend_is_one_line_and_leaves_nothing(line, words, wrong_files, monkeypatch, capsys):
    monkeypatch.chdir(wrong_files)
    before = sorted(wrong_files.glob("*"))
    if "eval" not in line and "--out" not in line:
        line += " --out out"
    refused(capsys, line, words)
    assert sorted(wrong_files.glob("*")) == before

@needs_torchvision
def test_wrong_images_and_torchvision_networks_are_one_line(here, monkeypatch, capfd):
    def unreachable(*args, **more):
        raise URLError("no route")

    make_folder(here / "set")
    Path("set/train/empty").mkdir()
    refused(capfd, "train --data set --out out", "empty")
    save_image(here / "set/train/empty/0.png", 20, 20)
    refused(capfd, "train --data set --out out", "'empty' is in only one of")
    shutil.rmtree("set/train/empty")
    refused(capfd, "search --arch resnet_18 --data digits --out out", "resnet_18")
    refused(capfd, "search --weights imagenet --data digits --out out", "imagenet holds no")
    broken = Path("set/val/dog/3.png")
    broken.write_bytes(broken.read_bytes()[:600])                    # its header is fine, its pixels are not
    refused(capfd, "train --data set --out out", "dog/3.png is no readable image")
    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    refused(capfd, "train --data cifar10 --data-root root --out out", "no route")
    assert not Path("out").exists()

@needs_torchvision
def test_a_broken_image_ends_the_training_that_meets_it(here):
    broken = make_folder(here / "set") / "train/dog/3.png"
    broken.write_bytes(broken.read_bytes()[:600])
    line = f"{HERE}/asga.py train --arch net.py:net --data set --no-compile --out t"
    done = subprocess.run([sys.executable, *line.split()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and re.fullmatch("asga: error: .*dog/3.png is no read.*\n", done.stderr)

def test_a_run_that_diverges_leaves_no_result(here, capsys):
    refused(capsys, SEARCH + " --fp-lr 1e9", "lower --lr")
    assert {path.name for path in Path("s").iterdir()} <= {"config.json", "weights.jsonl"}

# ----------------------------------------------------------------------------- command line: whole commands

SHARED = "--data --data-root --classes --device --compile --no-compile --capture --no-capture "
NETWORK = SHARED + "--arch --weights --resolution --images --augment --batch-size --seed --out --precision "
EPOCHS = " --epochs --lr --eval-every"
FIRST = NETWORK + "--fp-epochs --fp-lr --cost-resolution "
FLAGS_OF = {
    "search": FIRST + "--budget --method --steps --candidates-w --candidates-a --keep --rho-min --rho-max "
    "--alpha --adaptive --no-adaptive --project --no-project --direction --lr --lr-beta --momentum "
    "--weight-decay --random-weights",
    "transfer": FIRST + "--weight-decay" + EPOCHS,
    "train": NETWORK + EPOCHS,
    "eval": SHARED,
    "export": "--data --data-root --classes --format --out --agree",
}

@pytest.mark.parametrize("name", FLAGS_OF)
def test_help_lists_every_flag(name, capsys):
    with pytest.raises(SystemExit) as stop:
        asga.main([name, "--help"])
    listed = set(re.findall(r"^  (--[a-z-]+)|, (--[a-z-]+)", capsys.readouterr().out, re.MULTILINE))
    assert stop.value.code == 0
    assert {flag for pair in listed for flag in pair} >= set(FLAGS_OF[name].split())

def python(*words, cwd):
    """(stdout, stderr) of a Python process."""
    env = {**os.environ, "PYTHONPATH": str(HERE)}
    done = subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr

def cli(line, cwd):
    return python(str(HERE / "asga.py"), *line.split(), cwd=cwd)[0]

def test_search_transfer_and_eval_on_digits(tmp_path):
    flags = " --data digits --resolution 16 --batch-size 32 --no-compile --device cpu"
    line = "search --classes 0-4 --fp-epochs 5 --steps 8 --budget 2.5bit --lr-beta 20 --out a"
    found = cli(line + flags, tmp_path)
    policy = asga.read_json(tmp_path / "a/policy.json")
    layers = policy["layers"]
    assert policy["arch"] == "resnet20"
    ends = layers["conv1"]["macs"] + layers["fc"]["macs"]
    inner = sum(entry["macs"] for entry in layers.values()) - ends
    limit = inner * 2.5 ** 2 + ends * 8 ** 2
    assert policy["budget"] == {"spec": "2.5bit", "bops": pytest.approx(limit)}
    assert 0.99 * limit <= policy["cost"]["bops"] <= limit
    assert len({(entry["w"], entry["a"]) for entry in layers.values()}) > 3        # it is mixed precision
    records = [json.loads(line) for line in (tmp_path / "a/log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(8))
    logged = "loss perturbed_loss gap rho grad_norm cos projected expected_cost bits time"
    assert set(logged.split()) <= set(records[0])
    assert all(record["expected_cost"] == pytest.approx(limit, rel=1e-6) for record in records)
    rows = [sorted(row.split()) for row in found.splitlines()]
    for name, entry in layers.items():
        assert sorted([name, str(entry["w"]), str(entry["a"]), asga.human(entry["macs"])]) in rows
    cli("transfer a/policy.json --classes 5-9 --fp-epochs 5 --epochs 2 --out b" + flags, tmp_path)
    metrics = asga.read_json(tmp_path / "b/metrics.json")
    assert metrics["policy_bops"] == policy["cost"]["bops"]
    assert metrics["full_precision"]["accuracy"] > 80 and metrics["tuned"]["accuracy"] > 80
    state = torch.load(tmp_path / "b/model.pt", weights_only=True)["state"]
    for name, entry in layers.items():                                             # the bits were not changed
        assert state[f"{name}.weight_quantizer.grid"][0].tolist() == [entry["w"]]
        assert state[f"{name}.input_quantizer.grid"][0].tolist() == [entry["a"]]
    judged = cli("eval b/model.pt --classes 5-9 --data digits --no-compile", tmp_path)
    assert "{accuracy:.2f} %, cross-entropy {loss:.4f}".format(**metrics["tuned"]) in judged

def test_weights_of_train_are_tuned_first_only_where_the_classes_are_others(here):
    assert asga.main(("train --arch net.py:net --epochs 2 --out f" + FLAGS).split()) == 0
    line = "search --arch net.py:net --weights f/model.pt --steps 2 --fp-epochs 1 --out same" + FLAGS
    assert asga.main(line.split()) == 0
    metrics, trained = asga.read_json("same/metrics.json"), asga.read_json("f/metrics.json")["full_precision"]
    assert metrics["full_precision"] == trained and not Path("same/weights.pt").exists()
    for classes in ("4-7", "0-4"):                                       # as many classes, and one more
        assert asga.main(line.replace("0-3", classes).replace("same", classes).split()) == 0
        assert Path(classes, "weights.pt").exists()

def test_every_few_epochs_are_judged_and_the_best_network_is_kept(here, monkeypatch, capsys):
    accuracies, saved, write = iter([50.0, 70.0, 60.0, 55.0]), [], asga.write_atomic
    monkeypatch.setattr(asga.Job, "evaluate", lambda *job: {"accuracy": next(accuracies), "loss": 1.0})
    def noted(path, what):
        saved.append(Path(path).name)
        write(path, what)

    monkeypatch.setattr(asga, "write_atomic", noted)
    assert asga.main(("train --arch net.py:net --epochs 6 --eval-every 2 --out f" + FLAGS).split()) == 0
    log = [json.loads(line) for line in Path("f/log.jsonl").read_text().splitlines()]
    assert [(row["epoch"], row["accuracy"]) for row in log if "epoch" in row] == [(2, 50), (4, 70), (6, 60)]
    assert [name for name in saved if name.endswith(".pt")] == ["best.pt", "best.pt", "model.pt"]
    assert "epoch 4: accuracy 70.00 %" in capsys.readouterr().err
    best, last = (torch.load(f"f/{name}.pt")["state"] for name in ("best", "model"))
    assert best.keys() == last.keys() and not same(best, last)

def test_uniform_bits_without_weights_train_nothing(here):
    line = "search --method uniform --arch net.py:net --budget 4bit --candidates-a 3,5 --keep 6 --out u"
    assert asga.main((line + FLAGS).split()) == 0
    assert {path.name for path in Path("u").iterdir()} == {"policy.json", "metrics.json", "config.json"}
    policy = Policy.load("u/policy.json")
    assert list(policy.layers.values())[::2] == [(6, 6)] * 2 and policy.layers["3"][1] in (3, 5)
    assert policy.info["search"]["method"] == "uniform" and policy.info["candidates"]["a"] == [3, 5]

def test_random_weights_are_searched_in_bf16_without_training_first(here):
    losses = []
    for precision in ("bf16", "float32"):
        assert asga.main((SEARCH + f" --random-weights --precision {precision}").split()) == 0
        state = torch.load("s/supernet.pt", weights_only=True)["state"]
        assert all(value.dtype == torch.float32 for value in state.values() if value.is_floating_point())
        losses.append([json.loads(line)["loss"] for line in Path("s/log.jsonl").read_text().splitlines()])
        Path("s").rename(precision)
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.1)

def test_search_without_data_falls_back_to_digits(here, capsys):
    line = "search --method uniform --arch net.py:net --data-root nowhere --no-compile --out o"
    assert asga.main(line.split()) == 0
    assert re.search("digits; --data cifar10 downloads", capsys.readouterr().err)
    assert Policy.load("o/policy.json").info["proxy"]["data"] == "digits"

def test_search_and_transfer_have_resolutions_of_their_own_for_training_and_for_costs(here):
    def macs(side, classes):
        out = (side - 1) // 2
        return {"0": out ** 2 * 8 * 27, "3": (out - 2) ** 2 * 8 * 72, "7": 8 * classes}

    line = "search --arch net.py:net --fp-epochs 1 --steps 2 --resolution 16 --cost-resolution 41 --out s"
    assert asga.main((line + FLAGS).split()) == 0
    policy = asga.read_json("s/policy.json")
    assert {name: entry["macs"] for name, entry in policy["layers"].items()} == macs(41, 4)
    line = "transfer s/policy.json --fp-epochs 1 --epochs 1 --resolution 20 --cost-resolution 49 --out t"
    assert asga.main((line + FLAGS.replace("0-3", "1-7")).split()) == 0
    bops = sum(macs(49, 7)[name] * entry["w"] * entry["a"] for name, entry in policy["layers"].items())
    assert asga.read_json("t/metrics.json")["policy_bops"] == bops

WITHOUT = """
import signal, sys, torch
def state():
    return torch.get_rng_state().tolist(), torch.get_num_threads(), signal.getsignal(signal.SIGINT)
before = state()
sys.modules.update(torchvision=None, PIL=None)
import asga
print(state() == before)
asga.Fused.on = False
x = torch.randn(2, 3, 32, 32)
print(*asga.quantize(asga.ResNet20(), 4, x)(x).shape)
print(asga.main(["search", "--arch", "resnet18", "--data", "digits", "--out", "x"]))
"""

def test_the_core_imports_without_torchvision_and_without_side_effects(tmp_path):
    out, err = python("-c", WITHOUT, cwd=tmp_path)
    assert out.splitlines() == ["True", "2 10", "2"]
    assert "pip install torchvision" in err and len(err.splitlines()) == 1 and not list(tmp_path.iterdir())

@real_data
@needs_torchvision
def test_search_on_cifar10_and_transfer_to_tinyimagenet50(tmp_path):
    data, flags = Path(DATA).resolve(), " --classes 0-4 --resolution 16 --batch-size 64 --augment flip"
    cli(f"search --data {data}/cifar10 --images 0.1 --fp-epochs 3 --steps 12 --out a" + flags, tmp_path)
    policy, metrics = asga.read_json(tmp_path / "a/policy.json"), asga.read_json(tmp_path / "a/metrics.json")
    assert policy["proxy"] == {"data": f"{data}/cifar10", "classes": 5, "images": 2500, "resolution": 16}
    assert metrics["full_precision"]["accuracy"] > 35 and metrics["supernet"]["accuracy"] > 30
    line = f"transfer a/policy.json --data {data}/tinyimagenet50 --weights a/weights.pt --fp-epochs 3"
    cli(line + " --epochs 1 --out b" + flags, tmp_path)
    metrics = asga.read_json(tmp_path / "b/metrics.json")
    assert metrics["policy_bops"] == pytest.approx(policy["cost"]["bops"], rel=1e-3)
    assert metrics["tuned"]["accuracy"] > 30 and metrics["tuned"]["loss"] < metrics["quantized"]["loss"]
