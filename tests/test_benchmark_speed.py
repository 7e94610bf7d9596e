"""The speed benchmark example: its arithmetic, its table, and a complete run on tiny models."""

import json
import subprocess

import benchmark_speed
import pytest
import speed_measuring
import speed_report
import torch
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def row(**fields):
    values = {
        "section": "encoder",
        "job": "image encoder, 224 px, batch 8, float32",
        "contender": "corrected",
    }
    seconds = {"median": 0.5, "low": 0.4, "high": 0.6}
    return values | {"seconds": seconds, "ratio": {"median": 1.02, "low": 1.0, "high": 1.04}} | fields


def test_a_ratio_is_taken_within_each_round():
    # The machine becomes three times slower from the first round to the last, but the ratio does not change.
    seconds = {"groupvit": [1.0, 2.0, 3.0], "corrected": [1.1, 2.2, 3.3]}
    assert speed_measuring.ratio(seconds, "corrected", "groupvit")["median"] == pytest.approx(1.1)
    assert speed_measuring.spread([4.0, 1.0, 2.0, 3.0, 5.0]) == {"median": 3.0, "low": 2.0, "high": 4.0}
    assert speed_measuring.spread([7.0]) == {"median": 7.0, "low": 7.0, "high": 7.0}


def test_jobs_take_turns_and_the_first_rounds_do_not_count():
    calls: list[str] = []
    jobs = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = speed_measuring.time_in_turn(jobs, 3, "cpu", "test")
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    rounds = ["".join(calls[start : start + 3]) for start in range(0, len(calls), 3)]
    assert len(rounds) == 5
    assert rounds[2:] == ["abc", "bca", "cab"]


def test_operations_are_those_of_the_matrix_products():
    speed_measuring.register_cpu_kernels()
    left, right = torch.randn(3, 5), torch.randn(5, 7)
    assert speed_measuring.count_flops(lambda: left @ right) == 2 * 3 * 5 * 7
    weight, x = torch.randn(7, 5), torch.randn(2, 3, 5)
    query = torch.randn(2, 3, 4, 8)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        torch.ops.mkldnn._linear_pointwise(x, weight, None, "gelu", [], "none")
        nn.functional.scaled_dot_product_attention(query, query, query)
    assert counter.get_total_flops() == 2 * 6 * 5 * 7 + 2 * (2 * 2 * 3 * 4 * 4 * 8)
    query.requires_grad_(True)
    with FlopCounterMode(display=False) as counter:
        nn.functional.scaled_dot_product_attention(query, query, query).sum().backward()
    assert counter.get_total_flops() == (2 + 5) * (
        2 * 2 * 3 * 4 * 4 * 8
    )  # backward also computes the weights again


def test_peak_memory_sees_what_a_job_holds_for_a_while():
    # If the system cannot reset the peak, only memory above the previous peak is visible.
    idle = speed_measuring.peak_memory(lambda: None, "cpu")
    size = int(idle["peak"] - idle["before"]) + 64
    measured = speed_measuring.peak_memory(lambda: torch.ones(size * 2**18).sum(), "cpu")
    assert 32 < measured["peak"] - idle["peak"] < 128


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"ratio": 0.92, "share": 0.9}),
        ({"job": "image encoder, 448 px, batch 1, float32"}, {"ratio": 0.92, "share": 0.9}),
        ({"job": "image encoder, 448 px, batch 1, bfloat16"}, {"ratio": 1.03, "share": 0.75}),
        ({"contender": "released"}, {"ratio": 1.12, "share": 0.9}),
        ({"contender": "groupvit"}, {}),
        ({"section": "prototypes"}, {"ratio": 0.03}),
        ({"section": "int8", "of": "float32"}, {"ratio": 0.5}),
        ({"section": "int8", "of": "bfloat16"}, {"ratio": 0.9}),
        ({"section": "large photo"}, {"peak": 1536}),
        ({"section": "start", "contender": "import pgseg_hf, transformers"}, {"ratio": 1.3}),
        ({"section": "start", "contender": "pgseg --help"}, {"seconds": 1.0}),
        ({"section": "photo", "contender": "20 labels", "of": "encoder passes"}, {"ratio": 1.1}),
        ({"section": "photo", "contender": "x", "of": "20 labels"}, {"ratio": 1.1, "memory_ratio": 1.1}),
    ],
)
def test_goals_of_a_row(changes, expected):
    assert speed_report.goals(row(**changes)) == expected
    if changes.get("contender", "corrected") == "corrected" and expected.get("share"):
        assert speed_report.goals(row(**changes), on_cuda=True) == {}
        changes["job"] = "image encoder, 224 px, batch 256, bfloat16"
        assert speed_report.goals(row(**changes), on_cuda=True) == {"ratio": 0.7}


