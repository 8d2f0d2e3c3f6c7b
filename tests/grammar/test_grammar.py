"""Grammars: compiled once, their masks computed in the time that the engine's thread has for it."""

import asyncio
import re
import threading
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance.gbnf_to_lark import is_lark_syntax

import tiny
from swaplora_server.base.vocabulary import Vocabulary
from swaplora_server.engine.sampling.constraint import ConstraintPendingError, TokenBits
from swaplora_server.service.errors import RequestError
from swaplora_server.service.grammar import grammars as module
from swaplora_server.service.grammar.gbnf import is_lark, lark_of
from swaplora_server.service.grammar.grammars import Grammar, Grammars
from swaplora_server.service.grammar.mask_threads import NUM_THREADS, Allowance
from swaplora_server.service.grammar.matcher import GrammarConstraint
from swaplora_server.service.grammar.source import GrammarKind, GrammarSource
from swaplora_server.service.grammar.vocabulary import grammar_tokenizer
from swaplora_server.service.offload import GilTurns

ENDS = frozenset({tiny.EOS, tiny.PAD})
DIGITS = {15 + digit for digit in range(10)}  # the byte tokenizer's ids


@pytest.fixture
def grammars() -> Iterator[Grammars]:
    backend = tiny.byte_tokenizer().backend_tokenizer
    made = Grammars(grammar_tokenizer(backend, Vocabulary(backend), tiny.VOCAB_SIZE, {tiny.EOS}), 4, GilTurns())
    yield made
    made.close(60.0)


def of_regex(text: str) -> GrammarSource:
    return GrammarSource(GrammarKind.REGEX, text, "regex")


