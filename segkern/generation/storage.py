# SPDX-License-Identifier: Apache-2.0
"""Files and folders on this machine or in an object store.

A location with ``://``, such as ``s3://bucket/prompts.jsonl``, is a URL for fsspec. Some URLs need another package,
such as ``s3fs``.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

FAILURES = "failures.jsonl"
CLAIMS = ".claims-"  # prefix of a folder with the claims of several processes
_PARTIAL_FILE = re.compile(r"\.(\d{5,}-seed-\d+|shards?(-\d+)?)\.\d+\.(png|json|jsonl|tar)")
_UPLOAD_SECONDS = 30.0  # between uploads of the list of failures


def is_url(location: str) -> bool:
    """Return True if the location is a URL."""
    return "://" in location


@contextmanager
def storage_errors(location: str) -> Iterator[None]:
    """Raise an OSError in place of any other exception. The exceptions of storage packages have no common class."""
    try:
        yield
    except OSError:
        raise
    except ImportError as error:  # fsspec names the package to install
        raise OSError(str(error)) from error
    except Exception as error:
        raise OSError(f"{location}: {type(error).__name__}: {error}") from error


def open_file(location: str) -> IO[bytes]:
    """Open a file to read bytes.

    Raises:
        OSError: If the file cannot be opened.
    """
    if not is_url(location):
        return Path(location).expanduser().open("rb")
    import fsspec

    with storage_errors(location):
        file: IO[bytes] = fsspec.open(location, "rb").open()
    return file


class Folder(Protocol):
    """A folder of images. A file is either complete or does not exist."""

    def prepare(self) -> None:
        """Check that files can be written, and remove what interrupted runs left.

        Raises:
            ValueError: If files cannot be written.
        """

    def place(self, name: str) -> str:
        """Return the location of a file for messages."""

    def start_of(self, name: str, size: int) -> bytes | None:
        """Return the first bytes of a file, or None if it does not exist."""

    def ends_with(self, name: str, ending: bytes) -> bool:
        """Return False if an existing file is cut off, which only a failure of a file system can cause."""

    def read(self, name: str) -> bytes | None:
        """Return the content of a file, or None if it does not exist."""

    def write(self, name: str, content: bytes) -> None:
        """Write a file."""

    def download(self, name: str, target: Path) -> None:
        """Copy a file to a local path."""

    def upload(self, source: Path, name: str) -> None:
        """Copy a local file."""

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""

    def add_failure(self, line: str) -> None:
        """Append a line to the list of failures."""

    def close(self) -> None:
        """Finish writing the list of failures."""


def open_folder(location: str) -> Folder:
    """Return the folder at a path or URL. Nothing is created.

    Raises:
        ValueError: If the URL is not supported.
    """
    if not is_url(location):
        return LocalFolder(Path(location).expanduser())
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    try:
        filesystem, path = fsspec.core.url_to_fs(location)
    except (ImportError, ValueError) as error:  # a missing package or an unknown protocol
        raise ValueError(f"cannot use --out {location!r}: {error}") from None
    return LocalFolder(Path(path)) if isinstance(filesystem, LocalFileSystem) else UrlFolder(location, filesystem, path)


class LocalFolder:
    """A folder on this machine or a shared file system."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def prepare(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"--out must be a folder with --prompts, but {str(self.path)!r} is a file")
        if not self.path.parent.is_dir():
            raise ValueError(f"--out {str(self.path)!r} is in a folder that does not exist")
        self.path.mkdir(exist_ok=True)
        if not os.access(self.path, os.W_OK):
            raise ValueError(f"no permission to write to --out {str(self.path)!r}")
        with os.scandir(self.path) as entries:
            for entry in entries:
                if entry.name == FAILURES or (_PARTIAL_FILE.fullmatch(entry.name) and entry.is_file()):
                    os.unlink(entry)
                elif entry.name.startswith(CLAIMS) and entry.is_dir():
                    shutil.rmtree(entry)

    def place(self, name: str) -> str:
        return str(self.path / name)

    def start_of(self, name: str, size: int) -> bytes | None:
        try:
            with (self.path / name).open("rb") as file:
                return file.read(size)
        except FileNotFoundError:
            return None

    def ends_with(self, name: str, ending: bytes) -> bool:
        with (self.path / name).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - len(ending)))
            return file.read() == ending

    def read(self, name: str) -> bytes | None:
        return self.start_of(name, -1)

    def write(self, name: str, content: bytes) -> None:
        with self._partial(name) as path:
            path.write_bytes(content)

    def download(self, name: str, target: Path) -> None:
        shutil.copyfile(self.path / name, target)

    def upload(self, source: Path, name: str) -> None:
        with self._partial(name) as path:
            shutil.copyfile(source, path)

    def remove(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def add_failure(self, line: str) -> None:
        # One write to a file opened for appending is not mixed with those of other processes.
        descriptor = os.open(self.path / FAILURES, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def close(self) -> None:
        pass

    @contextmanager
    def _partial(self, name: str) -> Iterator[Path]:
        """Yield a temporary path whose file gets its final name on success and is deleted on failure."""
        stem, suffix = os.path.splitext(name)
        # Processes of several machines can write the same file, so a process id would not be unique.
        partial = self.path / f".{stem}.{secrets.randbelow(10**12)}{suffix}"
        try:
            yield partial
            os.replace(partial, self.path / name)
        finally:
            partial.unlink(missing_ok=True)


class UrlFolder:
    """A folder in an object store, which makes an object visible only when it is complete.

    An object store cannot append, so the list of failures is written to a temporary file and uploaded now and then.
    """

    def __init__(self, url: str, filesystem: Any, path: str) -> None:
        self._url = url.rstrip("/")
        self._filesystem = filesystem
        self._path = path.rstrip("/")
        self._failures: IO[bytes] | None = None
        self._uploaded = 0.0

    def prepare(self) -> None:
        try:
            self.write(FAILURES, b"")
            self.remove(FAILURES)
        except OSError as error:
            raise ValueError(f"cannot write to --out {self._url!r}: {error}") from None

    def place(self, name: str) -> str:
        return f"{self._url}/{name}"

    def start_of(self, name: str, size: int) -> bytes | None:
        return self._read(name, start=0, end=size)

    def ends_with(self, name: str, ending: bytes) -> bool:
        return True

    def read(self, name: str) -> bytes | None:
        return self._read(name)

    def write(self, name: str, content: bytes) -> None:
        with storage_errors(self.place(name)):
            self._filesystem.pipe_file(f"{self._path}/{name}", content)

    def download(self, name: str, target: Path) -> None:
        with storage_errors(self.place(name)):
            self._filesystem.get_file(f"{self._path}/{name}", str(target))

    def upload(self, source: Path, name: str) -> None:
        with storage_errors(self.place(name)):
            self._filesystem.put_file(str(source), f"{self._path}/{name}")

    def remove(self, name: str) -> None:
        with storage_errors(self.place(name)):
            if self._filesystem.exists(f"{self._path}/{name}"):
                self._filesystem.rm_file(f"{self._path}/{name}")

    def add_failure(self, line: str) -> None:
        if self._failures is None:
            self._failures = tempfile.NamedTemporaryFile()  # noqa: SIM115
        self._failures.write(line.encode())
        if time.monotonic() - self._uploaded > _UPLOAD_SECONDS:
            self._upload_failures()

    def close(self) -> None:
        if self._failures is not None:
            with self._failures:
                self._upload_failures()
            self._failures = None

    def _upload_failures(self) -> None:
        assert self._failures is not None
        self._failures.flush()
        self.upload(Path(self._failures.name), FAILURES)
        self._uploaded = time.monotonic()

    def _read(self, name: str, **bounds: int) -> bytes | None:
        try:
            with storage_errors(self.place(name)):
                content: bytes = self._filesystem.cat_file(f"{self._path}/{name}", **bounds)
                return content
        except FileNotFoundError:
            return None
