"""Rows come back as they were written, and what is wrong is said in one sentence that names it."""

import json
from pathlib import Path

import pytest

from data.load import DataConfig, load_rows

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


def test_parquet_csv_and_saved_folders_are_read(tmp_path):
    from datasets import Dataset, DatasetDict

    rows = [{"question": "1+1", "answer": "2"}, {"question": "2+2", "answer": "4, or so"}]
    dataset = Dataset.from_list(rows)
    dataset.to_parquet(str(tmp_path / "a.parquet"))
    (tmp_path / "a.csv").write_text('question,answer\n1+1,"2"\n2+2,"4, or so"\n')
    dataset.save_to_disk(str(tmp_path / "one"))
    DatasetDict(train=dataset.select([0]), test=dataset.select([1])).save_to_disk(str(tmp_path / "two"))
    assert train_rows(dataset_name=str(tmp_path / "a.parquet")) == rows
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
