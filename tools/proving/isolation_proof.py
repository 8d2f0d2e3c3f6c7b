"""The parts of the proof of isolation, and what each compares: see isolation.py."""

import asyncio
import itertools
import random
from dataclasses import dataclass, field

from isolation_asking import THE_BASE, Asked, Servers, adapter, alias, mixture, sum_of
from isolation_report import Report
from isolation_truth import Truth
from serving import BASE, Streamed

TOLERANCE = 1e-4  # of a log-probability, in float32
NUM_RESIDENT = 3
CONTEXT, SHORTEST = 1024, 6  # tokens
NUM_MIXED = 2
NUM_SWAPPERS, NUM_READERS = 3, 16
PACE_SECONDS = 0.03
MAX_PROBLEMS = 5  # after which there is no need to go on
TURNING = "turning"


@dataclass(frozen=True)
class Adapter:
    """An adapter's two files, and the digest that the server gave it."""

    name: str
    files: dict[str, bytes]
    digest: str


@dataclass(frozen=True)
class Workload:
    """How much is done with how many adapters, and how long streams are, in tokens."""

    num_swaps: int
    num_replaces: int
    length: int = CONTEXT - 24
    short: int = 40
    num_adapters: int = 8


@dataclass
class Proof:
    """One run. What each digest says alone is in `alone`; the base's stands under "", a sum's under all in order.

    Sums begin with the first adapter and mixtures with the second, which are in memory anyway.
    """

    servers: Servers
    adapters: list[Adapter]
    truth: Truth
    report: Report
    workload: Workload
    alone: dict[str, Streamed] = field(default_factory=dict)
    is_replaced: bool = False

    def __post_init__(self) -> None:
        self.first, self.second, *self.rest = self.adapters
        self.others = itertools.cycle(self.rest)  # the next one is never among the last few

    @property
    def long(self) -> dict[Asked, str]:
        """Who is decoding all the time, with their digests."""
        return {THE_BASE: ""} | {adapter(each.name): each.digest for each in (self.first, self.second)}

    @property
    def is_swapped(self) -> bool:
        return self.report.swaps >= self.workload.num_swaps or self.is_lost

    @property
    def is_lost(self) -> bool:
        return len(self.report.problems) >= MAX_PROBLEMS

    async def run(self) -> None:
        """All three parts, each only while those before it found nothing."""
        await self.control()
        if not self.report.problems:
            streams = [self.stream_on(asked, digest) for asked, digest in [*self.long.items()] * 2]
            await asyncio.gather(*streams, *(self.swap(number) for number in range(NUM_SWAPPERS)))
        if not self.report.problems:
            await self.put(TURNING, self.rest[0])
            await self.put_alias("as-turning", TURNING)
            await self.put_mixture("mixed-turning", TURNING)
            await asyncio.gather(self.replace(), *(self.read_replaced(number) for number in range(NUM_READERS)))

    async def control(self) -> None:
        """Everyone alone, twice: as a whole answer with the likeliest two of each token, then as a stream."""
        length, short = self.workload.length, self.workload.short
        for asked, digest in self.long.items():
            await self.hear_alone(asked, digest, length)
        for number, other in enumerate(self.rest):
            await self.hear_alone(adapter(other.name), other.digest, short)
            await self.hear_alone(sum_of(self.first.name, other.name), self.summed(other), short)
            await self.put_mixture(f"mixed-{number}", other.name)
            await self.hear_alone(mixture(f"mixed-{number}"), self.mixed(other), short)
            await self.servers.change("DELETE", f"/v1/mixtures/mixed-{number}")
        if any(_is_alike(*pair) for pair in itertools.combinations(self.alone.values(), 2)):
            self.report.problems.append("two of them say the same, so that one could not be told from the other")

    async def hear_alone(self, asked: Asked, digest: str, length: int) -> None:
        if self.report.problems:
            return
        whole, margins = await self.servers.ask_whole(asked, length)
        self.report.note_margins(margins, 2 * TOLERANCE)
        self.alone[digest] = whole
        for said in (whole, await self.servers.ask(asked, length)):
            self.check(asked, said, length, digest)
        if whole.error is None and not (error := self.truth.worst_error(asked.kind, whole)) <= TOLERANCE:
            self.report.problems.append(f"{_who(asked, whole)} is off PEFT by {error:.1e} alone")

    async def stream_on(self, asked: Asked, digest: str) -> None:
        """One long stream after the other."""
        length = self.workload.length
        while not self.is_swapped:
            self.check(asked, await self.servers.ask(asked, length), length, digest)

    async def swap(self, number: int) -> None:
        """Ask for others, and change names of one's own, as the shared count of swaps allows."""
        rng = random.Random(number)
        while not self.is_swapped:
            self.report.swaps += 1
            await asyncio.sleep(PACE_SECONDS * NUM_SWAPPERS * rng.random())
            await self.swap_to(next(self.others), rng, f"own-{number}", f"as-{number}", f"mixed-{number}")

    async def swap_to(self, other: Adapter, rng: random.Random, own: str, as_: str, mixed: str) -> None:
        """Have `other` answer under some name, and go."""
        chance = rng.random()
        if chance < 0.3:
            await self.expect(adapter(other.name), other.digest)
        elif chance < 0.36:
            await self.expect(sum_of(self.first.name, other.name), self.summed(other))
        elif chance < 0.54:
            turn = await self.put(own, other)
            await self.expect(adapter(own), other.digest, turn)
            await self.expect(sum_of(self.first.name, own), self.summed(other), turn)
        elif chance < 0.73:
            await self.expect(alias(as_), other.digest, await self.put_alias(as_, other.name))
        elif chance < 0.86:
            await self.expect(mixture(mixed), self.mixed(other), await self.put_mixture(mixed, other.name))
        else:
            gone, path = rng.choice([(adapter(own), "adapters"), (alias(as_), "aliases"), (mixture(mixed), "mixtures")])
            _, turn = await self.servers.change("DELETE", f"/v1/{path}/{gone.model}")
            self.report.changes["deletes"] += 1
            self.check_unknown(gone, await self.servers.ask(gone, SHORTEST, turn))

    async def replace(self) -> None:
        """Give one name new weights again and again, and move an alias; who asks after that gets them, either way."""
        for number in range(self.workload.num_replaces):
            other = next(self.others)
            turn = await self.put(TURNING, other)
            self.report.replaces += 1
            if number % 4 == 0 and not self.is_lost:
                for asked, digest in self.turned(other).items():
                    await self.expect(asked, digest, turn)
                await self.expect(alias("moving"), other.digest, await self.put_alias("moving", other.name))
            await asyncio.sleep(PACE_SECONDS)
        self.is_replaced = True

    async def read_replaced(self, number: int) -> None:
        """One stream after the other of the name that is replaced, every fourth in some other way."""
        asked = [*self.turned(self.first)][number % 4]
        while not (self.is_replaced or self.is_lost):
            self.check(asked, await self.servers.ask(asked, self.workload.short), self.workload.short)

    def turned(self, other: Adapter) -> dict[Asked, str]:
        """The ways to the name that is replaced, and what answers there once it stands for `other`."""
        return {
            adapter(TURNING): other.digest,
            alias("as-turning"): other.digest,
            sum_of(self.first.name, TURNING): self.summed(other),
            mixture("mixed-turning"): self.mixed(other),
        }

    def summed(self, other: Adapter) -> str:
        return f"{self.first.digest}, {other.digest}"

    def mixed(self, other: Adapter) -> str:
        return f"{self.second.digest}, {other.digest}"

    async def put(self, name: str, adapter: Adapter) -> int:
        """Whose turn is next, as of the two below."""
        turn, answer = await self._change("uploads", "PUT", f"/v1/adapters/{name}", files=adapter.files)
        if answer.get("digest") != adapter.digest:
            self.report.problems.append(f"{name} was taken as {answer.get('digest')}, and is {adapter.digest}")
        return turn

    async def put_alias(self, name: str, target: str) -> int:
        turn, _ = await self._change("aliases put", "PUT", f"/v1/aliases/{name}", json={"target": target})
        return turn

    async def put_mixture(self, name: str, member: str) -> int:
        body = {"name": name, "members": [self.second.name, member], "top_k": NUM_MIXED}
        turn, _ = await self._change("mixtures made", "POST", "/v1/mixtures", json=body)
        return turn

    async def _change(self, kind: str, method: str, path: str, **content: object) -> tuple[int, dict[str, object]]:
        response, turn = await self.servers.change(method, path, **content)
        self.report.changes[kind] += 1
        if not response.is_success:
            self.report.problems.append(f"{method} {path} was answered {response.status_code} {response.text[:200]}")
        return turn, response.json()

    async def expect(self, asked: Asked, digest: str, turn: int | None = None) -> None:
        """A short answer by `digest` alone."""
        self.check(asked, await self.servers.ask(asked, SHORTEST, turn), SHORTEST, digest)

    def check(self, asked: Asked, said: Streamed, max_tokens: int, digest: str | None = None) -> None:
        """`said` must be what its own digest says alone, and `digest` be that one when it is known."""
        if said.error is not None and said.error["code"] == "memory_full":
            self.report.refused += 1
            return
        own = said.headers.get("x-swaplora-digest", "")
        if digest not in (None, own) and said.error is None:
            self.report.problems.append(f"{_who(asked, said)} answered as {own or BASE}, and is {digest or BASE}")
        elif (wrong := _difference(said, self.alone.get(own), max_tokens)) is not None:
            self.report.problems.append(f"{_who(asked, said)} {wrong}")
        self.report.kinds[asked.kind] += 1
        self.report.tokens += len(said.token_ids)

    def check_unknown(self, asked: Asked, said: Streamed) -> None:
        if said.error is None or said.error["code"] != "model_not_found":
            self.report.problems.append(f"a deleted name was answered by {_who(asked, said)}")
        self.report.kinds["deleted names"] += 1


