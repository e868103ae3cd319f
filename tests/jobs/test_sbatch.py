"""The job as text: what it asks for, and that no path or value breaks out of its quotes."""

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs.sbatch import cpus_per_node, sbatch_options, step_options
from nanoslime.types import RunError
from tests.jobs.made_run import HOSTILE, MadeRun, make_run
from tools.submit.batch_script import by_submitit, sbatch_text


def text_of(made: MadeRun, driver: str = "") -> str:
    return sbatch_text(made.config, made.layout, made.run.path, driver)


def srun_line(text: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith("srun ")]
    return shlex.split(line)


def test_a_cpu_job_asks_for_one_agent_per_node(tmp_path: Path) -> None:
    made = make_run(
        tmp_path, 4, time_limit_min=90, signal_lead_s=120, partition="main", account="team"
    )
    options = sbatch_options(made.config, made.layout)
    assert options == {
        "job-name": "jobs-test",
        "nodes": "4",
        "ntasks-per-node": "1",
        "cpus-per-task": "2",
        "time": "90",
        "signal": "USR2@120",
        "requeue": True,
        "open-mode": "append",
        "partition": "main",
        "account": "team",
        "no-kill": True,
    }


def test_the_step_says_again_what_srun_does_not_inherit(tmp_path: Path) -> None:
    made = make_run(tmp_path, 2, "cuda", gpus_per_node=2, cpus_per_node=48, memory_per_node="500G")
    assert step_options(made.config, made.layout) == [
        "--kill-on-bad-exit=1",
        "--export=ALL",
        "--nodes=2",
        "--ntasks=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=48",
        "--mem=500G",
        "--gpus-per-node=2",
        "--gpu-bind=none",
    ]
    options = sbatch_options(made.config, made.layout)
    assert options["gpus-per-node"] == "2"
    assert options["mem"] == "500G"
    assert options["cpus-per-task"] == "48"


def test_a_job_of_a_chain_is_never_requeued(tmp_path: Path) -> None:
    made = make_run(tmp_path, 1, resume_by="chain")
    options = sbatch_options(made.config, made.layout)
    assert options["no-requeue"] is True
    assert "requeue" not in options


@pytest.mark.parametrize(("num_nodes", "outlives"), [(1, False), (2, False), (3, True), (4, True)])
def test_a_job_outlives_a_node_where_another_one_has_engines(
    tmp_path: Path, num_nodes: int, outlives: bool
) -> None:
    made = make_run(tmp_path, num_nodes)
    assert ("no-kill" in sbatch_options(made.config, made.layout)) == outlives
    line = srun_line(text_of(made))
    assert [option in line for option in ("--no-kill", "--wait=0")] == [outlives] * 2
    assert f"--kill-on-bad-exit={int(not outlives)}" in line


@pytest.mark.parametrize(
    ("device", "cluster", "expected"),
    [
        ("cpu", {}, 2),
        ("cuda", {"gpus_per_node": 2}, 16),
        ("cpu", {"cpus_per_node": 5}, 5),
    ],
)
def test_cores_follow_the_slots_unless_given(
    tmp_path: Path, device: str, cluster: dict[str, int], expected: int
) -> None:
    made = make_run(tmp_path, 1, device, **cluster)
    assert cpus_per_node(made.config, made.layout) == expected


@pytest.mark.parametrize(
    ("request_", "option"),
    [
        ("gpus-per-node", "--gpus-per-node=2"),
        ("gres:gpu", "--gres=gpu:2"),
        ("gres:gpu:h100", "--gres=gpu:h100:2"),
    ],
)
def test_gpus_are_asked_for_in_the_one_way_of_the_site(
    tmp_path: Path, request_: str, option: str
) -> None:
    text = text_of(make_run(tmp_path, 1, "cuda", gpus_per_node=2, gpu_request=request_))
    assert f"#SBATCH {option}\n" in text
    assert srun_line(text).count(option) == 1
    assert text.count("--gpus-per-node") + text.count("--gres") == 2


