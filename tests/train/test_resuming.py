"""What a run of `swaplora train` leaves when it ends before its time, and what goes on from that."""

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import TrainingArguments

import lessons
import tiny
from fake_server import swaplora
from lessons import TEMPLATE, chat, save_base, train, write
from swaplora_adapters.train import base_model, run, work
from swaplora_adapters.train import train as training
from swaplora_adapters.train.run import History

WEIGHTS = "adapter_model.safetensors"
EACH_STEP = ("--checkpoint-steps", "1")


class Killed(BaseException):
    """Stands for what ends a process in the middle."""


_settings, taught, data = lessons.settings, lessons.taught, lessons.data


def killed(at: tuple[Any, str], *args: Any) -> None:
    """A run that was killed when it came to a function of a module."""

    def end(*_: Any, **__: Any) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(*at, end)
        with pytest.raises(Killed):
            train(*args)


def killed_at_step(step: int, *args: Any) -> None:
    learn: Any = run.learn

    def until_killed(*others: Any, **how: Any) -> Any:
        def noting(done: int, *_: Any) -> None:
            if done == step:
                raise Killed

        return learn(*others[:-1], noting, **how)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training, "learn", until_killed)
        with pytest.raises(Killed):
            train(*args)


def test_a_run_that_was_interrupted_comes_to_the_same(taught: Path, data: Path, tmp_path: Path) -> None:
    """With dropout, whose random numbers go on as well, and half a checkpoint of a kill while it was written."""
    out = tmp_path / "letters"
    flags = ("--dropout", "0.1", "--checkpoint-steps", "1")
    assert train(taught, data, tmp_path / "whole", *flags).exit_code == 0

    killed_at_step(5, taught, data, out, *flags)
    folder = tmp_path / "letters.training"
    assert (folder / "checkpoint-4").is_dir()
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "trainer_state.json").write_text('{"global_step"')
    assert "go on with --resume" in train(taught, data, out, *flags).stderr
    refused = train(taught, data, out, *flags, "--resume", "--seed", "1")
    assert "seed: not as in the run to go on with" in refused.stderr
    done = train(taught, data, out, *flags, "--resume")
    assert done.exit_code == 0, done.output
    assert "step 1 of" not in done.stderr
    assert (out / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    assert (out / "curves.svg").read_text() == (tmp_path / "whole" / "curves.svg").read_text()


def test_a_base_that_the_first_run_fetched_is_the_same_one(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a hub id: its files are there only once it has been loaded."""
    base, later = save_base(tmp_path / "base"), tmp_path / "later"
    (base / "model.safetensors").rename(later)
    load = base_model.load_base

    def fetching(*args: Any) -> Any:
        if later.exists():
            later.rename(base / "model.safetensors")
        return load(*args)

    monkeypatch.setattr(base_model, "load_base", fetching)
    killed_at_step(3, base, data, tmp_path / "out", *EACH_STEP)
    done = train(base, data, tmp_path / "out", *EACH_STEP, "--resume")
    assert done.exit_code == 0, done.output
    assert "sha256:" in (tmp_path / "out" / "README.md").read_text().partition("**Base**: base, ")[2][:8]


def test_a_run_that_had_ended_early_is_not_trained_on(taught: Path, tmp_path: Path) -> None:
    """Killed when the adapter was to be written: the checkpoint is of the step at which patience was at its end."""
    learnt = write(tmp_path / "d.jsonl", [chat(f"say {n}", "aaaa") for n in range(16)])
    others = write(tmp_path / "h.jsonl", [chat(f"say {n}", "zzzz") for n in range(4)])
    flags = ("--holdout", str(others), "--patience", "2", *EACH_STEP, "--epochs", "10", "--learning-rate", "0.3")
    whole = train(taught, learnt, tmp_path / "whole", *flags, "--json")
    assert whole.exit_code == 0, whole.output
    killed((base_model, "save_adapter"), taught, learnt, tmp_path / "out", *flags)
    done = train(taught, learnt, tmp_path / "out", *flags, "--json", "--resume")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == json.loads(whole.stdout)
    assert json.loads(done.stdout)["steps"] < 20
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def test_a_run_that_had_come_to_its_end_is_only_written(taught: Path, data: Path, tmp_path: Path) -> None:
    """Of the last step's adapter, as nothing is held out."""
    flags = ("--holdout", "0", "--dropout", "0.1")
    assert train(taught, data, tmp_path / "whole", *flags).exit_code == 0
    killed((base_model, "save_adapter"), taught, data, tmp_path / "out", *flags)
    assert train(taught, data, tmp_path / "out", *flags, "--resume").exit_code == 0
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def test_a_run_killed_while_it_was_removed_is_removed_and_told(taught: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed((work, "clear"), taught, data, out)
    before = (out / WEIGHTS).read_bytes()
    assert "not an empty folder" in train(taught, data, out).stderr
    assert "seed: not as in" in train(taught, data, out, "--resume", "--seed", "1").stderr
    done = train(taught, data, out, "--resume", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["base"].startswith("sha256:")
    assert "nothing was left to do" in " ".join(done.stderr.split())
    assert (out / WEIGHTS).read_bytes() == before
    assert not (tmp_path / "out.training").exists()


def test_another_adapter_in_its_place_is_left_alone(taught: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed((work, "clear"), taught, data, out)
    save_file({name: 2 * factor for name, factor in load_file(out / WEIGHTS).items()}, out / WEIGHTS)
    assert "not an empty folder" in train(taught, data, out, "--resume").stderr
    assert (tmp_path / "out.training").exists()


def test_other_tokens_are_refused_by_name(data: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    killed_at_step(2, base, data, tmp_path / "out", *EACH_STEP)
    (base / "chat_template.jinja").write_text(TEMPLATE.replace("role }}>", "role }}>!"))
    refused = train(base, data, tmp_path / "out", *EACH_STEP, "--resume")
    assert "tokens: not as in the run to go on with" in refused.stderr


def test_another_adapter_to_go_on_from_is_refused_by_name(taught: Path, data: Path, tmp_path: Path) -> None:
    before = tiny.save_adapter(tmp_path / "before", taught, seed=1)
    args = ("train", str(taught), str(data), "--out", str(tmp_path / "out"), "--init-from", str(before))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(base_model, "save_adapter", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            swaplora(*args)
    shutil.rmtree(before)
    tiny.save_adapter(before, taught, seed=2)
    assert "init_from: not as in the run to go on with" in swaplora(*args, "--resume").stderr


def test_it_goes_on_from_another_working_directory(
    taught: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the best adapter of the first part, which is not found again if it was noted by a relative path."""
    others = write(tmp_path / "h.jsonl", [chat(f"say {n}", "zzzz") for n in range(4)])
    flags = (*EACH_STEP, "--holdout", str(others), "--patience", "0", "--learning-rate", "0.3", "--json")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    killed_at_step(3, taught, data, Path("out"), *flags)
    state = json.loads((tmp_path / "out.training" / "checkpoint-2" / "trainer_state.json").read_text())
    assert Path(state["best_model_checkpoint"]).is_absolute()
    monkeypatch.chdir(tmp_path / "elsewhere")
    done = train(taught, data, Path("../out"), *flags, "--resume")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / WEIGHTS).is_file()


def test_a_best_checkpoint_that_is_gone_is_told(taught: Path, data: Path, tmp_path: Path) -> None:
    killed_at_step(3, taught, data, tmp_path / "out", *EACH_STEP)
    (tmp_path / "out.training").rename(tmp_path / "moved.training")
    refused = train(taught, data, tmp_path / "moved", *EACH_STEP, "--resume")
    assert "the best checkpoint is not in " in " ".join(refused.stderr.split())


def test_a_run_that_had_not_begun_is_none(taught: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out.training"
    folder.mkdir()
    (folder / "run.json").write_text('{"base": ')
    assert "has no run to go on with" in train(taught, data, tmp_path / "out", "--resume").stderr
    (folder / "mine").touch()
    assert "of no run: remove it" in train(taught, data, tmp_path / "out").stderr
    (folder / "mine").unlink()
    done = train(taught, data, tmp_path / "out", "--epochs", "0.5")
    assert done.exit_code == 0, done.output


def test_two_do_not_go_on_with_one_run(taught: Path, data: Path, tmp_path: Path) -> None:
    killed_at_step(2, taught, data, tmp_path / "out", *EACH_STEP)
    descriptor = os.open(tmp_path / "out.training", os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        refused = train(taught, data, tmp_path / "out", *EACH_STEP, "--resume")
        assert "another process trains in" in refused.stderr
    finally:
        os.close(descriptor)
    assert train(taught, data, tmp_path / "out", *EACH_STEP, "--resume").exit_code == 0


def test_a_link_to_an_empty_folder_stays_one(taught: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk", target_is_directory=True)
    done = train(taught, data, tmp_path / "out", "--epochs", "0.5")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / WEIGHTS).is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "out"]


def test_a_mount_point_is_refused_before_the_training(
    taught: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "out")
    refused = train(taught, data, tmp_path / "out")
    assert "is a mount point" in refused.stderr
    assert not (tmp_path / "out.training").exists()


class OfTwoDevices(TrainingArguments):  # type: ignore[misc]
    """As a machine with two GPUs makes them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._n_gpu = 2


class AlwaysOfTwo(TrainingArguments):  # type: ignore[misc]
    n_gpu = 2


def test_of_two_devices_one_takes_every_step(
    taught: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "TrainingArguments", OfTwoDevices)
    done = train(taught, data, tmp_path / "out", "--holdout", "0", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["steps"] == 8


def test_steps_that_are_not_the_planned_ones_are_refused(
    taught: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "TrainingArguments", AlwaysOfTwo)
    refused = train(taught, data, tmp_path / "out", "--holdout", "0")
    assert "the Trainer would take 4 steps in the place of 8" in refused.stderr


def test_the_best_of_a_history_that_was_read_again() -> None:
    """As JSON has it: lists for pairs."""
    history = History(2, 2, [[1, 3.0], [2, 2.0]], [[0, 3.0], [2, 1.0]], 2)  # type: ignore[list-item]
    assert history.held_out_at[history.kept] == 1.0
