"""Logs of every layout are read as the same rollouts, and what is wrong with a file is said with its place."""

import copy
import importlib.util
import json
import re
import warnings
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch

from tokencredit import logs
from tokencredit.lm.load import load_tokenizer
from tokencredit.logs import FORMATS, LoggedRollout
from tokencredit.logs.files import natural
from tokencredit.tasks.reckon import model_path

SAMPLES = Path(__file__).parent / "data" / "logs"
FOUND = [json.loads(line) for line in (SAMPLES / "rollouts.jsonl").read_text().splitlines()]
LIMIT = 20
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
TURNS = (
    "{% for m in messages %}<bos> {{ m['content'] }} <eos> {% endfor %}{% if add_generation_prompt %}<bos> {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(model_path()))


def chat(tokenizer, template=TEMPLATE):
    own = copy.deepcopy(tokenizer)
    own.chat_template = template
    return own


def quietly(function, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **options)


def read(path, **options):
    return quietly(lambda: list(logs.read(path, **options)))


def write(path, *rows, end="\n"):
    path.write_text("\n".join(json.dumps(row) for row in rows) + end)
    return path


def script():
    spec = importlib.util.spec_from_file_location("make_logs", SAMPLES / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# name of the sample: its format
LAYOUTS = {
    "verl": "verl",
    "trl": "trl",
    "trl_credit": "trl",
    "trl_chat": "trl",
    "prime_tokens": "prime-rl-tokens",
    "prime_rollouts": "prime-rl-rollouts",
    "prime_traces": "prime-rl-traces",
    "open_instruct": "open-instruct",
    "run": "run",
    "pivotality": "pivotality",
    "text": "text",
    "chat": "chat",
    "ids": "ids",
}


def test_every_format_has_a_sample():
    assert set(LAYOUTS.values()) == set(FORMATS)


def test_the_page_names_every_format_and_the_version_of_its_writer():
    page = (SAMPLES.parents[2] / "docs" / "logs.md").read_text(encoding="utf-8")
    for name, each in FORMATS.items():
        assert f"`{name}`" in page
        versions = re.findall(r" at (\w{7,})|trl (\d[\d.]+),", each.source)
        assert versions or not each.source or each.source.startswith("tokencredit")
        assert all(f"{commit}{release}" in page for commit, release in versions), name


def test_the_samples_are_what_their_script_writes(tmp_path):
    made = script()
    for name, layout in made.LAYOUTS.items():
        layout(tmp_path / name, FOUND)
    files = [path for path in sorted(SAMPLES.rglob("*.*")) if path.parent != SAMPLES and path.name != "run.json"]
    assert len(files) > 15
    for path in files:
        again = tmp_path / path.relative_to(SAMPLES)
        if path.suffix == ".parquet":
            tables = [str(pyarrow.parquet.read_table(each).to_pylist()) for each in (path, again)]
            assert tables[0] == tables[1], path
        elif path.suffix == ".jsonl":
            assert path.read_bytes() == again.read_bytes(), path


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_rollouts(name, tokenizer):
    found = read(SAMPLES / name)
    steps = sorted({each.step for each in found}) if name != "pivotality" else [None]
    assert steps == {"verl": [2, 10], "pivotality": [None]}.get(name, [3])
    own = [each for each in found if each.step == steps[-1]]
    with_template = "chat" in name or name in ("prime_rollouts", "prime_traces")
    encoded = logs.encode(own, chat(tokenizer) if with_template else tokenizer, limit=LIMIT)
    assert [list(ids) for ids in encoded.completion_ids] == [r["ids"] for r in FOUND]
    if name != "run":
        assert [list(ids) for ids in encoded.prompt_ids] == [r["prompt_ids"] for r in FOUND]
    assert all(all(mask) for mask in encoded.mask) and all(encoded.faithful) and encoded.notes == ()
    assert list(encoded.group) == [0, 0, 1, 1]
    extra = [0.25] * 3 if name.startswith("trl") else [0.0] * 3  # the second column of TRL's table counts too
    assert [each.reward for each in own] == [r["reward"] + x for r, x in zip(FOUND, [0.0, *extra])]
    rollouts = encoded.rollouts()
    assert rollouts.mask.sum(1).tolist() == [len(r["ids"]) for r in FOUND]


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("prime_tokens", {"sampler_logprob", "trainer_logprob", "entropy", "advantage"}),
        ("prime_traces", {"sampler_logprob", "trainer_logprob", "entropy", "advantage"}),
        ("open_instruct", {"sampler_logprob"}),
        ("run", {"sampler_logprob", "entropy", "advantage"}),
        ("trl_credit", {"entropy", "advantage"}),
        ("pivotality", {"entropy", "probability", "before_after"}),
        ("ids", {"sampler_logprob", "entropy"}),
    ],
)
def test_numbers_per_token_keep_their_places(name, kinds, tokenizer):
    made = script()
    written = {"sampler_logprob": "inference", "trainer_logprob": "trainer", "entropy": "entropy"}
    written |= {"advantage": "credit", "before_after": "credit"}
    found = read(SAMPLES / name)
    for each, r in zip(found, FOUND):
        assert kinds <= set(each.tokens)
        for kind in kinds & set(written):
            expected = made.per_token(r, written[kind])
            assert each.tokens[kind] == pytest.approx(expected), kind
    template = chat(tokenizer) if name == "prime_traces" else tokenizer
    encoded = logs.encode(found, template, limit=LIMIT)
    assert kinds <= set(encoded.rollouts().scores) | {"probability"}
    if "advantage" in kinds:
        assert encoded.credit()[encoded.padded(encoded.mask, False)].isfinite().all()


