"""`python -m fastgpt.evaluate` and `python -m fastgpt.compare`: what they print, and what they refuse."""

import json
import re
from pathlib import Path

import pytest

from fastgpt import cli, compare, evaluate, prepare
from tests.helpers import runs

pytestmark = pytest.mark.usefixtures("in_place")
QUESTIONS = [
    {"context": "The quick brown", "choices": ["fox", "watch"], "answer": 0},
    {"context": "a lazy dog while nine", "choices": ["jumps over", "wise"], "answer": 1},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, questions, a run of characters, one with a longer window, and one of bytes."""
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "letters.txt").write_text("ABCäöü" * 9, encoding="utf-8")
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)), encoding="utf-8")
    for flags in ("", "--block_size 12 --out_dir longer", "--tokenizer byte --out_dir bytes"):
        runs.run_in(folder, f"--eval_iters 0 --max_iters 3 {flags}")
    for number in range(90):
        (folder / "docs").mkdir(exist_ok=True)
        (folder / "docs" / f"{number}.txt").write_text(runs.TEXT[7 * number :][:7], encoding="utf-8")
    flags = "--eval_iters 0 --max_iters 3 --dataset docs --tokenizer byte --pack --data_dir shards --out_dir packed"
    runs.run_in(folder, flags)
    return folder


@pytest.fixture
def in_place(place: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(place)
    capsys.readouterr()


def answered(capsys, main, *words: str) -> dict:
    """The object that a command prints with --json."""
    assert cli.run(main, [*words, "--json", "--device=cpu"]) == 0
    out, _ = capsys.readouterr()
    assert out.count("\n") == 1
    return json.loads(out)


def refused(capsys, main, *words: str) -> str:
    """The one line by which a command refuses its words."""
    assert cli.run(main, [*words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = [line for line in err.splitlines() if not line.startswith("[")]
    return line


def test_the_loss_is_the_val_loss_of_the_run(capsys):
    found = answered(capsys, evaluate.main, "out", "--dataset", "text.txt")
    characters = len(runs.TEXT) - int(0.9 * len(runs.TEXT))
    assert found["loss"] == pytest.approx(runs.records(Path("out"), "val_loss")[3], rel=1e-6)
    assert (found["tokens"], found["split"], found["stride"], found["block_size"]) == (characters - 1, "val", 8, 8)
    assert found["bytes"] == len(runs.TEXT[-characters + 1 :].encode())
    assert (found["model"], found["dataset"]) == ("out", "text.txt")
    assert found["tokens_per_second"] == pytest.approx(found["tokens"] / found["seconds"])
    assert set(found) == {
        "loss", "perplexity", "bits_per_byte", "tokens", "bytes", "seconds", "tokens_per_second", "split", "stride",
        "block_size", "dataset", "model",
    }  # fmt: skip


def test_splits_and_strides_are_chosen(capsys):
    found = {
        split: answered(capsys, evaluate.main, "out", "--dataset=text.txt", f"--split={split}", "--stride=4")
        for split in ("train", "val", "all")
    }
    assert found["train"]["tokens"] + found["val"]["tokens"] + 1 == found["all"]["tokens"] == len(runs.TEXT) - 1
    assert {own["stride"] for own in found.values()} == {4}
    one = answered(capsys, evaluate.main, "--src=out", "--dataset=text.txt", "--stride=4", "--batch_size=1")
    assert one["loss"] == pytest.approx(found["val"]["loss"], rel=1e-6)


def test_a_prepared_folder_is_used_as_it_is(capsys):
    (folder,) = Path("data").glob("*-char-*")
    text, prepared = (answered(capsys, evaluate.main, "out", "--dataset", str(name)) for name in ("text.txt", folder))
    assert prepared["loss"] == text["loss"]


def test_a_packed_run_is_measured_within_documents(capsys):
    found, val_loss = (
        answered(capsys, evaluate.main, "packed", "--dataset=docs"),
        runs.records(Path("packed"), "val_loss"),
    )
    assert found["loss"] == pytest.approx(val_loss[3], rel=1e-6)
    crossing = answered(capsys, evaluate.main, "packed", "--dataset=docs", "--no-pack")
    assert crossing["loss"] != pytest.approx(val_loss[3], rel=1e-4)
    both = answered(capsys, compare.main, "packed", "packed", "--dataset=docs")
    assert both["a"]["loss"] == pytest.approx(val_loss[3], rel=1e-6)


def test_a_corpus_of_documents_is_used_as_it_is(capsys, monkeypatch: pytest.MonkeyPatch):
    """Its shards are one text: nothing of them is copied, and bytes are counted in parts."""
    monkeypatch.setattr("fastgpt.data.documents.PART_BYTES", 1)  # a shard for each file
    flags = ["docs", "--tokenizer=byte", "--val_share=0.4", "--data_dir=shards", "--jobs=1"]
    assert cli.run(prepare.main, flags) == 0
    capsys.readouterr()
    (folder,) = (path.parent for path in Path("shards").glob("*/train-00000.bin"))
    shards = [path.stat().st_size // 2 for path in folder.glob("*.bin")]
    assert len(shards) > 4
    found = answered(capsys, evaluate.main, "packed", f"--dataset={folder}", "--split=all")
    assert (found["tokens"], found["bytes"]) == (sum(shards) - 1, sum(shards) - 1 - 90)  # ends have no text


def test_nothing_is_written(place: Path, capsys):
    before = runs.contents(place)
    answered(capsys, evaluate.main, "longer", "--dataset=text.txt", "--data_dir=elsewhere")
    answered(capsys, compare.main, "out", "longer", "--dataset=text.txt", "--data_dir=elsewhere")
    assert runs.contents(place) == before


def test_int8_weights_are_measured(capsys):
    usual, int8 = (
        answered(capsys, evaluate.main, "out", "--dataset=text.txt", *more) for more in ([], ["--quantize=int8"])
    )
    assert int8["loss"] == pytest.approx(usual["loss"], rel=0.01)
    assert int8["loss"] != usual["loss"]


def test_the_table_names_its_values(capsys):
    assert cli.run(evaluate.main, ["out", "--dataset", "text.txt"]) == 0
    rows = dict(re.split(r"  +", line) for line in capsys.readouterr().out.splitlines())
    assert list(rows)[:3] == ["loss", "perplexity", "bits per byte"]
    assert re.fullmatch(r"\d\.\d{4}", rows["loss"])
    assert rows["dataset"] == "text.txt"


def test_questions_are_answered(capsys):
    found = answered(capsys, evaluate.main, "longer", "--choices", "questions.jsonl")
    assert [own["answer"] for own in found["answers"]] == [0, 1]
    for own in found["answers"]:
        assert own["choice"] == own["log_likelihoods"].index(max(own["log_likelihoods"]))
    assert found["acc"] == sum(own["choice"] == own["answer"] for own in found["answers"]) / 2
    assert (found["questions"], found["cut_contexts"], found["file"]) == (2, 2, "questions.jsonl")
    assert cli.run(evaluate.main, ["longer", "--choices", "questions.jsonl"]) == 0
    out, err = capsys.readouterr()
    assert "[2 contexts of 2 did not fit in block_size 12; their ends were kept]" in err
    assert out.startswith("acc")


def test_two_models_are_compared(capsys):
    found = answered(capsys, compare.main, "out", "longer", "--dataset=text.txt")
    assert found["a"]["loss"] == pytest.approx(answered(capsys, evaluate.main, "out", "--dataset=text.txt")["loss"])
    assert (found["block_size"], found["model_a"], found["model_b"]) == (8, "out", "longer")
    assert found["kl_ab"] > 0
    assert 0 <= found["equal_argmax"] <= 1
    kls = [own["kl"] for own in found["differences"]]
    assert kls == sorted(kls, reverse=True)
    assert len(kls) == 20
    val = runs.TEXT[int(0.9 * len(runs.TEXT)) :]
    for own in found["differences"]:
        assert val[: own["position"]].endswith(own["before"])
        assert val[own["position"]] == own["text"]
        assert own["a"]["probability"] <= 1
    assert cli.run(compare.main, ["out", "longer", "--dataset=text.txt"]) == 0
    out = capsys.readouterr().out
    assert "A out" in out
    assert "B longer" in out
    assert len(out.splitlines()) > 30


def test_a_model_is_like_itself(capsys):
    found = answered(capsys, compare.main, "out", "out", "--dataset=text.txt")
    assert (found["kl_ab"], found["kl_ba"], found["equal_argmax"], found["a"]) == (0, 0, 1, found["b"])


def test_a_model_is_compared_with_its_own_int8_weights(capsys):
    found = answered(capsys, compare.main, "out", "out", "--dataset=text.txt", "--other_quantize=int8")
    int8 = answered(capsys, evaluate.main, "out", "--dataset=text.txt", "--quantize=int8")
    assert found["b"]["loss"] == pytest.approx(int8["loss"], rel=1e-6)
    assert 0 < found["kl_ab"] < 1e-2
    half = answered(capsys, compare.main, "out", "out", "--dataset=text.txt", "--other_dtype=bfloat16")
    assert 0 < half["kl_ab"] < 1e-2


def test_other_vocabularies_have_bits_per_byte_alone(capsys):
    found = answered(capsys, compare.main, "out", "bytes", "--dataset=text.txt")
    assert "loss" not in found["a"]
    assert "kl_ab" not in found
    for key, name in (("a", "out"), ("b", "bytes")):
        alone = answered(capsys, evaluate.main, name, "--dataset=text.txt")
        assert found[key]["bits_per_byte"] == pytest.approx(alone["bits_per_byte"])
    assert found["b"]["tokens"] > found["a"]["tokens"]  # ä has two bytes
    assert cli.run(compare.main, ["out", "bytes", "--dataset=text.txt"]) == 0
    assert "[the vocabularies differ, so only bits per byte compare]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("main", "words", "saying"),
    [
        (evaluate.main, ["out"], "--dataset TEXT or --choices FILE: neither is given"),
        (evaluate.main, ["out", "--dataset=a", "--choices=b"], "both are given"),
        (evaluate.main, ["out", "--choices=questions.jsonl", "--stride=3"], "--stride 3 is for --dataset"),
        (evaluate.main, ["out", "--choices=questions.jsonl", "--split=all"], "--split all is for --dataset"),
        (evaluate.main, ["out", "--choices=questions.jsonl", "--pack"], "--pack True is for --dataset"),
        (evaluate.main, ["out", "--dataset=text.txt", "--pack"], "--pack: the char vocabulary has no end-of-text"),
        (evaluate.main, ["out", "--choices=text.txt"], "--choices text.txt, line 1 is not JSON"),
        (evaluate.main, ["out", "--dataset=nowhere"], "--dataset 'nowhere' is no file or folder"),
        (evaluate.main, ["out", "--dataset=text.txt", "--stride=9"], "--stride 9 is above block_size 8"),
        (evaluate.main, ["out", "--dataset=letters.txt"], "--dataset 'letters.txt': the char vocabulary has only"),
        (evaluate.main, ["nowhere", "--dataset=text.txt"], "nowhere"),
        (evaluate.main, ["out", "more", "--dataset=text.txt"], "'more' is not a flag"),
        (evaluate.main, ["", "--dataset=text.txt"], "--src '' is empty"),
        (evaluate.main, ["out", "--dataset=text.txt", "--split=vall"], "did you mean val?"),
        (compare.main, ["out"], "--other is missing; give two models"),
        (compare.main, ["out", "longer"], "--dataset is missing"),
        (compare.main, ["out", "nowhere", "--dataset=text.txt"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(capsys, main, words: list[str], saying: str):
    assert saying in refused(capsys, main, *words)


def test_a_prepared_folder_of_another_vocabulary_is_refused(capsys):
    (folder,) = Path("data").glob("*-byte-*")
    line = refused(capsys, evaluate.main, "out", "--dataset", str(folder))
    assert "prepared with another vocabulary" in line
    assert "give --dataset the text itself" in line
