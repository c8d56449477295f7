"""Compiled libraries: which folders and files are trusted, and that everything else is made again and never loaded.

The compiler is a function that counts its calls; where processes matter, a script that counts its runs. Tests that need
another user's file give one away, which only root can do.
"""

import errno
import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeqat import compiled, cpp

ROOT = Path(__file__).parent.parent
NAME = "kernels-0123456789abcdef.so"
GOOD = b"the library" * 1000
STRANGER = 54321

needs_root = pytest.mark.skipif(
    not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can give a file to another user"
)


class Compiler:
    """Writes `contents` and counts how often."""

    def __init__(self, contents: bytes = GOOD) -> None:
        self.contents, self.runs = contents, 0

    def __call__(self, path: Path) -> None:
        self.runs += 1
        path.write_bytes(self.contents)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder; no other folder of the real user's is a place."""
    for variable in ("XDG_CACHE_HOME", "XDG_RUNTIME_DIR", compiled.TEMPORARY):
        monkeypatch.delenv(variable, raising=False)
    folder = tmp_path / "home"
    folder.mkdir(mode=0o755)
    monkeypatch.setenv("HOME", str(folder))
    temporary = tmp_path / "temporary"
    temporary.mkdir(mode=0o700)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(compiled, "_before_termination", lambda action: None)
    return folder


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A folder of sources that nothing can be written beside: it is not there."""
    return tmp_path / "absent"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def digest_named(contents: bytes) -> str:
    return f"kernels-0123456789abcdef-{hashlib.sha256(contents).hexdigest()}.so"


def planted(folder: Path, contents: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / digest_named(contents)
    path.write_bytes(contents)
    path.chmod(0o644)
    return path


def test_a_library_is_made_once_for_this_user_alone(home: Path, sources: Path) -> None:
    make = Compiler()
    first = compiled.library(NAME, sources, make)
    assert compiled.library(NAME, sources, make) == first and make.runs == 1
    assert first == home / ".cache/edgeqat" / digest_named(GOOD) and first.read_bytes() == GOOD
    for folder in (first.parent, first.parent.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert names(first.parent) == [first.name]


def test_one_of_other_sources_is_another_library(home: Path, sources: Path) -> None:
    old = compiled.library("kernels-0000000000000000.so", sources, Compiler(b"old"))
    assert compiled.library(NAME, sources, Compiler()).read_bytes() == GOOD and old.read_bytes() == b"old"


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"X" + path.read_bytes()[1:]),
        lambda path: path.chmod(0o664),
        lambda path: path.chmod(0o646),
        lambda path: (path.rename(path.with_suffix(".real")), path.symlink_to(path.with_suffix(".real"))),
        pipe,
    ],
    ids=["truncated", "empty", "one byte", "group-writable", "others write", "link", "pipe"],
)
def test_a_damaged_library_is_made_again(home: Path, sources: Path, harm: Callable[[Path], object]) -> None:
    make = Compiler()
    path = compiled.library(NAME, sources, make)
    harm(path)
    again = compiled.library(NAME, sources, make)
    assert make.runs == 2 and again.read_bytes() == GOOD and again.lstat().st_mode == stat.S_IFREG | 0o644
    assert compiled.library(NAME, sources, make) == again and make.runs == 2


def test_a_folder_with_the_librarys_name_is_no_library(home: Path, sources: Path) -> None:
    (home / ".cache/edgeqat" / digest_named(b"other")).mkdir(parents=True, mode=0o700)
    assert compiled.library(NAME, sources, Compiler()).read_bytes() == GOOD


def test_damaged_ones_that_are_replaced_go(home: Path, sources: Path) -> None:
    damaged = planted(home / ".cache/edgeqat", b"other")
    damaged.write_bytes(b"oth")
    path = compiled.library(NAME, sources, Compiler())
    assert names(path.parent) == [path.name]


@needs_root
def test_another_users_library_is_never_loaded(home: Path, sources: Path) -> None:
    evil = planted(home / ".cache/edgeqat", b"evil")
    os.chown(evil, STRANGER, STRANGER)
    make = Compiler()
    assert compiled.library(NAME, sources, make).read_bytes() == GOOD and make.runs == 1
    assert not evil.exists()


def test_another_users_library_is_not_ours_when_we_are_somebody_else(
    home: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted(home / ".cache/edgeqat", b"evil")
    monkeypatch.setattr(os, "getuid", lambda: STRANGER)
    make = Compiler()
    path = compiled.library(NAME, sources, make)
    assert path.read_bytes() == GOOD and home not in path.parents and make.runs == 1


@needs_root
@pytest.mark.parametrize("who", ["cache", "edgeqat"])
def test_another_users_folder_is_passed_over(home: Path, sources: Path, who: str) -> None:
    evil = planted(home / ".cache/edgeqat", b"evil")
    os.chown({"cache": home / ".cache", "edgeqat": evil.parent}[who], STRANGER, STRANGER)
    path = compiled.library(NAME, sources, Compiler())
    assert path.read_bytes() == GOOD and home not in path.parents


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777])
def test_a_cache_that_others_could_write_is_closed_and_what_is_in_it_is_not_loaded(
    home: Path, sources: Path, mode: int
) -> None:
    evil = planted(home / ".cache/edgeqat", b"evil")
    evil.parent.chmod(mode)
    path = compiled.library(NAME, sources, Compiler())
    assert path.read_bytes() == GOOD and path.parent == evil.parent and not evil.exists()
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_cache_that_others_can_read_is_closed_and_kept(home: Path, sources: Path) -> None:
    kept = planted(home / ".cache/edgeqat", GOOD)
    kept.parent.chmod(0o755)
    make = Compiler()
    assert compiled.library(NAME, sources, make) == kept and make.runs == 0
    assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700


def test_a_cache_that_cannot_be_closed_is_passed_over_if_others_can_write_it(
    home: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = planted(home / ".cache/edgeqat", b"evil").parent
    folder.chmod(0o777)
    change = Path.chmod

    def read_only(path: Path, mode: int, **options: bool) -> None:
        if path == folder:
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        change(path, mode, **options)

    monkeypatch.setattr(Path, "chmod", read_only)
    path = compiled.library(NAME, sources, Compiler())
    assert path.read_bytes() == GOOD and folder not in path.parents


def test_a_link_in_place_of_the_folder_is_passed_over(home: Path, sources: Path, tmp_path: Path) -> None:
    planted(tmp_path / "elsewhere", b"evil")
    (home / ".cache").mkdir(mode=0o700)
    (home / ".cache/edgeqat").symlink_to(tmp_path / "elsewhere")
    path = compiled.library(NAME, sources, Compiler())
    assert path.read_bytes() == GOOD and tmp_path / "elsewhere" != path.parent
    assert len(names(tmp_path / "elsewhere")) == 1


def test_a_cache_that_was_moved_by_a_link_above_it_is_used(home: Path, sources: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (home / ".cache").symlink_to(tmp_path / "disk")
    assert compiled.library(NAME, sources, Compiler()).parent == tmp_path / "disk/edgeqat"


@pytest.mark.parametrize("sticky", [False, True])
@pytest.mark.parametrize("there", [False, True])
def test_a_folder_above_that_others_can_write(home: Path, sources: Path, sticky: bool, there: bool) -> None:
    if there:
        planted(home / ".cache/edgeqat", b"evil" if not sticky else GOOD)
    home.chmod(0o1777 if sticky else 0o777)
    path = compiled.library(NAME, sources, Compiler())
    assert path.read_bytes() == GOOD and (home in path.parents) == sticky
    assert there or sticky == (home / ".cache/edgeqat").exists()


@pytest.mark.parametrize("value", ["", "relative/cache"])
def test_a_cache_variable_that_names_no_place_does_not_count(
    home: Path, sources: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert home in compiled.library(NAME, sources, Compiler()).parents
    assert not (tmp_path / "relative").exists()


def test_a_cache_that_is_named_is_made_with_the_folders_above_it(
    home: Path, sources: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "deep/cache"))
    path = compiled.library(NAME, sources, Compiler())
    assert path.parent == tmp_path / "deep/cache/edgeqat" and not (home / ".cache").exists()


@pytest.mark.parametrize("value", ["/nonexistent", "/dev/null", None])
def test_without_a_home_folder_nothing_is_made_there(
    home: Path, sources: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str | None
) -> None:
    if value is None:
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    else:
        monkeypatch.setenv("HOME", value)
    make = Compiler()
    path = compiled.library(NAME, sources, make)
    assert tmp_path / "temporary" in path.parents and not Path("/nonexistent").exists()
    assert compiled.library(NAME, sources, make) == path and make.runs == 1


def test_the_sources_folder_and_the_runtime_folder_come_next(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/cache")
    sources, runtime = tmp_path / "sources", tmp_path / "runtime"
    sources.mkdir(mode=0o755)
    runtime.mkdir(mode=0o700)
    sources.chmod(0o755)  # whatever the umask is
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    assert compiled.library(NAME, sources, Compiler()).parent == sources
    assert stat.S_IMODE(sources.stat().st_mode) == 0o755  # a clone's modes are left as they are
    sources.chmod(0o777)
    path = compiled.library(NAME, sources, Compiler(b"runtime"))
    assert path.read_bytes() == b"runtime" and path.parent == runtime / "edgeqat"


@pytest.mark.parametrize("own", [True, False])
def test_a_library_installed_under_umask_002_counts_where_the_group_is_the_users_own(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own: bool
) -> None:
    """Ubuntu and Fedora make a group for every user, and let it write what the user installs."""
    installed = planted(tmp_path / "sources", GOOD)
    installed.parent.chmod(0o775)
    installed.chmod(0o664)
    monkeypatch.setattr(compiled, "_is_own_group", lambda group: own and group == installed.stat().st_gid)
    make = Compiler()
    found = compiled.library(NAME, tmp_path / "sources", make)
    assert (found == installed) is own and make.runs == (0 if own else 1)
    installed.parent.chmod(0o755)  # the file alone
    other = home / "other"
    monkeypatch.setenv("XDG_CACHE_HOME", str(other))
    assert (compiled.library(NAME, tmp_path / "sources", make) == installed) is own


@needs_root
def test_a_library_that_was_installed_with_the_sources_may_be_their_owners(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    installed = planted(tmp_path / "sources", GOOD)
    installed.parent.chmod(0o755)
    monkeypatch.setattr(os, "getuid", lambda: STRANGER)  # root's are the sources, and this module
    make = Compiler()
    assert compiled.library(NAME, tmp_path / "sources", make) == installed and make.runs == 0
    os.chown(installed, STRANGER + 1, STRANGER + 1)
    path = compiled.library(NAME, tmp_path / "sources", make)
    assert path != installed and path.read_bytes() == GOOD and make.runs == 1


def test_a_full_disk_leads_to_the_next_place_and_then_to_one_message(
    home: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = [home / ".cache/edgeqat"]
    require = compiled._require_room

    def require_room(folder: Path) -> None:
        if any(place in (folder, *folder.parents) for place in full):
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))
        require(folder)

    monkeypatch.setattr(compiled, "_require_room", require_room)
    assert home not in compiled.library(NAME, sources, Compiler()).parents
    full.append(Path("/"))
    with pytest.raises(
        compiled.PlaceError, match=r"edgeqat.*: No space left on device.*; set XDG_CACHE_HOME to a folder"
    ):
        compiled.library("other-1.so", sources, Compiler())
    assert names(full[0]) == []


def test_a_compiler_that_fills_the_disk_leads_to_the_next_place(
    home: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "ROOM", 1)
    require, asked = compiled._require_room, []

    def require_room(folder: Path) -> None:
        asked.append(folder)
        if home in folder.parents and len(asked) > 1:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))
        require(folder)

    def make(path: Path) -> None:
        path.write_bytes(GOOD)
        if home in path.parents:
            raise RuntimeError("cc1plus: No space left on device")

    monkeypatch.setattr(compiled, "_require_room", require_room)
    assert home not in compiled.library(NAME, sources, make).parents


def test_a_compiler_that_refuses_the_sources_runs_once_and_leaves_nothing(home: Path, sources: Path) -> None:
    runs = []

    def refuse(path: Path) -> None:
        runs.append(path)
        path.write_bytes(b"half")
        raise RuntimeError("syntax error")

    with pytest.raises(RuntimeError, match="syntax error"):
        compiled.library(NAME, sources, refuse)
    assert len(runs) == 1 and names(home / ".cache/edgeqat") == []


def test_without_user_ids_nothing_is_asked_of_them(home: Path, sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "getuid")
    home.chmod(0o777)
    make = Compiler()
    path = compiled.library(NAME, sources, make)
    assert home in path.parents and compiled.library(NAME, sources, make) == path and make.runs == 1
    assert compiled.distrust(home) is None


def test_what_a_killed_compiler_left_goes_after_a_day(home: Path, sources: Path) -> None:
    folder = compiled.library(NAME, sources, Compiler()).parent
    for name, age in (("old", 2 * compiled.STALE), ("new", 0)):
        left = folder / f"{compiled.STAGING}{name}"
        left.mkdir()
        os.utime(left, (time.time() - age,) * 2)
    compiled.library("other-1.so", sources, Compiler(b"other"))
    assert (folder / f"{compiled.STAGING}new").exists() and not (folder / f"{compiled.STAGING}old").exists()


@needs_root
def test_programs_in_others_folders_are_named(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "root"
    folder.mkdir()
    assert compiled.distrust(folder) is None
    folder.chmod(0o777)
    assert f"others can write {folder}" in str(compiled.distrust(folder))
    folder.chmod(0o755)
    os.chown(folder, STRANGER, STRANGER)
    assert f"{folder} above it belongs to another user" in str(compiled.distrust(folder))


# Processes. Each prints the path that it found; the compiler is a script that notes every run.

PROGRAM = """
import os, subprocess, sys, time
from pathlib import Path
from edgeqat import compiled
def make(path):
    with open(os.environ["RUNS"], "a") as log: log.write("run\\n")
    time.sleep(float(os.environ.get("SLOW", 0)))
    path.write_bytes(os.urandom(8) + bytes(10000) if os.environ.get("OTHERWISE") else bytes(10000))
