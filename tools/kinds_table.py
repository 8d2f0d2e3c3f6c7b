"""The table of adapter kinds in docs/adapters.md, measured: `make tables` writes it there.

Every kind of `peft_kinds` answers one prompt through the engine: alone, in one step with all others of its base and the
base, in a weighted sum, and merged into weights of its own. A cell says yes where every log-probability is within 1e-4
of PEFT's, for every kind in the row.
"""

import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import peft_kinds
import tiny
from kinds_oracle import KindOracle, SumOracle
from oracle import Oracle
from peft_kinds import BASES, KINDS
from swaplora_adapters.files.naming import CONFIG_FILE, WEIGHTS_FILE
from swaplora_adapters.weights.load import load_weights
from swaplora_adapters.weights.materialise import materialise
from swaplora_adapters.weights.served import AdapterWeights
from swaplora_server.base.base_model import BaseModel, load_base
from swaplora_server.engine.kv_cache import BlockPool
from swaplora_server.engine.request import AdapterUse, Request, SamplingParams, Sequence
from swaplora_server.engine.scheduling.batch import Batch, rows_of
from swaplora_server.kernels.backend import Backend
from swaplora_server.kernels.pick import pick_backend
from swaplora_server.service.adapter_mix import invoked_at

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "adapters.md"
CACHE = ROOT / ".cache" / "native"
BEGIN, END = "<!-- kinds -->", "<!-- /kinds -->"
COLUMNS = ("alone", "in a mixed batch", "summed", "merged")
Cells = dict[str, tuple[str, ...]]  # by kind
YES, REFUSED, WRONG = "yes", "refused", "WRONG"
MOVED = 0.1  # of a log-probability: what every adapter must change
TOLERANCE = 1e-4  # of a log-probability, in float32
SCALES = (0.5, -0.4)
INVOCATION: list[int] = tiny.byte_tokenizer().encode("go!", add_special_tokens=False)  # of aLoRA's
PROMPT = [200, 71, *range(3, 20), *INVOCATION, 7, 3, *range(100, 110), 200]  # with every token that a kind trains
OTHERS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "llama": {
        "partner": {"target_modules": ["k_proj", "o_proj"]},
        "rslora": {"rank": 64, "use_rslora": True},
    },
    "qwen2": {"partner": {"target_modules": ["k_proj", "o_proj"]}},
    "gpt2": {"partner": {"target_modules": ["c_fc"]}},
    "mixtral": {
        "partner": {"target_modules": ["k_proj", "o_proj"]},
        "experts alone": {
            "target_modules": ["v_proj"],
            "target_parameters": ["experts.down_proj", "experts.gate_up_proj"],
        },
    },
}
ROWS: Mapping[str, Collection[str]] = {
    "LoRA, rsLoRA, patterns; any linear, tied head, Conv1D": ("plain", "head", "partner", "rslora"),
    "on embeddings": ("embedding", "embedding and head", "tied embedding", "wte"),
    "`bias`, `lora_bias`": ("lora_only", "all biases", "lora_bias", "lora_bias and all"),
    "`bias` of norms": ("all biases, norms",),
    "DoRA, with biases too, on a head or Conv1D": (
        "dora",
        "dora, patterns",
        "dora and biases",
        "dora, conv1d",
        "dora, head",
    ),
    "DoRA on embeddings": ("dora, embedding",),
    "`modules_to_save`: heads, norms, embeddings, linears": (
        "saved norm with biases",
        "saved norms",
        "saved embedding",
        "saved embedding, tied",
        "saved head",
        "saved mlp",
        "saved attention",
        "saved conv1d",
    ),
    "`trainable_token_indices`, tied or not": (
        "tokens",
        "tokens, tied",
        "tokens, tied, wte",
        "tokens, tied head with factors",
        "tokens, two lists",
        "tokens, one list twice",
    ),
    "`trainable_token_indices` of the head alone": ("tokens, head alone",),
    "AdaLoRA": ("adalora", "adalora, pruned"),
    "QALoRA": ("qalora",),
    "aLoRA, from its invocation on": ("alora",),
    "`target_parameters`: linears, embeddings": (
        "parameters of linears",
        "parameters of conv1d",
        "parameter of the embedding",
    ),
    "`target_parameters`: experts, routers": ("experts alone", "experts"),
}


@dataclass(frozen=True, slots=True)
class Made:
    """An adapter of some kind, and PEFT's model of it."""

    kind: str
    folder: Path
    oracle: KindOracle


def make_all(base: str, base_folder: Path, folder: Path) -> Iterator[Made]:
    """Every kind of `peft_kinds` for a base, and `OTHERS`, of which "partner" is a LoRA that adds to any."""
    for seed, kind in enumerate(kind for kind, recipe in KINDS.items() if recipe.base == base):
        made = peft_kinds.make(kind, base_folder, folder / str(seed), seed=seed + 1)
        if kind == "alora":
            tiny.edit_config(made, alora_invocation_tokens=INVOCATION)
        yield Made(kind, made, KindOracle(base_folder, made, kind))
    for seed, (kind, fields) in enumerate(OTHERS[base].items()):
        made = tiny.save_adapter(folder / kind.replace(" ", "-"), base_folder, seed=99 + seed, **fields)
        yield Made(kind, made, KindOracle(base_folder, made, kind))


