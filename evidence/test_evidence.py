"""What the evidence computes, against plain oracles."""
import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import asga  # noqa: E402
import bench  # noqa: E402
import beta_gradient  # noqa: E402
import flatness  # noqa: E402
import policies  # noqa: E402
import report  # noqa: E402
import reproduce  # noqa: E402


def small(bits=None):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 3, 3, 2), nn.Sigmoid(), nn.Conv2d(3, 4, 2), nn.Sigmoid(), nn.Flatten(), nn.Linear(4, 3)).double()
    x, y = torch.randn(12, 3, 6, 6, dtype=torch.float64), torch.arange(12) % 3
    net = asga.quantize(net, bits or 8, example_inputs=x)
    asga.set_quantizers(net, bits is not None)
    return net.eval(), [(x[:7], y[:7]), (x[7:], y[7:])]


def test_eigenvalue_is_that_of_the_hessian_by_finite_differences():
    net, pairs = small()
    weights = [m.weight for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]

    def grad():
        loss = F.cross_entropy(net(torch.cat([x for x, _ in pairs])), torch.cat([y for _, y in pairs]))
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])

    rows = []
    with torch.no_grad():
        for w in weights:
            for i in range(w.numel()):
                w.view(-1)[i] += 1e-5
                up = torch.enable_grad()(grad)()
                w.view(-1)[i] -= 2e-5
                rows.append((up - torch.enable_grad()(grad)()) / 2e-5)
                w.view(-1)[i] += 1e-5
    values = torch.linalg.eigvalsh((torch.stack(rows) + torch.stack(rows).t()) / 2)
    found, _ = flatness.eigenvalue(net, pairs, rounds=2000, tolerance=1e-9)
    assert abs(found) == pytest.approx(values.abs().max().item(), rel=1e-3)


def test_power_iteration_does_not_stop_on_a_plateau():
    """Two eigenvalues 5 % apart: λ moves by less than 2 % a round long before v is an eigenvector."""
    w = nn.Linear(40, 1, bias=False)
    curvature = torch.linspace(0.1, 1.0, 40) ** 4 * 19 + 1
    curvature[-1] = 21.0

    def quadratic(net, params, pairs, graph=False):
        yield None, torch.autograd.grad((curvature * params[0].square()).sum() / 2, params, create_graph=graph)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flatness, "gradient", quadratic)
        found, rounds = flatness.eigenvalue(w, [])
    assert found == pytest.approx(21.0, rel=0.02) and 5 < rounds < 100


def test_eigenvalue_goes_through_the_straight_through_gradients():
    net, pairs = small(4)
    weights = [m.weight for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    loss = F.cross_entropy(net(torch.cat([x for x, _ in pairs])), torch.cat([y for _, y in pairs]))
    grad = torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights, create_graph=True)])
    rows = [torch.cat([g.flatten() for g in torch.autograd.grad(g, weights, retain_graph=True)]) for g in grad]
    values = torch.linalg.eigvals(torch.stack(rows))
    assert values.abs().max() > 1e-3
    found, _ = flatness.eigenvalue(net, pairs, rounds=3000, tolerance=1e-10)
    assert abs(found) == pytest.approx(values.abs().max().item(), rel=1e-2)


def test_gap_leaves_the_network_and_follows_the_gradient():
    net, pairs = small(4)
    pairs = [tuple(torch.cat(t) for t in zip(*pairs))]                # one batch: LSQ scales the gradient of a step by its size
    before = {k: v.clone() for k, v in net.state_dict().items()}
    loss, norm, moves, cos, gap = flatness.gaps(net, pairs)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    total = F.cross_entropy(net(torch.cat([x for x, _ in pairs])), torch.cat([y for _, y in pairs]))
    params = [p for p in net.parameters() if p.requires_grad]
    grads = torch.autograd.grad(total, params)
    assert loss == pytest.approx(total.item()) and norm == pytest.approx(torch.nn.utils.get_total_norm(grads).item())
    with torch.no_grad():
        for p, g in zip(params, grads):
            p.add_(g, alpha=0.05 / norm)
        moved = F.cross_entropy(net(torch.cat([x for x, _ in pairs])), torch.cat([y for _, y in pairs]))
    assert set(moves) == {"weights", "other", "steps"} and math.hypot(*moves.values()) == pytest.approx(0.05)
    assert gap[0.05] == pytest.approx(moved.item() - loss)
    again = torch.autograd.grad(F.cross_entropy(net(torch.cat([x for x, _ in pairs])), torch.cat([y for _, y in pairs])), params)
    flat = [torch.cat([t.flatten() for t, p in zip(side, params) if p.dim() > 1]) for side in (grads, again)]
    assert cos["weights"] == pytest.approx(F.cosine_similarity(*flat, dim=0).item())