def found():
    path = compiled.library("kernels-1.so", Path("/nowhere/sources"), make)
    assert path.stem.endswith(__import__("hashlib").sha256(path.read_bytes()).hexdigest())
    return path
"""


def environment(tmp_path: Path, **further: str) -> dict[str, str]:
    """Of a process without a home folder to write to; TMPDIR is `tmp_path`/t."""
    (tmp_path / "t").mkdir(mode=0o700, exist_ok=True)
    (tmp_path / "runs").touch()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "EDGEQAT_"))}
    shared = {
        "HOME": "/dev/null",
        "TMPDIR": str(tmp_path / "t"),
        "RUNS": str(tmp_path / "runs"),
        "PYTHONPATH": str(ROOT),
    }
    return kept | shared | further


def compiler_runs(tmp_path: Path) -> int:
    return (tmp_path / "runs").read_text().count("run")


def python(code: str, tmp_path: Path, **further: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", PROGRAM + code]
    return subprocess.Popen(command, env=environment(tmp_path, **further), stdout=subprocess.PIPE, text=True)


def test_a_read_only_home_compiles_once_for_parent_and_children_and_leaves_nothing(tmp_path: Path) -> None:
    child = PROGRAM + "print(found())"
    code = f"""
print(found(), flush=True)
import multiprocessing
for _ in range(2):
    subprocess.run([sys.executable, "-c", {child!r}], check=True)
