"""What the evidence computes, against plain oracles."""
import json
import time
from pathlib import Path

import bench
import flatness
import policies
import pytest
import report
import reproduce
import torch
import torch.nn.functional as F
from common import ROOT, asga
from torch import nn

RUNS = {run["name"]: run for run in report.read(ROOT / "results/reproduce/runs.jsonl")}
asga.Fused.on = False  # nothing here is worth compiling

def small(kind=asga.Search, **more):
    """(a search of a small network, images, labels)"""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sigmoid(), nn.Conv2d(4, 4, 3), nn.Sigmoid(),
                        nn.Conv2d(4, 4, 2), nn.Flatten(), nn.Dropout(0.5), nn.Linear(4, 3))
    x, y = torch.randn(12, 3, 6, 6), torch.arange(12) % 3
    settings = asga.SearchSettings(candidates_w=(2, 4, 5), candidates_a=(2, 3, 4, 8), steps=10, **more)
    return kind(net, asga.plan(net, x[:1], "3bit", settings), settings, [x]), x, y

def test_verdicts_and_gains():
    assert report.verdict([1.0, 1.1, 0.9, 1.0]) == report.verdict([-0.1, -0.2, -0.15], 0.5) == "holds"
    assert report.verdict([-1.0, -1.1, -0.9]) == report.verdict([-1.0, -1.1, -0.9], 0.5) == "does not hold"
    # the bootstrap alone would decide the first, whose Student's interval is [-0.68, 1.48]
    assert report.verdict([0.1, 0.9, 0.2]) == report.verdict([1.0, 1.1]) == "undecided at this n"
    one, two = ({s: {"tuned accuracy": v, "full_precision loss": 1.0} for s, v in enumerate(values)}
                for values in ([1, 2, 3, 6], [2, 4]))
    # by hand: difference 0, standard error √(14/12 + 1) = 1.472, 3.23 degrees of freedom, t = 3.06
    assert report.versus(one, two, "tuned accuracy") == "+0.00 [-4.50, +4.50] (n = 4 and 2)"
    two[0]["full_precision loss"] = 5.0
    assert report.versus(one, two, "tuned accuracy") == "-2.00 (n = 1)"
    a, b = ({"search full_precision loss": 1.0, "search asga.py": v, "search log loss": ord(v)} for v in "ab")
    assert report.gains({0: a, 1: a}, {0: b, 1: a | {"search log loss": 98}}, "search log loss") == [1]

def test_committed_runs_are_planned_and_read_as_they_were():
    jobs, runs = reproduce.Plan("full", "nowhere").jobs, report.arranged(RUNS)
    assert all(jobs[name].needs == run["needs"] for name, run in RUNS.items())
    # a search counts once, where its policy is tuned twice
    assert "search log" not in runs["lite0long 3bit"]["asga"][0] and "asga:10%" in runs["resnet20b 2.4bit"]
    committed = (ROOT / "results/reproduce.md").read_text()
    assert report.verdicts(report.PLAN["headline"], runs, first=True) in committed
    assert report.ranks(runs) in committed
    taken = reproduce.Plan("full", ROOT / "results").jobs["policy/resnet20b-proxy-2.4bit-joint-0"]
    assert taken.needs == [] and "--weights {out}/reproduce/fp/resnet20b-proxy/" in taken.command

def test_planned_commands_are_understood():
    for job in reproduce.Plan("full", "nowhere").jobs.values():
        script, *flags = job.command.split()
        if script == "evidence/policies.py":
            assert flags[0] in policies.METHODS
            flags[0] = "search"
        if script == "evidence/flatness.py":
            assert flags[1::2] == ["--data", "--out"]
        else:
            asga.parse(flags)

def test_finished_runs_stay_and_failed_ones_hold_up_what_needs_them(tmp_path, capsys):
    code = "import sys,pathlib;p=pathlib.Path(sys.argv[-1]);p.mkdir();(p/'r').touch()"
    names, places = {"a": [], "b": [], "c": ["a"], "d": ["a", "b"]}, {"work": tmp_path, "code": code}
    jobs = {n: reproduce.Job(n, "-c {code} {work}/" + n, "r", needs) for n, needs in names.items()}
    assert not reproduce.run_all(jobs | {"b": jobs["b"]._replace(command="-c raise")}, places, 2)
    assert "need a run that failed: d" in capsys.readouterr().err
    assert [name for name in names if (tmp_path / name / "r").exists()] == ["a", "c"]
    assert reproduce.run_all(jobs, places, 2) and (tmp_path / "d/r").exists()     # run again, a would fail