def test_nothing_that_was_logged_is_dropped():
    verl = read(SAMPLES / "verl")[0]
    assert verl.rewards == {"acc": 0.0, "format_score": 0.5} and verl.answer == FOUND[0]["answer"]
    assert verl.others == {"pred": FOUND[0]["text"][-1:], "request_id": "r0"}
    trl = read(SAMPLES / "trl")
    assert trl[0].rewards == {"correct": 0.0} and trl[1].rewards == {"correct": 0.0, "brief": 0.25}
    assert trl[0].advantage == 1.0 and trl[1].advantage == -1.0 and trl[0].others == {"reason": "?"}
    exported = read(SAMPLES / "prime_tokens")[0]
    assert exported.others["env_name"] == "reckon" and "position_ids" in exported.others
    assert read(SAMPLES / "prime_rollouts")[0].others["stop_condition"] == "done"
    assert read(SAMPLES / "run")[0].others["tokens"] == FOUND[0]["tokens"]
    assert read(SAMPLES / "open_instruct")[0].truncated is False


def test_files_go_by_the_numbers_in_their_names():
    assert [each.step for each in read(SAMPLES / "verl")] == [2] * 4 + [10] * 4
    assert sorted([Path("a/10.jsonl"), Path("a/2.jsonl"), Path("a/x.jsonl")], key=natural)[0] == Path("a/2.jsonl")


def test_an_advantage_for_a_whole_rollout_is_every_tokens(tokenizer):
    encoded = logs.encode(read(SAMPLES / "trl"), tokenizer, limit=LIMIT)
    credit = encoded.credit()
    assert torch.equal(credit[0][: len(FOUND[0]["ids"])], torch.ones(len(FOUND[0]["ids"])))
    assert logs.encode(read(SAMPLES / "text"), tokenizer, limit=LIMIT).credit() is None


# Columns --------------------------------------------------------------------------------------------------------------


def test_columns_are_named_by_the_field_they_are(tmp_path):
    path = write(tmp_path / "a.jsonl", {"q": "1", "a": "2", "meta": {"gold": "7", "r": 0.5}})
    mapping = {"prompt": "q", "completion": "a", "answer": "meta.gold", "reward": "meta.r"}
    (found,) = logs.read(path, columns=mapping)
    assert (found.prompt, found.completion, found.answer, found.reward) == ("1", "2", "7", 0.5)
    with pytest.raises(ValueError, match=r"no column 'score' for 'reward'; there are: q, a, meta"):
        list(logs.read(path, columns={"reward": "score"}))
    (found,) = logs.read(write(tmp_path / "b.jsonl", {"prompt": "1", "completion": "2", "score": 1}), format="text")
    assert found.reward == 1.0
    with pytest.raises(ValueError, match=r"there is no format 'verll'; there are: verl, run"):
        logs.read(path, format="verll")


