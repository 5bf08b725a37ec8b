"""Which model a folder holds: a hash of every byte of its weights and tokenizer, by many threads where it is large.

    fingerprint_folder(Path("pairs/mine/source"))     # 16 hexadecimal digits

A large folder's fingerprint is remembered by path, size, time of change and inode of its files, in
`~/.cache/bridgekit/fingerprints.json` (XDG_CACHE_HOME); a file that cannot be read there is as good as none.
"""

import contextlib
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bridgekit.runs import write_text_atomic

LARGE = 1 << 30  # bytes; kept runs are matched by the value of smaller folders, so it may not change
CHUNK = 1 << 26


def fingerprint_folder(folder: Path) -> str:
    """Hash of weights and tokenizer."""
    files = [p for pattern in ("*.safetensors", "tokenizer*", "config.json") for p in sorted(folder.glob(pattern))]
    if sum(path.stat().st_size for path in files) > LARGE:
        return remember(folder, files)
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode())
        with path.open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)
    return digest.hexdigest()[:16]


def remember(folder: Path, files: list[Path]) -> str:
    """A large folder's fingerprint: the remembered one while none of its files has changed."""
    facts = [(str(path.resolve()), path.stat()) for path in files]
    state = [[name, stat.st_size, stat.st_mtime_ns, stat.st_ino] for name, stat in facts]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bridgekit" / "fingerprints.json"
    known, place = {}, str(folder.resolve())
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        known = dict(json.loads(home.read_text()))
        if known[place]["files"] == state:
            return str(known[place]["fingerprint"])
    fingerprint = hash_in_parallel(files)
    with contextlib.suppress(OSError):
        home.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(home, json.dumps(known | {place: {"files": state, "fingerprint": fingerprint}}))
    return fingerprint


def hash_in_parallel(files: list[Path]) -> str:
    """A hash of names, sizes and the hashes of all chunks, which threads compute: hashlib lets the others run."""
    chunks = [(path, start) for path in files for start in range(0, path.stat().st_size, CHUNK)]
    digest = hashlib.sha256(json.dumps([(path.name, path.stat().st_size) for path in files]).encode())
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for part in pool.map(hash_chunk, chunks):
            digest.update(part)
    return digest.hexdigest()[:16]


def hash_chunk(chunk: tuple[Path, int]) -> bytes:
    path, start = chunk
    with path.open("rb") as stream:
        stream.seek(start)
        return hashlib.sha256(stream.read(CHUNK)).digest()