def test_noise_is_undone():
    net, _ = small(4)
    net.float()
    part = asga.ImageSet(torch.randint(256, (20, 3, 6, 6), dtype=torch.uint8), [0] * 20, 6)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert set(flatness.noise(net, part, 6, torch.device("cpu"))) == set(flatness.NOISE)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_statistics():
    scipy = [0.1, 0.4, 0.2, 0.8, 0.7], [1.0, 3.0, 2.0, 4.0, 5.0]
    assert report.spearman(*scipy) == pytest.approx(0.9) and report.spearman([1, 1, 2], [3, 3, 5]) == pytest.approx(1)
    low, high = report.bootstrap([0.0, 1.0] * 50)
    assert low == pytest.approx(0.4, abs=0.02) and high == pytest.approx(0.6, abs=0.02)
    assert report.verdict([1.0, 1.1, 0.9, 1.0]) == "holds" and report.verdict([-1.0, -1.1, -0.9]) == "does not hold"
    assert report.verdict([0.1, 0.9, 0.2]).startswith("undecided") and report.verdict([1.0, 1.0]).startswith("undecided")
    assert report.verdict([-0.1, -0.2, -0.15, -0.2], margin=0.5) == "holds" and report.verdict([-1.0, -1.1, -0.9], 0.5) == "does not hold"
    torch.manual_seed(0)
    assert report.verdict([0.0, 0.0, 0.0]) == "no difference in any seed"
    assert report.unpaired([1, 2, 3], [2, 4, 6]) == "-2.00 [-7.56, +3.56] (not paired, n = 3 and 3)"      # Welch: 2.94 degrees of freedom, of which 2
    assert report.unpaired([1, 1, 1], [1, 1]).startswith("+0.00 [-0.00, +0.00]") and report.verdict([]).startswith("undecided")
    drawn = [report.verdict(torch.randn(5).tolist()) for _ in range(200)]                   # no effect: about one in twenty
    assert sum(not v.startswith("undecided") for v in drawn) <= 16
    assert report.distance([{"policy": {"a": (2, 3), "b": (4, 4)}}, {"policy": {"a": (3, 3), "b": (2, 4)}}]) == 0.75
    log = [{"step": 10 * i, "bits": [[3 - max(0, 5 - i) / 9]]} for i in range(8)]
    assert report.settled(log) == 50 and math.isnan(report.distance([]))


@pytest.mark.parametrize("scale", ["small", "full"])
def test_every_planned_command_is_one_that_asga_understands(scale):
    plan = reproduce.Plan({"proxy": "P", "target": "T", "digits": "digits"})
    for cells in reproduce.sections(scale).values():
        for cell in cells:
            plan.transfer(cell)
    jobs = [job for job in plan.jobs.values() if "resnet20b" not in job.name or "-uniform-" not in job.name]      # that takes no weights
    assert len({job.command for job in jobs}) == len(jobs)                                                  # no run twice
    for job in plan.jobs.values():
        assert all(need in plan.jobs for need in job.needs)
        if job.command[0] == "asga.py":
            asga.parse(list(job.command[1:]))


