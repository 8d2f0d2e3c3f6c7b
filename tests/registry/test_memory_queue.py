"""Who comes next where memory is short: in order, all or nothing, not too long, and at nobody's cost who is served."""

from types import SimpleNamespace

from queue_simulation import QueueSimulation
from swaplora_adapters.registry.residency.claims import Claim
from swaplora_adapters.registry.residency.memory_queue import PATIENCE_SECONDS


def ask(line: QueueSimulation, *digests: str, size: int = 1, tenant: str = "") -> Claim:
    """What a request for all these does, each of them `size` bytes; what is admitted is loaded at once."""
    claim = line.ask(dict.fromkeys(digests, size), tenant)
    for resident in line.loading:
        line.load(resident)
    return claim


def end(line: QueueSimulation, claim: Claim) -> None:
    line.leave(claim)
    for resident in line.loading:
        line.load(resident)


def test_who_waits_holds_nothing() -> None:
    line = QueueSimulation(2)
    a = ask(line, "a")
    pair = ask(line, "a", "b", "c")
    assert pair in line.refused
    held, pair = ask(line, "b"), ask(line, "c", "d")
    end(line, held)
    assert pair in line.waiting
    assert ask(line, "e") in line.inside, "half of what the pair needs is of no use to it"
    end(line, a)


def test_pairs_that_overlap_do_not_wait_for_each_other() -> None:
    line = QueueSimulation(2)
    first = ask(line, "a", "b")
    waiting = [ask(line, *pair) for pair in ("bc", "ca", "ab", "cd")]
    assert line.inside == [first, waiting[2]], "who wants the same shares it"
    end(line, first)
    end(line, waiting[2])
    for number, claim in [(0, waiting[0]), (1, waiting[1]), (3, waiting[3])]:
        assert line.inside == [claim], number
        end(line, claim)


def test_what_is_named_twice_counts_once() -> None:
    line = QueueSimulation(2)
    assert ask(line, "a", "b") in line.inside
    assert ask(line, "a", "b") in line.inside


def test_what_can_never_fit_is_refused_at_once_and_costs_nobody_anything() -> None:
    line = QueueSimulation(2)
    warm = ask(line, "a")
    assert ask(line, "a", "b", "c") in line.refused
    assert ask(line, "a") in line.inside
    assert ask(line, "b") in line.inside
    line.pin({"a": 1})
    assert ask(line, "b", "c") in line.refused, "beside what is pinned there is no room"
    waits = ask(line, "c")
    line.pin({"a": 1, "b": 1})
    assert waits in line.refused, "what is pinned by now leaves none"
    end(line, warm)


def test_hot_adapters_are_served_while_a_cold_one_waits_for_a_long_stream() -> None:
    line = QueueSimulation(2)
    streams = [ask(line, digest) for digest in "ab"]
    cold = ask(line, "c")
    for number in range(200):
        line.pass_time(0.125)
        hot = ask(line, "ab"[number % 2])
        assert hot in line.inside
        end(line, hot)
    assert cold in line.waiting
    end(line, streams[0])
    assert cold in line.inside


def test_a_cold_one_comes_in_between_short_requests_that_never_pause() -> None:
    line = QueueSimulation(1)
    hot, cold = [ask(line, "a")], ask(line, "b")
    while cold not in line.inside:
        line.pass_time(0.125)
        hot.append(ask(line, "a"))
        end(line, hot.pop(0))
        assert line.now <= 2 * PATIENCE_SECONDS
    assert hot[-1] in line.waiting
    end(line, cold)
    assert hot[-1] in line.inside


def test_only_what_is_needed_is_closed_and_the_rest_is_served() -> None:
    line = QueueSimulation(3)
    old = [ask(line, digest) for digest in "abc"]
    cold = ask(line, "d")
    line.pass_time(PATIENCE_SECONDS / 2)
    young = [ask(line, digest) for digest in "aabc"]
    for claim in old[:2]:
        end(line, claim)
    assert not line.draining
    line.pass_time(PATIENCE_SECONDS / 2)
    assert line.draining == {"b"}, "a has two users, and c one that was there before"
    assert ask(line, "a") in line.inside
    assert ask(line, "a", "c") in line.inside
    assert ask(line, "b") in line.waiting
    end(line, young[2])
    assert cold in line.inside


