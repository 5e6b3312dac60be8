"""The benchmark registry at toy sizes, the way it measures, and the report made from it."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

pytest.importorskip("scipy", reason='the peers need scipy: pip install "hellm[dev]"')

from benchmarks import catalogue, ceilings, inputs, large, measure, memory, peers, report, scale, traffic  # noqa: E402
from benchmarks.cases import CASES, TARGETS  # noqa: E402
from benchmarks.ops import hypergraph_conv, info_nce  # noqa: E402
from benchmarks.registry import (  # noqa: E402
    CPU,
    GPU,
    LIMIT,
    MEMORY_CASES,
    Case,
    Entry,
    MemoryCase,
    Setup,
    Target,
    Workload,
    on_device,
    worst_relative_error,
)
from hellm.ops.backends import loaders  # noqa: E402

# ------------------------------------------------------------------------------------------------------- registry


@pytest.mark.parametrize("name", on_device(CASES, CPU))
def test_case_runs_and_every_implementation_agrees(name):
    record = measure.measure_case(CASES[name], quick=True, tiny=True)
    assert record["failure"] is None
    assert record["entries"][0]["label"] == "hellm"
    roles = [entry["role"] for entry in record["entries"]]
    assert roles.count("peer") >= 1
    for entry in record["entries"]:
        seconds = entry["seconds"]
        assert 0 < seconds["min"] <= seconds["p20"] <= seconds["median"] <= seconds["p80"]
        assert entry["role"] == "limit" or entry["error"] <= entry["tolerance"]
    json.dumps(record, allow_nan=False)


def test_every_target_is_of_a_case_on_its_device_and_means_a_peer_of_it():
    assert {device for case in CASES.values() for device in case.devices} == {CPU, GPU}
    for target in TARGETS:
        assert target.device in CASES[target.case].devices, target
        workload = CASES[target.case].workload(Setup(gpu=target.device == GPU, tiny=True))
        if target.entry and target.device == CPU:
            assert target.entry in [entry.label for entry in workload.entries], target
        if target.peer and target.peer not in (LIMIT, "hellm cuda"):
            meant = [entry for entry in workload.entries if target.peer.lower() in entry.label.lower()]
            assert meant and not any(entry.hellm for entry in meant), target


def test_registry_holds_the_promises():
    promises = {
        (target.case, target.entry, target.factor, target.peer if target.peer in (LIMIT, "sums written") else "peer")
        for target in TARGETS
        if target.device == CPU
    }
    assert promises == {
        ("info_nce-users", "hellm", 6.0, "peer"),
        ("info_nce-users", "hellm", 0.8, "limit"),
        ("info_nce-users", "hellm, medium", 10.0, "peer"),
        ("item_cross_entropy", "hellm", 2.0, "peer"),
        ("item_cross_entropy", "hellm", 0.8, "limit"),
        ("conv-forward", "hellm", 2.5, "peer"),
        ("conv-forward", "hellm", 0.8, "limit"),
        ("conv-forward", "hellm", 0.8, "sums written"),
        ("conv-backward", "hellm", 100.0, "peer"),
        ("conv-backward", "hellm", 0.8, "limit"),
        ("conv-backward", "hellm", 0.8, "sums written"),
        ("knn-128", "hellm", 1.8, "peer"),
        ("knn-512", "hellm", 1.8, "peer"),
        ("sampler-tiktok", "hellm", 20.0, "peer"),
        ("sampler-sports", "hellm", 20.0, "peer"),
        ("step-tiktok", "hellm", 5.0, "peer"),
    }
    assert MEMORY_CASES["memory-hellm-36000"].at_most == 64
    assert MEMORY_CASES["memory-hellm-36000"].num_rows == 36_000
    assert scale.SIZES[-1] == (1_000_000, 500_000, 20_000_000)
    assert scale.MAX_PEAK_BYTES == 8e9


# ---------------------------------------------------------------------------------------------------------- peers


def test_published_loss_by_hand():
    # Orthogonal unit rows, identical views, t = 1: e / (sum of (e, 1) twice - e) = e / (e + 2).
    eye = torch.eye(2, dtype=torch.float64)
    expected = -np.log(np.e / (np.e + 2))
    for chunk in (1, 2):
        assert info_nce.info_nce_published(eye, eye, 1.0, chunk=chunk).item() == pytest.approx(expected)
        assert info_nce.info_nce_checkpointed(eye, eye, 1.0, chunk=chunk).item() == pytest.approx(expected)
    assert info_nce.info_nce_unbatched(eye, eye, 1.0).item() == pytest.approx(expected)


def test_strip_gradients_equal_autograd():
    anchor, positive = (view.detach().double().requires_grad_() for view in inputs.views(23, 5))
    expected = torch.autograd.grad(info_nce.info_nce_published(anchor, positive, 0.3), (anchor, positive))
    found = torch.autograd.grad(info_nce.info_nce_strip(anchor, positive, 0.3, strip=7), (anchor, positive))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_clique_matrices_by_hand():
    # Users 0, 1 share item 0; users 1, 2 share item 1; user 3 has nobody.
    h = hypergraph_conv.incidence(np.array([[0, 1, 1, 2, 3], [0, 0, 1, 1, 2]]), (4, 3))
    expected = np.array([[0, 1, 0, 0], [0.5, 0, 0.5, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(hypergraph_conv.clique_row(h).toarray(), expected)
    x = torch.eye(4)
    for operator in (
        hypergraph_conv.TwoProducts(h),
        hypergraph_conv.TwoProducts(h, product=hypergraph_conv.reduce_product),
    ):
        np.testing.assert_allclose(operator(x), expected, atol=1e-7)
        np.testing.assert_allclose(operator.backward(x), expected.T, atol=1e-7)
    np.testing.assert_allclose(hypergraph_conv.ScipyTwoProducts(h)(x), expected, atol=1e-7)
    square = h.toarray() @ h.toarray().T
    root = np.sqrt(square.sum(1))
    np.testing.assert_allclose(hypergraph_conv.clique_symmetric(h).toarray(), square / root[:, None] / root)
    operator = hypergraph_conv.TwoProducts(h, symmetric=True)
    np.testing.assert_allclose(operator(x), square / root[:, None] / root, atol=1e-7)
    np.testing.assert_allclose(operator.backward(x), square / root[:, None] / root, atol=1e-7)


def test_interactions_are_distinct_and_as_many_as_asked():
    size = inputs.Size(50, 30, 400)
    pairs = inputs.interactions(size, seed=3)
    assert pairs.shape == (2, 400)
    assert pairs.dtype == np.int64
    assert len({*map(tuple, pairs.T.tolist())}) == 400
    assert (pairs.max(1) < [50, 30]).all() and pairs.min() >= 0
    np.testing.assert_array_equal(pairs, inputs.interactions(size, seed=3))
    assert (pairs.shape != inputs.interactions(size, seed=4).shape) or (
        pairs != inputs.interactions(size, seed=4)
    ).any()


def test_interactions_refuse_more_than_half_of_all_pairs():
    with pytest.raises(ValueError, match=r"num_interactions must be <= 6, got 7"):
        inputs.interactions(inputs.Size(4, 3, 7))


# ------------------------------------------------------------------------------------------------------ measuring


def _workload(*peers_found: float, tolerance: float = 1e-4) -> Workload:
    """hellm finds 1.0, each peer what is given."""
    found = [("hellm", 1.0), *((f"peer {place}", value) for place, value in enumerate(peers_found))]
    entries = [
        Entry(
            label,
            lambda value=value: (torch.tensor([value]),),
            "hellm" if label == "hellm" else "peer",
            tolerance,
        )
        for label, value in found
    ]
    return Workload([*entries, ceilings.matrix_product(Setup(tiny=True))], 1.0, parameters={"N": 1})


def test_no_numbers_without_agreement():
    case = Case("wrong", "group", "title", lambda setup: _workload(1.0, 1.1))
    record = measure.measure_case(case, quick=True)
    assert record["failure"] == "peer 1: error 1.00e-01 > 1e-04"
    assert "entries" not in record and "targets" not in record


def test_a_peer_whose_library_is_missing_is_skipped_and_hellm_is_not():
    def absent():
        raise ImportError("no such module")

    workload = _workload(1.0)
    workload.entries.insert(1, Entry("absent", absent))
    errors, seconds = measure.check(workload)
    assert workload.skipped == {"absent": "not installed: no such module"}
    assert "absent" not in {*errors, *seconds, *(entry.label for entry in workload.entries)}
    with pytest.raises(ImportError, match="no such module"):
        measure.check(Workload([Entry("hellm", absent, "hellm")], 1.0))


def test_check_refuses_nan_and_other_shapes():
    with pytest.raises(measure.Disagreement, match="peer 0: error inf > 1e-04"):
        measure.check(_workload(float("nan")))
    assert worst_relative_error([torch.ones(2)], [torch.ones(3)]) == float("inf")
    assert worst_relative_error([torch.ones(2)], []) == float("inf")
    assert worst_relative_error([torch.tensor([1.0, 4.5])], [torch.tensor([1.0, 5.0])]) == pytest.approx(0.1)


def test_entries_take_turns_and_leave_after_their_rounds():
    calls: list[str] = []
    entries = [Entry(label, lambda label=label: calls.append(label)) for label in "AB"]
    samples, cold = measure.time_in_turns(entries, {"A": 3, "B": 1})
    assert calls == ["A", "B", "A", "A"]
    assert {label: len(times) for label, times in samples.items()} == {"A": 3, "B": 1}
    assert cold == {"A": [], "B": []}


def test_a_short_entry_runs_twice_a_turn_and_its_second_time_counts():
    calls: list[str] = []

    def slow_at_first():
        time.sleep(0.02 * (calls[-1:] != ["A"]))
        calls.append("A")

    entries = [Entry("A", slow_at_first), Entry("B", lambda: calls.append("B"))]
    samples, cold = measure.time_in_turns(entries, {"A": 2, "B": 2}, ["A"])
    assert calls == ["A", "A", "B"] * 2
    assert len(samples["A"]) == len(cold["A"]) == len(samples["B"]) == 2
    assert max(samples["A"]) < 0.02 <= min(cold["A"])


def test_summary_by_hand():
    found = measure.summary([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert found == {"median": 3.5, "min": 1.0, "p20": 2.0, "p80": 5.0, "rounds": 6}
    assert measure.summary([2.0]) == {"median": 2.0, "min": 2.0, "p20": 2.0, "p80": 2.0, "rounds": 1}


def test_labels_hold_for_every_size():
    """Runs are named before they are built at their size: a label that names one would name a smaller one."""
    for limit in (ceilings.matrix_product, ceilings.memory_copy):
        small, full = limit(Setup(tiny=True)), limit(Setup())
        assert small.label == full.label and small.work < full.work
    assert ceilings.matrix_product(Setup()).note == "torch.mm, float32, 4096^3"


def test_judge_takes_the_fastest_peer_and_the_limit():
    medians = {"hellm": 1.0, "peer a": 4.0, "peer b": 3.0, "other": 2.0}
    faster = measure.judge(Target("case", "hellm", "peer", 3.5), medians, {}, [])
    assert (faster["versus"], faster["value"], faster["met"]) == ("peer b", 3.0, False)
    share = measure.judge(Target("case", "hellm", LIMIT, 0.5), medians, {"hellm": 6.0, "copy": 10.0}, ["copy"])
    assert (share["kind"], share["value"], share["met"]) == ("limit", 0.6, True)
    for target, limits in (
        (Target("case", "hellm", "absent", 1.8), ["copy"]),
        (Target("case", "hellm", LIMIT, 0.5), []),
    ):
        without = measure.judge(target, medians, {"hellm": 6.0, "copy": 10.0}, limits)
        assert (without["versus"], without["value"], without["met"]) == (target.peer, None, None)


def test_a_case_that_raises_leaves_the_others_and_a_spent_budget_is_told(monkeypatch, capsys):
    def broken(setup):
        raise RuntimeError("no such luck")

    cases = {"broken": Case("broken", "g", "t", broken), "good": Case("good", "g", "t", lambda setup: _workload(1.0))}
    monkeypatch.setattr(measure, "CASES", cases)
    run = measure.measure_all(["broken", "good"], quick=True)
    assert [record["failure"] for record in run["cases"]] == ["RuntimeError: no such luck", None]
    assert "no such luck" in capsys.readouterr().err
    run = measure.measure_all(["good"], budget_seconds=-60)
    assert run["not_run"] == {"good": "the budget of -1 minutes was spent"}
    assert report.render([{**run, "file": "x.json"}]).count("the budget of -1 minutes was spent") == 1


def test_partial_run_writes_only_where_told(tmp_path, capsys):
    out = tmp_path / "sub" / "one.json"
    before = sorted((ROOT / "benchmarks" / "results").glob("*"))
    assert measure.main(["--tiny", "--quick", "--only", "sampler-tiktok"]) == 0
    assert sorted((ROOT / "benchmarks" / "results").glob("*")) == before
    assert measure.main(["--tiny", "--quick", "--only", "sampler-tiktok", "--out", str(out)]) == 0
    run = json.loads(out.read_text())
    assert [record["name"] for record in run["cases"]] == ["sampler-tiktok"]
    assert run["environment"]["versions"]["torch"] == torch.__version__
    assert [path.name for path in out.parent.iterdir()] == ["one.json"]
    assert "Python loop, published draws" in capsys.readouterr().out


def test_unknown_case_is_refused(capsys):
    with pytest.raises(SystemExit):
        measure.main(["--only", "nothing"])
    assert "invalid choice: 'nothing'" in capsys.readouterr().err


def test_numbers_of_the_fallback_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(loaders, "native", lambda: ImportError("no such file"))
    with pytest.raises(SystemExit):
        measure.main(["--only", "sampler-tiktok"])
    assert "must be those of the compiled kernels, but" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc/self/status")
def test_memory_counts_what_a_call_keeps(monkeypatch):
    published = memory.measure("memory-published-9308", tiny=True)
    assert published["failure"] is None
    # Autograd keeps two [1000, 1000] float32 blocks of exponentials.
    assert published["extra_mib"] > 2 * 1000**2 * 4 / 2**20
    monkeypatch.setitem(MEMORY_CASES, "wrong", MemoryCase("wrong", "info_nce-users", "no such entry", 10))
    assert memory.measure("wrong")["failure"] == "KeyError: 'no such entry'"


# ------------------------------------------------------------------------------------------------- scale and report


@pytest.fixture(scope="module")
def scale_run():
    sizes = (inputs.Size(100, 50, 500), inputs.Size(200, 100, 1000))
    return scale.measure(sizes, rounds=1, say=lambda text: None)


def test_scale_runs_each_size_in_its_own_process(scale_run):
    assert [record["failure"] for record in scale_run["sizes"]] == [None, None]
    assert [record["num_incidences"] for record in scale_run["sizes"]] == [500, 1000]
    assert all(record["peak_bytes"] > 50e6 for record in scale_run["sizes"])
    assert set(scale_run["growth"]) == {"build_seconds", "forward_seconds", "backward_seconds", "gather_seconds"}


@pytest.mark.parametrize("stage", catalogue.STAGES)
def test_a_step_over_some_items_of_a_catalogue(stage):
    found = catalogue.run_steps(stage, 600, 50, 1)
    assert found["seconds_of_epoch"] == found["seconds_of_step"] * found["steps_per_epoch"]
    assert np.isfinite(found["losses"]).all() and found["peak_bytes"] > 50e6
    data = catalogue.shop(600)
    assert (data.num_users, data.num_items, data.num_events) == (450, 600, 3600)


def test_report_tells_how_many_neighbours_were_sampled():
    row = {"num_items": 600, "sampled": 50, "seconds_of_step": 1.0, "steps_per_epoch": 3, "seconds_of_epoch": 3.0}
    rows = [{"stage": stage, "peak_bytes": 1e9, **row} for stage in catalogue.STAGES]
    assert "Sampled neighbours" not in report._catalogue_section({"rows": rows})[0]
    rows[-1]["sampled_neighbours"] = 8
    (section,) = report._catalogue_section({"rows": rows})
    assert "Sampled neighbours are 8, in place of the whole graphs." in section
    assert "| stage 1, sampled neighbours | 600 | 50 drawn |" in section


def test_kernels_of_an_instruction_set_are_measured(tmp_path, capsys):
    extension = loaders.extension()
    before = extension.instruction_set()
    try:
        told = ["--tiny", "--quick", "--only", "conv-forward", "--out", str(tmp_path / "cpu.json")]
        assert measure.main([*told, "--instruction-set", "portable"]) == 0
        run = json.loads((tmp_path / "cpu.json").read_text())
        assert run["environment"]["hellm_instruction_set"] == "portable"
        with pytest.raises(SystemExit):
            measure.main([*told, "--instruction-set", "mmx"])
        assert "--instruction-set must be one of " in capsys.readouterr().err
    finally:
        extension.use_instruction_set(before)


def test_stages_of_a_large_shop(tmp_path, capsys):
    stages = ["build", "samplers", "stage1", "sequence"]
    out, sizes = tmp_path / "large.json", ["--events", "2000", "4000"]
    assert large.main([*sizes, "--stages", *stages, "--folder", str(tmp_path), "--out", str(out)]) == 0
    assert capsys.readouterr().out.count("an epoch") == 4
    assert [one.name for one in tmp_path.iterdir()] == ["large.json"]
    run = json.loads(out.read_text())
    assert set(run["growth"]) == set(stages) and run["met"]
    # Memory of steps, which hold tables of all users, is not what is bounded.
    run["max_peak_bytes"] = max(run["sizes"][1]["stages"][stage]["peak_bytes"] for stage in ("build", "samplers"))
    ((*_, reached, verdict),) = report._target_rows(run)
    assert (reached, verdict) == (f"{run['max_peak_bytes'] / 1e9:.2f} GB", "met")
    (section,) = report._large_section(run)
    assert "| events | build | samplers | stage1 | sequence |" in section and "| 4,000 | " in section


def test_lists_of_another_library_are_tested_as_ours():
    """Those of a scorer, cut to 20, have its metrics; a list that is short has the items that it has."""
    from hellm.data import Dataset, IdMap
    from hellm.evaluate import evaluate_dataset

    draw, (num_users, num_items, events) = np.random.default_rng(0), (30, 50, 6)
    users = np.repeat(np.arange(num_users), events)
    items = np.concatenate([draw.permutation(num_items)[:events] for _ in range(num_users)])
    split = np.tile(np.array([0, 0, 0, 0, 1, 2], np.int8), num_users)
    ids = (IdMap([str(row) for row in range(count)]) for count in (num_users, num_items))
    data = Dataset("made", num_users, num_items, users, items, None, split, *ids)
    scores = torch.from_numpy(draw.normal(size=(num_users, num_items))).float()

    class Scorer:
        def scores(self, users: torch.Tensor) -> torch.Tensor:
            return scores[users].clone()

    lists = scores.topk(20).indices.numpy()
    expected = evaluate_dataset(Scorer(), data, split="test", protocol="recbole-sequential", ks=peers.KS).metrics
    assert expected["recall@20"] > expected["recall@10"] > 0
    assert peers.tested(lists, data) == expected
    short = lists.copy()
    short[:, 10:] = -1
    assert peers.tested(short, data)["recall@20"] == expected["recall@10"]


@pytest.mark.skipif(not Path("/proc/net/dev").is_file(), reason="what is sent is read from /proc")
def test_bytes_that_loopback_sends_are_counted():
    with _connected() as (sender, receiver):
        before = traffic._sent()
        sender.sendall(b"x" * 100_000)
        received = 0
        while received < 100_000:
            received += len(receiver.recv(65536))
        assert traffic._sent() - before >= 100_000


@contextlib.contextmanager
def _connected():
    """Two ends of a connection over loopback."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as sender:
        receiver, _ = server.accept()
        with receiver:
            yield sender, receiver