def test_longer_tuning_takes_the_same_policies_and_weights():
    plan, cell = reproduce.Plan({"proxy": "P", "target": "T", "digits": "digits"}), reproduce.Cell("lite0", "3bit", "asga", 1)
    short, long = (plan.jobs[plan.transfer(cell._replace(net=net))] for net in ("lite0", "lite0long"))
    assert short.needs == long.needs == ("policy/lite0-proxy-3bit-asga-1", "fp/lite0-target") and long.minutes > short.minutes
    assert [pair for pair in zip(short.command, long.command, strict=True) if len(set(pair)) > 1] == [("3", "5")]
    assert (short.name, long.name) == tuple(f"transfer/{net}-proxy-3bit-asga-1-to-target" for net in ("lite0", "lite0long"))


def test_stopped_runs_go_on_and_failed_ones_hold_up_what_needs_them(tmp_path, capsys):
    code = "import sys, pathlib; p = pathlib.Path(sys.argv[-1]); p.mkdir(parents=True); (p / 'r').write_text('')"
    jobs = {name: reproduce.Job(name, command, "r", needs) for name, command, needs in
            (("a", ("-c", code), ()), ("b", ("-c", "raise SystemExit(1)"), ()), ("c", ("-c", code), ("a",)), ("d", ("-c", code), ("b", "a")))}
    assert not reproduce.run_all(jobs, tmp_path, 2)
    assert {name for name in jobs if (tmp_path / name / "r").exists()} == {"a", "c"}
    jobs["b"] = jobs["b"]._replace(command=("-c", code))
    assert reproduce.run_all(jobs, tmp_path, 2) and "2 of 4 runs are done" in capsys.readouterr().out


def test_no_run_outlives_the_runner_also_where_the_shell_ignores_ctrl_c(tmp_path, monkeypatch):
    code = "import signal, sys, time, pathlib; signal.signal(signal.SIGINT, signal.SIG_IGN); pathlib.Path(sys.argv[-1]).mkdir(); time.sleep(60)"
    began = time.monotonic()

    def sleep(seconds):                                                                        # the runner's, between two looks
        if (tmp_path / "a").exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(reproduce.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        reproduce.run_all({"a": reproduce.Job("a", ("-c", code), "r")}, tmp_path, 1)
    assert time.monotonic() - began < 30


def test_known_runs_are_not_run_again_unless_what_they_need_is_made_anew(tmp_path):
    plan = reproduce.planned("small", {"proxy": "/P", "target": "/T", "digits": "digits"})[0]
    rows = [{"name": name, "command": plan.shown(job)} for name, job in plan.jobs.items()]
    assert all("/P" not in row["command"] and "/T" not in row["command"] for row in rows)
    file = tmp_path / "runs.jsonl"

    def known(rows, work):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return reproduce.known(file, plan, work)

    assert set(known(rows, tmp_path)) == set(plan.jobs) and reproduce.known(None, plan, tmp_path) == {}
    anew, own = "policy/resnet20-proxy-2.4bit-asga-0", {name for name, job in plan.jobs.items() if "2.4bit-asga-0" in name and "-digits-" not in name
                                                         and "-target-2.4" not in name}
    (tmp_path / anew).mkdir(parents=True)
    (tmp_path / anew / "policy.json").write_text("{}")
    assert len(own) == 4 and set(known(rows, tmp_path)) == set(plan.jobs) - own              # search, transfer, flatness of both
    (tmp_path / "fp" / "resnet20-target").mkdir(parents=True)
    (tmp_path / "fp" / "resnet20-target" / "metrics.json").write_text("{}")                  # weights trained again: no reason
    assert set(known(rows, tmp_path)) == set(plan.jobs) - own - {"fp/resnet20-target"}
    rows[0]["command"] += " --lr 1"
    assert rows[0]["name"] not in known(rows, tmp_path)
    file.write_text("what")
    with pytest.raises(asga.AsgaError, match="--known .* runs.jsonl"):
        reproduce.known(file, plan, tmp_path)


def test_a_figure_that_leaves_the_reference_is_named_and_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "REFERENCE", tmp_path / "reference.json")
    for slow in ("plots", "text"):
        monkeypatch.setattr(report, slow, lambda *args: "")
    plan, transfers, _ = reproduce.planned("small", {"proxy": "/P", "target": "/T", "digits": "digits"})
    with open(HERE.parent / "results" / "reproduce" / "runs.jsonl") as file:
        records = {r["name"]: r for r in map(json.loads, file) if r["name"] in plan.jobs and "sensitivity-3" not in r["name"]}
    args = argparse.Namespace(scale="small", out=str(tmp_path / "out"), proxy="/P", target="/T", accept=True)
    assert report.write(records, tmp_path, plan, transfers, args)
    held, key = json.loads(report.REFERENCE.read_text()), "resnet20 2.4bit {} proxy target 1.0"
    assert held[key.format("asga")][4] == 5 and key.format("sensitivity") not in held                  # one of its seeds did not run
    args.accept = False
    assert report.write(records, tmp_path, plan, transfers, args)
    for name, record in records.items():
        if name.startswith("transfer/resnet20-proxy-2.4bit-asga-") and "half" not in name and "rho" not in name:
            record["metrics"]["tuned"]["accuracy"] -= 5
    assert not report.write(records, tmp_path, plan, transfers, args)
    shown = (tmp_path / "out" / "reproduce.md").read_text()
    assert f"**outside the tolerance:** {key.format('asga')}" in shown and key.format("asga") in capsys.readouterr().out
    assert held == json.loads(report.REFERENCE.read_text())


