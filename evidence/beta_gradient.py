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
from common import asga, run, settings_of
from torch.nn.utils import get_total_norm

BATCHES = 192

def beta_gradients(run, batches):
    """(g, g_p) of β along the budget's surface, [batches, free quantizers] float64, and cos(g, g_p) over all
    parameters [batches]. Both passes draw alike (dropout); the parameters are as before afterwards."""
    params = [p for p in run.net.parameters() if p.requires_grad]
    free = [len(q.bits) > 1 for q in run.quantizers]
    normal = F.normalize(run.budget.gradient(run.bits()).flatten()[free], dim=0)  # ∇ log C
    run.net.train()

    def gradient(i, x, y):
        with torch.random.fork_rng():
            torch.manual_seed(i)
            loss = F.cross_entropy(asga.first_output(run.net(x)), y)
        grads = torch.autograd.grad(loss, params + run.beta, materialize_grads=True)
        beta = torch.stack(grads[len(params):]).to(normal)
        return grads[:len(params)], beta - (beta @ normal) * normal

    found = []
    for i, (x, y) in enumerate(batches):
        g, g_beta = gradient(i, x, y)
        before, scale = [p.detach().clone() for p in params], run.settings.rho_max / get_total_norm(g)
        torch._foreach_add_([p.data for p in params], torch._foreach_mul(g, scale - run.settings.alpha))
        g_p, g_p_beta = gradient(i, x, y)
        torch._foreach_copy_([p.data for p in params], before)
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
    cfg = asga.parse(["search", *rest])
    if cfg.method == "uniform" or not cfg.data or not cfg.weights:
        raise asga.AsgaError("this needs --data, --weights, and a method that searches")
    job = asga.Job(cfg, "policy.json")
    settings = settings_of(cfg)
    plan = asga.plan(job.model, job.example, cfg.budget, settings)
    run = asga.Search(job.model, plan, settings, job.inputs(4))
    if args.supernet:
        found = asga.read_checkpoint(args.supernet).get("state", {})
        if found.keys() != run.net.state_dict().keys():
            raise asga.AsgaError(f"{args.supernet} is of a search with other flags")
        run.net.load_state_dict(found)
    g, g_p, whole = beta_gradients(run, itertools.islice(job.stream(0), BATCHES))
    at = "/".join(Path(args.supernet).parts[-2:]) if args.supernet else "start"
    told = {"arch": cfg.arch, "data": Path(cfg.data).name, "budget": cfg.budget, "at": at}
    told |= {"rho": settings.rho_max, "alpha": settings.alpha, "seed": cfg.seed}
    told |= {"batches": BATCHES, "batch_size": cfg.batch_size, "free": len(run.beta)}
    told["all"] = {"cos": {"g, g_p": round(whole.mean().item(), 4)}}
    print(json.dumps({**told, **summary(g, g_p)}, ensure_ascii=False))

if __name__ == "__main__":
    run(main)
