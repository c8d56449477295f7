"""Files of a run on the Hugging Face hub: what `qat push` uploads, and what `qat pull` takes and checks.

A push uploads exported files with their cards, the certificate, the recipe and the results; a checkpoint only when asked. Of
a recipe's paths the last names alone go: the rest is nobody's business.

A pull trusts nothing that it gets. It takes files of known kinds (ONNX, JSON, Markdown) that lie at the top of the
repository under plain names, from one commit, and leaves the rest. What it took is checked in a folder of its own
(`export/verify.py`, the certificate's SHA-256) and moved into the folder that the user named when it passed; nothing of it
is run but the file's arithmetic.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeqat.extras import require
from edgeqat.files import FileError, read_json, reason_of, write_json

if TYPE_CHECKING:
    from export.verify import FileCheck

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
PLAIN_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,120}\.(?:onnx|json|md)", re.ASCII)
MOST_BYTES = 2**31  # of one file: what an ONNX file can have
CARD = "README.md"  # what the hub shows


class HubError(ValueError):
    """A repository cannot be reached or used; the message names it and says why."""


@dataclass(frozen=True)
class Pushed:
    """Where a run's files went. address: of the commit. names: the files, as they are called there."""

    address: str
    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.address}: {', '.join(self.names)}"


@dataclass(frozen=True)
class Pulled:
    """What came from a repository into `folder`, and its checks.

    commit: its identifier. names: the files that were taken. left: those that were not. checks: one of each ONNX file.
    certificate: what certificate.json says of these files, or why it says nothing.
    """

    folder: Path
    commit: str
    names: tuple[str, ...]
    left: tuple[str, ...]
    checks: tuple[FileCheck, ...]
    certificate: str

    @property
    def passed(self) -> bool:
        """Whether there is a file and every one is as it was signed."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    def __str__(self) -> str:
        lines = [str(check) for check in self.checks]
        lines.append(f"certificate: {self.certificate}")
        if self.left:
            lines.append(f"left there: {', '.join(self.left)}")
        if self.passed:
            lines.append(
                f"{self.folder}: {', '.join(self.names)} (commit {self.commit})"
            )
        else:
            lines.append(
                f"{self.folder}: nothing was written, as a file is NOT VERIFIED"
            )
        return "\n".join(lines)


def push_run(
    run: Path,
    repository: str,
    models: Sequence[Path] = (),
    *,
    checkpoint: bool = False,
    public: bool = False,
    hub: Any = None,
) -> Pushed:
    """Upload the exported files of `run` to `repository` (OWNER/NAME), which is made where there is none, in one commit.

    models: the files; by default every .onnx of the run folder. checkpoint: also checkpoint.pt. public: whether a repository
    that is made now is for everybody. hub: a client as huggingface_hub's HfApi, which is the default.
    Raises HubError, and FileError for a run without an exported file or one that is not as it was signed.
    """
    require_name(repository)
    client = _client() if hub is None else hub
    with tempfile.TemporaryDirectory(prefix="edgeqat-push-") as staging:
        folder = Path(staging)
        gather(run, models, folder, checkpoint=checkpoint)
        names = tuple(sorted(path.name for path in folder.iterdir()))
        try:
            client.create_repo(repo_id=repository, private=not public, exist_ok=True)
            commit = client.upload_folder(
                repo_id=repository,
                folder_path=folder,
                commit_message=f"edgeqat: {', '.join(names)}",
            )
        except (
            Exception
        ) as error:  # the client has errors of its own, and its network's
            raise _refused(repository, "cannot be written", error) from error
    return Pushed(str(commit.commit_url), names)


def gather(
    run: Path, models: Sequence[Path], folder: Path, *, checkpoint: bool = False
) -> None:
    """Copy what a push uploads into the empty `folder`. Raises FileError."""
    from export.metadata import read_metadata
    from export.onnx_file import read
    from export.verify import verify_file
    from qat.analysis.model_card import card_of, write_card
    from qat.runs.run_folder import RunFolder

    opened = RunFolder.open(run)
    files = list(models) or sorted(run.glob("*.onnx"))
    if not files:
        raise FileError(f"{run}: has no exported file; `qat export {run}` writes one")
    for index, model in enumerate(files):
        if PLAIN_NAME.fullmatch(model.name) is None or (folder / model.name).exists():
            raise FileError(
                f"{model}: cannot be uploaded under this name; give it another, of letters, digits, '-', '_' and '.'"
            )
        check = verify_file(model)
        if not check.passed:
            raise FileError(
                f"{model}: is not as it was signed; export it again\n{check}"
            )
        shutil.copyfile(model, folder / model.name)
        card = card_of(model)
        if not card.exists():
            target = read_metadata(read(model), str(model))["target"]
            write_card(opened, model, target)
        shutil.copyfile(card, folder / (CARD if index == 0 else card.name))
    write_json(
        folder / "recipe.json",
        without_folders(read_json(opened.require("recipe.json"))),
    )
    shutil.copyfile(opened.require("results.json"), folder / "results.json")
    if (opened / "certificate.json").exists():
        shutil.copyfile(opened / "certificate.json", folder / "certificate.json")
    if checkpoint:
        shutil.copyfile(opened.require("checkpoint.pt"), folder / "checkpoint.pt")


def without_folders(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recorded recipe, of each absolute path the last name: folders tell who trained it, and where."""
    shown = {}
    for name, value in recipe.items():
        is_path = isinstance(value, str) and Path(value).is_absolute()
        shown[name] = Path(value).name if is_path else value
    return shown


