"""A dry run prints numbers that formulas and a count of live tensors confirm, and writes nothing."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
import torch

import fastgpt
from bench.tools.live_bytes import LiveBytes
from fastgpt import cli, train
from fastgpt.config.training import TrainConfig
from fastgpt.errors import UsageError
from fastgpt.model.facts import count_parameters
from fastgpt.model.gpt import GPT
from fastgpt.training import dry_run, measurement
from fastgpt.training.measurement import Measurement, Stand, random_batch
from fastgpt.training.step import TrainStep
from tests.helpers import runs
from tests.helpers.corpora import needs_bpe

pytestmark = pytest.mark.usefixtures("workplace")
CPU = torch.device("cpu")
CONFIG = TrainConfig(vocab_size=131, n_layer=2, n_head=2, n_embd=16, block_size=8, batch_size=5, dropout=0.1)
PADDED = 256  # of the vocabulary's 131 tokens


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
    table = 0 if position == "learned" else 4 * CONFIG.block_size * CONFIG.head_size
    counters = 4 * len(list(GPT(dataclasses.replace(CONFIG, position=position)).parameters()))  # of the updates
    assert (measured.weights, measured.gradients) == (4 * numbers + table, 4 * numbers)
    assert measured.moments == 8 * numbers + counters
    assert measured.total == 16 * numbers + table + counters + measured.activations
    assert (measured.sequences, measured.peak) == (5, None)
    assert min(measured.first, measured.micro, measured.update) > 0


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_activations_are_what_lives_between_the_passes(batch_size: int, dropout: float):
    bench = stand(batch_size=batch_size, dropout=dropout)
    model, (x, y) = bench.step.model, random_batch(bench.config, batch_size, CPU)
    with LiveBytes(CPU) as memory:
        memory.hold((*model.parameters(), x))
        before = memory.live - x.untyped_storage().nbytes()  # which is kept, with the targets in it
        loss = model(x, y)
        assert memory.live - before - loss.nbytes == bench.measure().activations


def test_a_long_micro_batch_is_measured_with_fewer_sequences(monkeypatch, capsys):
    monkeypatch.setattr(measurement, "LONG", 0.0)
    measured = stand().measure()
    assert measured.sequences == 1
    assert measured.activations == pytest.approx(stand(batch_size=5).measure().activations)
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
    assert found["checkpoint"].startswith("0 MiB, at most 5 checkpoints at once; ")


@pytest.mark.parametrize(
    ("flags", "vocabulary"),
    [
        ("", f"char vocabulary of {len(set(runs.TEXT))}"),
        ("--tokenizer byte", "byte vocabulary of 256"),
        pytest.param("--tokenizer bpe --vocab_size 300", "bpe vocabulary of at most 300", marks=needs_bpe),
    ],
)
def test_the_vocabulary_is_known_before_the_text_is_tokenized(capsys, flags: str, vocabulary: str):
    assert rows(capsys, flags)["data"].endswith(f"; {vocabulary}")


def test_the_time_is_that_of_all_micro_batches_and_one_update():
    measured = Measurement(5, 9.0, 0.25, 0.5, 1, 1, 1, 1, None)
    assert measured.step_seconds(6) == 2.0
    config = dataclasses.replace(CONFIG, gradient_accumulation_steps=6, max_iters=3600, max_minutes=1)
    machine = dry_run.choose_machine(dataclasses.replace(config, device="cpu", dtype="float32"))
    found = dry_run._time_rows(config, machine, GPT(CONFIG), measured)
    assert found["micro-batch"] == "250 ms; 9.0 s while warming up"
    assert found["speed"] == "120 tokens/s, 2.0 s a step"
    assert found["time"].startswith("2 h 0 min in steps, without evaluations and checkpoints; it stops near step 30, ")


@pytest.mark.parametrize(("free", "divided"), [(100 << 20, False), ((100 << 20) - 1, True)])
def test_micro_batches_that_do_not_fit_are_told(free: int, divided: bool):
    measured = Measurement(1, 1.0, 1.0, 1.0, 10 << 20, 10 << 20, 20 << 20, 60 << 20, None)
    told = dry_run._memory_rows(CONFIG, measured, CPU, free)["memory"]
    assert told == "at least 100 MiB in all; cpu has 100 MiB free" + divided * (
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
    assert refused(capsys, "--init_from resume").startswith("error: --dry_run measures a new run, and --init_from res")
    assert refused(capsys, "--dataset shakespeare").endswith("pass --corpus_file PATH, or use --dataset pydocs")
    assert refused(capsys, "--dataset nowhere").startswith("error: --dataset 'nowhere' is no file or folder")
    assert refused(capsys, f"--batch_size {10**12}").startswith(f"error: --batch_size {10**12} with --block_size 8 ")
    runs.run()
    capsys.readouterr()
    assert "--block_size 100000 needs 100,001 tokens" in refused(capsys, "--block_size 100000")


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
