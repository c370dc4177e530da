"""A model for EleutherAI's lm-evaluation-harness (`lm_eval`), which gives it requests and scores its answers.

`register` makes it known there as `fastgpt`. Its results are those of the harness's own model `hf` on the same weights:
boundaries of tokens, cut contexts and windows are the same, see `fastgpt.evaluation.likelihood`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lm_eval import utils  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]

from fastgpt.config.generation import SamplingParams
from fastgpt.errors import RunFailed, UsageError, nearest, shown
from fastgpt.evaluation.likelihood import BATCH_SIZE, Likelihood, Request, encode_pair, log_likelihoods
from fastgpt.generation.load import load
from fastgpt.generation.settings import sampling
from fastgpt.system.bars import bar

NAME = "fastgpt"
DEFAULT_DEVICE = "cuda:0"  # of lm_eval, whether or not there is one
LENGTHS = (
    "max_gen_toks",
    "max_new_tokens",
    "max_tokens",
    "max_completion_tokens",
)  # all for one setting
DRAWING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


def register() -> None:
    """Make the model known to lm_eval, beside its own ones."""
    import lm_eval.models  # noqa: F401 # pyright: ignore[reportMissingImports] - or lm_eval would not load them later

    register_model(NAME)(HarnessModel)


class HarnessModel(LM):
    """A model with the interface of lm_eval. Its arguments are the harness's model_args."""

    def __init__(
        self,
        pretrained: str = "out",
        *,
        device: str | None = None,
        dtype: str = "auto",
        kernels: str = "auto",
        quantize: str = "none",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_gen_toks: int = 256,
        prefix_token_id: int | None = None,
        **unknown: Any,
    ):
        """
        Args:
            pretrained: the model, as `fastgpt.load` takes it.
            device: default auto. So is "cuda:0", lm_eval's own default, where there is no CUDA GPU.
            batch_size: sequences that run at once; 1, lm_eval's default, and "auto" are 64.
            max_batch_size: for lm_eval's search for a batch size, which is not needed here.
            max_gen_toks: tokens of an answer, where the task does not say.
            prefix_token_id: the token before a text without a context; default: the vocabulary's start token.

        Raises:
            UsageError: an unknown argument, or a model that cannot be read.
        """
        super().__init__()
        known = (
            "pretrained",
            "device",
            "dtype",
            "kernels",
            "quantize",
            "batch_size",
            "max_gen_toks",
            "prefix_token_id",
        )
        for name in unknown:
            raise UsageError(
                f"model_args: unknown argument {name!r}{nearest(name, known)}; there are {', '.join(known)}"
            )
        opened = load(str(pretrained), device=_device(device), dtype=dtype, kernels=kernels, quantize=quantize)
        self.generator, self.model, self.tokenizer = opened, opened.model, opened.tokenizer
        if prefix_token_id is not None:
            try:
                self.tokenizer = self.tokenizer.starting_from(prefix_token_id)
            except ValueError:
                count = self.tokenizer.vocab_size
                raise UsageError(f"prefix_token_id {shown(prefix_token_id)} is no token of {count:,}") from None
        self.block_size, self.max_gen_toks = self.model.config.block_size, max_gen_toks
        self.max_batch = _batch_size(batch_size)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The log-probability of each continuation, and whether it is the greedy one; see lm_eval's `LM`."""
        pairs = [encode_pair(self.tokenizer, *request.args) for request in requests]
        found = [(own.nats, own.greedy) for own in self._likelihoods(pairs)]
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text after the start token, in windows with as much context as fits."""
        windows = [self._windows(*request.args) for request in requests]
        found = iter(self._likelihoods([window for of_one in windows for window in of_one]))
        sums = [sum(next(found).nats for _ in of_one) for of_one in windows]
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """A continuation of each context, without the stop text that ends it."""
        prompts, params = [], []
        for context, settings in (request.args for request in requests):
            params.append(self._sampling(settings))
            ids = self.tokenizer.encode(context).tolist() or [self.tokenizer.start_token]
            prompts.append(ids[-(self.block_size - params[-1].max_new_tokens) :])
        engine, texts = self.generator.engine(max_batch=self.max_batch), [""] * len(requests)
        with bar("generate", len(requests), "answers") as advance:
            for piece in engine.stream(prompts, params):
                if piece.completion is not None:
                    if piece.completion.error is not None:
                        raise RunFailed(piece.completion.error)
                    texts[piece.index] = piece.completion.text
                    advance(1)
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _likelihoods(self, requests: Sequence[Request]) -> list[Likelihood]:
        with bar("likelihoods", len(requests), "requests") as advance:
            return log_likelihoods(self.model, requests, batch_size=self.max_batch, advance=advance)

    def _windows(self, text: str) -> list[Request]:
        windows = utils.get_rolling_token_windows(
            token_list=self.tokenizer.encode(text).tolist(),
            prefix_token=self.tokenizer.start_token,
            max_seq_len=self.block_size,
            context_len=1,
        )
        return [Request(*map(tuple, utils.make_disjoint_window(window))) for window in windows]

    def _sampling(self, given: Mapping[str, Any]) -> SamplingParams:
        """The settings of a task's `generation_kwargs`. Raises `UsageError` for one that there is not here."""
        settings = dict(given)
        stop, drawn = settings.pop("until", None) or (), settings.pop("do_sample", None)
        lengths = [settings.pop(name, None) for name in LENGTHS]
        length = next((int(one) for one in lengths if one is not None), self.max_gen_toks)
        if length >= self.block_size:
            raise UsageError(
                f"max_gen_toks {length} leaves no room for a context in the model's block_size {self.block_size}; "
                "pass a smaller one by --gen_kwargs max_gen_toks=N"
            )
        for name in settings:
            if name not in DRAWING:
                raise UsageError(f"generation_kwargs: unknown setting {name!r}{nearest(name, DRAWING)}")
        settings = {"temperature": 1.0 if drawn else 0.0, "top_k": 0} | settings
        if drawn is False:
            settings["temperature"] = 0.0
        texts = tuple(text for text in ((stop,) if isinstance(stop, str) else stop) if text)
        end = self.tokenizer.end_token
        return sampling(
            {**settings, "max_new_tokens": length, "stop": texts, "stop_tokens": () if end is None else (end,)}
        )


def _device(given: str | None) -> str:
    return "auto" if given is None or (given == DEFAULT_DEVICE and not torch.cuda.is_available()) else given


def _batch_size(given: int | str) -> int:
    """The number of sequences that run at once. Raises `UsageError` for no number."""
    if str(given).startswith("auto"):
        return BATCH_SIZE
    if not str(given).isdecimal() or int(given) < 1:
        raise UsageError(f"`batch_size` {shown(given)} is not a whole number above 0, or auto")
    return BATCH_SIZE if int(given) == 1 else int(given)
