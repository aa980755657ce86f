"""A language model as a judge of two answers, asked over an OpenAI-compatible chat-completions endpoint.

The prompt is FastChat's for the Vicuna questions: two scores from 1 to 10 on the first line, then the reasons. Every
reply is kept on disk under the hash of its request the moment it arrives, so a killed or failed run pays for nothing
twice. Faults that may pass (429, 5xx, time-outs, cut-off or unreadable bodies) are retried with growing pauses. An item
that the server refuses (too long, filtered) or about which the judge says nothing is final: it is kept as such.
"""

import hashlib
import json
import math
import os
import re
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import tenacity

from almost_jax.errors import InputError
from almost_jax.io.records import write_bytes

# Of a run's folder, outside every stage's outputs: what is paid for outlives the settings it was paid under. Names are
# hashes of what was asked, so all stages share it.
REPLIES = "judge_replies"

SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."

# The words and the layout of FastChat's reviews: scores compare with recorded ones only when these are the same.
TEMPLATE = """[Question]
{question}

[The Start of Assistant 1's Answer]
{first}

[The End of Assistant 1's Answer]

[The Start of Assistant 2's Answer]
{second}

[The End of Assistant 2's Answer]

[System]
We would like to request your feedback on the performance of two AI assistants in response to the user question \
displayed above.
Please rate the helpfulness, relevance, accuracy, level of details of their responses. Each assistant receives an \
overall score on a scale of 1 to 10, where a higher score indicates better overall performance.
Please first output a single line containing only two values indicating the scores for Assistant 1 and 2, \
respectively. The two scores are separated by a space. In the subsequent line, please provide a comprehensive \
explanation of your evaluation, avoiding any potential bias and ensuring that the order in which the responses were \
presented does not affect your judgment.

"""

_NUMBER = r"(\d+(?:\.\d+)?)(?:\s*/\s*10)?"
_SCORES = re.compile(rf"{_NUMBER}(?:\s*,\s*|\s+){_NUMBER}")
_TOP = 10.0
_CHARACTERS_PER_TOKEN = 3  # on the careful side for English
_PASSING = (408, 409, 425, 429)
# What a server says of the one item that it was sent: too long, filtered, not to be processed.
_OF_THE_ITEM = (400, 413, 414, 422)


@dataclass(frozen=True)
class Endpoint:
    """Where the judge is and how it is asked.

    Attributes:
        url: the base, such as https://api.openai.com/v1; /chat/completions is added.
        model: the model's name there.
        key_variable: the environment variable that holds the key; unset means that no key is sent.
        timeout: seconds to wait for a connection, and between two parts of a reply.
        attempts: how often one item is tried in a run, at least 1.
        pause: seconds before the second try; doubled each time, with jitter, up to 60.
        concurrency: requests in flight at once, at least 1.
        reply_tokens: the most tokens of a reply.
        max_requests: the most requests in a run, failed ones counted.
        max_tokens: the most tokens in a run, prompts and replies together.
    """

    url: str
    model: str
    key_variable: str
    timeout: float
    attempts: int
    pause: float
    concurrency: int
    reply_tokens: int
    max_requests: int
    max_tokens: int


@dataclass(frozen=True)
class Reply:
    """What came of one item.

    Attributes:
        text: the judge's; None when no reply came.
        error: why none came.
        refused: why the text is empty for good, in the words of the server or the judge; asking again changes nothing.
    """

    text: str | None
    error: str | None = None
    refused: str | None = None


@dataclass
class Spent:
    """What a run used: requests sent, tokens (billed, or feared to be), replies taken from the disk."""

    requests: int = 0
    tokens: int = 0
    cached: int = 0


class _Passing(Exception):
    """A fault that may be gone at the next try; `after` is how long the server asks to wait, in seconds."""

    def __init__(self, message: str, after: float = 0.0) -> None:
        super().__init__(message)
        self.after = after


class _Refused(Exception):
    """The server refuses this one item, for good."""


class _CapReached(Exception):
    """The next request could go over the run's cap."""


def parse_scores(text: str) -> tuple[float, float] | None:
    """The two scores on a reply's first line ("8 9", "8, 9" or "8/10 9/10"); None when it hasn't two from 0 to 10."""
    match = _SCORES.fullmatch(text.lstrip().split("\n", 1)[0].strip())
    if match is None:
        return None
    first, second = float(match[1]), float(match[2])
    return (first, second) if max(first, second) <= _TOP else None


