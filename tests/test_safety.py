"""What tries to get through: code in inputs, secrets on their way out, a door left open.

What tries to be fetched from where it may not is in test_fetch.py and test_http_fetch.py.
"""

import ast
import base64
import contextlib
import json
import logging
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import yaml
from fastapi.testclient import TestClient

from engine import export
from engine.checkpoint import find_checkpoint
from engine.errors import CheckpointError, DamagedError
from engine.model import load_model
from engine.publishing.artifacts import Artifact
from jobs import embed, engine, index, nightly, query, serve, snapshots
from jobs.command import CommandParser
from pipelines.catalog import CatalogConfig, open_catalog
from pipelines.errors import CatalogError, StoreError
from pipelines.indexes.array_files import arrays_from_bytes
from pipelines.indexes.key_hashes import KeyHashes
from pipelines.indexes.manifest import missing_indexes
from pipelines.reading import all_rows, read_rows
from pipelines.resilience.survival import decode_task
from pipelines.store import Store
from tests import image_files, loud
from tests.catalogs import scene_rows, stored_rows, stored_snapshot, write_rows
from tests.checkpoints import save_clip
from tests.commands import command
from tests.serving import Shop
from tests.traps import Trap
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parent.parent
SECRET = "s3cr3tPassw0rd"


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[Trap]:
    made = Trap(tmp_path)
    yield made
    assert not made.is_sprung


def code(trap: Trap) -> str:
    """A module that springs the trap as it is imported."""
    return f"open({str(trap.mark)!r}, 'w').close()\n"


def test_the_trap_works(tmp_path: Path):
    trap = Trap(tmp_path)
    pickle.loads(pickle.dumps(trap)).close()
    assert trap.is_sprung
    trap.mark.unlink()
    exec(code(trap), {})
    assert trap.is_sprung


# No code comes from a checkpoint.


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "copy")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "open_clip_pytorch_model.ckpt"])
def test_pickled_weights_are_not_loaded(folder: Path, trap: Trap, name: str):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(trap))
    with pytest.raises(CheckpointError, match=rf"{name} is a pickle.*convert it to safetensors"):
        find_checkpoint(str(folder))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "../model.safetensors", "/a.safetensors"])
def test_an_index_of_weights_names_safetensors_of_its_folder_alone(
    folder: Path, trap: Trap, name: str
):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(trap))
    weights = json.dumps({"weight_map": {"visual_projection.weight": name}})
    (folder / "model.safetensors.index.json").write_text(weights)
    with pytest.raises(CheckpointError, match="no safetensors file of this folder"):
        find_checkpoint(str(folder))


def test_a_pickle_by_the_name_of_safetensors_is_damaged(folder: Path, trap: Trap):
    (folder / "model.safetensors").write_bytes(pickle.dumps(trap))
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_model(find_checkpoint(str(folder)))


def test_code_beside_a_config_is_not_run(folder: Path, trap: Trap):
    (folder / "evil.py").write_text(code(trap))
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))
    load_model(find_checkpoint(str(folder)))
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto_map}))
    with pytest.raises(CheckpointError, match="'evil' are not supported"):
        load_model(find_checkpoint(str(folder)))


def test_code_beside_a_tokenizer_is_not_run(folder: Path, trap: Trap):
    (folder / "evil.py").write_text(code(trap))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    auto_map = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
    path.write_text(json.dumps({**config, "tokenizer_class": "Evil", "auto_map": auto_map}))
    checkpoint = find_checkpoint(str(folder))
    with contextlib.suppress(CheckpointError):  # refused, or read without it
        export._tokenizer(checkpoint)


# No code comes from a catalog, an index, a configuration, or a name in a record. What types of
# Arrow may bring along is in test_arrow_files.py.


