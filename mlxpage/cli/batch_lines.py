"""What `mlxpage batch` reads and writes: requests and answers as lines of JSON."""

from __future__ import annotations

import difflib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

from mlxpage.cli.output import answer
from mlxpage.errors import InvalidRequest
from mlxpage.outputs import RequestOutput
from mlxpage.sampling_params import SamplingParams

MOST_BYTES = 32 * 2**20
"""Of a line: longer than any model's context, shorter than what fills a memory."""
EXAMPLE = '{"prompt": "Why is the sky blue?"}'

_OPTIONS = {field.name for field in fields(SamplingParams)}
_OF_A_LINE = {"id", "prompt", "messages", "params", "metadata"}
_OF_OPENAI = {"custom_id", "method", "url", "body"}
_OF_A_BODY = {"prompt", "messages", "metadata", "model", "stream", "max_completion_tokens"}

_BEGIN = b'{"line": '  # of each answer


# -- requests --


@dataclass(slots=True)
class Line:
    """A line of the input that isn't blank."""

    number: int
    """From 1, as editors count, blank lines too."""
    data: bytes
    """No more than `MOST_BYTES` and one, of those that are longer."""
    digest: str
    """Of what its answer depends on."""
    position: int = 0
    """From 0, among those that are to be answered."""
    id: str | int | None = None
    metadata: Any = None


@dataclass(frozen=True, slots=True)
class Asked:
    """What a line asks for."""

    prompt: str | list[int] | None
    messages: list[dict[str, Any]] | None
    is_raw: bool
    """Whether the prompt is continued as it is, without chat template."""
    options: dict[str, Any]
    """Of sampling, as `SamplingParams` has them."""


def read_lines(stream: BinaryIO, basis: str) -> Iterator[Line]:
    """Lines as they come. `basis` is what all answers depend on beside their lines."""
    salt = hashlib.sha256(basis.encode())
    number = 0
    while data := stream.readline(MOST_BYTES + 1):
        number += 1
        if number == 1:
            data = data.removeprefix(b"\xef\xbb\xbf")
        rest = data
        while rest and not rest.endswith(b"\n"):
            rest = stream.readline(MOST_BYTES)
        if data := data.strip():
            digest = salt.copy()
            digest.update(data)
            yield Line(number, data, digest.hexdigest()[:16])


def unanswered(lines: Iterator[Line], done: dict[int, str]) -> Iterator[Line]:
    """Those that no answer is there for. Raises InvalidRequest if one is there for another."""
    position = 0
    for line in lines:
        if (digest := done.get(line.number)) is None:
            line.position = position
            position += 1
            yield line
        elif digest != line.digest:
            raise InvalidRequest(
                f"line {line.number:,} is not what was answered before: it, the model or an option "
                "has changed. Go on with what they were, or write the answers to another file."
            )


def understand(line: Line) -> Asked:
    """What a line asks for; takes its `id` and `metadata` down as soon as they are known. Raises
    InvalidRequest."""
    found = _decoded(line.data)
    line.id = _identity(found)
    if is_openai := "body" in found:
        _refuse_others(found, _OF_OPENAI)
        found = _body(found)
    else:
        _refuse_others(found, _OF_A_LINE | _OPTIONS)
        if not isinstance(found.get("params") or {}, dict):
            raise InvalidRequest(f"params is {found['params']!r:.80}; it must be an object")
        _refuse_others(found.get("params") or {}, _OPTIONS)
        found |= found.get("params") or {}
    line.metadata = found.get("metadata")
    prompt, messages = found.get("prompt"), found.get("messages")
    if (prompt is None) == (messages is None):
        raise InvalidRequest(f"a line has either a prompt or messages, as in {EXAMPLE}")
    options = {name: value for name, value in found.items() if name in _OPTIONS}
    if isinstance(biases := options.get("logit_bias"), dict):
        options["logit_bias"] = _by_token_id(biases)
    # As APIs have it, null is what isn't given.
    options = {name: value for name, value in options.items() if value is not None}
    return Asked(prompt, messages, is_openai, options)


