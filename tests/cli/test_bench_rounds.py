"""Several rounds of `make bench`: medians and ratios, two runs beside each other, and what a page says of one."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench_compare import Results, compare, read_results, section
from bench_rounds import FULL, QUICK, RATIOS, Ratio, machine_range, medians, ratios, tables

A, B = (workload.label for workload in QUICK[:2])


def measured(rate: float) -> dict[str, Any]:
    times = {"p50": 10 * rate, "p95": 20 * rate}
    machine = {"read_gb_per_second": rate, "fp32_gflop_per_second": 2 * rate}
    return {"output_tokens_per_second": rate, "ttft_ms": times, "tpot_ms": times, "machine": machine}


def test_rounds_give_medians_spreads_and_ratios_within_a_round() -> None:
    rounds = [{"a": measured(x), "b": measured(y)} for x, y in [(8, 10), (9, 20), (15, 15)]]
    of_a, of_b = medians(rounds)
    assert (of_a["workload"], of_a["output_tokens_per_second"], of_a["ttft_ms_p95"]) == ("a", 9, 180)
    assert of_b["spread"] == pytest.approx(10 / 15)
    wanted = [Ratio("a / b", "a", "b", 0.7, 0.8), Ratio("a / b", "a", "b", 0.8, 0.9), Ratio("b / a", "b", "a", 1.3, 2)]
    found = ratios(rounds, [*wanted, Ratio("not measured", "a", "c", 1, 1)])
    assert [row["value"] for row in found] == pytest.approx([0.8, 0.8, 1.25])
    assert [row["verdict"] for row in found] == ["goal met", "bar met", "below the bar"]
    workloads, shares = tables([of_a, of_b], found)
    assert workloads.splitlines()[2] == "| a | 9.0 | 0.78 | 90.0 | 180.0 | 90.0 | 180.0 |"
    assert shares.splitlines()[-1] == "| b / a | 1.25 | 0.98 | 1.30 | 2.00 | below the bar |"


def test_a_single_round_shows_no_spread_and_a_disturbed_machine_shows() -> None:
    rounds = [{"a": measured(8), "b": measured(10)}]
    found = ratios(rounds, [Ratio("a / b", "a", "b", 0.7, 0.9)])
    assert (medians(rounds)[0]["spread"], found[0]["spread"]) == (None, None)
    assert tables(medians(rounds), found)[1].splitlines()[-1] == "| a / b | 0.80 | - | 0.70 | 0.90 | bar met |"
    assert "8.0 to 10.0 GB/s, 16 to 20 GFLOP/s" in machine_range(rounds)


def reported(rate: float, **options: Any) -> dict[str, Any]:
    """As `swaplora bench --json` prints it, and no more than is read of it here."""
    report = measured(rate)
    sets = ["avx2", "fma"]
    machine = {
        "processor": "P (family 1, model 2)",
        "cores": 2,
        "instruction_sets": sets,
        "bf16_gflop_per_second": None,
    }
    report["machine"] = {**machine, "read_gb_per_second": 30.0, "fp32_gflop_per_second": 200.0}
    server = {"version": "1", "device": "cpu", "dtype": "float32", "kernels": "cpu: fp32"}
    asked = {"base": "base", "url": "http://127.0.0.1:1", "seed": int(rate), "requests": 64, **options}
    return {**report, "server": server, "options": asked, "versions": {"swaplora": "1"}}


def results(*rates: tuple[float, float]) -> dict[str, Any]:
    rounds = [{A: reported(a), B: reported(b)} for a, b in rates]
    wanted = [Ratio("b / a", B, A, 0.7, 0.8)]
    found = {"medians": medians(rounds), "ratios": ratios(rounds, wanted), "versions": {"swaplora": "1", "torch": "2"}}
    return {"base": "small", "server_flags": [], "rounds": rounds, **found}


def lines(before: Results, after: Results) -> list[str]:
    return [line for part in compare(before, after) for line in part.splitlines()]


def test_every_workload_has_a_name_of_its_own_and_every_ratio_is_of_two() -> None:
    labels = [workload.label for workload in FULL]
    assert len(labels) == len(set(labels))
    assert [ratio for ratio in RATIOS if not {ratio.above, ratio.below} <= set(labels)] == []
    sampled = {workload.label for workload in QUICK if workload.sampling}
    assert {ratio.above for ratio in RATIOS} >= sampled != set()


def test_two_runs_alike_are_set_side_by_side_without_a_word() -> None:
    found = lines(results((100, 50), (110, 60), (120, 70)), results((220, 30)))
    assert found[2:] == [f"| {A} | 110 | 220 | 2.00 | 2.00 | 2.00 |", f"| {B} | 60.0 | 30.0 | 0.50 | 0.50 | 0.50 |"]
    assert not any("!!!" in line for line in found)


def of_machine(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda report: report["machine"].update({key: value})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (of_machine("processor", "Q"), "NOT THE SAME PROCESSOR: P (family 1, model 2) | Q"),
        (of_machine("instruction_sets", []), "NOT THE SAME INSTRUCTION SETS: avx2 fma | none"),
        (of_machine("cores", 8), "NOT THE SAME CORES: 2 | 8"),
        (lambda report: report["server"].update(kernels="cpu: bf16"), "NOT THE SAME KERNELS: cpu: fp32 | cpu: bf16"),
        (
            lambda report: report["server"].update(dtype="bfloat16"),
            "NOT THE SAME NUMBER FORMAT: cpu, float32 | cpu, bf",
        ),
        (of_machine("read_gb_per_second", 20.0), "THE MACHINE WAS NOT AS FAST: 30 GB/s | 20 GB/s"),
        (of_machine("fp32_gflop_per_second", 250.0), "THE MACHINE WAS NOT AS FAST: 200 GFLOP/s in fp32 | 250"),
        (
            lambda report: report["options"].update(requests=9),
            f"NOT ASKED THE SAME, {A.upper()}: requests 64 | requests 9",
        ),
        (lambda report: report["options"].update(top_k=4), f"NOT ASKED THE SAME, {A.upper()}: top_k None | top_k 4"),
    ],
)
def test_what_two_runs_do_not_have_in_common_is_told_loudly(
    change: Callable[[dict[str, Any]], None], told: str
) -> None:
    before, after = results((100, 50), (110, 60)), results((100, 50))
    for report in after["rounds"][0].values():
        change(report)
    loud = [line for line in lines(before, after) if line.startswith("!!! ")]
    assert loud[0].startswith(f"!!! {told}")


@pytest.mark.parametrize(("key", "value", "told"), [("base", "large", "BASE"), ("server_flags", ["--x", "1"], "FLAGS")])
def test_another_base_or_other_flags_are_told_too(key: str, value: object, told: str) -> None:
    before = results((100, 50))
    (loud,) = (line for line in lines(before, before | {key: value}) if line.startswith("!!! "))
    assert f"!!! NOT THE SAME {told}" in loud


def test_kernels_that_changed_within_a_run_are_all_named() -> None:
    before, after = results((100, 50)), results((100, 50))
    after["rounds"][0][B]["server"]["kernels"] = "torch"
    assert "!!! NOT THE SAME KERNELS: cpu: fp32 | cpu: fp32 and torch" in lines(before, after)


def test_what_only_one_run_measured_is_named() -> None:
    before, after = results((100, 50)), results((100, 50))
    del before["medians"][1], after["medians"][0]["spread"]
    assert lines(before, after)[-1] == f"only in the second: {B}"
    del after["medians"][0]
    with pytest.raises(SystemExit, match="no workload in common"):
        lines(before, after)


def test_a_page_is_told_the_machine_the_kernels_and_a_row_for_each_workload() -> None:
    found = results((100, 50), (110, 60), (200, 70))
    found["rounds"][0][A]["machine"] |= {"bf16_gflop_per_second": 900.0, "read_gb_per_second": 28.4}
    words, table, shares = section(found)
    assert (
        "P (family 1, model 2), 2 cores: avx2 fma. Beside the runs 28 to 30 GB/s, 200 GFLOP/s in fp32 and 900" in words
    )
    assert "Base small, cpu, float32; kernels: cpu: fp32; swaplora 1, torch 2. 3 rounds." in words
    assert table.splitlines() == [
        "| workload | output tok/s | between rounds | TTFT p50 | TTFT p95 | TPOT p50 | TPOT p95 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        f"| {A} | 110 | 91 % | 1.1 s | 2.2 s | 1.1 s | 2.2 s |",
        f"| {B} | 60.0 | 33 % | 0.6 s | 1.2 s | 0.6 s | 1.2 s |",
    ]
    assert shares == "Ratios: b / a 0.50."


def test_a_table_of_a_page_is_one_line_a_row_whatever_the_figures() -> None:
    for rate in (0.01, 0.949, 0.995, 9.49, 9.951, 10, 99.4, 100, 1234):
        table = list(section(results((rate, rate))))[1]
        assert re.fullmatch(r"(\| [\d.]+ m?s ){4}\|", "|".join(["", *table.splitlines()[2].split("|")[4:]])), table
        assert "e+" not in table


def test_results_are_read_from_either_command(tmp_path: Path) -> None:
    for name, content in {"bench": results((100, 50)), "run": reported(80)}.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert read_results(tmp_path / "bench") == results((100, 50))
    alone = read_results(tmp_path / "run")
    assert lines(alone, alone)[-1] == "| the run | 80.0 | 80.0 | 1.00 | 1.00 | 1.00 |"
    assert len(list(section(alone))) == 2


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", "7", '{"rounds": [{}]}', '{"rounds": [{"a": {}}]}', '{"rounds": 3}']
)
def test_what_holds_no_results_is_one_line(tmp_path: Path, content: str) -> None:
    file = tmp_path / "results.json"
    with pytest.raises(SystemExit, match="cannot be read"):
        read_results(file)
    file.write_text(content)
    with pytest.raises(SystemExit, match=r"results\.json holds no results"):
        read_results(file)
