"""Large pictures from a disk: images a second of asga.py beside torchvision's ImageFolder and a DataLoader.

    python evidence/stream.py [--pictures 20000] [--dir DIR]

It makes JPEGs of 500 × 375 in DIR (and leaves them), and reads them in turn with both, by the same transforms
(RandomResizedCrop to 224, mirror images), batch size and number of workers; then an epoch by asga.py alone,
with the memory of all its processes on the way."""
import argparse
import itertools
import os
import statistics
import tempfile
import time
from pathlib import Path

import common
import torch
from common import asga


def make(folder, count):
    """A set of `count` pictures in 10 classes, half of them for validation; 200 different ones, linked."""
    from PIL import Image
    folder = Path(folder)
    generator = torch.Generator().manual_seed(0)
    originals = []
    (folder / "originals").mkdir(parents=True, exist_ok=True)
    for i in range(200):
        small = torch.randint(256, (1, 3, 30, 40), generator=generator).float()
        big = torch.nn.functional.interpolate(small, size=(375, 500), mode="bicubic")[0].clamp(0, 255).byte()
        originals.append(folder / f"originals/{i}.jpg")
        Image.fromarray(big.permute(1, 2, 0).numpy()).save(originals[-1], quality=90)
    for part, many in (("train", count), ("val", 20)):
        for i in range(many):
            path = folder / part / f"class{i % 10}" / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                path.hardlink_to(originals[i % 200])

def memory():
    """Bytes of this process and its children that nobody else has."""
    found = 0
    for status in Path("/proc").glob("[0-9]*/smaps_rollup"):
        try:
            parent = (status.parent / "stat").read_text().rpartition(")")[2].split()[1]
            if str(os.getpid()) in (status.parent.name, parent):
                rows = dict(line.split(":") for line in status.read_text().splitlines()[1:])
                found += int(rows["Pss"].split()[0]) * 1024
        except (OSError, ValueError):
            continue
    return found

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pictures", type=int, default=20000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=10, help="of 64 in a round")
    parser.add_argument("--dir", default="")
    cfg = parser.parse_args()
    vision = asga.import_torchvision()
    folder = cfg.dir or tempfile.mkdtemp()
    make(folder, cfg.pictures)
    workers, cpu = os.cpu_count(), torch.device("cpu")
    transform = vision.transforms.Compose([
        vision.transforms.RandomResizedCrop(224), vision.transforms.RandomHorizontalFlip(),
        vision.transforms.ToTensor(),
        vision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    plain = vision.datasets.ImageFolder(f"{folder}/train", transform)
    loader = torch.utils.data.DataLoader(plain, 64, shuffle=True, num_workers=workers)
    train = asga.load_data(folder, "")[1]
    train.size, train.share = 224, 0.875
    streams = {"torchvision": lambda: iter(loader),
               "asga.py": lambda: train.stream(0, 64, cpu, 224, 0, "imagenet")}
    speeds = {name: [] for name in streams}
    for _ in range(cfg.rounds):
        for name, start in streams.items():
            batches = start()
            next(batches)  # its workers are there
            began = time.perf_counter()
            for x, _ in itertools.islice(batches, cfg.batches):
                assert x.shape == (64, 3, 224, 224)
            speeds[name].append(64 * cfg.batches / (time.perf_counter() - began))
            batches = None  # ends its workers
    rows = []
    for name, own in speeds.items():
        rows.append([name, f"{statistics.median(own):.0f} ({min(own):.0f}-{max(own):.0f})"])
    ratio = statistics.median(a / b for a, b in zip(speeds["asga.py"], speeds["torchvision"]))
    print(common.table(["reader", "images a second, median (range)"], rows), f"\nratio {ratio:.2f}", sep="")
    total, batches = len(train) // 64, train.stream(0, 64, cpu, 224, 0, "imagenet")
    for done, _ in enumerate(itertools.islice(batches, total), 1):
        if done in (total // 10, total // 2, total):
            print(f"batch {done} of {total}: {asga.human(memory())}B in memory", flush=True)
    print(f"{workers} workers, {asga.describe(cpu)}, {len(train)} pictures")

if __name__ == "__main__":
    common.run(main)
