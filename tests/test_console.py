"""What is printed is text: no escape sequence, no markup, whoever wrote it; and files that are not what they say."""

import io
import json
import re
import threading
import time
from pathlib import Path

import pytest
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

import tokencredit
from tokencredit import argument_types
from tokencredit.cli import main, make_parser
from tokencredit.console import PlainConsole, visible
from tokencredit.progress import TrainProgress, bar, columns, plain_table
from tokencredit.studies.study import status
from tokencredit.tasks import data
from tokencredit.train_config import TrainConfig

NASTY = "a\x1b[31mb [red]c[/red] :smile: \x07\x9b2J\u202e\r\ud800"
SHOWN = r"a\x1b[31mb [red]c[/red] :smile: \x07\x9b2J\u202e\x0d\ud800"
UNSAFE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800]")


def printed(print_it, width=100, **options):
    file = io.StringIO()
    print_it(PlainConsole(file=file, width=width, color_system=None, **options))
    assert not UNSAFE.search(file.getvalue()), repr(file.getvalue())
    return file.getvalue()


def in_table(console):
    table = Table(NASTY, title=NASTY, caption=NASTY)
    table.add_row(NASTY)
    table.add_row(Text(NASTY.replace("\x07", "").replace("\r", ""), style="bold"))
    console.print(table)


def in_progress(console):
    with Progress(*columns(), console=console, auto_refresh=False) as progress:
        progress.add_task(NASTY, total=3, figures="")
        progress.console.print(NASTY)


def in_status(console):
    with console.status(NASTY) as status:
        status.update(NASTY)
        console.print(status.renderable)


@pytest.mark.parametrize(
    "print_it",
    [
        lambda console: console.print(NASTY),
        lambda console: console.print(f"- {NASTY}", soft_wrap=True, style="red"),
        lambda console: console.print(Text("x ") + Text(visible(NASTY))),
        in_table,
        in_status,
    ],
)
def test_what_is_printed_is_text(print_it):
    assert SHOWN in printed(print_it)


def test_a_bar_is_text():
    assert SHOWN in printed(in_progress)


def test_styled_text_keeps_its_styles():
    """Characters 1 and 2, the escape and `b`, are bold; so is what is shown of them, and nothing else."""
    text = Text("a\x1bb\n\x00c", style="dim")
    text.stylize("bold", 1, 3)
    file = io.StringIO()
    PlainConsole(file=file, force_terminal=True, color_system="standard", width=80).print(text)
    assert re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue()) == "a\\x1bb\n\\x00c\n"
    bold = re.findall(r"\x1b\[1(?:;2)?m(.*?)\x1b\[0m", file.getvalue())
    assert bold == ["\\x1b", "b"]


def test_what_is_harmless_stays():
    text = "Ωé 🙂 ½ – “x” a\nb"
    assert visible(text) == text and printed(lambda console: console.print(text)) == f"{text}\n"


def test_one_console():
    """Nobody else makes one, prints with markup, or writes to the terminal past it, but for whole documents."""
    source = Path(tokencredit.__file__).parent
    for file in source.rglob("*.py"):
        if file.name == "console.py":
            continue
        text = file.read_text()
        assert not re.search(r"(?<!Plain)Console\(", text), f"{file} makes a console of its own"
        assert "[/bold]" not in text and "from_markup" not in text, file


