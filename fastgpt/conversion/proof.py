"""Proves a conversion: the program that a format is for loads the result and must compute what ours computes.

Where that program gives logits, they are compared on a fixed text, and 32 greedy tokens must be the same up to a
near-tie. llama.cpp gives no logits of a prompt, so its perplexity is compared. Our own format must hold the same bits.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastgpt.checkpoint.source import Source, open_model
from fastgpt.config.conversion import ConvertConfig
from fastgpt.errors import RunFailed, UsageError
from fastgpt.interchange.exported import DTYPES
from fastgpt.interchange.huggingface import HEAD
from fastgpt.model.gpt import GPT
from fastgpt.ops import table
from fastgpt.system.units import counted
from fastgpt.tokenizer.base import Tokenizer

TEXT = (
    "A proof begins with what is known. The model reads these words, guesses the next one, and is compared: 3 + 4 = 7, "
    "(x, y) -> x * y; it's done.\n\nEnd? Yes, and then it starts again.\n"
)
LOGITS = {"float32": 1e-5, "float16": 2e-2, "bfloat16": 2e-2}  # largest difference over the largest logit
PERPLEXITY = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 1e-2, "q8_0": 1e-2}  # relative difference
NEAR_TIE = 1e-2  # the two best logits' distance, below which either may win
GREEDY, TOKENS = 32, 256
PACKAGES = {"huggingface": ("transformers",), "gguf": ("xllamacpp",), "nanogpt": (), "fastgpt": ()}
Logits = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Reference:
    """Our model in float32, and the tokens of the proof.

    Attributes:
        text: the fixed text, as far as the vocabulary can spell it.
        tokens: int64 (1, T): the text's, and then some drawn from the whole vocabulary.
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


def check_peer(config: ConvertConfig) -> None:
    """Raise `UsageError` if a proof was asked for and the program for it is missing."""
    if config.verify and (reason := _missing(config)):
        raise UsageError(f"`verify`: {reason}")


def prove(config: ConvertConfig, source: Source, result: Path) -> str:
    """Compare what was written with the model; a line that says how they compare, or why they were not compared.

    Raises:
        RunFailed: they compute something else.
    """
    if config.verify is False:
        return "not verified, as asked for"
    if reason := _missing(config):
        return f"not verified: {reason}"
    return PROOFS[config.format or ""](config, source, result)


@torch.no_grad()
def approximation(original: Source, source: Source) -> str:
    """How far the logits move with another form of GELU, in words."""
    tokens = reference(original).tokens
    before, after = (_model(one)(tokens) for one in (original, source))
    return f"with mlp {source.config.mlp} for {original.config.mlp}, logits move by {_difference(after, before):.1e}"


@torch.no_grad()
def reference(source: Source) -> Reference:
    """The model, and what it says to the proof's text."""
    model, tokenizer = _model(source), source.required_tokenizer()
    V, block = model.config.known_vocab, model.config.block_size
    text = _spelled(tokenizer)
    drawn = torch.randint(V, (TOKENS,), generator=torch.Generator().manual_seed(0))
    tokens = torch.cat([torch.from_numpy(tokenizer.encode(text)), drawn])[: min(TOKENS, block)][None]
    new = min(GREEDY, block - 1)
    path = tokens[:, : max(1, block - new)]
    prompt, sure = path.shape[1], None
    for at in range(new):
        best = model(path)[0, -1].topk(min(2, V))
        if sure is None and float(best.values[0] - best.values[-1]) < NEAR_TIE:
            sure = at
        path = torch.cat([path, best.indices[None, :1]], dim=1)
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
    return f"{said}, {counted(known.sure, 'greedy token')} the same"


def _difference(theirs: torch.Tensor, ours: torch.Tensor) -> float:
    """The largest difference over the largest logit, which may be zero."""
    return float((theirs - ours).abs().max() / ours.abs().max().clamp(min=torch.finfo(torch.float32).tiny))


def _huggingface(config: ConvertConfig, source: Source, folder: Path) -> str:
    import transformers

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


def _nanogpt(config: ConvertConfig, source: Source, folder: Path) -> str:
    from fastgpt.conversion import nanogpt

    logits = nanogpt.load(folder / "ckpt.pt", Path(config.nanogpt or ""))
    return _compare_logits("nanoGPT", config, reference(source), logits)


def _fastgpt(config: ConvertConfig, source: Source, folder: Path) -> str:
    wanted, found = source.weights(source.config), open_model(folder, checkpoint="latest")
    for name, tensor in found.tensors.items():
        if not torch.equal(tensor, wanted[name].to(DTYPES[config.dtype])):
            raise RunFailed(f"the result holds other numbers in {name}")
    return f"verified: {len(wanted)} tensors have the bits that were written"


PROOFS: dict[str, Callable[[ConvertConfig, Source, Path], str]] = {
    "huggingface": _huggingface,
    "nanogpt": _nanogpt,
    "fastgpt": _fastgpt,
}
