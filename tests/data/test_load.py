"""Rows come back as they were written, and what is wrong is said in one sentence that names it."""

import bz2
import csv
import datetime
import gzip
import json
import lzma
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from datasets.table import pa

from data.answers import exact_answer
from data.load import DataConfig, convert_rows, load_rows

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")


def write_lines(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def train_rows(**settings) -> list[dict]:
    return load_rows(DataConfig(**settings), seed=0)[0]


def test_json_rows_are_exactly_the_written_ones(tmp_path):
    """0.95 stays 0.95, 1e-05 and 2**70 stay, keys that differ from row to row are not merged."""
    rows = [
        {"tools": [{"arguments": {"level": 0.95, "rate": 1e-05}}], "n": 2**70},
        {"tools": [{"arguments": {"name": "x", "deep": {"y": None}}}], "text": "a\u2028b \U0001f600\u200b"},
    ]
    assert train_rows(dataset_name=write_lines(tmp_path / "a.jsonl", rows)) == rows
    (tmp_path / "b.json").write_text(json.dumps(rows), encoding="utf-8")
    assert train_rows(dataset_name=str(tmp_path / "b.json")) == rows
    (tmp_path / "lines.json").write_text("\ufeff" + json.dumps(rows[0]) + "\r\n\r\n" + json.dumps(rows[1]), "utf-8")
    assert train_rows(dataset_name=str(tmp_path / "lines.json")) == rows


@needs_shared
def test_float_arguments_of_real_tool_calls_survive():
    """Row 293 asks for a confidence level of 0.95; `datasets` reads 0.9500000000000001."""
    row = train_rows(dataset_name=str(SHARED / "tool_calls.jsonl"))[293]
    assert row["messages"][1]["tool_calls"][0]["function"]["arguments"]["confidence_level"] == 0.95


def test_parquet_csv_and_saved_folders_are_read_and_show_no_bars_of_datasets(tmp_path, capsys):
    from datasets import Dataset, DatasetDict, enable_progress_bars

    rows = [{"question": "1+1", "answer": "2"}, {"question": "2+2", "answer": "4, or so"}]
    dataset = Dataset.from_list(rows)
    dataset.to_parquet(str(tmp_path / "a.parquet"))
    (tmp_path / "a.csv").write_text('question,answer\n1+1,"2"\n2+2,"4, or so"\n')
    dataset.save_to_disk(str(tmp_path / "one"))
    DatasetDict(train=dataset.select([0]), test=dataset.select([1])).save_to_disk(str(tmp_path / "two"))
    enable_progress_bars()
    capsys.readouterr()
    assert train_rows(dataset_name=str(tmp_path / "a.parquet")) == rows
    assert capsys.readouterr().err == ""
    assert [row["question"] for row in train_rows(dataset_name=str(tmp_path / "a.csv"))] == ["1+1", "2+2"]
    assert train_rows(dataset_name=str(tmp_path / "one")) == rows
    assert train_rows(dataset_name=str(tmp_path / "two"), dataset_split="test") == rows[1:]
    with pytest.raises(ValueError, match="no split dev; it has train, test"):
        train_rows(dataset_name=str(tmp_path / "two"), dataset_split="dev")


def test_a_folder_gives_the_files_of_the_split(tmp_path):
    """Two shards of training, one of validation; a data set with another first name is not mixed in."""
    write_lines(tmp_path / "train-00000.jsonl", [{"text": "a"}])
    write_lines(tmp_path / "train-00001.jsonl", [{"text": "b"}])
    write_lines(tmp_path / "preferences_train.jsonl", [{"text": "other"}])
    write_lines(tmp_path / "val.jsonl", [{"text": "v"}])
    config = DataConfig(dataset_name=str(tmp_path), eval_dataset_name=str(tmp_path), eval_dataset_split="validation")
    assert load_rows(config, seed=0) == ([{"text": "a"}, {"text": "b"}], [{"text": "v"}])
    with pytest.raises(ValueError, match="no files of split test .* it has train, validation"):
        train_rows(dataset_name=str(tmp_path), dataset_split="test")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b'{"a": 1}\n\n{"a": }\n', r"bad\.jsonl line 3 is not JSON: Expecting value at column 7"),
        (b'{"a": "\xff"}\n', r"bad\.jsonl line 1 is not UTF-8"),
        (b'{"a": 1}\n[1]\n', r"bad\.jsonl line 2 holds a list"),
        (b'{"a": "\\ud83d\\ude00"}\n{"a": "x\\ud83d"}\n', r"bad\.jsonl line 2 holds half of a surrogate pair"),
        (b"\n", r"dataset_name names .*bad\.jsonl, which holds no rows"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, content, sentence):
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        train_rows(dataset_name=str(tmp_path / "bad.jsonl"))


