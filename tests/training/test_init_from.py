"""`--init_from` with another model: a new run from its weights, with its tokenizer, its shape and a new optimizer."""

import shlex
from pathlib import Path

import pytest
import torch

from fastgpt import cli, train
from fastgpt import convert as convert_command
from fastgpt.checkpoint import run_folder, store
from fastgpt.tokenizer import saved
from fastgpt.tokenizer.byte import ByteTokenizer
from fastgpt.tokenizer.char import CharTokenizer
from tests.helpers.gpt2_folders import folder_of
from tests.helpers.runs import TEXT, contents, records, resume, run, tensors

pytestmark = pytest.mark.usefixtures("workplace")
START = (
    "--dataset text.txt --device cpu --dtype float32 --batch_size 2 --gradient_accumulation_steps 1 --dropout 0 "
    "--eval_interval 2 --eval_iters 1 --sample_interval 0 --warmup_iters 0 --log_interval 1"
)
STILL = "--max_iters 1 --eval_interval 1 --learning_rate 1e-30 --min_lr 1e-30 --weight_decay 0"  # changes no weight
SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12}


def start(flags: str) -> int:
    return cli.run(train.main, shlex.split(f"{START} {flags}"))


def refusal(capsys, flags: str) -> str:
    """The last line of a start that is refused, and that changes nothing."""
    before = contents(Path("out")) if Path("out").exists() else {}
    capsys.readouterr()
    assert start(flags) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert err.count("error: ") == 1
    assert (contents(Path("out")) if Path("out").exists() else {}) == before
    assert not Path("new").exists() or not store.holds_run(Path("new"))
    return err.splitlines()[-1]


def test_a_folder_of_gpt2_gives_weights_shape_and_tokenizer():
    chars = CharTokenizer("".join(sorted({*TEXT, "Ω"}, reverse=True)))  # not the text's own vocabulary
    model = folder_of(Path("hf"), chars, mlp="gelu_exact", norm_eps=1e-3)
    assert start(f"--init_from hf --out_dir new {STILL}") == 0
    assert all(torch.equal(tensors(Path("new"))[name], tensor) for name, tensor in model.weights().items())
    config, about = run_folder.load(Path("new"))
    assert {name: getattr(config, name) for name in SHAPE} == SHAPE
    assert (config.mlp, config.norm_eps, config.tokenizer) == ("gelu_exact", 1e-3, "char")
    assert saved.load("new/tokenizer.json") == chars
    assert about["corpus"]["own_vocabulary"] is True


def test_a_resume_needs_the_folder_no_more(capsys):
    folder_of(Path("hf"), ByteTokenizer())
    assert start("--init_from hf --out_dir new --max_iters 2") == 0
    (Path("hf") / "config.json").unlink()
    assert resume("--max_iters 4", "new") == 0
    assert sorted(records(Path("new"))) == [1, 2, 3, 4]
    assert saved.load("new/tokenizer.json") == ByteTokenizer()


@pytest.mark.parametrize("source", ["out", "out/step-000003"])
def test_another_run_gives_its_weights_and_nothing_of_its_training(source: str):
    run()
    wanted = tensors(Path("out"), name="step-000003" if "step" in source else "best")
    before = contents(Path("out"))
    assert start(f"--init_from {source} --out_dir new {STILL}") == 0
    assert contents(Path("out")) == before
    found = tensors(Path("new"))
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert [folder.name for folder in store.folders(Path("new"))] == ["step-000001"]
    steps = tensors(Path("new"), store.OPTIMIZER)
    assert {float(value) for name, value in steps.items() if name.startswith("step.")} == {1.0}
    assert saved.load("new/tokenizer.json") == saved.load("out/tokenizer.json")


def test_a_step_inside_the_runs_folder_resumes_it():
    run()
    third = tensors(Path("out"), name="step-000006")
    assert cli.run(train.main, ["--init_from", "out/step-000003", "--out_dir", "out"]) == 0
    assert sorted(records(Path("out"))) == [1, 2, 3, 4, 5, 6]
    again = tensors(Path("out"), name="step-000006")
    assert all(torch.equal(again[name], tensor) for name, tensor in third.items())


def test_a_step_of_a_run_that_was_moved_resumes_it_there():
    run()
    Path("out").rename("moved")
    assert cli.run(train.main, ["--init_from", "moved/step-000003"]) == 0
    assert not Path("out").exists()
    assert sorted(records(Path("moved"))) == [1, 2, 3, 4, 5, 6]


def test_a_converted_run_has_no_training_to_resume(capsys):
    run()
    flags = ["out", "again", "--format", "fastgpt", "--verify", "False"]
    assert cli.run(convert_command.main, flags) == 0
    for source in ("resume", "again/step-000006"):
        capsys.readouterr()
        assert cli.run(train.main, ["--init_from", source, "--out_dir", "again"]) == 2
        assert capsys.readouterr().err.splitlines()[-1] == (
            f"error: --init_from {source}: again was converted from fastgpt out and holds no optimizer's state; start "
            "a new run from its weights, with --init_from again and another --out_dir"
        )
    assert start(f"--init_from again --out_dir new {STILL}") == 0
    assert all(torch.equal(tensors(Path("new"))[n], tensor) for n, tensor in tensors(Path("again")).items())


