"""Bases of random weights made on the card, random adapters for them, and the step that the engine takes."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import tiny
from gpu_checks.card import Card
from swaplora_adapters.files.naming import CONFIG_FILE, WEIGHTS_FILE
from swaplora_adapters.weights.served import AdapterWeights, ModuleWeights
from swaplora_server.base.base_model import BaseModel, prepare
from swaplora_server.engine.kv_cache import BlockPool
from swaplora_server.engine.request import AdapterUse, Request, SamplingParams
from swaplora_server.engine.runner import Runner
from swaplora_server.engine.scheduling.batch import Batch
from swaplora_server.engine.scheduling.scheduler import Scheduler
from swaplora_server.kernels.backend import Backend
from swaplora_server.kernels.cuda.graphs.buckets import bucket_sizes

RANK = 16
BLOCK = 16
SHAPES: dict[str, dict[str, Any]] = {
    "135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    },
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "tiny": {key: value for key, value in tiny.LLAMA.items() if key != "model_type"} | {"vocab_size": tiny.VOCAB_SIZE},
}


def config_of(shape: str) -> LlamaConfig:
    return LlamaConfig(**SHAPES[shape], bos_token_id=tiny.BOS, eos_token_id=tiny.EOS)


def random_model(shape: str, card: Card, dtype: torch.dtype, attention: str = "eager") -> PreTrainedModel:
    """A model of `SHAPES`, made on the card."""
    torch.manual_seed(0)
    with card.device:
        model = AutoModelForCausalLM.from_config(config_of(shape), dtype=dtype, attn_implementation=attention)
    model.requires_grad_(False).eval()
    return model


def random_base(shape: str, card: Card, dtype: torch.dtype, backend: Backend | None = None) -> BaseModel:
    """The same, wrapped and proven as the server does, for the kernels that it picks or for others."""
    model = random_model(shape, card, dtype)
    backend = backend or card.backend(dtype)
    return prepare(model, tiny.byte_tokenizer(), device=card.device, dtype=dtype, backend=backend)


def random_adapter(base: BaseModel, number: int, rank: int = RANK) -> AdapterWeights:
    """On every linear but the head, made on the card."""
    generator = torch.Generator(base.device).manual_seed(number)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=base.device).to(base.dtype)

    modules = {
        path: ModuleWeights(
            draw(rank, shape.in_features) * shape.in_features**-0.5, 0.05 * draw(rank, shape.out_features).t()
        )
        for path, shape in base.layers.linears.items()
        if "lm_head" not in path
    }
    return base.prepared(AdapterWeights(f"sha256:{number}", modules))


def save_random_adapter(base: BaseModel, folder: Path, number: int, rank: int = RANK) -> Path:
    """The same as the files that an upload brings, in bfloat16."""
    weights = random_adapter(base, number, rank)
    tensors = {}
    for path, module in weights.modules.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = module.lora_A.bfloat16().cpu()
        tensors[f"base_model.model.{path}.lora_B.weight"] = module.lora_B.bfloat16().cpu().contiguous()
    folder.mkdir(parents=True)
    save_file(tensors, folder / WEIGHTS_FILE)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(tiny.ALL_LINEAR)}
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    return folder


@dataclass
class Stepper:
    """A scheduler and a runner, stepped by hand as the engine's thread does."""

    base: BaseModel
    num_blocks: int
    max_batch_tokens: int = 4096
    scheduler: Scheduler = field(init=False)
    runner: Runner = field(init=False)
    requests: list[Request] = field(default_factory=list)
    unrecorded: str | None = None  # why no graph could be made

    def __post_init__(self) -> None:
        pool = BlockPool(self.num_blocks, BLOCK)
        self.scheduler = Scheduler(
            pool, max_batch_tokens=self.max_batch_tokens, max_num_seqs=256, max_step_ranks=1 << 20, prefix_cache=False
        )
        self.runner = self.base.runner(self.num_blocks, BLOCK)

    def add(self, prompt: Sequence[int], adapters: Sequence[AdapterWeights] = (), **params: Any) -> Request:
        given = {"max_tokens": 1 << 20, "temperature": 0.0, **params}
        uses = tuple(AdapterUse(weights, 1.0, weights.digest) for weights in adapters)
        request = Request(
            str(len(self.requests)), tuple(prompt), SamplingParams(**given), lambda _event: None, adapters=uses
        )
        self.requests.append(request)
        self.scheduler.add(request)
        return request

    def step(self) -> Batch:
        """schedule, run, commit."""
        batch = self.scheduler.schedule()
        self.scheduler.commit(batch, self.runner.run(batch))
        return batch

    def decode(self) -> Batch:
        """Step until every request has a token; the first step in which all of them decode."""
        while True:
            batch = self.step()
            if len(batch.rows) == len(self.requests) and all(rows.num_rows == 1 for rows in batch.rows):
                return batch

    def record(self, max_rows: int) -> int:
        """Have decoding steps of up to `max_rows` rows replayed from now on; returns of how many graphs.

        0 where the backend makes none, or fails to: what is launched by itself can be measured all the same.
        """
        try:
            return self.runner.record(bucket_sizes(max_rows))
        except RuntimeError as error:
            self.unrecorded = str(error).partition("\n")[0]
            self.runner.forget_graphs()
            return 0

    def clear(self) -> None:
        """End all requests."""
        for request in self.requests:
            self.scheduler.abort(request)
        self.requests.clear()
        self.runner.forget_adapters()

    def times(self, count: int) -> list[float]:
        """Seconds of each of `count` steps. A step ends with its tokens on the CPU, and so waits for the card."""
        times = []
        for _ in range(count):
            began = time.perf_counter()
            self.step()
            times.append(time.perf_counter() - began)
        return times


def prompt(number: int, length: int, vocab_size: int) -> list[int]:
    """Tokens that no other number has in these places."""
    return [(number + 1 + 7 * position) % min(vocab_size, 250) for position in range(length)]