def forked(): print(found(), flush=True)
process = multiprocessing.get_context("fork").Process(target=forked)
process.start(); process.join()
if (pid := os.fork()) == 0:
    print(found(), flush=True)
    sys.exit(0)  # runs what atexit knows, which must not remove the parent's folder
os.waitpid(pid, 0)
print(found())
"""
    process = python(code, tmp_path)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and len(out.split()) == 6 and len(set(out.split())) == 1
    assert compiler_runs(tmp_path) == 1 and names(tmp_path / "t") == []


def test_a_child_that_outlives_the_folder_makes_its_own(tmp_path: Path) -> None:
    process = python("print(found())", tmp_path, EDGEQAT_TEMPORARY=str(tmp_path / "gone"))
    assert process.communicate(timeout=60)[0] and process.returncode == 0
    assert compiler_runs(tmp_path) == 1 and names(tmp_path / "t") == []


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_worker_that_made_the_folder_removes_it(tmp_path: Path, method: str) -> None:
    (tmp_path / "worker.py").write_text(f"{PROGRAM}\ndef main(): print(found(), flush=True)\n")
    code = f"""
import multiprocessing, worker
if __name__ == "__main__":
    process = multiprocessing.get_context({method!r}).Process(target=worker.main)
    process.start(); process.join(); sys.exit(process.exitcode)