def test_a_missing_file_is_named_with_its_key(tmp_path):
    with pytest.raises(ValueError, match="dataset_name names .*none.jsonl, and there is no such file"):
        train_rows(dataset_name=str(tmp_path / "none.jsonl"))
    write_lines(tmp_path / "a.jsonl", [{"text": "a"}])
    with pytest.raises(ValueError, match="eval_dataset_name names ./none.jsonl"):
        train_rows(dataset_name=str(tmp_path / "a.jsonl"), eval_dataset_name="./none.jsonl")


def test_templates_fill_columns_and_keep_the_row(tmp_path):
    r"""A shell's \n is a newline, \\n stays, doubled braces are braces; numbers and None have a text of their own."""
    path = write_lines(tmp_path / "a.jsonl", [{"text": "hi {x}", "n": 0.95, "none": None}])
    [row] = train_rows(
        dataset_name=path,
        input_template="### Human:\\n{text}\\n{{{n}}}{none}",
        output_template="a\\\\nb{question}",
        field_mapping={"question": "text"},
    )
    assert row["prompt"] == "### Human:\nhi {x}\n{0.95}"
    assert row["completion"] == "a\\nbhi {x}"
    assert (row["text"], row["n"]) == ("hi {x}", 0.95)


@pytest.mark.parametrize("template", ["{txt}", '{"a": {text}}', "{text!r}", "{text:>5}"])
def test_a_placeholder_that_is_no_column_names_the_columns(tmp_path, template):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "a", "answer": "b"}])
    with pytest.raises(ValueError, match="input_template has the placeholder .* the columns are text, answer"):
        train_rows(dataset_name=path, input_template=template)


def test_a_mapping_to_no_column_names_the_columns(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"question": "a"}])
    with pytest.raises(ValueError, match="field_mapping prompt: problem names no column of row 1 .* it has question"):
        train_rows(dataset_name=path, field_mapping={"prompt": "problem"})


def test_chat_wrapping_and_system_prompt(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"q": "2+2", "a": "4"}])
    mapping = {"prompt": "q", "completion": "a"}
    [row] = train_rows(dataset_name=path, field_mapping=mapping, apply_chat_template=True, system_prompt="Be\\nshort.")
    assert row["prompt"] == [{"role": "system", "content": "Be\nshort."}, {"role": "user", "content": "2+2"}]
    assert row["completion"] == [{"role": "assistant", "content": "4"}]
    with pytest.raises(ValueError, match="system_prompt needs conversations and row 1"):
        train_rows(dataset_name=path, field_mapping=mapping, system_prompt="Be short.")


def test_a_rows_own_system_message_stays(tmp_path):
    own = [{"role": "system", "content": "own"}, {"role": "user", "content": "q"}]
    path = write_lines(tmp_path / "a.jsonl", [{"messages": own}, {"messages": own[1:]}])
    rows = train_rows(dataset_name=path, system_prompt="ours")
    assert [row["messages"][0]["content"] for row in rows] == ["own", "ours"]


def test_converter_is_found_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "my_converter_of_rows.py").write_text(
        "def convert(row):\n    return {'text': row['t'] * 2} if row['t'] else None\n"
    )
    path = write_lines(tmp_path / "a.jsonl", [{"t": "a"}, {"t": ""}, {"t": "b"}])
    monkeypatch.chdir(tmp_path)
    assert train_rows(dataset_name=path, converter="my_converter_of_rows:convert") == [{"text": "aa"}, {"text": "bb"}]
    with pytest.raises(ValueError, match="converter names my_converter_of_rows:other, which cannot be imported"):
        train_rows(dataset_name=path, converter="my_converter_of_rows:other")


