"""Policies by the simple ways that a sceptic would name first, within the same hard budget and by the same exact knapsack.

    python evidence/policies.py random      --arch resnet20 --data CIFAR --weights fp.pt --budget 2.4bit --seed 0 --out DIR
    python evidence/policies.py sensitivity …       loss increase of each tensor at each bitwidth, one tensor at a time
    python evidence/policies.py flow        …       change that one quantized tensor makes in all later layers; no labels, no gradient

    python evidence/policies.py loss-weight-joint …   differentiable, the cost as a term of the loss; loss-weight-asga: the same with ASGA

They write DIR/policy.json, as `asga.py search` does. random: β drawn evenly from the candidates' range, projected onto the budget.
sensitivity: cross-entropy on proxy images of the training part, everything else in full precision, as in many sensitivity-based methods
(e.g. Dong et al. 2019, HAWQ, without the Hessian). flow: in the spirit of InfoQ (Akbulut et al. 2025, arXiv 2508.04753), which scores a
layer by what its quantization does to the mutual information in the rest of the network; here it is the relative squared change of all
layers' outputs, which is simpler. loss-weight: after EdMIPS (Cai & Vasconcelos 2020): softmax over all candidates, evenly weighted at the
start, L + λ C/C*, no projection; λ is --loss-weight. At the end the knapsack puts it on the same budget.
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
    for m in run.net.modules():
        if isinstance(m, torch.nn.modules.batchnorm._BatchNorm):
            m.train()                                   # statistics of the batch at hand: those of full precision would mislead at few bits
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


class LossWeight(asga.Search):
    """A search whose cost is a term of the loss (EdMIPS), not a constraint."""

    def _start(self):
        pass                                                                                             # logits 0: all candidates alike

    def project(self):
        pass

    def loss(self, weight):
        def loss_fn(logits, y):
            bits = torch.stack([torch.stack([q.expected_bits() for q in row]) for row in self.quantizers])
            return F.cross_entropy(logits, y) + weight * self.budget.spent(bits)
        return loss_fn


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=["random", "sensitivity", "flow", "loss-weight-joint", "loss-weight-asga"])
    for name in ("arch", "data", "weights", "budget", "out"):
        parser.add_argument(f"--{name}", required=True)
    for name, default in (("seed", 0), ("resolution", 0), ("cost-resolution", 0), ("steps", 200), ("batch-size", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--images", type=int, default=512, help="proxy images that sensitivity looks at; flow takes a sixteenth")
    parser.add_argument("--loss-weight", type=float, default=0.3, help="λ of loss-weight-…: at 0.3 the search on CIFAR-10 ends near the budget, at 0.1 at 1.5 times")
    args = parser.parse_args()
    if args.images < 1 or args.steps < 1:
        raise asga.AsgaError(f"--images {args.images} and --steps {args.steps} must be at least 1")
    searched = args.method.startswith("loss-weight")
    cfg = asga.SearchConfig(arch=args.arch, data=args.data, weights=args.weights, budget=args.budget, seed=args.seed, out=args.out,
                            resolution=args.resolution, cost_resolution=args.cost_resolution, device=args.device, batch_size=args.batch_size,
                            steps=args.steps, method=args.method.rpartition("-")[2] if searched else "joint",
                            relaxation="softmax" if searched else "interpolate", augment="auto" if searched else "none")
    job = asga.Job(cfg, args.method)
    budget, kept = asga.plan(job.model, job.example, cfg.budget, cfg)
    job.start("policy.json")
    if args.method != "random":
        job.full_precision()                                                # as `search`: where --weights are empty or of other classes
    stream, size = job.stream()(0), min(args.batch_size, args.images)
    batches = [next(stream) for _ in range(max(4, args.images // size))]
    began = time.monotonic()
    run = (LossWeight if searched else asga.Search)(job.model, budget, kept, cfg, [x for x, _ in batches[:4]])
    seconds = time.monotonic() - began
    if searched:
        loss = run.loss(args.loss_weight)
        seconds += job.run.loop("search", cfg.steps, job.stream(), lambda x, y, done: run.step(x, y, loss, done), {"search": run},
                                lambda r: {"loss": f"{r['loss']:.4f}", "cost": f"{asga.human(r['expected_cost'])}BOPs"})
    elif args.method == "random":
        penalties = random_penalties(run, args.seed)
    else:
        measure = loss_of(run, batches[:max(1, args.images // size)]) if args.method == "sensitivity" else \
            flow_of(run, batches[0][0][:max(1, args.images // 16)])
        penalties = one_at_a_time(run, measure)
        seconds = time.monotonic() - began
    policy = run.policy(arch=cfg.arch, versions=asga.versions(), proxy={"data": job.data.name, "images": len(job.train) if searched else args.images},
                        search={"method": args.method, "seed": args.seed, "seconds": round(seconds, 3), "device": asga.describe(job.device),
                                "spent": budget.spent(run.bits()).item(), "settings": vars(args)})
    if not searched:
        policy.layers = budget.choose(penalties)
    policy.save(Path(args.out) / "policy.json")
    job.run.finish("search")
    print(f"{args.method}: {asga.human(policy.bops)} BOPs for the budget {args.budget}, mean bits w {policy.mean_bits[0]:.2f} "
          f"a {policy.mean_bits[1]:.2f}, {seconds:.1f} s, {Path(args.out) / 'policy.json'}")


if __name__ == "__main__":
    try:
        main()
    except asga.AsgaError as error:
        print(f"policies: error: {error}", file=sys.stderr)
        sys.exit(2)
    except (asga.Stopped, KeyboardInterrupt) as stop:
        print(f"policies: {str(stop) or 'stopped'}; the same command goes on", file=sys.stderr)
        sys.exit(130)
