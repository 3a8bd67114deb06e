"""Policies by the ways that a sceptic names first, on the same hard budget and by the same exact knapsack.

    python evidence/policies.py METHOD --arch resnet20 --data DIR --weights fp.pt --budget 2.4bit --out OUT

makes OUT/policy.json; more flags are those of `asga.py search`. METHOD is one of
    random              β drawn evenly from the candidates' range, projected onto the budget
    sensitivity         loss that each tensor adds alone at each bitwidth (HAWQ 2019, without the Hessian), on
                        four batches; flow: change of all layers' outputs (after InfoQ, arXiv 2508.04753)
    softmax-joint       search that mixes all candidates, π = softmax(logits); softmax-asga: by ASGA
    loss-weight-joint   so too, but from even mixtures by L + λ C/C*, as EdMIPS (Cai & Vasconcelos 2020) does,
                        with the budget kept at the end alone; loss-weight-asga: by ASGA
"""
import argparse
import itertools
import time
from statistics import mean

import torch
import torch.nn.functional as F
from common import asga, planned, run
from scipy.optimize import brentq
from torch import nn

METHODS = "random sensitivity flow softmax-joint softmax-asga loss-weight-joint loss-weight-asga".split()
LOSS_WEIGHT = 0.3  # λ, which ends near the budget

class SoftmaxQuantizer(asga.Quantizer):
    """Σ π_b Q_b(x) over all candidates b, π = softmax(logits); `beta` is E[b]."""

    @property
    def beta(self):
        return (torch.softmax(self.logits, 0) * self.grid[0]).sum()

    @staticmethod
    def mixtures(quantizers):
        s = torch.stack([q.steps for q in quantizers])  # [Q, K]
        _, n, p = torch.stack([q.grid for q in quantizers], 1)
        pi = torch.softmax(torch.stack([q.logits for q in quantizers]), 1)
        s = s.detach().clamp_min(asga.STEP_MIN) + (s - s.detach())
        return torch.stack([s, n, p, pi], 1)

class SoftmaxSearch(asga.Search):
    """asga.Search with softmax mixtures: in place of β their logits learn, and are tilted onto the budget.
    With a weight the loss has the cost as a term, and nothing is tilted."""

    def __init__(self, *args, weight=0.0):
        self.weight, self.logits = weight, []  # none as long as the parent prepares
        super().__init__(*args, self.loss)
        for q in self.quantizers:
            del q.beta
            q.logits = nn.Parameter(torch.zeros_like(q.steps))
            q.__class__ = SoftmaxQuantizer
        self.logits = [q.logits for q in self.quantizers]
        self.candidates = nn.utils.rnn.pad_sequence([q.grid[0] for q in self.quantizers], True)  # [2L, K]
        self.optimizer.param_groups[-1]["params"] = self.logits
        self.tilt(torch.ones_like(self.budget.lo))

    def loss(self, outputs, y):
        bits = torch.stack([q.beta for q in self.quantizers]).view(2, -1)
        return F.cross_entropy(outputs, y) + self.weight * self.budget.spent(bits)

    def write(self, bits):
        """The end of the parent's step, for its projected β."""
        if self.logits:
            self.tilt(self.budget.gradient(self.bits()))

    @torch.no_grad()
    def tilt(self, slope):
        """z ← z − t · slope · b with the t that spends the budget: of all distributions on it the nearest by
        the Kullback-Leibler divergence. slope: [2, L]."""
        if self.weight:
            return
        z = nn.utils.rnn.pad_sequence(self.logits, batch_first=True, padding_value=-torch.inf).double()
        direction = slope.view(-1, 1) * self.candidates  # [2L, K]

        def excess(t):
            bits = (torch.softmax(z - t * direction, 1) * self.candidates).sum(1)
            return self.budget.spent(bits.view(2, -1)).item() - 1

        end = 100 / slope[slope > 0].min().item()  # there one candidate alone is left
        z -= brentq(excess, -end, end) * direction
        for logits, row in zip(self.logits, z):
            logits.copy_(row[:len(logits)])

    def penalties(self):
        """[{bits: −log π}]"""
        pairs = zip(self.quantizers, self.logits)
        return [dict(zip(q.bits, (-torch.log_softmax(z.detach().double(), 0)).tolist())) for q, z in pairs]