def test_a_file_that_fits_nothing_says_what_came_nearest(tmp_path):
    path = write(tmp_path / "a.jsonl", {"input": "1", "output": "2", "score": 1.0})
    message = r"a\.jsonl fits no format\. Nearest is verl .*there is no column step; there are: input, output, score"
    with pytest.raises(ValueError, match=message):
        logs.read(path)
    with pytest.raises(ValueError, match=r"is not of the format trl .*no column advantage"):
        logs.read(write(tmp_path / "b.jsonl", {"step": 1, "prompt": "1", "completion": "2"}), format="trl")


def test_files_that_are_not_there_or_of_another_kind(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or directory"):
        logs.read(tmp_path / "none")
    with pytest.raises(ValueError, match=r"holds no \.jsonl or \.parquet file"):
        logs.read(tmp_path)
    (tmp_path / "a.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match=r"logs are read from \.jsonl and \.parquet files, not from '\.csv'"):
        logs.read(tmp_path / "a.csv")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"a\.parquet is not a whole Parquet file"):
        logs.read(tmp_path / "a.parquet")


def test_mixed_files_are_named(tmp_path):
    verl = write(tmp_path / "1.jsonl", {"input": "1", "output": "2", "score": 1.0, "step": 1})
    text = write(tmp_path / "2.jsonl", {"prompt": "1", "completion": "2"})
    with pytest.raises(ValueError, match=r"of several formats: .*1\.jsonl \(verl\), .*2\.jsonl \(text\)"):
        logs.read([verl, text])
    write(tmp_path / "2.jsonl", {"loss": 1.0, "step": 3})
    with pytest.warns(UserWarning, match=r"left out, since they hold no rollouts: .*2\.jsonl"):
        assert len(list(logs.read(tmp_path))) == 1
    mixed = write(tmp_path / "3.jsonl", {"prompt": "1", "completion": "2"}, {"prompt": "1", "answer": "2"})
    with pytest.raises(ValueError, match=r"3\.jsonl, line 2 has no completion, which text rows have"):
        list(logs.read(mixed))


# Rows -----------------------------------------------------------------------------------------------------------------


def test_a_last_line_that_was_cut_off_is_left_out(tmp_path):
    rows = [{"prompt": "1", "completion": "2"}] * 2
    path = write(tmp_path / "a.jsonl", *rows, end='\n{"prompt": "1", "comp')
    with pytest.warns(UserWarning, match=r"line 3: the last line is cut off and was left out"):
        assert len(list(logs.read(path))) == 2
    path.write_text('{"prompt": "1", "completion": "2"}\n{"prompt\n{"prompt": "1", "completion": "2"}\n')
    with pytest.raises(ValueError, match=r"line 2: not JSON"):
        list(logs.read(path))
    with pytest.raises(ValueError, match=r"b\.jsonl has no rows"):
        logs.read(write(tmp_path / "b.jsonl", end=""))


def test_rewards_that_are_text(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "1", "completion": "2", "reward": "1.0"})
    with pytest.warns(UserWarning, match=r"numbers of 'reward' are written as text"):
        assert next(logs.read(path)).reward == 1.0
    for value, message in (
        ("yes", r"line 1: 'reward' is the text 'yes', not a number"),
        ([1.0, 0.0], r"'reward' is a list, not a number \(a reward per token goes into token_reward\)"),
        (float("inf"), r"'reward' is inf, not a finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            list(logs.read(write(path, {"prompt": "1", "completion": "2", "reward": value})))
    (found,) = logs.read(write(path, {"prompt": "1", "completion": "2", "reward": float("nan")}))
    assert found.reward is None


def test_steps_that_go_back_are_said(tmp_path):
    row = {"prompt": "1", "completion": "2"}
    path = write(tmp_path / "a.jsonl", row | {"step": 3}, row | {"step": 2}, row | {"step": 1})
    with pytest.warns(UserWarning, match=r"line 2: step 2 stands after step 3") as said:
        assert [each.step for each in logs.read(path)] == [3, 2, 1]
    assert len(said) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprobs": [-1.0]}, r"line 1: 'logprobs' has 1 values for 2 tokens"),
        ({"mask": [1, 2]}, r"'mask' is no list of 0 and 1"),
        ({"mask": [1]}, r"'mask' has 1 values for 2 tokens"),
        ({"completion_ids": [1.5, 2]}, r"'completion_ids' is no list of token ids"),
        ({"completion_ids": [-1, 2]}, r"has the token id -1"),
        ({"step": 1.5}, r"'step' is 1\.5, not a whole number"),
    ],
)
def test_ragged_lists_and_odd_ids_are_named(tmp_path, change, message):
    row = {"prompt_ids": [1], "completion_ids": [2, 3], "reward": 1.0} | change
    with pytest.raises(ValueError, match=message):
        list(logs.read(write(tmp_path / "a.jsonl", row)))


