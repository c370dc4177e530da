"""`python -m fastgpt.convert`: the whole result under its name, or nothing."""

import errno
import importlib.util
import itertools
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgpt import cli, convert
from fastgpt.checkpoint import store
from fastgpt.checkpoint.source import open_model
from fastgpt.config.conversion import ConvertConfig
from fastgpt.conversion import formats, proof
from fastgpt.errors import RunFailed
from fastgpt.model.gpt import GPT
from fastgpt.model.positions import position_table
from fastgpt.ops import table
from fastgpt.tokenizer.byte import ByteTokenizer
from tests.helpers.covering import some
from tests.helpers.disks import Disk, in_child, limited
from tests.helpers.exports import LETTERS, exported
from tests.helpers.gpt2_folders import folder_of, settings_of, theirs, write
from tests.helpers.runs import contents, forge_manifest, run_in

FORMATS = ("huggingface", "nanogpt", "fastgpt")
UNVERIFIED = "--verify False"
OS_CODES = {"full": errno.ENOSPC, "read-only": errno.EROFS, "failing": errno.EIO}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch) -> Path:
    """The working folder, with hf/, a model that every format can hold."""
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "hf", mlp="gelu_exact")
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes runs with some flags, each once, which no test changes."""
    made: dict[str, Path] = {}

    def make(flags: str = "") -> Path:
        if flags not in made:
            made[flags] = run_in(tmp_path_factory.mktemp("trained"), f"--max_iters 3 {flags}")
        return made[flags]

    return make


def call(flags: str) -> int:
    return cli.run(convert.main, shlex.split(flags))


def refusal(capsys, flags: str, code: int = 2) -> str:
    """The one line of a conversion that is refused, and that leaves all as it was."""
    before, names = contents(Path()), sorted(Path().rglob("*"))
    capsys.readouterr()
    assert call(flags) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("error: " if code == 2 else "")
    assert contents(Path()) == before
    assert sorted(Path().rglob("*")) == names
    return err


def model_in(path: Path) -> GPT:
    source = open_model(path)
    config, cpu = source.config, torch.device("cpu")
    return GPT.from_weights(config, table.resolve("torch"), source.weights(config), cpu, torch.float32)


def place(folder: Path, format: str) -> Path:
    """What opens the result."""
    return folder / "ckpt.pt" if format == "nanogpt" else folder


class TestWritten:
    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    @pytest.mark.parametrize("format", FORMATS)
    @pytest.mark.covering_array(1)
    def test_the_result_holds_the_same_numbers(self, capsys, format: str, dtype: str):
        assert call(f"hf new --format {format} --dtype {dtype} {UNVERIFIED}") == 0
        out = capsys.readouterr().out
        count = exported()[0].num_parameters()
        assert out == f"wrote new: {count:,} parameters, {dtype}, char vocabulary\n"
        source, result = open_model("hf"), open_model(place(Path("new"), format))
        assert (result.config, result.tokenizer, result.format) == (source.config, LETTERS, format)
        for name, tensor in source.tensors.items():
            assert torch.equal(result.tensors[name], tensor.to(getattr(torch, dtype))), name

    @pytest.mark.parametrize("way", [["huggingface", "fastgpt", "huggingface"], ["nanogpt", "huggingface", "nanogpt"]])
    def test_there_and_back_is_the_same_bits(self, way: list[str]):
        path = Path("hf")
        for number, format in enumerate(way):
            assert call(f"{path} {number} --format {format} {UNVERIFIED}") == 0
            path = place(Path(str(number)), format)
        last, first = open_model(path), open_model(place(Path("0"), way[0]))
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
        result = open_model(place(Path("new"), format))
        ours = model_in(trained(flags))
        wanted = position_table(ours.config)
        zeros = torch.zeros(8, 16)
        assert torch.equal(result.tensors["wpe.weight"], zeros if wanted is None else wanted)
        tokens = torch.arange(8)[None]
        with torch.no_grad():
            assert torch.allclose(model_in(place(Path("new"), format))(tokens), ours(tokens), atol=1e-6)

    def test_only_with_overwrite_is_an_earlier_result_replaced(self, capsys):
        for format in (*FORMATS, "huggingface"):
            assert call(f"hf new --format {format} --overwrite {UNVERIFIED}") == 0
            assert open_model(place(Path("new"), format)).format == format
            assert "--dst new exists; name another, or replace it with --overwrite" in refusal(
                capsys, f"hf new --format {format} {UNVERIFIED}"
            )
        assert sorted(path.name for path in Path().iterdir()) == ["hf", "new"]

    def test_folders_on_the_way_are_made(self):
        assert call(f"hf a/b/new --format fastgpt {UNVERIFIED}") == 0
        assert [path.name for path in Path("a/b").iterdir()] == ["new"]


class TestLimits:
    """What a format cannot express is refused by name, with the formats that can."""

    @pytest.mark.parametrize(
        ("flags", "format", "said"),
        [
            ("--position rotary", "huggingface", "cannot hold rotary positions (--position rotary); use --format"),
            ("--n_kv_head 1", "huggingface", "cannot hold grouped queries (--n_kv_head 1); use --format fastgpt"),
            ("--n_kv_head 1 --position rotary", "nanogpt", "grouped queries (--n_kv_head 1), rotary positions"),
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
class TestDisks:
    @pytest.mark.parametrize("way", OS_CODES)
    @pytest.mark.parametrize("format", ["huggingface", "fastgpt"])
    @pytest.mark.covering_array(1)
    def test_a_disk_that_refuses_leaves_nothing(self, here: Path, way: str, format: str):
        for number in range(0, 9, 4):
            disk, count = Disk(str(here), lambda event, path: True), iter(range(99))
            disk.wants = lambda event, path, count=count, number=number: next(count) >= number and "err" not in path

            def action(disk: Disk = disk) -> int:
                disk.number = OS_CODES[way]
                return call(f"hf new --format {format} {UNVERIFIED}")

            assert in_child(action) == 2
            said = Path("err.txt").read_text()
            assert said == f"error: --dst new cannot be written: {os.strerror(OS_CODES[way])}; name another\n"
            assert sorted(path.name for path in here.iterdir()) == ["err.txt", "hf", "out.txt"]

    @pytest.mark.parametrize("format", FORMATS)
    def test_a_file_that_may_not_grow_leaves_nothing(self, here: Path, format: str):
        def action() -> int:
            limited(4096)
            return call(f"hf new --format {format} {UNVERIFIED}")

        assert in_child(action) == 2
        said = Path("err.txt").read_text()
        assert said == "error: --dst new cannot be written: File too large; name another\n"
        assert sorted(path.name for path in here.iterdir()) == ["err.txt", "hf", "out.txt"]

    @pytest.mark.parametrize(
        ("format", "old"),
        some(1, [*itertools.product(FORMATS, [True, False])]),
    )
    def test_a_killed_conversion_is_whole_or_nothing_and_the_next_one_cleans_up(
        self, here: Path, format: str, old: bool
    ):
        """Killed at every operation that changes the folder, one after another, until it gets to its end."""
        if old:
            assert call(f"hf kept --format {format} {UNVERIFIED}") == 0
            shutil.copytree("kept", "new")
        before = {name.removeprefix("new"): data for name, (data, _) in contents(Path("new")).items()}
        for number in range(0, 200, 3):
            if killed_at(number, f"hf new --format {format} --dtype bfloat16 --overwrite {UNVERIFIED}") == 0:
                break
            found = {name.removeprefix("new"): data for name, (data, _) in contents(Path("new")).items()}
            if Path("new").exists():
                assert found == before or open_model(place(Path("new"), format)).format == format
            assert call(f"hf new --format {format} --overwrite {UNVERIFIED}") == 0
            assert sorted(p.name for p in here.iterdir() if p.name[0] == ".") == []
            shutil.rmtree("new")
            if old:
                shutil.copytree("kept", "new")
        else:
            raise AssertionError("it never got to its end")
        assert number >= 9

    def test_what_was_put_aside_is_put_back(self, capsys, here: Path):
        """Killed between the two renames of a replacement, it leaves the old result aside."""
        assert call(f"hf new --format huggingface {UNVERIFIED}") == 0
        before = contents(Path("new"))
        Path("new").rename(".fastgpt-tmp-aside-new-123")
        Path(".fastgpt-tmp-aside-newer-123").mkdir()  # another's
        capsys.readouterr()
        assert call(f"hf new --format huggingface {UNVERIFIED}") == 2
        assert "--dst new exists" in capsys.readouterr().err
        assert contents(Path("new")) == before
        assert sorted(path.name for path in here.iterdir()) == [".fastgpt-tmp-aside-newer-123", "hf", "new"]


def killed_at(number: int, flags: str) -> int:
    """The exit code of a conversion in a process of its own that is killed at an operation on the disk; 0: it ended."""

    def action() -> int:
        left = iter(range(number))

        def hook(event: str, arguments: tuple) -> None:
            writes = event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "fastgpt.write", "fastgpt.sync")
            if (writes or changes) and next(left, None) is None:
                os.kill(os.getpid(), 9)

        sys.addaudithook(hook)
        return call(flags)

    return in_child(action)


class TestProof:
    @pytest.fixture(autouse=True)
    def no_peers(self, monkeypatch) -> None:
        """As if no peer were installed; importing one takes seconds."""
        found = importlib.util.find_spec
        missing = ("transformers", "xllamacpp")
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *rest: None if name in missing else found(name, *rest)
        )

    def test_without_the_peer_it_says_so(self, capsys):
        assert call("hf new --format huggingface") == 0
        assert "not verified: transformers is not installed; pip install transformers" in capsys.readouterr().err

    def test_a_proof_that_was_asked_for_needs_the_peer_first(self, capsys):
        said = refusal(capsys, "hf new --format huggingface --verify")
        assert said == "error: --verify: transformers is not installed; pip install transformers\n"

    def test_our_own_format_is_compared_bit_by_bit(self, capsys, monkeypatch):
        assert call("hf new --format fastgpt") == 0
        assert "verified: 28 tensors have the bits that were written" in capsys.readouterr().out
        written = formats.FORMATS["fastgpt"].write

        def wrong(source, folder, final, dtype):
            written(source, folder, final, dtype)
            step = next(folder.glob("step-*"))
            weights = {name: tensor.clone() for name, tensor in load_file(step / store.MODEL).items()}
            weights["wpe.weight"][0, 0] += 1
            save_file(weights, step / store.MODEL)
            forge_manifest(step)

        monkeypatch.setitem(formats.FORMATS, "fastgpt", formats.Format(formats.FORMATS["fastgpt"].limit, wrong))
        shutil.rmtree("new")
        assert "the result holds other numbers in wpe.weight" in refusal(capsys, "hf new --format fastgpt", code=1)

    def test_a_failed_proof_leaves_the_old_result(self, capsys, monkeypatch):
        assert call(f"hf new --format huggingface {UNVERIFIED}") == 0

        def fail(config, source, result: Path) -> str:
            assert result.is_dir()
            raise RunFailed("it computes other logits")

        monkeypatch.setattr(proof, "prove", fail)
        assert "it computes other logits" in refusal(capsys, "hf new --format huggingface --overwrite", code=1)
        assert "it computes other logits" in refusal(capsys, "--format huggingface hf an/other/new", code=1)

    @pytest.mark.parametrize(
        ("scale", "dtype", "passes"),
        [
            (1e-7, "float32", True),
            (1e-4, "float32", False),
            (1e-3, "bfloat16", True),
            (0.1, "float16", False),
            (float("nan"), "float16", False),
        ],
    )
    def test_the_limits_of_a_proof(self, scale: float, dtype: str, passes: bool):
        """A peer whose logits are off by a part of the largest."""
        known = proof.reference(open_model("hf"))
        config = ConvertConfig(src="hf", dst="new", format="huggingface", dtype=dtype)
        size = known.model(known.tokens).abs().max().detach()

        def peer(tokens: torch.Tensor) -> torch.Tensor:
            logits = known.model(tokens).clone()
            logits[0, -1, 3] += scale * size
            return logits

        if passes:
            said = proof._compare_logits("peer", config, known, peer)
            assert said.startswith(f"verified with peer: logits differ by {scale:.0e}"[:-4])
        else:
            with pytest.raises(RunFailed, match="peer computes other logits: they differ by"):
                proof._compare_logits("peer", config, known, peer)

    def test_a_model_of_zeros_is_equal_to_itself_and_to_no_other(self):
        model, _ = exported()
        zeros = {name: torch.zeros_like(tensor) for name, tensor in theirs(model).items()}
        known = proof.reference(open_model(write(Path("zeros"), zeros, settings_of(model))))
        config = ConvertConfig(src="zeros", dst="new", format="huggingface")
        said = proof._compare_logits("peer", config, known, known.model)
        assert (
            said
            == "verified with peer: logits differ by 0.0e+00 of the largest (at most 1e-05), 0 greedy tokens the same"
        )
        with pytest.raises(RunFailed, match="peer computes other logits"):
            proof._compare_logits("peer", config, known, lambda tokens: known.model(tokens) + 1e-9)

    def test_greedy_tokens_count_up_to_a_near_tie(self):
        known = proof.reference(open_model("hf"))
        new = known.path.shape[1] - known.prompt
        assert new == 11
        with torch.no_grad():
            best = known.model(known.path)[0, known.prompt - 1 : -1].topk(2)
        assert best.indices[:, 0].tolist() == known.path[0, known.prompt :].tolist()
        near = ((best.values[:, 0] - best.values[:, 1]) < 1e-2).nonzero().flatten().tolist()
        assert known.sure == (near[0] if near else new)
        assert known.greedy == known.path[0, known.prompt : known.prompt + known.sure].tolist()


def test_json_files_are_whole_objects():
    assert call(f"hf new --format huggingface {UNVERIFIED}") == 0
    names = {path.name for path in Path("new").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                     "tokenizer_config.json", "README.md"}  # fmt: skip
    settings = json.loads(Path("new/tokenizer_config.json").read_text())
    assert (settings["tokenizer_class"], settings["model_max_length"]) == ("PreTrainedTokenizerFast", 12)
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
