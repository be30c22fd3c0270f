"""How train_32b.sh starts a run: what reaches the nodes, what is downloaded, and what failures do.

There is one machine here. So `ssh` is a script that runs the command on this machine, in a shell
without the environment of the caller, as sshd does. DeepSpeed's launcher is the real one, and so is
pdsh where it is installed.
"""

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import ROOT, environment, write_jsonl

import fetch
import fipo

SSH = """#!/bin/bash
while [[ $1 == -* ]]; do [[ $1 == -o ]] && shift; shift; done
host=$1; shift; command=$*
[[ $host == idle ]] && exit
[[ $command == hostname* ]] && { echo 127.0.0.1; exit; }
# The training itself is not started. Its environment is kept instead.
[[ $command == *"fipo.py train"* ]] && command="${command%%cd /*} env -0 >'SEEN'/$host"
exec env -i bash -c "$command"
"""
PDSH = r"""#!/bin/bash
# In a command, %n is the number of the host, %h its name and %% a percent sign.
while [[ $1 != -w ]]; do shift; done
hosts=${2//,/ }; shift 2; number=0; status=0; pids=()
for host in $hosts; do
  ssh "$host" "$(sed "s/%%/\a/g; s/%n/$number/g; s/%h/$host/g; s/\a/%/g" <<<"$*")" &
  pids+=($!)
  number=$((number + 1))
done
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit $status
"""
TORCHRUN = """#!/bin/bash
env -0 >'SEEN'/local
"""
# The script calls plan.py and, without a HOSTFILE, fetch.py. Other tests start them.
PYTHON = """#!/bin/bash
echo "$(basename "$1") $*" >>'SEEN'/../python_calls
"""


@pytest.fixture
def start(reader, tmp_path):
    """Runs train_32b.sh on a tiny model, up to the start of the training.

    Returns the finished process, and the environments in which the training would have started.
    """
    pytest.importorskip("deepspeed")
    seen = tmp_path / "seen"
    programs = tmp_path / "bin"
    temporary = tmp_path / "temporary"
    for folder in (seen, programs, temporary):
        folder.mkdir()
    data = tmp_path / "my sums.jsonl"  # a path with a space
    write_jsonl(data, [{"prompt": "1+1=", "answer": "2"}])

    def install(name: str, text: str) -> None:
        path = programs / name
        path.write_text(text.replace("SEEN", str(seen)))
        path.chmod(0o755)

    install("ssh", SSH)
    install("torchrun", TORCHRUN)
    install("python", PYTHON)
    if not shutil.which("pdsh"):
        install("pdsh", PDSH)

    def run(**env: str) -> tuple[subprocess.CompletedProcess, dict[str, dict[str, str]]]:
        variables = environment(
            MODEL=reader,
            DATA=str(data),
            EVAL_DATA="",
            OUT=str(tmp_path / "run"),
            TP="1",
            GPUS_PER_NODE="1",
            TMPDIR=str(temporary),
        )
        del variables["OMP_NUM_THREADS"]
        variables["PATH"] = f"{programs}:{variables['PATH']}"
        limits = "--max_prompt 16 --max_response 64 --overlong_buffer 8".split()
        process = subprocess.run(
            ["bash", str(ROOT / "train_32b.sh"), *limits],
            env=variables | env,
            capture_output=True,
            text=True,
        )
        assert not list(temporary.glob("tmp.*")), "a file that may hold tokens was not removed"
        environments = {}
        for path in seen.iterdir():
            pairs = path.read_text().split("\0")[:-1]
            environments[path.name] = dict(pair.split("=", 1) for pair in pairs)
        return process, environments

    return run


