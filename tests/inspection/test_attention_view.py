"""fastgpt inspect attention: page, picture and numbers say what the model does, and bad input is one line."""

import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fastgpt
from fastgpt import cli, inspect
from fastgpt.inspection import attention_maps, page_data
from fastgpt.tokenizer.byte import ByteTokenizer
from tests.helpers import gpt2_folders, runs
from tests.helpers.attention_data import data_of, lens_of, maps_of

TEXT = "the cat"
STEPS = [f"step-{step:06d}" for step in (1, 2, 3, 4)]


# Of the data, the part that there is room for; of the page, that of the lens; what is shown: layers, rows, tokens.
ROOMS = [
    (1.0, 0.4, [0, 1, 2, 3, 4], 6, 12),
    (0.99, 0.4, [0, 1, 3, 4], 6, 12),
    (0.9, 0.4, [0, 3], 6, 12),
    (0.6, 0.4, [3], 6, 6),
    (0.9, 0.0, [0, 1, 2, 3, 4], 2, 12),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of four checkpoints and a Hugging Face folder of more layers."""
    folder = tmp_path_factory.mktemp("inspected")
    runs.run_in(folder, "--n_layer 2 --max_iters 4 --eval_interval 1 --keep_last 9 --block_size 12 --out_dir out")
    gpt2_folders.folder_of(folder / "hf", n_layer=5)
    return folder


@pytest.fixture(autouse=True)
def in_place(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """An empty working folder beside the models, of which nothing may change."""
    for name in ("out", "hf"):
        (tmp_path / name).symlink_to(place / name)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()


def view(*words: str) -> int:
    return cli.run(inspect.main, ["attention", *words, "--device=cpu", "--threads=1"])


def written() -> set[str]:
    return {path.name for path in Path().iterdir()} - {"out", "hf"}


def exact(source: str = "out", text: str = TEXT, **options):
    """The maps and probabilities by the fast backend's loader."""
    return attention_maps(fastgpt.load(source, device="cpu", dtype="float32", **options), text)


def test_a_page_shows_a_run(capsys):
    assert view("out", "--text", TEXT) == 0
    out, err = capsys.readouterr()
    assert written() == {"attention.html"}
    assert out.startswith("wrote attention.html: ")
    assert err == ""
    data, found = data_of(Path("attention.html")), exact()
    assert [token["text"] for token in data["tokens"]] == list(TEXT)
    assert (data["layers"], data["H"], data["K"]) == ([0, 1], 2, 10)
    np.testing.assert_array_equal(maps_of(data), np.rint(255 * found.maps).astype(np.uint8))
    with torch.no_grad():
        fast = fastgpt.load("out", device="cpu", dtype="float32", kernels="torch").model(
            torch.tensor(found.tokens)[None]
        )
    fast = fast[0].softmax(-1).numpy()
    ids, probabilities = lens_of(data)
    np.testing.assert_allclose(probabilities[-1], np.take_along_axis(fast, ids[-1].astype(int), -1), atol=1e-4)
    np.testing.assert_array_equal(ids[-1, :, 0], fast.argmax(-1))
    (one,) = data["checkpoints"]
    losses = [-np.log(fast[t - 1, found.tokens[t]]) for t in range(1, len(TEXT))]
    assert one["losses"][0] is None
    np.testing.assert_allclose(one["losses"][1:], losses, atol=1e-3)
    (mean,) = re.findall(r"7 tokens, mean loss ([0-9.]+) nats", out)
    assert float(mean) == pytest.approx(np.mean(losses), abs=1e-3)
    assert one["lens"]["rows"] == ["embedding", "layer 0", "layer 1: output"]
    assert [len(heads) for heads in one["heads"]] == [2, 2]
    assert all(str(id) in data["vocabulary"] for id in ids.flat)


def test_numbers_and_a_picture_are_written_without_a_page(capsys):
    assert view("out", "--text", TEXT, "--json", "n.json", "--png", "p.png") == 0
    assert written() == {"n.json", "p.png"}
    assert Path("p.png").read_bytes().startswith(b"\x89PNG")
    data, found = json.loads(Path("n.json").read_text()), exact()
    (one,) = data["checkpoints"]
    maps = np.array(one["maps"])
    np.testing.assert_allclose(maps, found.maps, rtol=1e-5)
    np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-5)
    assert (maps[..., ~np.tri(len(TEXT), dtype=bool)] == 0).all()
    assert (data["source"], one["name"]) == (f"out, step {one['step']}", f"step {one['step']}")
    assert np.array(one["lens"]["probabilities"]).shape == (3, len(TEXT), 10)


