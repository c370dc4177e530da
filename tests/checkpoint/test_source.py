"""One opener for every source: told apart by what is in them, and one line for what is none."""

import json
import shutil
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import fastgpt
from fastgpt import cli, generate
from fastgpt.checkpoint import store
from fastgpt.checkpoint.source import Source, open_model
from fastgpt.config.generation import SamplingParams
from fastgpt.errors import UsageError
from fastgpt.tokenizer.byte import ByteTokenizer
from tests.helpers.exports import LETTERS, exported
from tests.helpers.gpt2_folders import change_settings, folder_of, settings_of, theirs, write
from tests.helpers.runs import run_in, tensors


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the steps 3 and 6, which no test changes."""
    return run_in(tmp_path_factory.mktemp("trained"), "")


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch) -> Path:
    """A copy of it, in the working folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "out")
    return Path("out")


def refusal(source: object, **options) -> str:
    with pytest.raises(UsageError) as error:
        dict(open_model(source, **options).tensors)  # pyright: ignore[reportArgumentType] - on purpose
    assert "\n" not in str(error.value)
    return str(error.value)


class TestRuns:
    @pytest.mark.parametrize(
        ("source", "checkpoint", "step"),
        [
            ("out", "latest", 6),
            ("out/", "step-000003", 3),
            ("out/step-000003", "best", 3),
            ("./out/step-000006/", "best", 6),
            ("out/step-000003", "step-000003", 3),
        ],
    )
    @pytest.mark.parametrize("kind", [str, Path])
    def test_a_run_or_a_step_is_opened(self, run: Path, kind: type, source: str, checkpoint: str, step: int):
        found = open_model(kind(source), checkpoint=checkpoint)
        assert (found.format, found.path, found.step) == ("fastgpt", run, run / f"step-{step:06d}")
        assert found.file == run / f"step-{step:06d}" / store.MODEL
        wanted = tensors(run, name=f"step-{step:06d}")
        assert found.tensors.keys() == wanted.keys()
        assert all(torch.equal(found.tensors[name], tensor) for name, tensor in wanted.items())

    def test_the_best_is_taken_unless_told_otherwise(self, run: Path):
        assert open_model(run).step == store.find(run, "best")

    def test_a_step_whose_folder_is_the_working_folder(self, run: Path, monkeypatch):
        monkeypatch.chdir(run)
        assert open_model("step-000003").step == Path("step-000003")

    @pytest.mark.parametrize(
        ("source", "checkpoint", "said"),
        [
            ("out", "step-000009", "`checkpoint` 'step-000009' is not in out; there are: latest, best, step-000003"),
            ("out/step-000009", "best", "`checkpoint` 'step-000009' is not in out; there are: latest, best, step-0"),
            ("out/step-000003", "latest", "`checkpoint` latest is for the folder of a run, and out/step-000003 is a"),
            ("other", "best", "other holds no run"),
            ("other/step-000009", "best", "other/step-000009 holds no run"),
        ],
    )
    def test_what_is_not_there_is_named(self, run: Path, source: str, checkpoint: str, said: str):
        assert said in refusal(Path(source), checkpoint=checkpoint)

    def test_a_damaged_step_is_refused(self, run: Path):
        path = run / "step-000006" / store.MODEL
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        assert "is not what was saved" in refusal(run, checkpoint="latest")

    def test_a_run_beside_weights_of_transformers_is_still_a_run(self, run: Path):
        (run / "latest").rename(run / "was-latest")
        shutil.copyfile(run / "was-latest", run / "latest")
        assert open_model(run).format == "fastgpt"


