"""What the scripts beside this one share: asga.py on the path, and how they end."""
import contextlib
import dataclasses
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import asga  # noqa: E402


def planned(flags):
    """(asga.Job, SearchSettings, Budget) of the flags of `asga.py search`."""
    cfg = asga.parse(["search", *flags])
    names = [field.name for field in dataclasses.fields(asga.SearchSettings)]
    settings = asga.SearchSettings(**{name: getattr(cfg, name) for name in names})
    job = asga.Job(cfg, "policy.json")
    return job, settings, asga.plan(job.model, job.example, cfg.budget, settings)

def gradient(net, params, x, y, graph=False):
    """(loss, its gradient by params)"""
    loss = F.cross_entropy(asga.first_output(net(x)), y)
    return loss, torch.autograd.grad(loss, params, create_graph=graph, materialize_grads=True)

def table(header, rows):
    """The text of a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)

@contextlib.contextmanager
def moved(params, direction, length):
    """Inside, the parameters stand length · direction further; afterwards they are as before."""
    before = [p.detach().clone() for p in params]
    torch._foreach_add_([p.data for p in params], torch._foreach_mul(direction, length))
    yield
    torch._foreach_copy_([p.data for p in params], before)

def run(main):
    """Exit with what main() returns; with 2 and a line for what a user can mend."""
    try:
        sys.exit(main())
    except (asga.AsgaError, OSError) as error:
        asga.say(f"error: {asga.one_line(error)}")
        sys.exit(2)
    except KeyboardInterrupt as stop:
        asga.say(f"{str(stop) or 'stopped'}; the same command goes on")
        sys.exit(130)