def test_small_weights_lie_beside_the_results_and_are_taken_from_there(tmp_path, monkeypatch):
    for slow in ("plots", "text"):
        monkeypatch.setattr(report, slow, lambda *args: "")
    plan, transfers, _ = reproduce.planned("full", {"proxy": "/P", "target": "/T", "digits": "digits"})
    here, out = tmp_path / "here", tmp_path / "out"
    for name, size in (("fp/resnet20b-proxy", 10), ("fp/lite0-proxy", 2 ** 21)):
        (here / name).mkdir(parents=True)
        (here / name / "model.pt").write_bytes(bytes(size))
        (here / name / "metrics.json").write_text('{"full_precision": {"accuracy": 50.0, "loss": 1.0}, "seconds": 1.0}')
        (here / f"{name}.log").write_text(f"{reproduce.line(plan.jobs[name], here)}\nasga.py abc\n")
    args = argparse.Namespace(scale="full", out=str(out), proxy="/P", target="/T", accept=False)
    records = report.collect(here, plan, transfers)
    report.write(records, here, plan, transfers, args)
    assert {str(f.relative_to(out)) for f in out.rglob("*.pt")} == {"reproduce/fp/resnet20b-proxy/model.pt"}     # 14 MB are too many for git
    there = tmp_path / "there"
    there.mkdir()
    reproduce.take_weights(out / "reproduce" / "runs.jsonl", plan, there)
    reproduce.check(plan.jobs, there)
    assert not (there / "fp" / "lite0-proxy").exists() and (there / "fp/resnet20b-proxy/model.pt").read_bytes() == bytes(10)
    assert report.collect(there, plan, transfers) == {name: r for name, r in records.items() if "resnet20b" in name}
    (there / "fp/resnet20b-proxy/model.pt").write_bytes(b"own")                                               # one's own are left alone
    reproduce.take_weights(out / "reproduce" / "runs.jsonl", plan, there)
    assert (there / "fp/resnet20b-proxy/model.pt").read_bytes() == b"own"


def test_only_runs_from_the_same_weights_are_paired():
    run = lambda seed, method, start, accuracy: {"cell": dict(net="n", budget="b", method=method, seed=seed, proxy="p", target="t", share="1.0"),
                                                 "metrics": {"full_precision": {"loss": start}, "tuned": {"accuracy": accuracy, "loss": 1.0}}}
    runs = report.Runs(dict(enumerate([run(0, "one", 2.0, 50), run(0, "other", 2.0000001, 48), run(1, "one", 2.0, 50), run(1, "other", 2.01, 40)])))
    one, other = (runs.seeds("n", "b", m, "p", "t") for m in ("one", "other"))
    assert runs.paired(one, other) == [2] and runs.common(one, other) == [0]