def _who(asked: Asked, said: Streamed) -> str:
    """Who was asked, and who answered where that says more."""
    name = " + ".join(name for name, _ in asked.terms) or asked.model
    own = said.headers.get("x-swaplora-adapter")
    return own if own and asked.kind in ("adapters", "sums") else f"{name} ({own})" if own else name


def _is_alike(one: Streamed, other: Streamed) -> bool:
    """Whether the shortest answers of the two could be taken for one another."""
    near = zip(one.logprobs[:SHORTEST], other.logprobs[:SHORTEST], strict=True)
    return one.token_ids[:SHORTEST] == other.token_ids[:SHORTEST] and all(
        abs(logprob - other_logprob) <= 2 * TOLERANCE for logprob, other_logprob in near
    )


def _difference(said: Streamed, alone: Streamed | None, max_tokens: int) -> str | None:
    """What tells `said` from the first tokens of what the same digest says alone, or None."""
    if said.error is not None:
        return f"ended with {said.error['code']}: {said.error['message']}"
    if alone is None:
        return "was answered by a digest that nobody uploaded"
    pairs = zip(said.token_ids, said.logprobs, alone.token_ids, alone.logprobs, strict=False)
    for number, (token, logprob, expected, expected_logprob) in enumerate(pairs):
        if token != expected or not abs(logprob - expected_logprob) <= TOLERANCE:
            return f"says something else from token {number} on"
    is_whole = len(said.token_ids) == len(said.logprobs) == max_tokens and said.finish_reason == "length"
    return None if is_whole else f"ended after {len(said.token_ids)} tokens: {said.finish_reason}"
