"""`jevons pull` against a hub-shaped server on loopback, and `jevons info` of what came."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from nets import lively, nano
from test_loading import FP8_CONFIG, rewrite, to_fp8
from test_templates import QWEN, foreign

from jevons.config import ConfigError
from jevons.store.checkpoint import load_checkpoint, save_checkpoint
from jevons.store.files import CheckpointError, StoreError
from jevons.store.hub import NOTE, pull

huggingface_hub = pytest.importorskip("huggingface_hub")
REPO = "someone/tiny-v3"


class Hub(ThreadingHTTPServer):
    """Serves one repository as the hub does: its files' list, and each with ETag, commit and ranges."""

    daemon_threads = True

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.commit, self.extra, self.lie = root, "c" * 40, [], None
        self.asked: list[tuple[str, str | None]] = []  # GETs: file and range
        self.stall: dict[str, int] = {}  # file -> bytes after which nothing more comes
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status, headers, body=b""):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        hub = self.server
        path = self.path.partition("?")[0]
        if path.startswith(f"/api/models/{REPO}"):
            files = []
            for p in sorted(hub.root.iterdir()):
                data = p.read_bytes()
                files.append({"rfilename": p.name, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()})
                if p.suffix == ".safetensors":
                    sha = hub.lie or hashlib.sha256(data).hexdigest()
                    files[-1]["lfs"] = {"size": len(data), "sha256": sha, "pointerSize": 134}
            body = json.dumps({"id": REPO, "sha": hub.commit, "siblings": files + hub.extra}).encode()
            return self.reply(200, {"Content-Type": "application/json"}, body)
        match = re.fullmatch(rf"/{REPO}/resolve/{hub.commit}/([^/]+)", path)
        if not match or not (hub.root / match[1]).is_file():
            return self.reply(404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "no such thing"})
        data = (hub.root / match[1]).read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": hub.commit, "Accept-Ranges": "bytes"}
        status, begin = 200, 0
        if self.command == "GET":
            hub.asked.append((match[1], self.headers.get("Range")))
            if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
                status, begin = 206, int(asked[1])
                headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        if (stop := hub.stall.get(match[1])) and self.command == "GET":
            self.send_response(status)
            for key, value in (headers | {"Content-Length": str(len(data) - begin)}).items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(data[begin:stop])
            self.wfile.flush()
            time.sleep(60)
            return None
        if self.command == "HEAD":
            headers["Content-Length"] = str(len(data))
        return self.reply(status, headers, data[begin:])

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    root = tmp_path / "hub"
    save_checkpoint(root, lively(nano(vocab_size=1024)), None, {}, max_shard_bytes=120_000)
    foreign(root, "qwen", in_file=True)
    (root / "provenance.json").unlink()
    server = Hub(root)
    yield server
    server.shutdown()


def same_files(hub, out):
    return {p.name: p.read_bytes() for p in hub.root.iterdir()} == {p.name: p.read_bytes() for p in out.iterdir()
                                                                    if p.name != NOTE}


def test_a_repository_comes_whole_and_only_once(hub, tmp_path):
    (hub.root / "pytorch_model.bin").write_bytes(b"pickle")
    out = pull(REPO, tmp_path / "out", endpoint=hub.url)
    (hub.root / "pytorch_model.bin").unlink()
    assert same_files(hub, out) and len(list(out.glob("model-*.safetensors"))) > 2
    assert hub.asked[0][0] == "config.json"  # what cannot be run is refused first
    assert load_checkpoint(out).tokenizer.chat_template == QWEN
    first = len(hub.asked)
    pull(REPO, out, endpoint=hub.url)
    assert len(hub.asked) == first
    shard = next(out.glob("model-00002*"))
    shard.write_bytes(shard.read_bytes()[:-7])  # damaged since: this one is fetched again
    pull(REPO, out, endpoint=hub.url)
    assert same_files(hub, out) and [name for name, _ in hub.asked[first:]] == [shard.name]
    (hub.root / "tokenizer_config.json").write_text("{}")  # a new version: only what changed
    hub.commit = "d" * 40
    pull(REPO, out, endpoint=hub.url)
    assert same_files(hub, out) and [name for name, _ in hub.asked[first + 1 :]] == ["tokenizer_config.json"]


