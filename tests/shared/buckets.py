"""A server of buckets in this process, for a store that several servers share."""

import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import boto3
import pytest
from moto.s3.responses import S3Response
from moto.server import ThreadedMotoServer

AWS = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "hunter2",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
}


@contextmanager
def serving_buckets() -> Iterator[str]:
    """The URL of one that looks for an object and makes it in one, as S3 does and moto's threads do not."""
    lock, put_object = threading.Lock(), S3Response.put_object

    def put_alone(response: S3Response) -> Any:
        with lock:
            return put_object(response)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(S3Response, "put_object", put_alone)
        server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
        server.stop()


def make_bucket(moto_url: str, patch: pytest.MonkeyPatch) -> str:
    """The address of one that is empty; while `patch` lasts boto3 knows who has it."""
    for name, value in (AWS | {"AWS_ENDPOINT_URL_S3": moto_url}).items():
        patch.setenv(name, value)
    bucket = secrets.token_hex(8)
    client = boto3.session.Session().client("s3")
    client.create_bucket(Bucket=bucket)
    client.close()
    return f"s3://{bucket}/team"