"""
    process = python(code, tmp_path, PYTHONPATH=f"{ROOT}:{tmp_path}")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "kernels-1" in out and names(tmp_path / "t") == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_is_told_to_stop_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    process = python("print(found(), flush=True)\ntime.sleep(60)", tmp_path)
    assert process.stdout is not None and "kernels-1" in process.stdout.readline()
    assert len(names(tmp_path / "t")) == 1
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode in (-number, 1) and names(tmp_path / "t") == []


def test_a_handler_that_is_there_stays(tmp_path: Path) -> None:
    code = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
found()
print(signal.getsignal(signal.SIGTERM) is signal.SIG_IGN)
"""
    assert python(code, tmp_path).communicate(timeout=60)[0] == "True\n"


def test_a_planted_temporary_folder_is_not_used(tmp_path: Path) -> None:
    evil = tmp_path / "evil"
    evil.mkdir(mode=0o700)
    contents = b"evil"
    path = evil / f"kernels-1-{hashlib.sha256(contents).hexdigest()}.so"
    path.write_bytes(contents)
    evil.chmod(0o777)
    process = python("print(found())", tmp_path, EDGEQAT_TEMPORARY=str(evil))
    found = Path(process.communicate(timeout=60)[0].strip())
    assert found.name != path.name and not path.exists()


