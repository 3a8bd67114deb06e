"""What only a GPU shows of asga.py, in parts of evidence/gpu.sh; on a CPU with --dry, at toy sizes.

    python evidence/gpu.py nan          how often a search on one batch ends in NaN, recorded and plain
    python evidence/gpu.py search       a whole `asga.py search`: seconds of each phase, from process start
"""
import argparse
import itertools
import os
import tempfile
import time
from pathlib import Path

import torch
from common import asga, run, table

CUDA = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BEGAN = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)

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
        bad += sum(loss != loss for loss in last)
        rows.append([precision, recorded, " ".join(f"{loss:.4f}" for loss in last)])
    print(table(["precision", "recorded pieces", "last losses, a seed each"], rows), flush=True)
    return int(bad > 0)

def pictures(folder, count):
    """CIFAR-10's folder that ASGA_DATA names, or `count` random JPEGs in its layout."""
    given = Path(os.environ.get("ASGA_DATA", "nowhere")) / "cifar10"
    if (given / "train").is_dir():
        return given
    draw = torch.Generator().manual_seed(0)
    to_image = asga.import_torchvision().transforms.functional.to_pil_image
    for part, label, i in itertools.product(("train", "val"), range(10), range(count // 20)):
        place = folder / part / str(label)
        place.mkdir(parents=True, exist_ok=True)
        colour = torch.rand(3, 1, 1, generator=torch.Generator().manual_seed(label))
        to_image((colour + torch.rand(3, 32, 32, generator=draw)) / 2).save(place / f"{i}.jpg")
    return folder

def whole(dry):
    """Seconds of each phase of `search` at its defaults, resnet18, random weights."""
    rows = [["imports", f"{time.time() - started():.1f}"]]
    for owner, name in ((asga.Job, "__init__"), (asga.ImageSet, "load"), (asga.Search, "__init__"),
                        (asga.Job, "loop"), (asga.Job, "evaluate")):
        setattr(owner, name, timed(getattr(owner, name), f"{owner.__name__}.{name}", rows))
    with tempfile.TemporaryDirectory() as folder:
        data = pictures(Path(folder) / "data", 40 if dry else 4000)
        flags = ["--steps", "3", "--batch-size", "4", "--images", "0.002"] if dry else []
        arch = "resnet20" if dry else "resnet18"
        flags += ["--arch", arch, "--data", str(data), "--random-weights", "--out", f"{folder}/out"]
        rows.append(["arguments", " ".join(flags)])
        code = asga.main(["search", *flags])
    rows.append(["whole process, pictures made included", f"{time.time() - started():.1f}"])
    print(table(["phase", "seconds"], rows), flush=True)
    return code

def started():
    """When this process started, as time.time() has it."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return ticks / os.sysconf("SC_CLK_TCK") + BEGAN

def timed(function, name, rows):
    def wrapper(*args, **more):
        start = time.monotonic()
        result = function(*args, **more)
        if (seconds := time.monotonic() - start) > 0.1:
            rows.append([name, f"{seconds:.1f}"])
        return result
    return wrapper

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=["nan", "search"])
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    return {"nan": nan, "search": whole}[args.part](args.dry)

if __name__ == "__main__":
    run(main)
