"""An S3 server on loopback (moto's), and the environment that points to it, for tests and chaos."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import boto3
from moto.server import ThreadedMotoServer

BUCKET = "bucket"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_REGION": "us-east-1",
    "AWS_ALLOW_HTTP": "true",
}


@contextmanager
def s3_server() -> Iterator[str]:
    """The URL of an S3 server with one empty bucket."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=url, **keys).create_bucket(Bucket=BUCKET)
    try:
        yield url
    finally:
        server.stop()


def environment(url: str, patience: float = 20) -> dict[str, str]:
    """What a process needs to find the server."""
    return {**CREDENTIALS, "AWS_ENDPOINT_URL": url, "RAY_TRACIN_STORAGE_PATIENCE": str(patience)}


@contextmanager
def pointed_at(url: str, patience: float = 20) -> Iterator[None]:
    """This process finds the server as long as the context lasts."""
    before = {name: os.environ.get(name) for name in environment(url)}
    os.environ.update(environment(url, patience))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
