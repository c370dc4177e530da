"""nanoGPT's ckpt.pt: a run starts from exactly its weights, and nothing that hides in such a file is run."""

import io
import json
import os
import pickle
import resource
import shlex
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastgpt import cli, train
from fastgpt.checkpoint import store
from fastgpt.config.model import ModelConfig
from fastgpt.errors import UsageError
from fastgpt.interchange import nanogpt_weights
from fastgpt.model.gpt import GPT
from fastgpt.training import run as training_run
from fastgpt.training.setup import Setup, prepare
from tests.helpers.covering import some
from tests.helpers.runs import TEXT

pytestmark = [
    pytest.mark.usefixtures("workplace"),
    # The warning that PyTorch gives of sparse tensors is no finding of ours.
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
LETTERS = len(set(TEXT))
SHAPE = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "bias": True, "vocab_size": LETTERS}
PREFIXES = ("", "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.")
START = "--dataset text.txt --device cpu --dtype float32 --batch_size 2 --max_iters 2 --eval_interval 2 --eval_iters 1"


def model_of(shape: dict) -> GPT:
    torch.manual_seed(7)
    model = GPT(ModelConfig(**shape, mlp="gelu_exact"))
    with torch.no_grad():
        for parameter in model.parameters():  # biases and gains as after a training
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def content_of(shape: dict, prefix: str = "") -> dict:
    """What nanoGPT's train.py saves."""
    weights = {f"{prefix}transformer.{n}": tensor.clone() for n, tensor in model_of(shape).weights().items()}
    weights[f"{prefix}lm_head.weight"] = weights[f"{prefix}transformer.wte.weight"]
    mask = torch.ones(1, 1, shape["block_size"], shape["block_size"]).tril()
    return {
        "model": weights | {f"{prefix}transformer.h.0.attn.bias": mask},  # which it has without flash attention
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95)}]},
        "model_args": shape | {"dropout": 0.1},
        "iter_num": 250,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "shakespeare_char", "compile": True},
    }


def write(content: object, **options) -> None:
    torch.save(content, "ckpt.pt", **options)


def start(flags: str = "", settings: str = START) -> int:
    return cli.run(train.main, ["--init_from", "ckpt.pt", *shlex.split(f"{settings} {flags}")])


def refusal(capsys, flags: str = "", settings: str = START) -> str:
    """The one line of a start that is refused, and that leaves no run."""
    capsys.readouterr()
    code = start(flags, settings)
    out, err = capsys.readouterr()
    assert code == 2, err
    assert out == ""
    *said, error = err.splitlines()
    assert all(line.startswith(("preset ", "the warm-up ", "prepared ", "reused ")) for line in said), err
    assert error.startswith("error: ")
    assert not store.holds_run(Path("out"))
    return error


