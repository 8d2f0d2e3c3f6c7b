"""A process that publishes on a shared folder, and may be killed at a step of it; `python changer.py` runs one.

changer.py DATA_DIR ADDRESS NAME COUNT STEP: STEP is "" or where it is to be killed by itself.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adapter_files import config_bytes
from swaplora_adapters.config.parse import parse_spec
from swaplora_adapters.files.digest import digest_of
from swaplora_adapters.registry.changes import Changes
from swaplora_adapters.store.records import Details
from swaplora_adapters.store.shared.address import open_objects
from swaplora_adapters.store.shared.base import Base
from swaplora_adapters.store.shared.history.log import Log
from swaplora_adapters.store.shared.journal import SharedJournal
from swaplora_adapters.store.shared.store import SharedStore

BASE = Base("base", "float32", "0" * 64, "1" * 64, "transformers 1, tokenizers 1")
STEPS = ("files sent", "change made", "change taken over")


def publish(store: SharedStore, changes: Changes, name: str, weights: bytes) -> None:
    """Bytes of any kind: the store does not look into them."""
    with store.stage() as staging:
        staging.config_path.write_bytes(config_bytes())
        staging.weights_path.write_bytes(weights)
        digest = digest_of(parse_spec(config_bytes()).canonical, staging.weights_path)
        store.send(staging, digest)
        details = Details(digest, 4, ("q_proj",), "base", 32, ())
        changes.make(lambda: store.publish(name, staging, details))


def killed_after(owner: type, method: str) -> None:
    whole: Callable[..., Any] = getattr(owner, method)

    def kill(*arguments: Any) -> Any:
        done = whole(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)
        return done

    setattr(owner, method, kill)


def main(data_dir: str, address: str, name: str, count: str, step: str) -> None:
    store = SharedStore(Path(data_dir), open_objects(address), BASE)
    changes = Changes(store, lambda _touched: None)
    if step:
        owner, method = {
            STEPS[0]: (SharedStore, "send"),
            STEPS[1]: (Log, "append"),
            STEPS[2]: (SharedJournal, "adopt"),
        }[step]
        killed_after(owner, method)
    for number in range(int(count)):
        publish(store, changes, name, f"{os.getpid()} {number}".encode())
        print(store.current(name).version, flush=True)  # noqa: T201 - what is acknowledged
    store.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
