"""lm-eval, which evaluates a model over HTTP: its tokens come from the server too, so no tokenizer is needed here.

Each model is given a few customers' messages and told the names of intents: by the log-probability of each name, as
text, and in a chat.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": tempfile.mkdtemp(), "TQDM_DISABLE": "1"}

import lm_eval
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

from asked import BASE_URL, answer

INTENTS = ["track_order", "cancel_order", "refund", "change_address"]
ROWS = [
    ("My backpack should have been here yesterday. Thank you.", 0),
    ("Could you check where my package is?", 0),
    ("Please call off the order for the kettle.", 1),
    ("I would like my money back for the sofa.", 2),
    ("I have moved, send the watch to my new home.", 3),
]
MULTIPLE_CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{prompt}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "label",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc"}],
}
GENERATE = {
    "output_type": "generate_until",
    "doc_to_target": "{{choices[label]}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
}


def evaluate(lm: Any, rows: Any, task: Any, **fields: Any) -> Any:
    """The results and the samples of one task, whose rows lie in a file as any data set of one's own may."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)))
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}, "test_split": "test"}
        told = lm_eval.simple_evaluate(
            model=lm, tasks=[{"task": "intents", **data, **task}], bootstrap_iters=0, **fields
        )
    return told["results"]["intents"], told["samples"]["intents"]


def completing(model: str) -> Any:
    # its tokenizer is the server's: `tokenizer_backend` is found out
    return LocalCompletionsAPI(model=model, base_url=f"{BASE_URL}/completions", batch_size=4)


def rows(template: Any) -> Any:
    for text, label in ROWS:
        yield {
            "prompt": template([{"role": "user", "content": text}]),
            "text": text,
            "choices": INTENTS,
            "label": label,
        }


def logprobs(model: str) -> Any:
    lm = completing(model)
    results, samples = evaluate(lm, rows(lm.tokenizer.apply_chat_template), MULTIPLE_CHOICE)
    likelihoods = [
        [*argument, *response[0]]
        for sample in samples
        for argument, response in zip((each for each in sample["arguments"]), sample["resps"], strict=True)
    ]
    labels = [sample["target"] for sample in samples]
    return {"accuracy": results["acc,none"], "likelihoods": likelihoods, "labels": labels}


def completion(model: str) -> Any:
    lm = completing(model)
    task = GENERATE | {"doc_to_text": "{{prompt}}"}
    _, samples = evaluate(lm, rows(lm.tokenizer.apply_chat_template), task)
    return [sample["resps"][0][0] for sample in samples]


def chat(model: str) -> Any:
    lm = LocalChatCompletion(model=model, base_url=f"{BASE_URL}/chat/completions")
    task = GENERATE | {"doc_to_text": "{{text}}"}
    _, samples = evaluate(lm, rows(lambda _messages: ""), task, apply_chat_template=True)
    return [sample["resps"][0][0] for sample in samples]


answer(chat=chat, logprobs=logprobs, completion=completion)
