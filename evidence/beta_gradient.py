"""Does the perturbed pass tell the bits anything that the plain gradient does not? At the start of a search, or at its end.

    python evidence/beta_gradient.py --data DIR --weights fp.pt --budget 2.4bit                      flags of `asga.py search`
    python evidence/beta_gradient.py --data DIR --weights fp.pt --budget 2.4bit --supernet RUN/supernet.pt

Prints one line of JSON (results/beta_gradient.jsonl holds ours). At a budget of whole bits the start is on a candidate, where the slopes to its two sides
differ and the least move changes g: take 2.4bit or 3.5bit. On each of --batches batches of the search: g and g_p, the gradients of L and L_p (θ moved by ρ_max along g,
less α g). all: their cosine over all parameters, mean of the batches. The rest is of their parts for β along the budget's surface, as the search moves no other
way. cos: of g with g_p on the same batch; of the g of two batches (mean over pairs); of means over one half of the batches with means over the other, so that both have
noise of their own; and what the last three say of the expected g and g_p, without noise: cos(g, g_p) / √(cos(g, g) cos(g_p, g_p)). length: of the expected g
and g_p − g, that is √(‖mean‖² − its squared standard error); 0 where noise is all. p: the share of random signs of the batches for which the mean of g_p − g is as
long as ours, the chance of its length if the perturbed pass told nothing new.
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
    """(g, g_p) of β along the budget's surface, [batches, free quantizers] float64, and cos(g, g_p) over all parameters [batches]. As in the optimizer
    both passes have the same random draws (dropout), and the parameters are as before afterwards."""
    params, total_norm = [p for p in run.net.parameters() if p.requires_grad], torch.nn.utils.get_total_norm
    place = {id(p): i for i, p in enumerate(params)}
    free = torch.tensor([[len(q.bits) > 1 for q in row] for row in run.quantizers], device=run.budget.lo.device)
    normal = F.normalize(run.budget.gradient(run.bits())[free], dim=0)                                        # ∇ log C of what is free
    run.net.train()

    def gradient(i, x, y):
        with torch.random.fork_rng():
            torch.manual_seed(i)
            grads = torch.autograd.grad(loss_fn(asga.first_output(run.net(x)), y), params, allow_unused=True, materialize_grads=True)
        beta = torch.stack([grads[place[id(q.beta)]] for q in run.free]).to(normal)
        return grads, beta - (beta @ normal) * normal

    found = []
    for i, (x, y) in enumerate(batches):
        g, g_beta = gradient(i, x, y)
        before = [p.detach().clone() for p in params]
        scale = run.settings.rho_max / total_norm(g) - run.settings.alpha
        try:
            with torch.no_grad():
                torch._foreach_add_(params, torch._foreach_mul(g, scale))
            g_p, g_p_beta = gradient(i, x, y)
            found.append((g_beta, g_p_beta, sum((a * b).sum() for a, b in zip(g, g_p)) / (total_norm(g) * total_norm(g_p))))
        finally:
            with torch.no_grad():
                torch._foreach_copy_(params, before)
    return [torch.stack(part) for part in zip(*found)]


def summary(g, g_p):
    """What the file's head describes, rounded."""
    cos, difference = (lambda a, b: F.cosine_similarity(a, b, dim=-1).mean().item()), g_p - g
    half = lambda a, b: (cos(a[::2].mean(0), b[1::2].mean(0)) + cos(a[1::2].mean(0), b[::2].mean(0))) / 2
    length = lambda v: max(0.0, (v.mean(0).square() - v.var(0) / len(v)).sum().item()) ** 0.5
    pairs = [cos(a, b) for a, b in itertools.combinations(g, 2)]
    halves = {"g, g": half(g, g), "g, g_p": half(g, g_p), "g_p, g_p": half(g_p, g_p)}
    reliable = halves["g, g"] > 0 and halves["g_p, g_p"] > 0
    signs = torch.randint(2, (999, len(g)), generator=torch.Generator().manual_seed(0)).to(g) * 2 - 1
    as_long = (signs @ difference).norm(dim=1) >= difference.sum(0).norm()
    result = {"cos": {"g, g_p": cos(g, g_p), "g of two batches": sum(pairs) / len(pairs), **{f"halves: {k}": v for k, v in halves.items()},
                      "expected g, g_p": halves["g, g_p"] / (halves["g, g"] * halves["g_p, g_p"]) ** 0.5 if reliable else float("nan")},
              "length": {"expected g": length(g), "expected g_p − g": length(difference)}, "p": {"g_p − g": (1 + as_long.sum().item()) / 1000}}
    return {kind: {name: round(value, 4) for name, value in values.items()} for kind, values in result.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=192)
    parser.add_argument("--supernet", help="supernet.pt of a search with these flags; its start by default")
    args, rest = parser.parse_known_args()
    if args.batches < 4:
        raise asga.AsgaError(f"--batches {args.batches} must be at least 4")
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
    g, g_p, whole = beta_gradients(run, itertools.islice(job.stream()(0), args.batches))
    print(json.dumps({"arch": cfg.arch, "data": Path(cfg.data).name, "budget": cfg.budget, "at": "/".join(Path(args.supernet).parts[-2:]) if args.supernet else "start", "rho": cfg.rho_max, "alpha": cfg.alpha, "seed": cfg.seed,
                      "batches": args.batches, "batch_size": cfg.batch_size, "free": len(run.free), "all": {"cos": {"g, g_p": round(whole.mean().item(), 4)}}, **summary(g, g_p)}, ensure_ascii=False))


if __name__ == "__main__":
    try:
        main()
    except asga.AsgaError as error:
        print(f"beta_gradient: error: {error}", file=sys.stderr)
        sys.exit(2)
