"""The notebooks, cell by cell, against a mock of AWS and a stand-in for the container."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from data.chat import EncodeConfig, encode_example, encode_pair, encode_prompt, encode_rows
from data.files import read_rows
from data.load import DataConfig, convert_rows
from tests.launch.loopback import runtime
from tests.launch.test_sagemaker_deploy import Container

HOUSE = Path(__file__).resolve().parents[2]
ROLE = "arn:aws:iam::123456789012:role/local"
NOTEBOOKS = sorted((HOUSE / "launch/sagemaker").glob("*.ipynb"))
MOTO = pytest.mark.skipif(
    importlib.util.find_spec("sagemaker") is None or importlib.util.find_spec("moto") is None,
    reason="needs the SageMaker SDK and moto[s3,sts,iam,sagemaker]",
)

ROWS = {  # a stand-in for each notebook's data set, with its columns
    "sft_function_calling": {
        "query": "Where is the sun over Bergen at {n}?",
        "tools": json.dumps(
            [
                {
                    "name": "sun",
                    "description": "Its place in the sky.",
                    "parameters": {
                        "city": {"type": "str", "description": "where"},
                        "hour": {"type": "int, optional", "default": 12},
                    },
                }
            ]
        ),
        "answers": '[{"name": "sun", "arguments": {"city": "Bergen", "hour": 9}}]',
    },
    "dpo": {"system": "Be brief.", "question": "What is {n} + 1?", "chosen": "It is clear.", "rejected": "No idea."},
    "grpo": {"question": "What is {n} + 1,000?", "answer": "We add.\n#### 1,0{n}"},
}
ENCODE = {"sft_function_calling": encode_example, "dpo": encode_pair, "grpo": encode_prompt}


def cells_of(notebook):
    return [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]


def test_there_are_three_notebooks_of_short_cells_without_outputs():
    assert [path.stem for path in NOTEBOOKS] == ["dpo", "grpo", "sft_function_calling"]
    for path in NOTEBOOKS:
        for cell in cells_of(path):
            assert cell["outputs"] == [] and cell["execution_count"] is None
            assert len(cell["source"]) <= 25, "".join(cell["source"])


@MOTO
@pytest.mark.parametrize("name", sorted(ROWS))
def test_a_notebook_goes_from_rows_to_an_endpoint_and_back(name, tmp_path, monkeypatch, capsys):
    """Loaded, prepared, submitted, followed, deployed, asked and deleted. Behind the cell of parameters they are
    replaced as papermill would; nothing else is changed."""
    from moto.sagemaker import models

    from tests.launch.local_job import pretended_aws

    monkeypatch.chdir(HOUSE)
    monkeypatch.setattr(models.FakeEndpointConfig, "validate_instance_type", lambda self, instance_type: None)
    lines = [json.dumps({key: text.replace("{n}", str(n)) for key, text in ROWS[name].items()}) for n in range(10, 50)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    parameters = {"ROLE": ROLE, "REGION": "us-east-1", "DATASET": str(tmp_path / "rows.jsonl"), "FOLDER": str(tmp_path)}
    container, space = Container(), {}
    with pretended_aws() as session, runtime(container) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME", url)
        for cell in cells_of(HOUSE / f"launch/sagemaker/{name}.ipynb"):
            source = "".join(cell["source"])
            exec(compile(source, f"{name}.ipynb", "exec"), space)
            if "parameters" in cell["metadata"].get("tags", []):
                assert set(parameters) <= set(space)
                space.update(parameters)
            if "job = submit(" in source:  # the mock trains nothing: this is what the job would leave
                bucket, _, prefix = space["job"].model.removeprefix("s3://").partition("/")
                config = (HOUSE / "data/quickstart/model/config.json").read_text().replace("1024", "4096")
                session.client("s3").put_object(Bucket=bucket, Key=f"{prefix}config.json", Body=config.encode())
        left = [
            *session.client("sagemaker").list_endpoints()["Endpoints"],
            *session.client("sagemaker").list_models()["Models"],
        ]
    assert left == []
    request = space["job"].request
    loop = name.partition("_")[0]
    assert {"Key": "plumbline", "Value": loop} in request["Tags"]
    assert [channel["ChannelName"] for channel in request["InputDataConfig"][:2]] == ["training", "validation"]
    assert request["HyperParameters"]["merge_weights"] == "true" and request["EnableManagedSpotTraining"] is True
    printed = capsys.readouterr().out
    assert f"{space['job'].name}: Completed" in printed
    assert "heard" in printed or "It is" in printed  # the container's words
    assert all(asked["model"] == space["endpoint"] for asked in container.asked)

    # The loop reads what was prepared, row by row, with tools where there are some.
    rows = read_rows(str(tmp_path / "train.jsonl"), "train", None, key="rows")
    tokenizer = AutoTokenizer.from_pretrained(HOUSE / "data/quickstart/model")
    encoded, _ = encode_rows(
        convert_rows(rows, DataConfig(), "rows"), ENCODE[name], tokenizer, EncodeConfig(), what="rows"
    )
    assert len(encoded) == 38
    assert ("tools" in rows[0]) == (name == "sft_function_calling")
    if name == "grpo":
        assert rows[0]["answer"].startswith("10") and "," not in rows[0]["answer"]


def test_a_notebook_reads_no_settings_of_this_machine():
    """Role and region come as parameters or by the commands' own rules: no key, no account, no path of ours."""
    for path in NOTEBOOKS:
        text = path.read_text()
        for word in ("AKIA", "aws_secret", "os.environ", os.sep + "root", "hf_"):
            assert word not in text.replace("hf_secret", "").replace("hf_token", ""), (path.name, word)