def test_held_out_rows_are_seeded_and_disjoint(tmp_path):
    """A quarter of 20 rows is 5; together the two parts are all rows, and the order of training rows stays."""
    path = write_lines(tmp_path / "a.jsonl", [{"text": str(n)} for n in range(20)])
    config = DataConfig(dataset_name=path, eval_split_ratio=0.25)
    train, held_out = load_rows(config, seed=1)
    assert held_out is not None and len(held_out) == 5
    numbers = [int(row["text"]) for row in train]
    assert numbers == sorted(numbers)
    assert sorted(numbers + [int(row["text"]) for row in held_out]) == list(range(20))
    assert load_rows(config, seed=1) == (train, held_out)
    assert load_rows(config, seed=2) != (train, held_out)
    first, few = load_rows(
        DataConfig(dataset_name=path, eval_split_ratio=0.25, max_train_samples=3, max_eval_samples=2), seed=1
    )
    assert (first, few) == (train[:3], held_out[:2])


def test_sharegpt_and_alpaca_rows_become_conversations(tmp_path):
    rows = [
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"instruction": "Add.", "input": "1 1", "output": "2"},
    ]
    share, alpaca = train_rows(dataset_name=write_lines(tmp_path / "a.jsonl", rows))
    assert share["messages"] == [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert alpaca["prompt"] == [{"role": "user", "content": "Add.\n\n1 1"}]
    assert alpaca["completion"] == [{"role": "assistant", "content": "2"}]


@needs_shared
def test_all_real_files_load_with_every_column():
    for path in sorted(SHARED.glob("*.jsonl")):
        written = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        for row, original in zip(train_rows(dataset_name=str(path)), written, strict=True):
            assert {name: row[name] for name in original} == original


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="eval_split_ratio is 1.0"):
        DataConfig(eval_split_ratio=1.0)
    with pytest.raises(ValueError, match="max_train_samples is -1"):
        DataConfig(max_train_samples=-1)


MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def write_csv(path: Path, *rows: list[str]) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return str(path)


@pytest.mark.parametrize("spelled", [json.dumps, repr, lambda messages: json.dumps(messages, indent=1)])
def test_conversations_that_a_format_made_text_of_are_conversations(tmp_path, spelled):
    """JSON, or Python's own spelling as pandas writes it; in CSV, JSON and Parquet; said in the report."""
    row = {"prompt": spelled(MESSAGES[:1]), "completion": spelled(MESSAGES[1:]), "chosen": spelled(MESSAGES[1])}
    row["messages"], row["answer"] = spelled(MESSAGES), spelled(MESSAGES)
    write_csv(tmp_path / "a.csv", list(row), list(row.values()))
    write_lines(tmp_path / "a.jsonl", [row])
    Dataset.from_list([row]).to_parquet(str(tmp_path / "a.parquet"))
    for name in ("a.csv", "a.jsonl", "a.parquet"):
        rows = train_rows(dataset_name=str(tmp_path / name))
        read = {"messages": MESSAGES, "prompt": MESSAGES[:1], "completion": MESSAGES[1:], "chosen": MESSAGES[1:]}
        assert rows == [{**read, "answer": row["answer"]}]
        assert "1 rows with conversations parsed from JSON text" in rows.notes
    share = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    [row] = train_rows(dataset_name=write_lines(tmp_path / "b.jsonl", [{"conversations": spelled(share)}]))
    assert row["messages"] == MESSAGES


@pytest.mark.parametrize("text", ['[{"role": "user", "content": "q"', "hello", "", "[1]", '[{"a": 1}]'])
def test_messages_that_are_other_text_are_refused_with_the_cause(tmp_path, text):
    path = write_lines(tmp_path / "a.jsonl", [{"messages": text}])
    with pytest.raises(ValueError, match=r"the messages of row 1 of .* is text that is no JSON list of messages \("):
        train_rows(dataset_name=path)


def test_text_that_is_no_conversation_stays_text(tmp_path):
    """A completion may be JSON; one that is a broken conversation is refused, not trained."""
    row = {"prompt": "[1, 2]", "completion": '[{"role": "actor", "content": "x"}]', "chosen": '{"a": 1}'}
    assert train_rows(dataset_name=write_lines(tmp_path / "a.jsonl", [row])) == [row]
    with pytest.raises(ValueError, match="the prompt of row 1 .* is text that is no JSON list"):
        train_rows(dataset_name=write_lines(tmp_path / "b.jsonl", [{"prompt": "[{'role': 'user', 'content'"}]))