def test_a_site_that_gives_whole_nodes_is_asked_for_no_gpus(tmp_path: Path) -> None:
    text = text_of(make_run(tmp_path, 1, "cuda", gpus_per_node=2, gpu_request="none"))
    assert "gpus" not in text
    assert "gres" not in text


def test_all_that_a_site_asks_for_is_in_the_script_as_one_word_each(tmp_path: Path) -> None:
    asked = {
        "account": "12 34",
        "comment": HOSTILE,
        "constraint": "h100&nvlink|a100",
        "dependency": "afterok:12?afterany:13",
        "exclude": "n[3-4],n7",
        "mail_user": "me@example.org",
        "nodelist": "n1",
        "partition": "a,b",
        "qos": "high",
        "reservation": "course #1",
    }
    made = make_run(tmp_path, 1, exclusive=True, srun_options=["--mpi=none", "--x=a b"], **asked)
    text = text_of(made)
    lines = text.splitlines()
    for name, value in asked.items():
        option = f"#SBATCH --{name.replace('_', '-')}="
        (line,) = [line for line in lines if line.startswith(option)]
        assert shlex.split(line.removeprefix(option)) == [value]
    assert "#SBATCH --exclusive" in lines
    assert "#SBATCH --mail-type=END,FAIL" in lines
    assert {"--mpi=none", "--x=a b"} <= set(srun_line(text))
    without = text_of(make_run(tmp_path / "plain", 1))
    assert not any(f"--{name}" in without for name in ("mail", "exclusive", "comment"))


def test_modules_are_loaded_first_and_conda_is_activated_before_the_environment(
    tmp_path: Path,
) -> None:
    modules = ["cuda/13.0", "it's"]
    made = make_run(tmp_path, 1, modules=modules, setup=["umask 7"], conda="a b", env={"A": "b"})
    text = text_of(made)
    steps = ["module load cuda/13.0", "umask 7", "conda activate 'a b'", "export A=b", "srun "]
    places = [text.index(step) for step in steps]
    assert places == sorted(places)
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_extra_options_have_the_last_word(tmp_path: Path) -> None:
    made = make_run(tmp_path, 1, extra_sbatch={"exclusive": "user", "open-mode": "truncate"})
    text = text_of(made)
    assert "#SBATCH --exclusive=user\n" in text
    assert "#SBATCH --open-mode=truncate\n" in text


@pytest.mark.parametrize("name", [HOSTILE, "50% off", "new\\line", "a b"])
def test_hostile_paths_stay_one_word(tmp_path: Path, name: str) -> None:
    made = make_run(tmp_path / name, 1)
    text = text_of(made, driver="prog --flag 'a b'")
    words = srun_line(text)
    after_module = words[words.index("jobs.node") + 1 :]
    assert after_module == [str(made.run.path), "--driver", "prog --flag 'a b'"]
    (output,) = [line for line in text.splitlines() if line.startswith("#SBATCH --output=")]
    (value,) = shlex.split(output.removeprefix("#SBATCH --output="))
    assert value.replace("%%", "%") == f"{made.run.path}/slurm-%j.out"
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_environment_and_setup_come_before_the_step(tmp_path: Path) -> None:
    made = make_run(
        tmp_path, 1, setup=["module load cuda"], env={"NCCL_IB_HCA": "mlx5_0; rm -rf x"}
    )
    lines = text_of(made).splitlines()
    setup = lines.index("module load cuda")
    export = lines.index("export NCCL_IB_HCA='mlx5_0; rm -rf x'")
    (step,) = [i for i, line in enumerate(lines) if line.startswith("srun ")]
    assert setup < export < step
    assert any(line.startswith("export PYTHONPATH=") for line in lines[:step])


def test_the_python_of_the_nodes_is_that_of_the_cluster_file(tmp_path: Path) -> None:
    made = make_run(tmp_path, 1, venv="/shared/envs/cuda")
    assert "/shared/envs/cuda/bin/python" in srun_line(text_of(made))


def containers(kind: str, **more: Any) -> dict[str, Any]:
    mounts = ["/shared/models", "/data:/mnt:ro"]
    return {"container": kind, "container_image": "a b.sif", "container_mounts": mounts, **more}


