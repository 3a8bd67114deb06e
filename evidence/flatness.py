"""How flat is the place where a search or a transfer ended? Measures of its supernet.pt or model.pt.

    python evidence/flatness.py runs/search   --data PROXY  --out DIR
    python evidence/flatness.py runs/transfer --data TARGET --out DIR

DIR/flatness.json holds them, of 256 training images without augmentation, in eval mode:
eigenvalue   the largest (by magnitude) of the Hessian by the weights, at fixed quantizer steps and bitwidths
gap          L(θ + ρ g/‖g‖) − L(θ) at ρ = 0.05, g the gradient of all these images, over all parameters
moves, cos   by kind of parameter: how far that moves it (L2), and cos(g, the gradient there)
noise        accuracy (val) with σ · rms(w) · N(0, 1) added to each weight, σ = 0.1, mean of three draws
policy       of a search: its policy's accuracy, by the old BatchNorm statistics and by new ones
"""
import argparse
import json
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from common import asga, gradient, moved, run
from torch.nn.utils import get_total_norm

IMAGES, JUDGED, RHO, SIGMA, DRAWS, ROUNDS = 256, 2500, 0.05, 0.1, 3, 100

def load(run, data, device):
    """(network with its quantizers, train, val, resolution) of the folder of a search or transfer."""
    path = run / ("supernet.pt" if (run / "supernet.pt").exists() else "model.pt")
    saved, (classes, train, val) = asga.read_checkpoint(path), asga.load_data(data, "data")
    if classes != saved["classes"]:
        raise asga.AsgaError(f"{path} knows other classes than --data {data}")
    train.size = val.size = min(val.size or saved["resolution"], saved["resolution"])
    model, state, choices = asga.build(saved["arch"], len(classes)), saved["state"], {}
    for name in asga.layers_of(model):
        if f"{name}.weight_quantizer.grid" in state:
            kinds = "weight_quantizer", "input_quantizer"
            choices[name] = [tuple(state[f"{name}.{kind}.grid"][0].tolist()) for kind in kinds]
    net = asga.attach_quantizers(model, choices)
    net.load_state_dict(state)
    return net.to(device).eval(), train, val, saved["resolution"]

def batch(part, count, size, device):
    """(x, y) of `count` images: one batch, as LSQ scales the gradient of a step by the batch."""
    drawn = torch.randperm(len(part), generator=torch.Generator().manual_seed(0))[:count]
    (images, y), = part.batches([drawn], device)
    return asga.normalize(images, size), y

def eigenvalue(net, x, y, tolerance=0.02):
    """(largest eigenvalue by magnitude, rounds of power iteration). H v is the derivative of ⟨∇L, v⟩ by
    straight-through gradients. It ends at ‖Hv − λv‖ ≤ tolerance · |λ|: λ itself may rest for long."""
    params = [layer.weight for layer in asga.layers_of(net).values()]
    torch.manual_seed(0)
    product = [torch.randn_like(p) for p in params]
    _, g = gradient(net, params, x, y, graph=True)
    for done in range(1, ROUNDS + 1):
        norm = get_total_norm(product)
        v = [a / norm for a in product]
        product = torch.autograd.grad(g, params, v, retain_graph=True, materialize_grads=True)
        value = sum((a * b).sum() for a, b in zip(v, product)).item()
        if get_total_norm([b - value * a for a, b in zip(v, product)]) <= tolerance * abs(value):
            return value, done
    asga.say(f"the power iteration did not settle in {ROUNDS} rounds: the eigenvalue is a lower bound")
    return value, ROUNDS

def kind_of(name, p):
    last = name.rpartition(".")[2]
    return last if last in ("steps", "beta") else "weights" if p.dim() > 1 else "other"

def gaps(net, x, y):
    """{"loss", "grad_norm", "gap", "moves", "cos"}; the network is as before afterwards."""
    kinds, params = zip(*[(kind_of(name, p), p) for name, p in net.named_parameters() if p.requires_grad])
    loss, g = gradient(net, params, x, y)
    norm, moves, cos = get_total_norm(g), {}, {}
    with moved(params, g, RHO / norm):
        perturbed, g_p = gradient(net, params, x, y)
    for kind in dict.fromkeys(kinds):
        a, b = (torch.cat([part.flatten() for part, its in zip(grads, kinds) if its == kind]).double()
                for grads in (g, g_p))
        moves[kind] = (RHO / norm * a.norm()).item()
        cos[kind] = F.cosine_similarity(a, b, dim=0).item()
    gap = {RHO: (perturbed - loss).item()}
    return {"loss": loss.item(), "grad_norm": norm.item(), "gap": gap, "moves": moves, "cos": cos}

def noise(net, accuracy):
    """{σ: mean accuracy}; the network is as before afterwards."""
    weights, found = [layer.weight.detach() for layer in asga.layers_of(net).values()], []
    for draw in range(DRAWS):
        generator = torch.Generator().manual_seed(draw)
        drawn = [torch.randn(w.shape, generator=generator).to(w) for w in weights]
        with moved(weights, [z * w.square().mean().sqrt() for z, w in zip(drawn, weights)], SIGMA):
            found.append(accuracy(net))
    return {SIGMA: mean(found)}

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net, train, val, size = load(args.run, args.data, device)
    asga.Fused.on = False  # the double backward takes the plain formulas anyway
    x, y = batch(train, IMAGES, size, device)
    result = {"run": str(args.run), "images": len(x), **gaps(net, x, y)}
    result["eigenvalue"], result["rounds"] = eigenvalue(net, x, y)
    val = val.subset(asga.stratified(val.labels, min(1, JUDGED / len(val))))

    def accuracy(net):
        return asga.evaluate(net, val, size, device)["accuracy"]

    result.update(accuracy=accuracy(net), noise=noise(net, accuracy))
    if (args.run / "supernet.pt").exists():
        untuned = asga.attach_quantizers(net, asga.Policy.load(args.run / "policy.json").layers)
        old = accuracy(untuned)
        torch.optim.swa_utils.update_bn([batch(train, 2048, size, device)], untuned)
        result["policy"] = {"old": old, "new": accuracy(untuned)}
    args.out.mkdir(parents=True, exist_ok=True)
    asga.write_json(args.out / "flatness.json", result)
    print(json.dumps(result, indent=1))

if __name__ == "__main__":
    run(main)
