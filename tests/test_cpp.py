"""C++ sources are compiled once and kept; without a compiler there is none, and no noise."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from rankwise import cpp

needs_compiler = pytest.mark.skipif(
    cpp._compiler() is None or torch.backends.cpu.get_cpu_capability() not in cpp.FLAGS,
    reason="no compiler is at hand",
)

SOURCE = 'extern "C" int seven() { return 7; }\n'


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("RANKWISE_CPP", raising=False)
    cpp._load.cache_clear()
    return tmp_path


def compiler(place: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    """A source, and `script` in the compiler's place."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    stand_in, source = place / "stand-in", place / "seven.cpp"
    stand_in.write_text(f"#!/bin/sh\n{script}\n")
    stand_in.chmod(0o755)
    monkeypatch.setenv("CXX", str(stand_in))
    source.write_text(SOURCE)
    return source


@needs_compiler
def test_compiled_once_and_kept(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = place / "seven.cpp"
    source.write_text(SOURCE)
    library = cpp.load(source)
    assert library is not None
    assert library.seven() == 7
    assert [p.suffix for p in (place / "cache" / "rankwise").iterdir()] == [".so"]
    cpp._load.cache_clear()  # as another process
    monkeypatch.setattr(cpp, "_compiler", lambda: None)
    assert cpp.load(source) is not None
    monkeypatch.setenv("RANKWISE_CPP", "0")
    assert cpp.load(source) is None
    monkeypatch.delenv("RANKWISE_CPP")
    source.write_text(SOURCE.replace("7", "8"))
    cpp._load.cache_clear()
    assert cpp.load(source) is None  # not what was compiled


@needs_compiler
def test_a_compiler_without_openmp(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = place / "seven.cpp"
    source.write_text(SOURCE.replace("return 7", "\n#ifdef _OPENMP\nreturn 8;\n#endif\nreturn 7"))
    usual = cpp.load(source)
    assert usual is not None
    assert usual.seven() == 8
    cpp._load.cache_clear()
    without = place / "without"
    without.write_text(f"""#!/bin/sh
case "$*" in *-fopenmp*) echo no OpenMP >&2; exit 1;; esac
exec {" ".join(cpp._compiler() or [])} "$@"
""")
    without.chmod(0o755)
    monkeypatch.setenv("CXX", str(without))
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "another"))
    library = cpp.load(source)
    assert library is not None
    assert library.seven() == 7


@needs_compiler
@pytest.mark.parametrize("part", [0, 100, 5000, -1])
def test_what_was_kept_but_not_whole_is_compiled_again(place: Path, part: int) -> None:
    source = place / "seven.cpp"
    source.write_text(SOURCE)
    assert cpp.load(source) is not None
    (kept,) = (place / "cache" / "rankwise").iterdir()
    whole = kept.read_bytes()
    kept.unlink()  # the library that is loaded stays as it is
    kept.write_bytes(whole[:part])
    cpp._load.cache_clear()
    library = cpp.load(source)
    assert library is not None
    assert library.seven() == 7
    assert kept.read_bytes()[:4] == b"\x7fELF"
    assert len(kept.read_bytes()) == len(whole)
    assert [kept] == list(kept.parent.iterdir())


@needs_compiler
def test_what_was_kept_of_another_system_is_compiled_again(place: Path) -> None:
    source = place / "seven.cpp"
    source.write_text(SOURCE)
    assert cpp.load(source) is not None
    (kept,) = (place / "cache" / "rankwise").iterdir()
    content = bytearray(kept.read_bytes()[:-32])
    content[18] ^= 255  # the machine in ELF's header
    kept.unlink()
    kept.write_bytes(content + cpp._sum(bytes(content)))
    cpp._load.cache_clear()
    assert cpp.load(source) is not None
    assert [kept] == list(kept.parent.iterdir())


@needs_compiler
@pytest.mark.parametrize("words", ["{wrapper} {real} -g", "{wrapper}"])
def test_a_compiler_of_several_words(
    place: Path, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (real,) = cpp._compiler() or []
    wrapper = place / ("a wrapper" if words == "{wrapper}" else "wrapper")
    wrapper.write_text(f'#!/bin/sh\ncase $1 in /*) ;; *) set -- {real} "$@";; esac\nexec "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", words.format(wrapper=wrapper, real=real))
    source = place / "seven.cpp"
    source.write_text(SOURCE)
    assert cpp.load(source) is not None


def test_a_compiler_that_takes_too_long(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpp, "PATIENCE", 0.5)
    calls = place / "calls"
    source = compiler(place, monkeypatch, f"echo called >> '{calls}'\nexec sleep 30")
    assert cpp.load(source) is None
    assert calls.read_text() == "called\n"  # once: it would take as long without OpenMP
    assert "timed out after 0.5 seconds" in caplog.text


def test_a_compiler_that_speaks_another_encoding(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = compiler(place, monkeypatch, "printf 'it will \\377not do\\n' >&2\nexit 1")
    assert cpp.load(source) is None
    assert "not do" in caplog.text


@needs_compiler
def test_a_home_that_cannot_be_written(place: Path) -> None:
    (place / "cache").write_text("a file where a directory is wanted")
    source = place / "seven.cpp"
    source.write_text(SOURCE)
    assert cpp.load(source) is not None


def test_absent_and_failing_compilers(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = compiler(place, monkeypatch, "echo it will not do >&2\nexit 1")
    failing = os.environ["CXX"]
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert cpp.load(source) is None
    assert not caplog.records  # silently
    monkeypatch.setenv("CXX", failing)
    for _ in range(2):
        cpp.load(source)
    assert not caplog.records  # looked for once
    cpp._load.cache_clear()
    for _ in range(2):
        assert cpp.load(source) is None
    (record,) = caplog.records
    assert "seven.cpp could not be compiled" in record.message
    assert "it will not do" in record.message
    assert "RANKWISE_CPP=0" in record.message