class TestStart:
    def loaded(self, flags: str = "") -> Setup:
        """The run before its first step, from the flags of a command line."""
        seen = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training_run, "train", lambda config, sample, source: seen.append((config, source)))
            with pytest.raises(AttributeError):  # what a run returns is not there
                train.main(["--init_from", "ckpt.pt", *shlex.split(f"{START} {flags}")])
        return prepare(*seen[0])

    @pytest.mark.parametrize("prefix", PREFIXES)
    @pytest.mark.parametrize("bias", [True, False])
    def test_a_run_starts_from_exactly_these_weights_in_the_files_shape(self, prefix: str, bias: bool):
        shape = SHAPE | {"bias": bias, "n_layer": 3, "block_size": 6}
        write(content_of(shape, prefix))
        run = self.loaded()
        assert {name: getattr(run.config, name) for name in shape} == shape
        theirs = model_of(shape).weights()
        ours = run.state.model.weights()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
        assert ours["h.0.attn.c_attn.weight"].shape == (3 * 16, 16)  # nanoGPT's nn.Linear, not GPT-2's Conv1D
        assert run.state.progress.step == 0
        padding = run.state.model.wte.weight[LETTERS:]
        assert not padding.any()

    def test_a_file_from_before_biases_were_a_setting_has_them(self):
        content = content_of(SHAPE)
        del content["model_args"]["bias"]
        write(content)
        assert self.loaded().state.model.weights()["h.0.attn.c_attn.bias"].any()

    def test_the_losses_are_those_of_the_same_model(self):
        write(content_of(SHAPE))
        model, tokens = model_of(SHAPE).eval(), torch.randint(LETTERS, (2, 9))
        run = self.loaded()
        run.state.model.eval()
        assert torch.equal(run.state.model(tokens[:, :-1], tokens[:, 1:]), model(tokens[:, :-1], tokens[:, 1:]))

    @pytest.mark.parametrize("prefix", PREFIXES[:2])
    def test_a_training_goes_its_whole_way(self, capsys, prefix: str):
        write(content_of(SHAPE, prefix))
        assert start() == 0
        err = capsys.readouterr().err
        assert "the model's shape and weights are those of ckpt.pt" in err
        assert store.find(Path("out"), "latest").name == "step-000002"
        Path("ckpt.pt").unlink()  # it is needed no more
        assert cli.run(train.main, ["--init_from", "resume", "--max_iters", "4"]) == 0

    def test_a_copy_of_the_embedding_is_tied_too(self):
        content = content_of(SHAPE)
        content["model"]["lm_head.weight"] = content["model"]["lm_head.weight"].clone()
        write(content)
        assert "lm_head.weight" not in nanogpt_weights.load("ckpt.pt").tensors

    def test_the_form_of_gelu_is_nanogpts(self, capsys):
        write(content_of(SHAPE))
        assert self.loaded("--mlp gelu_exact").config.mlp == self.loaded().config.mlp == "gelu_exact"
        assert "--mlp gelu: the weights of ckpt.pt are for gelu_exact; leave it out" in refusal(capsys, "--mlp gelu")

    def test_other_settings_are_the_flags(self):
        write(content_of(SHAPE))
        config = self.loaded("--dropout 0.25 --learning_rate 0.5 --seed 3").config
        assert (config.dropout, config.learning_rate, config.seed) == (0.25, 0.5, 3)

    def test_a_smaller_vocabulary_takes_the_first_rows(self):
        shape = SHAPE | {"vocab_size": 64}  # as nanoGPT's padding of GPT-2's to 50,304
        write(content_of(shape))
        run = self.loaded()
        assert run.config.vocab_size == LETTERS
        assert torch.equal(run.state.model.weights()["wte.weight"], model_of(shape).weights()["wte.weight"][:LETTERS])
        assert not run.state.model.wte.weight[LETTERS:].any()

    def test_a_larger_vocabulary_is_refused(self, capsys):
        write(content_of(SHAPE | {"vocab_size": LETTERS - 1}))
        error = refusal(capsys)
        assert f"its vocabulary has {LETTERS - 1} tokens, and that of the data {LETTERS}" in error

    @pytest.mark.parametrize("flag", ["--n_layer 2", "--n_embd 32", "--block_size 9", "--no-bias", "--n_kv_head 1"])
    def test_another_shape_than_the_files_is_refused(self, capsys, flag: str):
        write(content_of(SHAPE))
        assert any(word in refusal(capsys, flag) for word in ("weights", "need", "positions"))

    def test_the_weights_are_no_map_of_the_file(self):
        write(content_of(SHAPE))
        run = self.loaded()
        Path("ckpt.pt").write_bytes(bytes(Path("ckpt.pt").stat().st_size))
        theirs = model_of(SHAPE).weights()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in run.state.model.weights().items())


class Canary:
    """Unpickling this does something: what no file may ever be able to."""

    def __init__(self, what: Callable, *arguments: object):
        self.reduced = (what, arguments)

    def __reduce__(self) -> tuple:
        return self.reduced


class Claim:
    """Unpickling this makes a tensor of any size over a storage of few bytes, by a function that is allowed."""

    def __init__(self, size: tuple[int, ...], stride: tuple[int, ...]):
        storage = torch.zeros(4).storage()
        self.reduced = (torch._utils._rebuild_tensor_v2, (storage, 0, size, stride, False, OrderedDict()))

    def __reduce__(self) -> tuple:
        return self.reduced


def rezip(change: Callable[[str, bytes], bytes], method: int = zipfile.ZIP_STORED) -> None:
    """Write the entries of ckpt.pt anew, changed."""
    with zipfile.ZipFile("ckpt.pt") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile("ckpt.pt", "w", method) as archive:
        for name, data in entries.items():
            archive.writestr(name, change(name, data))


def old_format(content: object) -> None:
    write(content, _use_new_zipfile_serialization=False)


def damaged(content: object) -> None:
    write(content)
    data = bytearray(Path("ckpt.pt").read_bytes())
    data[100:400] = bytes(300)
    Path("ckpt.pt").write_bytes(data)


def truncated(content: object) -> None:
    write(content)
    Path("ckpt.pt").write_bytes(Path("ckpt.pt").read_bytes()[:-200])


