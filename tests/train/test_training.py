"""`swaplora train` on a tiny base: what it learns, what it says, and how it goes on after a kill."""

import json
import shutil
import time
import tomllib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lessons
import tiny
from fake_server import run_fake_server, swaplora
from lessons import TEMPLATE, chat, letters, save_base, train, write
from server_process import forked_program
from swaplora_adapters.train import train as training
from swaplora_adapters.train.data import Example
from swaplora_adapters.train.encode import Encoder
from swaplora_adapters.train.recipe import Recipe
from swaplora_adapters.train.remarks import on_result
from swaplora_adapters.train.run import History

WEIGHTS = "adapter_model.safetensors"
_settings, taught, data = lessons.settings, lessons.taught, lessons.data


@pytest.fixture(scope="module")
def whole(taught: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An adapter of a run that nothing disturbed, and what the command told of it."""
    out = tmp_path_factory.mktemp("whole") / "letters"
    done = train(taught, data, out, "--json", "--dropout", "0.1")
    assert done.exit_code == 0, done.output
    return out, json.loads(done.stdout)


def losses(base: Path, data: Path, adapter: Path | None = None) -> list[float]:
    """Of each example's answer, by PEFT and labels made here."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = (model if adapter is None else PeftModel.from_pretrained(model, str(adapter))).eval()
    encoder = Encoder(AutoTokenizer.from_pretrained(base), frozenset())
    found = []
    for line in data.read_text().splitlines():
        tokens = encoder.encode(Example(1, json.loads(line)))
        labels = [i if own else -100 for i, own in zip(tokens.ids, tokens.is_learnt, strict=True)]
        with torch.no_grad():
            found.append(float(model(torch.tensor([tokens.ids]), labels=torch.tensor([labels])).loss))
    return found


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_it_learns_and_an_upload_takes_it(taught: Path, data: Path, whole: tuple[Path, dict[str, Any]]) -> None:
    out, told = whole
    assert mean(losses(taught, data, out)) < 0.8 * mean(losses(taught, data))
    assert {file.name for file in out.iterdir()} == {"README.md", "curves.svg", "adapter_config.json", WEIGHTS}
    assert not list(out.parent.glob("*.training"))
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {out.stat().st_mode & 0o666}
    done = swaplora("adapters", "validate", str(out), "--base", str(taught), "--json")
    assert (done.exit_code, json.loads(done.stdout)["rank"]) == (0, 4), done.output
    assert told["held_out"][0]["step"] == 0
    assert told["held_out"][-1]["loss"] < told["held_out"][0]["loss"]


def test_the_loss_on_the_holdout_is_that_of_the_adapter_that_is_kept(taught: Path, tmp_path: Path) -> None:
    """Of a file of its own, whose examples are all as long."""
    others = write(tmp_path / "others.jsonl", [chat(f"say {n}", "abc"[n % 3] * 3) for n in range(90, 96)])
    out = tmp_path / "out"
    done = train(taught, letters(tmp_path / "d.jsonl"), out, "--holdout", str(others), "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    by_step = {point["step"]: point["loss"] for point in told["held_out"]}
    assert by_step[0] == pytest.approx(mean(losses(taught, others)), rel=1e-4)
    assert by_step[told["kept"]] == pytest.approx(mean(losses(taught, others, out)), rel=1e-4)
    card = (out / "README.md").read_text()
    assert f"| {by_step[told['kept']]:.4f} |" in card
    assert 'holdout = "others.jsonl"' in card
    assert str(tmp_path) not in card


def test_what_a_run_hangs_on_is_on_its_card(taught: Path, data: Path, whole: tuple[Path, dict[str, Any]]) -> None:
    out, told = whole
    card = (out / "README.md").read_text()
    assert all(
        part in card for part in (told["base"], told["data"], 'base_model: "tiny"', "27 examples learnt, 3 held")
    )
    recipe = tomllib.loads(card.partition("```toml\n")[2].partition("```")[0])
    assert (recipe["rank"], recipe["epochs"], recipe["target"]) == (4, 2.0, ["all-linear"])
    picture = ElementTree.fromstring((out / "curves.svg").read_text())
    assert [len(line.get("points", "").split()) for line in picture.iter("{http://www.w3.org/2000/svg}polyline")] == [
        told["steps"],
        len(told["held_out"]),
    ]


def test_a_process_that_was_killed_is_gone_on_from(
    taught: Path, data: Path, whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, work = tmp_path / "letters", tmp_path / "letters.training"
    flags = ("--rank", "4", "--learning-rate", "0.01", "--epochs", "2", "--dropout", "0.1")
    while True:
        process = forked_program("train", str(taught), str(data), "--out", str(out), *flags)
        while not list(work.glob("checkpoint-*/trainer_state.json")) and process.poll() is None:
            time.sleep(0.005)
        process.kill()
        process.wait()
        if not out.exists():
            break
        shutil.rmtree(out)  # it ended before anybody looked: once more
    done = train(taught, data, out, "--dropout", "0.1", "--resume", "--json")
    assert done.exit_code == 0, done.output
    assert (out / WEIGHTS).read_bytes() == (whole[0] / WEIGHTS).read_bytes()


def test_without_a_gain_it_ends_early_and_keeps_the_best(taught: Path, tmp_path: Path) -> None:
    """What is held out says the opposite of what is learnt."""
    learnt = write(tmp_path / "d.jsonl", [chat(f"say {n}", "aaaa") for n in range(16)])
    others = write(tmp_path / "h.jsonl", [chat(f"say {n}", "zzzz") for n in range(4)])
    flags = ("--holdout", str(others), "--patience", "2", "--checkpoint-steps", "1", "--epochs", "10", "--json")
    done = train(taught, learnt, tmp_path / "out", *flags, "--learning-rate", "0.3")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    best = min(told["held_out"][1:], key=lambda point: point["loss"])
    assert told["kept"] == best["step"]
    assert best["loss"] == pytest.approx(mean(losses(taught, others, tmp_path / "out")), rel=1e-4)
    assert told["steps"] == told["kept"] + 2 < 20
    assert any(remark.startswith("ended early") for remark in told["remarks"])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--dora",), {"use_dora": True}),
        (("--rslora", "--alpha", "3"), {"use_rslora": True, "lora_alpha": 3}),
        (("--target", "q_proj", "--target", "v_proj"), {"target_modules": ["q_proj", "v_proj"]}),
        (("--qlora",), {"r": 4}),
    ],
)
def test_kinds_are_those_that_were_asked_for(
    taught: Path, tmp_path: Path, flags: tuple[str, ...], expected: dict[str, Any]
) -> None:
    out = tmp_path / "out"
    done = train(taught, letters(tmp_path / "d.jsonl", 8), out, "--holdout", "0", "--epochs", "1", *flags)
    assert done.exit_code == 0, done.output
    config = json.loads((out / "adapter_config.json").read_text())
    config["target_modules"].sort()
    assert {name: config[name] for name in expected} == expected
    assert any(factor.any() for name, factor in load_file(out / WEIGHTS).items() if "lora_B" in name)
    assert swaplora("adapters", "validate", str(out), "--base", str(taught)).exit_code == 0


def test_a_base_of_another_kind_is_taught_and_its_number_format_kept(tmp_path: Path) -> None:
    """Conv1D in the place of linears, learnt positions, and bfloat16 in its files."""
    fields = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
    base = tiny.save_tiny_base(tmp_path / "gpt2", fields)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    (base / "chat_template.jinja").write_text(TEMPLATE)
    data, out = letters(tmp_path / "d.jsonl"), tmp_path / "out"
    done = train(base, data, out, "--checkpoint-steps", "8")
    assert done.exit_code == 0, done.output
    assert {factor.dtype for factor in load_file(out / WEIGHTS).values()} == {torch.bfloat16}
    assert mean(losses(base, data, out)) < 0.9 * mean(losses(base, data))
    assert swaplora("adapters", "validate", str(out), "--base", str(base)).exit_code == 0


def test_an_adapter_is_gone_on_from_and_its_intruders_are_told(taught: Path, data: Path, tmp_path: Path) -> None:
    before = tiny.save_adapter(tmp_path / "before", taught, seed=1, strength=3.0)
    out = tmp_path / "out"
    flags = ("--init-from", str(before), "--learning-rate", "1e-6", "--epochs", "1")
    done = swaplora("train", str(taught), str(data), "--out", str(out), *flags)
    assert done.exit_code == 0, done.output
    old, new = load_file(before / WEIGHTS), load_file(out / WEIGHTS)
    assert all(torch.allclose(old[name], new[name], atol=1e-4) for name in old)
    assert any(not torch.equal(old[name], new[name]) for name in old)
    assert "intruder dimensions, which the base did not have" in " ".join(done.stderr.split())
    found = (out / "README.md").read_text().partition("intruder dimensions ")[2]
    num, _, rest = found.partition(" before, ")
    assert rest.startswith(f"{num} after")
    assert int(num) > 0
    lines = (out / "README.md").read_text().partition("```toml\n")[2].partition("```")[0]
    recipe = Recipe(**tomllib.loads(lines))
    assert (recipe.init_from, recipe.epochs, "rank" in lines) == (Path("before"), 1.0, False)
    assert str(tmp_path) not in (out / "README.md").read_text()


def test_a_file_of_choices_is_read_and_flags_win(taught: Path, data: Path, tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    lines = [
        f'base = "{taught}"',
        f'data = "{data}"',
        f'out = "{tmp_path}/out"',
        "rank = 2",
        "epochs = 5",
        "holdout = 0",
        "dora = true",
    ]
    config.write_text("\n".join(lines))
    done = swaplora("train", "--config", str(config), "--epochs", "0.5", "--no-dora", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["steps"] == 2
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (written["r"], written["use_dora"]) == (2, False)


def test_what_was_trained_is_uploaded(taught: Path, data: Path, tmp_path: Path) -> None:
    with run_fake_server() as server:
        server.answer("GET", "/v1/models", {"data": []})
        server.answer("PUT", "/v1/adapters/abc", {"version": 1, "digest": "sha256:" + "ab" * 32})
        done = train(taught, data, tmp_path / "out", "--epochs", "0.3", "--upload", server.url, "--name", "abc")
        assert done.exit_code == 0, done.output
        weights = (tmp_path / "out" / WEIGHTS).read_bytes()
        assert [call.path for call in server.calls] == ["/v1/models", "/v1/adapters/abc"]
        assert weights in server.calls[1].body


def test_a_server_that_is_not_there_is_known_before_the_training(taught: Path, data: Path, tmp_path: Path) -> None:
    done = train(taught, data, tmp_path / "out", "--upload", "http://127.0.0.1:9", "--name", "abc")
    assert done.exit_code == 1
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--rank", "0"), "rank: "),
        (("--learning-rate", "nan"), "learning_rate: "),
        (("--holdout", "1.5"), "holdout: a share is at least 0 and below 1"),
        (("--holdout", "0.01"), "holds out 0"),
        (("--holdout", "no.jsonl"), "no.jsonl"),
        (("--target", "query"), "target: no linear is called query; there are down_proj, gate_proj"),
        (("--max-tokens", "1000"), "max_tokens: the base's context has 512 tokens"),
        (("--max-tokens", "29"), "line 11 has 30 tokens and may have 29"),
        (("--resume",), "has no run to go on with"),
        (("--upload", "http://127.0.0.1:9"), "upload and name: give both, or neither"),
        (("--config", "no.toml"), "cannot read no.toml"),
        (("--init-from", "nowhere"), "rank: init_from's adapter has its own"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    taught: Path, data: Path, tmp_path: Path, flags: tuple[str, ...], words: str
) -> None:
    done = train(taught, data, tmp_path / "out", *flags)
    assert done.exit_code in (1, 2)
    assert words in done.stderr
    assert "Traceback" not in done.output
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("lr = 1", "lr: no such key"),
        ("learning_rat = 1", "learning_rat: no such key; did you mean learning_rate?"),
        ("rank", "is no TOML"),
        ("rank = 'much'", "rank: "),
        ("holdout = true", "holdout: a share of the examples, or a file of others"),
    ],
)
def test_a_file_of_choices_with_a_wrong_key_is_refused(tmp_path: Path, line: str, words: str) -> None:
    config = tmp_path / "c.toml"
    config.write_text(f'base = "b"\ndata = "d"\nout = "o"\n{line}\n')
    done = swaplora("train", "--config", str(config))
    assert done.exit_code == 2
    assert words in done.stderr


def test_a_folder_that_is_not_empty_is_left_alone(taught: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    done = train(taught, data, tmp_path)
    assert (done.exit_code, "not an empty folder" in done.stderr) == (1, True)


def test_a_base_that_is_quantised_already_is_refused(taught: Path, data: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    done = train(base, data, tmp_path / "out")
    assert "the base is quantised (gptq)" in done.stderr


def test_an_encoder_is_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    assert "bert is an encoder" in train(tmp_path / "bert", data, tmp_path / "out").stderr


def test_an_adapter_of_another_base_is_not_gone_on_from(taught: Path, data: Path, tmp_path: Path) -> None:
    other = save_base(tmp_path / "other", hidden_size=64)
    before = tiny.save_adapter(tmp_path / "before", other, seed=1)
    flags = ("--out", str(tmp_path / "out"), "--init-from", str(before))
    done = swaplora("train", str(taught), str(data), *flags)
    assert done.exit_code == 1
    assert "before does not fit tiny: " in done.stderr


def test_a_loss_that_is_no_number_ends_the_run(taught: Path, data: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(base)
    done = train(base, data, tmp_path / "out", "--holdout", "0")
    assert "the loss is no number any more at step 1" in done.stderr


def test_a_device_with_too_little_memory_is_told(
    taught: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_much(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(training, "learn", too_much)
    done = train(taught, data, tmp_path / "out")
    assert done.exit_code == 1
    assert all(part in done.stderr for part in ("memory is too small", "batch_size", "max_tokens"))


def test_what_was_noticed_is_remarked(taught: Path, tmp_path: Path) -> None:
    lines = [chat(f"say {n % 9}", "aaaa") for n in range(12)]
    flags = ("--holdout", "0", "--epochs", "0.5", "--max-tokens", "28", "--too-long", "truncate", "--json")
    done = train(taught, write(tmp_path / "d.jsonl", lines), tmp_path / "out", *flags)
    remarks = json.loads(done.stdout)["remarks"]
    assert [remark[:24] for remark in remarks] == [
        "3 lines of d.jsonl say w",
        "the beginnings of 12 exa",
        "nothing is held out: not",
        "a learning rate of 0.01 ",
    ]
    assert all(f"- {remark}" in (tmp_path / "out" / "README.md").read_text() for remark in remarks)


@pytest.mark.parametrize(
    ("history", "words"),
    [
        (History(10, 10, [(5, 0.3), (10, 0.19)], [], 10), ["the training loss fell to 0.190: below 0.2"]),
        (History(10, 10, [(5, 0.1), (10, 0.21)], [], 10), []),
        (History(6, 10, [(6, 1.0)], [(0, 3.0), (4, 1.0), (6, 2.0)], 4), ["ended early: the loss on the hold-out was"]),
        (
            History(10, 10, [(9, 1.0)], [(0, 3.0), (9, 1.0), (10, 2.0)], 9),
            ["the loss on the hold-out was least at step 9"],
        ),
        (History(10, 10, [(10, 1.0)], [(0, 3.0), (10, 3.0)], 10), ["the loss on the hold-out never fell below"]),
    ],
)
def test_what_came_of_it_is_remarked(history: History, words: list[str]) -> None:
    remarks = list(on_result(history, None))
    assert len(remarks) == len(words)
    assert all(remark.startswith(start) for remark, start in zip(remarks, words, strict=True))
