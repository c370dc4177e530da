"""The command line: spellings, who wins, one-line errors that name the way out, and exit codes."""

import ast
import contextlib
import io
import re
import shlex
import subprocess
import sys

import pytest

from fastgpt import cli
from fastgpt.config import fields as configuration
from fastgpt.config.curves import PlotConfig
from fastgpt.config.evaluation import CompareConfig
from fastgpt.config.generation import GenerateConfig
from fastgpt.config.training import PRESETS, TrainConfig
from fastgpt.errors import UsageError
from tests.helpers.places import ROOT


def parse(*words, kind=TrainConfig, presets=PRESETS, **more):
    return cli.parse(kind, words, prog="program", description="A program.", presets=presets, **more)


def generate(*words):
    return parse(*words, kind=GenerateConfig, presets=None)


def unnamed(words):
    kind, names = CompareConfig, ("src", "other")
    return cli.read(kind, shlex.split(words), prog="program", description="A program.", unnamed=names)[1]


def unnamed_list(words):
    kind, names = PlotConfig, ("runs",)
    return cli.read(kind, shlex.split(words), prog="program", description="A program.", unnamed=names)[1]


def toml(folder, text):
    file = folder / "run.toml"
    file.write_text(text, encoding="utf-8")
    return f"--config={file}"


def refused(*words, saying, kind=TrainConfig):
    """The words end in exit code 2 and one line that holds each part."""
    with contextlib.redirect_stderr(io.StringIO()) as error:
        assert cli.run(lambda argv: parse(*argv, kind=kind), words) == 2
    line = error.getvalue().removesuffix("\n")
    assert line.startswith("error: ")
    assert "\n" not in line
    for part in saying:
        assert part in line


@pytest.mark.parametrize(
    "words", ["--n_layer 7", "--n_layer=7", "--n-layer 7", "--n-layer=7", "--n_layer 3 --n-layer 7"]
)
def test_every_spelling_of_a_flag_works(words):
    assert parse(*words.split()).n_layer == 7


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--compile", True),
        ("--compile=True", True),
        ("--compile true", True),
        ("--compile on", True),
        ("--no-compile --compile", True),
        ("--no-compile", False),
        ("--no_compile", False),
        ("--compile=False", False),
        ("--compile false", False),
        ("--compile=1 --no-compile", False),
    ],
)
def test_every_spelling_of_a_switch_works(words, expected):
    assert parse(*words.split()).compile is expected


def test_a_switch_leaves_the_next_flag_alone():
    config = parse("--compile", "--n_layer", "7", "--no-bias", "--overwrite")
    assert (config.compile, config.n_layer, config.bias, config.overwrite) == (True, 7, False, True)


def test_nothing_given_is_the_defaults():
    assert parse() == TrainConfig()
    assert generate() == GenerateConfig()


def test_values_get_their_fields_type():
    config = parse("--learning_rate", "1", "--max_iters", "1_000", "--min_lr=1e-4", "--out_dir", "7")
    assert (config.learning_rate, config.max_iters, config.min_lr, config.out_dir) == (1.0, 1000, 1e-4, "7")
    assert isinstance(config.learning_rate, float)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_the_starting_point(preset):
    assert parse("--preset", preset) == PRESETS[preset]


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path):
    file = toml(tmp_path, 'preset = "baby"\nn_layer = 3\nbatch_size = 5\n')
    config = parse("--batch_size", "9", file)
    assert (config.n_embd, config.n_layer, config.batch_size) == (384, 3, 9)
    config = parse(file, "--preset", "cpu")
    assert (config.n_embd, config.n_layer, config.batch_size) == (128, 3, 5)


def test_reading_gives_the_preset_and_what_was_given_and_changing_puts_it_on_top(tmp_path):
    words = ["--n-layer", "2", toml(tmp_path, "batch_size = 5\nn_layer = 9")]
    preset, given = cli.read(TrainConfig, words, prog="program", description="A program.", presets=PRESETS)
    assert (preset, given) == (None, {"n_layer": 2, "batch_size": 5})
    config = cli.change(PRESETS["mini"], given)
    assert (config.n_layer, config.batch_size, config.n_embd) == (2, 5, 64)
    words += ["--preset", "baby"]
    assert cli.read(TrainConfig, words, prog="program", description="A program.", presets=PRESETS) == ("baby", given)


