"""`swaplora bench`: what it asks, when, how it reads answers, and the arithmetic of its report."""

import json
import logging
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from random import Random
from socketserver import StreamRequestHandler, ThreadingTCPServer
from statistics import fmean, pvariance
from typing import Any, get_args

import numpy as np
import pytest
import structlog
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

import swaplora_server
import swaplora_server.bench.machine
from serving import BASE, Running
from swaplora_server.bench.answer import Answer
from swaplora_server.bench.load import Load
from swaplora_server.bench.machine import instruction_sets, processor
from swaplora_server.bench.options import Distribution, Lengths, Options, OptionsError
from swaplora_server.bench.report import percentile, report
from swaplora_server.bench.sse_reader import EventReader
from swaplora_server.bench.workload import PromptRequest, arrival_times, choose_adapters, make_requests
from swaplora_server.cli.bench import NICENESS, bench

RUN = "import typer; from swaplora_server.cli.bench import bench; typer.run(bench)"
URL = "http://127.0.0.1:1"
MACHINE = {
    "processor": "test",
    "instruction_sets": ["avx2", "fma"],
    "cores": 2,
    "read_gb_per_second": 1.0,
    "fp32_gflop_per_second": 1.0,
    "bf16_gflop_per_second": None,
    "rates_are": "made up",
}
unhurried = settings(max_examples=50, deadline=None)
SKEWED = 20_000  # draws, of one fixed seed, so that what is compared never changes