def test_pyxis_starts_the_agents_in_the_image_and_nothing_else(tmp_path: Path) -> None:
    options = containers("pyxis", env={"A": "b"}, venv="/opt/venv")
    made = make_run(tmp_path, 1, "cuda", gpus_per_node=2, **options)
    text = text_of(made)
    words = srun_line(text)
    run = made.run.path
    assert "--container-image=a b.sif" in words
    assert f"--container-mounts={run}:{run},/shared/models:/shared/models,/data:/mnt:ro" in words
    assert "--container-env=PYTHONPATH,A" in words
    task = words[words.index("/opt/venv/bin/python") :]
    assert task == ["/opt/venv/bin/python", "-P", "-m", "jobs.node", str(run)]
    (requeue,) = [line for line in text.splitlines() if "jobs.requeue" in line]
    assert shlex.split(requeue)[0] == sys.executable


def test_apptainer_is_started_by_srun_and_starts_the_agents(tmp_path: Path) -> None:
    options = containers("apptainer", container_options=["--cleanenv"])
    made = make_run(tmp_path / HOSTILE, 1, "cuda", gpus_per_node=2, **options)
    text = text_of(made)
    words = srun_line(text)
    run = made.run.path
    binds = [f"--bind={run}:{run}", "--bind=/shared/models:/shared/models", "--bind=/data:/mnt:ro"]
    own = ["apptainer", "exec", "--nv", *binds, "--cleanenv", "a b.sif"]
    task = ["python", "-P", "-m", "jobs.node", str(run)]
    assert words[words.index("apptainer") :] == [*own, *task]
    assert 'export APPTAINERENV_PYTHONPATH="$PYTHONPATH"' in text.splitlines()
    on_cpus = text_of(make_run(tmp_path / "cpu", 1, **options))
    assert "--nv" not in on_cpus
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_what_a_node_keeps_is_kept_outside_the_container(tmp_path: Path) -> None:
    """But for what is in a place that the site mounts itself."""

    def binds(**cluster: str) -> list[str]:
        words = srun_line(text_of(make_run(tmp_path, 1, **containers("apptainer", **cluster))))
        return [word for word in words if word.startswith("--bind=")][3:]

    assert binds() == []
    both = ["--bind=/local:/local", "--bind=/cache:/cache"]
    assert binds(local_storage="/local", caches="/cache") == both
    assert binds(local_storage="/local", caches="/local/caches") == both[:1]
    assert binds(local_storage="/shared/models/nvme") == []


def test_a_site_may_have_a_script_of_its_own(tmp_path: Path) -> None:
    template = tmp_path / "site.sbatch"
    lines = [
        "#!/bin/bash -l",
        "#SBATCH --wckey=x",
        "@directives@",
        "hi",
        " @setup@",
        "@step@",
        "bye",
    ]
    template.write_text("\n".join(lines))
    made = make_run(tmp_path, 1, script_template=str(template), setup=["umask 7"])
    text = text_of(made).splitlines()
    assert text[:2] == lines[:2]
    places = [text.index(line) for line in ("#SBATCH --nodes=1", "hi", "umask 7", "bye")]
    assert places == sorted(places)
    assert text[-1] == "bye"
    assert not by_submitit(made.config)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("@directives@\n@step@", "has 0 lines @setup@; it needs @directives@, @setup@, @step@"),
        ("@directives@\n@setup@ \n@step@\n@step@", "has 2 lines @step@"),
        ("@directives@\n@setup@ @step@", "has 0 lines @setup@"),
    ],
)
def test_a_script_without_a_place_for_each_part_is_refused(
    tmp_path: Path, text: str, says: str
) -> None:
    template = tmp_path / "site.sbatch"
    template.write_text(text)
    with pytest.raises(RunError, match=says):
        text_of(make_run(tmp_path, 1, script_template=str(template)))


def test_a_path_with_a_line_break_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"--output=.* has a line break"):
        text_of(make_run(tmp_path / "a\nb", 1))
