"""The embedded encoder's vectors are those that sentence-transformers makes with the same files.

These are kept beside this file, since it brings scikit-learn and scipy along. To write them anew, where it is installed
(`pip install --no-deps --target DIR sentence-transformers scikit-learn scipy joblib threadpoolctl narwhals`):
`WRITE_GOLDEN=1 PYTHONPATH=DIR pytest tests/pooling/test_minilm.py`.
"""

import base64
import importlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from repository import ROOT
from serving import BASE, serving, settings
from swaplora_server.embedded import MINILM, ensure_embedded_base
from tiny_encoders import Vector

GOLDEN = Path(__file__).with_name("minilm_vectors.json")
TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "a",
    "Größe und Straße, naïve café — 東京",
    "How do I reset my password?\n\nI cannot log in since yesterday.",
    "word " * 400,  # cut to 256 tokens, the longest input that its files allow
    "Order 7 of item 11 has not arrived; please resend it. " * 5,
)


def write_golden(model: Path) -> None:
    library = importlib.import_module("sentence_transformers")
    vectors = library.SentenceTransformer(str(model), device="cpu").encode(list(TEXTS))
    written = [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]
    GOLDEN.write_text(json.dumps({"sentence_transformers": library.__version__, "vectors": written}, indent=1) + "\n")


def as_vectors(written: Sequence[str]) -> Vector:
    return np.stack([np.frombuffer(base64.b64decode(one), "<f4") for one in written])


def test_embeddings_are_those_of_sentence_transformers(tmp_path: Path) -> None:
    model = ensure_embedded_base(ROOT / ".cache", lambda _message: None, MINILM)
    if os.environ.get("WRITE_GOLDEN"):
        write_golden(model)
    right = as_vectors(json.loads(GOLDEN.read_text())["vectors"])
    body = {"model": BASE, "input": TEXTS, "encoding_format": "base64", "truncate_prompt_tokens": -1}
    with serving(settings(model, tmp_path, kv_cache_bytes=None)) as running:
        answer = running.client.post("/v1/embeddings", json=body)
        assert answer.status_code == 200, answer.text
        found = as_vectors([one["embedding"] for one in answer.json()["data"]])
    assert np.abs(found - right).max() <= 1e-5
    assert np.abs(right[0] - right[3]).max() > 0.01