@pytest.fixture
def niceness(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the command lowered its priority by, which the process of the tests must not; no measuring either."""
    lowered: list[int] = []
    monkeypatch.setattr("os.nice", lowered.append)
    monkeypatch.setattr(swaplora_server.bench.machine, "measure_machine", lambda: MACHINE)
    return lowered


def run(*flags: str) -> Result:
    app = typer.Typer()
    app.command()(bench)
    return CliRunner().invoke(app, flags)


@unhurried
@given(st.sampled_from(get_args(Distribution)), st.integers(1, 20), st.integers(1, 200), st.integers(0, 9))
def test_every_distribution_gives_one_known_adapter_a_request_and_the_same_again(
    distribution: Distribution, num_adapters: int, count: int, seed: int
) -> None:
    chosen, again = (choose_adapters(distribution, num_adapters, count, Random(seed), 0.8) for _ in range(2))
    assert chosen == again
    assert len(chosen) == count
    known = {None} if distribution == "base" else {0} if distribution == "same" else set(range(num_adapters))
    assert set(chosen) <= known
    counts = Counter(chosen)
    if distribution == "distinct":
        assert max(counts.values()) - min(counts[number] for number in range(num_adapters)) <= 1


@pytest.mark.parametrize(("distribution", "alpha"), [("uniform", 0.0), ("zipf", 1.0), ("power", 0.5), ("power", 2.0)])
def test_adapters_are_asked_at_the_rates_that_were_named(distribution: Distribution, alpha: float) -> None:
    counts = Counter(choose_adapters(distribution, 8, SKEWED, Random(1), alpha))
    weights = [number**-alpha for number in range(1, 9)]
    for number, weight in enumerate(weights):
        assert counts[number] / SKEWED == pytest.approx(weight / sum(weights), abs=0.012)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_arrivals_have_the_rate_and_the_burstiness_that_were_named(burstiness: float) -> None:
    times = arrival_times(SKEWED, 5.0, burstiness, Random(2))
    gaps = np.diff(times)
    assert times[0] == 0
    assert min(gaps) >= 0
    assert fmean(gaps) == pytest.approx(1 / 5, rel=0.05)
    assert pvariance(gaps) / fmean(gaps) ** 2 == pytest.approx(1 / burstiness, rel=0.15)


@unhurried
@given(st.integers(1, 20), st.integers(0, 20), st.integers(0, 10), st.integers(0, 9))
def test_prompts_have_the_length_the_prefix_and_the_ids_that_were_named(
    low: int, more: int, shared: int, seed: int
) -> None:
    shared = min(shared, low)
    lengths = Lengths(low, low + more)
    options = Options(url=URL, base="b", prompt_tokens=lengths, shared_prefix=shared, vocab_size=259, seed=seed)
    bodies = [json.loads(request.body) for request in make_requests(options, 8, "load")]
    prompts = [body["prompt"] for body in bodies]
    assert {tuple(prompt[:shared]) for prompt in prompts} == {tuple(prompts[0][:shared])}
    assert all(lengths.low <= len(prompt) <= lengths.high for prompt in prompts)
    assert all(100 <= token < 259 for prompt in prompts for token in prompt)


def test_a_seed_makes_the_same_requests_and_the_warm_up_others() -> None:
    options = Options(url=URL, base="b", output_tokens=Lengths(4, 9), seed=3)
    requests = make_requests(options, 40, "load")
    assert requests == make_requests(options, 40, "load")
    assert {request.num_output_tokens for request in requests} == set(range(4, 10))
    prompts = [{str(json.loads(each.body)["prompt"]) for each in make_requests(options, 40, p)} for p in ("load", "w")]
    assert prompts[0].isdisjoint(prompts[1])


def test_llama_cpp_is_told_the_adapter_by_its_place() -> None:
    options = Options(url=URL, base="b", adapters=("x", "y"), distribution="distinct", dialect="llamacpp")
    bodies = [json.loads(request.body) for request in make_requests(options, 2, "load")]
    assert [body["lora"] for body in bodies] == [[{"id": 0, "scale": 1.0}], [{"id": 1, "scale": 1.0}]]
    assert [(body["model"], body["cache_prompt"]) for body in bodies] == [("b", False)] * 2


def test_requests_sample_as_the_run_was_told() -> None:
    def bodies(**sampling: Any) -> list[dict[str, Any]]:
        return [json.loads(each.body) for each in make_requests(Options(url=URL, base="b", **sampling), 3, "load")]

    greedy, sampled = bodies(), bodies(temperature=0.5, top_p=0.9, top_k=40)
    assert [(body["temperature"], body.keys() & {"top_p", "top_k", "seed"}) for body in greedy] == [(0, set())] * 3
    assert [(body["temperature"], body["top_p"], body["top_k"]) for body in sampled] == [(0.5, 0.9, 40)] * 3
    assert [body["prompt"] for body in greedy] == [body["prompt"] for body in sampled]
    assert not any("seed" in body for body in sampled)  # clients seldom send one


@pytest.mark.parametrize("text", ["0", "5-2", "a", "-3", "3-", "1-2-3", "1.5", "", "²"])
def test_a_length_that_is_none_is_refused_by_its_flag(text: str) -> None:
    assert (Lengths.parse("--prompt-tokens", "3"), Lengths.parse("", "1-9")) == (Lengths(3, 3), Lengths(1, 9))
    with pytest.raises(OptionsError, match="--prompt-tokens"):
        Lengths.parse("--prompt-tokens", text)


STREAM = (
    b': ping\n\ndata: {"a": 1}\r\n\r\nid: 7\rdata:one\rdata: two\r\r:\ndata\ndata:  x\n\n\n\n'
    b"data: p\r\ndata: q\r\n\r\ndata: [DONE]\n\ndata: cut"
)
EVENTS = [b'{"a": 1}', b"one\ntwo", b"\n x", b"p\nq", b"[DONE]"]


def test_an_event_stream_is_read_the_same_wherever_it_is_cut() -> None:
    for cut in range(len(STREAM) + 1):
        reader = EventReader()
        assert [*reader.feed(STREAM[:cut]), *reader.feed(STREAM[cut:])] == EVENTS, cut


@unhurried
@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_an_event_stream_is_read_the_same_in_any_pieces(cuts: list[int]) -> None:
    reader, edges = EventReader(), [0, *sorted(cuts), len(STREAM)]
    pieces = [STREAM[begin:end] for begin, end in pairwise(edges)]
    assert [data for piece in pieces for data in reader.feed(piece)] == EVENTS


def answer(*stamps: float, began: float = 0.0, adapter: int | None = 0, **fields: Any) -> Answer:
    """An answer of as many tokens as stamps, unless `fields` say otherwise."""
    counts = {"num_output_tokens": len(stamps), "num_prompt_tokens": 10, "ended": stamps[-1] if stamps else 0.0}
    return Answer(PromptRequest(adapter, 4, b""), began, stamps=list(stamps), **(counts | fields))


def usage(num_tokens: int) -> bytes:
    return json.dumps({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": num_tokens}}).encode()


def test_tokens_are_counted_by_usage_and_times_by_chunks_with_tokens() -> None:
    found = answer(began=1.0)
    chunks = [{"text": ""}, {"text": "", "token_ids": [7]}, {"text": "abc"}, {"text": "", "finish_reason": "length"}]
    for second, choice in enumerate(chunks):
        found.read_event(json.dumps({"choices": [choice]}).encode(), 2.0 + second)
    found.read_event(usage(5), 9.0)
    found.read_event(b"[DONE]", 9.0)
    assert found.failure is None
    assert (found.ttft, found.gaps, found.tpot) == (2.0, [1.0], 0.25)
    assert (found.num_prompt_tokens, found.num_output_tokens, found.num_cached_tokens) == (3, 5, 0)


@pytest.mark.parametrize(
    ("events", "reason"),
    [
        ([b'{"error": {"message": "bad\\nrow", "code": "engine_failed"}}'], "error in the stream: bad row"),
        ([b"<html>"], "an event of the stream is not a JSON object: <html>"),
        ([b"[1]"], "an event of the stream is not a JSON object: [1]"),
        ([b'{"choices": 5}'], "an event of the stream is not a completion's chunk"),
        ([b'{"choices": [], "usage": {"prompt_tokens": 3}}'], "an event of the stream is not a completion's chunk"),
        ([b'{"choices": [{"text": "a"}]}', b"[DONE]"], "the stream has no usage"),
        ([usage(3), b"[DONE]"], "the stream has no chunk with text or token ids"),
    ],
)
def test_a_stream_that_is_no_whole_answer_says_why(events: list[bytes], reason: str) -> None:
    found = answer()
    for event in events:
        found.read_event(event, 1.0)
    assert (found.failure or "").startswith(reason)


@unhurried
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=30), st.integers(0, 100))
def test_percentiles_are_those_of_numpy(numbers: list[float], percent: int) -> None:
    assert percentile(sorted(numbers), percent) == pytest.approx(float(np.percentile(numbers, percent)))


def hand_made() -> Load:
    """Two adapters; the second's first answer broke off, and its second is one token long."""
    first = [answer(1.0, 2.0, 3.0, 4.0), answer(2.0, 2.5, 3.0, 3.5, began=1.0, num_cached_tokens=6)]
    second = [answer(1.0, adapter=1, failure="broke off"), answer(5.0, began=1.5, adapter=1)]
    return Load([*first, *second], seconds=5.0, cpu_seconds=0.5)


def reported(*, per_adapter: bool = False, slo_ttft: float | None = None, slo_tpot: float | None = None) -> Any:
    adapters: Any = {"adapters": ("x", "y"), "distribution": "distinct"}
    options = Options(url=URL, slo_ttft=slo_ttft, slo_tpot=slo_tpot, **adapters)
    return report(hand_made(), options, per_adapter=per_adapter)


def test_a_report_counts_whole_answers_over_the_whole_time() -> None:
    found = reported()
    assert (found["completed"], found["failed"], found["short"]) == (3, 1, 1)
    assert (found["output_tokens"], found["prompt_tokens"], found["cached_tokens"]) == (9, 30, 6)
    assert found["output_tokens_per_second"] == pytest.approx(9 / 5)
    assert found["total_tokens_per_second"] == pytest.approx(39 / 5)
    assert found["requests_per_second"] == pytest.approx(3 / 5)
    assert found["ttft_ms"] == pytest.approx({"p50": 1000, "p95": 3250, "p99": 3450, "max": 3500})
    assert found["tpot_ms"]["p50"] == pytest.approx(750)
    assert found["gap_ms"]["max"] == pytest.approx(1000)
    assert found["latency_ms"]["max"] == pytest.approx(4000)
    assert (found["first_failure"], found["goodput"]) == ("broke off", None)
    assert found["generator"]["cpu_share"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("slo_ttft", "slo_tpot", "good"),
    [(1000, None, 2), (999, None, 0), (None, 500, 2), (None, 1000, 3), (1000, 500, 1)],
)
def test_goodput_counts_what_kept_every_promise(slo_ttft: float | None, slo_tpot: float | None, good: int) -> None:
    goodput = reported(slo_ttft=slo_ttft, slo_tpot=slo_tpot)["goodput"]
    assert (goodput["requests"], goodput["requests_per_second"]) == (good, pytest.approx(good / 5))


def test_figures_of_each_adapter_add_up_to_those_of_all() -> None:
    found = reported(per_adapter=True)
    assert [(each["name"], each["completed"], each["failed"]) for each in found["adapters"]] == [
        ("x", 2, 0),
        ("y", 1, 1),
    ]
    for key in ("output_tokens_per_second", "requests_per_second", "prompt_tokens"):
        assert sum(each[key] for each in found["adapters"]) == pytest.approx(found[key])


@dataclass
class Peer:
    """A server that answers as the model's name says, and what it was asked."""

    url: str = ""
    version: bytes | None = None  # what GET /version is answered; None: there is no such route
    heads: list[str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    most_in_flight: int = 0
    in_flight: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    crowd: threading.Barrier = field(default_factory=lambda: threading.Barrier(4))

    def take(self, head: str, body: dict[str, Any]) -> None:
        self.heads.append(head)
        self.bodies.append(body)
        self.count(1)

    def count(self, change: int) -> None:
        """Whole answers are counted out before their end is sent, which is when the next request may come."""
        with self.lock:
            self.in_flight += change
            self.most_in_flight = max(self.most_in_flight, self.in_flight)


def event(content: object) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def chunk(text: str) -> bytes:
    return event({"choices": [{"index": 0, "text": text}]})


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
END = b"data: " + usage(4) + b"\n\ndata: [DONE]\n\n"
REFUSAL = b'{"error": {"message": "out of order", "code": "engine_failed"}}'
ANSWERS: dict[str, Callable[[], Iterator[bytes]]] = {
    "two-a-chunk": lambda: iter([HEAD, chunk("ab"), chunk("cd"), END]),
    "drops": lambda: iter([HEAD, chunk("a")]),
    "refuses": lambda: iter([b"HTTP/1.1 500 Internal Server Error\r\nconnection: close\r\n\r\n", REFUSAL]),
    "babbles": lambda: iter([b"220 smtp ready\r\n"]),
    "hangs-up": lambda: iter([]),
    "slow": lambda: slowly(HEAD, b": ping\n\n", chunk("a")[:9], chunk("a")[9:], chunk("b") + END),
}


def slowly(*pieces: bytes) -> Iterator[bytes]:
    for piece in pieces:
        yield piece
        time.sleep(0.05)


def told(head: str, version: bytes | None) -> bytes:
    """The answer to a question that is no completion."""
    is_there = version is not None and head.startswith("GET /below/version HTTP/1.1\r\n")
    return b"HTTP/1.1 200 OK\r\n\r\n" + (version or b"") if is_there else b"HTTP/1.1 404 Not Found\r\n\r\n{}"


@pytest.fixture
def peer() -> Iterator[Peer]:
    found = Peer()

    class Handler(StreamRequestHandler):
        def handle(self) -> None:
            head = b"".join(iter(self.rfile.readline, b"\r\n")).decode()
            if head.startswith("GET "):
                self.wfile.write(told(head, found.version))
                return
            length = next(line for line in head.splitlines() if line.startswith("Content-Length: "))
            body = json.loads(self.rfile.read(int(length.removeprefix("Content-Length: "))))
            found.take(head, body)
            if body["model"] == "waits-for-four":
                found.crowd.wait(timeout=60)
            for piece in ANSWERS.get(body["model"], ANSWERS["two-a-chunk"])():
                if piece.endswith(END):
                    found.count(-1)
                self.wfile.write(piece)

    with ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        found.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield found
        server.shutdown()
        thread.join()


def asked(peer: Peer, *flags: str) -> dict[str, Any]:
    """The report of a run that succeeds."""
    done = run("--url", peer.url, *flags, "--json")
    assert done.exit_code == 0, done.output
    content: dict[str, Any] = json.loads(done.stdout)
    return content


def test_a_chunk_may_hold_several_tokens(niceness: list[int], peer: Peer) -> None:
    found = asked(peer, "--base", "b", "--requests", "3", "--output-tokens", "4")
    assert (found["output_tokens"], found["tokens_per_chunk"], found["failed"], found["short"]) == (12, 2.0, 0, 0)
    assert niceness == [NICENESS]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("refuses", "HTTP 500: out of order"),
        ("drops", "the connection was closed before the answer was whole, after 1 chunks with tokens"),
        ("hangs-up", "the connection was closed before the answer was whole, after 0 chunks with tokens"),
        ("babbles", "what answers is not HTTP/1.1"),
    ],
)
def test_answers_that_fail_are_counted_beside_those_that_do_not(
    niceness: list[int], peer: Peer, model: str, reason: str
) -> None:
    flags = ("--adapters", f"good,{model}", "--requests", "6", "--concurrency", "3")
    found = asked(peer, *flags, "--per-adapter")
    assert (found["completed"], found["failed"], found["output_tokens"]) == (3, 3, 12)
    assert found["first_failure"].startswith(reason)
    assert [each["failed"] for each in found["adapters"]] == [0, 3]
    done = run("--url", peer.url, "--base", model, "--requests", "2")
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith(f"swaplora: no request was answered: {reason}")