def test_what_was_given_is_judged_alone_when_read_and_together_when_it_changes_a_start():
    words = ["--n_head", "5"]
    given = cli.read(TrainConfig, words, prog="program", description="A program.", presets=PRESETS)[1]
    with pytest.raises(UsageError, match="`n_head` 5 does not divide `n_embd` 64"):
        cli.change(PRESETS["mini"], given)
    with pytest.raises(UsageError, match="`n_head` 0 must be at least 1"):
        cli.read(TrainConfig, ["--n_head", "0"], prog="program", description="A program.", presets=PRESETS)


def test_toml_holds_every_type(tmp_path):
    config = parse(toml(tmp_path, 'n_layer = 3\nlearning_rate = 1e-3\ncompile = true\nout_dir = "a"\ndropout = 0'))
    assert (config.n_layer, config.learning_rate, config.compile) == (3, 1e-3, True)
    assert (config.out_dir, config.dropout) == ("a", 0)


def test_a_byte_order_mark_before_toml_is_no_part_of_it(tmp_path):
    assert parse(toml(tmp_path, "\ufeffn_layer = 7")).n_layer == 7
    refused(toml(tmp_path, "\ufeff\ufeffn_layer = 7"), saying=["is not TOML"])


def test_toml_lists_become_tuples_and_aliases_work(tmp_path):
    file = toml(tmp_path, 'start = "Once"\nstop = ["a", "b"]')
    config = parse(file, kind=GenerateConfig, presets={"plain": GenerateConfig()})
    assert (config.prompt, config.stop) == ("Once", ("a", "b"))


@pytest.mark.parametrize(
    ("text", "saying"),
    [
        ("n_layr = 3", ["unknown key 'n_layr'", "did you mean n_layer?", "run.toml"]),
        ("qqqqqqqq = 3", ["unknown key 'qqqqqqqq'"]),
        ("[model]\nn_layer = 3", ["unknown key 'model'"]),
        ("seed = 1\nn_layer = x", ["run.toml", "is not TOML", "line 2"]),
        ("n_layer = 'x'", ["--n_layer 'x' is not of type int"]),
        ("n_layer = [1]", ["--n_layer", "is not of type int"]),
        ("n_layer = 0", ["--n_layer 0 must be at least 1"]),
        ("preset = 'bbay'", ["--preset 'bbay'", "did you mean baby?"]),
        ("preset = 3", ["preset 3"]),
        (f"seed = {'9' * 5000}", ["run.toml", "is not TOML"]),
        (f"seed = 0x{'f' * 5000}", ["--seed (thousands of digits)", "at most 9223372036854775807"]),
        ("seed = " + "[" * 5000, ["run.toml", "is not TOML"]),
        ('out_dir = "a\\u0000b"', [r"--out_dir 'a\x00b'", "NUL"]),
        ("seed = 1979-05-27", ["--seed", "is not of type int"]),
        ("preset = ['baby']", ["preset ['baby']"]),
    ],
)
def test_a_bad_toml_file_is_refused_and_the_nearest_named(text, saying, tmp_path):
    refused(toml(tmp_path, text), saying=saying)


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 5000, "a\0b", "\ud800"])
def test_a_toml_file_with_an_impossible_name_is_refused(name):
    refused(f"--config={name}", saying=["--config "])


def test_a_toml_file_that_cannot_be_read_is_refused(tmp_path):
    refused("--config", str(tmp_path / "no.toml"), saying=["--config", "no.toml", "No such file"])
    refused("--config", str(tmp_path), saying=["--config", "directory"])
    refused("--config=", saying=["--config"])
    (tmp_path / "latin.toml").write_bytes(b"out_dir = '\xe9'")
    refused("--config", str(tmp_path / "latin.toml"), saying=["latin.toml is not UTF-8", "iconv -f"])


