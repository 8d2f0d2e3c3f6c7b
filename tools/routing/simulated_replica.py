"""A replica of a simulation: rows that run at once, adapters in memory, one load at a time.

All times are in seconds. What a request costs was measured of the server (docs/benchmarks.md, AMD EPYC, Zen 3, two
cores): 64 tokens after a prompt of 128 take 1 s alone (65 tokens/s) and 5.2 s beside fifteen others (197 tokens/s
together), and an adapter of rank 16 that is not in memory 65 ms more, of which its load is 50. A load beside other
requests takes 36 ms of their steps' time: memory for 8 of 32 adapters in traffic gave 0.90 of the throughput.
"""

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from heapq import heappop, heappush

MEAN_TOKENS = 64
SECONDS_A_STEP, SECONDS_A_ROW = 0.0110, 0.0044  # from 65 tokens/s alone and 197 of sixteen
LOAD_SECONDS, REST_OF_COLD_START, TAKEN_OF_STEPS = 0.050, 0.015, 0.036
MAX_ROWS = 64  # the setting max_num_seqs
REQUESTS_A_SECOND = MAX_ROWS / (SECONDS_A_STEP + SECONDS_A_ROW * MAX_ROWS) / MEAN_TOKENS  # at most, of one replica


@dataclass(slots=True, eq=False)
class Request:
    adapter: str
    router: int
    arrived: float
    tokens: float
    replica: str = ""
    ready: float = 0.0  # when its adapter is in memory
    waited: float = 0.0
    ended: float = 0.0


@dataclass(slots=True, eq=False)
class Replica:
    """Processor sharing: a step makes a token of each row, and takes longer the more rows there are."""

    name: str
    num_adapters: int  # that fit into memory
    memory: OrderedDict[str, float] = field(default_factory=OrderedDict)  # adapter → when it is there; oldest use first
    users: dict[str, int] = field(default_factory=dict)
    line: deque[Request] = field(default_factory=deque)
    rows: list[tuple[float, int, Request]] = field(default_factory=list)  # by the step in which they end
    num_steps: float = 0.0  # until `now`
    now: float = 0.0
    loader_free: float = 0.0
    num_served: int = 0
    num_loads: int = 0
    num_coming: int = 0  # whose adapter is being loaded
    version: int = 0  # of what is awaited to end next

    @property
    def ongoing(self) -> int:
        return len(self.rows) + len(self.line) + self.num_coming

    @property
    def seconds_a_step(self) -> float:
        return SECONDS_A_STEP + SECONDS_A_ROW * len(self.rows)

    def arrive(self, request: Request, now: float) -> float:
        """Take a request; when it is ready to run, its adapter being in memory."""
        self.num_served += 1
        self.num_coming += 1
        adapter, memory = request.adapter, self.memory
        self.users[adapter] = self.users.get(adapter, 0) + 1
        if adapter in memory:
            memory.move_to_end(adapter)
        else:
            self.num_loads += 1
            self._run(now)
            self.now += TAKEN_OF_STEPS
            self.loader_free = max(now, self.loader_free) + LOAD_SECONDS
            memory[adapter] = self.loader_free + REST_OF_COLD_START
            self._evict()
        request.ready = max(now, memory[adapter])
        return request.ready

    def begin(self, request: Request, now: float) -> None:
        self.num_coming -= 1
        self.line.append(request)
        self._fill(now)

    def next_end(self) -> float | None:
        """When the first of the rows ends, if nothing comes before."""
        return self.now + (self.rows[0][0] - self.num_steps) * self.seconds_a_step if self.rows else None

    def end(self, now: float) -> Request:
        self._run(now)
        _, _, request = heappop(self.rows)
        request.ended = now
        self.users[request.adapter] -= 1
        if not self.users[request.adapter]:
            del self.users[request.adapter]
        self._fill(now)
        return request

    def _fill(self, now: float) -> None:
        self._run(now)
        while self.line and len(self.rows) < MAX_ROWS:
            request = self.line.popleft()
            request.waited = now - request.arrived
            heappush(self.rows, (self.num_steps + request.tokens, id(request), request))

    def _run(self, now: float) -> None:
        if now > self.now:
            self.num_steps += (now - self.now) / self.seconds_a_step
            self.now = now

    def _evict(self) -> None:
        """The least recently used first, what is in use never."""
        if len(self.memory) > self.num_adapters:
            idle = next((adapter for adapter in self.memory if adapter not in self.users), None)
            if idle is not None:
                del self.memory[idle]
