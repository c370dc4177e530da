"""Generation: the cache changes nothing, no part of a stop text leaks, and the command prints text and nothing else."""

import io
import random
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fastgpt
from fastgpt import cli, generate, train
from fastgpt.checkpoint import store
from fastgpt.config.generation import SamplingParams
from fastgpt.errors import UsageError
from fastgpt.generation.generator import TextGenerator
from fastgpt.generation.single import Generation
from fastgpt.model.gpt import GPT
from tests.helpers.places import ROOT
from tests.helpers.untrained import BLOCK, fresh

WORDS = "The quick brown fox jumps over a lazy dog while nine wise cats watch from trees"
TEXT = " ".join(random.Random(0).choices(WORDS.split(" "), k=600))


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """A short run whose best checkpoint is not its last: it goes on at a rate that ruins it."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    flags = [
        *shlex.split(
            "--preset cpu --device cpu --dtype float32 --n_layer 1 --n_head 2 --n_embd 16 --block_size 8 --batch_size 8"
        ),
        *shlex.split(
            "--learning_rate 2e-2 --warmup_iters 2 --schedule constant --eval_interval 40 --sample_interval 0"
        ),
        *("--dataset", str(folder / "text.txt"), "--data_dir", str(folder / "data")),
    ]
    run = ["--out_dir", str(folder / "out")]
    assert cli.run(train.main, [*flags, *run, "--max_iters", "40"]) == 0
    assert cli.run(train.main, [*run, "--init_from", "resume", "--max_iters", "42", "--learning_rate", "9"]) == 0
    return folder / "out"


def command(out: Path, *flags: str) -> int:
    return cli.run(generate.main, ["--out_dir", str(out), *flags])


def plain(generator: TextGenerator, prompt: str, count: int) -> list[int]:
    """Greedy decoding as a plain loop over whole forward passes."""
    tokens = generator.tokenizer.encode(prompt).tolist()
    for _ in range(count):
        with torch.no_grad():
            logits = generator.model(torch.tensor([tokens[-BLOCK:]]))
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[-count:]


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "rotary", "none"])
@pytest.mark.parametrize("prompt", ["a", "abcdefg", "abcdefgh", "abcdefghijabcdefghij"])
def test_both_caches_are_a_plain_loop_also_past_the_block_size(position: str, prompt: str):
    generator = fresh(position)
    wanted = plain(generator, prompt, 3 * BLOCK)
    assert len(set(wanted)) > 1
    for cache in ("none", "dense"):
        greedy = generator.stream(prompt, cache=cache, temperature=0, max_new_tokens=3 * BLOCK)
        assert list(greedy.tokens()) == wanted, cache


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "rotary", "none"])
@pytest.mark.parametrize("shape", [{}, {"n_head": 4, "n_kv_head": 2}, {"bias": False, "n_layer": 1}], ids=str)
def test_both_caches_draw_the_same_tokens(position: str, shape: dict):
    generator = fresh(position, **shape)
    drawn = [
        list(generator.stream("ab", cache=cache, max_new_tokens=3 * BLOCK, repetition_penalty=1.1).tokens())
        for cache in ("none", "dense")
    ]
    assert drawn[0] == drawn[1]


def test_pieces_join_to_the_text_and_the_counters_are_right_at_every_moment():
    generator = fresh()
    stream = generator.stream("abc", max_new_tokens=9)
    pieces = []
    for piece in stream:
        pieces.append(piece)
        assert (stream.prefill_tokens, stream.decode_tokens) == (3, len(pieces) - 1)
        assert stream.prefill_seconds > 0
        assert (stream.decode_seconds > 0) == (len(pieces) > 1)
    assert len(pieces) == 9
    assert "".join(pieces) == generator.generate("abc", max_new_tokens=9)


@pytest.mark.parametrize("prompt", ["abcdefgh", "abcdefghij" * 3])
def test_a_prefill_has_no_more_tokens_than_fit(prompt: str):
    stream = fresh().stream(prompt, max_new_tokens=2)
    list(stream)
    assert (stream.prefill_tokens, stream.decode_tokens) == (BLOCK, 1)


def test_no_new_tokens_are_no_text():
    for cache in ("none", "dense"):
        assert fresh().generate("abc", max_new_tokens=0, cache=cache) == ""


@pytest.mark.parametrize("chars", ["\nabc", "abc"])
def test_an_empty_prompt_starts_at_the_start_token(chars: str):
    generator = fresh(chars=chars)
    assert generator.generate("", max_new_tokens=12) == generator.generate(chars[0], max_new_tokens=12)


def test_seeds_and_narrow_settings():
    generator = fresh()
    texts = {seed: generator.generate("a", seed=seed, max_new_tokens=40, temperature=3.0) for seed in (1, 2)}
    assert texts[1] == generator.generate("a", seed=1, max_new_tokens=40, temperature=3.0) != texts[2]
    greedy = generator.generate("a", temperature=0, max_new_tokens=20)
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-6}):
        assert generator.generate("a", max_new_tokens=20, **narrow) == greedy
    assert generator.generate("a", temperature=0, max_new_tokens=20, repetition_penalty=5.0) != greedy


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"stop": (1,)}, {"cache": "dens"}], ids=str)
def test_a_setting_outside_its_limits_is_refused(wrong: dict):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        fresh().generate("a", **wrong)


def test_in_python_stop_may_be_one_text_or_several():
    generator = fresh()
    said = generator.generate("a", max_new_tokens=40)
    assert generator.generate("a", max_new_tokens=40, stop="absent") == said
    for stop in (said[9:11], (said[9:11],), ["absent", said[9:11]]):
        assert generator.generate("a", max_new_tokens=40, stop=stop) == said[: said.index(said[9:11])]


def test_a_byte_models_pieces_are_the_decoding_of_its_tokens():
    generator = fresh(chars=None)
    tokens = list(generator.stream("ä", max_new_tokens=80, temperature=2.0).tokens())
    assert generator.generate("ä", max_new_tokens=80, temperature=2.0) == generator.tokenizer.decode(tokens)


def test_the_readmes_example_of_the_engine_runs(capsys):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(from fastgpt import SamplingParams.*?)```", readme, re.DOTALL)
    exec(example, {"generator": fresh(chars=None, block_size=64)})
    printed = re.findall(r"^(\d) (\d) (length|stop|error) ", capsys.readouterr().out, re.MULTILINE)
    assert printed == [("0", "0", "length"), ("0", "1", "length"), ("1", "0", "length"), ("1", "1", "length")]


def test_the_best_checkpoint_is_used_unless_told_otherwise(out: Path, capsys):
    assert store.find(out, "best").name == "step-000040" != store.find(out, "latest").name
    weight = load_file(store.find(out, "best") / store.MODEL)["wte.weight"]
    assert torch.equal(fastgpt.load(out, device="cpu").model.weights()["wte.weight"], weight)
    printed = []
    for name in ("best", "latest", "step-000042"):
        assert command(out, "--checkpoint", name, "--prompt", "The ", "--max_new_tokens", "30") == 0
        printed.append(capsys.readouterr().out)
    assert command(out, "--prompt", "The ", "--max_new_tokens", "30") == 0
    assert printed[0] == capsys.readouterr().out != printed[1] == printed[2]


def test_stdout_is_the_prompt_and_the_text_and_stderr_ends_with_both_speeds(out: Path, capsys):
    assert command(out, "--prompt", "The cat", "--max_new_tokens", "30", "--seed", "5") == 0
    captured = capsys.readouterr()
    text = fastgpt.load(str(out)).generate("The cat", max_new_tokens=30, seed=5)
    assert isinstance(text, str)
    assert captured.out == f"The cat{text}\n"
    last = captured.err.splitlines()[-1]
    assert re.fullmatch(r"\[prefill 7 tokens at [\d,]+ tokens/s, decode 29 tokens at [\d,]+ tokens/s\]", last), last


@pytest.mark.parametrize("flag", ["--prompt", "--start", "--prompt=", "file", "stdin"])
def test_the_prompt_comes_from_the_flag_a_file_or_stdin(out: Path, capsys, monkeypatch, tmp_path: Path, flag: str):
    prompt = "The wise "
    (tmp_path / "my prompt.txt").write_bytes(prompt.encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(prompt.encode())))
    flags = {
        "file": ["--prompt", f"FILE:{tmp_path / 'my prompt.txt'}"],
        "stdin": ["--prompt", "-"],
        "--prompt=": [f"--prompt={prompt}"],
    }.get(flag, [flag, prompt])
    assert command(out, *flags, "--max_new_tokens", "4") == 0
    text = fastgpt.load(out).generate(prompt, max_new_tokens=4)
    assert capsys.readouterr().out == f"{prompt}{text}\n"


@pytest.mark.parametrize("cache", ["none", "dense", "paged"])
def test_samples_draw_each_for_itself(out: Path, capsys, cache: str):
    flags = shlex.split(f"--num_samples 2 --seed 8 --prompt a --max_new_tokens 9 --cache {cache}")
    assert command(out, *flags) == 0
    generator, params = fastgpt.load(out), SamplingParams(seed=8, max_new_tokens=9)
    parts = generator.model, generator.tokenizer
    texts = ["".join(Generation(*parts, "a", params, sample=n)) for n in (0, 1)]
    assert texts[0] != texts[1]
    assert capsys.readouterr().out == f"--- sample 1 of 2\na{texts[0]}\n--- sample 2 of 2\na{texts[1]}\n"


def test_every_setting_reaches_the_text(out: Path, capsys):
    def printed(*flags: str) -> str:
        assert command(out, "--prompt", "The ", "--max_new_tokens", "40", *flags) == 0
        return capsys.readouterr().out

    greedy, usual = printed("--temperature", "0"), printed()
    assert printed("--top_k", "1") == printed("--top_p", "1e-6") == printed("--min_p", "1") == greedy != usual
    others = ("--seed 2", "--temperature 2", "--top_k 3", "--top_p 0.5", "--min_p 0.3", "--repetition_penalty 2")
    assert usual not in [printed(*other.split()) for other in others]
    assert printed("--cache", "none") == usual
    stop = usual[8:11]
    cut = usual[: usual.index(stop, 4)]
    assert printed("--stop", "absent", "--stop", stop) == cut + "\n"
    assert printed("--max_new_tokens", "0") == "The \n"
    generator = fastgpt.load(out)
    assert printed("--prompt", "") == generator.tokenizer.opening + generator.generate(max_new_tokens=40) + "\n"


@pytest.mark.parametrize("settings", [{"dtype": "bfloat16"}, {"kernels": "reference"}, {"device": "cpu"}], ids=str)
def test_a_run_loads_with_other_arithmetic_and_columns(out: Path, settings: dict):
    assert len(fastgpt.load(out, **settings).generate("The ", max_new_tokens=20)) == 20


def test_an_unknown_arithmetic_is_refused(out: Path):
    with pytest.raises(UsageError, match="`dtype` 'x' is not one of auto, float32"):
        fastgpt.load(out, dtype="x")


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "rotary"])
def test_a_16_bit_model_keeps_its_position_table_in_float32(position: str):
    model, bfloat16 = fresh(position).model, torch.bfloat16
    half = GPT.from_weights(model.config, model.ops, model.weights(), torch.device("cpu"), bfloat16)
    assert not half.training
    assert {name: p.dtype for name, p in half.named_parameters()} == dict.fromkeys(model.weights(), bfloat16)
    assert all(torch.equal(half.weights()[name], weight.to(bfloat16)) for name, weight in model.weights().items())
    if position == "learned":
        assert half.table is None
    else:
        assert half.table.dtype == torch.float32
        assert torch.equal(half.table, model.table)


def test_a_model_is_made_of_weights_without_drawing_any(monkeypatch):
    model = fresh().model
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    made = GPT.from_weights(model.config, model.ops, model.weights(), torch.device("cpu"), torch.float32)
    assert torch.equal(torch.rand(3), wanted)
    tokens = torch.arange(6)[None]
    assert torch.equal(made(tokens), model(tokens))
    assert not made.wte.weight[model.config.vocab_size :].any()