def test_a_slow_stream_shows_in_the_gaps(niceness: list[int], peer: Peer) -> None:
    found = asked(peer, "--base", "slow", "--requests", "1")
    assert found["completed"] == 1
    assert found["ttft_ms"]["p50"] >= 149  # three pauses, the last within the first event
    assert found["gap_ms"]["p50"] >= 49


def test_a_closed_loop_keeps_no_more_in_flight_than_it_was_told(niceness: list[int], peer: Peer) -> None:
    asked(peer, "--base", "slow", "--requests", "6", "--concurrency", "2")
    assert peer.most_in_flight == 2


def test_an_open_loop_sends_what_is_due_though_nothing_was_answered(niceness: list[int], peer: Peer) -> None:
    found = asked(peer, "--base", "waits-for-four", "--requests", "4", "--rate", "50", "--burstiness", "2")
    assert (found["completed"], peer.most_in_flight) == (4, 4)


def test_a_warm_up_is_sent_first_and_not_counted(niceness: list[int], peer: Peer) -> None:
    found = asked(peer, "--base", "b", "--requests", "2", "--warmup", "3", "--concurrency", "1")
    assert (found["completed"], len(peer.bodies)) == (2, 5)
    again = asked(peer, "--base", "b", "--requests", "2", "--concurrency", "1")
    assert peer.bodies[3:5] == peer.bodies[5:]
    assert again["options"]["warmup"] == 0