@pytest.mark.slow
def test_every_node_gets_the_environment_that_a_run_reads(start, tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("node1 slots=1\n# node0 slots=7\nnode2 slots=1\n")
    given = {
        "HF_HOME": "/some where/hub",
        "HF_TOKEN": "hf_secret=",
        "WANDB_NOTES": 'say "a" to $HOME, `b`, \\c and 50%new %h',
        "VLLM_CACHE_ROOT": "/cache",
        "GLOO_SOCKET_IFNAME": "eth0",
        "NCCL_SOCKET_IFNAME": "eth0",
        "CUDA_HOME": "/usr/local/cuda",
        "https_proxy": "http://proxy:80",
    }
    process, environments = start(HOSTFILE=str(hosts), SECRET_OF_ANOTHER_PROGRAM="x", **given)
    assert process.returncode == 0, process.stderr
    assert sorted(environments) == ["node1", "node2"]
    for seen in environments.values():
        assert {name: seen.get(name) for name in given} == given
        assert str(Path(sys.executable).parent) in seen["PATH"]
        assert seen["OMP_NUM_THREADS"] == str(len(os.sched_getaffinity(0)))
        assert seen["HF_HUB_OFFLINE"] == "1"
        assert "SECRET_OF_ANOTHER_PROGRAM" not in seen
    assert "hf_secret" not in process.stdout + process.stderr


@pytest.mark.slow
def test_failed_download_on_one_node_stops_the_start(start, tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("node1 slots=1\nidle slots=1\n")  # nothing fails on the second node
    process, environments = start(HOSTFILE=str(hosts), DATA="nobody/no-such-data")
    assert process.returncode != 0
    assert not environments
    message = "reading problems from nobody/no-such-data failed"
    assert message in process.stderr + process.stdout


@pytest.mark.parametrize(
    "given, threads",
    [({"GPUS_PER_NODE": "1000"}, 1), ({"OMP_NUM_THREADS": "5"}, 5)],
)
def test_ranks_share_the_cores_of_a_node(start, tmp_path, given, threads):
    process, environments = start(**given)
    assert process.returncode == 0, process.stderr
    calls = (tmp_path / "python_calls").read_text().splitlines()
    assert [call.split()[0] for call in calls] == ["plan.py", "fetch.py"]
    assert all(str(tmp_path / "my sums.jsonl") in call for call in calls)
    assert environments["local"]["OMP_NUM_THREADS"] == str(threads)
    assert environments["local"]["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["--model", "nobody/no-such-model"],
            "downloading the model 'nobody/no-such-model' failed",
        ),
        (
            ["--eval_data", "nobody/no-such-data:main:test"],
            "reading problems from nobody/no-such-data:main:test failed",
        ),
    ],
)
def test_fetch_names_what_it_cannot_download(reader, sums, words, message):
    given = ["--model", reader, "--data", sums, "--out", "o", *words]
    with pytest.raises(SystemExit) as end, fipo.report_errors():
        fetch.fetch(given)
    sentence = str(end.value.code)
    assert message in sentence
    assert len(sentence.splitlines()) == 1


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub on this machine, with one dataset of one file."""

    commit = "a" * 40
    file = json.dumps({"prompt": "1+1=", "answer": "2"}).encode()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        from_commit = {"X-Repo-Commit": self.commit}
        if path.endswith("/train.jsonl"):
            self.answer(200, self.file, from_commit | {"ETag": '"c"'})
        elif path.endswith((f"/tree/{self.commit}", f"/tree/{self.commit}/")):
            size = len(self.file)
            file = {"type": "file", "path": "train.jsonl", "size": size, "oid": "b" * 40}
            self.answer(200, json.dumps([file]).encode())
        elif path in ("/api/datasets/me/sums", f"/api/datasets/me/sums/revision/{self.commit}"):
            dataset = {"id": "me/sums", "sha": self.commit, "siblings": []}
            self.answer(200, json.dumps(dataset).encode())
        else:
            self.answer(404, b"", from_commit | {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.mark.slow
def test_fetched_data_can_be_read_offline(reader, tmp_path):
    """A snapshot would not be enough: offline, `datasets` finds only what it has prepared."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        port = hub.server_port
        variables = environment(HF_HOME=str(tmp_path), HF_ENDPOINT=f"http://127.0.0.1:{port}")

        def run(is_offline: str, *words: str) -> subprocess.CompletedProcess:
            return subprocess.run(
                [sys.executable, *words],
                env=variables | {"HF_HUB_OFFLINE": is_offline},
                cwd=ROOT,
                capture_output=True,
                text=True,
            )

        words = ["--model", reader, "--data", "me/sums", "--out", "o"]
        process = run("0", "scripts/fetch.py", *words)
        assert process.returncode == 0, process.stderr
        hub.shutdown()
    process = run("1", "-c", "import fipo; print(fipo.load_problems('me/sums'))")
    assert "Problem(prompt='1+1=', answer='2'" in process.stdout, process.stderr