def test_csv_cells_keep_their_text(tmp_path):
    cells = ["NA", "null", "007", "1.0", "True", "", " a ", "4", "1e5", 'a "b"\nc, d']
    [row] = train_rows(dataset_name=write_csv(tmp_path / "a.csv", list("abcdefghij"), cells))
    assert list(row.values()) == cells
    assert exact_answer(completions=["#### 7"], answer=[row["c"]]) == [1.0]  # text is compared as a number
    (tmp_path / "a.tsv").write_text("q\tanswer\n1,5\t007\n\n", encoding="utf-8-sig")
    assert train_rows(dataset_name=str(tmp_path / "a.tsv")) == [{"q": "1,5", "answer": "007"}]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"a,b\n1,2\n1\n", "line 3 has 1 cells and the header has 2"),
        (b'a,b\n1,"2\n', "is not CSV: unexpected end of data"),
        (b"a,a\n1,2\n", "two columns of one name"),
        (b"a,b\n1,2\ncaf\xe9,2\n", r"line 3 is not UTF-8: invalid continuation byte at byte 11"),
    ],
)
def test_a_bad_csv_is_named_with_its_line(tmp_path, content, sentence):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        train_rows(dataset_name=str(tmp_path / "a.csv"))


def test_json_that_python_does_not_read_is_named_with_its_line(tmp_path):
    """A whole number of 5,000 digits, brackets 200,000 deep; in lines and in one object."""
    for value in ("9" * 5000, "[" * 200_000 + "]" * 200_000):
        (tmp_path / "a.jsonl").write_text(f'{{"text": "a"}}\n{{"n": {value}}}\n')
        (tmp_path / "a.json").write_text(f'[{{"n": {value}}}]')
        with pytest.raises(ValueError, match=r"a\.jsonl line 2 cannot be read as JSON: .*(digits|deeply)"):
            train_rows(dataset_name=str(tmp_path / "a.jsonl"))
        with pytest.raises(ValueError, match=r"a\.json cannot be read as JSON: .*(digits|deeply)"):
            train_rows(dataset_name=str(tmp_path / "a.json"))
    with pytest.raises(ValueError, match="row 1 of rows cannot be converted: AttributeError"):
        convert_rows([{"messages": [1]}], DataConfig(system_prompt="Be brief."), "rows")


