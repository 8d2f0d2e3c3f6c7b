"""Sixteen adapters of every shape, one stream of each at once, and how far an answer is from PEFT."""

import asyncio
from typing import Any

import httpx

import tiny
from oracle import Oracle
from serving import Running, Streamed, stream_chat

TOLERANCE = 1e-4  # of a log-probability, in float32
MAX_TOKENS = 24


# sixteen adapters: ranks 1 to 64, different modules, scales of every making
SHAPES: list[dict[str, Any]] = [
    {"rank": 1},
    {"rank": 2, "target_modules": ["q_proj"]},
    {"rank": 3, "target_modules": ["v_proj", "o_proj"], "use_rslora": True},
    {"rank": 4, "target_modules": ["down_proj"]},
    {"rank": 5, "rank_pattern": {"q_proj": 9, "layers.1.mlp.up_proj": 2}},
    {"rank": 7, "alpha_pattern": {"k_proj": 40, "down_proj": 1}},
    {"rank": 8, "alpha": 8},
    {"rank": 8, "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"v_proj": 31}, "use_rslora": True},
    {"rank": 12, "target_modules": ["gate_proj", "up_proj", "down_proj"]},
    {"rank": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    {"rank": 16, "layers_to_transform": [1]},
    {"rank": 24, "target_modules": ["o_proj"]},
    {"rank": 32},
    {"rank": 48, "target_modules": ["q_proj", "up_proj"], "use_rslora": True},
    {"rank": 64},
    {"rank": 64, "target_modules": ["k_proj"], "alpha": 16},
]


async def stream_all(server: Running, names: list[str]) -> list[Streamed]:
    async with httpx.AsyncClient(base_url=server.url, timeout=600) as client:
        return await asyncio.gather(
            *(stream_chat(client, name, f"question {name}", MAX_TOKENS, ignore_eos=True) for name in names)
        )


def prompt_of(name: str) -> list[int]:
    ids: list[int] = tiny.byte_tokenizer().encode(f"<user>question {name}\n<assistant>", add_special_tokens=False)
    return ids


def error_against(oracle: Oracle, name: str, said: Streamed) -> float:
    return oracle.worst_error(prompt_of(name), said.token_ids, said.logprobs)
