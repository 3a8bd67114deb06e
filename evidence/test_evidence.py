"""What the evidence computes, against plain oracles."""
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import report  # noqa: E402
import reproduce  # noqa: E402

RUNS = {run["name"]: run for run in report.read(HERE.parent / "results/reproduce/runs.jsonl")}


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
    committed = (HERE.parent / "results/reproduce.md").read_text()
    assert report.verdicts(report.PLAN["headline"], runs) in committed and report.ranks(runs) in committed
    name, weights = "policy/resnet20b-proxy-2.4bit-joint-0", "fp/resnet20b-proxy"
    own, taken = (reproduce.Plan("full", HERE.parent / out).jobs[name] for out in ("nowhere", "results"))
    assert own.needs == [weights] and f"--weights {{work}}/{weights}/" in own.command
    assert taken.needs == [] and f"--weights {{out}}/reproduce/{weights}/" in taken.command


def test_planned_flags_are_those_of_the_commands():
    jobs = [job.command.split() for job in reproduce.Plan("full", "nowhere").jobs.values()]
    for command in {tuple(job[:1 + (job[0] == "asga.py")]) for job in jobs}:
        parts = {part for job in jobs if tuple(job[:len(command)]) == command for part in job}
        known = subprocess.check_output([sys.executable, *command, "--help"], cwd=HERE.parent, text=True)
        assert {part for part in parts if part[:2] == "--"} <= set(known.replace("[", " ").split()), command


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
    with pytest.raises(report.asga.AsgaError, match="no finished transfer"):
        report.write(reproduce.Plan("small", out), {"work": work, "out": out})
    old = [run for run in RUNS.values() if "resnet20-proxy-2.4bit-asga-" in run["name"]]
    policy = {"layers": {"fc": {"w": 8, "a": 4}}, "cost": {}, "budget": {}, "versions": {}, "search": {}}
    rows = [dict.fromkeys(report.LOGGED, s) | {"step": s, "time": 2 * s, "rho": min(s, 9)} for s in range(20)]
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
    assert [made[key] for key in ("asga.py", "step_seconds", "at_most", "at_least")] == ["abc", 2, 0.55, 0.05]