class Bench:
    """One base in the engine, and the log-probabilities of what comes after `PROMPT`."""

    def __init__(self, folder: Path, backend: Backend, device: torch.device = CPU) -> None:
        self.folder = folder
        self.base: BaseModel = load_base(folder, device=device, dtype=torch.float32, backend=backend)
        self.logprobs = Oracle(folder).logprobs(PROMPT)[-1]

    def load(self, made: Made) -> AdapterWeights:
        """As the engine would have it."""
        config, weights = made.folder / CONFIG_FILE, made.folder / WEIGHTS_FILE
        base = self.base
        return load_weights(f"sha256:{made.kind}", config, weights, base.layers, base.dtype, base.device)

    def answers(self, *requests: Mapping[AdapterWeights, float]) -> list[Tensor]:
        """[vocab_size], on the CPU, for each of `requests`, which are sums of adapters; all in one step."""
        pool, rows = BlockPool(1024, 16), []
        for request in requests:
            prepared = {self.base.prepared(weights): scale for weights, scale in request.items()}
            sequence = Sequence(_request(prepared), 0)
            pool.grow(sequence.block_table, sequence.num_tokens)
            rows.append(rows_of(sequence, 0, sequence.num_tokens))
        return list(self.base.runner(1024, 16).logits(Batch(tuple(rows))).float().log_softmax(-1).cpu())


def _request(adapters: Mapping[AdapterWeights, float]) -> Request:
    uses = tuple(AdapterUse(weights, scale, weights.digest) for weights, scale in adapters.items())
    params = SamplingParams(max_tokens=1)
    return Request(
        "table", tuple(PROMPT), params, lambda _event: None, adapters=uses, invoked_at=invoked_at(PROMPT, uses)
    )


def measure(bench: Bench, adapters: Collection[Made]) -> Cells:
    """The cells of `COLUMNS` for every kind of a base."""
    loaded = {made.kind: (made, bench.load(made)) for made in adapters}
    alone, *mixed = bench.answers({}, *({weights: 1.0} for _, weights in loaded.values()))
    assert _is_same(alone, bench.logprobs)
    cells: Cells = {}
    for (kind, (made, weights)), together in zip(loaded.items(), mixed, strict=True):
        expected = made.oracle.logprobs(PROMPT)[-1]
        assert (expected - alone).abs().max() > MOVED, kind
        own = replace(materialise(weights, bench.base.layers), digest=f"sha256:merged {kind}")
        cells[kind] = (
            _cell(bench.answers({weights: 1.0}), [expected]),
            _cell([together], [expected]),
            _summed(bench, (made, weights), loaded["partner"]),
            _cell(bench.answers({own: 1.0}, {}), [expected, alone]),
        )
    return cells


def _summed(bench: Bench, *terms: tuple[Made, AdapterWeights]) -> str:
    """A weighted sum beside the base; with the partner itself, twice the partner."""
    if not all(weights.is_sum for _, weights in terms):
        return REFUSED
    oracle = SumOracle(bench.folder, {made.oracle: scale for (made, _), scale in zip(terms, SCALES, strict=True)})
    answers = bench.answers({weights: scale for (_, weights), scale in zip(terms, SCALES, strict=True)}, {})
    return _cell(answers, [oracle.logprobs(PROMPT)[-1], bench.logprobs])


def _cell(answers: Collection[Tensor], expected: Collection[Tensor]) -> str:
    return YES if all(map(_is_same, answers, expected)) else WRONG


def _is_same(answer: Tensor, expected: Tensor) -> bool:
    return float((answer - expected).abs().max()) <= TOLERANCE


def measure_all(*forms: Backend) -> list[Cells]:
    """The cells of every kind of every base of `peft_kinds`, for each form of the heavy work."""
    measured: list[Cells] = [{} for _ in forms]
    with tempfile.TemporaryDirectory() as folder:
        for name in BASES:
            base = peft_kinds.save_base(name, Path(folder) / name)
            adapters = list(make_all(name, base, base.parent / f"{name}-adapters"))
            for cells, backend in zip(measured, forms, strict=True):
                cells |= measure(Bench(base, backend), adapters)
    return measured


def table(cells: Cells) -> str:
    """Markdown. Raises ValueError for kinds of one row that differ, and for kinds that are in no row."""
    named = [kind for kinds in ROWS.values() for kind in kinds]
    if left := cells.keys() - set(named):
        raise ValueError(f"no row of the table has {sorted(left)}")
    lines = [f"| kind | {' | '.join(COLUMNS)} |", "| --- " * (len(COLUMNS) + 1) + "|"]
    for row, kinds in ROWS.items():
        found = {cells[kind] for kind in kinds}
        if len(found) > 1:
            raise ValueError(f"the kinds of {row!r} differ: {[(kind, cells[kind]) for kind in kinds]}")
        lines.append(f"| {row} | {' | '.join(found.pop())} |")
    return "\n".join(lines)


def in_page(text: str) -> str:
    """The table that the page's text has."""
    return text.partition(BEGIN)[2].partition(END)[0].strip()


def main() -> None:
    """Measure, and write the table into the page."""
    warnings.simplefilter("ignore")
    backend = pick_backend(CPU, torch.float32, CACHE, lambda _message: None)
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table(measure_all(backend)[0])}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
