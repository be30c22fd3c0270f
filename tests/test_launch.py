"""How train_32b.sh starts a run: what reaches the nodes, what is fetched, and what a failure leads to.

There is one machine here, so its `ssh` is a script that runs the command on this machine, in a shell without the
environment of the caller, as sshd does. DeepSpeed's launcher and, where it is installed, pdsh are the real ones.
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

SSH = """#!/bin/bash
while [[ $1 == -* ]]; do [[ $1 == -o ]] && shift; shift; done
host=$1; shift; command=$*
[[ $command == hostname* ]] && { echo 127.0.0.1; exit; }
# The training itself is not started. Its environment is kept instead.
[[ $command == *"fipo.py train"* ]] && command="${command%%cd /*} env -0 >'SEEN'/$host"
exec env -i bash -c "$command"
"""
PDSH = r"""#!/bin/bash
# In a command, %n is the number of the host, %h its name and %% a percent sign.
while [[ $1 != -w ]]; do shift; done
hosts=${2//,/ }; shift 2; number=0; status=0
for host in $hosts; do
  ssh "$host" "$(sed "s/%%/\a/g; s/%n/$number/g; s/%h/$host/g; s/\a/%/g" <<<"$*")" || status=$?
  number=$((number + 1))
done
exit $status
"""
TORCHRUN = """#!/bin/bash
env -0 >'SEEN'/local
"""


@pytest.fixture
def start(reader, tmp_path):
    """Runs train_32b.sh on a tiny model; returns the process and the environments that the training was given."""
    pytest.importorskip("deepspeed")
    seen, programs, temporary = tmp_path / "seen", tmp_path / "bin", tmp_path / "temporary"
    for folder in (seen, programs, temporary):
        folder.mkdir()
    fakes = {"ssh": SSH, "torchrun": TORCHRUN}
    if not shutil.which("pdsh"):
        fakes["pdsh"] = PDSH
    for name, text in fakes.items():
        (programs / name).write_text(text.replace("SEEN", str(seen)))
        (programs / name).chmod(0o755)
    data = tmp_path / "my sums.jsonl"  # a path with a space
    write_jsonl(data, [{"prompt": "1+1=", "answer": "2"}])

    def run(
        *words: str, **env: str
    ) -> tuple[subprocess.CompletedProcess, dict[str, dict[str, str]]]:
        whole = environment(MODEL=reader, DATA=str(data), EVAL_DATA="", OUT=str(tmp_path / "run"), TP="1",
                            GPUS_PER_NODE="1", TMPDIR=str(temporary))  # fmt: skip
        del whole["OMP_NUM_THREADS"]
        whole["PATH"] = f"{programs}:{whole['PATH']}"
        small = "--max_prompt 16 --max_response 64 --overlong_buffer 8".split()
        done = subprocess.run(["bash", str(ROOT / "train_32b.sh"), *small, *words], env=whole | env,
                              capture_output=True, text=True)  # fmt: skip
        assert not list(temporary.glob("tmp.*")), "no file with tokens is left"
        environments = {}
        for path in seen.iterdir():
            pairs = path.read_text().split("\0")[:-1]
            environments[path.name] = dict(pair.split("=", 1) for pair in pairs)
        return done, environments

    return run


@pytest.fixture
def hosts(tmp_path) -> str:
    path = tmp_path / "hosts"
    path.write_text("node1 slots=1\n# node0 slots=7\nnode2 slots=1\n")
    return str(path)


def test_every_node_gets_the_environment_that_a_run_reads(start, hosts):
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
    done, environments = start(HOSTFILE=hosts, SECRET_OF_ANOTHER_PROGRAM="x", **given)
    assert done.returncode == 0, done.stderr
    assert sorted(environments) == ["node1", "node2"]
    for seen in environments.values():
        assert {name: seen.get(name) for name in given} == given
        assert str(Path(sys.executable).parent) in seen["PATH"]
        assert seen["OMP_NUM_THREADS"] == str(len(os.sched_getaffinity(0)))
        assert seen["HF_HUB_OFFLINE"] == "1"
        assert "SECRET_OF_ANOTHER_PROGRAM" not in seen
    assert "hf_secret" not in done.stdout + done.stderr, "the log shows no token"


def test_training_does_not_start_where_a_download_fails(start, hosts):
    done, environments = start(HOSTFILE=hosts, DATA="nobody/no-such-data")
    assert done.returncode != 0 and not environments
    assert "reading problems from nobody/no-such-data failed" in done.stderr + done.stdout


@pytest.mark.parametrize("given, threads", [
    ({"GPUS_PER_NODE": "1000"}, 1),
    ({"OMP_NUM_THREADS": "5"}, 5),
])  # fmt: skip
def test_ranks_share_the_cores_of_a_node(start, given, threads):
    done, environments = start(**given)
    assert done.returncode == 0, done.stderr
    assert environments["local"]["OMP_NUM_THREADS"] == str(threads)
    assert environments["local"]["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize("words, said", [
    (["--model", "nobody/no-such-model"], "downloading the model 'nobody/no-such-model' failed"),
    (["--eval_data", "nobody/no-such-data:main:test"], "reading problems from nobody/no-such-data:main:test failed"),
])  # fmt: skip
def test_fetch_names_what_it_cannot_download(reader, sums, words, said):
    given = ["--model", reader, "--data", sums, "--out", "o", *words]
    done = subprocess.run([sys.executable, str(ROOT / "scripts" / "fetch.py"), *given], env=environment(),
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr


class Hub(http.server.BaseHTTPRequestHandler):
    """The hub, on this machine, with one data set of one file."""

    commit = "a" * 40
    file = json.dumps({"prompt": "1+1=", "answer": "2"}).encode()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        described = {"type": "file", "path": "train.jsonl", "size": len(self.file), "oid": "b" * 40}
        if path.endswith("/train.jsonl"):
            self.answer(200, self.file, {"ETag": '"c"', "X-Repo-Commit": self.commit})
        elif path.endswith((f"/tree/{self.commit}", f"/tree/{self.commit}/")):
            self.answer(200, json.dumps([described]).encode())
        elif path in ("/api/datasets/me/sums", f"/api/datasets/me/sums/revision/{self.commit}"):
            self.answer(
                200, json.dumps({"id": "me/sums", "sha": self.commit, "siblings": []}).encode()
            )
        else:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.commit})

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def test_ranks_read_offline_what_fetch_has_downloaded(reader, tmp_path):
    """A snapshot alone would not do: offline, `datasets` finds only what it has prepared itself."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        home = environment(HF_HOME=str(tmp_path), HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}")
        words = ["--model", reader, "--data", "me/sums", "--out", "o"]
        fetch = [sys.executable, str(ROOT / "scripts" / "fetch.py"), *words]
        done = subprocess.run(
            fetch, env=home | {"HF_HUB_OFFLINE": "0"}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        hub.shutdown()
    read = [sys.executable, "-c", "import fipo; print(fipo.load_problems('me/sums'))"]
    done = subprocess.run(
        read, env=home | {"HF_HUB_OFFLINE": "1"}, cwd=ROOT, capture_output=True, text=True
    )
    assert "Problem(prompt='1+1=', answer='2'" in done.stdout, done.stderr
