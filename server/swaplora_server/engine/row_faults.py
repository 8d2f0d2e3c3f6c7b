"""Running a step so that what one request makes fail ends that request alone. Imports no torch.

A forward that raises says nothing of whose rows were at fault. So the step is run again in halves, each with half of
its requests, until the fault stands alone: of n requests one costs about 2 log2(n) further forwards, once. That is
sound since a forward only writes what it computes, and since a row's numbers do not depend on the rest of the batch.
"""

from collections.abc import Callable
from dataclasses import dataclass

from swaplora_server.engine.request import Request
from swaplora_server.engine.scheduling.batch import Batch, Sampled


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What has run of a step: `sampled` holds one entry for each of `batch.asking`; and who could not be run."""

    batch: Batch
    sampled: list[Sampled]
    failed: dict[Request, Exception]


def run_bisecting(run: Callable[[Batch], list[Sampled]], batch: Batch) -> StepOutput:
    """`run` over `batch`, or over as much of it as can be run. `run` draws for nobody when it raises."""
    if not batch.rows:
        return StepOutput(batch, [], {})
    try:
        return StepOutput(batch, run(batch), {})
    except Exception as error:  # noqa: BLE001 - whatever it was, it is one request's until no request can be run
        requests = list(dict.fromkeys(rows.sequence.request for rows in batch.rows))
        if len(requests) == 1:
            return StepOutput(Batch(()), [], {requests[0]: error})
    first = set(requests[: len(requests) // 2])
    halves = [
        run_bisecting(run, Batch(tuple(rows for rows in batch.rows if (rows.sequence.request in first) == is_first)))
        for is_first in (True, False)
    ]
    return StepOutput(
        Batch(tuple(rows for half in halves for rows in half.batch.rows)),
        [sampled for half in halves for sampled in half.sampled],
        {request: error for half in halves for request, error in half.failed.items()},
    )