def zip_of_something() -> None:
    with zipfile.ZipFile("ckpt.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")


FILES: dict[str, Callable[[], object]] = {
    "missing": lambda: None,
    "a folder": lambda: Path("ckpt.pt").mkdir(),
    "empty": lambda: Path("ckpt.pt").touch(),
    "text": lambda: Path("ckpt.pt").write_text("The quick brown fox"),
    "a zip of something else": zip_of_something,
    "a zip of nothing": lambda: zipfile.ZipFile("ckpt.pt", "w").close(),
    "a plain pickle": lambda: Path("ckpt.pt").write_bytes(pickle.dumps({"model": {}})),
    "the old format": lambda: old_format(content_of(SHAPE)),
    "truncated": lambda: truncated(content_of(SHAPE)),
    "damaged": lambda: damaged(content_of(SHAPE)),
    "a link to itself": lambda: Path("ckpt.pt").symlink_to("ckpt.pt"),
    "a tensor": lambda: write(torch.zeros(3)),
    "a list": lambda: write([1, 2]),
    "no model": lambda: write({k: v for k, v in content_of(SHAPE).items() if k != "model"}),
    "no shape": lambda: write({k: v for k, v in content_of(SHAPE).items() if k != "model_args"}),
    "half a shape": lambda: write(content_of(SHAPE) | {"model_args": {"n_layer": 1}}),
    "a shape of nonsense": lambda: write(content_of(SHAPE) | {"model_args": SHAPE | {"n_layer": "1"}}),
    "a shape of nothing": lambda: write(content_of(SHAPE) | {"model_args": SHAPE | {"n_layer": 0}}),
    "a shape of 10 TB": lambda: write(content_of(SHAPE) | {"model_args": SHAPE | {"n_layer": 10**9}}),
    "a context of 10 TB": lambda: write(content_of(SHAPE) | {"model_args": SHAPE | {"block_size": 10**12}}),
    "no weights": lambda: write(content_of(SHAPE) | {"model": {}}),
    "weights that are none": lambda: write(content_of(SHAPE) | {"model": {"transformer.wte.weight": 3}}),
    "weights without names": lambda: write(content_of(SHAPE) | {"model": {3: torch.zeros(3)}}),
    "one weight too many": lambda: write_weight("transformer.h.9.weight", torch.zeros(3)),
    "a weight of another shape": lambda: write_weight("transformer.wpe.weight", torch.zeros(9, 16)),
    "an embedding without rows": lambda: write_weight("transformer.wte.weight", torch.zeros(())),
    "a sparse embedding": lambda: write_weight("transformer.wte.weight", torch.zeros(LETTERS, 16).to_sparse()),
    "a sparse weight": lambda: write_weight("transformer.wpe.weight", torch.zeros(8, 16).to_sparse()),
    "a weight without data": lambda: write_weight("transformer.wpe.weight", torch.empty(8, 16, device="meta")),
    "an embedding without data": lambda: write_weight(
        "transformer.wte.weight", torch.empty(LETTERS, 16, device="meta")
    ),
}


def write_weight(name: str, tensor: object) -> None:
    content = content_of(SHAPE)
    content["model"][name] = tensor
    write(content)


