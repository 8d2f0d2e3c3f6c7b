"""What others can be made of: kinds that are more than low-rank deltas are refused by name, before any work."""

from pathlib import Path
from typing import Any

import pytest

import tiny
from adapter_files import config_bytes, write_adapter
from swaplora_adapters.config.parse import parse_spec
from swaplora_adapters.derive.process import DerivationProcess
from swaplora_adapters.derive.recipe import require_deltas
from swaplora_adapters.derive.whole_models.export import export_model
from swaplora_adapters.errors import UnsupportedAdapterError
from test_derivation_process import compose


def test_a_process_refuses_dora(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "dora", use_dora=True)
    with pytest.raises(UnsupportedAdapterError, match="of kind dora cannot be combined"):
        DerivationProcess().run("compose", compose(folder, tmp_path / "out"))


def test_a_merge_refuses_biases_and_saved_modules(tmp_path: Path) -> None:
    base = tiny.save_tiny_base(tmp_path / "base")
    folder = write_adapter(tmp_path / "biases", bias="all", modules_to_save=["norm"])
    with pytest.raises(UnsupportedAdapterError) as caught:
        export_model(base, [folder], [1.0], tmp_path / "out")
    assert [reason.split()[4] for reason in caught.value.reasons] == ["bias", "modules_to_save"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fields", [{}, {"use_qalora": True}, {"peft_type": "ADALORA"}], ids=["lora", "qalora", "ada"])
def test_deltas_are_let_through(fields: dict[str, Any]) -> None:
    require_deltas(parse_spec(config_bytes(**fields)))