def choose(run, penalties):
    """The layers of least penalty within the budget. penalties: {bits: float} for each of run.quantizers."""
    rows = zip(penalties[:len(run.budget.layers)], penalties[len(run.budget.layers):])
    return run.budget.choose([{(w, a): of_w[w] + of_a[a] for w in of_w for a in of_a} for of_w, of_a in rows])

def distances(run, seed):
    """[{bits: (bits − β)²}] of β drawn evenly and projected onto the budget."""
    budget, generator = run.budget, torch.Generator().manual_seed(seed)
    share = torch.rand(budget.lo.shape, generator=generator, dtype=torch.float64).to(budget.lo)
    beta = budget.project(budget.lo + share * (budget.hi - budget.lo)).flatten().tolist()
    return [{b: (b - goal) ** 2 for b in q.bits} for q, goal in zip(run.quantizers, beta)]

@torch.no_grad()
def one_at_a_time(run, measure):
    """[{bits: what measure() gains with this tensor alone quantized}], BatchNorm going by the batch."""
    for m in run.net.modules():
        m.training = isinstance(m, nn.modules.batchnorm._BatchNorm)
    for q in run.quantizers:
        q.enabled = False
    base, gains = measure(), [{} for q in run.quantizers]
    for q, gain in zip(run.quantizers, gains):
        q.enabled = True
        for b in q.bits:
            q.beta.fill_(b)
            gain[b] = measure() - base
        q.enabled = False
    return gains

def loss(net, batches):
    """A measure: the mean cross-entropy."""
    return mean(F.cross_entropy(asga.first_output(net(x)), y).item() for x, y in batches)

def flow_of(net, x):
    """A measure: the mean over layers of ‖f_q − f‖²/‖f‖², f the layer's output at the first call."""
    reference, outputs = [], []
    for layer in asga.quantized_layers(net).values():
        layer.register_forward_hook(lambda module, inputs, output: outputs.append(output))

    def measure():
        outputs.clear()
        net(x)
        reference.extend(outputs[len(reference):])
        return mean(((f - g).square().sum() / g.square().sum()).item() for f, g in zip(outputs, reference))
    return measure

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("method", choices=METHODS)
    args, flags = parser.parse_known_args(argv)
    kind, _, method = args.method.rpartition("-")
    how = ["--method", method] if kind else ["--augment", "none", "--method", "joint"]
    job, settings, budget = planned(["--steps", "200", *flags, *how])
    cfg = job.cfg
    job.start()
    if method != "random":
        job.full_precision()  # as `search`, where none is given
    batches = list(itertools.islice(job.stream(0), 4))
    setup = job.model, budget, settings, [x for x, _ in batches]
    began = time.monotonic()
    run = SoftmaxSearch(*setup, weight=LOSS_WEIGHT * (kind == "loss-weight")) if kind else asga.Search(*setup)
    if method == "random":
        penalties = distances(run, cfg.seed)
    elif method == "sensitivity":
        penalties = one_at_a_time(run, lambda: loss(run.net, batches))
    elif method == "flow":
        penalties = one_at_a_time(run, flow_of(run.net, batches[0][0][:32]))
    seconds = time.monotonic() - began
    if kind:
        seconds += job.loop("search", cfg.steps, run.step, run.net, run.optimizer)
        penalties = run.penalties()
    policy = run.policy(arch=cfg.arch, proxy={"data": cfg.data, "images": len(job.train)}, search={
        "method": args.method, "seed": cfg.seed, "seconds": round(seconds, 3), "settings": job.settings,
        "device": asga.describe(job.device), "spent": budget.spent(run.bits()).item()})
    policy.layers = choose(run, penalties)
    policy.save(job.out / "policy.json")
    print(f"{args.method}: {asga.human(policy.bops)} BOPs, at most {cfg.budget}")

if __name__ == "__main__":
    run(main)
