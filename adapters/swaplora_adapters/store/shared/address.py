"""Where a shared store lies, as the operator writes it."""

import re
from pathlib import Path

from swaplora_adapters.files.disk import StoreError
from swaplora_adapters.store.shared.folder import FolderObjects
from swaplora_adapters.store.shared.objects import Objects

BUCKET = "s3://"
_BUCKET_NAME = re.compile(r"[\w.\-]+")


def open_objects(address: str) -> Objects:
    """`s3://BUCKET/PREFIX`, or a folder. Raises StoreError."""
    if not address.startswith(BUCKET):
        return FolderObjects(Path(address))
    try:
        from swaplora_adapters.store.shared.bucket import BucketObjects
    except ImportError as error:
        raise StoreError("a shared store in a bucket needs boto3: pip install 'swaplora[s3]'") from error
    bucket, _, prefix = address.removeprefix(BUCKET).partition("/")
    if not _BUCKET_NAME.fullmatch(bucket):
        raise StoreError(f"{address}: a shared store in a bucket is s3://BUCKET or s3://BUCKET/PREFIX")
    return BucketObjects(bucket, prefix.strip("/"))