def lines_of(*rows, device="a CPU"):
    machine = {"device": device, "threads": 2, "torch": "2", "transformers": "5"}
    table = speed_report.markdown({"machine": machine, "rows": rows})
    assert f"{device}, 2 threads" in table
    lines = table.splitlines()[2:]
    assert len({line.count("|") for line in lines}) == 1
    return lines[2:]


def test_the_table_says_what_holds_and_what_the_step_itself_adds_to_memory():
    training = {"section": "training", "job": "training step, batch 8, float32"}
    memory = {"memory_MiB": {"peak": 1700.0, "before": 1100.0}, "memory_ratio": 0.9, "step_memory_ratio": 0.7}
    lines = lines_of(
        row(share=0.89, gflop=60.0),
        row(contender="released", ratio={"median": 1.2, "low": 1.1, "high": 1.3}),
        row(section="start", contender="pgseg --help"),
        row(**training, **memory),
        row(section="photo", contender="20 labels", of="encoder passes", memory_MiB={"peak": 700.0}),
    )
    assert "1.02 (1.00 to 1.04), goal <= 0.92: **missed**" in lines[0]
    assert "0.89, goal >= 0.9: **missed**" in lines[0]
    assert "1.20 (1.10 to 1.30), goal <= 1.12: **missed**" in lines[1]
    assert "500, goal <= 1000: holds" in lines[2]
    assert "| 1700 (step's own: 600) | 0.90, goal <= 0.75: **missed** (step's own: 0.70) |" in lines[3]
    assert "| 700 |  |" in lines[4]


def test_what_does_not_fit_and_what_was_compiled_are_in_the_table():
    step = {"section": "training", "job": "training step, batch 4096, bfloat16", "contender": "released"}
    fitting = row(**step | {"contender": "corrected"}, images_per_second=4321.0)
    del fitting["ratio"]  # as GroupViT does not fit
    compiled = row(section="compiled", job="torch.compile", contender="x, compiled", compile_seconds=36.4)
    lines = lines_of(step | {"not_timed": "out of memory"}, fitting, compiled, device="NVIDIA X")
    assert "| training step, batch 4096, bfloat16 | released | out of memory |" in lines[0]
    assert "| corrected | 500 | 4321 |" in lines[1]
    assert "1.02 (1.00 to 1.04) (compiled in 36 s)" in lines[2]


