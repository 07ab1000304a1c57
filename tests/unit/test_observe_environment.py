"""config.json, environment.json and tokenizer.json say what a run was started with."""

import json

from nemomodel.observe.environment import environment, write_run_files


def test_environment_names_versions_and_hardware():
    found = json.loads(json.dumps(environment()))
    assert found["packages"]["torch"].startswith("2.")
    assert found["packages"]["megatron-core"]
    assert found["cpu"]
    assert found["cpu_cores"] >= 1
    assert found["commit"] is None or len(found["commit"].removesuffix("-dirty")) == 40


def test_a_resume_keeps_what_earlier_starts_wrote(tmp_path):
    run = tmp_path / "runs" / "a"
    for seed in 1, 1, 2:
        (tmp_path / "tokenizer.json").write_text(f"tokenizer {seed}")
        write_run_files(run, config={"run": {"seed": seed}}, tokenizer=tmp_path / "tokenizer.json")
    assert json.loads((run / "config.json").read_text()) == {"run": {"seed": 2}}
    assert json.loads((run / "config.1.json").read_text()) == {"run": {"seed": 1}}
    assert not (run / "config.2.json").exists()
    assert (run / "tokenizer.json").read_text() == "tokenizer 2"
    assert (run / "tokenizer.1.json").read_text() == "tokenizer 1"
    for kept in "environment.json", "environment.1.json", "environment.2.json":
        assert "packages" in json.loads((run / kept).read_text())