def test_what_was_closed_in_vain_is_open_again_for_all_who_waited() -> None:
    line = QueueSimulation(1)
    old, cold = ask(line, "a"), ask(line, "b")
    line.pass_time(4)
    long = ask(line, "a")
    end(line, old)
    assert line.draining == {"a"}
    waiting = [ask(line, "a") for _ in range(3)]
    line.pass_time(3.875)
    assert all(claim in line.waiting for claim in waiting)
    line.pass_time(0.125)  # as long as it had waited
    assert all(claim in line.inside for claim in waiting)
    assert cold in line.waiting
    end(line, long)
    assert not line.draining
    for claim in waiting:
        end(line, claim)
    assert cold in line.inside


def test_who_hangs_up_gives_its_place_away_at_once() -> None:
    line = QueueSimulation(2)
    held, first, second = ask(line, "a", "b"), ask(line, "c", "d"), ask(line, "c")
    end(line, first)
    end(line, held)
    assert line.inside == [second]


def test_what_was_closed_for_one_that_hangs_up_is_open_again() -> None:
    line = QueueSimulation(1)
    old, cold = ask(line, "a"), ask(line, "b")
    line.pass_time(1)
    ask(line, "a")
    end(line, old)
    assert line.draining == {"a"}
    waits = ask(line, "a")
    end(line, cold)
    assert waits in line.inside


def test_a_load_that_fails_frees_what_its_request_had_beside_it() -> None:
    line = QueueSimulation(2)
    claim, other = line.ask({"a": 1, "b": 1}), line.ask({"c": 2})
    line.load(line.residents["a"])
    assert line.fail(line.residents["b"]) == [claim]
    assert other in line.inside
    assert not line.queue.leave(claim), "it is out, and may be let go of once more"


def test_nobody_waits_longer_than_told() -> None:
    line = QueueSimulation(1, wait_seconds=3)
    ask(line, "a")
    first = ask(line, "b")
    line.pass_time(2)
    second = ask(line, "c")
    line.pass_time(1)
    assert (first in line.refused, second in line.waiting) == (True, True)
    line.pass_time(2)
    assert second in line.refused
    at_once = QueueSimulation(1, wait_seconds=0)
    ask(at_once, "a")
    assert ask(at_once, "b") in at_once.refused
    assert ask(at_once, "a") in at_once.inside


def test_a_pin_is_not_closed_for_anybody() -> None:
    line = QueueSimulation(2)
    pinned = [ask(line, "a")]
    line.pin({"a": 1})
    others, cold = [ask(line, "b")], ask(line, "c")
    for _ in range(8):
        line.pass_time(0.25)
        others.append(ask(line, "b"))
        pinned.append(ask(line, "a"))
        end(line, others.pop(0))
        end(line, pinned.pop(0))
        assert "a" not in line.draining
    assert cold in line.inside


def test_what_is_pinned_or_uploaded_meanwhile_does_not_prolong_what_is_closed() -> None:
    line = QueueSimulation(2)
    old, cold = ask(line, "a", "b"), ask(line, "c", "d")
    line.pass_time(2)
    ask(line, "a", "b")
    end(line, old)
    assert line.draining == {"a", "b"}
    waits = ask(line, "b")
    for _ in range(16):
        line.pin({})  # as after every upload
        assert waits in line.waiting
        line.pass_time(0.125)
    assert waits in line.inside
    assert cold in line.waiting
    line.pin({"a": 1})
    assert cold in line.refused


def in_turn(line: QueueSimulation) -> list[Claim]:
    """All that come in, one after the other, as each ends."""
    came: list[Claim] = []
    while line.inside:
        came.append(line.inside[0])
        end(line, line.inside[0])
    return came


def test_a_tenant_who_wants_many_cold_ones_holds_up_another_by_one() -> None:
    line = QueueSimulation(1)
    many = [ask(line, f"a{number}", tenant="acme") for number in range(10)]
    few = [ask(line, f"b{number}", tenant="beta") for number in range(2)]
    assert in_turn(line) == [many[0], many[1], few[0], many[2], few[1], *many[3:]]


def test_one_who_asks_again_each_time_does_not_pass_those_who_wait_for_ever() -> None:
    line = QueueSimulation(1)
    many = [ask(line, f"a{number}", tenant="acme") for number in range(4)]
    askers = {"beta": ask(line, "b", tenant="beta"), "zeta": ask(line, "z", tenant="zeta")}
    num_ended = 0
    while many[-1] not in line.inside:
        [inside] = line.inside
        for tenant in askers:
            if askers[tenant] is inside:
                askers[tenant] = ask(line, f"{tenant}{num_ended}", tenant=tenant)
        end(line, inside)
        num_ended += 1
        assert num_ended < 12


