"""The clients, each of one version and in an environment of its own below .clients/, made on first use."""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from repository import ROOT

FOLDER = ROOT / ".clients"
SCRIPTS = Path(__file__).parent / "scripts"
TORCH = "torch==2.13.0"  # as the Makefile pins it, so that no client brings gigabytes of another


@dataclass(frozen=True)
class Client:
    """A client, the packages that are it, pinned, the first of which has its version, and the script that uses it."""

    name: str
    script: str
    packages: tuple[str, ...]

    @property
    def version(self) -> str:
        return self.packages[0].rpartition("=" if "==" in self.packages[0] else "@")[2]

    @property
    def is_node(self) -> bool:
        return self.script.endswith(".mjs")

    @property
    def folder(self) -> Path:
        return FOLDER / f"{self.name}-{self.version}"

    @property
    def log(self) -> Path:
        """What the script and its libraries print."""
        return self.folder / "log"

    @property
    def lacks(self) -> str:
        """What this machine lacks to run it, or nothing."""
        return ", ".join(name for name in ("node", "npm") if self.is_node and not shutil.which(name))

    def command(self, url: str) -> list[str]:
        """What runs the script against a server."""
        interpreter = "node" if self.is_node else str(self.folder / "bin" / "python")
        # node looks for packages above the script alone
        script = self.folder / self.script if self.is_node else SCRIPTS / self.script
        return [interpreter, str(script), url]

    def prepare(self) -> None:
        """Make the environment if it is not there whole. Raises CalledProcessError if pip or npm fails."""
        made = self.folder / "made"
        if not made.exists() or made.read_text() != repr(self.packages):
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            (self._install_node if self.is_node else self._install_python)()
            made.write_text(repr(self.packages))
        if self.is_node:
            shutil.copy(SCRIPTS / self.script, self.folder)

    def _install_python(self) -> None:
        subprocess.run([sys.executable, "-m", "venv", self.folder], check=True)
        pip: list[str | Path] = [
            self.folder / "bin" / "python",
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
        ]
        subprocess.run([*pip, *self.packages], check=True)

    def _install_node(self) -> None:
        npm: list[str | Path] = ["npm", "install", "--silent", "--no-fund", "--no-audit", "--prefix", self.folder]
        subprocess.run([*npm, *self.packages], check=True)


CLIENTS = (
    Client("openai-python", "ask_openai.py", ("openai==3.57.0",)),
    Client("openai-python", "ask_openai.py", ("openai==2.54.0",)),
    Client("openai-python", "ask_openai.py", ("openai==1.109.1",)),
    Client("openai-node", "ask_openai.mjs", ("openai@7.59.0",)),
    Client("langchain-openai", "ask_langchain.py", ("langchain-openai==1.7.4",)),
    Client("llama-index-llms-openai-like", "ask_llama_index.py", ("llama-index-llms-openai-like==0.8.1",)),
    Client(
        "llama-index-embeddings-openai-like",
        "ask_llama_index_embeddings.py",
        ("llama-index-embeddings-openai-like==0.4.0",),
    ),
    Client(
        "llama-index-postprocessor-jinaai-rerank",
        "ask_llama_index_jina.py",
        ("llama-index-postprocessor-jinaai-rerank==0.6.0",),
    ),
    Client("cohere", "ask_cohere.py", ("cohere==7.3.1",)),
    Client("langchain-cohere", "ask_langchain_cohere.py", ("langchain-cohere==0.6.0",)),
    Client("litellm", "ask_litellm.py", ("litellm==1.110.2",)),
    Client("pydantic-ai", "ask_pydantic_ai.py", ("pydantic-ai-slim[openai]==2.68.0",)),
    Client("instructor", "ask_instructor.py", ("instructor==1.17.0",)),
    Client("anthropic", "ask_anthropic.py", ("anthropic==2.14.0",)),
    Client("lm-eval", "ask_lm_eval.py", ("lm-eval==0.4.13", TORCH, "requests", "tenacity", "tqdm", "aiohttp")),
)