def test_the_table_goes_between_the_markers(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n{speed_report.BEGIN}\nold\n{speed_report.END}\nrest\n")
    speed_report.insert_table("| new |\n", readme)
    assert readme.read_text() == f"# Title\n{speed_report.BEGIN}\n| new |\n{speed_report.END}\nrest\n"
    speed_report.insert_table("| newer |\n", readme)
    assert readme.read_text().count("new") == 1
    readme.write_text(f"{speed_report.END}\n{speed_report.BEGIN}\n")
    with pytest.raises(ValueError, match="once and in this order"):
        speed_report.insert_table("| new |\n", readme)
    assert readme.read_text() == f"{speed_report.END}\n{speed_report.BEGIN}\n"


def test_what_cannot_be_timed_keeps_the_memory_that_was_measured(monkeypatch):
    benchmark = benchmark_speed.Benchmark("quick", 1, "cpu")
    sizes = {"none": 50.0, "corrected": 60.0, "released": 90.0, "corrected, gradient checkpointing": 40.0}

    def memory(spec):
        peak = sizes.get(spec["contender"])
        return {"out_of_memory": True} if peak is None else {"before": 10.0, "peak": peak}

    def too_much(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(benchmark, "_memory", memory)
    monkeypatch.setattr(benchmark, "_counted", too_much)
    rows = {entry["contender"]: entry for entry in benchmark.training()[:5]}
    assert rows["groupvit"]["not_timed"] == "out of memory"
    assert "memory_MiB" not in rows["groupvit"]
    assert rows["corrected"]["not_timed"] == "not beside the others"
    assert rows["corrected"]["memory_MiB"]["peak"] == 60.0
    sizes["groupvit"] = 110.0
    rows = {entry["contender"]: entry for entry in benchmark.training()[:5]}
    assert rows["corrected"]["memory_ratio"] == pytest.approx(60 / 110)
    assert rows["corrected"]["step_memory_ratio"] == pytest.approx(50 / 100)
    assert "| not beside the others |" in "".join(lines_of(*rows.values(), device="NVIDIA X"))


@pytest.mark.slow
def test_a_whole_run(tmp_path, monkeypatch):
    readme, page = files = tmp_path / "README.md", tmp_path / "speed.md"
    for file in files:
        file.write_text(f"{speed_report.BEGIN}\n{speed_report.END}\n")
    run, started, own = subprocess.run, [], []

    def start(command, **options):
        if command[1] not in ("-c", "-m"):
            return run(command, **options)
        return started.append(command[2:])

    def measure(script, spec):
        own.append(spec)  # one of them in a process of its own
        return benchmark_speed.measure_one(spec) if len(own) > 1 else in_own_process(script, spec)

    in_own_process = benchmark_speed.in_own_process
    monkeypatch.setattr(benchmark_speed, "in_own_process", measure)
    monkeypatch.setattr(subprocess, "run", start)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    options = ["--quick", "--rounds=1", "--threads=1", "--output", str(tmp_path / "speed")]
    benchmark_speed.main([*options, "--readme", *map(str, files)])
    rows = json.loads((tmp_path / "speed" / "results.json").read_text())["rows"]
    sections = dict.fromkeys(entry["section"] for entry in rows)
    assert list(sections) == [
        *("start", "encoder", "int8", "photo", "large photo", "prototypes", "training", "compiled", "curves")
    ]
    assert ["pgseg_hf", "--help"] in started and any("segment" in command for command in started)
    encoder = [entry for entry in rows if entry["section"] == "encoder"]
    assert len(encoder) == 2 * 2 * 4
    assert all(entry["ratio"]["median"] == 1 for entry in encoder if entry["contender"] == "groupvit")
    by_name = {entry["contender"]: entry for entry in encoder[:4]}
    assert by_name["corrected"]["gflop"] > by_name["none"]["gflop"] > 0
    assert abs(by_name["none"]["gflop"] / by_name["groupvit"]["gflop"] - 1) < 0.01
    training = [entry for entry in rows if entry["section"] == "training"]
    assert all(entry["memory_MiB"]["peak"] >= entry["memory_MiB"]["before"] for entry in training)
    assert {entry["contender"] for entry in training} >= {"corrected", "corrected, gradient checkpointing"}
    compiled = [entry for entry in rows if entry["section"] == "compiled"]
    assert len(compiled) == 2 * 4
    assert all(entry["compile_seconds"] > 0 for entry in compiled if "compiled" in entry["contender"])
    Image.open(tmp_path / "speed" / "curves.png").verify()
    kept, rest = (file.read_text().splitlines() for file in files)
    assert "| image encoder, 32 px, batch 4, float32 | corrected |" in readme.read_text()
    assert "| image encoder, 32 px, batch 4, float32 | groupvit |" in page.read_text()
    figures = [
        {line for line in lines if line.startswith("| ") and "| ms" not in line} for lines in (kept, rest)
    ]
    assert len(figures[0]) <= 10 and not figures[0] & figures[1]


@pytest.mark.parametrize("option", [["--rounds", "0"], ["--threads", "0"], ["--sections", "speed"]])
def test_bad_options_are_refused_before_measuring(option, capsys):
    with pytest.raises(SystemExit):
        benchmark_speed.main(["--quick", *option])
    assert option[1] in capsys.readouterr().err