def test_growth_of_a_square_is_two():
    records = [{"num_interactions": n, "cost": 3.0 * n**2} for n in (10, 100, 1000)]
    assert scale.growth(records, "cost") == pytest.approx(2.0)


def test_scale_refuses_a_limit_below_all_sizes(capsys):
    with pytest.raises(SystemExit):
        scale.main(["--largest", "10"])
    assert "--largest must be >= 200000, got 10" in capsys.readouterr().err


@pytest.fixture
def folder(tmp_path, scale_run):
    """A benchmarks folder with one run of cases by hand and one scale run."""
    seconds = {"median": 0.002, "min": 0.0015, "p20": 0.0018, "p80": 0.0025, "rounds": 7}
    slow = {name: value * 8 if name != "rounds" else 3 for name, value in seconds.items()}
    entry = {"role": "hellm", "note": "", "error": 0.0, "tolerance": 1e-4, "cold_seconds": 0.003}
    limit = {"role": "limit", "note": "", "error": None, "tolerance": None, "cold_seconds": None}
    case = {
        "name": "one",
        "group": "Group",
        "title": "Title",
        "parameters": {"N": 12345, "t": 0.5},
        "skipped": {"absent": "not installed: no such module"},
        "work": 1e9,
        "unit": "FLOP",
        "repeats": ["epoch", 59],
        "entries": [
            {**entry, "label": "hellm", "seconds": seconds, "rate": 5e11},
            {**entry, "label": "pe|er", "role": "peer", "seconds": slow, "rate": 6.25e10, "error": 2e-6},
            {**limit, "label": "product", "seconds": seconds, "rate": 1e12},
            {**limit, "label": "of a library", "seconds": seconds, "rate": 9e11},
        ],
        "targets": [
            {"entry": "hellm", "versus": "pe|er", "kind": "speed-up", "at_least": 6.0, "value": 8.0, "met": True},
            {"entry": "hellm", "versus": "product", "kind": "limit", "at_least": 0.65, "value": 0.5, "met": False},
            {"entry": "hellm", "versus": "faiss", "kind": "speed-up", "at_least": 1.8, "value": None, "met": None},
        ],
        "failure": None,
    }
    failed = {**case, "name": "two", "failure": "peer: error 1 > 0", "targets": []}
    memories = [
        {"name": "m", "title": "loss", "num_rows": 36000, "at_most_mib": 64.0, "extra_mib": 41.24, "met": True}
        | {"failure": None}
    ]
    run = {"schema": 1, "kind": "cases", "environment": scale_run["environment"], "settings": {}, "not_run": {}}
    run |= {"cases": [case, failed], "memory": memories, "seconds": 1.0}
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "cpu.json").write_text(json.dumps(run))
    (tmp_path / "results" / "scale.json").write_text(json.dumps(scale_run))
    (tmp_path / "notes.md").write_text("## Notes\n\nWritten by hand.\n")
    return tmp_path


