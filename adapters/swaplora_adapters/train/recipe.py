"""How an adapter is trained: every choice, its default and its bounds."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from swaplora_adapters.config.parse import MAX_RANK

ALL_LINEAR = "all-linear"  # as PEFT calls them: every linear but the output head
OF_THE_ADAPTER = ("rank", "alpha", "dropout", "target", "dora", "rslora")


def _text(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("a share of the examples, or a file of others")
    return str(value)


def _tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


class Recipe(BaseModel):
    """Raises pydantic's ValidationError. The defaults are those that hold for most tasks on most bases."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, allow_inf_nan=False)

    rank: int = Field(16, ge=1, le=MAX_RANK, description="Rank of each factor")
    alpha: float | None = Field(None, gt=0, description="Scaling is alpha / rank (default: twice the rank)")
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of a module's inputs that its factors do not see")
    target: Annotated[tuple[str, ...], BeforeValidator(_tuple)] = Field(
        (ALL_LINEAR,), min_length=1, description="Last name of modules to train (default: all linears but the head)"
    )
    dora: bool = Field(False, description="Learn magnitudes beside directions")
    rslora: bool = Field(False, description="Scale by alpha / sqrt(rank)")
    qlora: bool = Field(False, description="Keep the base in 4 bits (NF4) meanwhile; needs bitsandbytes")
    init_from: Path | None = Field(None, description="Folder of an adapter to go on from")

    epochs: float = Field(3.0, gt=0, le=1000, description="How often each example is learnt from")
    learning_rate: float = Field(2e-4, gt=0, le=1, description="Largest step; 3e-5 to 2e-4 as a rule")
    batch_size: int = Field(8, ge=1, le=2**16, description="Examples of a step")
    seed: int = Field(0, ge=0, lt=2**32, description="Of order, hold-out and first weights")

    max_tokens: int | None = Field(None, ge=2, description="Most tokens of an example (default: the base's context)")
    too_long: Literal["refuse", "truncate"] = Field(
        "refuse", description="What becomes of longer examples: truncate cuts off their beginnings"
    )
    holdout: Annotated[str, BeforeValidator(_text)] = Field(
        "0.1", min_length=1, description="Share of the examples to hold out, 0 for none, or a file of others"
    )
    patience: int = Field(3, ge=0, description="Measurements without a gain that end training; 0 is never")
    checkpoint_steps: int | None = Field(
        None, ge=1, description="Steps between checkpoints, which measure the hold-out (default: a tenth of all)"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.init_from is not None and (given := [name for name in OF_THE_ADAPTER if name in self.model_fields_set]):
            raise ValueError(f"{', '.join(given)}: init_from's adapter has its own; leave them out")
        share = self.holdout_share
        if share is not None and not 0 <= share < 1:
            raise ValueError("holdout: a share is at least 0 and below 1")
        return self

    @property
    def scaled_alpha(self) -> float:
        """LoRA's alpha."""
        return 2 * self.rank if self.alpha is None else self.alpha

    @property
    def holdout_share(self) -> float | None:
        """None where a file is held out."""
        try:
            return float(self.holdout)
        except ValueError:
            return None
