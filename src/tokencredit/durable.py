"""Files that survive a kill: whole files replaced atomically, and JSON lines appended whole.

A file is replaced by writing a temporary file beside it, fsync, and a rename: a reader sees the old version or the new
one. A line is one write of the whole line; a last line without its newline was torn by a kill and was never written,
for the reader and for the next append alike. When a write fails (disk full, quota), the error names the file and the
previous version is intact. Numbers that are not finite are stored as null, so that every file is strict JSON.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

fcntl: Any
try:
    import fcntl
except ImportError:  # no POSIX locks (Windows)
    fcntl = None

FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


class DamagedFile(ValueError):
    """A file that holds something other than what was written to it."""


class WriteFailure(OSError):
    """A file that could not be written; what was there before is intact."""


def plain(value: Any, *, finite: bool = True) -> Any:
    """The value as JSON types: tensors and arrays as lists, paths as text and, when `finite`, NaN and infinities as
    None.
    """
    if isinstance(value, float):
        return value if not finite or math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item, finite=finite) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(plain(item, finite=finite) for item in value)
    if isinstance(value, list | tuple):
        return [plain(item, finite=finite) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist(), finite=finite)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(
        f"{type(value).__name__} is not a number, text, list or mapping, so it cannot be recorded: {value!r:.80}"
    )


def _failure(error: OSError, path: Path) -> WriteFailure:
    reason = os.strerror(error.errno) if error.errno else str(error)
    remedy = "Make room" if error.errno in FULL else "Mend that"
    return WriteFailure(
        error.errno, f"{reason}; what was there before is intact. {remedy}, then run it again", str(path)
    )


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a whole file, or leave the previous version as it was. `write` gets an open binary file."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        raise _failure(error, path) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def clear_unfinished(folder: Path) -> None:
    """Removes what a kill left of files that were being written in a folder, which nobody else is writing into now."""
    for leftover in folder.rglob(".*.tmp"):
        leftover.unlink(missing_ok=True)


def digest_of(files: Sequence[Path]) -> str:
    """32 hex digits of what stands in files, byte by byte, one after the other."""
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Put a file on the disk, or the names in a directory, where directories can be synced (not on Windows)."""
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write strict, readable JSON atomically."""
    text = json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    # A lone surrogate, which a tokenizer may produce, has no UTF-8 form.
    replace_file(Path(path), lambda file: file.write(text.encode("utf-8", "backslashreplace")))


def write_parquet(path: Path, table: Any) -> None:
    """Write a Parquet file atomically: an Arrow table, or rows as mappings of one kind."""
    import pyarrow
    import pyarrow.parquet

    table = table if isinstance(table, pyarrow.Table) else pyarrow.Table.from_pylist(list(table))
    replace_file(path, lambda file: pyarrow.parquet.write_table(table, file, compression="zstd"))


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a UTF-8 file, a byte-order mark apart. DamagedFile names the file and what it holds instead."""
    raw = Path(path).read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DamagedFile(f"{path} is {not_utf8(raw, error)}") from error


def not_utf8(raw: bytes, error: UnicodeDecodeError) -> str:
    """What is wrong with bytes that should be UTF-8."""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return f"UTF-16 text (it begins with the bytes {raw[:2].hex(' ')}): save it as UTF-8"
    return f"not UTF-8 text (byte {raw[error.start]:02x} at offset {error.start:,}): save it as UTF-8"


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read JSON; the error names the file."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DamagedFile(f"{path} is not JSON ({error}).") from error


def read_mapping(path: str | os.PathLike[str], *fields: str) -> dict[str, Any]:
    """A JSON object that has these fields. DamagedFile names the file, and what it holds instead."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise DamagedFile(
            f"{path} holds a JSON {type(found).__name__} where an object is needed: restore it, or use another"
            " directory."
        )
    if absent := [field for field in fields if field not in found]:
        raise DamagedFile(
            f"{path} has no {', '.join(absent)}; it has {', '.join(found) or 'nothing'}: restore it, or use another"
            " directory."
        )
    return found


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one record as one whole line, after those of other processes that do so too; on failure the file is cut
    back to what it was.
    """
    line = (json.dumps(plain(record), allow_nan=False) + "\n").encode()
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX)  # until it is closed
            start = _end_of_whole_lines(descriptor)
            os.ftruncate(descriptor, start)
            os.lseek(descriptor, start, os.SEEK_SET)
            try:
                if os.write(descriptor, line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, start)
                raise
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _failure(error, path) from error


def _end_of_whole_lines(descriptor: int) -> int:
    """The offset just after the last newline: past it there is at most one torn line."""
    end = os.lseek(descriptor, 0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 65536)
        os.lseek(descriptor, start, os.SEEK_SET)
        block = os.read(descriptor, end - start)
        if (newline := block.rfind(b"\n")) >= 0:
            return start + newline + 1
        end = start
    return 0


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file; a torn last line was never written. No file is no records."""
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DamagedFile(
                f"{path}, line {number} is not JSON ({error}): the file was edited or damaged; remove that line."
            ) from error
        if not isinstance(record, dict):
            raise DamagedFile(
                f"{path}, line {number} is a JSON {type(record).__name__} where an object is needed: the file was"
                " edited or damaged; remove that line."
            )
        records.append(record)
    return records


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a Parquet file. DamagedFile names a file that is none, or a broken one."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            rows: list[dict[str, Any]] = file.read().to_pylist()
            return rows
    except (arrow.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise DamagedFile(f"{path} is not a whole Parquet file ({reason}): restore or remove it") from error