def test_no_run_outlives_the_runner(tmp_path, monkeypatch):
    began, job = time.monotonic(), reproduce.Job("a", "-c import{tab}time;time.sleep(60)", "r", [])
    monkeypatch.setattr(reproduce.time, "sleep", lambda seconds: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        reproduce.run_all({"a": job}, {"work": tmp_path, "tab": "\t"}, 1)
    assert time.monotonic() - began < 30

def test_new_runs_replace_recorded_ones_and_what_came_of_them(tmp_path):
    work, out, name = tmp_path / "work", tmp_path / "out", "policy/resnet20-proxy-2.4bit-asga-0"
    with pytest.raises(asga.AsgaError, match="no finished transfer"):
        report.write(reproduce.Plan("small", out), {"work": work, "out": out})
    old = [run for run in RUNS.values() if "resnet20-proxy-2.4bit-asga-" in run["name"]]
    policy = {"layers": {"fc": {"w": 8, "a": 4}}, "candidates": {"w": [2, 4, 8]}, "search": {}}
    policy |= dict.fromkeys(("cost", "budget", "versions"), {})
    rows = [dict.fromkeys(report.LOGGED, s) | {"step": s, "time": 2 * s, "rho": min(s, 9)} for s in range(20)]
    rows = [row | {"bits": [[8, 2.4, 8], [8, 7.4, 8]]} for row in rows]
    for folder in (out / "reproduce", work / name):
        folder.mkdir(parents=True)
    (out / "reproduce/runs.jsonl").write_text("\n".join(map(json.dumps, old)))
    (work / name / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (work / name / "policy.json").write_text(json.dumps(policy))
    Path(f"{work / name}.log").write_text("python …\nasga.py abc\n")
    report.write(reproduce.Plan("small", out), {"work": work, "out": out})
    new = {run["name"]: run for run in report.read(out / "reproduce/runs.jsonl")}
    made, outdated = new[name], [run["name"] for run in old if name in run["needs"]]
    assert len(outdated) == 2 and sorted([*new, *outdated]) == sorted(run["name"] for run in old)
    assert made["policy"] == {"fc": [8, 4]} and [row["loss"] for row in made["log"]] == [4.5, 14.5]
    assert [row["beta_distance"] for row in made["log"]] == [0.5, 0.5]
    assert [made[key] for key in ("asga.py", "step_seconds", "at_most", "at_least")] == ["abc", 2, 0.55, 0.05]

def test_softmax_mixture_and_the_gradient_of_its_logits():
    q, x, grad = small(policies.SoftmaxSearch)[0].quantizers[1], torch.randn(50), torch.randn(50)
    q.logits.data = torch.tensor([0.3, -0.2, 0.9])
    pi, ranges = torch.softmax(q.logits.detach(), 0), zip(q.steps.tolist(), *q.grid[1:].tolist())
    values = torch.stack([torch.fake_quantize_per_tensor_affine(x, s, 0, n, p) for s, n, p in ranges])
    out, mean = q(x), values @ grad
    out.backward(grad)
    assert torch.allclose(out, pi @ values, atol=1e-6)
    assert q.beta.item() == pytest.approx(pi @ q.grid[0].float())
    assert torch.allclose(q.logits.grad, pi * (mean - pi @ mean), atol=1e-5)

def test_softmax_search_keeps_the_budget_by_tilting():
    run, x, y = small(policies.SoftmaxSearch)
    run.step(x, y, 0)
    for z in run.logits:
        z.data += 0.3 * torch.randn_like(z)
    before, slope = [z.detach().clone() for z in run.logits], run.budget.gradient(run.bits()).flatten()
    run.write(None)
    assert run.budget.spent(run.bits()).item() == pytest.approx(1, abs=1e-6)
    for q, old, rate in zip(run.quantizers, before, slope):
        t = (old - q.logits).diff() / (rate * q.grid[0].diff())  # the same for all
        assert torch.allclose(t, (before[1] - run.logits[1]).diff()[0] / (2 * slope[1]), rtol=1e-3)
    layers = policies.choose(run, run.penalties())
    assert layers["0"] == (8, 8) and run.budget.spent(torch.tensor(list(layers.values())).t()) <= 1

def test_random_policies_lie_on_the_budget():
    run = small()[0]
    found = [policies.choose(run, policies.distances(run, seed)).values() for seed in range(4)]
    assert all(0.99 <= run.budget.spent(torch.tensor([*bits]).t()) <= 1 for bits in found)
    assert [*found[0]] != [*found[1]]

def test_sensitivity_is_the_loss_of_one_quantized_tensor():
    run, x, y = small()
    found = policies.one_at_a_time(run, lambda: policies.loss(run.net, [(x, y)]))
    net = run.net.eval()
    net[1].train()  # BatchNorm goes by the batch
    base = F.cross_entropy(net(x), y).item()
    for place, q, bits in ((1, net[3].weight_quantizer, 2), (5, net[3].input_quantizer, 3)):
        q.enabled, q.beta.data = True, torch.tensor(float(bits))
        assert found[place][bits] == pytest.approx(F.cross_entropy(net(x), y).item() - base, abs=1e-6) != 0
        q.enabled = False

def test_bench_measures_every_variant(capsys):
    found = bench.measure(bench.Bench("resnet20", 16, 4, "float32", torch.device("cpu")), 1)
    assert set(found["samples"]) == set(bench.ON_A_CPU) and found["ratios"]["asga_over_two_pass"] > 1
    full, two, most = found["peak_bytes"].values()
    assert full < two < most
    bench.main(["--table", *map(str, (ROOT / "results/bench").glob("*.json"))])
    assert "| asga_over_two_pass | " in capsys.readouterr().out

def test_flatness_of_a_search(tmp_path, monkeypatch):
    where = [str(tmp_path), "--data", "digits", "--out", str(tmp_path / "flat")]
    with pytest.raises(asga.AsgaError, match="model.pt holds no"):
        flatness.main(where)
    for name, less in (("IMAGES", 4), ("JUDGED", 20), ("DRAWS", 1), ("ROUNDS", 2)):
        monkeypatch.setattr(flatness, name, less)
    flags = ["--random-weights", "--steps", "1", "--images", "0.1", "--batch-size", "8", "--no-compile"]
    assert asga.main(["search", *flags, "--data", "digits", "--out", str(tmp_path)]) == 0
    flatness.main(where)
    assert '"rounds": 2' in (tmp_path / "flat" / "flatness.json").read_text()

def test_eigenvalue_and_gap(monkeypatch):
    run, x, y = small()
    net, weights = run.net.eval(), [layer.weight for layer in asga.layers_of(run.net).values()]
    rows, g = [], torch.autograd.grad(F.cross_entropy(net(x), y), weights, create_graph=True)
    for entry in torch.cat([part.flatten() for part in g]):
        row = torch.autograd.grad(entry, weights, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([part.flatten() for part in row]))
    largest = torch.linalg.eigvals(torch.stack(rows)).abs().max().item()
    monkeypatch.setattr(flatness, "ROUNDS", 3000)
    found, _ = flatness.eigenvalue(net, x, y, tolerance=1e-4)
    assert abs(found) == pytest.approx(largest, rel=1e-2) and largest > 1e-3
    params = [p for p in net.parameters() if p.requires_grad]
    before, told = [p.clone() for p in params], flatness.gaps(net, x, y)
    assert flatness.noise(net, lambda net: 5.0) == {flatness.SIGMA: 5.0}
    assert all(torch.equal(p, old) for p, old in zip(params, before))
    loss = F.cross_entropy(net(x), y)
    for p, grad in zip(params, torch.autograd.grad(loss, params)):
        p.data += 0.05 / told["grad_norm"] * grad
    assert told["gap"][0.05] == pytest.approx((F.cross_entropy(net(x), y) - loss).item(), rel=1e-3)
    assert torch.tensor(list(told["moves"].values())).norm().item() == pytest.approx(0.05)

def test_pictures_of_runs_are_drawn(tmp_path, monkeypatch):
    plot = pytest.importorskip("plot")
    keys = "loss", "perturbed_loss", "gap", "rho", "expected_cost"
    for budget, method in ((3, "asga"), (4, "asga"), (3, "uniform")):
        run = tmp_path / f"{method}{budget}"
        run.mkdir()
        sizes = {f"layer{i}": asga.LayerCost(1000 * i + 1, 10) for i in range(5)}
        asga.Policy(dict.fromkeys(sizes, (budget, budget)), sizes).save(run / "policy.json")
        asga.write_json(run / "config.json", {"settings": {"method": method}})
        asga.write_json(run / "metrics.json", {"policy_bops": 10 ** 9 * budget, "policy": {"accuracy": 50}})
        asga.write_atomic(run / "log.jsonl", json.dumps(dict.fromkeys(keys, 1.0)) + "\n")
    assert plot.point(tmp_path / "asga4") == ("asga", 4 * 10 ** 9, 50)
    runs = [str(run) for run in tmp_path.iterdir()]
    monkeypatch.setattr("sys.argv", ["plot.py", *runs, "--out", str(tmp_path / "png")])
    plot.main()
    drawn = {path.name for path in (tmp_path / "png").iterdir() if path.stat().st_size > 5000}
    assert drawn == {f"{name}-{kind}.png" for name in ("asga3", "asga4", "uniform3")
                     for kind in ("bits", "search")} | {"pareto.png"}
    sizes = {"a": asga.LayerCost(3, 1), "b": asga.LayerCost(1, 1)}
    figure = plot.bits(asga.Policy({"a": (2, 4), "b": (3, 8)}, sizes))
    upper, lower = figure.axes
    assert [bar.get_height() for bar in upper.patches + lower.patches] == [2, 3, 50, 50]
    assert list(upper.lines[0].get_ydata()) == [4, 8]

def test_deployed_files_are_run_and_their_integer_convolutions_counted():
    deploy, ort = pytest.importorskip("deploy"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    x, padded = torch.randn(2, 3, 8, 8), nn.Sequential(nn.ReLU6(), nn.ZeroPad2d((0, 1, 0, 1)))
    for between in (nn.ReLU(), nn.ReLU6(), padded):
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), between, nn.Conv2d(4, 4, 3)).eval()
        quantized = asga.quantize(net, 4, x)
        quantized[3].input_quantizer.steps.data.fill_(0.7)  # up to 10.5
        for each, whole in ((net, 0), (quantized, 1)):  # what the last one gives is not quantized
            session, *count = deploy.convolutions(ort.SessionOptions(), asga.to_onnx(each, x)[0])
            assert count == [whole, 2]
            assert session.run(None, {"images": x.numpy()})[0].shape[:2] == (2, 4)