class TestForeign:
    def test_a_folder_by_any_name_is_told_by_its_content(self, tmp_path: Path):
        model = folder_of(tmp_path / "step-000500")  # a name as of a run's step
        found = open_model(tmp_path / "step-000500")
        assert (found.format, found.step, found.file) == ("huggingface", None, tmp_path / "step-000500")
        assert found.config == model.config

    @pytest.mark.parametrize(
        ("source", "said"),
        [
            ("text.txt", "`thing` text.txt is no model; name a run's or a step's folder"),
            ("text.txt/x", "`thing` text.txt/x holds no run"),
            ("nope.pt", "nope.pt cannot be read: No such file"),
            ("", "holds no run"),
            ("a" * 5000, "holds no run"),
            ("b/" + "a" * 5000, "holds no run"),
            ("a\0b", "holds no run"),
        ],
    )
    def test_what_is_no_model_is_one_line(self, tmp_path: Path, monkeypatch, source: str, said: str):
        monkeypatch.chdir(tmp_path)
        Path("text.txt").write_text("text")
        assert said in refusal(Path(source), setting="thing")

    def test_a_checkpoint_is_of_runs_alone(self, tmp_path: Path):
        folder_of(tmp_path / "hf")
        assert "hf is none; leave it out" in refusal(tmp_path / "hf", checkpoint="latest")

    def test_generate_takes_one_source(self, tmp_path: Path, capsys):
        folder_of(tmp_path / "hf")
        assert cli.run(generate.main, ["--model", str(tmp_path / "hf"), "--out_dir", str(tmp_path / "out")]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert "--out_dir" in err
        assert "exclude each other" in err


class TestVocabularies:
    def folder(self, tmp_path: Path, rows: int, tokenizer) -> Source:
        model, _ = exported(ByteTokenizer(), n_layer=1)
        weights, name = theirs(model), "transformer.wte.weight"
        weights[name] = torch.cat([weights[name], torch.zeros(127, 16)])[:rows].clone()
        return open_model(write(tmp_path, weights, settings_of(model) | {"vocab_size": rows}, tokenizer))

    @pytest.mark.parametrize(("rows", "ends"), [(256, False), (257, True), (264, True), (320, True)])
    def test_rows_beyond_the_vocabulary_fill_up_a_power_of_two(self, tmp_path: Path, rows: int, ends: bool):
        source = self.folder(tmp_path, rows, ByteTokenizer(ends))
        assert (source.shape.vocab_size, source.config.vocab_size) == (rows, 256 + ends)
        assert len(source.weights(source.config)["wte.weight"]) == 256 + ends

    @pytest.mark.parametrize("rows", [14, 200, 255, 257, 258, 320, 383])
    def test_a_vocabulary_of_another_model_is_refused(self, tmp_path: Path, rows: int):
        source = self.folder(tmp_path, rows, ByteTokenizer())
        with pytest.raises(UsageError, match=f"has 256 tokens, and its embedding {rows} rows; put the model's own"):
            _ = source.config

    def test_none_is_refused_where_one_is_needed(self, tmp_path: Path):
        source = self.folder(tmp_path, 256, None)
        assert source.config.vocab_size == 256
        with pytest.raises(UsageError, match="has no tokenizer; put the model's own beside it"):
            source.required_tokenizer()

    def test_a_longer_vocabulary_or_context_than_it_has_is_refused(self, tmp_path: Path):
        folder_of(tmp_path)
        source = open_model(tmp_path)
        for changes, said in (({"vocab_size": 15}, "has 14 tokens"), ({"block_size": 13}, "has learned 12 positions")):
            config = type(source.config)(**vars(source.config) | changes)
            with pytest.raises(UsageError, match=said):
                source.weights(config)


class TestGeneration:
    GREEDY: ClassVar[dict] = {"max_new_tokens": 7, "temperature": 0}

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        folder_of(tmp_path)
        return tmp_path

    def test_dense_paged_and_batched_caches_say_the_same(self, folder: Path):
        """The likeliest token each time, by whole forward passes."""
        generator = fastgpt.load(str(folder), device="cpu")
        prompts = ["ab", "a bed", "\n"]
        wanted = []
        for prompt in prompts:
            ids = LETTERS.encode(prompt).tolist()
            with torch.no_grad():
                for _ in range(7):
                    ids.append(int(generator.model(torch.tensor([ids[-12:]]))[0, -1].argmax()))
            wanted.append(LETTERS.decode(ids[len(LETTERS.encode(prompt)) :]))
        for cache in ("dense", "paged"):
            assert [generator.generate(prompt, cache=cache, **self.GREEDY) for prompt in prompts] == wanted
        engine = generator.engine(max_batch=3, page_size=4)
        assert [done.text for done in engine.generate(prompts, SamplingParams(**self.GREEDY))] == wanted

    def test_the_command_prints_what_the_library_says(self, folder: Path, capsys):
        flags = [
            "--model",
            str(folder),
            "--prompt",
            "ab",
            "--device",
            "cpu",
            "--temperature",
            "0",
            "--max_new_tokens",
            "7",
        ]
        assert cli.run(generate.main, flags) == 0
        said = fastgpt.load(folder, device="cpu").generate("ab", **self.GREEDY)
        assert said in capsys.readouterr().out

    def test_half_precision_is_read(self, tmp_path: Path):
        model, _ = exported()
        write(tmp_path, {name: tensor.half() for name, tensor in theirs(model).items()}, settings_of(model))
        loaded = fastgpt.load(tmp_path, device="cpu", dtype="float32").model
        assert all(torch.equal(loaded.weights()[n], tensor.half().float()) for n, tensor in model.weights().items())


def test_a_config_that_is_no_runs_and_no_models_is_one_line(tmp_path: Path):
    folder_of(tmp_path)
    change_settings(tmp_path, model_type="bert")
    assert "model_type 'bert' is not supported" in refusal(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"config": {}}))
    assert "holds no run" in refusal(tmp_path)
