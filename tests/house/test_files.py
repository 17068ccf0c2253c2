"""Files are whole or not there: with writers side by side, killed writers, links, and rights of every kind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from canvas_engineering import (
    CanvasLayout,
    CanvasProgram,
    CanvasSchema,
    ProgramCompiler,
    RegionProgram,
    load_exported,
    save_loop_checkpoint,
)
from canvas_engineering.files import alone_in, replace_file, replacing

posix = pytest.mark.skipif(os.name != "posix", reason="rights, links and locks of POSIX")
PARALLEL = multiprocessing.get_context("fork") if os.name == "posix" else None


def schema(T: int = 1) -> CanvasSchema:
    return CanvasSchema(CanvasLayout(T=T, spatial_shape=(2,), d_model=8, regions={"a": (0, 1, 0, 1)}))


def program() -> CanvasProgram:
    return CanvasProgram(schema(), {"a": RegionProgram(compile_mode="export")})


WRITERS = {
    "schema.json": lambda path: schema().to_json(path),
    "program.json": lambda path: program().to_json(path),
    "loops.pt": lambda path: save_loop_checkpoint([], nn.Linear(2, 2), path),
    "loops.safetensors": lambda path: save_loop_checkpoint([], nn.Linear(2, 2), path),
}


def in_a_process(function, *arguments) -> int:
    """Exit code of a process of its own that calls the function."""
    process = PARALLEL.Process(target=function, args=arguments)
    process.start()
    process.join()
    return process.exitcode


@posix
@pytest.mark.parametrize("name", WRITERS)
def test_an_existing_file_keeps_its_rights_and_a_link_stays(tmp_path, name):
    if name.endswith(".safetensors"):
        pytest.importorskip("safetensors", reason="writes a safetensors file")
    path, link = tmp_path / "real" / name, tmp_path / name
    path.parent.mkdir()
    WRITERS[name](path)
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
    link.symlink_to(path)
    for mode in (0o600, 0o640, 0o444):
        path.chmod(mode)
        before = path.stat()
        WRITERS[name](link)
        assert link.is_symlink() and link.resolve() == path
        assert stat.S_IMODE(path.stat().st_mode) == mode and path.stat().st_ino != before.st_ino
        assert path.stat().st_mtime_ns >= before.st_mtime_ns
    assert os.listdir(path.parent) == [name]


@posix
def test_a_link_to_nothing_yet_stays_a_link(tmp_path):
    (tmp_path / "latest").symlink_to(tmp_path / "first")
    replace_file(tmp_path / "latest", b"1")
    assert (tmp_path / "latest").is_symlink() and (tmp_path / "first").read_bytes() == b"1"
    (tmp_path / "round").symlink_to(tmp_path / "round")
    with pytest.raises(OSError, match="symbolic links"):
        replace_file(tmp_path / "round", b"1")
    assert (tmp_path / "round").is_symlink()


@posix
def test_devices_and_pipes_are_written_to_and_never_replaced(tmp_path):
    replace_file(os.devnull, b"1")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    os.mkfifo(tmp_path / "pipe")
    found = []
    reader = threading.Thread(target=lambda: found.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    replace_file(tmp_path / "pipe", b"through the pipe")
    reader.join()
    assert found == [b"through the pipe"] and stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)
    with pytest.raises(IsADirectoryError):
        replace_file(tmp_path, b"1")


@pytest.mark.parametrize("path", [None, True, 1, "", b"bytes", ["a"]])
def test_what_is_no_path_is_refused(path):
    for write in (
        lambda: replace_file(path, b"1"),
        lambda: schema().to_json(path),
        lambda: CanvasSchema.from_json(path),
    ):
        with pytest.raises(ValueError, match="path must be a path, got"):
            write()


@pytest.mark.parametrize("name", WRITERS)
def test_no_writer_touches_the_umask(tmp_path, monkeypatch, name):
    if name.endswith(".safetensors"):
        pytest.importorskip("safetensors", reason="writes a safetensors file")

    def refuse(mask):
        raise AssertionError("the umask belongs to the whole process")

    monkeypatch.setattr(os, "umask", refuse)
    WRITERS[name](tmp_path / name)
    WRITERS[name](tmp_path / name)
    assert os.listdir(tmp_path) == [name]


@posix
def test_new_files_go_by_the_umask(tmp_path):
    code = (
        "import os, sys\nfrom canvas_engineering.files import replace_file\n"
        "for mask in (0o077, 0o027, 0o000):\n"
        "    os.umask(mask)\n"
        "    replace_file(f'{sys.argv[1]}/{mask}', b'1')\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env={**os.environ, **python_path()})
    modes = {int(path.name): stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {mask: 0o666 & ~mask for mask in (0o077, 0o027, 0o000)}


def python_path() -> dict[str, str]:
    root = Path(__file__).resolve().parents[2]
    return {"PYTHONPATH": f"{root}:{root / 'kernels'}"}


@posix
def test_a_private_file_is_private_while_it_is_written(tmp_path):
    path = tmp_path / "secret"
    path.write_bytes(b"1")
    path.chmod(0o600)
    with replacing(path) as file:
        file.write(b"2")
        (unfinished,) = set(tmp_path.iterdir()) - {path}
        assert stat.S_IMODE(unfinished.stat().st_mode) == 0o600 and path.read_bytes() == b"1"
    assert path.read_bytes() == b"2" and stat.S_IMODE(path.stat().st_mode) == 0o600


def test_an_error_leaves_the_file_as_it_was(tmp_path):
    replace_file(tmp_path / "file", b"whole")
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "file") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert (tmp_path / "file").read_bytes() == b"whole" and os.listdir(tmp_path) == ["file"]
    with pytest.raises(FileNotFoundError):
        replace_file(tmp_path / "none" / "file", b"1")


def killed_amid(path: Path) -> None:
    with replacing(path) as file:
        file.write(b"half")
        os.kill(os.getpid(), signal.SIGKILL)


@posix
def test_what_a_killed_writer_left_is_swept_and_what_a_living_one_writes_is_not(tmp_path):
    path = tmp_path / "file"
    replace_file(path, b"whole")
    foreign = tmp_path / ".file.tmp"
    foreign.touch()
    assert in_a_process(killed_amid, path) == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 3 and path.read_bytes() == b"whole"
    with replacing(path) as file:
        file.write(b"mine")
        assert len(os.listdir(tmp_path)) == 3  # its leftover is gone, ours is there
        replace_file(tmp_path / "other", b"others sweep too")
    assert path.read_bytes() == b"mine"
    assert sorted(os.listdir(tmp_path)) == [".file.tmp", "file", "other"]


@posix
def test_a_file_that_is_swept_before_it_is_locked_is_made_again_under_another_name(tmp_path, monkeypatch):
    import fcntl

    real, swept = fcntl.flock, []

    def after_a_sweep(handle, operation):
        if not swept:
            (unfinished,) = tmp_path.iterdir()
            unfinished.unlink()
            swept.append(unfinished)
        return real(handle, operation)

    monkeypatch.setattr(fcntl, "flock", after_a_sweep)
    with replacing(tmp_path / "file") as file:
        file.write(b"whole")
        # another sweeper that saw the first name may remove it as late as now
        (unfinished,) = tmp_path.iterdir()
        assert unfinished != swept[0]
    assert (tmp_path / "file").read_bytes() == b"whole" and os.listdir(tmp_path) == ["file"]


def write_often(path: Path, number: int) -> None:
    for _ in range(40):
        replace_file(path, bytes([number]) * 4096)


@posix
def test_writers_side_by_side_leave_one_whole_file(tmp_path):
    path = tmp_path / "file"
    replace_file(path, bytes(4096))
    writers = [PARALLEL.Process(target=write_often, args=(path, number)) for number in range(1, 4)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        content = path.read_bytes()
        assert len(content) == 4096 and len(set(content)) == 1
    assert [writer.exitcode for writer in writers] == [0, 0, 0] and os.listdir(tmp_path) == ["file"]


# -- exports ----------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self, value: float):
        super().__init__()
        self.a = nn.Parameter(torch.full((500,), float(value)))


def export_often(folder: Path, value: int, go) -> None:
    compiler, model = ProgramCompiler(program()), Model(value)
    go.wait()
    for _ in range(6):
        compiler.compile(model, folder)


@posix
def test_exports_side_by_side_leave_one_whole_export(tmp_path):
    pytest.importorskip("safetensors", reason="exports are safetensors files")
    go = PARALLEL.Event()
    # two of them export the same: what one removes must not be what the other has just written
    exporters = [PARALLEL.Process(target=export_often, args=(tmp_path, value, go)) for value in (1, 2, 1)]
    for exporter in exporters:
        exporter.start()
    go.set()
    loaded = 0
    while any(exporter.is_alive() for exporter in exporters):
        if (tmp_path / "a.json").exists():  # readers find a whole one at every moment
            assert load_exported(tmp_path / "a.json")["a"].unique().tolist() in ([1.0], [2.0])
            loaded += 1
    assert [exporter.exitcode for exporter in exporters] == [0, 0, 0] and loaded
    last = load_exported(tmp_path / "a.json")["a"].unique()
    assert last.tolist() in ([1.0], [2.0])
    assert len(os.listdir(tmp_path)) == 2


def killed_alone(folder: Path) -> None:
    with alone_in(folder):
        os.kill(os.getpid(), signal.SIGKILL)


@posix
def test_an_exporter_that_was_killed_keeps_nobody_out(tmp_path):
    pytest.importorskip("safetensors", reason="exports are safetensors files")
    assert in_a_process(killed_alone, tmp_path) == -signal.SIGKILL
    ProgramCompiler(program()).compile(Model(3), tmp_path)
    assert load_exported(tmp_path / "a.json")["a"].eq(3).all() and len(os.listdir(tmp_path)) == 2


# -- importing --------------------------------------------------------------------------------------------------------

IMPORTED = """
import os, sys
before = dict(os.environ)
import canvas_engineering
assert dict(os.environ) == before, {k: v for k, v in os.environ.items() if before.get(k) != v}
heavy = sorted(name for name in sys.modules if name.startswith(("torch._dynamo", "torch._inductor")))
assert not heavy, heavy[:3]
"""


@pytest.mark.parametrize("there", [True, False], ids=["a folder", "none"])
def test_importing_writes_nothing_and_needs_no_folder_for_temporary_files(tmp_path, there):
    folder = tmp_path / "tmp"
    if there:
        folder.mkdir()
    environment = {**os.environ, **python_path(), "TMPDIR": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["tmp"] * there