@pytest.mark.parametrize(
    "argv",
    [
        ["report", "gone-{}"],
        ["evaluate", "--model", "./gone-{}"],
        ["evaluate", "--task", "{}"],
        ["methods", "{}"],
        ["train", "--out", "{}", "--set", "{}=3"],
        ["train", "--out", "x", "--config", "gone-{}.yaml"],
        ["score", "--out", "x", "--data", "gone-{}.jsonl"],
        ["pivotality", "export", "gone-{}"],
        ["dynamics", "kernel", "--run", "./gone-{}"],
    ],
)
def test_no_escape_sequence_reaches_the_terminal_in_an_error(argv, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "a\x1b[31mb[x]c"
    assert main([part.format(name) for part in argv]) == 1
    told = capsys.readouterr()
    assert not UNSAFE.search(told.err + told.out)
    assert r"a\x1b[31mb[x]c" in told.err or "\\\\x1b" in told.err, told.err


def test_no_escape_sequence_reaches_the_terminal_in_a_usage(capsys):
    with pytest.raises(SystemExit):
        main(["methods", "gtpo", "\x1b[31mmore"])
    assert r"unrecognized arguments: \x1b[31mmore" in capsys.readouterr().err


def test_columns_of_a_file_are_text(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(json.dumps({"\x1b]0;title\x07": 1, "[red]": 2}) + "\n")
    assert main(["score", "--data", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out.parquet")]) == 1
    assert r"there are: \x1b]0;title\x07, [red]" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["score", "--prompts", "2", "--out", "{}/a.parquet"],
        ["pivotality", "plan", "--prompts", "1", "--samples", "1", "--tokens-per-second", "100", "--out", "{}/plan"],
        ["study", "theory", "--only", "L1", "--out", "{}/theory.json"],
        ["evaluate", "--prompts", "2", "--samples", "1", "--out", "{}/eval.json"],
    ],
)
def test_paths_are_printed_as_they_are(argv, tmp_path, capsys):
    folder = tmp_path / "a[x]b [/] :smile:"
    folder.mkdir(parents=True)
    assert main([part.format(folder) for part in argv]) == 0
    written = capsys.readouterr().out.replace("\n", "")
    assert list(folder.iterdir()) and (str(folder) in written or argv[1] == "plan")


# --- files that are not what they say ---------------------------------------------------------------------------------


def refused(path):
    with pytest.raises(ValueError) as caught:
        list(data.read(path))
    return str(caught.value)


def test_utf16_is_named(tmp_path):
    file = tmp_path / "a.jsonl"
    row = '{"prompt": "1", "answer": "é"}\n'
    for encoding, mark in (("utf-16-le", b"\xff\xfe"), ("utf-16-be", b"\xfe\xff")):
        file.write_bytes(mark + (row * 2).encode(encoding))
        assert refused(file).startswith(f"{file}, line 1: UTF-16 text (it begins with the bytes {mark.hex(' ')})")
    file.write_bytes(row.encode() + row.encode("latin-1"))
    assert refused(file) == f"{file}, line 2: not UTF-8 text (byte e9 at offset 27): save it as UTF-8"
    file.write_bytes(b"\xef\xbb\xbf" + row.encode())
    assert [found["answer"] for _, found in data.read(file)] == ["é"]


def test_a_config_in_utf16_is_named(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("steps: 3", encoding="utf-16")
    assert main(["train", "--config", str(tmp_path / "a.yaml"), "--out", str(tmp_path / "run")]) == 1
    assert "a.yaml is UTF-16 text" in " ".join(capsys.readouterr().err.split())


def test_a_broken_parquet_file_is_named(tmp_path, capsys):
    import pyarrow
    from pyarrow import parquet

    folder = tmp_path / "a[x]b"
    folder.mkdir()
    file = folder / "rows.parquet"
    parquet.write_table(pyarrow.table({"prompt": ["1"] * 3, "answer": ["2"] * 3}), file)
    assert [row["answer"] for _, row in data.read(file)] == ["2"] * 3
    raw = file.read_bytes()
    for broken in (raw[:-10], raw[: len(raw) // 2], b"", b"text", raw[:4] + b"\xff" * (len(raw) - 12) + raw[-8:]):
        file.write_bytes(broken)
        assert refused(file).startswith(f"{file} is not a whole Parquet file (")
        assert main(["score", "--data", str(file), "--out", str(folder / "out.parquet")]) == 1
        assert "rows.parquet is not a whole Parquet file" in " ".join(capsys.readouterr().err.split())


# --- numbers ----------------------------------------------------------------------------------------------------------


def numbers(parser, path=()):
    """(command, flag, action) of every flag that takes a number."""
    kinds = {*argument_types.WHOLE.values(), *argument_types.REAL.values(), int, float}
    for action in parser._actions:
        if hasattr(action, "choices") and isinstance(action.choices, dict):
            for name, command in action.choices.items():
                yield from numbers(command, (*path, name))
        elif action.type in kinds:
            yield " ".join(path), action.option_strings[0], action


NUMBERS = list(numbers(make_parser()))


@pytest.mark.parametrize("command, flag, action", NUMBERS, ids=[f"{command} {flag}" for command, flag, _ in NUMBERS])
def test_every_number_has_a_kind_that_refuses_what_means_nothing(command, flag, action, capsys):
    """A flag whose name has no kind stays an int or a float: give it one in `argument_types`."""
    assert action.type not in (int, float), f"{flag} of {command} has no kind"
    need = action.nargs if isinstance(action.nargs, int) else 1
    signed = ("-1",) if action.type is not argument_types.finite else ()
    for wrong in (*signed, "nan", "inf", "many", "1e999"):
        with pytest.raises(SystemExit):
            main([*command.split(), flag, *[wrong] * need])
        assert re.search(rf"argument .*{flag}.*: must be .*got ", capsys.readouterr().err)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["evaluate", "--max-new-tokens", "0"], "argument --max-new-tokens: must be at least 1, got 0"),
        (["score", "--out", "x", "--max-new-tokens", "0"], "argument --max-new-tokens: must be at least 1, got 0"),
        (["pivotality", "plan", "--success", "7"], "argument --success: must be between 0 and 1, got 7"),
        (["pivotality", "plan", "--tokens-per-second", "-3"], "argument --tokens-per-second: must be a number above 0"),
        (
            ["study", "correlation", "--temperatures", "1", "nan"],
            "argument --temperatures: must be a temperature above",
        ),
        (["evaluate", "--prompts", "1000000000"], "argument --prompts: a number of 1,000,000,000 would need 3,815 GiB"),
        (["evaluate", "--seed", "4294967296"], "argument --seed: must be below 4,294,967,296"),
        (["pivotality", "plan", "--top-p", "0"], "argument --top-p: must be above 0 and at most 1, got 0"),
    ],
)
def test_numbers_are_refused_by_name(argv, message, capsys):
    with pytest.raises(SystemExit):
        main(argv)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "setting, message",
    [
        ("threads=100000", r"threads 100,000 is too many for \d+ cores: \d+ at the most"),
        ("prompts=1000000000", "prompts x group 8,000,000,000 would need"),
        ("steps=1000000000", "prompts x steps 64,000,000,000 would need"),
        ("eval_prompts=1000000000", "eval_prompts x eval_samples 8,000,000,000 would need"),
        ("seed=4294967296", "seed must be below 4,294,967,296"),
    ],
)
def test_sizes_that_no_machine_holds_are_refused(setting, message, tmp_path, capsys):
    assert main(["train", "--out", str(tmp_path / "run"), "--set", setting]) == 1
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
    assert not (tmp_path / "run").exists()


def test_a_product_that_no_machine_holds_is_refused(capsys):
    assert main(["evaluate", "--prompts", "500000", "--samples", "500000"]) == 1
    assert "--prompts x --samples 250,000,000,000 would need" in " ".join(capsys.readouterr().err.split())


def test_a_table_wider_than_the_terminal_leaves_no_digit_out():
    """Names stay whole; figures go over several lines."""
    table = plain_table("of the run", "=method", *(f">measure {n}" for n in range(4)), "verdict")
    table.add_row("entropy_bonus_adaptive", *["0.384 [−0.0809, 0.85]"] * 4, "not told apart")
    text = printed(lambda console: console.print(table), width=80)
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    assert (
        "entropy_bonus_adaptive" in text and text.count("0.384") == text.count("[−0.0809,") == text.count("0.85]") == 4
    )


def test_a_bar_without_a_total_ends_with_what_was_done():
    def count(console):
        with bar(console, "rollouts", None) as advance:
            advance(38)

    assert "38/38" in printed(count) and "?" not in printed(count)


def test_a_bar_whose_units_are_done_in_parts_ends_whole():
    def count(console):
        with bar(console, "rollouts", 1) as advance:
            for _ in range(10):
                advance(0.1)

    assert sum([0.1] * 10) < 1 and "1/1" in printed(count)


def until(said, page):
    while said not in page.getvalue():
        time.sleep(0.001)


@pytest.mark.parametrize("shown", ["bar", "status", "training"])
def test_a_log_gets_lines_of_what_a_terminal_draws(shown, monkeypatch):
    """Every line once, while the work goes on; with the time left, though a unit takes longer than a while."""
    monkeypatch.setattr("tokencredit.progress.EVERY", 0.001)
    page = io.StringIO()
    console = PlainConsole(file=page, width=100)
    if shown == "bar":
        with bar(console, "roll[b]outs", 4) as advance:
            advance(1, 20)
            until("roll[b]outs 1/4", page)
            advance(1, 20)
            until("2/4", page)
            assert re.search(r"2/4 +[0-9]+:[0-9]+ 40 tokens", page.getvalue())
    if shown == "status":
        with status(console) as say:
            until("loading", page)
            say("the [b] step")
            until("the [b] step", page)
        assert page.getvalue().splitlines() == ["loading", "the [b] step"]
    if shown == "training":
        with TrainProgress(console, TrainConfig(steps=3, method="gtpo")) as progress:
            progress.listen("step", {"step": 2, "pass_rate": 0.5})
            until("pass 0.50", page)
        assert re.search(r"gtpo 2/6 .*pass 0.50", page.getvalue())


def test_a_terminal_gets_no_lines_besides(monkeypatch):
    monkeypatch.setattr("tokencredit.progress.EVERY", 0.001)
    page = io.StringIO()
    before = set(threading.enumerate())
    with status(PlainConsole(file=page, width=100, force_terminal=True)):
        assert not [thread for thread in set(threading.enumerate()) - before if "speak" in thread.name]
    with status(PlainConsole(file=page, width=100)):
        assert [thread for thread in set(threading.enumerate()) - before if "speak" in thread.name]


def test_training_says_how_much_it_will_do_and_how_far_an_evaluation_is():
    page = io.StringIO()
    with TrainProgress(PlainConsole(file=page, width=400), TrainConfig(steps=3, prompts=4, task="stories")) as progress:
        progress.listen("start", {"step": 0})
        progress.listen("evaluating", {"step": 0, "done": 99.5, "total": 320})
        assert progress.progress.tasks[0].fields["figures"] == "evaluating: 100 of 320"
    told = page.getvalue()
    assert "3 rollout batches (--steps) of 4 prompts × 8 = 32 completions, 2 updates on each" in told
    assert "64 held-out prompts × 4 and greedily" in told


def test_a_budget_that_training_does_not_fit_in_is_refused_before_there_is_a_directory(tmp_path, capsys):
    assert main(["train", "--memory", "900M", "--out", str(tmp_path / "run"), "--quiet"]) == 1
    assert "--memory 0.879G is too little to train" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
