"""How flat is the place where a search or a transfer ended? Three measures, of its supernet.pt or model.pt.

    python evidence/flatness.py runs/search   --data PROXY  --out DIR
    python evidence/flatness.py runs/transfer --data TARGET --out DIR

They are written to DIR/flatness.json. Training images without augmentation, eval mode, so that BatchNorm's statistics stand still.
eigenvalue: the largest one (by magnitude) of the Hessian of the loss by the weights, quantizer steps and bitwidths held fixed: power
iteration, a product with the Hessian being the derivative of ⟨∇L, v⟩ through the straight-through gradients. gap: L(θ + ρ g/‖g‖) − L(θ)
with g the gradient of all these images, over all parameters; moves: how far that moves each kind of them at ρ = 0.05 (L2); cos: of g and of g_p there, by kind. noise: accuracy (val) with σ · rms(w) · N(0, 1) added to each weight
tensor, mean over draws. policy (of a search): accuracy of the policy taken from the supernet, with its BatchNorm statistics and with new ones.
"""
import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import asga  # noqa: E402

RADII, NOISE, DRAWS = (0.01, 0.05, 0.1), (0.05, 0.1), 3


def load(run, data, device):
    """(network with its quantizers, Data, resolution) of the folder of a search or transfer."""
    files = [run / name for name in ("supernet.pt", "model.pt") if (run / name).exists()]
    if not files or not (run / "config.json").exists():
        raise asga.AsgaError(f"{run} holds no supernet.pt and no model.pt: give the folder of a finished search or transfer")
    state = asga.read_checkpoint(files[0])
    try:
        settings = json.loads((run / "config.json").read_text())["settings"]
        if not state["policy"]:
            settings = asga.SearchConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})
    except (ValueError, KeyError, TypeError) as error:
        raise asga.AsgaError(f"{run / 'config.json'} is not of a search or transfer ({error})") from None
    data = asga.load_data(data, "data")
    if list(data.classes) != state["classes"]:
        raise asga.AsgaError(f"{files[0]} knows the classes {', '.join(state['classes'])[:60]}; --data {data.name} has others")
    model = asga.build(state["arch"], len(data.classes)).to(device)
    size = state["resolution"]
    for part in (data.train, data.val):
        part.size = min(data.size or size, size)
    if state["policy"]:
        net = asga.attach_quantizers(model, asga.Policy.from_json(state["policy"]).choices)
    else:
        names = list(asga.trace(model, torch.zeros(1, 3, size, size, device=device)))
        kept = asga.edge_bits(names, settings.keep)
        net = asga.attach_quantizers(model, {n: ((kept[n],),) * 2 if n in kept else (settings.candidates_w, settings.candidates_a)
                                             for n in names}, settings.relaxation, settings.tau)
    net.load_state_dict(state["state"])
    return net.to(device).eval(), data, size


def batches(part, count, size, device):
    """One batch: LSQ scales the gradient of a step by the batch, so several would not add up to the gradient of all."""
    index = torch.randperm(len(part), generator=torch.Generator().manual_seed(0))[:count]
    return [(asga.normalize(x, size), y) for x, y in part.batches([index], device)]


def gradient(net, params, pairs, graph=False):
    """Yields the gradients of the mean loss over all images, a batch at a time, to be summed."""
    total = sum(len(y) for _, y in pairs)
    for x, y in pairs:
        loss = F.cross_entropy(asga.first_output(net(x)), y, reduction="sum") / total
        yield loss, torch.autograd.grad(loss, params, create_graph=graph, allow_unused=True, materialize_grads=True)


