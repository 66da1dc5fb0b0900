"""The stream that artifacts are written through."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest

from safegene_converter.fold import stream


def test_a_file_is_whole_although_its_disk_was_too_busy_to_begin_a_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "SYNC_BYTES", 4)
    free = threading.Event()
    with stream.OutputStream(tmp_path / "file") as out:
        out._disk.submit(free.wait, 10)
        out.write(b"12345678")  # its sync waits behind what keeps the disk busy
        threading.Timer(0.1, free.set).start()
    assert (tmp_path / "file").read_bytes() == b"12345678"
    assert out.sha256 == hashlib.sha256(b"12345678").hexdigest()