@pytest.mark.parametrize(
    ("words", "saying"),
    [
        (["--n_layr", "3"], ["unknown flag --n_layr", "did you mean --n_layer?"]),
        (["--lerning-rate=3"], ["unknown flag --lerning_rate", "did you mean --learning_rate?"]),
        (["--no-compil"], ["unknown flag --no_compil", "did you mean --no_compile?"]),
        (["--n_lay", "3"], ["unknown flag --n_lay;"]),
        (["--qqqqqqqqqq", "3"], ["unknown flag --qqqqqqqqqq"]),
        (["--no-n_layer"], ["unknown flag --no_n_layer"]),
        (["--preset", "bbay"], ["--preset 'bbay'", "mini, cpu, baby", "did you mean baby?"]),
        (["--n_layer"], ["--n_layer needs a value"]),
        (["--n_layer", "--n_head", "3"], ["--n_layer needs a value", "--n_head is the next flag"]),
        (["--out_dir", "--no-compile"], ["--out_dir needs a value", "--no-compile is the next flag"]),
        (["--out_dir", "--seed=3"], ["--out_dir needs a value"]),
        (["--n_layer", "x"], ["--n_layer 'x' is not a whole number"]),
        (["--n_layer="], ["--n_layer '' is not a whole number"]),
        (["--n_layer", "6.5"], ["--n_layer '6.5' is not a whole number"]),
        (["--dropout", "much"], ["--dropout 'much' is not a number"]),
        (["--learning_rate", "-1"], ["--learning_rate -1.0 must be above 0"]),
        (["--n_layer", "-3"], ["--n_layer -3 must be at least 1"]),
        (["--learning_rate", "nan"], ["--learning_rate nan is not a finite number"]),
        (["--compile=maybe"], ["--compile 'maybe' is neither true nor false", "--no-compile"]),
        (["--compile", "maybe"], ["'maybe' is not a flag"]),
        (["--no-compile=true"], ["--no-compile takes no value"]),
        (["--no-compile", "true"], ["'true' is not a flag"]),
        (["train.py"], ["'train.py' is not a flag"]),
        (["--n_layer", "3", "4"], ["'4' is not a flag"]),
        (["-n", "3"], ["'-n' is not a flag"]),
        (["--"], ["unknown flag"]),
        (["--n_head", "7", "--n_embd", "100"], ["--n_head 7", "--n_embd 100", "try --n_head 5"]),
    ],
)
def test_a_bad_command_line_is_one_line_that_names_the_way_out(words, saying):
    refused(*words, saying=saying)


def test_preset_and_config_exist_only_where_there_are_presets():
    for flag in ("--preset", "--config"):
        with pytest.raises(UsageError, match=f"unknown flag {flag}"):
            generate(flag, "mini")


def test_a_value_may_start_with_a_dash():
    assert generate("--prompt=--stop it").prompt == "--stop it"
    assert generate("--prompt=--seed=3").prompt == "--seed=3"
    assert generate("--prompt", "-").prompt == "-"
    assert generate("--prompt", "- a list").prompt == "- a list"
    assert generate("--prompt", "a=b").prompt == "a=b"
    assert generate("--prompt=--", "--stop=--").stop == ("--",)
    assert generate("--prompt=--").prompt == "--"


def test_start_is_another_name_of_prompt():
    assert generate("--start", "FILE:a.txt").prompt == "FILE:a.txt"


def test_a_repeated_stop_accumulates():
    assert generate("--stop", "a", "--stop=", "--stop", "b c").stop == ("a", "", "b c")
    assert generate().stop == ()


@pytest.mark.parametrize("none", ["none", "None"])
def test_none_empties_an_optional_field(none):
    config = generate("--top_k", none, f"--top_p={none}", "--prompt", none)
    assert (config.top_k, config.top_p, config.prompt) == (None, None, none)
    refused("--n_layer", none, saying=[f"--n_layer '{none}' is not a whole number"])