def test_the_keys_of_other_rows_are_no_nulls_of_a_tool_call(tmp_path):
    """Arrow fills what a struct lacks with None; JSON keeps the null that was written, and so do other columns."""

    def row(name: str, arguments: dict) -> dict:
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        schema = {"type": "object", "properties": {key: {"type": "string"} for key in arguments}}
        tools = [{"type": "function", "function": {"name": name, "parameters": schema}}]
        messages = [MESSAGES[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
        return {"messages": messages, "tools": tools, "functions_of_mine": tools, "kept": {name: 1}}

    written = [row("move", {"x": "1", "deep": {"a": "b"}}), row("say", {"words": "hi", "deep": {"c": "d"}})]
    dataset = Dataset.from_list(written)
    dataset.to_parquet(str(tmp_path / "a.parquet"))
    dataset.save_to_disk(str(tmp_path / "saved"))
    arrow = str(next((tmp_path / "saved").glob("*.arrow")))
    for name in (str(tmp_path / "a.parquet"), str(tmp_path / "saved"), arrow):
        for read, wanted in zip(train_rows(dataset_name=name), written, strict=True):
            assert (read["tools"], read["functions_of_mine"]) == (wanted["tools"], wanted["tools"])
            assert read["messages"][1]["tool_calls"] == wanted["messages"][1]["tool_calls"]
            assert set(read["kept"]) == {"move", "say"}
    null = row("say", {"words": None})
    assert train_rows(dataset_name=write_lines(tmp_path / "a.jsonl", [null])) == [null]


def test_a_rows_own_system_message_and_history_are_read(tmp_path):
    system, user = {"role": "system", "content": "Be brief."}, MESSAGES[0]
    earlier = [{"role": "user", "content": "q0"}, {"role": "assistant", "content": "a0"}]
    rows = [
        {"instruction": "q", "output": "a", "system": "Be brief.", "history": [["q0", "a0"]]},
        {"instruction": "q", "output": "a", "system": "Be brief.", "history": '[["q0", "a0"]]'},
        {"conversations": [{"from": "human", "value": "q"}], "system": "Be brief."},
        {"prompt": [user], "chosen": MESSAGES[1:], "rejected": MESSAGES[1:], "system": "Be brief."},
        {"prompt": "q", "chosen": MESSAGES, "rejected": MESSAGES, "system_prompt": "Be brief."},
        {"question": "q", "chosen": "a", "rejected": "b", "system": "Be brief."},
        {"messages": [{"role": "system", "content": "own"}, user], "system": "Be brief."},
        {"prompt": "q", "completion": "a", "system": "", "history": "of Rome"},
    ]
    read = train_rows(dataset_name=write_lines(tmp_path / "a.jsonl", rows))
    starts = [row.get("messages", row.get("prompt")) for row in read]
    assert starts[:2] == [[system, *earlier, user]] * 2
    assert starts[2:6] == [[system, user]] * 4
    assert starts[6:] == [[{"role": "system", "content": "own"}, user], "q"]
    assert "1 rows with another system message in the conversation, so the column system is not used" in read.notes
    plain = write_lines(tmp_path / "b.jsonl", [{"prompt": "q", "completion": "a", "system": "Be brief."}])
    with pytest.raises(ValueError, match="row 1 .* is plain text and its column system belongs in front"):
        train_rows(dataset_name=plain)
    assert train_rows(dataset_name=plain, apply_chat_template=True)[0]["prompt"] == [system, user]
    assert train_rows(dataset_name=plain, input_template="{system} {prompt}")[0]["prompt"] == "Be brief. q"
    notes = train_rows(dataset_name=plain, input_template="{prompt}").notes
    assert "1 rows whose column system no template names, so it is not used" in notes
    bad = write_lines(tmp_path / "c.jsonl", [{"instruction": "q", "output": "a", "history": [["q0"]]}])
    with pytest.raises(ValueError, match=r"the history of row 1 .* give a list of \[question, answer\]"):
        train_rows(dataset_name=bad)


@pytest.mark.parametrize("name", ["gpt", "chatgpt", "model", "bot", "GPT-4", "gpt4", "Assistant", "gpt-3.5-turbo"])
def test_the_speakers_of_data_sets_are_known(tmp_path, name):
    turns = [{"from": "human", "value": "q"}, {"from": name, "value": "a", "weight": 0}]
    messages = [MESSAGES[0], {**MESSAGES[1], "role": name, "weight": 0}]
    rows = [{"conversations": turns}, {"messages": messages}]
    for row in train_rows(dataset_name=write_lines(tmp_path / "a.jsonl", rows)):
        assert row["messages"] == [MESSAGES[0], {**MESSAGES[1], "weight": 0}]


def test_calls_that_are_turns_of_their_own_are_tool_calls(tmp_path):
    call = '{"name": "f", "arguments": {}}'
    rows = [{"conversations": [{"from": "function_call", "value": call}, {"from": "observation", "value": "1"}]}]
    rows += [{"messages": [{"role": "tool_call", "content": call}, {"role": "tool_response", "content": "1"}]}]
    wanted = [{"role": "assistant", "content": "", "tool_calls": call}, {"role": "tool", "content": "1"}]
    assert [row["messages"] for row in train_rows(dataset_name=write_lines(tmp_path / "a.jsonl", rows))] == [wanted] * 2


def test_an_unknown_speaker_is_refused_or_counted(tmp_path):
    """ShareGPT's names are ours to translate; a role of a user's own template may be right, and is counted."""
    path = write_lines(tmp_path / "a.jsonl", [{"conversations": [{"from": "narrator", "value": "q"}]}])
    with pytest.raises(ValueError, match="messages of row 1 .* has the speaker 'narrator', which is none of system"):
        train_rows(dataset_name=path)
    critics = [{"messages": [MESSAGES[0], {"role": "critic", "content": "a"}]}] * 2
    rows = train_rows(dataset_name=write_lines(tmp_path / "b.jsonl", critics))
    assert rows == critics and "2 messages of the role critic, which is not known and never trained" in rows.notes


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "zst"])
def test_a_folder_is_read_whole_and_says_its_files(tmp_path, suffix):
    """Compressed files and folders in folders; what is hidden or unfinished is no data."""
    (tmp_path / "train" / "part").mkdir(parents=True)
    write_lines(tmp_path / "train" / "0.jsonl", [{"text": "a"}])
    packed = Path(write_lines(tmp_path / "train" / "part" / "train-1.jsonl", [{"text": "b"}, {"text": "c"}]))
    with pa.output_stream(str(tmp_path / "b.zst"), compression="zstd") as file:
        file.write(packed.read_bytes())
    made = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": lambda _: file_bytes}
    file_bytes = (tmp_path / "b.zst").read_bytes()
    packed.with_name(f"train-1.jsonl.{suffix}").write_bytes(made[suffix](packed.read_bytes()))
    (tmp_path / "b.zst").unlink()
    packed.unlink()
    (tmp_path / "train" / "_temporary").mkdir()
    write_lines(tmp_path / "train" / "_temporary" / "train-0.jsonl", [{"text": "no"}])
    rows = train_rows(dataset_name=str(tmp_path))
    assert [row["text"] for row in rows] == ["a", "b", "c"]
    assert rows.notes == [f"read from {tmp_path}: train/0.jsonl, train/part/train-1.jsonl.{suffix}"]
    broken = tmp_path / "train" / "part" / f"train-1.jsonl.{suffix}"
    broken.write_bytes(broken.read_bytes()[:-9])
    with pytest.raises(ValueError, match="train-1.jsonl.* cannot be read"):
        train_rows(dataset_name=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("train-1.xlsx", "holds train-1.xlsx: files of this type are not read"),
        ("part.parquet.gz", "holds part.parquet.gz: files of this type"),
        ("more.jsonl", "holds more.jsonl without a split in the name beside files of split train"),
        ("train-0.jsonl.gz", "train-0.jsonl, train-0.jsonl.gz hold one file twice"),
        ("train-1.csv", "differ in type"),
    ],
)
def test_a_folder_that_would_be_read_in_part_is_refused(tmp_path, name, sentence):
    write_lines(tmp_path / "train-0.jsonl", [{"text": "a"}])
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=sentence):
        train_rows(dataset_name=str(tmp_path))