def eigenvalue(net, pairs, rounds=100, tolerance=0.02):
    """(largest eigenvalue by magnitude, rounds that it took). Stops where ‖Hv − λv‖ is below the tolerance, as a share of |λ|: that λ no
    longer changes is no sign, it can stand on one eigenvalue for many rounds before a larger one takes over."""
    params = [m.weight for m in net.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    torch.manual_seed(0)
    v, value = [torch.randn_like(p) for p in params], 0.0
    for done in range(1, rounds + 1):
        norm = torch.nn.utils.get_total_norm(v)
        v = [a / norm for a in v]
        product = [torch.zeros_like(p) for p in params]
        for _, grads in gradient(net, params, pairs, graph=True):
            along = sum((g * a).sum() for g, a in zip(grads, v))
            torch._foreach_add_(product, torch.autograd.grad(along, params, allow_unused=True, materialize_grads=True))
        value = sum((a * b).sum() for a, b in zip(v, product)).item()
        if torch.nn.utils.get_total_norm([b - value * a for a, b in zip(v, product)]) <= tolerance * abs(value):
            break
        v = product
    return value, done


def gaps(net, pairs):
    """(L, ‖g‖, {kind: moves}, {kind: cos}, {ρ: L(θ + ρ g/‖g‖) − L(θ)}); the network is as before afterwards."""
    named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    params, kinds = [p for _, p in named], {}
    for i, (name, p) in enumerate(named):
        kind = name.rpartition(".")[2]
        kinds.setdefault(kind if kind in ("steps", "beta") else "weights" if p.dim() > 1 else "other", []).append(i)

    def whole():
        total, loss = [torch.zeros_like(p) for p in params], 0.0
        for part, grads in gradient(net, params, pairs):
            torch._foreach_add_(total, grads)
            loss += part.item()
        return loss, total

    loss, g = whole()
    norm = torch.nn.utils.get_total_norm(g).item()
    length = lambda grads, kind: torch.nn.utils.get_total_norm([grads[i] for i in kinds[kind]]).item()
    before, gap, cos = [p.detach().clone() for p in params], {}, {}
    for rho in RADII:
        with torch.no_grad():
            torch._foreach_add_(params, g, alpha=rho / norm)
        perturbed, g_p = whole()
        gap[rho] = perturbed - loss
        if rho == 0.05:
            for kind, members in kinds.items():
                dot = sum((g[i] * g_p[i]).sum().item() for i in members)
                cos[kind] = dot / max(length(g, kind) * length(g_p, kind), 1e-30)
        with torch.no_grad():
            torch._foreach_copy_(params, before)
    return loss, norm, {kind: 0.05 / norm * length(g, kind) for kind in kinds}, cos, gap


@torch.no_grad()
def noise(net, part, size, device):
    """{σ: accuracy}"""
    weights = [m.weight for m in net.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    before, found = [w.clone() for w in weights], {}
    for sigma in NOISE:
        accuracies = []
        for draw in range(DRAWS):
            generator = torch.Generator().manual_seed(draw)
            for w in weights:
                w.add_(torch.randn(w.shape, generator=generator).to(w) * sigma * w.square().mean().sqrt())
            accuracies.append(asga.evaluate(net, part, size, device)["accuracy"])
            torch._foreach_copy_(weights, before)
        found[sigma] = sum(accuracies) / DRAWS
    return found


@torch.no_grad()
def policy_accuracies(net, run, pairs, val, size, device):
    """Accuracy of the policy of a search, weights and steps as the supernet has them; statistics="new" as `search` reports it."""
    untuned = asga.attach_quantizers(net, asga.Policy.load(run / "policy.json").choices)
    found = {"old": asga.evaluate(untuned, val, size, device)["accuracy"]}
    asga.update_statistics(untuned, [x for x, _ in pairs])
    return {**found, "new": asga.evaluate(untuned, val, size, device)["accuracy"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=256, help="training images; the noise is judged on 2,500 of val")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    if args.images < 1:
        raise asga.AsgaError(f"--images {args.images} must be at least 1")
    device = asga.pick_device(args.device)
    net, data, size = load(args.run, args.data, device)
    asga.Fused.on = False                                                    # double backward takes the plain formulas anyway
    pairs = batches(data.train, args.images, size, device)
    loss, norm, moves, cos, gap = gaps(net, pairs)
    value, rounds = eigenvalue(net, pairs)
    val = data.val.subset(torch.randperm(len(data.val), generator=torch.Generator().manual_seed(0))[:2500])
    result = {"run": str(args.run), "images": args.images, "loss": loss, "grad_norm": norm, "eigenvalue": value, "rounds": rounds,
              "gap": gap, "moves": moves, "cos": cos, "accuracy": asga.evaluate(net, val, size, device)["accuracy"], "noise": noise(net, val, size, device)}
    if (args.run / "supernet.pt").exists():
        result["policy"] = policy_accuracies(net, args.run, batches(data.train, 2048, size, device), val, size, device)
    if rounds == 100:
        asga.say("the power iteration did not settle in 100 rounds: the eigenvalue is a lower bound")
    args.out.mkdir(parents=True, exist_ok=True)
    asga.write_json(args.out / "flatness.json", result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    try:
        main()
    except asga.AsgaError as error:
        print(f"flatness: error: {error}", file=sys.stderr)
        sys.exit(2)
