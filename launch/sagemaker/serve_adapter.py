"""Runs inside AWS's vLLM image, with an adapter: makes the endpoint answer with it. Imports nothing of this project.

vLLM's /invocations puts the header X-Amzn-SageMaker-Adapter-Identifier in the place of the body's `model`, and nothing
where there is no such header; boto3 cannot send it to an endpoint of one model. So the base would answer, silently.
`deploy` copies this file into the adapter's folder and has vLLM load it (`--middleware`).
"""

import os

HEADER = b"x-amzn-sagemaker-adapter-identifier"


class ServeAdapter:
    """ASGI middleware: a request to /invocations that names no adapter is for the one of PLUMBLINE_ADAPTER."""

    def __init__(self, app):
        self.app = app
        self.name = os.environ["PLUMBLINE_ADAPTER"].encode()

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http" and scope["path"] == "/invocations":
            if HEADER not in [name.lower() for name, _ in scope["headers"]]:
                scope = {**scope, "headers": [*scope["headers"], (HEADER, self.name)]}
        await self.app(scope, receive, send)