def test_report_of_a_small_run(folder):
    assert report.main(["--folder", str(folder)]) == 0
    page = (folder / "README.md").read_text()
    assert "| one | hellm | pe\\|er | 6x | 8x | met |" in page
    assert "| one | hellm | product | 65% | 50% | **missed** |" in page
    assert "| one | hellm | faiss | 1.8x | unmeasured |  |" in page
    assert "| m | loss, N 36,000 |  | 64 MiB | 41.2 MiB | met |" in page
    assert "N 12,345, t 0.5" in page
    row = "| hellm | 2 ms | 118 ms | 1.8 ms - 2.5 ms | 3 ms | 7 | 500 GFLOP/s | 50% | 1.00 | 0e+00 (1e-04) |  |"
    assert row in page
    assert "| pe\\|er | 16 ms | 944 ms |" in page
    assert "Left out: absent (not installed: no such module)" in page
    assert "**No numbers: peer: error 1 > 0**" in page
    assert "| 1,000 | 200 | 100 |" in page
    assert page.endswith("## Notes\n\nWritten by hand.\n")
    from PIL import Image

    with Image.open(folder / "figures" / "scale.png") as image:
        assert image.size == (1200, 480)
        assert len(image.convert("RGB").getcolors(maxcolors=10**6)) > 10
    assert "](figures/scale.png)" in page
    assert not list(folder.rglob("*.tmp"))


