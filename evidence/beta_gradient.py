"""Does the perturbed pass tell the bits anything that the plain gradient does not? At the start of a search, or at its end.

    python evidence/beta_gradient.py --data DIR --weights fp.pt --budget 2.4bit                      flags of `asga.py search`
    python evidence/beta_gradient.py --data DIR --weights fp.pt --budget 2.4bit --supernet RUN/supernet.pt

Prints one line of JSON (results/beta_gradient.jsonl holds ours). At a budget of whole bits the start is on a candidate, where the slopes to its two sides
differ and the least move changes g: take 2.4bit or 3.5bit. On each of --batches batches of the search: g and g_p, the gradients of L and L_p (θ moved by ρ_max along g,
less α g), their parts for β, and of these the part along the budget's surface, as the search moves no other way. cos: of g with
g_p on the same batch; of the means over batches; of the mean g with the mean (g + g_p)/2, which ASGA steps along; of the g of two batches (mean over pairs):
the noise that a difference has to rise above. length: of the mean g, of the mean of g_p − g, and the standard error of the latter.
"""
import argparse
import itertools
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import asga  # noqa: E402


def beta_gradients(run, batches, loss_fn=F.cross_entropy):
    """(g, g_p) of β along the budget's surface, [batches, free quantizers] float64. The network's parameters are as before afterwards."""
    params = [p for p in run.net.parameters() if p.requires_grad]
    place = {id(p): i for i, p in enumerate(params)}
    free = torch.tensor([[len(q.bits) > 1 for q in row] for row in run.quantizers], device=run.budget.lo.device)
    normal = F.normalize(run.budget.gradient(run.bits())[free], dim=0)                                        # ∇ log C of what is free
    run.net.train()

    def gradient(x, y):
        grads = torch.autograd.grad(loss_fn(asga.first_output(run.net(x)), y), params, allow_unused=True, materialize_grads=True)
        beta = torch.stack([grads[place[id(q.beta)]] for q in run.free]).to(normal)
        return grads, beta - (beta @ normal) * normal

    found = []
    for x, y in batches:
        g, g_beta = gradient(x, y)
        before = [p.detach().clone() for p in params]
        scale = run.settings.rho_max / torch.nn.utils.get_total_norm(g) - run.settings.alpha
        try:
            with torch.no_grad():
                torch._foreach_add_(params, torch._foreach_mul(g, scale))
            found.append((g_beta, gradient(x, y)[1]))
        finally:
            with torch.no_grad():
                torch._foreach_copy_(params, before)
    return [torch.stack(part) for part in zip(*found)]


def summary(g, g_p):
    """What the file's head describes, rounded."""
    cos, difference = (lambda a, b: F.cosine_similarity(a, b, dim=-1).mean().item()), g_p - g
    pairs = [cos(a, b) for a, b in itertools.combinations(g, 2)]
    result = {"cos": {"g, g_p": cos(g, g_p), "means of g, g_p": cos(g.mean(0), g_p.mean(0)), "means of g, (g + g_p)/2": cos(g.mean(0), (g + g_p).mean(0)),
                      "g of two batches": sum(pairs) / len(pairs)},
              "length": {"mean g": g.mean(0).norm().item(), "mean g_p − g": difference.mean(0).norm().item(),
                         "its standard error": (difference.std(0) / len(g) ** 0.5).norm().item()}}
    return {kind: {name: round(value, 4) for name, value in values.items()} for kind, values in result.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--supernet", help="supernet.pt of a search with these flags; its start by default")
    args, rest = parser.parse_known_args()
    if args.batches < 2:
        raise asga.AsgaError(f"--batches {args.batches} must be at least 2")
    _, cfg = asga.parse(["search", *rest])
    if cfg.method == "uniform" or cfg.relaxation != "interpolate" or not cfg.data or not cfg.weights:
        raise asga.AsgaError("this needs --data, --weights, and a search with β (--relaxation interpolate, not --method uniform)")
    job = asga.Job(cfg, "search")
    budget, kept = asga.plan(job.model, job.example, cfg.budget, cfg)
    run = asga.Search(job.model, budget, kept, cfg, job.inputs(4))
    if args.supernet:
        state = asga.read_checkpoint(args.supernet)
        if state.get("format") != "asga-supernet" or state["arch"] != cfg.arch:
            raise asga.AsgaError(f"--supernet {args.supernet} is no supernet of {cfg.arch}: give the supernet.pt of a search with the same flags")
        run.net.load_state_dict(state["state"])
    g, g_p = beta_gradients(run, itertools.islice(job.stream()(0), args.batches))
    print(json.dumps({"arch": cfg.arch, "data": Path(cfg.data).name, "budget": cfg.budget, "at": "/".join(Path(args.supernet).parts[-2:]) if args.supernet else "start", "rho": cfg.rho_max, "seed": cfg.seed,
                      "batches": args.batches, "batch_size": cfg.batch_size, "free": len(run.free), **summary(g, g_p)}, ensure_ascii=False))


if __name__ == "__main__":
    try:
        main()
    except asga.AsgaError as error:
        print(f"beta_gradient: error: {error}", file=sys.stderr)
        sys.exit(2)
