"""The README.md of a trained adapter: of what, on what, how, and how it went."""

import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from swaplora_adapters.train.curves import curves_svg
from swaplora_adapters.train.data import Data
from swaplora_adapters.train.recipe import OF_THE_ADAPTER, Recipe
from swaplora_adapters.train.remarks import Continued
from swaplora_adapters.train.run import History

CURVES_FILE, CARD_FILE = "curves.svg", "README.md"


@dataclass(frozen=True, slots=True)
class Origin:
    """What an adapter was learnt from, by digests."""

    name: str  # of the folder it is written to
    base_id: str
    base_digest: str | None
    data: Data
    held_out: Data | None  # a file of its own
    num_learnt: int
    num_held_out: int


def write_card(
    folder: Path,
    origin: Origin,
    recipe: Recipe,
    history: History,
    remarks: Sequence[str],
    continued: Continued | None,
    cpu_seconds: float,
) -> None:
    """Write the card and its picture into an adapter's folder."""
    curves = {"learnt": history.learnt} | ({"held out": history.held_out} if history.held_out else {})
    (folder / CURVES_FILE).write_text(curves_svg(curves), encoding="utf-8")
    (folder / CARD_FILE).write_text(
        f"""---
base_model: {json.dumps(origin.base_id)}
library_name: peft
pipeline_tag: text-generation
tags: [lora]
---
# {origin.name}

{_list(_facts(origin, history, continued, cpu_seconds))}
{_section("Remarks", _list(remarks)) if remarks else ""}
## Loss

![Loss over steps, of the examples that were learnt and of those held out]({CURVES_FILE})

{_scores(history)}
## Recipe

`swaplora train --config` takes it again from a file of these lines, with `base`, `data` and `out`{_paths(recipe)}.

```toml
{as_toml(recipe)}```
""",
        encoding="utf-8",
    )


def as_toml(recipe: Recipe) -> str:
    """Every choice that is one, as a config file has it; of files and folders the names alone."""
    values = recipe.model_dump(mode="json", exclude=set() if recipe.init_from is None else set(OF_THE_ADAPTER))
    values |= {name: Path(values[name]).name for name in _of_files(recipe)}
    text = "".join(f"{name} = {_value(value)}\n" for name, value in values.items() if value is not None)
    tomllib.loads(text)
    return text


def _of_files(recipe: Recipe) -> list[str]:
    """The choices that name a folder or a file."""
    is_one = {"init_from": recipe.init_from is not None, "holdout": recipe.holdout_share is None}
    return [name for name, named in is_one.items() if named]


def _paths(recipe: Recipe) -> str:
    return "".join(f", and `{name}` where that lies" for name in _of_files(recipe))


def _value(value: object) -> str:
    if isinstance(value, str):
        escaped = "".join(c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08X}" for c in value)
        return f'"{escaped}"'
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    return str(value).lower()


def _facts(origin: Origin, history: History, continued: Continued | None, cpu_seconds: float) -> list[str]:
    base = f", {origin.base_digest}" if origin.base_digest else ""
    facts = [
        f"**Base**: {origin.base_id}{base}",
        f"**Data**: {origin.data.path.name}, {origin.data.digest}; {origin.num_learnt} examples learnt, "
        f"{origin.num_held_out} held out",
    ]
    if origin.held_out is not None:
        facts.append(f"**Held out**: {origin.held_out.path.name}, {origin.held_out.digest}")
    if continued is not None:
        facts.append(
            f"**Trained on**: {continued.digest}; intruder dimensions "
            f"{_count(continued.intruders_before)} before, {_count(continued.intruders_after)} after"
        )
    steps = f"{history.num_steps} of {history.planned} steps, that of step {history.kept} kept"
    facts.append(f"**Training**: {steps}; {cpu_seconds / 60:.1f} CPU minutes; final loss {history.final_loss:.3f}")
    return facts


def _scores(history: History) -> str:
    if not history.held_out:
        return "Nothing was held out. `swaplora evaluate` scores it on a task.\n"
    return f"""| loss on the hold-out | |
| --- | --- |
| before training | {history.held_out[0][1]:.4f} |
| of what is kept | {history.held_out_at[history.kept]:.4f} |

`swaplora evaluate` scores it on a task.
"""


def _count(number: int | None) -> str:
    return "not measured" if number is None else str(number)


def _list(lines: Sequence[str]) -> str:
    return "".join(f"- {line}\n" for line in lines)


def _section(title: str, body: str) -> str:
    return f"\n## {title}\n\n{body}"