def test_a_warm_up_that_fails_ends_the_run(niceness: list[int], peer: Peer) -> None:
    done = run("--url", peer.url, "--base", "refuses", "--warmup", "1")
    assert (done.exit_code, done.stderr) == (1, "swaplora: the warm-up failed: HTTP 500: out of order\n")
    assert len(peer.bodies) == 1


def test_a_key_is_sent_and_never_shown(niceness: list[int], peer: Peer) -> None:
    found = asked(peer, "--base", "b", "--requests", "1", "--api-key", "first-secret,other-secret")
    assert "Authorization: Bearer first-secret\r\n" in peer.heads[0]
    assert "secret" not in json.dumps(found)


@pytest.mark.parametrize(
    ("version", "kernels", "shown"),
    [
        (None, None, "the server does not say which kernels it has"),
        (b"not JSON", None, "the server does not say which kernels it has"),
        (b'["version"]', None, "the server does not say which kernels it has"),
        (b'{"version": "2", "kernels": 7}', None, "the server does not say which kernels it has"),
        (
            b'{"version": "2", "device": "cpu", "dtype": "float32", "kernels": "plain\\u001b[2J", "more": 1}',
            "plain\x1b[2J",
            "the server: 2, cpu, float32; kernels: plain",
        ),
    ],
)
def test_the_kernels_are_those_that_the_server_says(
    niceness: list[int], peer: Peer, version: bytes | None, kernels: str | None, shown: str
) -> None:
    peer.version = version
    peer.url += "/below/"
    server = asked(peer, "--base", "b", "--requests", "1")["server"]
    assert (server.keys(), server["kernels"]) == ({"version", "device", "dtype", "kernels"}, kernels)
    told = run("--url", peer.url, "--base", "b", "--requests", "1").stdout
    assert shown in told
    assert "\x1b" not in told