def test_a_slider_over_checkpoints():
    run = str(Path("out").absolute())  # of which the page shows the last folder alone
    assert view(run, "--text", TEXT, "--checkpoints", "3", "--output", "s.html") == 0
    assert run not in Path("s.html").read_text(encoding="utf-8")
    data, losses = data_of(Path("s.html")), runs.records(Path("out"), "val_loss")
    assert [one["name"] for one in data["checkpoints"]] == ["step 1", "step 3", "step 4"]
    for at, one in enumerate(data["checkpoints"]):
        assert one["val_loss"] == pytest.approx(losses[one["step"]])
        found = exact(checkpoint_name=STEPS[one["step"] - 1])
        np.testing.assert_array_equal(maps_of(data, at), np.rint(255 * found.maps).astype(np.uint8))
    assert data["title"] == "Attention in out, steps 1 to 4"


@pytest.mark.parametrize(
    ("words", "layers", "picked"),
    [
        (["--layers", "1,3-4", "--layer", "3", "--head", "1"], [1, 3, 4], {"layer": 1, "head": 1}),
        (["--layer", "2"], [0, 1, 2, 3, 4], {"layer": 2, "head": 0}),
    ],
)
def test_layers_and_the_enlarged_head_are_chosen(words: list[str], layers: list[int], picked: dict[str, int]):
    assert view("hf", "--text", "cab", *words) == 0
    data = data_of(Path("attention.html"))
    assert data["layers"] == layers
    assert data["picked"]["layer"] == picked["layer"]
    assert "--head" not in words or data["picked"] == picked
    np.testing.assert_array_equal(maps_of(data), np.rint(255 * exact("hf", "cab").maps[layers]).astype(np.uint8))


@pytest.mark.parametrize(("room", "lens_share", "layers", "rows", "T"), ROOMS)
def test_what_is_too_large_is_left_out_and_told(
    room: float, lens_share: float, layers: list[int], rows: int, T: int, monkeypatch: pytest.MonkeyPatch, capsys
):
    words = ["hf", "--text", (text := "cab dagé 👩fe"), "--layer", "3"]
    empty = len(page_data.build({"title": "", "checkpoints": []}))
    assert view(*words) == 0
    limit = empty + int(room * (Path("attention.html").stat().st_size - empty))
    monkeypatch.setattr(page_data, "PAGE_BYTES", limit)
    monkeypatch.setattr(page_data, "LENS_SHARE", lens_share)
    capsys.readouterr()
    assert view(*words) == 0
    assert Path("attention.html").stat().st_size <= limit
    err, data = capsys.readouterr().err, data_of(Path("attention.html"))
    (one,), shown = data["checkpoints"], len(data["tokens"])
    assert (data["layers"], len(one["lens"]["rows"]), shown) == (layers, rows, T)
    assert data["layers"][data["picked"]["layer"]] == 3
    left_out = [note for note in data["notes"] if "shown" in note]
    assert len(left_out) == (layers != [0, 1, 2, 3, 4]) + (rows < 6) + (len(text) > T)
    assert err == "".join(f"[{note}; --layers chooses layers, and --json and --png have all]\n" for note in left_out)
    found = exact("hf", text).maps[layers, :, :T, :T]
    np.testing.assert_array_equal(maps_of(data), np.rint(255 * found).astype(np.uint8))
    assert len(one["losses"]) == T
    np.testing.assert_array_equal(lens_of(data)[0][-1, :, 0], exact("hf", text).probabilities[:T].argmax(-1))


def test_bytes_of_a_character_and_special_tokens_are_shown():
    tokenizer = ByteTokenizer(ends=True)
    shown = [
        page_data.token_values(tokenizer, token) for token in tokenizer.encode_special("\n한<|endoftext|>").tolist()
    ]
    assert [(one["text"], one["bytes"]) for one in shown] == [
        ("\n", None), ("\\xed", "ed"), ("\\x95", "95"), ("\\x9c", "9c"), ("<|endoftext|>", None)
    ]  # fmt: skip


