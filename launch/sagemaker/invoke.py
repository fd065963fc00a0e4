"""Ask an endpoint: one answer, a stream, or a conversation in which the model calls functions.

    python -m launch.sagemaker.invoke NAME 'What is 17 + 25?' --stream
    python -m launch.sagemaker.invoke NAME --file rows.jsonl --max_tokens 256 > answers.jsonl

Requests are OpenAI's chat completions, which both containers take.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.sagemaker.failures import find_region, one_sentence_errors

Message = dict[str, Any]


def build_body(
    endpoint: str, messages: Sequence[Message], settings: Mapping[str, Any], *, adapter: str | None = None
) -> bytes:
    """A request; `settings` are those of a chat completion (max_tokens, temperature, tools, tool_choice, ...).

    The model asked for has the endpoint's name, as `deploy` has it served. LMI wants an adapter's name as `adapter`.
    """
    body = {"model": endpoint, "messages": list(messages), **settings}
    if adapter:
        body["adapters"] = adapter
    return json.dumps(body).encode()


def invoke(
    endpoint: str,
    messages: Sequence[Message],
    settings: Mapping[str, Any] | None = None,
    *,
    client: Any = None,
    adapter: str | None = None,
) -> dict[str, Any]:
    """One chat completion, whole. Raises RuntimeError with what the container said where it refuses."""
    client = client or _client()
    try:
        answer = client.invoke_endpoint(
            EndpointName=endpoint,
            ContentType="application/json",
            Body=build_body(endpoint, messages, settings or {}, adapter=adapter),
        )
    except client.exceptions.ModelError as error:
        raise RuntimeError(f"endpoint {endpoint}: {_reason(error)}") from None
    return json.loads(answer["Body"].read())


def stream(
    endpoint: str,
    messages: Sequence[Message],
    settings: Mapping[str, Any] | None = None,
    *,
    client: Any = None,
    adapter: str | None = None,
) -> Iterator[dict[str, Any]]:
    """The chunks of one chat completion as they come. Raises RuntimeError where the container refuses or breaks off."""
    client = client or _client()
    body = build_body(endpoint, messages, {**(settings or {}), "stream": True}, adapter=adapter)
    try:
        answer = client.invoke_endpoint_with_response_stream(
            EndpointName=endpoint, ContentType="application/json", Body=body
        )
    except client.exceptions.ModelError as error:
        raise RuntimeError(f"endpoint {endpoint}: {_reason(error)}") from None
    yield from split_events(_payloads(answer["Body"]))


def split_events(parts: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """Server-sent events as JSON, from pieces of bytes that may end anywhere: inside a line, inside a character.

    Raises RuntimeError for an event that reports an error, and for a stream that stops inside an event.
    """
    rest = b""
    for part in parts:
        rest = (rest + part).replace(b"\r\n", b"\n")
        *events, rest = rest.split(b"\n\n")
        for event in events:
            yield from _event(event)
    yield from _event(rest)


def _event(event: bytes) -> Iterator[dict[str, Any]]:
    lines = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
    text = b"\n".join(lines)
    if not text or text == b"[DONE]":
        return
    try:
        chunk = json.loads(text)
    except ValueError:
        raise RuntimeError(f"the stream stopped inside an event: {text[:80]!r}") from None
    if "error" in chunk:
        raise RuntimeError(f"the container reports: {chunk['error']}")
    yield chunk


def _payloads(body: Iterable[Mapping[str, Any]]) -> Iterator[bytes]:
    for event in body:
        if "PayloadPart" not in event:
            raise RuntimeError(f"the stream broke off: {event}")
        yield event["PayloadPart"]["Bytes"]


def join_chunks(chunks: Iterable[Mapping[str, Any]]) -> Message:
    """The assistant's message that a stream's chunks add up to, tool calls included."""
    content = ""
    calls: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for choice in chunk.get("choices", [])[:1]:
            delta = choice.get("delta", {})
            content += delta.get("content") or ""
            for piece in delta.get("tool_calls") or []:
                call = calls.setdefault(
                    piece.get("index", 0), {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
                )
                call["id"] = piece.get("id") or call["id"]
                for key in ("name", "arguments"):
                    call["function"][key] += piece.get("function", {}).get(key) or ""
    message: Message = {"role": "assistant", "content": content}
    if calls:
        message["tool_calls"] = [calls[index] for index in sorted(calls)]
    return message


def converse(
    endpoint: str,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    functions: Mapping[str, Callable[..., Any]],
    settings: Mapping[str, Any] | None = None,
    *,
    client: Any = None,
    adapter: str | None = None,
    max_rounds: int = 5,
) -> list[Message]:
    """Let the model call `functions` until it answers in words; returns the whole conversation.

    tools: OpenAI's descriptions; functions: name -> callable of the arguments. What a function returns, or raises, is
    told to the model as JSON. Raises RuntimeError after `max_rounds` rounds of calls.
    """
    client = client or _client()
    talk = list(messages)
    for _ in range(max_rounds + 1):
        asked = {**(settings or {}), "tools": list(tools)}
        message = invoke(endpoint, talk, asked, client=client, adapter=adapter)["choices"][0]["message"]
        said = {key: message.get(key) for key in ("role", "content", "tool_calls")}
        talk.append({key: value for key, value in said.items() if value})
        if not message.get("tool_calls"):
            return talk
        talk += [_call(call, functions) for call in message["tool_calls"]]
    raise RuntimeError(f"the model still calls tools after {max_rounds} rounds")


def _call(call: Mapping[str, Any], functions: Mapping[str, Callable[..., Any]]) -> Message:
    """The tool's message for one call. Whatever goes wrong is the model's to hear: it may have called wrongly."""
    name = call["function"]["name"]
    try:
        result = functions[name](**json.loads(call["function"]["arguments"] or "{}"))
    except KeyError as error:
        result = {"error": f"there is no function {error}" if name not in functions else repr(error)}
    except Exception as error:  # a user's function, called with a model's arguments
        result = {"error": f"{type(error).__name__}: {error}"}
    return {"role": "tool", "tool_call_id": call["id"], "content": json.dumps(result, default=str)}


def _reason(error: Any) -> str:
    response = error.response
    return str(response.get("OriginalMessage") or response.get("Error", {}).get("Message") or error)


def _client(region: str | None = None) -> Any:
    import boto3

    return boto3.Session(region_name=find_region(region)).client("sagemaker-runtime")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m launch.sagemaker.invoke", description="Ask an endpoint.")
    parser.add_argument("endpoint")
    parser.add_argument("prompt", nargs="?", help="a user's message")
    parser.add_argument("--file", help="JSONL with `messages` or `prompt`; prints one JSON object a row")
    parser.add_argument("--stream", action="store_true", help="print the answer as it comes")
    parser.add_argument("--max_tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--adapter", help="LMI only: name of the adapter")
    parser.add_argument("--region")
    options = parser.parse_args(argv)
    if bool(options.prompt) == bool(options.file):
        parser.error("give a prompt, or --file")
    settings = {"max_tokens": options.max_tokens, "temperature": options.temperature}
    with one_sentence_errors("invoke"):
        client = _client(options.region)
        if options.file:
            for number, line in enumerate(Path(options.file).read_text(encoding="utf-8").splitlines(), start=1):
                row = _row(line, f"{options.file}, line {number}")
                asked = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
                answer = invoke(options.endpoint, asked, settings, client=client, adapter=options.adapter)
                print(json.dumps({**row, "completion": answer["choices"][0]["message"]["content"]}, ensure_ascii=False))
            return
        asked = [{"role": "user", "content": options.prompt}]
        if options.stream:
            for chunk in stream(options.endpoint, asked, settings, client=client, adapter=options.adapter):
                for choice in chunk.get("choices", []):
                    print(choice["delta"].get("content") or "", end="", flush=True)
            print()
        else:
            answer = invoke(options.endpoint, asked, settings, client=client, adapter=options.adapter)
            print(answer["choices"][0]["message"]["content"])


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or not (row.get("messages") or "prompt" in row):
        raise ValueError(f"{where} is no JSON object with `messages` or `prompt`.")
    return row


if __name__ == "__main__":
    main()