def test_help_lists_every_flag_and_ends_well(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse("--help")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for name in (*TrainConfig.__dataclass_fields__, "preset", "config"):
        assert f"--{name} " in text
    assert "`" not in text
    flags = {part.split()[0]: " ".join(part.split()) for part in text.split("\n  --")[1:]}
    assert flags["n_layer"].endswith("[by preset]")
    assert flags["seed"].endswith("[1337]")
    assert "[by preset]" not in flags["max_rollbacks"]


@pytest.mark.parametrize(
    ("kind", "groups"),
    [
        (
            TrainConfig,
            {
                "Model": {"vocab_size", "n_layer", "n_head", "n_embd", "dropout", "position"},
                "Checkpoints": {
                    *("out_dir", "init_from", "overwrite", "keep_last", "keep_every", "async_save", "max_rollbacks")
                },
                "Data": {"dataset", "data_dir", "tokenizer", "allow_data_change"},
                "Optimisation": {"max_iters", "batch_size", "learning_rate", "beta2", "grad_clip", "skip_loss_sigma"},
                "Evaluation and logging": {"eval_interval", "eval_iters", "log_interval", "log_stats"},
                "Device": {"device", "threads", "dtype", "compile", "kernels"},
            },
        ),
        (
            GenerateConfig,
            {
                "Sampling": {"max_new_tokens", "temperature", "stop", "seed"},
                "Model": {"out_dir", "checkpoint", "model", "download"},
                "Prompts and answers": {"prompt", "prompts", "output", "interactive"},
                "Cache and batches": {"cache", "kv_memory", "max_batch", "speculate"},
                "Device": {"device", "threads", "dtype", "quantize", "compile", "kernels"},
            },
        ),
    ],
)
def test_help_shows_each_flag_in_its_group(kind, groups, capsys):
    with pytest.raises(SystemExit):
        parse("-h", kind=kind, presets=PRESETS if kind is TrainConfig else None)
    shown, title = {}, None
    for line in capsys.readouterr().out.splitlines():
        if line.endswith(":") and not line.startswith(" "):
            title = line.removesuffix(":")
            assert title not in shown
            shown[title] = set()
        elif line.startswith("  --"):
            shown[title].add(line.split()[0].removeprefix("--").rstrip(","))
    assert list(shown)[1:] == list(groups)
    for title, names in groups.items():
        assert names <= shown[title]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("a b --json", {"src": "a", "other": "b", "json": True}),
        ("--json a --dataset d b", {"src": "a", "other": "b", "json": True, "dataset": "d"}),
        ("--json=false a", {"src": "a", "json": False}),
        ("--json true a", {"src": "a", "json": True}),
        ("a --src b", {"src": "b"}),
        ("--src a b", {"src": "a", "other": "b"}),
        ("--other=b a", {"src": "a", "other": "b"}),
        ("--dataset d", {"dataset": "d"}),
        ("'' -h", None),
        ("", {}),
    ],
)
def test_flags_of_some_values_may_be_left_out(words, expected):
    if expected is None:
        with pytest.raises(SystemExit):
            unnamed(words)
    else:
        assert unnamed(words) == expected


@pytest.mark.parametrize(
    ("words", "saying"),
    [
        ("a b c", "'c' is not a flag"),
        ("a b --json c", "'c' is not a flag"),
        ("--src a b c", "'c' is not a flag"),
        ("a -x", "'-x' is not a flag"),
        ("a --dataset", "--dataset needs a value"),
        ("a --dataset --json", "--dataset needs a value, and --json is the next flag"),
    ],
)
def test_words_beyond_those_values_are_refused(words, saying):
    with pytest.raises(UsageError, match=saying):
        unnamed(words)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("a b c", {"runs": ("a", "b", "c")}),
        ("a --smooth 0 b", {"runs": ("a", "b"), "smooth": 0.0}),
        ("a --runs b c", {"runs": ("a", "b", "c")}),
        ("--runs a", {"runs": ("a",)}),
        ("--smooth 0", {"smooth": 0.0}),
    ],
)
def test_a_list_takes_every_value_without_a_flag(words, expected):
    assert unnamed_list(words) == expected


@pytest.mark.parametrize(
    ("words", "saying"),
    [("a ''", "`runs` '' is empty"), ("a 'b\0c'", "holds a NUL character"), (f"a {'x' * 300}", "cannot be looked up")],
)
def test_every_path_of_a_list_is_checked(words, saying):
    with pytest.raises(UsageError, match=saying):
        unnamed_list(words)


def test_the_help_shows_the_default_of_a_list(capsys):
    with pytest.raises(SystemExit):
        unnamed_list("--help")
    assert "the flag's name may be left out [out]" in " ".join(capsys.readouterr().out.split())