def test_report_follows_the_numbers(folder):
    before = report.generate(folder)
    path = folder / "results" / "cpu.json"
    run = json.loads(path.read_text())
    changed = copy.deepcopy(run)
    changed["cases"][0]["entries"][0]["seconds"]["median"] = 0.004
    path.write_text(json.dumps(changed))
    assert report.generate(folder) != before
    path.write_text(json.dumps(run))
    assert report.generate(folder) == before


def test_report_names_a_bad_file(folder):
    (folder / "results" / "cpu.json").write_text('{"kind": \n 1,}')
    with pytest.raises(ValueError, match=r"cpu\.json: line 2, column \d+: not JSON"):
        report.generate(folder)
    (folder / "results" / "cpu.json").write_text('{"kind": "other"}')
    with pytest.raises(ValueError, match=r"cpu\.json: kind must be one of gpu, reliability, .*cases"):
        report.generate(folder)


@pytest.mark.parametrize(
    ("seconds", "shown"), [(2.5, "2.5 s"), (123.4, "123 s"), (0.0312, "31.2 ms"), (0.00025, "250 us")]
)
def test_durations(seconds, shown):
    assert report.duration(seconds) == shown


def test_rates():
    assert report.rate(1.466e11, "FLOP") == "147 GFLOP/s"
    assert report.rate(3.1e10, "byte") == "31 GB/s"
    assert report.rate(2.5e6, "triple") == "2500 k/s"


def test_committed_pages_are_what_the_report_generates():
    pages = report.pages()
    assert {"README.md", "reliability.md"} == pages.keys()
    for name, page in pages.items():
        assert (ROOT / "benchmarks" / name).read_text() == page


def test_pytest_benchmark_runs_the_registry(tmp_path):
    pytest.importorskip("pytest_benchmark", reason='needs pytest-benchmark: pip install "hellm[dev]"')
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-k", "sampler-tiktok", "-q"]
    command += [f"--benchmark-json={out}", "-p", "no:cacheprovider"]
    # A worker of pytest-xdist would switch the benchmarks off.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment["HELLM_BENCHMARK_TINY"] = "1"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())["benchmarks"]
    assert {one["group"] for one in found} == {"sampler-tiktok"}
    assert [one["extra_info"]["role"] for one in found] == ["hellm", "peer", "peer"]
