"""Ask an endpoint: one answer, or a stream.

    python -m launch.sagemaker.invoke NAME 'What is 17 + 25?' --stream

Requests are OpenAI's chat completions, which both containers take.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from configs.loader import load_config
from launch.sagemaker.account import Account
from launch.sagemaker.failures import one_sentence_errors


@dataclass(frozen=True, kw_only=True)
class Command:
    """A question to an endpoint."""

    endpoint: str = ""
    """Its name."""
    prompt: str = ""
    """A user's message."""
    stream: bool = False
    """Print the answer as it comes."""
    max_tokens: int = 512
    """Tokens of the answer, at most."""
    temperature: float = 0.0
    """0 is greedy."""
    adapter: str | None = None
    """LMI only: name of the adapter."""
    region: str | None = None
    """Left out, AWS_REGION, AWS_DEFAULT_REGION, or the AWS profile's."""

    def __post_init__(self) -> None:
        if bool(self.endpoint) != bool(self.prompt):
            raise ValueError("give the name of an endpoint and a prompt.")


def invoke(
    endpoint: str, messages: Sequence[Mapping[str, Any]], settings: Mapping[str, Any] | None = None, *, client: Any
) -> dict[str, Any]:
    """One chat completion; `settings` are OpenAI's (max_tokens, temperature, tools, ...) and LMI's `adapters`.

    The model asked for has the endpoint's name, as `deploy` has it served. client: boto3's, of sagemaker-runtime.
    """
    return json.loads(_ask(client.invoke_endpoint, endpoint, messages, settings or {}).read())


def stream(
    endpoint: str, messages: Sequence[Mapping[str, Any]], settings: Mapping[str, Any] | None = None, *, client: Any
) -> Iterator[dict[str, Any]]:
    """The chunks of one chat completion as they come. Raises RuntimeError where it breaks off."""
    ask = client.invoke_endpoint_with_response_stream
    yield from split_events(
        event["PayloadPart"]["Bytes"] for event in _ask(ask, endpoint, messages, {**(settings or {}), "stream": True})
    )


def split_events(parts: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """Server-sent events as JSON, from pieces of bytes that may end anywhere: inside a line, inside a character.

    Raises RuntimeError for an event that reports an error, and for a stream that stops inside an event.
    """
    rest = b""
    for part in parts:
        *events, rest = (rest + part).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            if event.startswith(b"data:") and event[5:].strip() != b"[DONE]":
                chunk = json.loads(event[5:])
                if "error" in chunk:
                    raise RuntimeError(f"the container reports: {chunk['error']}")
                yield chunk
    if rest.strip():
        raise RuntimeError(f"the stream stopped inside an event: {rest[:80]!r}")


def _ask(call: Any, endpoint: str, messages: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> Any:
    """The answer's body. Raises RuntimeError with what the container said where it refuses."""
    from botocore.exceptions import ClientError

    body = json.dumps({"model": endpoint, "messages": list(messages), **settings})
    try:
        return call(EndpointName=endpoint, ContentType="application/json", Body=body)["Body"]
    except ClientError as error:
        if error.response.get("Error", {}).get("Code") != "ModelError":
            raise
        raise RuntimeError(f"endpoint {endpoint}: {error.response.get('OriginalMessage') or error}") from None


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    command: Command = load_config(Command, words, prog="invoke", positional=("endpoint", "prompt"))
    settings: dict[str, Any] = {"max_tokens": command.max_tokens, "temperature": command.temperature}
    if command.adapter:
        settings["adapters"] = command.adapter
    messages = [{"role": "user", "content": command.prompt}]
    with one_sentence_errors("invoke"):
        client = Account(region=command.region).find_session().client("sagemaker-runtime")
        if command.stream:
            for chunk in stream(command.endpoint, messages, settings, client=client):
                for choice in chunk.get("choices", []):
                    print(choice["delta"].get("content") or "", end="", flush=True)
            print()
        else:
            answer = invoke(command.endpoint, messages, settings, client=client)
            print(answer["choices"][0]["message"]["content"])


if __name__ == "__main__":
    main()
