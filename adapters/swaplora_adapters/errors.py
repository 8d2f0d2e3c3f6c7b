"""The one family of errors about adapters. Each carries the stable code that clients decide by, never its text."""

from collections.abc import Sequence


class AdapterError(Exception):
    """Something about an adapter that its sender or caller can mend; `code` is stable, the message says what to do."""

    code = "adapter_error"


class InvalidAdapterError(AdapterError, ValueError):
    """The files are malformed, or do not fit the base. `reasons` lists every complaint found, not just the first."""

    code = "invalid_adapter"

    def __init__(self, reasons: Sequence[str]) -> None:
        self.reasons = tuple(reasons)
        super().__init__("; ".join(self.reasons))


class UnsupportedAdapterError(InvalidAdapterError):
    """The files are well formed but ask for something that is not served; `reasons` names every such field."""

    code = "unsupported_adapter"


class AdapterTooLargeError(AdapterError):
    """A file is larger than the configured limit, or can never fit the memory budget."""

    code = "adapter_too_large"


class InvalidAdapterNameError(AdapterError, ValueError):
    """The name is not one that an adapter may have."""

    code = "invalid_adapter_name"


class AdapterNotFoundError(AdapterError, LookupError):
    """No adapter of that name."""

    code = "adapter_not_found"


class NotOwnerError(AdapterError):
    """The adapter is another tenant's, which shares it: it may be asked, and nothing else."""

    code = "not_owner"


class VersionNotFoundError(AdapterError, LookupError):
    """The adapter exists, the version asked for does not."""

    code = "version_not_found"


class AliasNotFoundError(AdapterError, LookupError):
    """No alias of that name."""

    code = "alias_not_found"


class MixtureNotFoundError(AdapterError, LookupError):
    """No mixture of that name."""

    code = "mixture_not_found"


class AdapterBusyError(AdapterError):
    """Something else still points to what is to be removed; the message names it."""

    code = "adapter_busy"


class GateFailedError(AdapterError):
    """The version has not passed its name's gate; the message says why."""

    code = "gate_failed"


class SourceNotAllowedError(AdapterError, ValueError):
    """The source is not one that the operator enabled, or is written wrongly."""

    code = "source_not_allowed"


class SourceNotFoundError(AdapterError, LookupError):
    """The source was asked and does not have the adapter; the message says what exactly is missing."""

    code = "source_not_found"


class SourceFailedError(AdapterError):
    """The source could not be asked, or broke off; the message says at which step. Trying again may help."""

    code = "source_failed"


class StoppingError(AdapterError):
    """Everything here ends; what was asked for may be had elsewhere, or when this is back."""

    code = "draining"

    def __init__(self, step: object = None) -> None:
        """`step` is what it came upon, if the reader would want to know."""
        super().__init__("the server is stopping" if step is None else f"{step}: the server is stopping")


class OverloadedError(AdapterError):
    """More is asked for at once than is good; trying again in a moment helps."""

    code = "overloaded"


class QuotaExceededError(AdapterError):
    """Whose it would be has as much as it may have."""

    code = "quota_exceeded"


class PreconditionFailedError(AdapterError):
    """A condition of the sender's does not hold for the name as it is now."""

    code = "precondition_failed"


class VersionMismatchError(PreconditionFailedError):
    """The name's current version is not the one that the sender knows."""


class AdapterFailedError(AdapterError):
    """The stored version cannot be loaded; the message carries the stored reason."""

    code = "adapter_failed"


class DerivationFailedError(AdapterError):
    """What was to be computed from adapters did not come to an end within its bounds; the message names them."""

    code = "derivation_failed"


class StorageFullError(AdapterError, OSError):
    """The disk under the data directory has no room left."""

    code = "storage_full"


class StorageFailedError(AdapterError, OSError):
    """The disk under the data directory does not read or write as it should; the message says what it answered."""

    code = "storage_failed"


class StoreUnreachableError(StorageFailedError):
    """The store that several servers share does not answer; what is known of it is served on, and nothing changed."""

    code = "store_unreachable"


class StoreChangedError(StorageFailedError):
    """The store that several servers share is not the one any more that is known here; an operator has to look."""

    code = "store_changed"


class MemoryFullError(AdapterError):
    """Every resident adapter is in use, and the budget leaves no room for another."""

    code = "memory_full"
