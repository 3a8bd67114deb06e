"""What only a GPU shows of asga.py, in parts of evidence/gpu.sh; on a CPU with --dry, at toy sizes.

    python evidence/gpu.py nan          how often a search on one batch ends in NaN, recorded and plain
    python evidence/gpu.py search       a whole `asga.py search`: seconds from process start
"""
import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import ROOT, asga, run, table

CUDA = torch.device("cuda" if torch.cuda.is_available() else "cpu")

def nan(dry):
    """resnet18, random weights, the same batch again and again; exit code 1 where one ends in NaN."""
    size, count, steps, seeds = (32, 2, 5, 1) if dry else (64, 128, 40, 4)
    bad, rows = 0, []
    for precision, capture in itertools.product(("float32", "bf16"), (True, False)):
        last = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            model = asga.build("resnet20" if dry else "resnet18", 10).to(CUDA)
            x, y = torch.randn(count, 3, size, size, device=CUDA), torch.randint(10, (count,), device=CUDA)
            settings = asga.SearchSettings(steps=steps, precision=precision)
            budget = asga.plan(model, x[:1], "3bit", settings)
            search = asga.Search(model, budget, settings, [x], capture=capture)
            record = [search.step(x, y, done) for done in range(steps)][-1]
            last.append(record["loss"].item())
            recorded = len(search.play.recorded)
        bad += sum(loss != loss for loss in last) + (capture and CUDA.type == "cuda" and not recorded)
        rows.append([precision, recorded, " ".join(f"{loss:.4f}" for loss in last)])
    print(table(["precision", "recorded pieces", "last losses, a seed each"], rows), flush=True)
    return int(bad > 0)

def pictures(folder, count):
    """CIFAR-10's folder that ASGA_DATA names, or `count` random JPEGs of each class in its layout."""
    given = Path(os.environ.get("ASGA_DATA", "nowhere")) / "cifar10"
    if (given / "train").is_dir():
        return given
    to_image = asga.import_torchvision().transforms.functional.to_pil_image
    for part, label, i in itertools.product(("train", "val"), range(10), range(count)):
        place = folder / part / str(label)
        place.mkdir(parents=True, exist_ok=True)
        to_image(torch.rand(3, 32, 32)).save(place / f"{i}.jpg")
    return folder

def whole(dry):
    """Seconds until each file of `search` at its defaults, resnet18, random weights."""
    with tempfile.TemporaryDirectory() as folder:
        data, out = pictures(Path(folder) / "data", 2 if dry else 200), Path(folder) / "out"
        flags = ["--steps", "3", "--batch-size", "4", "--images", "0.002"] if dry else ["--arch", "resnet18"]
        flags += ["--data", str(data), "--random-weights", "--out", str(out)]
        start = time.time()
        code = subprocess.call([sys.executable, ROOT / "asga.py", "search", *flags])
        files = {"config.json": "imports, network, images to judge by", "policy.json": "evaluation",
                 "log.jsonl": "images to learn from, calibration, compilation, search"}
        rows = [[name, f"{(out / name).stat().st_mtime - start:.1f}", what] for name, what in files.items()]
        rows.append(["", asga.read_json(out / "metrics.json")["seconds"], "calibration and search alone"])
    print(table(["until", "seconds", "with"], rows), flush=True)
    return code

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=["nan", "search"])
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    return {"nan": nan, "search": whole}[args.part](args.dry)

if __name__ == "__main__":
    run(main)
