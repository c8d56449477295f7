"""`qat push` and `qat pull` against a hub that is a folder: what goes there, what is taken from it, and what never is.

The stand-in's methods bind their arguments to the real client's signatures first.
"""

import hashlib
import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from edgeqat.files import FileError
from export.metadata import read_metadata
from qat import hub as hub_module
from qat.cli import Pull, Push, execute
from qat.deploy import certify_run, export_run
from qat.domains.synthetic import synthetic_domains
from qat.hub import HubError, pull, push_run
from qat.runs.recipe import recipe_of
from qat.train.loop import run

huggingface_hub = pytest.importorskip("huggingface_hub")
NAME = "somebody/net"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """The hub, of whose repositories each is a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.more: dict[str, tuple[int, Path]] = {}  # files that lie elsewhere: their size and place
        self.made: list[dict[str, Any]] = []

    def bound(self, method: str, given: dict[str, Any]) -> None:
        inspect.signature(getattr(huggingface_hub.HfApi, method)).bind(self, **given)

    def create_repo(self, **given: Any) -> None:
        self.bound("create_repo", given)
        self.made.append(given)
        (self.root / given["repo_id"]).mkdir(parents=True, exist_ok=True)

    def upload_folder(self, **given: Any) -> Any:
        self.bound("upload_folder", given)
        shutil.copytree(given["folder_path"], self.root / given["repo_id"], dirs_exist_ok=True)
        return SimpleNamespace(commit_url=f"hub/{given['repo_id']}/commit/{COMMIT}")

    def model_info(self, **given: Any) -> Any:
        self.bound("model_info", given)
        folder = self.root / given["repo_id"]
        if not folder.exists():
            raise OSError(404, "Repository Not Found")
        assert given["revision"] == "main" and given["files_metadata"]
        files = [
            SimpleNamespace(rfilename=path.relative_to(folder).as_posix(), size=path.stat().st_size)
            for path in folder.rglob("*")
            if path.is_file()
        ]
        files += [SimpleNamespace(rfilename=name, size=size) for name, (size, _) in self.more.items()]
        return SimpleNamespace(sha=COMMIT, siblings=files)

    def hf_hub_download(self, **given: Any) -> str:
        self.bound("hf_hub_download", given)
        assert given["revision"] == COMMIT  # one commit, whatever is pushed meanwhile
        name = given["filename"]
        path = self.more[name][1] if name in self.more else self.root / given["repo_id"] / name
        return str(shutil.copyfile(path, Path(given["cache_dir"]) / Path(name).name))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "lsq"
    tiny = {"backbone": "test_resnet", "image_size": 32, "steps": 2, "batch_size": 4, "evaluate_every": 2, "workers": 0}
    run(recipe_of("lsq", **tiny, out=out), synthetic_domains(per_class=6, image_size=32, seed=0))
    model = export_run(out, "ort-packed")
    assert certify_run(out, model).passed
    return out


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    return Hub(tmp_path / "hub")


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_what_is_pushed_comes_back_the_same_and_is_verified(trained: Path, hub: Hub, tmp_path: Path) -> None:
    pushed = push_run(trained, NAME, hub=hub)
    expected = {"README.md", "model.onnx", "certificate.json", "recipe.json", "results.json"}
    there = hub.root / NAME
    assert names(there) == expected == set(pushed.names)
    (made,) = hub.made
    assert made["private"] is True
    assert (there / "README.md").read_bytes() == (trained / "model.md").read_bytes()
    got = tmp_path / "got"
    pulled = pull(NAME, got, hub=hub)
    assert pulled.passed and pulled.commit == COMMIT and pulled.left == ()
    assert pulled.certificate == "of model.onnx, passed, as whoever uploaded it says"
    assert names(got) == expected
    for name in expected:
        assert (got / name).read_bytes() == (there / name).read_bytes()
    assert (got / "model.onnx").read_bytes() == (trained / "model.onnx").read_bytes()


def test_a_recipe_is_pushed_without_the_folders_it_names(trained: Path, hub: Hub) -> None:
    push_run(trained, NAME, hub=hub)
    shown = json.loads((hub.root / NAME / "recipe.json").read_text())
    own = json.loads((trained / "recipe.json").read_text())
    assert own["out"] == str(trained) and shown["out"] == trained.name
    assert str(trained.parent) not in json.dumps(shown)
    assert {key: value for key, value in shown.items() if key != "out"} == {
        key: value for key, value in own.items() if key != "out"
    }


def test_a_checkpoint_goes_only_when_asked_and_is_never_taken(trained: Path, hub: Hub, tmp_path: Path) -> None:
    assert "checkpoint.pt" in push_run(trained, NAME, checkpoint=True, hub=hub).names
    pulled = pull(NAME, tmp_path / "got", hub=hub)
    assert pulled.left == ("checkpoint.pt",) and "checkpoint.pt" not in names(tmp_path / "got")


def test_several_files_have_their_own_cards(trained: Path, hub: Hub, tmp_path: Path) -> None:
    second = export_run(trained, "ort-int8", out=tmp_path / "small.onnx")
    (tmp_path / "small.md").unlink()  # it is written again
    pushed = push_run(trained, NAME, [trained / "model.onnx", second], public=True, hub=hub)
    assert {"model.onnx", "README.md", "small.onnx", "small.md"} <= set(pushed.names)
    assert "target ort-int8" in (hub.root / NAME / "small.md").read_text()
    assert hub.made[0]["private"] is False


def damaged(path: Path) -> None:
    """One weight code of the file is another; the signature tells."""
    proto = onnx.load(str(path))
    layer = read_metadata(proto, path.name)["layers"][0]
    stored = next(
        t for t in proto.graph.initializer if t.name.startswith(f"{layer['name']}.weight") and len(t.raw_data) > 8
    )
    stored.raw_data = bytes([stored.raw_data[0] ^ 1]) + stored.raw_data[1:]
    onnx.save(proto, str(path))


def test_a_file_that_was_changed_is_neither_pushed_nor_kept(trained: Path, hub: Hub, tmp_path: Path) -> None:
    push_run(trained, NAME, hub=hub)
    changed = tmp_path / "changed.onnx"
    shutil.copyfile(trained / "model.onnx", changed)
    damaged(changed)
    with pytest.raises(FileError, match=r"changed\.onnx: is not as it was signed"):
        push_run(trained, NAME, [changed], hub=hub)
    shutil.copyfile(changed, hub.root / NAME / "model.onnx")
    pulled = pull(NAME, tmp_path / "got", hub=hub)
    assert not pulled.passed and "nothing was written" in str(pulled) and not (tmp_path / "got").exists()
    assert pulled.certificate == "is of another file"


HOSTILE = [
    "../escaped.onnx", "/tmp/absolute.onnx", "deep/model.json", "..\\windows.onnx", ".hidden.json", "run.py", "pickle.pkl",
    "model.onnx\n", "a\x1b[31m.md", "-rf.md", f"{'n' * 200}.md",
]  # fmt: skip


def test_names_of_a_repository_choose_no_path(trained: Path, hub: Hub, tmp_path: Path) -> None:
    push_run(trained, NAME, hub=hub)
    planted = tmp_path / "planted"
    planted.write_text("planted")
    for name in HOSTILE:
        hub.more[name] = (7, planted)
    before = names(tmp_path)
    pulled = pull(NAME, tmp_path / "inside" / "got", hub=hub)
    assert set(pulled.left) == set(HOSTILE)
    new = names(tmp_path) - before
    assert new == {f"inside/got/{name}" for name in pulled.names} and "planted" not in "".join(pulled.names)


def test_a_file_larger_than_any_model_is_not_fetched(trained: Path, hub: Hub, tmp_path: Path) -> None:
    push_run(trained, NAME, hub=hub)
    hub.more["huge.onnx"] = (hub_module.MOST_BYTES + 1, tmp_path / "absent")
    with pytest.raises(HubError, match=r"somebody/net: huge\.onnx has 2147483649 bytes"):
        pull(NAME, tmp_path / "got", hub=hub)


@pytest.mark.parametrize("name", ["net", "a/b/c", "../net", "a/", "a/..", "https://x/y", "a b/c", ""])
def test_a_repository_has_an_owner_and_a_name(name: str, hub: Hub, tmp_path: Path) -> None:
    for call in (lambda: push_run(tmp_path, name, hub=hub), lambda: pull(name, tmp_path / "got", hub=hub)):
        with pytest.raises(HubError, match="name it OWNER/NAME"):
            call()


def test_errors_name_what_to_do(trained: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HubError, match=r"somebody/net: cannot be read \(Repository Not Found\)"):
        pull(NAME, tmp_path / "got", hub=hub)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.md").write_text("mine")
    with pytest.raises(HubError, match="full: exists; name a new folder"):
        pull(NAME, tmp_path / "full", hub=hub)
    empty = tmp_path / "run"
    empty.mkdir()
    with pytest.raises(FileError, match="has no exported file; `qat export"):
        push_run(empty, NAME, hub=hub)
    (hub.root / NAME).mkdir(parents=True)
    with pytest.raises(HubError, match="has no ONNX file at its top"):
        pull(NAME, tmp_path / "got", hub=hub)

    def denied(**given: Any) -> None:
        error = OSError("Unauthorized")
        error.response = SimpleNamespace(status_code=401)  # type: ignore[attr-defined]
        raise error

    monkeypatch.setattr(hub, "create_repo", denied)
    with pytest.raises(HubError, match=r"cannot be written \(Unauthorized\); `hf auth login`, or set HF_TOKEN"):
        push_run(trained, NAME, hub=hub)


def test_the_commands(
    trained: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hub_module, "_client", lambda: hub)
    assert execute(Push(trained, NAME)) == 0
    assert capsys.readouterr().out.startswith(f"hub/{NAME}/commit/{COMMIT}: README.md, certificate.json, model.onnx")
    got = tmp_path / "got"
    assert execute(Pull(NAME, got)) == 0
    assert f"{got}: README.md, certificate.json" in capsys.readouterr().out
    digest = hashlib.sha256((got / "model.onnx").read_bytes()).hexdigest()
    assert json.loads((got / "certificate.json").read_text())["sha256"] == digest
    damaged(hub.root / NAME / "model.onnx")
    assert execute(Pull(NAME, tmp_path / "again")) == 1


def test_a_pull_needs_no_torch() -> None:
    """As a device pulls: what cannot be imported there is named, should anything import it."""
    program = "import sys; sys.modules['torch'] = None; import qat.cli, qat.hub, export.verify"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