def test_a_server_that_is_not_there_is_one_line(niceness: list[int]) -> None:
    done = run("--url", URL, "--base", "b", "--requests", "2")
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("swaplora: no request was answered: no connection to 127.0.0.1:1: ")


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("", "nobody to ask: give --base NAME"),
        ("--distribution zipf --base b", "--distribution zipf needs --adapters A,B,C"),
        ("--distribution base --base b --adapters x", "--adapters is not used by --distribution base"),
        ("--adapters x,y,x", "--adapters has an empty name or the same one twice"),
        ("--adapters x,", "--adapters has an empty name or the same one twice"),
        ("--adapters x --alpha 2", "--alpha is not used by --distribution distinct"),
        ("--adapters x --dialect llamacpp", "--dialect llamacpp needs --base NAME"),
        ("--base b --rate 2 --concurrency 3", "--rate and --concurrency exclude each other"),
        ("--base b --burstiness 2", "--burstiness is not used without --rate"),
        ("--base b --rate nan", "--rate nan: give a number above 0"),
        ("--base b --rate 0", "--rate 0.0: give a number above 0"),
        ("--base b --slo-tpot inf", "--slo-tpot inf: give a number above 0"),
        ("--base b --concurrency 0", "--concurrency 0: give 1 or more"),
        ("--base b --requests 0", "--requests 0: give 1 or more"),
        ("--base b --warmup -1", "--warmup -1: give 0 or more"),
        ("--base b --prompt-tokens 9-2", "--prompt-tokens 9-2: give at least one token"),
        ("--base b --prompt-tokens 8-99 --shared-prefix 9", "--shared-prefix 9 is longer than a prompt of 8 tokens"),
        ("--base b --temperature nan", "--temperature nan: give 0, which is greedy, or more"),
        ("--base b --temperature -1", "--temperature -1.0: give 0, which is greedy, or more"),
        ("--base b --temperature 1 --top-p 0", "--top-p 0.0: give a number above 0, up to 1"),
        ("--base b --temperature 1 --top-p nan", "--top-p nan: give a number above 0, up to 1"),
        ("--base b --temperature 1 --top-k 0", "--top-k 0: give 1 or more"),
        ("--base b --top-p 0.5", "--top-p is not used by greedy answers"),
        ("--base b --top-k 5", "--top-k is not used by greedy answers"),
        ("--base b --vocab-size 100", "--vocab-size 100: prompts are drawn from the ids from 100 on"),
        ("--base b --url ftp://here", "ftp://here is not a server's address"),
        ("--base b --url http://h:99999", "http://h:99999 is not a server's address"),
        ("--base b --url http://h/v1?x=1", "http://h/v1?x=1: give only the server's address"),
        ("--base b --api-key schlüssel", "the API key has a character in it that is not printable ASCII"),
    ],
)
def test_what_cannot_be_asked_for_is_one_line_and_exit_2(niceness: list[int], flags: str, complaint: str) -> None:
    done = run(*flags.split())
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"swaplora: {complaint}")
    assert niceness == []


