"""Policies by the simple ways that a sceptic would name first, within the same hard budget and by the same exact knapsack.

    python evidence/policies.py random      --arch resnet20 --data CIFAR --weights fp.pt --budget 2.4bit --seed 0 --out DIR
    python evidence/policies.py sensitivity …       loss increase of each tensor at each bitwidth, one tensor at a time
    python evidence/policies.py flow        …       change that one quantized tensor makes in all later layers; no labels, no gradient

They write DIR/policy.json, as `asga.py search` does. random: β drawn evenly from the candidates' range, projected onto the budget.
sensitivity: cross-entropy on proxy images of the training part, everything else in full precision, as in many sensitivity-based methods
(e.g. Dong et al. 2019, HAWQ, without the Hessian). flow: in the spirit of InfoQ (Akbulut et al. 2025, arXiv 2508.04753), which scores a layer by what its
quantization does to the mutual information in the rest of the network; here it is the relative squared change of all layers' outputs, which
is simpler.
"""
import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import asga  # noqa: E402


def random_penalties(run, seed):
    """{(w, a): Σ (b − β)²} a layer, for random β on the budget."""
    budget, generator = run.budget, torch.Generator().manual_seed(seed)
    share = torch.rand(2, len(budget.names), generator=generator, dtype=torch.float64).to(budget.lo)
    beta = budget.project(budget.lo + share * (budget.hi - budget.lo))
    return [{(w, a): float((w - bw) ** 2 + (a - ba) ** 2) for w in qw.bits for a in qa.bits}
            for qw, qa, bw, ba in zip(*run.quantizers, *beta)]


@torch.no_grad()
def one_at_a_time(run, measure):
    """The same of measure() with one tensor at one bitwidth, all others in full precision; 0 where nothing is quantized."""
    asga.set_quantizers(run.net, False)
    run.net.eval()
    base, scores = measure(), {}
    free = [q for row in run.quantizers for q in row if len(q.bits) > 1]
    progress = asga.Progress("tensors", len(free))
    for i, q in enumerate(free):
        q.enabled = True
        for b in q.bits:
            q.beta.fill_(b)
            scores[q, b] = measure() - base
        q.enabled = False
        progress.show(i + 1)
    return [{(w, a): scores.get((qw, w), 0.0) + scores.get((qa, a), 0.0) for w in qw.bits for a in qa.bits}
            for qw, qa in zip(*run.quantizers)]


def loss_of(run, batches):
    def measure():
        return sum(F.cross_entropy(asga.first_output(run.net(x)), y).item() for x, y in batches) / len(batches)
    return measure


def flow_of(run, x):
    """Mean over layers of ‖f_q − f‖²/‖f‖², f the layer's output in full precision."""
    reference, outputs = [], []
    for layer in asga.quantized_layers(run.net).values():
        layer.register_forward_hook(lambda m, args, out: outputs.append(out))

    def measure():
        outputs.clear()
        run.net(x)
        if not reference:
            reference.extend(outputs)
        return sum(((f - g).square().sum() / g.square().sum()).item() for f, g in zip(outputs, reference)) / len(reference)
    return measure


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("method", choices=["random", "sensitivity", "flow"])
    for name in ("arch", "data", "weights", "budget", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resolution", type=int, default=0)
    parser.add_argument("--cost-resolution", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--images", type=int, default=512, help="proxy images that sensitivity looks at; flow takes a sixteenth")
    args = parser.parse_args()
    target = Path(args.out) / "policy.json"
    if target.exists():
        raise asga.AsgaError(f"{target} is there already: give another --out, or delete it")
    cfg = asga.SearchConfig(arch=args.arch, data=args.data, weights=args.weights, budget=args.budget, seed=args.seed, augment="none",
                            resolution=args.resolution, cost_resolution=args.cost_resolution, device=args.device, batch_size=128)
    job = asga.Job(cfg, "search")
    budget, kept = asga.plan(job.model, job.example, cfg.budget, cfg)
    stream = job.stream()(0)
    batches = [next(stream) for _ in range(max(1, args.images // 128))]
    began = time.monotonic()
    run = asga.Search(job.model, budget, kept, cfg, [x for x, _ in batches[:4]])
    if args.method == "random":
        penalties = random_penalties(run, args.seed)
    else:
        penalties = one_at_a_time(run, loss_of(run, batches) if args.method == "sensitivity" else flow_of(run, batches[0][0][:max(1, args.images // 16)]))
    seconds = time.monotonic() - began
    policy = run.policy(arch=cfg.arch, versions=asga.versions(), proxy={"data": job.data.name, "images": args.images},
                        search={"method": args.method, "seed": args.seed, "seconds": round(seconds, 3), "device": asga.describe(job.device)})
    policy.layers = budget.choose(penalties)
    target.parent.mkdir(parents=True, exist_ok=True)
    policy.save(target)
    print(f"{args.method}: {asga.human(policy.bops)} BOPs of {asga.human(budget.limits.get('bops', 0))}, mean bits w {policy.mean_bits[0]:.2f} "
          f"a {policy.mean_bits[1]:.2f}, {seconds:.1f} s, {target}")


if __name__ == "__main__":
    try:
        main()
    except asga.AsgaError as error:
        print(f"policies: error: {error}", file=sys.stderr)
        sys.exit(2)
