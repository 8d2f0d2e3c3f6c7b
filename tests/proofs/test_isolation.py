"""The proof of isolation, run at a few minutes' size; and that it fails when there is something to find."""

import pytest
from rich.console import Console

from isolation import Workload, prove
from planted_faults import FAULTS
from soak import size

WHOLE = Workload(num_swaps=size(200, 10_000), num_replaces=size(50, 1000), length=size(512, 1000))
SMALL = Workload(num_swaps=30, num_replaces=10, length=100)


def test_nobody_is_answered_with_anothers_weights_whatever_is_swapped_meanwhile() -> None:
    report = prove(WHOLE)
    Console().print(report.table())
    assert not report.problems
    assert (report.swaps, report.replaces, report.ties) == (WHOLE.num_swaps, WHOLE.num_replaces, 0)
    assert report.loads > WHOLE.num_swaps / 2
    assert report.freed > WHOLE.num_swaps / 2


@pytest.mark.parametrize("fault", [name for name in FAULTS if name != "name"])
def test_the_proof_fails_when_a_fault_is_planted(fault: str) -> None:
    report = prove(SMALL, fault)
    assert any("says something else" in problem for problem in report.problems)


def test_the_engine_itself_ends_a_request_before_it_runs_it_with_weights_of_another_digest() -> None:
    report = prove(SMALL, "name")
    assert not any("says something else" in problem for problem in report.problems)
    assert any("internal_error" in problem for problem in report.problems)
    assert any("AdapterMismatchError" in entry.get("error", "") for entry in report.log)
