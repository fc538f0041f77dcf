"""Weights on the Hugging Face Hub: the real client against a minimal local server."""

import base64
import hashlib
import json
import re
import shlex
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import safetensors.torch
import torch
import yaml
from huggingface_hub import constants

import vitral
from vitral import settings, storage, weights
from vitral.cli import main
from vitral.config import Config, DataConfig, TrainConfig, ViTConfig
from vitral.model import ViT
from vitral.weights.equivalents import TIMM

# The client uploads with an argument that its HTTP library has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

SHAPE = ViTConfig(dim=16, depth=1, num_heads=2, num_kv_heads=1, patch_size=4, image_size=16)
CLASSES = ("n01440764", "dark", "light")
METRICS = {"step": 9}
for _kind, _top1 in (("val", 0.5), ("ema", 0.75)):
    METRICS |= {f"{_kind}_top1": _top1, f"{_kind}_top5": 1.0}
    METRICS |= {f"{_kind}_loss": 0.9, f"{_kind}_ece": 0.1}
FILES = {"config.json", "manifest.json", "model.safetensors", "ema.safetensors"}
OTHER_FILES = {".gitattributes", "README.md", "config.yaml", "curves.png"}


class Repository:
    def __init__(self, files=(), *, private=False, gated=False):
        self.private, self.gated = private, gated
        self.commits, self.tags = [], {}
        self.commit(
            {".gitattributes": b"*.safetensors filter=lfs\n", **dict(files)}, "initial commit"
        )

    def commit(self, files, message):
        sha = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits.append((sha, message, files))
        return sha

    @property
    def files(self):
        return self.commits[-1][2]

    def at(self, revision):
        """Commit and files, or None if the revision does not exist."""
        revision = self.tags.get(revision, revision)
        named = {"main": self.commits[-1], **{commit[0]: commit for commit in self.commits}}
        sha, _, files = named.get(revision, (None, None, None))
        return sha and (sha, files)


