"""Where a shared store lies, as the operator writes it."""

from pathlib import Path
from urllib.parse import urlsplit

from swaplora_adapters.files.disk import StoreError
from swaplora_adapters.store.shared.folder import FolderObjects
from swaplora_adapters.store.shared.objects import Objects

BUCKET = "s3://"


def open_objects(address: str) -> Objects:
    """`s3://BUCKET/PREFIX`, or a folder. Raises StoreError."""
    if not address.startswith(BUCKET):
        return FolderObjects(Path(address))
    try:
        from swaplora_adapters.store.shared.bucket import BucketObjects
    except ImportError as error:
        raise StoreError("a shared store in a bucket needs boto3: pip install 'swaplora[s3]'") from error
    parts = urlsplit(address)
    return BucketObjects(parts.netloc, parts.path.strip("/"))
