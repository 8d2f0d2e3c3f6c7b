"""What a request holds from when it was let in: all of it goes back, in one place and once, however far it came."""

from typing import Any

import pytest

from swaplora_adapters.registry.leases import Lease
from swaplora_adapters.store.records import VersionRecord
from swaplora_server.service.admission import Admissions
from swaplora_server.service.errors import RequestError

RECORD = VersionRecord("sql", 1, "sha256:" + "a" * 64, 8, ("q_proj",), None, 10, 100, 0.0, "upload", (), None)


class FullRegistry:
    """Has no memory for anybody's weights."""

    def lease_weights(self, _leases: object) -> Any:
        raise MemoryError


def leases(count: int) -> tuple[list[Lease], list[Lease]]:
    """So many leases, and those of them that are given back."""
    given_back: list[Lease] = []
    return [Lease(RECORD, given_back.append) for _ in range(count)], given_back


def test_no_more_sequences_are_let_in_than_the_limit_until_some_are_back() -> None:
    admissions = Admissions(5)
    first = admissions.admit(3)
    with pytest.raises(RequestError, match="too many requests"):
        admissions.admit(3)
    admissions.admit(2)
    first.release()
    admissions.admit(3)


def test_what_is_held_goes_back_once() -> None:
    admission, (held, given_back) = Admissions(1).admit(1), leases(2)
    for lease in held:
        admission.hold(lease)
    admission.release()
    assert given_back == held
    with pytest.raises(RuntimeError, match="twice"):
        admission.release()
    assert given_back == held


def test_a_request_of_the_base_is_counted_out_once() -> None:
    admissions = Admissions(2)
    admission, _other = admissions.admit(1), admissions.admit(1)
    admission.release()
    with pytest.raises(RuntimeError, match="twice"):
        admission.release()
    admissions.admit(1)
    with pytest.raises(RequestError):
        admissions.admit(1)


def test_leases_go_back_when_there_is_no_memory_for_their_weights() -> None:
    admission, (held, given_back) = Admissions(1).admit(1), leases(2)
    for lease in held:
        admission.hold(lease)
    with pytest.raises(MemoryError):
        admission.claim_memory(FullRegistry())  # type: ignore[arg-type]
    admission.release()
    assert given_back == held


def test_the_last_part_of_a_request_gives_everything_back() -> None:
    admissions = Admissions(3)
    admission, ((lease,), given_back) = admissions.admit(3), leases(1)
    admission.hold(lease)
    end_of_part = admission.release_after(3)
    for _ in range(2):
        end_of_part()
        assert not given_back
        with pytest.raises(RequestError):
            admissions.admit(1)
    end_of_part()
    assert given_back == [lease]
    admissions.admit(3)