def test_text_comes_from_a_file_or_stdin(monkeypatch: pytest.MonkeyPatch):
    Path("text.txt").write_bytes(b"the\r\ncat".replace(b"\r\n", b" "))
    assert view("out", "--text", "FILE:text.txt", "--json", "a.json") == 0
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    assert view("out", "--text", "-", "--json", "b.json") == 0
    assert Path("a.json").read_bytes() == Path("b.json").read_bytes()


def test_one_token_has_no_loss_and_no_labels(capsys):
    assert view("out", "--text", "T", "--output=o.html", "--png=o.png", "--json=o.json") == 0
    (one,) = json.loads(Path("o.json").read_text())["checkpoints"]
    assert one["maps"] == [[[[1]], [[1]]], [[[1]], [[1]]]]
    assert one["losses"] == one["ranks"] == [None]
    assert one["heads"][0][0]["scores"] == {"previous": None, "first": None, "induction": None}
    assert "1 token, no loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "saying"),
    [
        (["out"], "--text is missing"),
        (["out", "--text", ""], "--text is empty"),
        (["out", "--text", "FILE:nowhere"], "--text 'FILE:nowhere' cannot be read"),
        (["out", "--text", TEXT * 2], "--text has 14 tokens, and the model's context is 12"),
        (["out", "--text", "日"], "lacks '日'"),
        (["nowhere", "--text", TEXT], "--src nowhere is no file or folder here"),
        (["out", "--text", TEXT, "--checkpoint", "step-000009"], "'step-000009' is not in out"),
        (["hf", "--text", "cab", "--checkpoint", "latest"], "--checkpoint latest is for the folder of a run"),
        (["out", "--text", TEXT, "--layers", "2"], "--layers: there is no layer 2; the model's 2 layers are 0 to 1"),
        (["out", "--text", TEXT, "--layers", "a"], "--layers 'a' is no list of layers"),
        (["out", "--text", TEXT, "--layer", "2"], "--layer: there is no layer 2"),
        (["out", "--text", TEXT, "--head", "2"], "--head: there is no head 2; a layer's 2 heads are 0 to 1"),
        (["out", "--text", TEXT, "--layers", "0", "--layer", "1"], "--layer 1 is not among --layers 0"),
        (["out", "--text", TEXT, "--checkpoints", "0"], "--checkpoints '0' is neither all nor a number"),
        (["hf", "--text", "cab", "--checkpoints", "all"], "--checkpoints is for the folder of a run"),
        (["out/step-000002", "--text", TEXT, "--checkpoints", "all"], "--checkpoints is for the folder of a run"),
        (["nowhere", "--text", TEXT, "--checkpoints", "all"], "--src nowhere is no file or folder here"),
        (["out", "--text", TEXT, "--checkpoints=2", "--checkpoint=latest"], "leave one of them out"),
        (["out", "--text", TEXT, "--output", "no/page.html"], "--output no/page.html: there is no folder no"),
        (["out", "--text", TEXT, "--png", "."], "--png . is a folder"),
        (["out", "--text", TEXT, "--json", "/dev/null"], "--json /dev/null is no regular file"),
        (["out", "--text", TEXT, "--output", "a", "--png", "./a"], "--output and --png are both ./a"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(words: list[str], saying: str, capsys):
    assert view(*words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert saying in err
    assert written() == set()


def test_labelled_heads_are_listed(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr("fastgpt.inspection.heads.LABELLED", 0.01)
    monkeypatch.setattr("fastgpt.inspection.heads.TIMES_EQUAL", 0.0)
    assert view("hf", "--text", "cabcab", "--json", "n.json") == 0
    lines = capsys.readouterr().out.splitlines()
    heads = json.loads(Path("n.json").read_text())["checkpoints"][0]["heads"]
    scores = sorted(
        (head["scores"]["previous"], layer, at) for layer, of in enumerate(heads) for at, head in enumerate(of)
    )
    score, layer, at = scores[-1]
    head = heads[layer][at]
    shown = next(line.split() for line in lines if line.lstrip().startswith("previous token"))
    assert shown[2:] == [str(layer), str(at), f"{score:.2f}", f"{head['entropy']:.2f}", f"{head['distance']:.1f}"]
    assert "and 4 more" in "\n".join(lines)
