"""What whoever trains an adapter should be told of how it went: nothing that ends a run, and nothing left unsaid."""

from collections.abc import Iterator
from dataclasses import dataclass

from swaplora_adapters.train.data import Data, Split
from swaplora_adapters.train.recipe import Recipe
from swaplora_adapters.train.run import History

LEAST_LOSS = 0.2  # of learning, below which an adapter knows its examples by heart as a rule
RATES = (3e-5, 2e-4)


@dataclass(frozen=True, slots=True)
class Continued:
    """The adapter that was gone on from: its digest and its intruder dimensions; those of what became of it."""

    digest: str
    warnings: tuple[str, ...]
    intruders_before: int | None
    intruders_after: int | None = None


def on_data(data: Data, split: Split, num_cut: int) -> Iterator[str]:
    """Of examples, before anything is learnt."""
    if repeated := data.repeated:
        lines = ", ".join(map(str, repeated[:5])) + (", …" if len(repeated) > 5 else "")
        yield f"{len(repeated)} lines of {data.path.name} say what a line before them does (lines {lines})"
    if split.num_shared:
        yield f"{split.num_shared} of the held-out examples are learnt as well: their loss says little"
    if num_cut:
        yield f"the beginnings of {num_cut} examples were cut off, as they are too long"
    if not split.held_out:
        yield "nothing is held out: nothing tells when to stop"


def on_recipe(recipe: Recipe) -> Iterator[str]:
    """Of choices far from what holds for most tasks."""
    low, high = RATES
    if not low <= recipe.learning_rate <= high:
        yield f"a learning rate of {recipe.learning_rate:g} is unusual: most tasks want {low:g} to {high:g}"


def on_start(continued: Continued) -> Iterator[str]:
    """Of an adapter to go on from."""
    yield from continued.warnings
    if continued.intruders_before is None:
        yield "how many intruder dimensions the adapter to go on from has cannot be told"
    elif continued.intruders_before:
        yield (
            f"the adapter to go on from has {continued.intruders_before} intruder dimensions, which the base did not "
            "have: they add up where adapters are trained on one another, and what the base could do is forgotten with "
            "them; train on all examples from the base instead, if you have them"
        )


def on_result(history: History, continued: Continued | None) -> Iterator[str]:
    """Of what came of it."""
    if history.final_loss < LEAST_LOSS:
        yield (
            f"the training loss fell to {history.final_loss:.3f}: below {LEAST_LOSS} an adapter knows its examples by "
            "heart as a rule; fewer epochs or a smaller learning rate, or measure that it does what it should"
        )
    if history.num_steps < history.planned:
        yield f"ended early: the loss on the hold-out was least at step {history.kept} of {history.planned}"
    elif history.kept < history.num_steps:
        yield f"the loss on the hold-out was least at step {history.kept} of {history.planned}, which is kept"
    if history.held_out and history.held_out_at[history.kept] >= history.held_out[0][1]:
        yield "the loss on the hold-out never fell below the one before training: nothing of use was learnt"
    if continued is not None and continued.intruders_after is not None:
        yield f"it has {continued.intruders_after} intruder dimensions now, and had {continued.intruders_before}"