def pull(
    repository: str, folder: Path, revision: str = "main", *, hub: Any = None
) -> Pulled:
    """Take the files of `repository` (OWNER/NAME) at `revision` into the new or empty `folder`, if they pass their checks.

    hub: a client as huggingface_hub's HfApi, which is the default.
    Raises HubError, and ExportError for a file that is damaged or not this toolkit's; nothing is written then.
    """
    require_name(repository)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise HubError(
            f"{folder}: exists; name a new folder, so that nothing in it is replaced"
        )
    client = _client() if hub is None else hub
    with tempfile.TemporaryDirectory(prefix="edgeqat-pull-") as staging:
        taken = Path(staging) / "taken"
        taken.mkdir()
        commit, names, left = _download(client, repository, revision, taken)
        checks = _checked(taken)
        if not checks:
            raise HubError(f"{repository}: has no ONNX file at its top")
        found = Pulled(folder, commit, names, left, checks, _of_certificate(taken))
        if found.passed:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                for name in names:
                    shutil.copyfile(taken / name, folder / name)
            except OSError as error:
                raise HubError(
                    f"{folder}: cannot be written ({reason_of(error)})"
                ) from error
    return found


def _download(
    client: Any, repository: str, revision: str, folder: Path
) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """Fetch into `folder` what a pull takes; returns the commit, the names taken and those left."""
    try:
        info = client.model_info(
            repo_id=repository, revision=revision, files_metadata=True
        )
    except Exception as error:
        raise _refused(repository, "cannot be read", error) from error
    names, left = [], []
    for file in info.siblings or ():
        name = str(file.rfilename)
        if PLAIN_NAME.fullmatch(name) is None:
            left.append(name)
            continue
        if (file.size or 0) > MOST_BYTES:
            raise HubError(
                f"{repository}: {name} has {file.size} bytes, more than an ONNX file can"
            )
        names.append(name)
    with tempfile.TemporaryDirectory(prefix="edgeqat-hub-") as cache:
        for name in names:
            try:
                path = client.hf_hub_download(
                    repo_id=repository,
                    filename=name,
                    revision=info.sha,
                    cache_dir=cache,
                )
                shutil.copyfile(path, folder / name)
            except Exception as error:
                raise _refused(
                    repository, f"{name} cannot be fetched", error
                ) from error
    return str(info.sha), tuple(sorted(names)), tuple(sorted(left))


def _checked(folder: Path) -> tuple[FileCheck, ...]:
    from export.verify import verify_file

    return tuple(verify_file(path) for path in sorted(folder.glob("*.onnx")))


def _of_certificate(folder: Path) -> str:
    """What certificate.json says of the files beside it."""
    path = folder / "certificate.json"
    if not path.exists():
        return "there is none"
    certificate = read_json(path)
    if not isinstance(certificate, dict):
        return "certificate.json holds none"
    for model in sorted(folder.glob("*.onnx")):
        if hashlib.sha256(model.read_bytes()).hexdigest() == certificate.get("sha256"):
            verdict = "passed" if certificate.get("passed") is True else "FAILED"
            return f"of {model.name}, {verdict}, as whoever uploaded it says"
    return "is of another file"


def require_name(repository: str) -> None:
    """Raises HubError unless `repository` is OWNER/NAME."""
    if REPOSITORY.fullmatch(repository) is None:
        raise HubError(
            f"{repository!r}: is not a repository of the hub; name it OWNER/NAME"
        )


def _client() -> Any:
    """The hub's own client. Raises MissingExtra."""
    require("huggingface_hub")
    import huggingface_hub

    return huggingface_hub.HfApi(library_name="edgeqat")


def _refused(repository: str, what: str, error: Exception) -> HubError:
    """One line; who must log in is told how."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    cure = "; `hf auth login`, or set HF_TOKEN" if status in (401, 403) else ""
    return HubError(f"{repository}: {what} ({reason_of(error)}){cure}")
