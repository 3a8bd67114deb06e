"""How flat is the place where a search or a transfer ended? Measures of its supernet.pt or model.pt.

    python evidence/flatness.py runs/search   --data PROXY  --out DIR
    python evidence/flatness.py runs/transfer --data TARGET --out DIR

DIR/flatness.json holds them, of training images without augmentation, in eval mode:
eigenvalue   the largest (by magnitude) of the Hessian by the weights, at fixed quantizer steps and bitwidths
gap          L(θ + ρ g/‖g‖) − L(θ), g the gradient of all these images, over all parameters
moves, cos   by kind of parameter: how far ρ = 0.05 moves it (L2), and cos(g, the gradient there)
noise        accuracy (val) with σ · rms(w) · N(0, 1) added to each weight tensor, mean over draws
policy       of a search: its policy's accuracy, by the old BatchNorm statistics and by new ones
"""
import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils import get_total_norm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import asga  # noqa: E402

RADII, NOISE, DRAWS = (0.01, 0.05, 0.1), (0.05, 0.1), 3


def load(run, data, device):
    """(network with its quantizers, train, val, resolution) of the folder of a search or transfer."""
    files = [run / name for name in ("supernet.pt", "model.pt") if (run / name).exists()]
    if not files:
        raise asga.AsgaError(f"{run} holds no supernet.pt and no model.pt: give the folder of a finished run")
    saved, (classes, train, val) = asga.read_checkpoint(files[0]), asga.load_data(data, "data")
    if classes != saved["classes"]:
        raise asga.AsgaError(f"{files[0]} knows other classes than --data {data}")
    train.size = val.size = min(val.size or saved["resolution"], saved["resolution"])
    model, state, choices = asga.build(saved["arch"], len(classes)), saved["state"], {}
    for name in asga.layers_of(model):
        if f"{name}.weight_quantizer.grid" in state:
            kinds = "weight_quantizer", "input_quantizer"
            choices[name] = [tuple(state[f"{name}.{kind}.grid"][0].tolist()) for kind in kinds]
    net = asga.attach_quantizers(model, choices)
    net.load_state_dict(state)
    return net.to(device).eval(), train, val, saved["resolution"]


def drawn(total, count):
    return torch.randperm(total, generator=torch.Generator().manual_seed(0))[:count]


def batch(part, count, size, device):
    """(x, y) of `count` images: one batch, as LSQ scales the gradient of a step by the batch."""
    (images, y), = part.batches([drawn(len(part), count)], device)
    return asga.normalize(images, size), y


def gradient(net, params, x, y, graph=False):
    """(loss, its gradient by params)"""
    loss = F.cross_entropy(asga.first_output(net(x)), y)
    return loss, torch.autograd.grad(loss, params, create_graph=graph, materialize_grads=True)


def eigenvalue(net, x, y, rounds=100, tolerance=0.02):
    """(largest eigenvalue by magnitude, rounds of power iteration). H v is the derivative of ⟨∇L, v⟩ by
    straight-through gradients. It ends at ‖Hv − λv‖ ≤ tolerance · |λ|: λ itself may rest for long."""
    params = [layer.weight for layer in asga.layers_of(net).values()]
    torch.manual_seed(0)
    product = [torch.randn_like(p) for p in params]
    _, g = gradient(net, params, x, y, graph=True)
    for done in range(1, rounds + 1):
        norm = get_total_norm(product)
        v = [a / norm for a in product]
        product = torch.autograd.grad(g, params, v, retain_graph=True, materialize_grads=True)
        value = sum((a * b).sum() for a, b in zip(v, product)).item()
        if get_total_norm([b - value * a for a, b in zip(v, product)]) <= tolerance * abs(value):
            return value, done
    return value, rounds


def gaps(net, x, y):
    """{"loss", "grad_norm", "moves", "cos", "gap"}; the network is as before afterwards."""
    params, kinds = [], {}
    for name, p in net.named_parameters():
        if p.requires_grad:
            kind = name.rpartition(".")[2]
            if kind not in ("steps", "beta"):
                kind = "weights" if p.dim() > 1 else "other"
            kinds.setdefault(kind, []).append(len(params))
            params.append(p)
    loss, g = gradient(net, params, x, y)
    norm, before = get_total_norm(g), [p.detach().clone() for p in params]
    found = {"loss": loss.item(), "grad_norm": norm.item(), "moves": {}, "cos": {}, "gap": {}}
    for rho in RADII:
        with torch.no_grad():
            torch._foreach_add_(params, g, alpha=rho / norm.item())
        perturbed, g_p = gradient(net, params, x, y)
        found["gap"][rho] = (perturbed - loss).item()
        for kind, members in kinds.items() if rho == 0.05 else ():
            a, b = (torch.cat([grads[i].flatten() for i in members]).double() for grads in (g, g_p))
            found["moves"][kind] = (rho / norm * a.norm()).item()
            found["cos"][kind] = F.cosine_similarity(a, b, dim=0).item()
        with torch.no_grad():
            torch._foreach_copy_(params, before)
    return found


@torch.no_grad()
def noise(net, accuracy):
    """{σ: accuracy}; the network is as before afterwards."""
    weights, found = [layer.weight for layer in asga.layers_of(net).values()], {}
    before = [w.clone() for w in weights]
    for sigma in NOISE:
        accuracies = []
        for draw in range(DRAWS):
            generator = torch.Generator().manual_seed(draw)
            for w in weights:
                w.add_(torch.randn(w.shape, generator=generator).to(w) * sigma * w.square().mean().sqrt())
            accuracies.append(accuracy(net))
            torch._foreach_copy_(weights, before)
        found[sigma] = sum(accuracies) / DRAWS
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=256, help="training images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.images < 1:
        raise asga.AsgaError(f"--images {args.images} must be at least 1")
    device = torch.device(args.device)
    net, train, val, size = load(args.run, args.data, device)
    asga.Fused.on = False  # the double backward takes the plain formulas anyway
    x, y = batch(train, args.images, size, device)
    result = {"run": str(args.run), "images": args.images, **gaps(net, x, y)}
    result["eigenvalue"], result["rounds"] = eigenvalue(net, x, y)
    judged = torch.zeros(len(val), dtype=torch.bool)
    judged[drawn(len(val), 2500)] = True
    val = val.subset(judged)

    def accuracy(net):
        return asga.evaluate(net, val, size, device)["accuracy"]

    result.update(accuracy=accuracy(net), noise=noise(net, accuracy))
    if (args.run / "supernet.pt").exists():
        untuned = asga.attach_quantizers(net, asga.Policy.load(args.run / "policy.json").layers)
        old = accuracy(untuned)
        torch.optim.swa_utils.update_bn([batch(train, 2048, size, device)], untuned)
        result["policy"] = {"old": old, "new": accuracy(untuned)}
    if result["rounds"] == 100:
        asga.say("the power iteration did not settle in 100 rounds: the eigenvalue is a lower bound")
    args.out.mkdir(parents=True, exist_ok=True)
    asga.write_json(args.out / "flatness.json", result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    try:
        main()
    except asga.AsgaError as error:
        sys.exit(f"flatness: error: {error}")