@pytest.fixture
def _quiet() -> Iterator[None]:
    """The server's log is of this process, and goes to its output unless it is told otherwise."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    yield
    structlog.reset_defaults()


@pytest.mark.usefixtures("_quiet")
def test_a_server_of_ours_is_measured_whole(niceness: list[int], server: Running, adapters: list[Path]) -> None:
    for number in range(3):
        server.put(f"a{number}", adapters[number])
    flags = ("--url", server.url, "--adapters", "a0,a1,a2", "--vocab-size", "256", "--prompt-tokens", "5-20")
    done = run(*flags, "--requests", "9", "--concurrency", "4", "--output-tokens", "6", "--json", "--per-adapter")
    found = json.loads(done.stdout)
    assert (found["completed"], found["failed"], found["short"], found["output_tokens"]) == (9, 0, 0, 54)
    assert found["tokens_per_chunk"] == 1.0
    assert [(each["name"], each["completed"]) for each in found["adapters"]] == [("a0", 3), ("a1", 3), ("a2", 3)]
    assert found["options"]["prompt_tokens"] == "5-20"
    assert found["machine"] == MACHINE
    assert found["server"] == server.client.get("/version").json()
    assert found["server"]["kernels"] == server.service.base.backend.description


def test_a_person_is_shown_a_table(niceness: list[int], server: Running, adapters: list[Path]) -> None:
    server.put("a0", adapters[0])
    flags = ("--url", server.url, "--vocab-size", "256", "--requests", "2", "--output-tokens", "3")
    shown = run(*flags, "--adapters", "a0", "--base", BASE, "--per-adapter", "--slo-ttft", "60000").stdout
    assert "2 requests in " in shown
    assert "2 requests with TTFT within 60000 ms" in shown
    told = ("avx2 fma", "no instructions for bf16", f"kernels: {server.service.base.backend.description}")
    assert [
        word for word in ("TTFT", "TPOT", "gap", "whole answer", "a0", "of one core", *told) if word not in shown
    ] == []


def test_a_model_that_is_unknown_is_named_as_the_failure(niceness: list[int], server: Running) -> None:
    done = run("--url", server.url, "--base", "nobody", "--vocab-size", "256", "--requests", "2")
    assert done.exit_code == 1
    assert "no request was answered: HTTP 404: " in done.stderr
    assert "nobody" in done.stderr


def python(code: str, *flags: str) -> subprocess.CompletedProcess[str]:
    folder = Path(swaplora_server.__file__).parents[1]
    return subprocess.run(
        [sys.executable, "-c", code, *flags], cwd=folder, capture_output=True, text=True, check=True, timeout=60
    )


@pytest.mark.parametrize(
    ("flags", "unwanted"),
    [
        (["--help"], {"torch", "transformers", "httpx", "numpy", "httptools", "uvloop", "swaplora_server.config"}),
        (["--base", "good", "--requests", "2"], {"torch", "transformers", "httpx", "swaplora_server.config"}),
    ],
)
def test_a_process_of_its_own_imports_nothing_that_it_does_not_need(
    peer: Peer, flags: list[str], unwanted: set[str]
) -> None:
    shown = f"print(os.nice(0), *({unwanted} & sys.modules.keys()), file=sys.stderr)"
    done = python(f"import atexit, os, sys; atexit.register(lambda: {shown}); {RUN}", "--url", peer.url, *flags)
    assert ("Usage:" in done.stdout) == ("--help" in flags)
    lowered, *imported = done.stderr.split()
    assert imported == []
    assert int(lowered) >= (0 if "--help" in flags else NICENESS)


def test_the_machine_is_measured() -> None:
    found = swaplora_server.bench.machine.measure_machine()
    assert found.keys() == MACHINE.keys()
    assert found["cores"] >= 1
    assert min(found["read_gb_per_second"], found["fp32_gflop_per_second"]) > 0
    has_bf16 = {"avx512_bf16", "amx_bf16", "bf16"}.intersection(found["instruction_sets"])
    assert found["bf16_gflop_per_second"] > 0 if has_bf16 else found["bf16_gflop_per_second"] is None


@pytest.mark.parametrize(
    ("cpuinfo", "name", "sets"),
    [
        (
            {
                "model name": "Some Xeon",
                "cpu family": "6",
                "model": "207",
                "flags": "fpu avx2 fma avx512f amx_bf16_x avx",
            },
            "Some Xeon (family 6, model 207)",
            ["avx2", "fma", "avx512f"],
        ),
        ({"model name": "AMD", "flags": ""}, "AMD", []),
        ({"Features": "fp asimd i8mm bf16"}, None, ["bf16", "i8mm"]),
        ({}, None, []),
    ],
)
def test_a_processor_is_named_by_what_tells_it_from_others(
    cpuinfo: dict[str, str], name: str | None, sets: list[str]
) -> None:
    assert instruction_sets(cpuinfo) == sets
    assert processor(cpuinfo) == name if name else processor(cpuinfo)