class Hub(ThreadingHTTPServer):
    """The parts of the Hub that the client uses for downloads and commits."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.large, self.requests = {}, {}, []
        self.failing, self.status = None, 500  # paths that contain `failing` get this error
        self.address = f"http://127.0.0.1:{self.server_port}"

    def downloads(self):
        return {
            path.split("/")[-1]
            for verb, path in self.requests
            if verb == "GET" and "/resolve/" in path
        }


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def handle_any(self):
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        writing = self.command in ("POST", "PUT") and "validate" not in path
        if self.server.failing and self.server.failing in path:
            self.answer(self.server.status, {"error": "Something went wrong"})
        elif token not in ("", "hf_anna") or (writing and not token and "/lfs/" not in path):
            self.answer(401, X_Error_Message="Invalid credentials in Authorization header")
        else:
            for pattern, act in ROUTES.items():
                if found := re.fullmatch(pattern, path):
                    return act(self, *found.groups(), body=body)
            self.answer(404)
        return None

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def repository(self, name):
        """The repository, if the token permits reading it."""
        found = self.server.repositories.get(name)
        if found is None or (found.private and "Authorization" not in self.headers):
            status = 404 if "Authorization" in self.headers else 401
            self.answer(status, X_Error_Code="RepoNotFound")
            return None
        return found

    def resolve(self, name, revision, file, body):
        if (found := self.repository(name)) is None:
            return
        if found.gated:
            self.answer(403, X_Error_Code="GatedRepo")
        elif (at := found.at(revision)) is None:
            self.answer(404, X_Error_Code="RevisionNotFound")
        elif file not in at[1]:
            self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=at[0])
        else:
            # The real Hub sends a hash of the content here, which the client does not compare.
            tag = hashlib.sha1(f"{at[0]} {file}".encode()).hexdigest()
            self.answer(200, at[1][file], ETag=f'"{tag}"', X_Repo_Commit=at[0])

    def tree(self, name, revision, body):
        if found := self.repository(name):
            files = found.at(revision)[1].items()
            rows = [{"type": "file", "path": p, "size": len(d), "oid": "0" * 40} for p, d in files]
            self.answer(200, rows)

    def info(self, name, revision, body):
        if (found := self.repository(name)) is None:
            return
        if at := found.at(revision or "main"):
            self.answer(200, {"id": name, "private": found.private, "sha": at[0]})
        else:
            self.answer(404, X_Error_Code="RevisionNotFound")

    def create(self, body):
        request = json.loads(body)
        name = f"{request['organization']}/{request['name']}"
        if request["organization"] != "anna":
            self.answer(403, {"error": "You don't have the rights to create a model there"})
        elif name in self.server.repositories:
            self.answer(409, {"url": f"{self.server.address}/{name}"})
        else:
            private = request.get("visibility") == "private"
            self.server.repositories[name] = Repository(private=private)
            self.answer(200, {"url": f"{self.server.address}/{name}"})

    def validate(self, body):
        front = json.loads(body)["content"].split("---\n")[1]
        if yaml.safe_load(front).get("license", "mit") not in ("mit", "apache-2.0"):
            self.answer(400, b'"license" must be one of [mit, apache-2.0]\n\nand more')
        else:
            self.answer(200, {"errors": [], "warnings": []})

    def preupload(self, name, revision, body):
        def mode(path):
            return "lfs" if path.endswith((".safetensors", ".png")) else "regular"

        paths = [file["path"] for file in json.loads(body)["files"]]
        rows = [{"path": p, "uploadMode": mode(p), "shouldIgnore": False} for p in paths]
        self.answer(200, {"files": rows})

    def batch(self, name, body):
        def upload(item):
            href = f"{self.server.address}/lfs/{item['oid']}"
            return {**item, "actions": {"upload": {"href": href}}}

        objects = [upload(item) for item in json.loads(body)["objects"]]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def put(self, oid, body):
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.large[oid] = body
        self.answer(200)

    def commit(self, name, revision, body):
        rows = [json.loads(line) for line in body.splitlines()]
        files = dict(self.server.repositories[name].files)
        for row in rows[1:]:
            value = row["value"]
            if row["key"] == "deletedFile":
                del files[value["path"]]
            elif row["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        sha = self.server.repositories[name].commit(files, rows[0]["value"]["summary"])
        where = f"{self.server.address}/{name}/commit/{sha}"
        self.answer(200, {"commitUrl": where, "commitOid": sha})


ROUTES = {
    r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)": Handler.resolve,
    r"/api/models/([^/]+/[^/]+)/tree/([^/]+)": Handler.tree,
    r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?": Handler.info,
    r"/api/repos/create": Handler.create,
    r"/api/validate-yaml": Handler.validate,
    r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)": Handler.preupload,
    r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch": Handler.batch,
    r"/lfs/([^/]+)": Handler.put,
    r"/api/models/([^/]+/[^/]+)/commit/([^/]+)": Handler.commit,
}


def use_server(address, monkeypatch):
    """Acts like HF_ENDPOINT, which is only read at import, and forbids other network requests."""
    template = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + template)
    resolve = socket.getaddrinfo

    def resolve_local(host, *rest, **more):
        assert host == "127.0.0.1", host
        return resolve(host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", resolve_local)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local Hub, and a client that uses only this Hub, with an empty cache and a test token."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_anna")
    with Hub() as server:
        for name in ("HF_HUB_CACHE", "HF_TOKEN_PATH", "HF_STORED_TOKENS_PATH"):
            monkeypatch.setattr(constants, name, str(tmp_path / "hf" / name))
        monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", tmp_path / "hf" / "harnesses")
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        use_server(server.address, monkeypatch)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()
    huggingface_hub.utils.close_session()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory with a plot, and with weights that contain local paths."""
    folder = tmp_path_factory.mktemp("secret") / "mine"
    (folder / "weights").mkdir(parents=True)
    (folder / "curves.png").write_bytes(b"\x89PNG curves")
    (folder.parent / "photos").mkdir()
    config = Config(
        model=SHAPE,
        data=DataConfig(path=str(folder.parent / "photos"), mean=(0.1, 0.2, 0.3)),
        train=TrainConfig(out=str(folder), init=str(folder.parent / "older"), epochs=7),
    )
    save(folder / "weights" / "best", config)
    return folder