class TestRefused:
    @pytest.mark.parametrize("file", FILES)
    def test_what_is_no_checkpoint_of_nanogpt_is_one_line(self, capsys, file: str):
        FILES[file]()
        error = refusal(capsys)
        if "shape" not in file and "context" not in file and "weight" not in file and "embedding" not in file:
            assert error.startswith(("error: ckpt.pt ", "error: --init_from ckpt.pt ", "error: --init_from 'ckpt.pt' "))

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
    @pytest.mark.slow
    def test_a_named_pipe_is_not_waited_for(self):
        import subprocess
        import sys

        os.mkfifo("ckpt.pt")
        command = [sys.executable, "-m", "fastgpt.train", "--init_from", "ckpt.pt", *shlex.split(START)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr

    def test_the_library_raises_its_own_error(self):
        for name in ("missing", "text", "a folder"):
            if Path("ckpt.pt").is_file():
                Path("ckpt.pt").unlink()
            FILES[name]()
            with pytest.raises(UsageError, match=r"^ckpt\.pt "):
                nanogpt_weights.load("ckpt.pt")


class TestNothingIsRun:
    @pytest.fixture
    def loads(self, monkeypatch) -> list[dict]:
        """The settings of each call of torch.load."""
        calls, load = [], torch.load
        monkeypatch.setattr(torch, "load", lambda *rest, **named: calls.append(named) or load(*rest, **named))
        return calls

    @pytest.mark.parametrize("place", ["whole", "model", "model_args", "weight", "config", "optimizer", "key"])
    @pytest.mark.parametrize("what", ["touch", "system", "eval", "exec", "open"])
    def test_a_canary_does_not_sing(self, capsys, loads, place: str, what: str):
        canary = {
            "touch": Canary(Path.touch, Path("canary")),
            "system": Canary(os.system, "touch canary"),
            "eval": Canary(eval, "open('canary', 'w')"),
            "exec": Canary(exec, "open('canary', 'w')"),
            "open": Canary(io.open, "canary", "w"),
        }[what]
        content = content_of(SHAPE)
        if place == "whole":
            content = canary
        elif place == "weight":
            content["model"]["transformer.wpe.weight"] = canary
        elif place == "key":
            content["more"] = [(canary,)]
        else:
            content[place] = canary
        write(content)
        error = refusal(capsys)
        assert "it holds " in error
        assert error.endswith(", which is neither a tensor nor plain data; nothing in it was run")  # and no bad advice
        assert error.isprintable()
        assert not Path("canary").exists()
        assert [call.get("weights_only") for call in loads] == [True]  # and no other way was tried

    def test_the_canary_does_sing_where_nothing_stops_it(self):
        write({"model": Canary(os.system, "touch canary")})
        torch.load("ckpt.pt", weights_only=False)
        assert Path("canary").exists()

    @pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
    @pytest.mark.parametrize("file", ["the old format", "a plain pickle"])
    def test_a_canary_in_a_file_that_is_no_archive(self, capsys, loads, file: str, protocol: int):
        content = content_of(SHAPE) | {"config": Canary(os.system, "touch canary")}
        if file == "the old format":
            write(content, pickle_protocol=protocol, _use_new_zipfile_serialization=False)
        else:
            Path("ckpt.pt").write_bytes(pickle.dumps({"model": content["config"]}, protocol))
        assert "is no zip archive" in refusal(capsys)
        assert not Path("canary").exists()
        assert loads == []

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda content: content.pop("model_args"), "it has no model_args, which nanoGPT's train.py saves"),
            (lambda content: content.pop("model"), "it has no model, which nanoGPT's train.py saves"),
            (lambda content: content["model_args"].pop("n_head"), "its model_args lack n_head"),
            (
                lambda content: content["model_args"].update(n_head=torch.zeros(10**12, device="meta")),
                "n_head in its model_args is of type Tensor",
            ),
            (
                lambda content: content["model_args"].update(vocab_size=99),
                f"vocab_size in its model_args is 99, and wte.weight is for {LETTERS}",
            ),
            (
                lambda content: content["model"].update({"lm_head.weight": torch.zeros(LETTERS, 16)}),
                "its lm_head.weight is not wte.weight, to which the output layer is tied",
            ),
            (
                lambda content: content["model"].update({"_orig_mod.wpe.weight": torch.zeros(8, 16)}),
                "its weight wpe.weight is there twice",
            ),
        ],
    )
    def test_what_is_missing_or_wrong_is_named(self, capsys, change: Callable[[dict], object], reason: str):
        content = content_of(SHAPE)
        change(content)
        write(content)
        assert refusal(capsys).endswith(f"is not nanoGPT's checkpoint: {reason}; nothing in it was run")

    def test_an_archive_of_torchscript_is_not_run(self, capsys, loads):
        module = torch.jit.script(torch.nn.Linear(2, 2))
        module.save("ckpt.pt")
        assert "nothing in it was run" in refusal(capsys)
        assert all(call.get("weights_only") is True for call in loads)

    def test_every_load_of_a_good_file_is_of_weights_only(self, loads):
        write(content_of(SHAPE))
        assert start() == 0
        assert loads
        assert all(call.get("weights_only") is True for call in loads)

    def test_no_environment_variable_changes_that(self, capsys, loads, monkeypatch):
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
        write(content_of(SHAPE) | {"config": Canary(os.system, "touch canary")})
        refusal(capsys)
        assert not Path("canary").exists()


