"""llama.cpp as a judge of a GGUF file: what it makes of the weights and the vocabulary in it.

    with LlamaCpp(Path("model.gguf"), context=1024, threads=2) as judge:
        tokens = [choice.token for choice in judge.greedy([15, 7], 64)]

Its server gives no logits. It gives the log-probabilities of the likeliest tokens and of the token that it generates,
from the logits before biases, temperature and sampling (its pull request 10783). A bias makes it generate any token, so
one request with one new token measures one position. It keeps the keys and values of the prompt for the next request.
"""

import contextlib
import http.client
import importlib.util
import json
import math
import secrets
import subprocess
import sys
import tempfile
import urllib.parse
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

from fastgpt.errors import RunFailed, UsageError
from fastgpt.system.units import counted

SERVER = Path(__file__).with_name("llama_cpp_server.py")
PATIENCE = 600  # seconds that one request may take
FORCING = 1e9  # added to a logit: no other is larger


class Choice(NamedTuple):
    """The likeliest token, and how much larger its logit is than the second one's."""

    token: int
    margin: float


class LlamaCpp:
    """A GGUF file in llama.cpp on the CPU, in a process that ends with this object or at `close`.

    Args:
        context: tokens of the longest sequence; at most the model's own context.

    Raises:
        RunFailed: llama.cpp cannot load the file.
        UsageError: xllamacpp is not installed.
    """

    def __init__(self, path: Path, context: int, threads: int):
        if importlib.util.find_spec("xllamacpp") is None:
            raise UsageError("llama.cpp needs the xllamacpp library; pip install xllamacpp")
        self.context, self._key = context, secrets.token_hex()
        errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        # -P: no file beside the server's, such as one named like a module of Python's, can be imported.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(SERVER), str(path), str(context), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        self._end = weakref.finalize(self, _end, self._process, errors)
        self._address = urllib.parse.urlsplit(self._started(path, errors)).netloc
        self._spoken = self._token_with_text()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._end()

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text, in which the names of special tokens are text too."""
        return self._ask("/tokenize", {"content": text, "add_special": True, "parse_special": False})["tokens"]

    def greedy(self, prompt: Sequence[int], count: int) -> list[Choice]:
        """The likeliest continuation of `count` tokens, past a token that ends a text."""
        self._check_length(len(prompt) + count)
        tokens, choices = list(prompt), []
        for _ in range(count):
            first, *others = self._measured(tokens, self._spoken, 2)["top_logprobs"]
            choices.append(Choice(first["id"], first["logprob"] - (others[0]["logprob"] if others else -math.inf)))
            tokens.append(first["id"])
        return choices

    def perplexity(self, tokens: Sequence[int]) -> float:
        """exp of the mean cross-entropy, in nats, of all tokens but the first, each after all before it."""
        self._check_length(len(tokens))
        lost = [-self._log_probability(tokens[:i], tokens[i]) for i in range(1, len(tokens))]
        return math.exp(sum(lost) / len(lost))

    def _log_probability(self, before: Sequence[int], token: int) -> float:
        # Of a part of a character it reports nothing, or fails, by its version. Then all tokens are asked for.
        with contextlib.suppress(RunFailed):
            if measured := self._measured(before, token, 1):
                return measured["logprob"]
        every = self._measured(before, self._spoken, self._tokens)["top_logprobs"]
        return next(entry["logprob"] for entry in every if entry["id"] == token)

    def _measured(self, before: Sequence[int], forced: int, likeliest: int) -> Any:
        """Its log-probabilities after some tokens; None if the text of the forced one is no whole character."""
        request = {
            "prompt": list(before),
            "n_predict": 1,
            "n_probs": likeliest,
            "logit_bias": [[forced, FORCING]],
            "samplers": ["top_k"],
            "top_k": 1,
            "cache_prompt": True,
        }
        answer = self._ask("/completion", request).get("completion_probabilities")
        return answer[0] if answer else None

    def _token_with_text(self) -> int:
        """A token that is no part of a character."""
        self._tokens = self._ask("/v1/models", None)["data"][0]["meta"]["n_vocab"]
        return next(token for token in range(self._tokens) if self._measured([0], token, 1))

    def _check_length(self, length: int) -> None:
        if length > self.context:
            raise ValueError(f"{counted(length, 'token')} do not fit into a context of {self.context}")

    def _started(self, path: Path, errors: IO[bytes]) -> str:
        """The server's address."""
        process: Any = self._process  # whose streams are there, as its type cannot say
        with contextlib.suppress(BrokenPipeError):  # it has ended already, as the missing address says too
            process.stdin.write(f"{self._key}\n")
            process.stdin.flush()
        if address := process.stdout.readline().strip():
            return address
        process.wait()
        errors.seek(0)
        lines = errors.read().decode(errors="replace").strip().splitlines() or ["its process has ended"]
        self.close()
        # The first line of its log has the reason, after time and level; of a traceback, the last.
        said = lines[-1] if lines[0].startswith("Traceback") else lines[0]
        raise RunFailed(f"llama.cpp cannot load {path}: {said.partition(' E ')[2] or said}")

    def _ask(self, route: str, question: Any) -> Any:
        method, body = ("GET", None) if question is None else ("POST", json.dumps(question))
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        # A new connection for each: the server ends one that is silent for some seconds.
        connection = http.client.HTTPConnection(self._address, timeout=PATIENCE)
        try:
            connection.request(method, route, body, headers)
            response = connection.getresponse()
            answer = json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise RunFailed(f"llama.cpp gives no answer: {error or type(error).__name__}") from None
        finally:
            connection.close()
        if response.status != http.client.OK:
            raise RunFailed(f"llama.cpp refuses: {answer['error']['message']}")
        return answer


def _end(process: subprocess.Popen, errors: IO[bytes]) -> None:
    process.kill()
    process.communicate()
    errors.close()