def seed_of(seed: int, line: Line) -> int:
    """A seed of the line's own: what else is answered, and when, changes nothing."""
    digest = hashlib.sha256(f"{seed} {line.number}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1  # the further generations of a prompt count on from it


def _decoded(data: bytes) -> dict[str, Any]:
    if len(data) > MOST_BYTES:
        raise InvalidRequest(f"the line is longer than {MOST_BYTES >> 20} MiB, which is the limit")
    try:
        found = json.loads(data.decode(), parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"the line is no UTF-8: byte {error.object[error.start]:#x} at {error.start:,}"
        ) from None
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"the line is no JSON: {error.msg} at {error.pos:,}") from None
    except RecursionError:
        raise InvalidRequest("the line is no request: its JSON is nested too deeply") from None
    except ValueError as error:
        raise InvalidRequest(f"the line is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise InvalidRequest(f"a line is an object like {EXAMPLE}, unlike {found!r:.80}")
    return found


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number")


def _identity(found: dict[str, Any]) -> str | int | None:
    identity = found.get("id", found.get("custom_id"))
    if isinstance(identity, bool) or not isinstance(identity, (str, int, type(None))):
        raise InvalidRequest(f"id is {identity!r:.80}; it must be a string or an integer")
    return identity


def _body(found: dict[str, Any]) -> dict[str, Any]:
    """A line of OpenAI's batch files, as one of ours."""
    body, url = found["body"], found.get("url") or ""
    if not isinstance(body, dict):
        raise InvalidRequest(f"body is {body!r:.80}; it must be an object")
    if not isinstance(url, str) or (url and not url.endswith("/completions")):
        raise InvalidRequest(f"url is {url!r:.80}; only /v1/chat/completions and /v1/completions")
    _refuse_others(body, _OF_A_BODY | _OPTIONS)
    if body.get("stream"):
        raise InvalidRequest("stream is true; a batch gives whole answers, so leave it out")
    most = body.get("max_completion_tokens")
    return body if most is None else body | {"max_tokens": most}


def _refuse_others(found: dict[str, Any], known: set[str]) -> None:
    for name in found.keys() - known:
        meant = difflib.get_close_matches(name, known, 1)
        raise InvalidRequest(
            f"{name!r:.80} is no option of a request{f'; {meant[0]} is' if meant else ''}. What is "
            "for yourself goes into metadata, which comes back with the answer."
        )


def _by_token_id(biases: dict[str, Any]) -> dict[int, Any]:
    """JSON has strings for keys."""
    try:
        return {int(token): bias for token, bias in biases.items()}
    except ValueError:
        raise InvalidRequest(f"logit_bias is {biases!r:.80}; its keys must be token ids") from None


# -- answers --


def answered(line: Line, output: RequestOutput) -> dict[str, Any]:
    record = _about(line) | _with_logprobs(output)
    if output.choices:
        record["choices"] = [_with_logprobs(choice) for choice in output.choices]
    return record


def failed(line: Line, error: Exception) -> dict[str, Any]:
    return _about(line) | {"error": {"type": type(error).__name__, "message": str(error)}}


def _about(line: Line) -> dict[str, Any]:
    record: dict[str, Any] = {"line": line.number}
    if line.id is not None:
        record["id"] = line.id
    if line.metadata is not None:
        record["metadata"] = line.metadata
    return record | {"digest": line.digest}


def _with_logprobs(output: RequestOutput) -> dict[str, Any]:
    record = answer(output)
    for name in ("logprobs", "prompt_logprobs"):
        if (entries := getattr(output, name)) is not None:
            record[name] = [entry and asdict(entry) for entry in entries]
    return record


class AnswerFile:
    """A file of answers, each of which is there to the end once `write` has returned."""

    def __init__(self, path: Path, resume: bool):
        """Opens it, for this process alone. `resume` goes on with what is in it: `done` has the
        digests of the lines that are answered. A last line that is only half there, and those that
        tell of errors, are taken out: they are asked for again.

        Raises OSError if it can't be written, and InvalidRequest if it has answers and isn't to be
        resumed, or has something else in it.
        """
        self.path = path
        self.done: dict[int, str] = {}
        if path.exists() and not path.is_file():  # a device, or a folder, which raises
            self._file = open(path, "wb")  # noqa: SIM115
            return
        self._file = open(path, "a+b")  # noqa: SIM115
        self._lock(self._file)
        self._file.seek(0)
        if not resume:
            if lines := sum(1 for _ in self._file):
                raise InvalidRequest(
                    f"{path} has {lines:,} lines already: --resume goes on where they end; to "
                    "begin anew, remove it or write to another file"
                )
            return
        if self._take_down():
            self._keep_whole()

    def _lock(self, file: BinaryIO) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidRequest(f"another process is writing to {self.path}") from None
        except OSError:  # a file system without locks
            pass

    def _take_down(self) -> bool:
        """Fills `done`; returns whether something has to be taken out."""
        is_whole = True
        for number, data in enumerate(self._file, 1):
            found = self._found(number, data)
            if found is None:
                is_whole = False
            else:
                self.done[found["line"]] = found["digest"]
        return not is_whole

    def _found(self, number: int, data: bytes) -> dict[str, Any] | None:
        """A line's answer; None of one that tells of an error or is only half there."""
        if not data.endswith(b"\n") and data[: len(_BEGIN)] == _BEGIN[: len(data)]:
            return None
        with suppress(ValueError, RecursionError, TypeError, KeyError):
            found = json.loads(data)
            if isinstance(found["line"], int) and isinstance(found["digest"], str):
                return None if "error" in found else found
        raise InvalidRequest(
            f"line {number:,} of {self.path} is no answer of `mlxpage batch`; write to another file"
        )

    def _keep_whole(self) -> None:
        """Puts a file with the answers alone in the place of this one."""
        path = Path(os.path.realpath(self.path))
        kept = path.with_name(f"{path.name}.resumed")
        file = open(kept, "wb")  # noqa: SIM115
        try:
            self._lock(file)
            self._file.seek(0)
            file.writelines(
                data for n, data in enumerate(self._file, 1) if self._found(n, data) is not None
            )
            file.flush()
            os.fsync(file.fileno())
            shutil.copymode(path, kept)
            os.replace(kept, path)
        except BaseException:
            file.close()
            kept.unlink(missing_ok=True)
            raise
        self._file.close()
        self._file = file

    def write(self, line: str) -> None:
        """Raises OSError."""
        self._file.write(line.encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        with suppress(OSError):  # that `write` has raised
            self._file.close()