@pytest.mark.parametrize("otherwise", ["", "1"], ids=["the same bytes", "other bytes each"])
def test_processes_that_build_at_once_all_end_with_a_good_one(tmp_path: Path, otherwise: str) -> None:
    cache = tmp_path / "cache"
    settings = {"XDG_CACHE_HOME": str(cache), "SLOW": "0.2", "OTHERWISE": otherwise}
    builders = [python("print(found())\nprint(found().exists())", tmp_path, **settings) for _ in range(4)]
    found = [process.communicate(timeout=60)[0].split() for process in builders]
    assert all(process.returncode == 0 for process in builders) and all(existing == "True" for _, existing in found)
    before = compiler_runs(tmp_path)
    last = python("print(found())", tmp_path, **settings)
    assert last.communicate(timeout=60)[0] and compiler_runs(tmp_path) == before


NATIVE = """
import json, sys
from pathlib import Path
from qat.quantizers import native
print(json.dumps(native.library(Path(sys.argv[1])) is not None))
"""


def test_the_training_kernel_is_compiled_once_without_a_home(tmp_path: Path) -> None:
    if native_compiler() is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "s").mkdir()
    source = tmp_path / "s" / "tiny.cpp"
    source.write_text('extern "C" int answer() { return 42; }')
    source.parent.chmod(0o777)  # so that nothing is written beside the source
    wrapper = tmp_path / "wrapper"
    wrapper.write_text(
        f'#!/bin/sh\ncase "$*" in *--version*) ;; *) echo run >>"$RUNS" ;; esac\nexec {native_compiler()} "$@"\n'
    )
    wrapper.chmod(0o755)
    code = f"""{NATIVE}
import subprocess
if len(sys.argv) == 2: subprocess.run([sys.executable, "-c", {NATIVE!r}, sys.argv[1], "child"], check=True)
"""
    command = [sys.executable, "-c", code, str(source)]
    done = subprocess.run(
        command, env=environment(tmp_path, CXX=str(wrapper)), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and [json.loads(line) for line in done.stdout.split()] == [True, True], done.stderr
    assert compiler_runs(tmp_path) == 1 and names(tmp_path / "t") == []


def native_compiler() -> str | None:
    command = cpp.compiler()
    return None if command is None else " ".join(command)
