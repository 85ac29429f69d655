"""A hub on this machine with the data set e9t/nsmc as it lies on the real one: a script on the main branch, and on
refs/convert/parquet the files that the hub has made of it. Answers what the clients of `datasets` ask for."""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from threading import Thread
from urllib.parse import parse_qs, unquote, urlparse

import pyarrow
import pyarrow.parquet

REPOSITORY, BRANCH = "e9t/nsmc", "refs/convert/parquet"
COMMITS = {"main": "a" * 40, BRANCH: "b" * 40}


def parquet(documents: list[str]) -> bytes:
    """Reviews in the columns of NSMC."""
    file = io.BytesIO()
    rows = [{"id": str(k), "document": text, "label": k % 2} for k, text in enumerate(documents)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


FILES = {
    COMMITS["main"]: {"README.md": b"---\n---\n# NSMC\n", "nsmc.py": b"raise SystemExit('the script ran')\n"},
    COMMITS[BRANCH]: {
        "default/train/0000.parquet": parquet(["나쁘다", "좋다", "별로다"]),
        "default/test/0000.parquet": parquet(["지루하다", "재미있다"]),
    },
}


def folders_and(files: dict[str, bytes]) -> list[str]:
    """Files and the folders that they lie in."""
    folders = {str(folder) for path in files for folder in PurePosixPath(path).parents} - {"."}
    return sorted({*files, *folders})


class Hub(BaseHTTPRequestHandler):
    """Files and listings of the two branches."""

    def log_message(self, *told: object) -> None:
        """Say nothing."""

    def answer(self, code: int, body: bytes = b"{}", **headers: str) -> None:
        """Send."""
        self.send_response(code)
        for name, value in (headers | {"Content_Length": str(len(body))}).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        """Any request."""
        path, asked = unquote(urlparse(self.path).path), self.rfile.read(int(self.headers.get("Content-Length") or 0))
        kind, _, place = path.removeprefix("/api").removeprefix(f"/datasets/{REPOSITORY}/").partition("/")
        revision = BRANCH if place.startswith(BRANCH) else place.split("/")[0]
        commit, name = COMMITS.get(revision, revision), place.removeprefix(revision).strip("/")
        files = FILES.get(commit, {})
        if kind == "resolve":
            self.file(files.get(name), commit)
        elif kind == "tree":
            inside = [path for path in folders_and(files) if path.startswith(f"{name}/" if name else "")]
            deep = "recursive=true" in self.path.lower()
            self.listing([p for p in inside if deep or "/" not in p.removeprefix(name).strip("/")], files)
        elif kind != "paths-info":
            known = json.dumps({"id": REPOSITORY, "sha": commit if kind == "revision" else COMMITS["main"]})
            self.answer(200, known.encode())
        else:
            self.listing(
                [path for path in parse_qs(asked.decode()).get("paths", []) if path in folders_and(files)], files
            )

    do_HEAD = do_POST = do_GET

    def file(self, content: bytes | None, commit: str) -> None:
        """A file, or the part of it that was asked for."""
        if content is None:
            self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return
        headers = {"ETag": f'"{sha1(content).hexdigest()}"', "X_Repo_Commit": commit}
        first, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        if first:
            part = content[int(first) : int(last) + 1 if last else None]
            self.answer(
                206, part, Content_Range=f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}", **headers
            )
        else:
            self.answer(200, content, **headers)

    def listing(self, paths: list[str], files: dict[str, bytes]) -> None:
        """What the API says of files."""
        found = [
            {"type": "file", "path": path, "size": len(files[path]), "oid": sha1(files[path]).hexdigest()}
            if path in files
            else {"type": "directory", "path": path, "oid": "0"}
            for path in paths
        ]
        self.answer(200, json.dumps(found).encode(), Content_Type="application/json")


@contextmanager
def hub() -> Iterator[str]:
    """The address of a hub."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
