"""What a policy costs where it runs: exported files in onnxruntime on a CPU, one thread, one image at a time.

    python evidence/deploy.py full_precision/model.pt uniform8/model.pt mixed/model.pt [--data DIR]

For each model.pt a row: its time (median and range of ROUNDS, all files in turn), the size of the file, how
many convolutions onnxruntime computes with integers (QLinearConv in the graph that it optimized), and the
accuracy of the file on the validation part of its data."""
import argparse
import statistics
import tempfile
import time
from pathlib import Path

import common
import torch
from common import asga


def convolutions(session_options, model):
    """(session, QLinearConv, all convolutions) of onnxruntime's optimized graph."""
    import onnx
    import onnxruntime
    with tempfile.TemporaryDirectory() as folder:
        session_options.optimized_model_filepath = f"{folder}/optimized.onnx"
        session = onnxruntime.InferenceSession(model.SerializeToString(), session_options)
        kinds = [node.op_type for node in onnx.load(session_options.optimized_model_filepath).graph.node]
    return session, kinds.count("QLinearConv"), sum(kind.endswith("Conv") for kind in kinds)

def measured(path, data):
    """[row of the table without the time, session, an image] of a model.pt."""
    import onnxruntime
    job, net, policy = asga.open_model(asga.parse(["export", path, "--data", data]))
    x = torch.zeros(2, 3, job.resolution, job.resolution)
    model, _ = asga.to_onnx(net, x)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session, whole, every = convolutions(options, model)
    accuracy = asga.evaluate(asga.Runtime(model), job.val, job.resolution, job.device)["accuracy"]
    bits = "float32"
    if policy:
        cost = policy.cost
        bits = f"{cost['mean_w']:.2f}, {cost['mean_a']:.2f}"
    size = f"{asga.human(model.ByteSize())}B"
    return [path, bits, size, f"{whole} of {every}", f"{accuracy:.2f}"], session, x[:1].numpy()

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="+")
    parser.add_argument("--data", default="", help="default: of each run")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--out", default="", help="a file for the table")
    cfg = parser.parse_args()
    torch.set_num_threads(1)
    found, times = [measured(path, cfg.data) for path in cfg.model], [[] for _ in cfg.model]
    for _ in range(cfg.rounds + 10):
        for (_, session, image), own in zip(found, times):
            began = time.perf_counter()
            session.run(None, {"images": image})
            own.append(1e3 * (time.perf_counter() - began))
    rows = []
    for (row, *_), own in zip(found, times):
        low, *_, high = statistics.quantiles(own[10:], n=20)
        rows.append([*row[:2], f"{statistics.median(own[10:]):.2f} ({low:.2f}-{high:.2f})", *row[2:]])
    head = ["model", "mean bits w, a", "ms (5 to 95 %)", "file", "convolutions in integers", "accuracy, %"]
    text = common.table(head, rows) + f"\n{asga.describe(torch.device('cpu'))}, {cfg.rounds} rounds\n"
    print(text, end="")
    if cfg.out:
        asga.write_atomic(Path(cfg.out), text)

if __name__ == "__main__":
    common.run(main)
