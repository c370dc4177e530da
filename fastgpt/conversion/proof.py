"""Proves a conversion: the program that a format is for loads the result and must compute what ours computes.

Where that program gives logits, they are compared on a fixed text, and 32 greedy tokens must be the same up to a
near-tie. llama.cpp gives no logits of a prompt, so its perplexity is compared. Our own format must hold the same bits.
"""

import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastgpt.checkpoint.source import Source, open_model
from fastgpt.config.conversion import ConvertConfig
from fastgpt.conversion.llama_cpp import LlamaCpp
from fastgpt.errors import RunFailed, UsageError
from fastgpt.interchange.exported import DTYPES
from fastgpt.interchange.huggingface import HEAD
from fastgpt.model.gpt import GPT
from fastgpt.model.kv_cache import DenseCache
from fastgpt.ops import table
from fastgpt.system.units import counted
from fastgpt.tokenizer.base import Tokenizer

TEXT = """A language model reads a text one token at a time, and each time it says how likely every other token is to be
the next one. Two programs that hold the same weights must say the same, whatever the text is about. So this one has a
little of everything: numbers such as 3, 17 and 1,024; a line of code, def add(x, y): return x + y; a question, is it
done? And a few words in a row that nobody would guess: copper, seldom, violin, between, eleven.

The king said to his servant: "Go and see who is at the door, for I have heard a knock." The servant went, and he came
back, and he said that there was nobody, only the wind and the rain. "Then shut it," said the king, "and let us go on
with the game." They played until the lamp went out. In the morning the rain had stopped, the garden was full of light,
and the two of them walked along the river to the old mill, where the children were waiting with bread and apples.

What a model has learned shows in such lines: after "the" comes a noun, a bracket that opens will close, and a name that
was said once is likely to be said again. It's the same in each program, up to the last digits.
"""
LOGITS = {"float32": 1e-5, "float16": 2e-2, "bfloat16": 2e-2}  # largest difference over the largest logit
PERPLEXITY = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 1e-2, "q8_0": 1e-2}  # relative difference
GELUS = {"gelu": "GELU's tanh form", "gelu_exact": "the exact GELU"}
NEAR_TIE = 1e-2  # the two best logits' distance, below which either may win
GREEDY, TOKENS, FEWEST = 32, 256, 64
PACKAGES = {"huggingface": ("transformers",), "gguf": ("xllamacpp",), "nanogpt": (), "fastgpt": ()}
Logits = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Reference:
    """Our model in float32, and the tokens of the proof.

    Attributes:
        text: the fixed text, as far as the vocabulary can spell it.
        tokens: int64 (1, T): the text's first; of a vocabulary that cannot spell it, some that were drawn.
        path: int64 (1, P + N): the first of these, and after them the likeliest token each time.
        prompt: P.
        sure: how many of the N come before a near-tie.
    """

    model: GPT
    text: str
    tokens: torch.Tensor
    path: torch.Tensor
    prompt: int
    sure: int

    @property
    def greedy(self) -> list[int]:
        """The likeliest tokens before a near-tie."""
        return self.path[0, self.prompt : self.prompt + self.sure].tolist()

    @property
    def agreement(self) -> str:
        """The number of greedy tokens that were compared and are the same, in words."""
        said = f"{counted(self.sure, 'greedy token')} the same"
        return said if self.sure == self.path.shape[1] - self.prompt else f"{said} before a near-tie"


def check_peer(config: ConvertConfig) -> None:
    """Raise `UsageError` if a proof was asked for and the program for it is missing."""
    if config.verify and (reason := _missing(config)):
        raise UsageError(f"`verify`: {reason}")


def prove(config: ConvertConfig, source: Source, result: Path) -> str | None:
    """Compare what was written with the model; a line that says how they compare.

    None where they are not compared; stderr says why.

    Raises:
        RunFailed: they compute something else.
    """
    if config.verify is False:
        return None
    if reason := _missing(config):
        print(f"not verified: {reason}", file=sys.stderr)
        return None
    try:
        return PROOFS[config.format or ""](config, source, result)
    except (RunFailed, UsageError):
        raise
    except Exception as error:  # whatever another program raises, it cannot run the result
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RunFailed(f"the program for `format` {config.format} fails on the result: {reason:.300}") from error


@torch.no_grad()
def approximation(original: Source, source: Source) -> str:
    """Describe the largest change of the logits with another form of GELU."""
    tokens = reference(original).tokens
    before, after = (_model(one)(tokens) for one in (original, source))
    moved = _difference(after, before)
    return f"{GELUS[source.config.mlp]} for {GELUS[original.config.mlp]}; logits move by {moved:.1e} of the largest"


@torch.no_grad()
def reference(source: Source) -> Reference:
    """The model, and what it says to the proof's text."""
    model, tokenizer = _model(source), source.required_tokenizer()
    V, block = model.config.known_vocab, model.config.block_size
    text = _spelled(tokenizer)
    spelled = torch.from_numpy(tokenizer.encode(text))
    if len(spelled) < FEWEST:
        spelled = torch.randint(V, (TOKENS,), generator=torch.Generator().manual_seed(0))
    tokens = spelled[: min(TOKENS, block)][None]
    new = min(GREEDY, block - 1)
    path = latest = tokens[:, : max(1, block - new)]
    prompt, sure, cache = path.shape[1], None, DenseCache(model.config)
    for at in range(new):
        best = model(latest, cache=cache, last_only=True)[0, -1].topk(min(2, V))
        if sure is None and float(best.values[0] - best.values[-1]) < NEAR_TIE:
            sure = at
        latest = best.indices[None, :1]
        path = torch.cat([path, latest], dim=1)
    return Reference(model, text, tokens, path, prompt, new if sure is None else sure)