class Judge:
    """Asks for replies, at most once for each content: one object serves one run and holds what it spent."""

    def __init__(self, endpoint: Endpoint, cache: Path) -> None:
        """Prepare; nothing is sent.

        Args:
            endpoint: where and how to ask.
            cache: the folder of replies, one file each; made when absent.

        Raises:
            InputError: a setting that can't be, a key that no header can hold, or a folder that can't be written to.
        """
        if not endpoint.url.startswith(("http://", "https://")):
            raise InputError(f"judge url {endpoint.url!r}: expected http://... or https://...")
        for name in ("attempts", "concurrency", "reply_tokens"):
            if getattr(endpoint, name) < 1:
                raise InputError(f"judge {name} is {getattr(endpoint, name)}; expected at least 1")
        if not endpoint.timeout > 0:
            raise InputError(f"judge timeout is {endpoint.timeout}; expected seconds above 0")
        self.endpoint, self.cache, self.spent = endpoint, Path(cache), Spent()
        self._key = os.environ.get(endpoint.key_variable, "").strip()
        if not (self._key.isascii() and (self._key.isprintable() or not self._key)):
            raise InputError(f"{endpoint.key_variable}: holds characters that no HTTP header can; expected plain ASCII")
        self._lock = threading.Lock()
        try:
            # A reply that is paid for must find its place.
            self.cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.cache):
                pass
        except OSError as error:
            raise InputError(f"{self.cache}: can't keep the judge's replies ({error.strerror})") from error

    def ask(self, chats: Sequence[list[dict[str, str]]]) -> list[Reply]:
        """A reply for each chat, in order. Equal chats are asked once; what is on disk isn't asked at all.

        Raises:
            InputError: the server refuses the request itself (a wrong key, model or address), or every single item;
                replies that came before are kept.
        """
        bodies = {self._name(chat): self._body(chat) for chat in chats}
        found = {name: reply for name in bodies if (reply := self._stored(name)) is not None}
        self.spent.cached += len(found)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        missing = [name for name in bodies if name not in found]
        refused: dict[str, Reply] = {}
        with httpx2.Client(headers=headers, timeout=self.endpoint.timeout) as client:
            pool = ThreadPoolExecutor(self.endpoint.concurrency)
            closing = threading.Event()
            try:
                asked = {pool.submit(self._one, client, name, bodies[name], closing): name for name in missing}
                for future in as_completed(asked):
                    try:
                        found[asked[future]] = future.result()
                    except _Refused as fault:
                        refused[asked[future]] = Reply("", refused=str(fault))
            finally:
                # After a refusal, Ctrl-C or SIGTERM: nothing new is sent, nobody waits to try again, replies under way
                # are still kept.
                closing.set()
                pool.shutdown(cancel_futures=True)
        if refused and not any(reply.text for reply in found.values()):
            # Then it isn't the items.
            reason = next(iter(refused.values())).refused
            raise InputError(f"judge {self.endpoint.url}: refused all that it was asked with {reason}")
        for name, reply in refused.items():
            self._keep(name, reply)
        found |= refused
        return [found[self._name(chat)] for chat in chats]

    def _body(self, chat: list[dict[str, str]]) -> dict[str, Any]:
        return {
            "model": self.endpoint.model,
            "messages": chat,
            "temperature": 0.0,
            "max_tokens": self.endpoint.reply_tokens,
        }

    def _name(self, chat: list[dict[str, str]]) -> str:
        """The hash of all that a reply depends on."""
        content = json.dumps([self.endpoint.url.rstrip("/"), self._body(chat)], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def _stored(self, name: str) -> Reply | None:
        try:
            kept = json.loads((self.cache / f"{name}.json").read_text(encoding="utf-8"))
            text, refused = kept["text"], kept.get("refused")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.cache / name}.json: no reply of a judge ({error}); delete it to ask anew"
            ) from error
        return Reply(_as_text(str(text)), refused=None if refused is None else str(refused))

    def _keep(self, name: str, reply: Reply) -> None:
        stored = {"text": reply.text, "model": self.endpoint.model}
        if reply.refused is not None:
            stored["refused"] = reply.refused
        write_bytes(self.cache / f"{name}.json", json.dumps(stored).encode())

    def _one(self, client: httpx2.Client, name: str, body: dict[str, Any], closing: threading.Event) -> Reply:
        growing = tenacity.wait_random_exponential(multiplier=self.endpoint.pause, max=60)

        def pause(state: tenacity.RetryCallState) -> float:
            fault = state.outcome.exception() if state.outcome else None
            return max(growing(state), fault.after if isinstance(fault, _Passing) else 0.0)

        def send() -> Reply:
            if closing.is_set():
                raise _Passing("stopped before it was asked again")
            return self._send(client, body)

        retrying = tenacity.Retrying(
            sleep=tenacity.sleep_using_event(closing),
            stop=tenacity.stop_after_attempt(self.endpoint.attempts) | tenacity.stop_when_event_set(closing),
            wait=pause,
            retry=tenacity.retry_if_exception_type(_Passing),
            reraise=True,
        )
        try:
            reply = retrying(send)
        except (_Passing, _CapReached) as error:
            return Reply(None, str(error))
        self._keep(name, reply)
        return reply

    def _send(self, client: httpx2.Client, body: dict[str, Any]) -> Reply:
        feared = self._reserve(body)
        try:
            response = client.post(f"{self.endpoint.url.rstrip('/')}/chat/completions", json=body)
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            self._settle(feared, 0)
            raise _Passing(f"no connection ({type(error).__name__})") from None
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            # It may have been billed: what was set aside stays spent.
            raise _Passing(f"no whole reply ({type(error).__name__})") from None
        if response.status_code in _PASSING or response.status_code >= 500:
            self._settle(feared, 0)
            raise _Passing(f"HTTP {response.status_code}", _seconds(response.headers.get("retry-after")))
        if response.status_code != 200:
            self._settle(feared, 0)
            said = f"HTTP {response.status_code}: {self._excerpt(response.text, 300)}"
            if response.status_code in _OF_THE_ITEM:
                raise _Refused(said)
            raise InputError(f"judge {self.endpoint.url}: refused with {said}")
        return self._content(response, feared)

    def _content(self, response: httpx2.Response, feared: int) -> Reply:
        try:
            found = response.json()
            choice = found["choices"][0]
            message = choice["message"]
            text = message.get("content") if "refusal" in message else message["content"]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise _Passing(f"a body that is no chat completion: {self._excerpt(response.text, 80)}") from None
        if text is not None and not isinstance(text, str):
            raise _Passing(f"a chat completion without text: {self._excerpt(str(text), 80)}")
        usage = found.get("usage")
        billed = usage.get("total_tokens") if isinstance(usage, dict) else None
        self._settle(feared, billed if isinstance(billed, int) else feared)
        if text is None:
            # Billed all the same, and the next time would be too.
            why = message.get("refusal") or choice.get("finish_reason")
            return Reply("", refused=f"no text ({self._excerpt(str(why), 300)})")
        return Reply(_as_text(text))

    def _excerpt(self, text: str, size: int) -> str:
        """The start of what a server said, as `repr` has it on one line, without the key: some repeat it."""
        said = " ".join(text.split())
        return ascii((said.replace(self._key, "[key]") if self._key else said)[:size])

    def _reserve(self, body: dict[str, Any]) -> int:
        """Count a request and set its tokens aside, so that requests in flight can't go over the cap together."""
        characters = sum(len(message["content"]) for message in body["messages"])
        feared = characters // _CHARACTERS_PER_TOKEN + self.endpoint.reply_tokens
        with self._lock:
            if self.spent.requests + 1 > self.endpoint.max_requests:
                raise _CapReached(f"not asked: the cap of {self.endpoint.max_requests} requests is reached")
            if self.spent.tokens + feared > self.endpoint.max_tokens:
                raise _CapReached(f"not asked: the cap of {self.endpoint.max_tokens} tokens would be passed")
            self.spent.requests += 1
            self.spent.tokens += feared
        return feared

    def _settle(self, feared: int, billed: int) -> None:
        with self._lock:
            self.spent.tokens += billed - feared


def _as_text(text: str) -> str:
    """A text that UTF-8 can hold: JSON's escapes can name halves of surrogate pairs."""
    return text.encode("utf-8", "replace").decode()


def _seconds(header: str | None) -> float:
    """A Retry-After in seconds, at most a minute; dates and nonsense count as none."""
    try:
        seconds = float(header or 0)
    except ValueError:
        return 0.0
    return min(seconds, 60.0) if math.isfinite(seconds) and seconds > 0 else 0.0