def test_trl_logs_its_last_table_again_where_nothing_was_sampled(tmp_path):
    table = pyarrow.parquet.read_table(SAMPLES / "trl" / "completions_00003.parquet")
    for step in (3, 4, 5):
        column = pyarrow.array([step] * len(table))
        again = table.set_column(table.schema.get_field_index("step"), "step", column)
        if step == 5:
            again = again.set_column(again.schema.get_field_index("completion"), "completion", [["@1 4"] * len(table)])
        pyarrow.parquet.write_table(again, tmp_path / f"completions_{step:05d}.parquet")
    with pytest.warns(UserWarning) as said:
        found = list(logs.read(tmp_path))
    texts = [str(each.message) for each in said]
    assert sum("completions_00004.parquet holds the rollouts of the table before it" in text for text in texts) == 1
    assert any("the reward is the sum of correct, brief, which were logged without their weights" in x for x in texts)
    named = list(logs.read(SAMPLES / "trl" / "completions_00003.parquet", columns={"reward": "brief"}))
    assert [each.reward for each in named] == [None, 0.25, 0.25, 0.25]
    assert [each.step for each in found] == [3] * 4 + [5] * 4


def test_reading_is_lazy_and_in_batches(tmp_path):
    """A million rows are not asked for to give the first one."""
    rows = [{"prompt": "1", "completion": "2", "reward": float(i)} for i in range(10_000)]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found = logs.read(path)
    assert next(found).reward == 0.0 and next(found).place.endswith("a.parquet, row 2")
    assert sum(1 for _ in found) == 9_998


# Token ids ------------------------------------------------------------------------------------------------------------


def test_a_tokenizer_of_another_model_is_refused(tokenizer):
    odd = [LoggedRollout("3 + 4 =", "what a sentence", 1.0, f"line {i}") for i in range(4)]
    with pytest.raises(ValueError, match=r"4 of 4 texts do not survive the tokenizer \(line 0, line 1.*comes back as"):
        logs.encode(odd, tokenizer)
    fine = [LoggedRollout("3 + 4 =", "@1 7", 1.0, f"line {i}") for i in range(8)]
    encoded = logs.encode([*odd, *fine], tokenizer, limit=9)
    assert encoded.notes == ("4 of 12 texts do not survive the tokenizer: line 0, line 1, line 2, line 3",)
    assert sum(encoded.faithful) == 8
    high = LoggedRollout("", "", 1.0, "line 7", prompt_ids=[1], completion_ids=[5, 32_000])
    with pytest.raises(ValueError, match=r"line 7: there is the token id 32000, and the tokenizer has \d+ tokens"):
        logs.encode([high], tokenizer)
    ids = FOUND[0]["ids"]
    other = [LoggedRollout("3 + 4 =", "@1 7 then 3", 1.0, "line 8", completion_ids=ids)]
    with pytest.raises(ValueError, match=r"1 of 1 texts do not survive.*line 8"):
        logs.encode(other, tokenizer)
    last_turn = LoggedRollout("3 + 4 =", tokenizer.decode(ids[-3:-1]), 1.0, "line 8", completion_ids=ids)
    assert logs.encode([last_turn], tokenizer).faithful == (True,)
    counted = LoggedRollout("3 + 4 =", "@1 7", 1.0, "line 9", tokens={"advantage": [1.0] * 7})
    with pytest.raises(ValueError, match=r"line 9: 'advantage' has 7 values, and the completion 3 tokens under this"):
        logs.encode([counted], tokenizer, limit=9)