def test_files_of_other_data_sets_are_named_as_not_read(tmp_path):
    for name in ("train.jsonl", "preferences_train.jsonl", "val.jsonl"):
        write_lines(tmp_path / name, [{"text": name}])
    rows = train_rows(dataset_name=str(tmp_path))
    assert rows == [{"text": "train.jsonl"}]
    assert rows.notes == [f"read from {tmp_path}: train.jsonl (not read: preferences_train.jsonl)"]


@pytest.mark.parametrize(
    ("split", "texts"),
    [("train[:2]", "01"), ("train[3:]", "34"), ("train[-1:]", "4"), ("train[:40%]", "01"), ("train[20%:-40%]", "12")],
)
def test_a_slice_of_a_split_is_read_from_every_source(tmp_path, split, texts):
    rows = [{"text": str(number)} for number in range(5)]
    (tmp_path / "folder").mkdir()
    write_lines(tmp_path / "folder" / "train-0.jsonl", rows[:2])
    write_lines(tmp_path / "folder" / "train-1.jsonl", rows[2:])
    (tmp_path / "splits.json").write_text(json.dumps({"train": rows, "test": rows[:1]}))
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    sources = ["folder", "splits.json", "saved", Path(write_lines(tmp_path / "a.jsonl", rows)).name]
    for source in sources:
        read = train_rows(dataset_name=str(tmp_path / source), dataset_split=split)
        assert "".join(row["text"] for row in read) == texts, source
    both = train_rows(dataset_name=str(tmp_path / "splits.json"), dataset_split="train[:1]+test")
    assert [row["text"] for row in both] == ["0", "0"]


@pytest.mark.parametrize(
    ("split", "sentence"),
    [
        ("validation", "a single file, and dataset_split is validation, which it does not have"),
        ("train[:6]", "reaches past the 1 rows"),
        ("train[1", "dataset_split is train.1; give the name of a split, or a slice"),
        ("train[:0]", r"holds no rows in train\[:0\]"),
    ],
)
def test_a_split_that_a_file_does_not_have_is_refused(tmp_path, split, sentence):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "a"}])
    with pytest.raises(ValueError, match=sentence):
        train_rows(dataset_name=path, dataset_split=split)
    named = write_lines(tmp_path / "val.jsonl", [{"text": "v"}])
    assert train_rows(dataset_name=named, dataset_split="validation") == [{"text": "v"}]