def searched(method, seed, seconds, steps=20):
    """Records of a search and its transfer."""
    cell = dict(net="resnet20", budget="2.4bit", method=method, seed=seed, proxy="proxy", target="target", share="1.0")
    log = [{"step": s, "bits": [[3.0]], "loss": 1.0} for s in range(10, steps + 1, 10)]
    search = {"name": f"policy/resnet20-{method}-{seed}", "policy": {"a": (3, 3)}, "log": log, "step_seconds": seconds, "seconds": 99}
    return {search["name"]: search, f"transfer/{method}-{seed}": {"cell": cell, "needs": [search["name"]]}}


def test_supernets_are_compared_within_one_version_and_draws_beyond_the_common_seeds_count():
    one, other = ({s: {"asga.py": "ab"[s > limit], "metrics": {"full_precision": {"loss": 1.0}}} for s in range(4)} for limit in (1, 2))
    assert report.Runs({}).supernets(one, other) == [0, 1, 3]

    def run(method, seed, value, start=1.0):
        metrics = {"policy_bops": 1, **{part: {"accuracy": value, "loss": start} for part in ("full_precision", "quantized", "tuned")}}
        return {"cell": dict(net="n", budget="3bit", method=method, seed=seed, proxy="proxy", target="target", share="1.0"), "metrics": metrics, "needs": ["p"]}
    rows = {"p": {"policy": {"a": [2, 2]}}, **dict(enumerate([run("random", s, s) for s in range(5)] + [run("uniform", s, s / 2) for s in range(2)]))}
    table = report.methods_table(report.Runs(rows), "n", "3bit")
    assert "| +1.75 [" in table and "(not paired, n = 5 and 2) |" in table
    rows[99] = run("uniform", 7, 50, start=2.0)                                                         # from other weights: none of it
    table = report.methods_table(report.Runs(rows), "n", "3bit")
    assert "not paired" not in table and "| +0.25 (n = 2) |" in table


def test_times_of_steps_are_pooled_by_what_a_step_does():
    runs = report.Runs(searched("joint", 0, 1.0) | searched("joint-double-steps", 0, 1.2, 40) | searched("joint", 1, 1.1) | searched("asga", 0, 2.0)
                       | searched("sam", 0, 2.2) | searched("loss-weight-joint", 0, 5.0) | searched("joint-softmax", 0, 6.0))
    times = {m: report.step_time(runs, "resnet20", "2.4bit", m) for m in ("joint", "joint-double-steps", "asga", "joint-softmax")}
    assert times == pytest.approx({"joint": 1.1, "joint-double-steps": 1.1, "asga": 2.1, "joint-softmax": 5.5})
    assert report.search_time(runs, "resnet20", "2.4bit", "joint-double-steps") == pytest.approx(44)


def test_searches_are_counted_once_where_their_policies_are_tuned_twice():
    found = searched("asga", 0, 2.0)
    cell = found["transfer/asga-0"]["cell"]
    found["again"] = {**found["transfer/asga-0"], "cell": {**cell, "net": "other"}}
    runs = report.Runs(found)
    assert set(runs.searches("resnet20", "2.4bit", "asga")) == {0} == set(runs.seeds("other", "2.4bit", "asga"))
    assert runs.searches("other", "2.4bit", "asga") == {} and report.search_time(runs, "other", "2.4bit", "asga") is None


def test_ranks_are_of_runs_from_the_same_weights():
    def run(target, seed, loss, start):
        metrics = {"full_precision": {"loss": start}, **{part: {"accuracy": -way * loss, "loss": way * loss} for part, way in (("quantized", 1), ("tuned", -1))}}
        return {"cell": dict(net="resnet20", budget="2.4bit", method="random", seed=seed, proxy="proxy", target=target, share="1.0"), "metrics": metrics}
    rows = [run(t, seed, seed + (seed == 7) * 99, 1.0 + (seed == 7 and t == "target")) for t in ("target", "proxy") for seed in range(8)]
    table = report.rank_rows(report.Runs(dict(enumerate(rows))))
    assert table.count("both | ") == table.count("| 7 | +1.00 [+1.00, +1.00] |") == 4                     # seed 7 began elsewhere
    assert table.count("| 7 | -1.00 [-1.00, -1.00] |") == 4                                               # tuning turned the order round
    assert report.rank_rows(report.Runs(dict(enumerate(rows[:12])))) == ""