def test_pickled_objects_in_a_catalog_are_bytes(tmp_path: Path, trap: Trap):
    rows = [{"key": "a", "image": pickle.dumps(trap)}]
    catalog = open_catalog(CatalogConfig(uri=str(write_rows(tmp_path / "catalog", rows))))
    (piece,) = all_rows(catalog, paths=[file.path for file in catalog.files])
    (read,) = read_rows(catalog, piece, ("image",))
    assert read["image"].to_pylist() == [rows[0]["image"]]
    with pytest.raises(CatalogError, match="key column 'key' must be a string or an integer"):
        open_catalog(
            CatalogConfig(uri=str(write_rows(tmp_path / "keys", [{"key": b"a", "text": "b"}])))
        )


def test_pickles_in_files_of_arrays_are_damage(tmp_path: Path, trap: Trap):
    objects = np.array([trap], dtype=object)
    np.savez(tmp_path / "queries.npz", objects=objects)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        arrays_from_bytes((tmp_path / "queries.npz").read_bytes())
    with pytest.raises(ValueError, match=r"no arrays can be read|pickle"):
        arrays_from_bytes(pickle.dumps(trap))
    np.save(tmp_path / "hashes.npy", objects)
    (tmp_path / "plain.npy").write_bytes(pickle.dumps(trap))
    for name in ("hashes.npy", "plain.npy"):
        with pytest.raises(StoreError, match="is damaged"):
            KeyHashes(tmp_path / name)
        with pytest.raises(ValueError, match=r"pickle|Python objects"):
            np.load(tmp_path / name, mmap_mode="r")  # as vectors and places are


@pytest.mark.parametrize("name", ["../../outside", "/outside", "a/../../outside"])
def test_no_record_names_a_file_outside_its_folder(carried_store: Path, tmp_path: Path, name: str):
    store_dir = shutil.copytree(carried_store, tmp_path / "store")
    (path, *_) = (store_dir / "indexes").glob("*/manifest.json")
    record = json.loads(path.read_text())
    record["files"][name] = {"num_bytes": 1, "xxh3_128": "0" * 32}
    path.write_text(json.dumps(record))
    with pytest.raises(StoreError, match="is damaged"):
        missing_indexes(Store(str(store_dir)), stored_snapshot(store_dir))
    content = json.dumps({"files": {name: "0" * 64}}).encode()
    with pytest.raises(DamagedError, match="a file named"):
        Artifact(path="engine", record="manifest.json").files(content, path="manifest.json")


def test_a_configuration_makes_no_objects(tmp_path: Path, trap: Trap, capsys):
    words = ["!!python/object/apply:builtins.open", f"[{str(trap.mark)!r}, w]"]
    file = tmp_path / "night.yaml"
    file.write_text(f"store: {' '.join(words)}\n")
    assert yaml.unsafe_load(file.read_text())["store"].close() is None
    assert trap.is_sprung
    trap.mark.unlink()
    with pytest.raises(SystemExit) as stopped:
        CommandParser("sample", description="").parse_options(["--config", str(file)])
    assert stopped.value.code == 2
    assert "could not determine a constructor" in capsys.readouterr().err


# The types of what they open may be pickles, which pipelines/arrow_files.py alone tells apart.
ARROW_DOORS = {
    *(
        "ParquetFile",
        "ParquetDataset",
        "dataset",
        "read_table",
        "read_metadata",
        "read_schema",
        "read_feather",
    ),
    *("open_file", "open_stream", "RecordBatchFileReader", "RecordBatchStreamReader"),
}
# They pickle for a process that they start themselves, over a pipe, as Ray does for its workers.
BETWEEN_OWN_PROCESSES = ("isolation.py", "isolated_process.py")