def test_an_evaluation_folder_is_read_as_a_training_folder_is(tmp_path):
    """One file, files without a split in their names, or the folder's own name; training rows are never taken."""
    train = write_lines(tmp_path / "train.jsonl", [{"text": "t"}])
    for folder, name in (("val", "dataset.json"), ("a", "part-0.jsonl"), ("b", "val.jsonl"), ("test", "train.jsonl")):
        (tmp_path / folder).mkdir()
        write_lines(tmp_path / folder / name, [{"text": folder}])
        config = DataConfig(dataset_name=train, eval_dataset_name=str(tmp_path / folder))
        assert load_rows(config, seed=0)[1] == [{"text": folder}]
    for folder, split, found in (("b", "train", "validation"), (".", "nothing", "train")):
        with pytest.raises(ValueError, match=f"no files of split {split} .* it has .*{found}"):
            train_rows(dataset_name=str(tmp_path / folder), dataset_split=split)
    (tmp_path / "c").mkdir()
    write_lines(tmp_path / "c" / "train.jsonl", [{"text": "t"}])
    with pytest.raises(ValueError, match="eval_dataset_name names the folder .* no files of split test"):
        load_rows(DataConfig(dataset_name=train, eval_dataset_name=str(tmp_path / "c")), seed=0)


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ({"evaluations": [{"prompt": "a"}]}, [{"prompt": "a"}]),
        ({"version": "1.0", "data": [{"prompt": "a"}, {"prompt": "b"}]}, [{"prompt": "a"}, {"prompt": "b"}]),
        ({"prompt": ["a", "b"], "n": [1, 2]}, [{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}]),
        ({"prompt": {"0": "a", "1": "b"}}, [{"prompt": "a"}, {"prompt": "b"}]),
        ({"messages": MESSAGES}, [{"messages": MESSAGES}]),
        ({"chosen": MESSAGES[0], "rejected": MESSAGES[1]}, [{"chosen": MESSAGES[:1], "rejected": MESSAGES[1:]}]),
        ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, [{"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}]),
        ({"messages": [MESSAGES, MESSAGES]}, [{"messages": MESSAGES}] * 2),
        ({"messages": MESSAGES, "tools": [{"name": "f"}]}, [{"messages": MESSAGES, "tools": [{"name": "f"}]}]),
    ],
)
def test_a_json_object_holds_rows_columns_or_one_row(tmp_path, content, rows):
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert train_rows(dataset_name=str(tmp_path / "a.json")) == rows


def test_a_split_is_found_under_the_names_of_its_meaning(tmp_path):
    rows = [{"text": "v"}]
    (tmp_path / "a.json").write_text(json.dumps({"train": [{"text": "t"}], "val": rows}))
    DatasetDict(train=Dataset.from_list([{"text": "t"}]), val=Dataset.from_list(rows)).save_to_disk(tmp_path / "saved")
    for name in ("a.json", "saved"):
        assert train_rows(dataset_name=str(tmp_path / name), dataset_split="validation") == rows


def test_several_lists_of_rows_are_told_by_name(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"easy": [{"text": "a"}], "hard": [{"text": "b"}]}))
    with pytest.raises(ValueError, match="has no split train; it has easy, hard"):
        train_rows(dataset_name=str(tmp_path / "a.json"))
    assert train_rows(dataset_name=str(tmp_path / "a.json"), dataset_split="hard") == [{"text": "b"}]
    (tmp_path / "b.json").write_text(json.dumps({"test": [{"text": "a"}]}))
    with pytest.raises(ValueError, match="has no split train; it has test"):
        train_rows(dataset_name=str(tmp_path / "b.json"))