def test_what_did_not_run_is_listed():
    cell = reproduce.Cell("n", "3bit", "asga", 0)
    cells = {cell._replace(seed=s, method=m): f"{m}{s}" for m in ("asga", "joint") for s in range(3)} | {cell._replace(share="0.1"): "tenth"}
    found = report.missing(cells, dict.fromkeys(["asga0", "asga2", "joint0", "joint1", "joint2"]))
    assert found.strip() == "Planned at this scale and not run (seeds run / planned): n 3bit: asga 2/3; n 3bit (10% of the proxy → target): asga 0/1."
    assert report.missing(cells, dict.fromkeys(cells.values())) == ""


def test_each_claim_has_its_row_in_the_committed_report():
    table = (HERE.parent / "results" / "reproduce.md").read_text().split("## Time of a search")[0]
    for claim, what in report.PRIMARY:
        assert any(f"| {claim} |" in line and f"{what} |" in line for line in table.splitlines()), claim


def test_beta_gradients_are_those_of_the_optimizer_along_the_budget():
    torch.manual_seed(0)
    model, x, y = asga.ResNet20(10), torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    settings = asga.SearchSettings(candidates_w=(2, 4), candidates_a=(2, 3, 4), rho_max=0.02, alpha=0.001)
    run = asga.Search(model, *asga.plan(model, x[:1], "3bit", settings), settings, [x])
    before = [p.detach().clone() for p in run.net.parameters()]
    g, g_p, whole = beta_gradient.beta_gradients(run, [(x, y)] * 2)
    assert all(torch.equal(a, b) for a, b in zip(before, run.net.parameters()))
    normal = torch.cat([row[1:-1] for row in run.budget.gradient(run.bits())])                          # edge layers are fixed
    assert (g @ normal).abs().max() < 1e-9 * normal.norm() and (g_p @ normal).abs().max() < 1e-9 * normal.norm()
    loss = F.cross_entropy(run.net(x), y)
    optimizer = asga.ASGA(run.net.parameters(), torch.optim.SGD, lr=0.0, rho_min=0.0, rho_max=0.02, alpha=0.001, project=False, direction="perturbed")
    own = torch.autograd.grad(loss, [q.beta for q in run.free])

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(run.net(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    for found, raw in ((g, own), (g_p, [q.beta.grad for q in run.free])):
        raw = torch.stack([v.double() for v in raw])
        assert torch.allclose(found[1], raw - (raw @ normal) / normal.square().sum() * normal, atol=1e-6) and found[1].norm() > 1e-3
    assert whole[1].item() == pytest.approx(optimizer.last["cos"].item(), abs=1e-3)


def test_both_passes_of_beta_gradients_have_the_same_dropout():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Dropout(0.5), nn.Flatten(), nn.Linear(8 * 36, 8), nn.Dropout(0.5), nn.Linear(8, 5)), torch.randn(8, 3, 8, 8)
    settings = asga.SearchSettings(rho_max=0.0, rho_min=0.0, alpha=0.0, keep=None)
    run = asga.Search(model, *asga.plan(model, x[:1], "3.5bit", settings), settings, [x])
    g, g_p, whole = beta_gradient.beta_gradients(run, [(x, torch.arange(8) % 5)] * 2)
    assert torch.equal(g, g_p) and torch.allclose(whole, torch.ones(2)) and not torch.allclose(g[0], g[1])


def test_what_the_summary_of_beta_gradients_tells():
    """Gradients of known means under noise of known size: the means come out, and no difference where there is none."""
    torch.manual_seed(0)
    mean, other, noise = torch.tensor([3.0, 0.0, 0.0, 0.0]), torch.tensor([3.0, 4.0, 0.0, 0.0]), lambda size: size * torch.randn(4000, 4)
    g = mean + noise(5.0)
    told = beta_gradient.summary(g[:400], g[:400] + noise(5.0)[:400])
    assert told["p"]["g_p − g"] > 0.05 and told["length"]["expected g"] == pytest.approx(3, abs=0.5) and told["length"]["expected g_p − g"] < 0.4
    told = beta_gradient.summary(g[:1000], (g - mean + other + noise(1.0))[:1000])
    assert told["cos"]["expected g, g_p"] == pytest.approx(0.6, abs=0.07) and told["length"]["expected g_p − g"] == pytest.approx(4, abs=0.2)
    assert told["p"]["g_p − g"] == 0.001 and told["cos"]["halves: g, g_p"] < told["cos"]["halves: g_p, g_p"]
    told = beta_gradient.summary(torch.tensor([[1.0, 0.0], [0.0, 1.0]] * 2), torch.tensor([[1.0, 0.0]] * 4))
    assert told["cos"]["g, g_p"] == 0.5 and told["cos"]["g of two batches"] == pytest.approx(1 / 3, abs=1e-4)


def test_sensitivity_is_the_loss_of_one_quantized_tensor():
    torch.manual_seed(0)
    model, x, y = asga.ResNet20(10), torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    settings = asga.SearchSettings(candidates_w=(2, 4), candidates_a=(2, 4))
    run = asga.Search(model, *asga.plan(model, x[:1], "3bit", settings), settings, [x])
    scores = policies.one_at_a_time(run, policies.loss_of(run, [(x, y)]))
    place = run.budget.names.index("layer2.0.conv1")
    net = run.net.train()                                                                  # by the statistics of the batch
    asga.set_quantizers(net, False)
    base = F.cross_entropy(net(x), y)
    losses = []
    for kind, bits in (("weight_quantizer", 2), ("input_quantizer", 4)):
        q = getattr(asga.quantized_layers(net)["layer2.0.conv1"], kind)
        q.enabled = True
        q.beta.data.fill_(bits)
        losses.append((F.cross_entropy(net(x), y) - base).item())
        q.enabled = False
    assert scores[place][2, 4] == pytest.approx(sum(losses), abs=1e-5)


def test_the_readme_shows_what_the_committed_runs_say():
    if subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "README.md", "results"], cwd=HERE.parent, capture_output=True).returncode:
        pytest.skip("results/ or README.md are not those of the commit")
    printed = subprocess.run([sys.executable, "evidence/report.py", "results/reproduce/runs.jsonl"], cwd=HERE.parent, capture_output=True, text=True, check=True)
    with open(HERE.parent / "results" / "reproduce" / "runs.jsonl") as runs:
        whole = report.text(report.Runs({r["name"]: r for r in map(json.loads, runs)}))
    assert whole.strip() in (HERE.parent / "results" / "reproduce.md").read_text()
    shown = (HERE.parent / "README.md").read_text().split("runs.jsonl -->\n")[1].split("<!-- end -->")[0]
    assert shown.strip() == printed.stdout.strip()


