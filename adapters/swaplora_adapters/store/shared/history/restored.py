"""A store that was brought back from a backup, which was made while there were changes: what it lacks, and what not."""

from itertools import count

from swaplora_adapters.files.disk import StoreError
from swaplora_adapters.store.shared.history.log import Log
from swaplora_adapters.store.shared.history.snapshots import Snapshots


def take_stock(log: Log, snapshots: Snapshots, known: int) -> None:
    """StoreError where a change is missing between the newest snapshot, or what is `known` here, and the log's end.

    Where the log begins behind the snapshot, and there is no note of what was removed, it is made anew. Raises
    StoreUnreachableError.
    """
    revisions = log.revisions()  # before the snapshots: of what was removed by then there is one
    newest = snapshots.last()
    begins_at = newest.revision
    later = [revision for revision in revisions if revision > max(begins_at, known)]
    for expected, revision in zip(count(max(begins_at, known) + 1), later, strict=False):
        if revision != expected:  # which a listing may have passed over that was made beside changes
            if log.read(expected) is None and not log.is_trimmed(expected):
                raise StoreError(
                    f"the shared store has later changes than {expected}, and not this one: bring it back from a "
                    "backup whose objects were copied in the documented order"
                )
            break
    is_cut = newest.id is not None and all(each > begins_at for each in revisions) and log.read(begins_at) is None
    if is_cut and not log.is_trimmed(begins_at):
        following = log.read(begins_at + 1)
        if following is None or following.follows(newest):
            log.note_trimmed(newest)
