"""The hub, with its true client and a small server of this machine in its place."""

import contextlib
import json
import signal
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from mlxpage.errors import InvalidModel, ModelNotFound
from mlxpage.model_store import hub

SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_ETAG_TIMEOUT", raising=False)
    return tmp_path / "hub"


@pytest.fixture
def snapshot(hub_cache, make_model):
    """org/name as an earlier download leaves it in the cache."""
    repository = hub_cache / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(SHA)
    return make_model(repository / "snapshots" / SHA)


@pytest.fixture
def server(monkeypatch):
    """A hub: server.files (name -> bytes) of org/name, server.refuse = (status, error code)."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.files, server.refuse, server.asked, server.pause = {}, None, [], 0
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    template = f"{constants.ENDPOINT}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield server
    server.shutdown()
    server.server_close()


class _Hub(BaseHTTPRequestHandler):
    def do_GET(self):
        path = self.path.split("?")[0]
        self.server.asked.append((self.command, path))
        if self.server.refuse:
            status, code = self.server.refuse
            self._answer(status, b"{}", {"X-Error-Code": code})
        elif path.startswith("/api/models/org/name/tree"):
            self._json([self._entry(name) for name in self.server.files])
        elif path.startswith("/api/models/org/name"):
            siblings = [{"rfilename": n, "size": len(v)} for n, v in self.server.files.items()]
            self._json({"id": "org/name", "sha": SHA, "siblings": siblings})
        else:
            name = path.rsplit("/", 1)[1]
            headers = {"ETag": f'"{name}"', "X-Repo-Commit": SHA}
            self._answer(200, self.server.files[name], headers)

    do_HEAD = do_GET  # noqa: N815

    def _entry(self, name):
        return {"type": "file", "path": name, "size": len(self.server.files[name]), "oid": name}

    def _json(self, value):
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status, body, headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self._send(body)

    def _send(self, body):
        if not self.server.pause:
            self.wfile.write(body)
            return
        with contextlib.suppress(OSError):  # the reader has gone
            for start in range(0, len(body), 1000):
                self.wfile.write(body[start : start + 1000])
                time.sleep(self.server.pause)

    def log_message(self, *args):
        pass


def fetch(repo_id="org/name"):
    return hub.fetch(repo_id, lambda line: None)


def refusal(repo_id="org/name") -> str:
    with pytest.raises(ModelNotFound) as caught:
        fetch(repo_id)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_cached_model_is_found_without_asking_the_hub(snapshot, server):
    assert fetch() == snapshot
    assert server.asked == []


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_an_incomplete_snapshot_does_not_count_as_cached(snapshot, server, missing):
    (snapshot / missing).unlink()
    server.refuse = (404, "RepoNotFound")
    refusal()
    assert server.asked


def test_a_download_takes_what_mlx_lm_reads_and_no_code_or_pickle(server, model, hub_cache):
    server.files = {file.name: file.read_bytes() for file in model.iterdir()}
    wanted = set(server.files)
    server.files |= {"modeling.py": b"x", "pytorch_model.bin": b"x", "q4.gguf": b"x", "a.pkl": b"x"}
    lines = []
    folder = hub.fetch("org/name", lines.append)
    assert {file.name for file in folder.iterdir()} == wanted
    assert folder.is_relative_to(hub_cache)
    assert lines == ["Downloading org/name from the hub (0 MB)"]
    asked = len(server.asked)
    assert fetch() == folder
    assert len(server.asked) == asked


def test_a_download_tells_how_far_it_is_and_shows_no_bar(server, model, capfd):
    server.files = {file.name: file.read_bytes() for file in model.iterdir()}
    server.files["model-2.safetensors"] = b"x" * 3_000_000
    told = []
    hub.fetch("org/name", lambda line: None, lambda *sizes: told.append(sizes))
    size = sum(map(len, server.files.values()))
    assert {total for _, total in told} == {size}
    done = [done for done, _ in told]
    assert done == sorted(done) and done[-1] == size
    assert capfd.readouterr() == ("", "")


def test_ctrl_c_ends_a_download_at_once_and_keeps_what_is_whole(
    server, model, hub_cache, monkeypatch
):
    """The server sends the weights slowly; the next download fetches them alone."""
    server.files = {file.name: file.read_bytes() for file in model.iterdir()}
    server.files["model.safetensors"] = weights = b"x" * 200_000
    server.pause = 0.05  # for each kilobyte: ten seconds
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    main = threading.get_ident()
    ctrl_c = threading.Timer(1.5, signal.pthread_kill, [main, signal.SIGINT])
    ctrl_c.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        hub.fetch("org/name", lambda line: None, lambda done, total: None)
    assert time.monotonic() - began < 8
    assert hub.cached("org/name") is None
    assert not list(hub_cache.rglob("*.incomplete")), "half a file can't be used again"
    assert list(hub_cache.rglob("snapshots/*/config.json"))
    server.pause, server.asked = 0, []
    folder = fetch()
    assert (folder / "model.safetensors").read_bytes() == weights
    sent = [path for method, path in server.asked if method == "GET" and "/resolve/" in path]
    assert [path.rsplit("/", 1)[1] for path in sent] == ["model.safetensors"]


def test_what_the_cache_has_of_the_hub_is_listed_and_removed(snapshot, hub_cache):
    (hub_cache / "models--org--part" / "blobs").mkdir(parents=True)
    (hub_cache / "datasets--org--data").mkdir()
    assert set(hub.repositories()) == {"org/name", "org/part"}
    assert hub.cached("org/name") == snapshot and hub.cached("org/part") is None
    for name in ("org/name", "org/part"):
        hub.remove(name)
    assert [folder.name for folder in hub_cache.iterdir()] == ["datasets--org--data"]


def test_without_a_cache_there_are_no_models(hub_cache):
    assert not hub_cache.exists()
    assert hub.repositories() == {}
    assert hub.cached("org/name") is None


def test_a_repository_without_safetensors_is_refused_before_the_download(server, hub_cache):
    server.files = {"config.json": b"{}", "pytorch_model.bin": b"x"}
    with pytest.raises(InvalidModel, match=r"org/name on the hub .*'pytorch_model.bin': a pickle"):
        fetch()
    assert not hub_cache.exists()


def test_an_unknown_model_is_told_with_the_token_that_a_private_one_needs(server):
    server.refuse = (404, "RepoNotFound")
    assert "neither a folder here nor a public model" in refusal()
    assert "HF_TOKEN" in refusal()


def test_a_gated_model_is_told_with_the_page_of_its_terms(server):
    server.refuse = (403, "GatedRepo")
    assert f"gated. Accept its terms at {constants.ENDPOINT}/org/name" in refusal()


def test_a_failing_hub_is_told_by_its_status(server):
    server.refuse = (503, "")
    assert "the hub can't be reached (" in refusal() and "503" in refusal()


def test_a_refused_connection_is_told_at_once(monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    began = time.monotonic()
    assert "Connect and try again, or give the folder" in refusal()
    assert time.monotonic() - began < 2


def test_a_hub_that_never_answers_costs_only_the_time_limit(monkeypatch):
    monkeypatch.setattr(hub, "ANSWER_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        assert "the hub can't be reached (" in refusal()
        assert time.monotonic() - began < 2


def test_a_host_name_that_never_resolves_costs_only_the_time_limit(monkeypatch):
    monkeypatch.setattr(hub, "ANSWER_SECONDS", 0.3)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *a, **k: time.sleep(5))
    began = time.monotonic()
    assert "no answer within 0.3 s" in refusal()
    assert time.monotonic() - began < 2


def test_offline_mode_is_told_by_the_variable_that_sets_it(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE forbids to download it" in refusal()


@pytest.mark.parametrize("name", ["a b", "org/na me", "x" * 300, "nul\0", "-x-", "org/--"])
def test_a_name_that_can_be_no_model_is_told_so(name):
    assert "neither a folder nor a name of the form org/name" in refusal(name)


def test_a_full_disk_is_told_with_bytes_folder_and_variable(server, monkeypatch, model, hub_cache):
    server.files = {file.name: file.read_bytes() for file in model.iterdir()}
    server.files["model.safetensors"] += b"\0" * 5_000_000

    def full(repo_id, local_files_only=False, **options):
        if local_files_only:
            from huggingface_hub.errors import LocalEntryNotFoundError

            raise LocalEntryNotFoundError("not cached")
        raise RuntimeError("Data processing error: No space left on device (os error 28)")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    message = refusal()
    assert message.startswith("The disk is full: org/name needs 5 MB")
    assert str(hub_cache) in message and "HF_HOME" in message
