"""`python -m fastgpt.convert`: the whole result under its name, or nothing."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgpt.checkpoint import store
from fastgpt.checkpoint.source import open_model
from fastgpt.conversion import formats
from fastgpt.model.gpt import GPT
from fastgpt.model.positions import position_table
from fastgpt.ops import table
from fastgpt.tokenizer.byte import ByteTokenizer
from tests.helpers.conversions import FORMATS, UNVERIFIED, call, refusal
from tests.helpers.exports import LETTERS, exported
from tests.helpers.gpt2_folders import settings_of, theirs, write

pytestmark = pytest.mark.usefixtures("here")


def model_in(path: Path) -> GPT:
    source = open_model(path)
    config, cpu = source.config, torch.device("cpu")
    return GPT.from_weights(config, table.resolve("torch"), source.weights(config), cpu, torch.float32)


class TestWritten:
    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    @pytest.mark.parametrize("format", FORMATS)
    @pytest.mark.covering_array(1)
    def test_the_result_holds_the_same_numbers(self, capsys, format: str, dtype: str):
        assert call(f"hf new --format {format} --dtype {dtype} {UNVERIFIED}") == 0
        out = capsys.readouterr().out
        count = exported()[0].num_parameters()
        assert out == f"wrote new: {count:,} parameters, {dtype}, char vocabulary\n"
        source, result = open_model("hf"), open_model(Path("new"))
        assert (result.config, result.tokenizer, result.format) == (source.config, LETTERS, format)
        for name, tensor in source.tensors.items():
            assert torch.equal(result.tensors[name], tensor.to(getattr(torch, dtype))), name

    @pytest.mark.parametrize("way", [["huggingface", "fastgpt", "huggingface"], ["nanogpt", "huggingface", "nanogpt"]])
    def test_there_and_back_is_the_same_bits(self, way: list[str]):
        path = Path("hf")
        for number, format in enumerate(way):
            assert call(f"{path} {number} --format {format} {UNVERIFIED}") == 0
            path = Path(str(number))
        last, first = open_model(path), open_model(Path("0"))
        assert last.config == first.config
        assert all(torch.equal(last.tensors[name], tensor) for name, tensor in open_model("hf").tensors.items())
        if way[0] == "huggingface":
            for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
                assert (Path("0") / name).read_bytes() == (Path("2") / name).read_bytes(), name

    def test_a_step_of_a_run_is_converted_and_described(self, trained, capsys):
        folder = trained()
        assert call(f"{folder}/step-000003 new --format huggingface {UNVERIFIED}") == 0
        source = open_model(folder, checkpoint="step-000003")
        assert all(torch.equal(open_model("new").tensors[name], tensor) for name, tensor in source.tensors.items())
        card = Path("new/README.md").read_text()
        state = store.load_state(folder / "step-000003")["progress"]
        for row in (
            "| trained on | text |",
            "| steps | 3, 192 tokens |",
            f"| val loss | {state['val_loss']:.4f} nats a token |",
            f"torch {torch.__version__} |",
        ):
            assert row in card
        assert "max_new_tokens=4," in card  # the prompt and these fill the context
        assert "--dataset text.txt" in card
        assert "--n_embd 16" in card
        assert str(folder) not in card

    def test_a_card_is_a_table_whatever_the_names_are(self, trained, capsys):
        shutil.copytree(trained(), "a|b")
        assert call(f"'a|b' mid --format fastgpt {UNVERIFIED}") == 0
        Path("mid").rename("x|y")
        assert call(f"'x|y' new --format huggingface {UNVERIFIED}") == 0
        rows = [line for line in Path("new/README.md").read_text().splitlines() if line.startswith("| ")]
        assert r"| converted from | fastgpt x\|y |" in rows
        assert [line.replace(r"\|", "").count("|") for line in rows] == [3] * len(rows)

    @pytest.mark.parametrize(("position", "format"), [("sinusoidal", "huggingface"), ("none", "nanogpt")])
    def test_positions_are_baked_into_the_table(self, trained, position: str, format: str):
        flags = f"--position {position} --mlp gelu_exact"
        assert call(f"{trained(flags)} new --format {format} {UNVERIFIED}") == 0
        result = open_model(Path("new"))
        ours = model_in(trained(flags))
        wanted = position_table(ours.config)
        zeros = torch.zeros(8, 16)
        assert torch.equal(result.tensors["wpe.weight"], zeros if wanted is None else wanted)
        tokens = torch.arange(8)[None]
        with torch.no_grad():
            assert torch.allclose(model_in(Path("new"))(tokens), ours(tokens), atol=1e-6)

    def test_only_with_overwrite_is_an_earlier_result_replaced(self, capsys):
        for format in (*FORMATS, "huggingface"):
            assert call(f"hf new --format {format} --overwrite {UNVERIFIED}") == 0
            assert open_model(Path("new")).format == format
            assert "--dst new exists; name another, or replace it with --overwrite" in refusal(
                capsys, f"hf new --format {format} {UNVERIFIED}"
            )
        assert sorted(path.name for path in Path().iterdir()) == ["hf", "new"]

    def test_folders_on_the_way_are_made(self):
        assert call(f"hf a/b/new --format fastgpt {UNVERIFIED}") == 0
        assert [path.name for path in Path("a/b").iterdir()] == ["new"]


class TestLimits:
    """Refusals name the part of a model that a format cannot express, and the formats that can."""

    @pytest.mark.parametrize(
        ("flags", "format", "said"),
        [
            ("--position rotary", "huggingface", "cannot hold rotary positions (--position rotary); use --format"),
            ("--n_kv_head 1", "huggingface", "cannot hold grouped queries (--n_kv_head 1); use --format fastgpt"),
            ("--n_kv_head 1 --position rotary", "nanogpt", "grouped queries (--n_kv_head 1), rotary positions"),
            ("--qk_norm", "huggingface", "cannot hold norms of queries and keys (--qk_norm); use --format fastgpt"),
            ("--mlp relu", "nanogpt", "cannot hold ReLU (--mlp relu); use --format huggingface"),
            ("", "nanogpt", "--format nanogpt has --mlp gelu_exact alone, and the model has gelu; take that one with"),
        ],
    )  # fmt: skip
    def test_they_are_named(self, trained, capsys, monkeypatch, flags: str, format: str, said: str):
        # GGUF has limits of its own.
        monkeypatch.setitem(formats.FORMATS, "gguf", formats.Format(lambda config, tokenizer: "it", lambda *all: None))
        assert said in refusal(capsys, f"{trained(flags)} new --format {format} {UNVERIFIED}")

    def test_the_other_gelu_is_taken_where_that_is_asked_for(self, trained, capsys):
        assert call(f"{trained()} new --format nanogpt --approximate {UNVERIFIED}") == 0
        said = capsys.readouterr().out.splitlines()[1]
        assert re.fullmatch(
            r"approximated: the exact GELU for .* form; logits move by [1-9]\.\de-0[3-7] of the largest", said
        )
        assert open_model("new/ckpt.pt").config.mlp == "gelu_exact"

    @pytest.mark.parametrize("tokenizer", [None, ByteTokenizer()], ids=str)
    def test_a_vocabulary_that_is_not_the_models_is_refused(self, capsys, tokenizer):
        model, _ = exported(mlp="gelu_exact")
        write(Path("bad"), theirs(model), settings_of(model), tokenizer)
        said = "has no tokenizer" if tokenizer is None else "has 256 tokens, and its embedding 14 rows"
        for format in FORMATS:
            assert said in refusal(capsys, f"bad new --format {format} {UNVERIFIED}")


class TestNumbers:
    @pytest.mark.parametrize("format", FORMATS)
    @pytest.mark.parametrize(
        ("dtype", "value", "said"),
        [
            ("float32", float("nan"), "its weights are not finite: h.1.ln_1.weight holds a NaN"),
            ("float16", float("inf"), "its weights are not finite: h.1.ln_1.weight holds a NaN"),
            ("float16", 65_536.0, "--dtype float16 holds numbers up to 65504, and h.1.ln_1.weight has one of 65536"),
            ("float16", -7e4, "--dtype float16 holds numbers up to 65504, and h.1.ln_1.weight has one of 70000; use"),
            ("bfloat16", 3.4e38, "--dtype bfloat16 holds numbers up to 3.38953e+38, and h.1.ln_1.weight has one of"),
        ],
    )  # fmt: skip
    @pytest.mark.covering_array(1)
    def test_those_that_the_dtype_has_not_are_refused(self, capsys, format: str, dtype: str, value: float, said: str):
        self.put(value)
        assert said in refusal(capsys, f"hf new --format {format} --dtype {dtype} {UNVERIFIED}")

    @pytest.mark.parametrize(("dtype", "value"), [("float16", 65_504.0), ("bfloat16", -3e38), ("float32", 3.4e38)])
    def test_the_largest_are_kept(self, dtype: str, value: float):
        self.put(value)
        assert call(f"hf new --format huggingface --dtype {dtype} {UNVERIFIED}") == 0
        found = open_model("new").tensors["h.1.ln_1.weight"][3]
        assert float(found) == pytest.approx(value, rel=1e-2)

    @staticmethod
    def put(value: float) -> None:
        weights = load_file("hf/model.safetensors")
        weights["transformer.h.1.ln_1.weight"][3] = value
        save_file(weights, "hf/model.safetensors")


class TestTargets:
    @pytest.mark.parametrize(
        ("dst", "said"),
        [
            ("hf", "--dst hf is, or holds, the model that is converted; name another"),
            (".", ", which no conversion writes; name another"),
            ("text.txt", "--dst text.txt exists and is no folder; name another"),
            ("text.txt/new", "--dst text.txt/new cannot be written"),
            ("link", "--dst link exists and is no folder; name another"),
            ("lost", "--dst lost exists and is no folder; name another"),
            ("foreign", "--dst foreign holds notes.txt, which no conversion writes; name another"),
            ("run", "--dst run holds metrics.jsonl, which no conversion writes; name another"),
            ("x.gguf", "--dst x.gguf: --format huggingface is a folder"),
            ("step-000099", "--dst step-000099 has the name of a checkpoint of a run; name another"),
            ("a" * 250, "cannot be written: File name too long; name another"),
            ("/proc/new", "--dst /proc/new cannot be written"),
        ],
    )
    def test_what_is_no_place_for_a_result_is_left_alone(self, capsys, trained, dst: str, said: str):
        Path("text.txt").write_text("text")
        shutil.copytree("hf", "foreign")
        Path("foreign/notes.txt").write_text("notes")
        Path("link").symlink_to("foreign")
        Path("lost").symlink_to("nowhere")
        shutil.copytree(trained(), "run")
        assert said in refusal(capsys, f"hf {dst} --format huggingface --overwrite {UNVERIFIED}")

    @pytest.mark.parametrize("format", FORMATS)
    def test_a_folder_that_holds_the_source_is_not_replaced(self, capsys, format: str):
        """A source may be a file in it, or in a folder that looks like a step's."""
        assert call(f"hf new --format nanogpt {UNVERIFIED}") == 0
        shutil.copytree("hf", "outer/step-000001")
        for src, dst in (("new/ckpt.pt", "new"), ("outer/step-000001", "outer"), ("../{0}/hf", "hf")):
            src = src.format(Path.cwd().name)
            assert "is, or holds, the model" in refusal(
                capsys, f"{src} {dst} --format {format} --overwrite {UNVERIFIED}"
            )

    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            ("hf", "--dst is missing: where to write it"),
            ("hf new", "--format is missing: what to write"),
            ("hf new --format onnx", "--format 'onnx' is not one of huggingface, gguf, nanogpt, fastgpt"),
            ("hf new --format huggingface --dtype q8_0", "--dtype q8_0 is for --format gguf, not huggingface"),
            ("hf new --format huggingface --checkpoint latest", "--checkpoint latest is for the folder of a run"),
            ("nope/x/y new --format huggingface", "--src nope/x/y holds no run"),
        ],
    )
    def test_bad_usage_is_one_line(self, capsys, flags: str, said: str):
        assert said in refusal(capsys, flags)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_json_files_are_whole_objects():
    assert call(f"hf new --format huggingface {UNVERIFIED}") == 0
    names = {path.name for path in Path("new").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                     "tokenizer_config.json", "README.md"}  # fmt: skip
    settings = json.loads(Path("new/tokenizer_config.json").read_text())
    assert (settings["tokenizer_class"], settings["model_max_length"]) == ("PreTrainedTokenizerFast", 12)
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