def test_a_message_names_an_argument_and_stderr_shows_its_flag(capsys):
    def main(argv):
        print("`n_head` 5; pass `compile=False`, `overwrite=True`, `dynamic` or `n_head = 3`", file=sys.stderr)
        print("`n_head`")
        raise UsageError("`n_head` 5 does not divide `n_embd` 384; see `dispatch.py`")

    assert cli.run(main) == 2
    out, err = capsys.readouterr()
    assert out == "`n_head`\n"
    assert err.splitlines() == [
        "--n_head 5; pass --no-compile, --overwrite, `dynamic` or `n_head = 3`",
        "error: --n_head 5 does not divide --n_embd 384; see `dispatch.py`",
    ]


@pytest.mark.parametrize(
    ("words", "message", "line"),
    [
        (["--stop", "`seed`"], "`stop` '`seed`' is no text", "--stop '`seed`' is no text"),
        ([], """`stop` "it's `seed`" is no text""", """--stop "it's `seed`" is no text"""),
        ([], r"`stop` 'it\'s \\' is no `seed`", r"--stop 'it\'s \\' is no --seed"),
        ([], "GPT-2's `n_head` is the run's", "GPT-2's --n_head is the run's"),
        (["--out_dir", "`seed`"], "`out_dir` `seed` is no `dataset`", "--out_dir `seed` is no --dataset"),
        (["--out_dir=a/`seed`"], "`out_dir` a/`seed`/b is no folder", "--out_dir a/`seed`/b is no folder"),
        (["--out_dir", "`out_dir`"], "`out_dir` `out_dir` is no folder", "--out_dir `out_dir` is no folder"),
    ],
)
def test_a_message_shows_what_the_user_wrote_as_it_is(capsys, words, message, line):
    def main(argv):
        raise UsageError(message)

    assert cli.run(main, words) == 2
    assert capsys.readouterr().err == f"error: {line}\n"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "fastgpt").glob("*/*.py")), ids=lambda path: f"{path.parent.name}.{path.stem}"
)
def test_a_room_knows_arguments_and_no_flags(path):
    """But for command lines that a user can copy, and parts of them, which begin with a space."""
    flags = [f"--{name}" for name in configuration.argument_names()] + ["--no-"]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and not node.value.startswith(" --"):
            text = re.sub(r"python -m fastgpt\.\w+( --\w+ \S*)*", "", node.value)
            assert [flag for flag in flags if flag in text] == [], node.value
            assert not re.search(r"(^|[^-])--$", text), "a flag whose name is filled in"


def test_run_returns_what_main_returns_and_passes_the_arguments(capsys):
    assert cli.run(lambda argv: len(argv), ["a", "b"]) == 2
    assert cli.run(lambda argv: 0, []) == 0
    assert capsys.readouterr() == ("", "")


def test_run_turns_a_usage_error_into_one_line_and_code_2(capsys):
    assert cli.run(lambda argv: parse(*argv), ["--n_layer", "x"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "error: --n_layer 'x' is not a whole number\n"


def test_an_error_stays_on_one_line_whatever_was_typed(capsys):
    assert cli.run(lambda argv: parse(*argv), ["--n\nlayer", "3"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: unknown flag --n layer")


def test_what_a_file_could_do_to_a_terminal_is_shown_instead(capsys):
    def main(argv):
        raise UsageError("the name \x1b[31mred\x07 of 가")

    assert cli.run(main) == 2
    assert capsys.readouterr().err == "error: the name \\x1b[31mred\\x07 of 가\n"


def test_run_turns_an_interrupt_into_130(capsys):
    def main(argv):
        raise KeyboardInterrupt

    assert cli.run(main, []) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_run_hides_no_other_failure():
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda argv: 1 // 0, [])


def test_a_reader_that_leaves_early_is_no_traceback():
    code = (
        "from fastgpt import cli\ndef main(argv):\n  while True: print('y' * 1000)\nraise SystemExit(cli.run(main, []))"
    )
    paths = [path for path in sys.path if path]
    program = [sys.executable, "-c", f"import sys; sys.path[:0] = {paths}\n{code}"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(10) == 1