def test_the_first_in_line_stays_so_whoever_comes() -> None:
    """What is drained for it is not drained in vain."""
    line = QueueSimulation(1)
    ask(line, "a", tenant="acme")
    waiting = [ask(line, f"a{number}", tenant="acme") for number in range(3)]
    line.pass_time(PATIENCE_SECONDS)
    other = ask(line, "b", tenant="beta")
    assert line.waiting == [waiting[0], other, *waiting[1:]]


def test_what_is_in_memory_costs_its_tenant_no_turn() -> None:
    line = QueueSimulation(2)
    hot, held = ask(line, "hot", tenant="acme"), ask(line, "held", tenant="zeta")
    first = ask(line, "x", tenant="zeta")
    for _ in range(5):
        assert ask(line, "hot", tenant="acme") in line.inside
    others = [ask(line, "y", tenant="beta"), ask(line, "z", tenant="acme"), ask(line, "w", tenant="beta")]
    assert line.waiting == [first, *others]
    end(line, held)
    end(line, hot)


def mixed(line: QueueSimulation, *digests: str, size: int, beside: int) -> Claim:
    """What a request for a mixture does, which makes `beside` bytes of each member's weights."""
    claim = Claim(dict.fromkeys(digests, size), line.now, beside=dict.fromkeys(digests, beside))
    line.queue.add(claim)
    while (admitted := line.queue.next_admitted(line.now)) is not None:
        for resident in admitted.residents:
            if resident.weights is None:
                line.queue.loaded(resident, SimpleNamespace(nbytes=size))  # type: ignore[arg-type]
    return claim


def test_what_is_made_of_weights_counts_beside_them_as_long_as_they_stay() -> None:
    line = QueueSimulation(30)
    plain, idle = ask(line, "a", size=10), ask(line, "b", "c", size=10)
    end(line, idle)
    assert line.queue.used_bytes == 30
    mixture = mixed(line, "a", "b", size=10, beside=2)
    assert mixture.residents, "a is in use, and may grow all the same"
    assert (line.queue.used_bytes, line.queue.find("c")) == (24, None), "who is idle makes room for it"
    again = mixed(line, "a", "b", size=10, beside=2)
    assert line.queue.used_bytes == 24, "what is there is not made twice"
    for claim in (mixture, again):
        line.queue.leave(claim)
    line.leave(plain)
    line.queue.check_integrity()
    assert line.queue.used_bytes == 24
    assert not mixed(line, "a", "b", size=10, beside=6).residents, "such a mixture can never be had"
    line.queue.drop("a")
    line.queue.drop("b")
    assert line.queue.used_bytes == 0


def test_what_is_pinned_and_mixed_leaves_the_rest_to_others() -> None:
    line = QueueSimulation(30)
    line.pin({"a": 10, "b": 10})
    line.queue.leave(mixed(line, "a", "b", size=10, beside=4))
    assert line.queue.used_bytes == 28
    assert line.queue.kept_besides(Claim({"c": 1}, line.now)) == 20
    c = ask(line, "c", size=2)
    assert c in line.inside
    assert line.queue.used_bytes == 30, "there was room beside what was made"
    made_of = [line.queue.find(digest) for digest in "ab"]
    before = [each.weights for each in made_of if each is not None]
    assert mixed(line, "d", size=8, beside=0).residents, "what was made makes room once nobody uses it"
    line.queue.check_integrity()
    assert line.queue.used_bytes == 30
    after = [each.weights for each in made_of if each is not None]
    assert all(old is not new for old, new in zip(before, after, strict=True)), "it goes with the old object"
    late = mixed(line, "e", size=11, beside=0)
    assert line.queue.next_refused(line.now) is late


def test_what_is_made_of_pinned_weights_stays_for_those_that_use_it_and_the_others_wait() -> None:
    line = QueueSimulation(30)
    line.pin({"a": 20})
    mixture = mixed(line, "a", size=20, beside=5)
    late = mixed(line, "b", size=8, beside=0)
    assert not late.residents
    assert line.queue.next_refused(line.now) is None, "it can be had later"
    line.queue.leave(mixture)
    assert line.queue.next_admitted(line.now) is late
    line.queue.check_integrity()
    resident = line.queue.find("a")
    assert resident is not None
    assert (resident.nbytes, line.queue.used_bytes) == (20, 28)
    line.pin({"a": 20, "b": 8})
    assert line.queue.kept.keys() == {"a", "b"}


def test_one_that_wants_bare_weights_has_room_where_more_was_made_of_them() -> None:
    line = QueueSimulation(30)
    line.queue.leave(mixed(line, "a", size=20, beside=5))
    assert ask(line, "a", "b", size=10) in line.inside
    assert line.queue.used_bytes == 30