def bomb() -> None:
    """4 GiB of zeros in 4 MiB, claimed by a storage."""
    write({"model": {"transformer.wte.weight": torch.zeros(LETTERS, 16)}, "model_args": SHAPE})
    with zipfile.ZipFile("ckpt.pt") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile("ckpt.pt", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, data in entries.items():
            with archive.open(name, "w", force_zip64=True) as file:
                file.write(data)
                if name.endswith("/data/0"):
                    for _ in range(1 << 4):
                        file.write(bytes(1 << 24))


def claims(length: int) -> None:
    """A storage of other numbers than are there."""
    content = content_of(SHAPE)
    content["model"] |= dict.fromkeys(("transformer.wte.weight", "lm_head.weight"), torch.zeros(LETTERS, 16))
    write(content)
    count = LETTERS * 16
    short, long = b"M" + count.to_bytes(2, "little"), b"\x8a\x07" + (length // 4).to_bytes(7, "little")

    def change(name: str, data: bytes) -> bytes:
        if not name.endswith("data.pkl"):
            return data
        assert short in data
        return data.replace(short, long)

    rezip(change)


def entry_claims(length: int) -> None:
    """The archive's list says that an entry is longer than the file."""
    write(content_of(SHAPE))
    data = bytearray(Path("ckpt.pt").read_bytes())
    where = data.rindex(b"PK\1\2")
    while b"/data/" not in data[where : where + 100]:
        where = data.rindex(b"PK\1\2", 0, where)
    data[where + 20 : where + 28] = length.to_bytes(4, "little") * 2
    Path("ckpt.pt").write_bytes(data)


HUGE: dict[str, Callable[[], object]] = {
    "a zip bomb": bomb,
    "compressed": lambda: (write(content_of(SHAPE)), rezip(lambda name, data: data, zipfile.ZIP_DEFLATED)),
    "a storage of 10 TB": lambda: claims(10**13),
    "an entry of 4 GB": lambda: entry_claims(2**32 - 2),
    "a tensor of 10 TB": lambda: write_weight("transformer.wte.weight", Claim((10**12, 16), (16, 1))),
    "a weight of 10 TB that repeats": lambda: write_weight("transformer.wpe.weight", Claim((10**12, 16), (0, 0))),
    "a gain of 10 TB that repeats": lambda: write_weight("transformer.ln_f.weight", Claim((10**13,), (0,))),
    "an optimizer of 10 TB": lambda: write(content_of(SHAPE) | {"optimizer": Claim((10**13,), (1,))}),
    "a pickle of 100 MB": lambda: (
        write(content_of(SHAPE)),
        rezip(lambda name, data: data + bytes(100 << 20) if name.endswith("data.pkl") else data),
    ),
    "a memo of 16 GB": lambda: (
        write(content_of(SHAPE)),
        rezip(lambda name, data: b"\x80\x02Nr\xff\xff\xff\x7f." if name.endswith("data.pkl") else data),
    ),
    "bytes of 1 TB": lambda: (
        write(content_of(SHAPE)),
        rezip(lambda name, data: b"\x80\x02\x8e" + (1 << 40).to_bytes(8, "little") if name.endswith(".pkl") else data),
    ),
    "nested deep": lambda: (
        write(content_of(SHAPE)),
        rezip(lambda name, data: b"\x80\x02" + b"](" * 10**6 + b"." if name.endswith("data.pkl") else data),
    ),
    "a shape of 10 TB": lambda: write(content_of(SHAPE) | {"model_args": SHAPE | {"n_embd": 65536, "n_layer": 10**6}}),
}


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc and fork")
@pytest.mark.parametrize("file", some(4, [*HUGE]))
def test_sizes_are_checked_before_anything_is_allocated(file: str):
    HUGE[file]()
    number = os.fork()
    if number == 0:
        os.dup2(os.open("err.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        import sys

        sys.stderr, sys.stdout, code = os.fdopen(2, "w", buffering=1), io.StringIO(), 99
        try:
            taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (taken + (300 << 20), resource.RLIM_INFINITY))
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            code = start()
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            Path("grown.txt").write_text(json.dumps(grown))
        except BaseException as error:
            print(f"Traceback: {error!r}", file=sys.stderr)
        finally:
            sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
    err = Path("err.txt").read_text()
    assert "Traceback" not in err
    if file == "a storage of 10 TB":  # of which it is only the file's own bytes that are mapped
        assert code == 0, err
    else:
        *said, error = err.splitlines()
        assert code == 2, err
        assert all(line.startswith(("preset ", "the warm-up ", "prepared ", "reused ")) for line in said), err
        assert error.startswith("error: ")
    assert json.loads(Path("grown.txt").read_text()) < 200 << 10  # KiB
