"""config.json and environment.json say what a run was started with."""

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
        write_run_files(run, config={"run": {"seed": seed}})
    assert json.loads((run / "config.json").read_text()) == {"run": {"seed": 2}}
    assert json.loads((run / "config.1.json").read_text()) == {"run": {"seed": 1}}
    assert not (run / "config.2.json").exists()
    for kept in "environment.json", "environment.1.json", "environment.2.json":
        assert "packages" in json.loads((run / kept).read_text())