def save(folder, config, kinds=("model", "ema")):
    states = {}
    for seed, kind in enumerate(kinds):
        torch.manual_seed(seed)
        model = ViT(config.model, len(CLASSES))
        torch.nn.init.normal_(model.head.weight)
        states[kind] = model.state_dict()
    metrics = {key: value for key, value in METRICS.items() if "ema" in kinds or key[:3] != "ema"}
    weights.save(folder, states, weights.describe(config, CLASSES, "f" * 64, metrics))


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def push(run, *words, name="anna/shades"):
    return main(["push", str(run), name, *words])


def refused(capsys, words, *fragments, code=2):
    """One line on standard error, and nothing else."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == code
    out, err = capsys.readouterr()
    assert re.fullmatch(r"vitral: .+\n", err), err
    for fragment in fragments:
        assert fragment in err, err
    assert out == ""


def test_pushed_weights_can_be_loaded(hub, run, capsys):
    assert push(run, "--license", "Apache-2.0") == 0
    assert capsys.readouterr().out == f"{hub.address}/anna/shades\n"
    repository = hub.repositories["anna/shades"]
    assert not repository.private
    assert [message for _, message, _ in repository.commits] == [
        "initial commit",
        f"Weights from vitral {weights.load(run).description.vitral}, validation top-1 75.00%",
    ]
    assert repository.files.keys() == FILES | OTHER_FILES
    assert (
        yaml.safe_load(repository.files["README.md"].split(b"---\n")[1])["license"] == "apache-2.0"
    )
    assert repository.files["curves.png"] == (run / "curves.png").read_bytes()
    for which in (None, "model", "ema"):
        local, remote = (vitral.load(w, which=which) for w in (run, "hf-hub:anna/shades"))
        for name, value in local.model.state_dict().items():
            assert remote.model.state_dict()[name].equal(value)
    assert remote.description.metrics == METRICS
    assert remote.description.default == "ema"
    assert hub.downloads() == FILES


def test_local_paths_are_not_pushed(hub, run):
    assert push(run) == 0
    for name, data in hub.repositories["anna/shades"].files.items():
        assert str(run.parent).encode() not in data, name
    description = vitral.load("hf-hub:anna/shades").description
    assert description.config.data.path == "./photos"
    assert (description.config.train.out, description.config.train.init) == (None, "./older")


def test_pushed_settings_are_a_recipe(hub, run, tmp_path):
    assert push(run) == 0
    (tmp_path / "config.yaml").write_bytes(hub.repositories["anna/shades"].files["config.yaml"])
    loaded = settings.load(
        str(tmp_path / "config.yaml"), ["--data", "x", "--out", "y", "--init", "z"]
    )
    own = settings.load(recipe(run, tmp_path), ["--data", "x", "--out", "y", "--init", "z"])
    assert loaded == own


def recipe(run, tmp_path):
    (tmp_path / "own.yaml").write_text(settings.dump(weights.load(run).description.config))
    return str(tmp_path / "own.yaml")


def test_the_commands_on_the_card_work(hub, run, image_folder, tmp_path, monkeypatch, capsys):
    assert push(run) == 0
    monkeypatch.chdir(tmp_path)
    photo = image_folder / "val" / "dark" / "00.jpg"
    (tmp_path / "photo.jpg").write_bytes(photo.read_bytes())
    card = hub.repositories["anna/shades"].files["README.md"].decode()
    (command,) = re.findall(r"^vitral (predict .+)$", card, re.MULTILINE)
    capsys.readouterr()
    assert main([*shlex.split(command), "--workers", "0"]) == 0
    predicted = capsys.readouterr().out
    python, with_timm = re.findall(r"```python\n(.+?)```", card, re.DOTALL)
    exec(compile(python, "card", "exec"), {})
    name = capsys.readouterr().out.split()[0]
    assert predicted.startswith(f"photo.jpg: {name}")
    known = {}
    exec(compile(with_timm, "card", "exec"), known)
    images = torch.randn(1, 3, 16, 16)
    assert known["model"](images).equal(vitral.load(run).model(images))


def test_only_weights_are_downloaded(hub, run, tmp_path):
    others = {"README.md": b"", "pytorch_model.bin": b"\x80\x02", "tokenizer.json": b"{}"}
    others |= {"old/model.safetensors": b"", "old/config.json": b"{}", "curves.png": b""}
    files = {**files_of(run / "weights" / "best"), **others}
    hub.repositories["bo/x"] = Repository(files)
    found = vitral.load("hf-hub:bo/x")
    assert hub.downloads() == FILES
    assert {path.name for path in found.path.iterdir()} == FILES


def test_repositories_without_weights_are_not_downloaded(hub, capsys, caplog):
    large = {"config.json": b"{}", "model.safetensors": b"much"}
    hub.repositories["bo/llm"] = Repository(large)
    refused(
        capsys, ["val", "hf-hub:bo/llm"], "bo/llm does not contain vitral weights", "manifest.json"
    )
    assert hub.downloads() == {"config.json"}
    assert caplog.text == ""  # the client would warn that nothing matched


@pytest.mark.parametrize(
    ("name", "model_type", "fragments"),
    [
        ("facebook/dinov2-small", "dinov2", ["; use timm:vit_small_patch14_dinov2.lvd142m, the"]),
        ("bo/x", "dinov3_vit", ["(dinov3_vit); find", "?search=dinov3 and use timm:NAME"]),
        ("bo/x", "siglip", ["?search=siglip_gap and"]),
        ("bo/x", "bert", ["(bert); vitral loads its own weights and timm's Vision Transformers"]),
        ("bo/x", "a b\n", ["bo/x does not contain vitral weights"]),
        ("bo/x", ["vit"], ["bo/x does not contain vitral weights"]),
    ],
)
def test_errors_for_models_of_transformers_name_those_of_timm(
    hub, capsys, name, model_type, fragments
):
    config = json.dumps({"model_type": model_type}).encode()
    hub.repositories[name] = Repository({"config.json": config, "model.safetensors": b"much"})
    name = f"hf-hub:{name}"
    for words in (["val", name], ["embed", name, "x"], ["train", "digits", "--init", name]):
        refused(capsys, words, *fragments)
    assert hub.downloads() == {"config.json"}


def test_names_in_timm_exist():
    get = pytest.importorskip("timm").models.get_pretrained_cfg
    for name in TIMM.values():
        assert get(name, allow_unregistered=False).hf_hub_id, name


TINY = "vit_tiny_patch16_224"
TAGGED = f"{TINY}.augreg_in21k_ft_in1k"


@pytest.fixture
def tiny(hub, tmp_path, monkeypatch):
    """A repository of timm with two commits, and a cache of its own for public models."""
    create, commits = pytest.importorskip("timm").create_model, []
    monkeypatch.setenv("VITRAL_CACHE", str(tmp_path / "cache"))
    for seed in range(2):
        torch.manual_seed(seed)
        state = create(TINY, pretrained=False).state_dict()
        commits.append({"model.safetensors": safetensors.torch.save(state)})
    repository = Repository(commits[0])
    repository.commit(commits[1], "new")
    hub.repositories[f"timm/{TAGGED}"] = repository
    return repository


def test_public_models_are_pinned_to_their_commit(hub, tiny):
    first, second = (commit[0] for commit in tiny.commits)
    new, old = (vitral.load(f"{name}") for name in (f"timm:{TINY}", f"hf-hub:timm/{TINY}@{first}"))
    assert new.description.source == f"timm:{TAGGED}@{second}"
    assert old.description.source == f"timm:{TAGGED}@{first}"
    assert not new.model.cls.equal(old.model.cls)
    hub.requests.clear()
    tiny.commit({}, "empty")
    assert vitral.load(f"timm:{TINY}").model.cls.equal(new.model.cls)
    assert hub.requests == []


def test_public_models_if_the_hub_is_unreachable(hub, tiny, monkeypatch, tmp_path, capsys):
    """One request and no retry; weights that timm has already downloaded need no request."""
    words = ["import", f"timm:{TINY}", tmp_path / "made"]
    hub.failing, hub.status = "/", 503
    refused(capsys, words, f"timm:{TINY}: cannot be downloaded: ", "--file")
    assert len(hub.requests) == 1
    hub.failing = None
    huggingface_hub.hf_hub_download(f"timm/{TAGGED}", "model.safetensors")
    use_server("http://127.0.0.1:9", monkeypatch)
    assert vitral.load(f"timm:{TINY}").description.source.endswith(tiny.commits[1][0])
    other = f"timm:{TINY}.augreg_in21k"
    refused(capsys, ["import", other, tmp_path / "other"], "cannot reach http://127.0.0.1:9")


def test_a_revision_is_a_tag_or_a_commit(hub, run, tmp_path, capsys):
    repository = hub.repositories["anna/x"] = Repository(files_of(run / "weights" / "best"))
    first = repository.commits[0][0]
    save(tmp_path / "new", Config(model=SHAPE), kinds=["model"])
    repository.commit(files_of(tmp_path / "new"), "new")
    repository.tags["v1"] = first
    assert vitral.load("hf-hub:anna/x").description.fingerprint == "f" * 64
    for revision in ("v1", first):
        assert vitral.load(f"hf-hub:anna/x@{revision}").description.config.train.epochs == 7
    assert vitral.load("hf-hub:anna/x").description.config.train.epochs == 90
    assert vitral.load("hf-hub:anna/x@main").description.config.train.epochs == 90
    refused(capsys, ["val", "hf-hub:anna/x@v2"], "anna/x has no revision v2")


def test_training_starts_from_the_hub(hub, run):
    hub.repositories["bo/x"] = Repository(files_of(run / "weights" / "best"))
    model = ViT(SHAPE, 5)
    assert weights.initialize(model, "hf-hub:bo/x") == ["head.bias", "head.weight"]
    assert model.cls.equal(weights.load(run).model.cls)


def test_cached_weights_need_no_hub(hub, run, monkeypatch, capsys):
    hub.repositories["bo/x"] = Repository(files_of(run / "weights" / "best"))
    before = vitral.load("hf-hub:bo/x").model.state_dict()
    hub.requests.clear()
    hub.failing = "/"
    use_server("http://127.0.0.1:9", monkeypatch)  # no server listens here
    after = vitral.load("hf-hub:bo/x").model.state_dict()
    assert all(after[name].equal(value) for name, value in before.items())
    refused(
        capsys, ["val", "hf-hub:bo/y"], "cannot reach http://127.0.0.1:9: ", "check the network"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert vitral.load("hf-hub:bo/x").model.cls.equal(before["cls"])
    refused(capsys, ["val", "hf-hub:bo/y"], "bo/y: cannot reach", "HF_HUB_OFFLINE")
    assert hub.requests == []


@pytest.mark.parametrize("name", ["ema.safetensors", "config.json", "manifest.json"])
def test_tampered_files_are_rejected(hub, run, capsys, name):
    files = files_of(run / "weights" / "best")
    files[name] = files[name][:-9] + bytes([files[name][-9] ^ 1]) + files[name][-8:]
    hub.repositories["bo/x"] = Repository(files)
    refused(capsys, ["predict", "hf-hub:bo/x", "photo.jpg"], "weights: ", "`hf cache`")


def test_weights_missing_from_the_manifest_are_rejected(hub, run, capsys):
    files = files_of(run / "weights" / "best")
    manifest = json.loads(files["manifest.json"])
    del manifest["ema.safetensors"]
    hub.repositories["bo/x"] = Repository({**files, "manifest.json": json.dumps(manifest).encode()})
    refused(capsys, ["val", "hf-hub:bo/x"], "ema.safetensors: not in the manifest")
    hub.repositories["bo/y"] = Repository({k: v for k, v in files.items() if k != "config.json"})
    refused(capsys, ["val", "hf-hub:bo/y"], "config.json: No such file", "`hf cache`")


@pytest.mark.parametrize(
    ("name", "fragments"),
    [
        ("bo/none", ["bo/none does not exist or is private", "`hf auth login`", "HF_TOKEN"]),
        ("bo/private", ["bo/private does not exist or is private", "`hf auth login`"]),
        ("bo/gated", ["bo/gated is gated; request access at", "/bo/gated, then log in"]),
        ("bo", ["expected owner/name, got 'bo'"]),
        ("bo/x/y", ["expected owner/name, got 'bo/x/y'"]),
        ("@main", ["expected owner/name, got ''"]),
        ("bo/a--b", ["bo/a--b was rejected"]),
    ],
)
def test_invalid_and_missing_names(hub, monkeypatch, capsys, name, fragments):
    monkeypatch.delenv("HF_TOKEN")
    hub.repositories["bo/private"] = Repository(private=True)
    hub.repositories["bo/gated"] = Repository({"manifest.json": b"{}"}, gated=True)
    refused(capsys, ["val", f"hf-hub:{name}"], *fragments)


def test_all_files_are_from_one_commit(hub, run, monkeypatch):
    """Even if a commit is pushed during the download."""
    files = files_of(run / "weights" / "best")
    repository = hub.repositories["bo/x"] = Repository(files)

    def moving(handler, name, revision, file, body):
        handler.resolve(name, revision, file, body)
        if handler.command == "GET":
            repository.commit({**files, "model.safetensors": b"other"}, "later")

    (pattern,) = (key for key, act in ROUTES.items() if act is Handler.resolve)
    monkeypatch.setitem(ROUTES, pattern, moving)
    assert vitral.load("hf-hub:bo/x").description.classes == CLASSES
    assert len(repository.commits) > 1
    assert not huggingface_hub.utils.are_progress_bars_disabled()


def test_a_cache_that_cannot_be_written(hub, run, tmp_path, monkeypatch, capsys):
    hub.repositories["bo/x"] = Repository(files_of(run / "weights" / "best"))
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "cache"))
    refused(capsys, ["val", "hf-hub:bo/x"], str(tmp_path / "file"), "HF_HUB_CACHE")


def test_private_weights_with_a_token(hub, run, monkeypatch, capsys):
    files = files_of(run / "weights" / "best")
    hub.repositories["bo/private"] = Repository(files, private=True)
    assert vitral.load("hf-hub:bo/private").description.classes == CLASSES
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused(capsys, ["val", "hf-hub:bo/x"], "bo/x: the token is invalid", "`hf auth login`")


def test_paths_cause_no_network_requests(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "there").mkdir(parents=True)
    expected = (
        "runs/digts: no such directory",
        "if it is on the Hugging Face Hub, use hf-hub:runs/digts",
    )
    refused(capsys, ["predict", "runs/digts", "photo.jpg"], *expected)
    refused(capsys, ["val", "anna/x@v1"], "use hf-hub:anna/x@v1")
    for path in ("runs/there", "digts", "runs/digts/weights", "../x", str(tmp_path / "x")):
        assert main(["val", path]) == 2
        assert "Hub" not in capsys.readouterr().err
    assert hub.requests == []


def test_pushing_again_replaces_the_files(hub, run, tmp_path):
    others = {"notes.txt": b"mine", "onnx/model.safetensors": b"mine too"}
    hub.repositories["anna/shades"] = Repository(others)
    assert push(run) == 0
    save(tmp_path / "new", Config(model=SHAPE), kinds=["model"])
    assert push(tmp_path / "new") == 0
    repository = hub.repositories["anna/shades"]
    assert len(repository.commits) == 3
    assert repository.files.keys() == (FILES | OTHER_FILES | others.keys()) - {"ema.safetensors"}
    assert vitral.load("hf-hub:anna/shades", which="model").description.config.train.epochs == 90


def test_private_stays_private(hub, run, capsys):
    assert push(run, "--private") == 0
    assert hub.repositories["anna/shades"].private
    assert push(run, "--private") == 0
    hub.repositories["anna/open"] = Repository()
    refused(capsys, ["push", run, "anna/open", "--private"], "anna/open is public; make it private")
    assert len(hub.repositories["anna/open"].commits) == 1


def test_pushing_without_permission(hub, run, monkeypatch, capsys):
    refused(capsys, ["push", run, "bo/x"], "bo/x: the token does not permit this")
    refused(capsys, ["push", run, "x"], "expected owner/name, got 'x'")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused(capsys, ["push", run, "anna/x"], "the token is invalid; log in with `hf auth login`")
    monkeypatch.delenv("HF_TOKEN")
    hub.requests.clear()
    refused(
        capsys, ["push", run, "anna/x"], "expected a token to push anna/x, got none", "HF_TOKEN"
    )
    assert hub.requests == []
    assert hub.repositories == {}


def test_a_rejected_card_leaves_nothing(hub, run, capsys):
    words = ["push", run, "anna/x", "--license", "Mine"]
    refused(capsys, words, 'rejected: "license" must be one of [mit, apache-2.0]\n')
    assert hub.repositories == {}


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("/commit/", 500, "the Hub responded with 500, Something went wrong; try again later"),
        ("/lfs/", 403, "the token does not permit this"),
        ("/lfs/", 400, "the Hub responded with 400, Something went wrong; try again later"),
    ],
)
def test_a_push_that_fails_leaves_nothing(hub, run, capsys, path, status, message):
    hub.repositories["anna/x"] = Repository({"README.md": b"before"})
    hub.failing, hub.status = path, status
    refused(capsys, ["push", run, "anna/x"], "anna/x: ", message)
    repository = hub.repositories["anna/x"]
    assert (len(repository.commits), repository.files["README.md"]) == (1, b"before")
    hub.failing = None
    assert push(run, name="anna/x") == 0
    assert repository.files.keys() == FILES | OTHER_FILES


def test_corrupt_weights_are_not_pushed(hub, run, tmp_path, capsys):
    for name, data in files_of(run / "weights" / "best").items():
        (tmp_path / name).write_bytes(data[:-1] + b"?" if name == "ema.safetensors" else data)
    refused(capsys, ["push", tmp_path, "anna/x"], "ema.safetensors: its content differs")
    assert hub.requests == []


def test_dry_run_sends_no_requests(hub, run, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    assert push(run, "--dry-run", "--license", "MIT") == 0
    out = capsys.readouterr().out
    assert out.startswith("---\nlibrary_name: vitral\n")
    assert "`mit`" in out
    assert hub.requests == []


def test_the_missing_package_is_named(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    package = "the package huggingface_hub, which is not installed; `pip install 'vitral[hub]'`"
    refused(capsys, ["val", "hf-hub:anna/x"], package)
    refused(capsys, ["push", run, "anna/x"], package)


def test_pushed_files_match_their_manifest(hub, run, tmp_path):
    assert push(run) == 0
    for name, data in hub.repositories["anna/shades"].files.items():
        (tmp_path / name).write_bytes(data)  # like `hf download` or git
    storage.verify(tmp_path)
    assert vitral.load(tmp_path).model.cls.equal(vitral.load(run).model.cls)
