"""Does the perturbed pass tell the bits anything that the plain gradient does not?

    python evidence/beta_gradient.py --data DIR --weights fp.pt --budget 2.4bit    flags of `asga.py search`
    python evidence/beta_gradient.py … --supernet RUN/supernet.pt                  at the end of a search

Prints a line of JSON, as in results/beta_gradient.jsonl, on g and g_p, the gradients of L and L_p (θ moved by
ρ_max along g, less α g) on each of 192 batches. Whole bits start where the slope jumps: take 2.4bit.
all      cos(g, g_p) over all parameters, mean of the batches; the rest is on β along the budget's surface
cos      g with g_p of a batch; g of two batches (mean over pairs); means over half of the batches with means
         over the others; from these, of the expected g and g_p: cos(g, g_p) / √(cos(g, g) cos(g_p, g_p))
length   of the expected g and g_p − g: √(‖mean‖² − its squared standard error); 0 where noise is all
p        share of random signs of the batches for which the mean of g_p − g is as long as ours
"""
import argparse
import itertools
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from common import asga, gradient, moved, planned, run
from torch.nn.utils import get_total_norm

BATCHES = 192

def beta_gradients(run, batches):
    """(g, g_p) of β along the budget's surface, [batches, free quantizers] float64, and cos(g, g_p) over all
    parameters [batches]. Both passes draw alike (dropout); the parameters are as before afterwards."""
    params = [p for p in run.net.parameters() if p.requires_grad]
    free = [len(q.bits) > 1 for q in run.quantizers]
    normal = F.normalize(run.budget.gradient(run.bits()).flatten()[free], dim=0)  # ∇ log C
    run.net.train()

    def gradients(i, x, y):
        with torch.random.fork_rng():
            torch.manual_seed(i)
            _, grads = gradient(run.net, params + run.beta, x, y)
        beta = torch.stack(grads[len(params):]).to(normal)
        return grads[:len(params)], beta - (beta @ normal) * normal

    found = []
    for i, (x, y) in enumerate(batches):
        g, g_beta = gradients(i, x, y)
        with moved(params, g, run.settings.rho_max / get_total_norm(g) - run.settings.alpha):
            g_p, g_p_beta = gradients(i, x, y)
        dot = sum((a * b).sum() for a, b in zip(g, g_p))
        found.append((g_beta, g_p_beta, dot / (get_total_norm(g) * get_total_norm(g_p))))
    return [torch.stack(part) for part in zip(*found)]

def summary(g, g_p):
    """What the file's head describes, of gradients [batches, free]."""
    def cosine(a, b):
        return F.cosine_similarity(a, b, dim=-1).mean().item()

    def halves(a, b):
        return (cosine(a[::2].mean(0), b[1::2].mean(0)) + cosine(a[1::2].mean(0), b[::2].mean(0))) / 2

    def length(v):
        return math.sqrt(max(0.0, (v.mean(0).square() - v.var(0) / len(v)).sum().item()))

    difference, n = g_p - g, len(g)
    pairs = (F.normalize(g, dim=1).sum(0).square().sum().item() - n) / (n * (n - 1))
    own, both, perturbed = halves(g, g), halves(g, g_p), halves(g_p, g_p)
    expected = both / math.sqrt(own * perturbed) if own > 0 and perturbed > 0 else math.nan
    cos = {"g, g_p": cosine(g, g_p), "g of two batches": pairs, "expected g, g_p": expected}
    cos |= {"halves: g, g": own, "halves: g, g_p": both, "halves: g_p, g_p": perturbed}
    signs = torch.randint(2, (999, n), generator=torch.Generator().manual_seed(0)).to(g) * 2 - 1
    as_long = (signs @ difference).norm(dim=1) >= difference.sum(0).norm()
    told = {"cos": cos, "length": {"expected g": length(g), "expected g_p − g": length(difference)},
            "p": {"g_p − g": (1 + as_long.sum().item()) / 1000}}
    return {kind: {name: round(v, 4) for name, v in values.items()} for kind, values in told.items()}

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--supernet", help="supernet.pt of a search with these flags")
    args, rest = parser.parse_known_args(argv)
    job, settings, budget = planned(rest)
    cfg = job.cfg
    if cfg.method == "uniform" or not cfg.weights:
        raise asga.AsgaError("this needs --weights, and a method that searches")
    run = asga.Search(job.model, budget, settings, job.inputs(4))
    if args.supernet:
        found = asga.read_checkpoint(args.supernet).get("state", {})
        if found.keys() != run.net.state_dict().keys():
            raise asga.AsgaError(f"{args.supernet} is of a search with other flags")
        run.net.load_state_dict(found)
    g, g_p, whole = beta_gradients(run, itertools.islice(job.stream(0), BATCHES))
    used = vars(cfg) | vars(settings)
    told = {key: used[key] for key in ("arch", "budget", "rho_max", "alpha", "seed", "batch_size")}
    told |= {"data": Path(cfg.data).name, "at": args.supernet or "start", "batches": BATCHES}
    told["all"] = {"cos": {"g, g_p": round(whole.mean().item(), 4)}}
    print(json.dumps({**told, **summary(g, g_p)}, ensure_ascii=False))

if __name__ == "__main__":
    run(main)