def test_the_token_that_ends_a_text_is_put_back_where_it_is_known(tokenizer):
    text = LoggedRollout("3 + 4 =", "@1 7", 1.0, "x")
    end = tokenizer.eos_token_id
    assert logs.encode([text], tokenizer, limit=9).completion_ids[0][-1] == end
    cut = logs.encode([text], tokenizer, limit=2)
    assert cut.completion_ids[0][-1] != end and len(cut.completion_ids[0]) == 2
    unknown = logs.encode([text], tokenizer)
    assert len(unknown.completion_ids[0]) == 2
    assert unknown.notes[0].startswith("1 of 1 completions are text of which the log does not say whether")
    for truncated, length in ((True, 2), (False, 3)):
        said = LoggedRollout("3 + 4 =", "@1 7", 1.0, "x", truncated=truncated)
        assert len(logs.encode([said], tokenizer).completion_ids[0]) == length


def test_groups_are_those_of_the_log_or_equal_prompts_of_a_step(tokenizer):
    row = {"completion": "@1 7", "reward": 1.0, "place": "x"}
    some = [("1 =", 1, None), ("1 =", 2, None), ("2 =", 2, None), ("1 =", 2, None), ("1 =", 2, "a"), ("2 =", 2, "a")]
    found = [LoggedRollout(prompt=prompt, step=step, group=group, **row) for prompt, step, group in some]
    encoded = logs.encode(found, tokenizer, limit=9)
    assert list(encoded.group) == [0, 1, 2, 1, 3, 3]
    assert encoded.steps == [1, 2] and len(encoded.at(1)) == 1 and list(encoded.at(2).group) == [1, 2, 1, 3, 3]


def test_a_rollout_without_a_reward_is_left_out_by_asking(tokenizer):
    found = [LoggedRollout("1 =", "@1 7", reward, f"line {i}") for i, reward in enumerate((1.0, None))]
    encoded = logs.encode(found, tokenizer, limit=9)
    with pytest.raises(ValueError, match="line 1 has no reward; leave such rollouts out"):
        encoded.rollouts()
    assert len(encoded.rewarded().rollouts()) == 1