def test_no_source_opens_a_door():
    """Calls that run what they read, in our own code; and pages that take markup from outside."""
    num_read = 0
    for path in [
        path for top in ("engine", "pipelines", "jobs") for path in (ROOT / top).rglob("*")
    ]:
        if path.suffix == ".html":
            num_read += 1
            page = path.read_text()
            for door in ("| safe", "|safe", "innerHTML", "insertAdjacentHTML", "document.write"):
                assert door not in page, path
        if path.suffix != ".py":
            continue
        num_read += 1
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module] if isinstance(node, ast.ImportFrom) else []
                names += [alias.name for alias in node.names]
                if path.name not in BETWEEN_OWN_PROCESSES:
                    doors = {"pickle", "cloudpickle", "dill", "joblib", "marshal"}
                    assert not doors & set(names), path
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            if path.name != "arrow_files.py":
                assert called.rpartition(".")[2] not in ARROW_DOORS, path
            assert called not in ("eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load"), (
                path
            )
            options = {option.arg: ast.unparse(option.value) for option in node.keywords}
            assert options.get("allow_pickle", "False") == "False", path
            assert options.get("trust_remote_code", "False") == "False", path
            is_auto = called.endswith(".from_pretrained") and "Auto" in called
            if is_auto and "jobs/demo" not in path.as_posix():
                assert options.get("trust_remote_code") == "False", path
    assert num_read > 100


# The service answers this machine alone, unless told.


def test_the_service_binds_to_loopback_unless_told():
    options = serve._parser().parse_options(["--store", "store"])
    assert options.host == "127.0.0.1"
    assert serve._hosts(options.host) is not None
    assert serve._parser().parse_options(["--store", "a", "--host", "0.0.0.0"]).host == "0.0.0.0"


