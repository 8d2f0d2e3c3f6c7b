"""The proof of isolation, run at a few minutes' size; and that it fails when there is something to find."""

import pytest
from rich.console import Console

from isolation import prove
from isolation_proof import Workload
from planted_faults import FAULTS_OF_SEVERAL
from soak import size

WHOLE = Workload(num_swaps=size(150, 10_000), num_replaces=size(30, 1000), length=size(512, 1000))
OF_TWO = Workload(size(12, 10_000), size(4, 1000), size(40, 1000), size(8, 40), num_adapters=size(5, 8))
SMALL = Workload(num_swaps=30, num_replaces=10, length=80, short=12, num_adapters=5)
FEW = Workload(num_swaps=3, num_replaces=9, length=16, short=8, num_adapters=5)
WRONG = {  # what each fault looks like
    "name-unchecked": "says something else",
    "freed": "says something else",
    "neighbour": "is off PEFT",  # where a sum's terms are each other's neighbours
    "alias": "answered as",
    "prefix": "is off PEFT",
    "look": "there is no model",
    "fetch": "as the shared store has it: its stored files no longer have the digest",
    "fetch-unchecked": "says something else",
}


def test_nobody_is_answered_with_anothers_weights_whatever_is_swapped_meanwhile() -> None:
    report = prove(WHOLE)
    Console().print(report.table())
    assert not report.problems
    assert (report.swaps, report.replaces, report.ties) == (WHOLE.num_swaps, WHOLE.num_replaces, 0)
    assert report.loads > WHOLE.num_swaps / 2
    assert report.freed > WHOLE.num_swaps / 2


def test_nor_of_two_servers_that_share_a_store() -> None:
    report = prove(OF_TWO, num_servers=2)
    Console().print(report.table())
    assert not report.problems
    assert (report.swaps, report.replaces, report.ties) == (OF_TWO.num_swaps, OF_TWO.num_replaces, 0)
    assert set(report.kinds) == {"base", "adapters", "sums", "mixtures", "aliases", "deleted names"}


@pytest.mark.parametrize("fault", ["alias", "prefix", *FAULTS_OF_SEVERAL])
def test_a_fault_of_two_servers_is_found(fault: str) -> None:
    report = prove(FEW, fault, num_servers=2)
    assert any(WRONG[fault] in problem for problem in report.problems), report.problems


@pytest.mark.parametrize("fault", ["name-unchecked", "freed", "neighbour"])
def test_the_proof_fails_when_a_fault_is_planted(fault: str) -> None:
    report = prove(SMALL, fault)
    assert any(WRONG[fault] in problem for problem in report.problems), report.problems


def test_the_engine_itself_ends_a_request_before_it_runs_it_with_weights_of_another_digest() -> None:
    report = prove(SMALL, "name")
    assert not any("says something else" in problem for problem in report.problems)
    assert any("internal_error" in problem for problem in report.problems)
    assert any("AdapterMismatchError" in entry.get("error", "") for entry in report.log)