def test_of_our_own_directories_the_log_is_read_without_a_word(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    (tmp_path / "tokens").mkdir()
    sample = SAMPLES / "run" / "tokens" / "step_000003.parquet"
    (tmp_path / "tokens" / "step_000003.parquet").write_bytes(sample.read_bytes())
    assert len(list(logs.read(tmp_path))) == len(list(logs.read(SAMPLES / "prime_traces"))) == 4


# Turns ----------------------------------------------------------------------------------------------------------------

TOOL = [
    {"role": "assistant", "content": "3 + 4"},
    {"role": "tool", "content": "7"},
    {"role": "assistant", "content": "@1 7"},
]


def conversation(**more):
    return LoggedRollout([{"role": "user", "content": "3 + 4 ="}], TOOL, 1.0, "line 1", **more)


def test_tool_outputs_are_masked_in_a_conversation_of_two_turns(tokenizer):
    own = chat(tokenizer, TURNS)
    (ids, mask, prompt) = (
        x[0] for x in (lambda e: (e.completion_ids, e.mask, e.prompt_ids))(logs.encode([conversation()], own, limit=50))
    )
    words = own.convert_ids_to_tokens(ids)
    assert own.convert_ids_to_tokens(prompt) == ["<bos>", "3", "+", "4", "=", "<eos>", "<bos>"]
    written = [word for word, on in zip(words, mask) if on]
    assert written == ["3", "+", "4", "<eos>", "@1", "7", "<eos>"]
    assert [word for word, on in zip(words, mask) if not on] == ["<bos>", "7", "<eos>", "<bos>"]
    rollouts = logs.encode([conversation()], own, limit=50).rollouts()
    assert rollouts.length.tolist() == [7]


def test_calls_of_tools_go_through_the_template(tmp_path, tokenizer):
    """Arrow gives every message and every call the same keys: what a call does not have is not in it."""
    template = (
        "{% for m in messages %}{{ m['content'] }}{% for c in m.get('tool_calls', []) %} {{ c['arguments'].values() |"
        " join(' + ') }}{% endfor %} <eos> {% endfor %}"
    )
    calls = [{"role": "assistant", "tool_calls": [{"arguments": {"a": "3", "b": "4"}}]}]
    calls += [{"role": "tool", "content": "7"}, {"role": "assistant", "tool_calls": [{"arguments": {"c": "5"}}]}]
    table = pyarrow.Table.from_pylist([{"prompt": [{"role": "user", "content": "1 ="}], "completion": calls}])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    (found,) = logs.read(tmp_path / "a.parquet")
    encoded = logs.encode([found], chat(tokenizer, template), limit=50)
    words = tokenizer.convert_ids_to_tokens(encoded.completion_ids[0])
    assert words == ["3", "+", "4", "<eos>", "7", "<eos>", "5", "<eos>"]
    assert encoded.mask[0] == [True] * 4 + [False] * 2 + [True] * 2
    raising = chat(tokenizer, "{{ raise_exception('no tools here') }}")
    with pytest.raises(ValueError, match=r"a\.parquet, row 1: the chat template does not take .*no tools here"):
        logs.encode([LoggedRollout("1 =", calls, 1.0, found.place, prompt_ids=[1])], raising)


def test_a_reward_of_a_turn_stands_at_its_last_token(tokenizer):
    own = chat(tokenizer, TURNS)
    encoded = logs.encode([conversation(turn_reward=[0.5, None])], own, limit=50)
    token_reward = encoded.rollouts().token_reward[0]
    assert token_reward[3] == 0.5 and token_reward.isnan().sum() == len(token_reward) - 1
    with pytest.raises(ValueError, match=r"line 1: 3 rewards of turns, and the policy has 2 turns"):
        logs.encode([conversation(turn_reward=[0.5, 1.0, 2.0])], own, limit=50)


def test_a_reward_on_a_tools_token_is_refused(tokenizer):
    row = {"prompt": "", "completion": "", "reward": 1.0, "place": "line 1", "prompt_ids": [1]}
    row |= {"completion_ids": [4, 5, 6], "mask": [True, False, True]}
    fine = LoggedRollout(**row, tokens={"token_reward": [1.0, None, 0.0]})
    assert logs.encode([fine], tokenizer).rollouts().given("token_reward").tolist() == [[True, False, True]]
    wrong = LoggedRollout(**row, tokens={"token_reward": [1.0, 1.0, 0.0]})
    with pytest.raises(ValueError, match=r"line 1: a reward stands at token 1, which the policy did not write"):
        logs.encode([wrong], tokenizer)


QWEN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def bytes_with_chat(template, eos="<|im_end|>"):
    """A tokenizer of single bytes, which brings every text back, with the special tokens of a chat."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>", "<eos>")])
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=eos)
    made.chat_template = template
    return made


def test_prompts_logged_without_special_tokens_are_put_through_the_template_again():
    """As verl decodes them; where the text is not what the template gives, it stays text, with a warning."""
    own = bytes_with_chat(QWEN)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 3 + 4?\nuser: me"}]
    ids = own.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
    texts = [own.decode(ids, skip_special_tokens=skip) for skip in (True, False)]
    assert texts[0].startswith("system\nBe brief.\nuser\n") and texts[0].endswith("assistant\n<think>\n")
    found = [LoggedRollout(text, "It is 7.", 1.0, "x") for text in texts]
    encoded = logs.encode(found, own, limit=100)
    assert [list(each) for each in encoded.prompt_ids] == [ids, ids]
    assert encoded.completion_ids[0][-1] == own.eos_token_id
    with pytest.warns(UserWarning, match="the model has a chat template and the prompts are plain text"):
        plain = logs.encode([LoggedRollout("What is 3 + 4?", "It is 7.", 1.0, "x")], own, limit=100)
    assert own.decode(plain.prompt_ids[0]) == "What is 3 + 4?"


def test_a_prompt_logged_as_text_is_no_chat_that_the_template_refuses():
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + QWEN
    text = "system\nBe brief.\nuser\n3 + 4?\nassistant\n"
    with pytest.warns(UserWarning, match="has a chat template"):
        encoded = logs.encode([LoggedRollout(text, "7", 1.0, "x")], bytes_with_chat(refusing), limit=100)
    assert bytes_with_chat(QWEN).decode(encoded.prompt_ids[0]) == text


def test_messages_answer_a_prompt_that_is_text_as_a_user_would_ask_it():
    own = bytes_with_chat(QWEN.replace("<think>\n", ""))
    encoded = logs.encode([LoggedRollout("3 + 4?", TOOL, 1.0, "x")], own, limit=100)
    assert own.decode(encoded.prompt_ids[0]) == "<|im_start|>user\n3 + 4?<|im_end|>\n<|im_start|>assistant\n"
    written = [t for t, on in zip(encoded.completion_ids[0], encoded.mask[0]) if on]
    assert own.decode(written) == "3 + 4<|im_end|>@1 7<|im_end|>"


PHI = QWEN.replace("<think>\n{% endif %}", "{% else %}{{ eos_token }}{% endif %}")


@pytest.mark.parametrize("template", [QWEN.replace("<think>\n", ""), PHI], ids=["gemma", "phi"])
@pytest.mark.parametrize("known", [True, False])
def test_a_turn_ends_as_the_template_ends_it(template, known):
    """Where that is another token than the tokenizer's own end, which Phi writes behind all turns besides."""
    own = bytes_with_chat(template, eos="<eos>")
    turn, eos = own.convert_tokens_to_ids(["<|im_end|>", "<eos>"])
    ends = [turn, eos] if known else None
    asked, said = [{"role": "user", "content": "3 + 4?"}], [{"role": "assistant", "content": "7"}]
    chats = [LoggedRollout(asked, each, 1.0, "x") for each in ("7", said)]
    for each in logs.encode(chats, own, limit=9, ends=ends).completion_ids:
        assert own.decode(each) == "7<|im_end|>"
    (text,) = logs.encode([LoggedRollout("3 + 4", "7", 1.0, "x")], own, chat=False, limit=9, ends=ends).completion_ids
    assert own.decode(text) == "7<eos>"
    encoded = logs.encode([LoggedRollout(asked, TOOL, 1.0, "x")], own, limit=100, ends=ends)
    ids, mask = encoded.completion_ids[0], encoded.mask[0]
    assert own.decode([t for t, on in zip(ids, mask) if on]) == "3 + 4<|im_end|>@1 7<|im_end|>"
    others = own.decode([t for t, on in zip(ids, mask) if not on])
    assert others == "\n<|im_start|>tool\n7<|im_end|>\n<|im_start|>assistant\n"
    assert encoded.notes == () and encoded.faithful == (True,)


def test_an_end_of_turn_that_ends_no_completion_stays_out_and_is_said():
    own = bytes_with_chat(QWEN.replace("<think>\n", ""), eos="<eos>")
    asked = [{"role": "user", "content": "3 + 4?"}]
    chats = [LoggedRollout(asked, each, 1.0, "x") for each in ("7", TOOL)]
    encoded = logs.encode(chats, own, limit=100, ends=[own.eos_token_id])
    assert own.decode(encoded.completion_ids[0]) == "7" and own.decode(encoded.completion_ids[1]).endswith("@1 7")
    assert encoded.notes[0].startswith("2 of 2 completions are text of which") and len(encoded.notes) == 1
    cut = [LoggedRollout(asked, "7", 1.0, "x", truncated=True)]
    assert logs.encode(cut, own, ends=[own.eos_token_id]).notes == ()


def test_a_template_that_rewrites_earlier_turns_is_said():
    thinking = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] if loop.last else m['content'].split('!')[-1] }}"
        "<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    turns = [{"role": "assistant", "content": "hm! 3"}, TOOL[1], TOOL[2]]
    encoded = logs.encode([LoggedRollout([TOOL[1]], turns, 1.0, "line 1")], bytes_with_chat(thinking), limit=100)
    assert encoded.faithful == (False,)
    assert encoded.notes[0].startswith("1 of 1 conversations end where the chat template rewrites earlier turns")


def test_text_with_markup_stays_text(tmp_path):
    row = {"prompt": "<script>alert(1)</script>", "completion": "[red]x[/red] \x1b[31m", "reward": 1}
    (found,) = logs.read(write(tmp_path / "a.jsonl", row))
    assert (found.prompt, found.completion) == (row["prompt"], row["completion"])