# Secrets stay with who has them.


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (snapshots.main, ["list", "--store", "s3://AKIA:{}@bucket/store"]),
        (snapshots.main, ["show", "--store", "http://user:{}@127.0.0.1:9/store"]),
        (snapshots.main, ["list", "--store", "nope://AKIA:{}@bucket/store"]),
        (engine.main, ["list", "--engines", "s3://AKIA:{}@bucket/engines"]),
        (engine.main, ["show", "fp32-0", "--engines", "http://user:{}@127.0.0.1:9/engines"]),
        (
            engine.main,
            [
                "build",
                "--checkpoint",
                "DEMO",
                "--calibrate",
                "http://user:{}@127.0.0.1:9/a.parquet",
            ],
        ),
        (engine.main, ["build", "--checkpoint", "https://u:{}@host/clip", "--calibrate", "a"]),
        (query.main, ["--store", "s3://AKIA:{}@bucket/store", "--text", "red"]),
        (index.main, ["--store", "http://user:{}@127.0.0.1:9/store"]),
        (serve.main, ["--port", "65431", "--store", "s3://AKIA:{}@bucket/store"]),
        (embed.main, ["--catalog", "s3://AKIA:{}@bucket/a", "--stroe", "s3://AKIA:{}@bucket/b"]),
        (embed.main, ["--catalog", "a", "--dtype", "https://user:{}@host"]),
        (embed.main, ["--catalog", "a", "--store", "b", "--fetch-allow", "https://user:{}@host"]),
    ],
)
def test_what_fails_says_no_secret(
    main: Any, words: list[str], checkpoint_dir: Path, tmp_path: Path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name, value in (
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:9"),
        ("AWS_MAX_ATTEMPTS", "1"),
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("CLIPMILL_ENGINES", str(tmp_path / "engines")),
    ):
        monkeypatch.setenv(name, value)
    words = [word.format(SECRET) for word in words]
    words = [str(checkpoint_dir) if word == "DEMO" else word for word in words]
    done = command(main, words)
    assert done.code in (1, 2), done
    assert len(done.err) > 20
    assert SECRET not in done.out + done.err


def test_a_configuration_that_fails_says_no_secret(tmp_path: Path):
    file = tmp_path / "night.yaml"
    file.write_text(f"store: [s3://AKIA:{SECRET}@bucket]\ncatalog: a\n")
    done = command(embed.main, ["--config", str(file), "--checkpoint", "a"])
    assert done.code == 2
    assert "s3://***@bucket" in done.err
    assert SECRET not in done.err


def test_the_service_says_no_secret(tmp_path: Path, caplog):
    caplog.set_level(logging.INFO)  # Ray may have left its handler with another
    shop = Shop(tmp_path)
    with TestClient(shop.app(token=SECRET)) as client:
        good = {"Authorization": f"Bearer {SECRET}"}
        bad = {"Authorization": f"Bearer {SECRET}x"}
        answers = [
            client.get("/search", params={"text": "ring", "token": SECRET}, headers=good),
            client.get("/search", params={"text": "ring"}, headers=bad),
            client.get("/search", params={"text": "boom"}, headers=good),
            client.get("/search", headers={**good, "X-Api-Key": SECRET}),
            client.get("/metrics", headers=good),
            client.get("/health"),
            client.get("/ready", headers=good),
            client.get("/openapi.json", headers=good),
        ]
    statuses = [answer.status_code for answer in answers]
    assert statuses[:4] == [200, 401, 500, 422]
    assert "clipmill_requests_total" in answers[4].text
    failing = Shop(tmp_path / "failing")
    failing.errors[1] = StoreError(f"store s3://AKIA:{SECRET}@bucket: cannot be read")
    with TestClient(failing.app()) as client:
        answers += [client.get("/search?text=ring"), client.get("/ready")]
    assert "s3://***@bucket" in answers[-2].json()["detail"]
    for answer in answers:
        assert SECRET not in answer.text
        assert SECRET not in str(answer.headers)
    assert "s3://***@bucket" in caplog.text
    assert SECRET not in caplog.text


def test_a_catalog_behind_a_password_keeps_it(tmp_path: Path):
    write_rows(tmp_path, [{"key": "a", "text": "a red circle"}])
    with locked_files(tmp_path) as url:
        uri = f"{url.replace('//', f'//user:{SECRET}@')}/part-0.parquet"
        catalog = open_catalog(CatalogConfig(uri=uri))
        (file,) = catalog.files
        assert file.path == f"{url}/part-0.parquet"
        (piece,) = all_rows(catalog, paths=[file.path])
        (read,) = read_rows(pickle.loads(pickle.dumps(catalog)), piece, ("text",))
        assert read["text"].to_pylist() == [b"a red circle"]
        with pytest.raises(CatalogError, match="401") as caught:
            open_catalog(CatalogConfig(uri=uri.replace("//user:", "//user:x")))
    assert SECRET not in str(caught.value)


def test_a_night_leaves_no_secret_anywhere(
    tmp_path: Path, checkpoint_dir: Path, engines_dir: Path, local_ray: None, monkeypatch
):
    """On Ray: catalog and images behind a password, signatures, tokens; all files are searched."""
    monkeypatch.setattr(nightly, "ray_cluster", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setenv("HF_TOKEN", f"hf_{SECRET}")
    monkeypatch.setenv("CLIPMILL_TOKEN", SECRET)
    files_dir, store_dir = tmp_path / "files", tmp_path / "store"
    files_dir.mkdir()
    (files_dir / "good.png").write_bytes(image_files.png())
    with locked_files(files_dir) as url:
        locked = url.replace("//", f"//user:{SECRET}@")
        signed = f"X-Amz-Credential=AKIA&X-Amz-Signature={SECRET}"
        images = {
            "good": f"{locked}/good.png?{signed}",
            "gone": f"{locked}/gone.png?{signed}",
            "wrong": f"{locked.replace('user', 'other')}/good.png?{signed}",
            "refused": f"http://user:{SECRET}@10.0.0.1/a.png?{signed}",
            "scheme": f"ftp://user:{SECRET}@host/a.png?token={SECRET}",
            "bucket": f"nope://AKIA:{SECRET}@bucket/a.png",
            "malformed": f"http://user:{SECRET}@[bad/a.png?{signed}",
        }
        texts = [row["text"] for row in scene_rows(len(images))]
        rows = [
            {"key": key, "image": uri, "text": text}
            for (key, uri), text in zip(images.items(), texts, strict=True)
        ]
        write_rows(files_dir, rows)
        words = ["--catalog", f"{locked}/part-0.parquet", "--store", str(store_dir)]
        words += ["--checkpoint", str(checkpoint_dir), "--engines", str(engines_dir)]
        words += ["--max-reject-share", "1", "--max-rejects", "1", "--fetch-allow", "127.0.0.1"]
        done = [command(nightly.main, [*words, *more]) for more in ([], ["--json"])]
        done += [command(nightly.main, [*words[:1], f"{locked}/no.parquet", *words[2:]])]
        done += [
            command(snapshots.main, [action, "--store", str(store_dir)])
            for action in ("list", "show", "files")
        ]
    assert [found.code for found in done] == [0, 0, 1, 0, 0, 0], done
    rejects = {row["key"]: row for row in stored_rows(store_dir, kind="rejects")}
    assert {key: row["reason"] for key, row in rejects.items()} == {
        "gone": "fetch_failed",
        "wrong": "fetch_failed",
        "refused": "fetch_refused",
        "scheme": "fetch_refused",
        "bucket": "fetch_refused",
        "malformed": "fetch_failed",
    }
    assert rejects["gone"]["detail"] == "HTTP 404 Not Found"
    assert rejects["gone"]["source_file"] == f"{url}/part-0.parquet"
    written = [path for path in store_dir.rglob("*") if path.is_file()]
    assert {path.suffix for path in written} >= {".json", ".parquet", ".html", ".arrow"}
    for path in [*written, *(path for path in engines_dir.rglob("*") if path.is_file())]:
        assert SECRET.encode() not in path.read_bytes(), path
    for file in stored_snapshot(store_dir).files:  # Parquet may compress what it holds
        assert SECRET not in str(pq.read_table(store_dir / file.path).to_pylist())
    for found in done:
        assert SECRET not in found.out + found.err


def test_workers_of_ray_write_no_secret(local_ray: None):
    """Into their own logs, which Ray keeps and its dashboard shows."""
    rows = pa.table({"key": ["a"]})
    decode = partial(loud.decode, secret=SECRET)
    task = ray.remote(num_cpus=0)(decode_task)
    options = {"modalities": (), "carry_columns": (), "max_bytes": 2**30, "meter": None}
    ray.get(task.remote(rows, decode=decode, **options))
    logs_dir = Path(ray._private.worker._global_node.get_logs_dir_path())
    wait_until(lambda: _worker_logs(logs_dir), every=0.1)
    said = _worker_logs(logs_dir)
    for what in ("a thread at", "ignored at", "a warning of", "a log of", "a logged error at"):
        assert re.search(rf"{what}.*s3://\*\*\*@bucket/a", said), said
    assert SECRET not in said


def _worker_logs(logs_dir: Path) -> str:
    """Those of the worker that has said it."""
    logs = [path.read_text(errors="replace") for path in logs_dir.glob("worker-*.err")]
    return "".join(log for log in logs if "said it" in log)


@contextmanager
def locked_files(folder: Path) -> Iterator[str]:
    """A server of a folder's files, or of parts of them, to who has the password."""
    right = "Basic " + base64.b64encode(f"user:{SECRET}".encode()).decode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = folder / self.path.partition("?")[0].strip("/")
            if self.headers.get("Authorization") != right:
                self.send_error(401)
            elif not path.is_file():
                self.send_error(404)
            else:
                self.send(path.read_bytes())

        def do_HEAD(self) -> None:
            self.do_GET()

        def send(self, content: bytes) -> None:
            asked = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
            first, last = int(asked[0] or 0), int(asked[2] or len(content) - 1)
            part = content[first : last + 1]
            self.send_response(206 if asked[1] else 200)
            self.send_header("ETag", f'"{len(content)}"')
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(part)))
            if asked[1]:
                place = f"bytes {first}-{first + len(part) - 1}/{len(content)}"
                self.send_header("Content-Range", place)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(part)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