def _model(source: Source) -> GPT:
    config = source.config
    return GPT.from_weights(config, table.resolve("torch"), source.weights(config), torch.device("cpu"), torch.float32)


def _spelled(tokenizer: Tokenizer) -> str:
    """The fixed text without the characters that the vocabulary lacks."""
    try:
        tokenizer.encode(TEXT)
        return TEXT
    except UsageError:
        known = {char for char in set(TEXT) if char.encode() in map(tokenizer.token_bytes, range(tokenizer.vocab_size))}
        return "".join(char for char in TEXT if char in known)


def _missing(config: ConvertConfig) -> str | None:
    if missing := [name for name in PACKAGES[config.format or ""] if importlib.util.find_spec(name) is None]:
        return f"{missing[0]} is not installed; pip install {missing[0]}"
    if config.format == "nanogpt" and config.nanogpt is None:
        return "nanoGPT is no package; name a checkout of it by `nanogpt`"
    return None


def _compare_logits(name: str, config: ConvertConfig, known: Reference, logits: Logits) -> str:
    """Compare logits and greedy tokens with another program's. Raises `RunFailed` if they differ."""
    with torch.no_grad():
        ours, theirs = known.model(known.tokens), logits(known.tokens).float()
        difference, limit = _difference(theirs, ours), LOGITS[config.dtype]
        if not difference <= limit:
            raise RunFailed(
                f"{name} computes other logits: they differ by {difference:.1e} of the largest, not {limit}"
            )
        said = f"verified with {name}: logits differ by {difference:.1e} of the largest (at most {limit})"
        if config.dtype != "float32":
            return said
        theirs = logits(known.path)[0, known.prompt - 1 :].argmax(-1)[: known.sure].tolist()
    if theirs != known.greedy:
        raise RunFailed(f"{name} continues otherwise: {theirs}, not {known.greedy}")
    return f"{said}, {known.agreement}"


def _difference(theirs: torch.Tensor, ours: torch.Tensor) -> float:
    """The largest difference over the largest logit, which may be zero."""
    return float((theirs - ours).abs().max() / ours.abs().max().clamp(min=torch.finfo(torch.float32).tiny))


def _huggingface(config: ConvertConfig, source: Source, folder: Path) -> str:
    import transformers  # pyright: ignore[reportMissingImports]

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    known = reference(source)
    opened: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    model, loaded = opened
    # It only warns of tensors that it lacks or has no place for. The tied output layer is not in the file.
    if differing := sorted({*loaded["unexpected_keys"], *loaded["missing_keys"]} - {HEAD}):
        raise RunFailed(f"transformers' model and the file differ by the tensor {differing[0]}")
    theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ours = source.required_tokenizer().encode(known.text).tolist()
    if theirs(known.text)["input_ids"] != ours or theirs.decode(ours) != known.text:
        raise RunFailed(f"transformers' tokenizer reads or writes {known.text!r:.40} otherwise than ours")
    return _compare_logits("transformers", config, known, lambda tokens: model.eval()(tokens).logits)


def _llama_cpp(config: ConvertConfig, source: Source, file: Path) -> str:
    known, limit = reference(source), PERPLEXITY[config.dtype]
    tokens = known.tokens[0]
    print(f"verifying with llama.cpp: the perplexity of {counted(len(tokens), 'token')}", file=sys.stderr)
    with LlamaCpp(file, known.model.config.block_size, torch.get_num_threads()) as judge:
        if judge.tokenize(known.text) != source.required_tokenizer().encode(known.text).tolist():
            raise RunFailed(f"llama.cpp's tokenizer reads {known.text!r:.40} otherwise than ours")
        theirs = judge.perplexity(tokens.tolist())
        greedy = [one.token for one in judge.greedy(known.path[0, : known.prompt].tolist(), known.sure)]
    with torch.no_grad():
        ours = math.exp(known.model(known.tokens[:, :-1], known.tokens[:, 1:]).item())
    if not abs(theirs - ours) <= limit * ours:
        raise RunFailed(f"llama.cpp's perplexity is {theirs:.6g} and ours {ours:.6g}, more than {limit:.1%} apart")
    said = f"verified with llama.cpp: perplexity {theirs:.6g}, ours {ours:.6g} (at most {limit:.1%} apart)"
    if config.dtype != "float32":
        return said
    if greedy != known.greedy:
        raise RunFailed(f"llama.cpp continues otherwise: {greedy}, not {known.greedy}")
    return f"{said}, {known.agreement}"


def _nanogpt(config: ConvertConfig, source: Source, folder: Path) -> str:
    from fastgpt.conversion import nanogpt

    logits = nanogpt.load(folder / "ckpt.pt", Path(config.nanogpt or ""))
    return _compare_logits("nanoGPT", config, reference(source), logits)


def _fastgpt(config: ConvertConfig, source: Source, folder: Path) -> str:
    wanted, found = source.weights(source.config), open_model(folder, checkpoint="latest")
    if found.config != source.config or found.tokenizer != source.tokenizer:
        raise RunFailed("the result has another shape or vocabulary")
    for name, tensor in found.tensors.items():
        if not torch.equal(tensor, wanted[name].to(DTYPES[config.dtype])):
            raise RunFailed(f"the result holds other numbers in {name}")
    return f"verified: {len(wanted)} tensors have the bits that were written"


PROOFS: dict[str, Callable[[ConvertConfig, Source, Path], str]] = {
    "huggingface": _huggingface,
    "gguf": _llama_cpp,
    "nanogpt": _nanogpt,
    "fastgpt": _fastgpt,
}
