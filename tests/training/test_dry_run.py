"""A dry run prints numbers that formulas and a count of live tensors confirm, and writes nothing."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastgpt
from fastgpt import cli, train
from fastgpt.checkpoint import store
from fastgpt.config.training import TrainConfig
from fastgpt.data import corpus
from fastgpt.errors import UsageError
from fastgpt.interchange import hub
from fastgpt.model.facts import count_parameters
from fastgpt.model.footprint import Layers
from fastgpt.model.gpt import GPT
from fastgpt.system.live_bytes import LiveBytes
from fastgpt.training import dry_run, measurement
from fastgpt.training.footprint import StepFootprint
from fastgpt.training.measurement import Measurement, Stand, random_batch
from fastgpt.training.step import TrainStep
from tests.helpers import runs
from tests.helpers.exports import LETTERS
from tests.helpers.gpt2_folders import folder_of

pytestmark = pytest.mark.usefixtures("workplace")
CPU = torch.device("cpu")
CONFIG = TrainConfig(vocab_size=131, n_layer=2, n_head=2, n_embd=16, block_size=8, batch_size=5, dropout=0.1)
SHAPE = "--n_layer 2 --bias True"  # of gpt2_folders' models
PADDED = 256  # of the vocabulary's 131 tokens
MIB = 1 << 20
WHOLE = {"weights": Layers(head=10 * MIB), "gradients": Layers(head=10 * MIB), "moments": Layers(head=20 * MIB)}
MEMORY = StepFootprint({"update": WHOLE}, {"forward": 90 * MIB, "backward": 100 * MIB, "update": 40 * MIB}, {})


def rows(capsys, flags: str = "") -> dict[str, str]:
    """The table that a dry run prints, by the names of its rows."""
    assert cli.run(train.main, [*runs.FLAGS, "--dry_run", *shlex.split(flags)]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    return dict(re.split(" {2,}", line, maxsplit=1) for line in lines)


def refused(capsys, flags: str) -> str:
    """The line that refuses a dry run; nothing is printed or written."""
    before = runs.contents(Path())
    assert cli.run(train.main, [*runs.FLAGS, "--dry_run", *shlex.split(flags)]) == 2
    assert runs.contents(Path()) == before
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()[-1]


def stand(**changes) -> Stand:
    config = dataclasses.replace(CONFIG, **changes)
    return Stand(TrainStep(GPT(config), config, CPU, torch.float32), lambda line: None, 1)


@pytest.mark.parametrize("position", ["learned", "rotary"])
def test_memory_by_kind_is_that_of_the_formulas(position: str):
    measured = stand(position=position).measure()
    numbers = count_parameters(dataclasses.replace(CONFIG, position=position)) + (PADDED - 131) * CONFIG.n_embd
    table = 0 if position == "learned" else 4 * CONFIG.block_size * CONFIG.head_dim
    counters = 4 * len(list(GPT(dataclasses.replace(CONFIG, position=position)).parameters()))  # of the updates
    weights = 4 * numbers + table
    assert measured.memory.whole == {"weights": weights, "gradients": 4 * numbers, "moments": 8 * numbers + counters}
    assert (measured.sequences, measured.peak) == (5, None)
    assert min(measured.first, measured.micro, measured.update) > 0


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_activations_are_what_lives_between_the_passes(batch_size: int, dropout: float):
    bench = stand(batch_size=batch_size, dropout=dropout)
    model, (x, y) = bench.step.model, random_batch(bench.config, batch_size, CPU)
    with LiveBytes(CPU) as memory:
        memory.hold((*model.parameters(), x))
        before = memory.live
        loss = model(x, y)  # which is kept with the logits
        assert memory.live - before == bench.measure().memory.activations
        del loss


def test_a_long_micro_batch_is_measured_with_fewer_sequences(monkeypatch, capsys):
    monkeypatch.setattr(measurement, "LONG", 0.0)
    measured = stand().measure()
    assert measured.sequences == 1
    assert measured.memory == stand(batch_size=5).measure().memory
    found = rows(capsys)
    assert " for 4 sequences, measured with 1; " in found["micro-batch"]


def test_steps_tokens_and_parameters_are_those_of_the_run(capsys):
    found = rows(capsys, "--max_iters 50 --tokenizer byte --n_layer 2")
    config = TrainConfig(vocab_size=256, n_layer=2, n_head=2, n_embd=16, block_size=8)
    embeddings = (256 + 8) * 16
    total = count_parameters(config)
    assert found["parameters"] == f"{total:,}: {embeddings:,} in embeddings, {total - embeddings:,} in the rest"
    assert found["tokens a step"] == "64 = 4 sequences x 8 tokens x 2 micro-batches"
    assert found["steps"] == "50 of them read 3,200 tokens: epochs are known once tokenized"
    assert found["data"].startswith(f"text: {len(runs.TEXT):,} characters, not tokenized yet; byte vocabulary of 256")
    assert found["checkpoint"].startswith(f"{12 * total / 1024:.0f} KiB, at most 5 checkpoints at once; ")


@pytest.mark.parametrize(
    ("flags", "vocabulary"),
    [
        ("", f"char vocabulary of {len(set(runs.TEXT))}"),
        ("--tokenizer byte", "byte vocabulary of 256"),
        ("--tokenizer bpe --vocab_size 300", "bpe vocabulary of at most 300"),
    ],
)
def test_the_vocabulary_is_known_before_the_text_is_tokenized(capsys, flags: str, vocabulary: str):
    assert rows(capsys, flags)["data"].endswith(f"; {vocabulary}")


def test_the_time_is_that_of_all_micro_batches_and_one_update():
    measured = Measurement(5, 9.0, 0.25, 0.5, MEMORY, None)
    assert measured.step_seconds(6) == 2.0
    config = dataclasses.replace(CONFIG, gradient_accumulation_steps=6, max_iters=3600, max_minutes=1)
    machine = dry_run.choose_machine(dataclasses.replace(config, device="cpu", dtype="float32"))
    found = dry_run._time_rows(config, machine, GPT(CONFIG), measured)
    assert found["micro-batch"] == "250 ms; 9.0 s while warming up"
    assert found["speed"] == "120 tokens/s, 2.0 s a step"
    assert found["time"].startswith("2 h 0 min in steps, without evaluations and checkpoints; it stops near step 30, ")


@pytest.mark.parametrize(("free", "divided"), [(100 << 20, False), ((100 << 20) - 1, True)])
def test_micro_batches_that_do_not_fit_are_told(free: int, divided: bool):
    measured = Measurement(1, 1.0, 1.0, 1.0, MEMORY, None)
    told = dry_run._memory_rows(CONFIG, measured, CPU, free)["memory"]
    assert told == "100 MiB at the peak, in the backward pass; cpu has 100 MiB free" + divided * (
        "; a run divides micro-batches that do not fit"
    )


def test_nothing_is_written(capsys, cache):
    rows(capsys)
    rows(capsys, "--overwrite --out_dir new --data_dir new/data")
    assert list(runs.contents(Path())) == ["text.txt"]
    assert [path.name for path in Path().iterdir()] == ["text.txt"]
    assert list(cache.iterdir()) == []


def test_a_run_and_its_corpus_stay_as_they_are(capsys, cache):
    out = runs.run()
    (corpus,) = Path("data").iterdir()
    before = runs.contents(Path())
    capsys.readouterr()
    assert cli.run(train.main, [*runs.FLAGS, "--dry_run", "--max_iters", "90"]) == 0
    found, told = capsys.readouterr()
    tokens = int(0.9 * len(runs.TEXT))
    assert f"prepared in {corpus}: {tokens:,} train and " in found
    assert f"90 of them read 5,760 tokens: {5760 / tokens:.3g} epochs" in found
    assert told.splitlines()[-1].startswith(f"the run itself would be refused: --out_dir {out} already holds a run; ")
    rows(capsys, "--overwrite")
    assert runs.contents(Path()) == before
    assert list(cache.iterdir()) == []


def test_what_a_run_would_refuse_is_refused(capsys):
    assert refused(capsys, "--dataset shakespeare").endswith("pass --corpus_file PATH, or use --dataset pydocs")
    assert refused(capsys, "--dataset nowhere").startswith("error: --dataset 'nowhere' is no file or folder")
    assert refused(capsys, f"--batch_size {10**12}").startswith(f"error: --batch_size {10**12} with --block_size 8 ")
    assert "--block_size 100000 needs 100,001 tokens" in refused(capsys, "--block_size 100000")
    runs.run()
    capsys.readouterr()
    assert "--block_size 100000 needs 100,001 tokens" in refused(capsys, "--block_size 100000")


class TestAResume:
    """A step in the run's own folder is one, and with another folder it is a new run's weights."""

    @pytest.mark.parametrize("init_from", ["resume", "out/step-000006", "out/step-000003"])
    def test_is_refused_before_anything_is_touched(self, capsys, init_from: str):
        out = runs.run()
        (out / "step-000003").rename(out / ".fastgpt-tmp-aside-step-000003-1")  # a resume would put it back
        capsys.readouterr()
        said = refused(capsys, f"--init_from {init_from}")
        assert said.startswith(f"error: --dry_run measures a new run, and --init_from {init_from} continues one, whose")

    def test_is_none_with_another_folder(self, capsys):
        runs.run()
        capsys.readouterr()
        found = rows(capsys, "--init_from out/step-000003 --out_dir new")
        assert found["model"] == "1 layer, 2 heads, width 16, context 8"
        assert not Path("new").exists()


class TestAnotherModel:
    """`--init_from` of another model: what the run refuses is refused by the same line."""

    @pytest.fixture(autouse=True)
    def models(self, workplace: Path) -> None:
        Path("text.txt").write_text(LETTERS.chars * 100, encoding="utf-8", newline="")
        folder_of(Path("hf"), LETTERS)

    def both(self, capsys, flags: str) -> str:
        """The line by which the run and its dry run are refused."""
        said = refused(capsys, f"{SHAPE} {flags}")
        assert cli.run(train.main, [*runs.FLAGS, *shlex.split(f"{SHAPE} {flags}")]) == 2
        assert capsys.readouterr().err.splitlines()[-1] == said
        return said

    def test_is_measured(self, capsys):
        assert rows(capsys, f"{SHAPE} --init_from hf --out_dir new")["model"].startswith("2 layers, ")

    def test_has_no_more_positions(self, capsys):
        said = self.both(capsys, "--init_from hf --out_dir new --block_size 13")
        assert said == "error: --block_size 13: hf has learned 12 positions; pass 12 or less"

    def test_knows_no_other_characters(self, capsys):
        Path("text.txt").write_text("abc?" * 100)
        said = self.both(capsys, "--init_from hf --out_dir new")
        assert "has only 14 characters and lacks '?' (U+003F)" in said

    def test_reads_no_data_of_another_vocabulary(self, capsys):
        prepared = corpus.prepare("text.txt", tokenizer="byte", quiet=True).path
        said = self.both(capsys, f"--init_from hf --out_dir new --dataset {prepared}")
        assert "its vocabulary is not that of --init_from hf; give --dataset the text itself" in said

    def test_without_a_tokenizer_has_as_many_tokens_as_the_data(self, capsys):
        (Path("hf") / "tokenizer.json").unlink()
        said = self.both(capsys, "--init_from hf --out_dir new --tokenizer byte")
        assert "its vocabulary has 14 tokens, and that of the data 256" in said

    def test_of_weights_that_are_not_finite_is_refused(self, capsys):
        weights = load_file("hf/model.safetensors")
        weights["transformer.h.1.ln_1.weight"][3] = float("inf")
        save_file(weights, "hf/model.safetensors")
        assert "h.1.ln_1.weight holds a NaN or an infinity" in self.both(capsys, "--init_from hf --out_dir new")

    def test_is_not_deleted(self, capsys):
        runs.run(SHAPE)
        capsys.readouterr()
        said = self.both(capsys, "--init_from out --out_dir out --overwrite")
        assert said == "error: --overwrite deletes the run that --init_from out starts from; name another --out_dir"

    def test_is_not_downloaded(self, capsys, monkeypatch):
        monkeypatch.setattr(hub, "folder", lambda *_: pytest.fail("it was looked for"))
        assert refused(capsys, "--init_from gpt2 --download") == (
            "error: --download fetches gpt2, and --dry_run writes nothing; leave one of them out (python -m "
            "fastgpt.generate --model gpt2 --download fetches it too)"
        )

    @pytest.mark.parametrize("more", ["", "--dry_run"])
    def test_is_opened_once(self, capsys, monkeypatch, more: str):
        runs.run(SHAPE)
        opened = []
        verify = store.verify
        monkeypatch.setattr(store, "verify", lambda *given: opened.append(given[0].name) or verify(*given))
        flags = f"{SHAPE} --init_from out --out_dir new --max_iters 1 {more}"
        assert cli.run(train.main, [*runs.FLAGS, *shlex.split(flags)]) == 0
        assert opened == ["step-000006"]


@pytest.mark.parametrize("prepared", [False, True])
class TestDataThatDoesNotFit:
    """The same line refuses the run and its dry run, before the text is tokenized and after."""

    @pytest.fixture(autouse=True)
    def texts(self, workplace: Path) -> None:
        Path("short.txt").write_text("The quick brown fox.\n" * 5)  # 95 and 11 characters
        for folder, lengths in {"docs": (30, 30, 40), "late": (950, 30)}.items():
            Path(folder).mkdir()
            for number, length in enumerate(lengths):
                Path(folder, f"{number}.txt").write_text("x" * length)

    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            ("--dataset short.txt --block_size 64", "--block_size 64 needs 65 tokens in each split, and short has "),
            ("--dataset short.txt --block_size 64 --tokenizer byte", "--block_size 64 needs 65 tokens in each split, "),
            ("--dataset docs --block_size 14 --tokenizer byte", "--block_size 14 needs 15 tokens in each split, and "),
            (
                "--dataset docs --pack",
                "--pack tells documents apart by end-of-text tokens, and the char vocabulary of ",
            ),
            ("--dataset late --pack --tokenizer byte", "end-of-text tokens, and the train split of late has none; "),
        ],
    )
    def test_is_refused(self, capsys, prepared: bool, flags: str, said: str):
        if prepared:
            dataset, tokenizer = shlex.split(flags)[1], "byte" if "byte" in flags else "char"
            corpus.prepare(dataset, tokenizer=tokenizer, quiet=True)
        assert said in (measured := refused(capsys, flags))
        assert cli.run(train.main, [*runs.FLAGS, *shlex.split(flags)]) == 2
        run = capsys.readouterr().err.splitlines()[-1]
        assert measured.replace("at most ", "") == run

    @pytest.mark.parametrize("flags", ["--block_size 10 --tokenizer byte", "--pack --block_size 10 --tokenizer byte"])
    def test_what_fits_is_measured(self, capsys, prepared: bool, flags: str):
        """The 10 characters that are left of the val split have the end of a document after them."""
        if prepared:
            corpus.prepare("docs", tokenizer="byte", quiet=True)
        assert "docs" in rows(capsys, f"--dataset docs {flags}")["data"]
        runs.run(f"--dataset docs {flags} --max_iters 1")


@pytest.mark.parametrize(
    ("batch_size", "words"),
    [
        (6, "would divide its micro-batches; measure them with --batch_size 3 --gradient_accumulation_steps 4"),
        (1, "out of memory with one sequence at a time; lower --block_size 8"),
    ],
)
def test_a_micro_batch_that_does_not_fit_names_one_that_may(monkeypatch, capsys, batch_size: int, words: str):
    def lacking(*_):
        raise MemoryError

    monkeypatch.setattr(TrainStep, "accumulate", lacking)
    assert words in refused(capsys, f"--batch_size {batch_size}")


def test_from_python_it_is_refused():
    with pytest.raises(UsageError, match="`dry_run=True` is for the command"):
        fastgpt.fit(dry_run=True, dataset="text.txt", preset="mini")
    assert [path.name for path in Path().iterdir()] == ["text.txt"]
