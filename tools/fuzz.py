"""Fuzzing of what reads untrusted files, guided by coverage. Needs atheris.

`PYTHONPATH=tests/support:tests/adapters python tools/fuzz.py --seconds 600`
"""

import argparse
import importlib
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(tempfile.gettempdir()) / "swaplora-fuzz"
PACKAGE = "swaplora_adapters"
# fmt: off
TOKENS = (
    '"dtype"', '"shape"', '"data_offsets"', '"__metadata__"', '"F32"', '"F16"', '"BF16"', '"I64"', "[0,512]", "\\u0061",
    "base_model.model.", ".lora_A.weight", ".lora_B.weight", "model.layers.0.self_attn.q_proj", "1e308", "NaN", "null",
    '"peft_type"', '"LORA"', '"r"', '"lora_alpha"', '"target_modules"', '"rank_pattern"', '"alpha_pattern"', '"bias"',
    '"exclude_modules"', '"layers_to_transform"', '"layers_pattern"', '"use_rslora"', '"init_lora_weights"', '"none"',
    '"all-linear"', '"task_type"', '"CAUSAL_LM"', "(?:", "(?=", ")*", ")+", "{2,}", "{,3}", ".*", "\\\\d", "[^a]", "|",
)
# fmt: on


def main() -> None:
    """Run until the time is over or an input is found that a target does not bear, which is then kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=600, help="how long to run")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="keeps what is found, and inputs from run to run")
    options = parser.parse_args()
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=[PACKAGE]):
        from test_fuzz import MAX_BYTES, TARGETS, seeds
    folder: Path = options.folder
    corpus, scratch = folder / "corpus", folder / "scratch"
    for path in (corpus, scratch):
        path.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds()):
        (corpus / f"seed{number}").write_bytes(seed)
    (folder / "tokens").write_text("\n".join(_quoted(token) for token in TOKENS))

    def run_one(data: bytes) -> None:
        if data:
            TARGETS[data[0] % len(TARGETS)](scratch, data[1:])

    limits = (f"-max_total_time={options.seconds}", f"-max_len={MAX_BYTES}", "-timeout=20", "-print_final_stats=1")
    atheris.Setup([sys.argv[0], *limits, f"-dict={folder}/tokens", f"-artifact_prefix={folder}/", str(corpus)], run_one)
    atheris.Fuzz()


def _quoted(token: str) -> str:
    """A token as libFuzzer's dictionaries have it."""
    return '"' + "".join(f"\\x{byte:02x}" for byte in token.encode()) + '"'


if __name__ == "__main__":
    main()