def test_paths_are_no_patterns_and_errors_tell_their_cause(tmp_path):
    path = tmp_path / "rows[1].parquet"
    Dataset.from_list([{"text": "a"}]).to_parquet(str(path))
    assert train_rows(dataset_name=str(path)) == [{"text": "a"}]
    assert train_rows(dataset_name=write_csv(tmp_path / "rows[1].csv", ["text"], ["a"])) == [{"text": "a"}]
    path.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(ValueError, match="cannot be read as parquet: (?!An error occurred)"):
        train_rows(dataset_name=str(path))


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (r"Use \neq, \nabla f, $\nu_1$ and \not=.", r"Use \neq, \nabla f, $\nu_1$ and \not=."),
        (r"Q: {q}\nAnswer:\nnow\n", "Q: 1\nAnswer:\nnow\n"),
        (r"a\\nb \\neq c\\\nu", r"a\nb \neq c\\\nu"),
        (r"\noindent\newline\nRightarrow\theta", r"\noindent\newline\nRightarrow\theta"),
    ],
)
def test_tex_commands_are_no_line_breaks(tmp_path, written, read):
    path = write_lines(tmp_path / "a.jsonl", [{"q": "1"}])
    [row] = train_rows(dataset_name=path, input_template=written, system_prompt=written, apply_chat_template=True)
    assert [message["content"] for message in row["prompt"]] == [read.replace("1\n", "{q}\n", 1), read]


def test_evaluation_rows_that_are_training_rows_are_counted(tmp_path):
    rows = [{"text": str(number % 5), "id": number} for number in range(10)]
    path = write_lines(tmp_path / "a.jsonl", rows)
    note = "10 of the 10 evaluation rows are training rows too"
    assert note in load_rows(DataConfig(dataset_name=path, eval_dataset_name=path), seed=0)[0].notes
    train, held_out = load_rows(DataConfig(dataset_name=path, eval_split_ratio=0.2), seed=0)
    again = sum(row["text"] in {row["text"] for row in train} for row in held_out)
    assert again and f"{again} of the 2 evaluation rows are training rows too" in train.notes
    other = write_lines(tmp_path / "b.jsonl", [{"text": "new"}])
    train, _ = load_rows(DataConfig(dataset_name=path, eval_dataset_name=other), seed=0)
    assert train.notes == [f"read from {path}"]


def test_input_and_output_are_prompt_and_completion(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"input": "i ", "output": "o"}])
    [row] = train_rows(dataset_name=path)
    assert (row["prompt"], row["completion"]) == ("i ", "o")


def test_text_pairs_without_a_prompt_are_no_chat(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"chosen": "Human: hi Assistant: yes", "rejected": "Human: hi"}])
    with pytest.raises(ValueError, match="apply_chat_template needs a prompt and row 1"):
        train_rows(dataset_name=path, apply_chat_template=True)


def test_dates_and_decimals_have_a_text_in_templates(tmp_path):
    Dataset.from_list([{"day": datetime.date(2026, 1, 2)}]).to_parquet(str(tmp_path / "a.parquet"))
    [row] = train_rows(dataset_name=str(tmp_path / "a.parquet"), input_template="{day}")
    assert "2026-01-02" in row["prompt"]


def test_a_reply_made_of_nulls_alone_is_null(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"q": "q", "a": null, "why": null}\n{"q": "q", "a": "a", "why": null}\n')
    config = DataConfig(dataset_name=str(file), input_template="{q}", output_template="{why}{a}")
    assert [row["completion"] for row in load_rows(config, seed=0)[0]] == [None, "a"]


def test_conversations_that_are_deeper_in_json_text_are_refused_and_other_json_is_text(tmp_path):
    turns = [{"role": "user", "content": "q"}]
    file = tmp_path / "rows.jsonl"
    for prompt in ([turns], {"messages": turns}):
        file.write_text(json.dumps({"prompt": json.dumps(prompt), "completion": "a"}))
        with pytest.raises(ValueError, match="the prompt of row 1 of .* is text that is no JSON list of messages"):
            load_rows(DataConfig(dataset_name=str(file)), seed=0)
    completion = json.dumps({"members": [{"role": "user", "name": "q"}]})
    file.write_text(json.dumps({"prompt": "q", "completion": completion}))
    assert load_rows(DataConfig(dataset_name=str(file)), seed=0)[0][0]["completion"] == completion


@pytest.mark.parametrize("column", ["system", "system_prompt", "system_message"])
def test_a_system_column_that_no_template_names_is_told(column, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({column: "s", "q": "q"}))
    told = load_rows(DataConfig(dataset_name=str(file), input_template="{q}"), seed=0)[0].notes
    assert f"1 rows whose column {column} no template names, so it is not used" in told