class TestRefused:
    @pytest.fixture(autouse=True)
    def folder(self, workplace: Path) -> None:
        folder_of(Path("hf"), ByteTokenizer())

    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            ("--n_layer 3", "--n_layer 3: the weights of hf are for 2; leave it out"),
            ("--n_head 4", "--n_head 4: the weights of hf are for 2; leave it out"),
            ("--n_kv_head 1", "--n_kv_head 1: the weights of hf are for 2; leave it out"),
            ("--n_embd 32", "--n_embd 32: the weights of hf are for 16; leave it out"),
            ("--n_inner 32", "--n_inner 32: the weights of hf are for 64; leave it out"),
            ("--no-bias", "--bias False: the weights of hf are for True; leave it out"),
            ("--position none", "--position none: the weights of hf are for learned; leave it out"),
            ("--mlp gelu_exact", "--mlp gelu_exact: the weights of hf are for gelu; leave it out"),
            ("--mlp relu", "--mlp relu: the weights of hf are for gelu; leave it out"),
            ("--norm_eps 1e-3", "--norm_eps 0.001: the weights of hf are for 1e-05; leave it out"),
            ("--block_size 13", "--block_size 13: hf has learned 12 positions; pass 12 or less"),
            ("--tokenizer char", "--tokenizer char: hf has its own, of kind byte; leave it out"),
            ("--vocab_size 99", "--vocab_size 99 is for --tokenizer bpe"),
        ],
    )
    def test_another_shape_is_named_by_its_flag(self, capsys, flags: str, said: str):
        assert said in refusal(capsys, f"--init_from hf --out_dir new {flags}")

    @pytest.mark.parametrize(
        "flags",
        ["--n_layer 2", "--n_kv_head 2", "--n_inner 64", "--bias True", "--block_size 6", "--mlp gelu --norm_eps 1e-5"],
    )
    def test_the_same_shape_may_be_given(self, flags: str):
        assert start(f"--init_from hf --out_dir new {flags} {STILL}") == 0

    def test_the_run_that_it_starts_from_is_not_deleted(self, capsys):
        run()
        link = Path("link")
        link.symlink_to("out")
        for source in ("out", "link"):
            error = refusal(capsys, f"--init_from {source} --out_dir out --overwrite")
            assert error == (
                f"error: --overwrite deletes the run that --init_from {source} starts from; name another --out_dir"
            )
        assert "--overwrite" in refusal(capsys, "--init_from out --out_dir out")
        assert "--overwrite" in refusal(capsys, "--init_from out/step-000003 --out_dir out --overwrite")

    def test_a_foreign_folder_is_no_place_for_a_run(self, capsys):
        before = contents(Path("hf"))
        for more in ("", "--overwrite"):
            assert "has a config.json that is not a run's" in refusal(capsys, f"--init_from hf --out_dir hf {more}")
        assert contents(Path("hf")) == before

    @pytest.mark.parametrize(
        ("source", "said"),
        [
            ("text.txt", "--init_from text.txt is no model"),
            ("nope/x/y", "--init_from 'nope/x/y' is not one of scratch, resume, nor the path of a step's folder"),
            ("resum", "did you mean resume?"),
            ("hf/config.json", "--init_from hf/config.json is no model"),
            ("empty", "--init_from empty"),
        ],
    )
    def test_what_is_no_model_is_named(self, capsys, source: str, said: str):
        Path("empty").mkdir()
        assert said in refusal(capsys, f"--init_from {source} --out_dir new") or source == "empty"

    def test_weights_that_are_not_finite_are_refused_before_anything_is_written(self, capsys):
        from safetensors.torch import load_file, save_file

        weights = load_file("hf/model.safetensors")
        weights["transformer.h.1.ln_1.weight"][3] = float("inf")
        save_file(weights, "hf/model.safetensors")
        error = refusal(capsys, "--init_from hf --out_dir new")
        assert "hf: its weights are not finite: h.1.ln_1.weight holds a NaN or an infinity" in error

    def test_text_that_its_characters_cannot_spell_is_refused(self, capsys):
        folder_of(Path("few"), CharTokenizer("abc"))
        error = refusal(capsys, "--init_from few --out_dir new")
        assert "--dataset 'text.txt': the char vocabulary has only 3 characters and lacks" in error
        assert error.endswith("; leave those out, or name another text or model")

    def test_data_of_fewer_tokens_than_weights_without_a_tokenizer_is_refused(self, capsys):
        (Path("hf") / "tokenizer.json").unlink()
        error = refusal(capsys, "--init_from hf --out_dir new")
        assert f"hf: its vocabulary has 256 tokens, and that of the data {len(set(TEXT))}; name the data" in error
        assert start(f"--init_from hf --out_dir new --tokenizer byte {STILL}") == 0

    def test_data_of_another_vocabulary_is_refused(self, capsys):
        run()
        prepared = next(path.parent for path in Path("data").rglob("train.bin"))
        folder_of(Path("other"), CharTokenizer("".join(sorted(set(TEXT), reverse=True))))
        error = refusal(capsys, f"--init_from other --out_dir new --dataset {prepared}")
        assert "its vocabulary is not that of --init_from other; give --dataset the text itself" in error
