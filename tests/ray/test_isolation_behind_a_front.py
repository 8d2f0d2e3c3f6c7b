"""The proof of isolation, of replicas behind a front, of which any may answer."""

import re
from pathlib import Path

import pytest
from rich.console import Console

from clusters import Front
from isolation import make_adapters, prove_of
from isolation_proof import Workload
from isolation_report import Report

pytestmark = pytest.mark.xdist_group("front")
WORKLOAD = Workload(num_swaps=30, num_replaces=10, length=100, short=12, num_adapters=5)
FIRST_SEED = 50  # of those that leave the controls without a tie
_UNSEEN = re.compile(r"swaplora_shared_store_unseen_requests_total\S* ([\d.]+)")


def test_nobody_is_answered_with_anothers_weights_whichever_replica_answers(
    front: Front, base: Path, tmp_path: Path
) -> None:
    front.wait_for(2)
    report = Report()
    prove_of([front.url], base, make_adapters(base, tmp_path, WORKLOAD.num_adapters, FIRST_SEED), report, WORKLOAD)
    Console().print(report.table())
    unseen = sum(map(float, _UNSEEN.findall(front.client.get("/metrics").text)))
    assert not report.problems or unseen  # a machine so slow that the store seemed to be away proves nothing
    assert report.ties == 0
    assert report.replaces == WORKLOAD.num_replaces or unseen