def jevons_pull(hub, out, *args):
    env = os.environ | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_HOME": str(out.parent / "home"),
                        "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return subprocess.Popen([sys.executable, "-m", "jevons.cli", "pull", REPO, "--out", str(out), *args], env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_killed_in_the_middle_it_goes_on_from_there(hub, tmp_path):
    out, large = tmp_path / "out", "merges.txt"
    (hub.root / large).write_bytes(os.urandom(25_000_000))  # the library writes 10 MB at a time
    hub.stall[large] = 15_000_000
    process = jevons_pull(hub, out)
    for _ in range(600):
        if any(p.stat().st_size > 10**7 - 1 for p in out.glob(f".{large}.*.incomplete")):
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    hub.stall.clear()
    before = len(hub.asked)
    process = jevons_pull(hub, out)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "is whole" in text, text
    assert same_files(hub, out)
    ranges = dict(hub.asked[before:])
    assert re.fullmatch(r"bytes=[1-9]\d*-", ranges[large] or ""), ranges
    assert "config.json" not in ranges


def test_what_is_refused(hub, tmp_path):
    with pytest.raises(StoreError, match="someone/nothing could not be pulled"):
        pull("someone/nothing", tmp_path / "a", endpoint=hub.url)
    with pytest.raises(StoreError, match="could not be pulled"):
        pull("../..", tmp_path / "a", endpoint=hub.url)
    index, shards = hub.root / "model.safetensors.index.json", sorted(hub.root.glob("model-*"))
    good = index.read_text()
    index.write_text(good.replace(shards[1].name, "../../x.safetensors"))
    hub.extra = [{"rfilename": "../../x.safetensors", "size": 3, "blobId": "b" * 40}]
    with pytest.raises(CheckpointError, match=r"lacks '../../x.safetensors'"):
        pull(REPO, tmp_path / "b", endpoint=hub.url)
    assert not (tmp_path / "x.safetensors").exists() and not (tmp_path.parent / "x.safetensors").exists()
    index.write_text(good)
    lost = shards[2]
    content = lost.read_bytes()
    lost.unlink()
    with pytest.raises(CheckpointError, match=f"lacks '{lost.name}'"):
        pull(REPO, tmp_path / "c", endpoint=hub.url)
    lost.write_bytes(shards[1].read_bytes())  # the hub's own copy is wrong
    with pytest.raises(CheckpointError, match="model.safetensors.index.json|lacks tensor|two files"):
        pull(REPO, tmp_path / "d", endpoint=hub.url)
    lost.write_bytes(content)
    config = hub.root / "config.json"
    good_config = config.read_text()
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_sinks": 4}))
    hub.asked.clear()
    with pytest.raises(ConfigError, match="attention_sinks"):
        pull(REPO, tmp_path / "e", endpoint=hub.url)
    assert [name for name, _ in hub.asked] == ["config.json"]
    config.write_text(good_config)
    hub.lie = "0" * 64
    with pytest.raises(CheckpointError, match=f"{shards[0].name} came damaged: its SHA-256"):
        pull(REPO, tmp_path / "f", endpoint=hub.url)
    assert not list((tmp_path / "f").glob("*model-00001*"))
    save_checkpoint(tmp_path / "own", lively(nano()), None, {})
    with pytest.raises(StoreError, match="holds a checkpoint that was not pulled"):
        pull(REPO, tmp_path / "own", endpoint=hub.url)


def test_info_says_what_a_checkpoint_is(tmp_path):
    from jevons.terminal.checkpoint import describe, open_checkpoint

    yarn = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32, mscale=1.0, mscale_all_dim=1.0)
    save_checkpoint(tmp_path, lively(nano(vocab_size=1024, rope_scaling=yarn)), None, {}, max_shard_bytes=120_000)
    rewrite(tmp_path, to_fp8, quantization_config=FP8_CONFIG)
    foreign(tmp_path, "qwen")
    values = describe(tmp_path)
    assert values["architecture"] == "DeepseekV3ForCausalLM" and values["context"] == 128
    assert values["rope scaling"] == "yarn, 4 times the original 32" and values["chat template"] == "its own"
    assert any(p.startswith("F8_E4M3 ") for p in values["precision"]) and values["shards"].startswith("1, ")
    assert int(values["MTP module"].replace(",", "")) > 0 and values["tokenizer"].endswith(" ids")
    assert open_checkpoint(tmp_path).tokenizer.chat_template == QWEN
    (tmp_path / "tokenizer.json").unlink()
    assert "tokenizer.json does not exist" in describe(tmp_path)["tokenizer"]