@pytest.mark.parametrize("path", sorted((HERE.parent / "results" / "policies").glob("*.json")), ids=lambda path: path.stem)
def test_ready_policies_fit_their_networks_and_budgets(path):
    policy = asga.Policy.load(path)
    net = asga.build(policy.info["arch"], policy.info["proxy"]["classes"]).eval()
    resolution = policy.info["search"]["settings"]["cost_resolution"]
    measured = policy.measure(net, torch.zeros(1, 3, resolution, resolution))
    limit = policy.info["budget"]["bops"]
    assert 0.99 * limit <= measured.bops == policy.bops <= limit


def test_bench_measures_every_variant(monkeypatch):
    monkeypatch.setattr(asga.Fused, "on", False)
    made = bench.Bench("resnet20", 16, 4, 10, asga.CANDIDATES, "float32", torch.device("cpu"))
    found = bench.measure(made, 1)
    assert all(len(times) == 1 and times[0] > 0 for times in found["samples"].values())
    memory = found["peak_bytes"]
    assert memory["full_precision"] < memory["asga_recompute"] < memory["asga"] and found["ratios"]["asga_over_two_pass"] > 1
    one = lambda name: found["samples"][name][0]
    assert one("optimizer_alone") < one("asga") and found["ratios"]["joint_over_full_precision"] == one("joint") / one("full_precision")
