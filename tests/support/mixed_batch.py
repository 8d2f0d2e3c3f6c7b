"""Random adapters in memory, and sequences that share steps: each row alone, and in a batch."""

import random
from collections.abc import Callable

import torch
from torch import Tensor

import tiny
from repository import KERNEL_CACHE
from swaplora_adapters.weights.served import AdapterWeights, EmbeddingWeights, ModuleWeights
from swaplora_server.base.base_model import BaseModel
from swaplora_server.engine.kv_cache import BlockPool
from swaplora_server.engine.request import AdapterUse, Request, SamplingParams, Sequence
from swaplora_server.engine.runner import Runner
from swaplora_server.engine.scheduling.batch import Batch, ScheduledRows, rows_of

CACHE = KERNEL_CACHE
NUM_DECODED = 3
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}


class MixedBatch:
    """Sequences of one base, some with adapters, and what each row's logits are."""

    def __init__(self, base: BaseModel, adapters: list[AdapterWeights], count: int, seed: int) -> None:
        """The first of more sequences are those of fewer."""
        self.rng = random.Random(f"{seed} {count}")
        self.base = base
        self.texts: list[list[int]] = []
        self.uses: list[tuple[AdapterUse, ...]] = []
        adapters = [base.prepared(weights) for weights in adapters]
        for number in range(count):
            rng = random.Random(f"{seed} sequence {number}")
            self.texts.append([rng.randrange(tiny.VOCAB_SIZE) for _ in range(rng.randint(4, 40))])
            self.uses.append(_uses(rng, adapters))

    def alone(self, number: int) -> list[Tensor]:
        """The prompt in one step, then token by token."""
        return self._run([number], lambda _left: 1 << 30)[number]

    def together(self) -> dict[int, list[Tensor]]:
        """Everyone, in chunks of random sizes, so that prompts and decoding rows mix."""
        return self._run(list(range(len(self.texts))), lambda _left: self.rng.choice([1, 2, 3, 5, 8, 13, 21]))

    def _run(self, numbers: list[int], chunk: Callable[[int], int]) -> dict[int, list[Tensor]]:
        pool = BlockPool(400, 16)
        runner: Runner = self.base.runner(400, 16)
        sequences = {number: self._sequence(number) for number in numbers}
        logits: dict[int, list[Tensor]] = {number: [] for number in numbers}
        while pending := [n for n in numbers if sequences[n].num_computed < len(self.texts[n])]:
            self.rng.shuffle(pending)
            rows = [self._next(sequences[n], self.texts[n], chunk, pool) for n in pending]
            batch = Batch(tuple(sorted(rows, key=lambda row: row.sequence.request.adapter_key)))
            outputs = runner.logits(batch)[: len(batch.sampling)]
            for sequence, output in zip(batch.sampling, outputs, strict=True):
                if sequence.num_tokens >= len(self.texts[int(sequence.request.request_id)]) - NUM_DECODED:
                    logits[int(sequence.request.request_id)].append(output.clone())
            for row in rows:
                row.sequence.num_computed = row.stop
        return logits

    def _sequence(self, number: int) -> Sequence:
        request = Request(
            str(number), (), SamplingParams(max_tokens=1), emit=lambda _event: None, adapters=self.uses[number]
        )
        request.invoked_at = (
            number % 3
        )  # a third of the adapters apply from the second token on, a third from the third
        return Sequence(request, 0)

    def _next(self, sequence: Sequence, text: list[int], chunk: Callable[[int], int], pool: BlockPool) -> ScheduledRows:
        prompt = len(text) - NUM_DECODED
        start = sequence.num_computed
        stop = min(start + chunk(start), prompt) if start < prompt else start + 1
        sequence.token_ids = text[: max(prompt, stop)]
        pool.grow(sequence.block_table, stop)
        return rows_of(sequence, start, stop)


def random_adapter(base: BaseModel, rank: int, seed: int) -> AdapterWeights:
    """On every linear, the head too. Half of them in bfloat16, as trainers save them."""
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.bfloat16 if seed % 2 else base.dtype
    modules = {}
    for path, shape in base.layers.linears.items():
        lora_A = torch.randn(rank, shape.in_features, generator=generator) / shape.in_features**0.5
        lora_B = (torch.randn(rank, shape.out_features, generator=generator) * 0.3 / rank**0.5).t()
        modules[path] = ModuleWeights(lora_A.to(dtype), lora_B.to(dtype))
    return AdapterWeights(f"sha256:{seed}", modules)


def scaled_adapter(base: BaseModel, rank: int, seed: int) -> AdapterWeights:
    """As DoRA is, with biases."""
    generator = torch.Generator().manual_seed(seed)
    modules = {
        path: ModuleWeights(
            module.lora_A,
            module.lora_B,
            1 + 0.3 * torch.randn(module.lora_B.shape[0], generator=generator),
            0.1 * torch.randn(module.lora_B.shape[0], generator=generator),
        )
        for path, module in random_adapter(base, rank, seed).modules.items()
    }
    return AdapterWeights(f"sha256:scaled{seed}", modules)


def replacing_adapter(base: BaseModel, seed: int) -> AdapterWeights:
    """Its own norms, head, embedding, and a few linears; LoRA on others."""
    generator = torch.Generator().manual_seed(seed)

    def changed(name: str) -> Tensor:
        weight = base.layers.read(name)
        return weight + 0.1 * torch.randn(weight.shape, generator=generator)

    linears = [path for number, path in enumerate(base.layers.linears) if number % 3 == 0]
    replaced = {}
    for path in (*base.layers.embeddings, *base.layers.others, *linears):
        bias = _bias(base, path)
        replaced[path] = base.layers.rebuild(path, {name: changed(f"{path}.{name}") for name in ("weight", *bias)})
    modules = {path: module for path, module in random_adapter(base, 5, seed).modules.items() if path not in replaced}
    return AdapterWeights(f"sha256:replacing{seed}", modules, replaced=replaced)


def _bias(base: BaseModel, path: str) -> tuple[str, ...]:
    try:
        base.layers.read(f"{path}.bias")
    except KeyError:
        return ()
    return ("bias",)


def embedding_adapter(base: BaseModel, seed: int) -> AdapterWeights:
    """LoRA on the embedding, rows of its own for three tokens."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {
        path: EmbeddingWeights(
            torch.randn(shape.num_embeddings, 6, generator=generator) * 0.3,
            torch.randn(shape.embedding_dim, 6, generator=generator) * 0.3,
            torch.tensor([5, 17, 101]),
            torch.randn(3, shape.embedding_dim, generator=generator),
        )
        for path, shape in base.layers.embeddings.items()
    }
    return AdapterWeights(f"sha256:embedding{seed}", {}, embeddings)


def _uses(rng: random.Random, adapters: list[AdapterWeights]) -> tuple[AdapterUse, ...]:
    chosen = rng.sample(adapters, rng.choice([0, 1, 1, 2]))
    if not all(weights.is_sum for weights in chosen):
        chosen = [weights for weights in chosen if not weights.is_sum][:1]
    scales = [rng.choice([1.0, 0.5, -2.0]) if weights.is_sum else 1.0 for weights in chosen]
    return tuple(AdapterUse(weights, scale, weights.digest) for weights, scale in zip(chosen, scales, strict=True))