def tokens(bits: TokenBits) -> set[int]:
    return {token for token in range(tiny.VOCAB_SIZE) if int(bits[token // 32]) >> token % 32 & 1}


async def constraint_of(grammars: Grammars, regex: str) -> GrammarConstraint:
    return (await grammars.grammar(of_regex(regex))).constraint(ENDS)


async def test_a_sequence_is_told_what_may_come_next_and_where_it_may_end(grammars: Grammars) -> None:
    constraint = await constraint_of(grammars, "[0-9]{1,2}")
    assert tokens(constraint.allowed()) == DIGITS
    constraint.append(16)
    assert tokens(constraint.allowed()) == DIGITS | ENDS
    constraint.append(17)
    assert constraint.is_complete
    with pytest.raises(ConstraintPendingError):
        constraint.allowed()


async def test_sequences_of_one_grammar_know_nothing_of_each_other(grammars: Grammars) -> None:
    first, second = [await constraint_of(grammars, "[0-9]a") for _ in range(2)]
    first.append(16)
    assert tokens(first.allowed()) == {tiny.byte_tokenizer().encode("a")[0]}
    assert tokens(second.allowed()) == DIGITS
    second.append(tiny.PAD)  # an end is none of the grammar's
    assert not second.is_complete


@pytest.mark.parametrize("vocab_size", [259, 287, 288, 320])
async def test_the_end_has_a_bit_of_its_own_behind_any_number_of_tokens(vocab_size: int) -> None:
    backend = tiny.byte_tokenizer().backend_tokenizer
    padded = Grammars(grammar_tokenizer(backend, Vocabulary(backend), vocab_size, {tiny.EOS}), 4, GilTurns())
    constraint = await constraint_of(padded, "(.|\n)*")
    bits = constraint.allowed()
    assert bits.shape == (-(-vocab_size // 32),)
    assert {token for token in range(32 * len(bits)) if int(bits[token // 32]) >> token % 32 & 1} >= ENDS
    assert tokens(bits).isdisjoint({tiny.BOS}), "which is no text"
    assert max(token for token in range(32 * len(bits)) if int(bits[token // 32]) >> token % 32 & 1) == max(ENDS)


async def test_without_time_left_a_mask_is_computed_elsewhere_and_is_the_same(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    constraint, expected = [await constraint_of(grammars, "[0-9]+x?") for _ in range(2)]
    jobs: list[Callable[[], None]] = []
    grammars.allowance.spend(1e6)
    monkeypatch.setattr(grammars.threads, "do", lambda _seconds, job: jobs.append(job))
    constraint.append(16)
    assert (constraint.is_busy, len(jobs)) == (True, 1)
    with pytest.raises(ConstraintPendingError):
        constraint.allowed()
    assert len(jobs) == 1
    jobs[0]()
    assert not constraint.is_busy
    grammars.allowance.spend(-2e6)
    expected.append(16)
    assert tokens(constraint.allowed()) == tokens(expected.allowed())


async def test_one_grammar_is_compiled_once_and_the_longest_unused_is_let_go(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_KEPT", 2)
    first, second = [await grammars.grammar(of_regex(text)) for text in ("a", "b")]
    assert await grammars.grammar(of_regex("a")) is first
    await grammars.grammar(of_regex("c"))
    assert await grammars.grammar(of_regex("a")) is first
    assert await grammars.grammar(of_regex("b")) is not second
    monkeypatch.setattr(module, "MAX_KEPT_BYTES", 10)
    long: Grammar = await grammars.grammar(of_regex("a" * 11))
    assert await grammars.grammar(of_regex("a" * 11)) is not long


async def test_who_waits_too_long_is_told_what_for(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SECONDS", 0.05)
    may_go_on = threading.Event()
    begun, run = threading.Semaphore(0), module._Job.run  # noqa: SLF001 - what the threads do

    def slow(self: module._Job) -> Grammar:
        result = run(self)
        begun.release()
        may_go_on.wait()
        return result

    monkeypatch.setattr(module._Job, "run", slow)  # noqa: SLF001
    try:
        for text in "ab":
            with pytest.raises(RequestError, match="too long to be compiled") as caught:
                await grammars.grammar(of_regex(text))
            assert (caught.value.code, caught.value.param) == ("invalid_request", "regex")
        with pytest.raises(RequestError, match="too many grammars") as caught:
            await grammars.grammar(of_regex("c"))
        assert caught.value.code == "overloaded"
    finally:
        may_go_on.set()
    monkeypatch.setattr(module, "MAX_SECONDS", 60.0)
    await asyncio.sleep(0)
    await grammars.grammar(of_regex("d"))


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 0.1)), max_size=50))
def test_no_more_time_is_spent_than_the_share_and_a_few_milliseconds(turns: list[tuple[float, float]]) -> None:
    now = spent = longest = 0.0
    allowance = Allowance(lambda: now)
    for passed, wanted in turns:
        now += passed
        if allowance.is_left:
            allowance.spend(wanted)
            spent, longest = spent + wanted, max(longest, wanted)
        assert spent <= 0.008 + 0.5 * now + longest + 1e-9


def test_what_took_least_before_is_done_first(grammars: Grammars) -> None:
    threads, done, all_done = grammars.threads, list[float](), threading.Semaphore(0)
    are_busy, may_go_on = threading.Barrier(3), threading.Event()

    def hold() -> None:
        are_busy.wait()
        may_go_on.wait()

    def job(seconds: float) -> Callable[[], None]:
        def run() -> None:
            done.append(seconds)
            all_done.release()

        return run

    for _ in range(2):
        threads.do(0.0, hold)
    are_busy.wait()
    for seconds in (0.5, 0.1, 0.3):
        threads.do(seconds, job(seconds))
    threads.do(0.05, lambda: None)
    may_go_on.set()
    for _ in range(3):
        all_done.acquire()
    assert sorted(done[:2]) == [0.1, 0.3]  # by two threads, side by side
    assert sorted(done) == [0.1, 0.3, 0.5]


def own_threads() -> set[threading.Thread]:
    """Those of grammars: others of this process come and go."""
    return {thread for thread in threading.enumerate() if thread.name.startswith(("grammar", "mask"))}


async def test_no_thread_is_left_when_it_is_closed(grammars: Grammars) -> None:
    before = own_threads()
    constraint, late = [await constraint_of(grammars, "[0-9]+") for _ in range(2)]
    grammars.allowance.spend(1e6)
    constraint.append(16)
    begun = own_threads() - before
    assert "mask" in {thread.name for thread in begun}
    grammars.close(60.0)
    assert not any(thread.is_alive() for thread in begun)
    late.append(16)
    assert own_threads() <= before


async def test_an_end_leaves_what_waits_undone(grammars: Grammars) -> None:
    threads, begun, may_go_on, done = grammars.threads, threading.Semaphore(0), threading.Event(), list[int]()

    def hold() -> None:
        begun.release()
        may_go_on.wait()

    for _ in range(NUM_THREADS):
        threads.do(0.0, hold)
        begun.acquire()
    threads.do(0.0, lambda: done.append(1))
    closing = threading.Thread(target=threads.close, args=[60.0])
    closing.start()
    may_go_on.set()
    closing.join()
    assert not done


@given(st.text("start: \n\r\t%llguidance\x0b\x85\u2028x", max_size=30))
def test_lark_is_told_from_gbnf_as_llguidance_does(text: str) -> None:
    assert is_lark(text) == is_lark_syntax(text)


def test_gbnf_is_read_in_the_time_that_it_is_given() -> None:
    assert re.sub(r"\s", "", lark_of('root ::= "é" [a-z]', 60.0)) == '%llguidance{}start:"é"/[a-z]/'
    with pytest.raises(ValueError, match="too long"):
        lark_of('root ::= "a"', 0.0)
    with pytest.raises(ValueError, match="nested too deeply"):
        lark_of("root ::= " + "(" * 900 + '"a"' + ")" * 900, 60.0)
