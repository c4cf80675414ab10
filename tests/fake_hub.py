"""A local stand-in for the Hub's HTTP API, for the Hub's own client: repositories with branches and commits, and LFS objects.

It speaks what `huggingface_hub` sends for `create_repo`, `create_branch`, `create_commit` and `snapshot_download`. `requests`
lists what came, `before_put` is called with the number of each LFS object that arrives and may raise ConnectionResetError.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

WEIGHTS = (".safetensors", ".png")  # sent as LFS objects
TOKEN = "hf_of_someone"


class FakeHub(ThreadingHTTPServer):
    """Repository -> {"private", "branches": {branch: [files of each commit]}}, a commit's files being path -> content."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories: dict[str, dict] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.before_put: Callable[[int], None] = lambda number: None
        self.puts = 0
        self.thread = threading.Thread(target=self.serve_forever, daemon=True)

    def __enter__(self) -> "FakeHub":
        self.thread.start()
        return self

    def __exit__(self, *error) -> None:
        self.shutdown()
        self.server_close()
        self.thread.join()

    def handle_error(self, request, client_address) -> None:
        """Connections that break off are what some tests are of."""

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        """What a branch holds; {} before its first commit."""
        commits = self.repositories[repo]["branches"].get(branch, [])
        return commits[-1] if commits else {}


class Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *words) -> None:
        pass

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def _answer(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{method} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) if method != "PUT" else b""
        for verb, pattern, answer in ROUTES:
            if method in verb.split() and (found := re.fullmatch(pattern, path)):
                try:
                    return answer(self, body, *found.groups())
                except KeyError:
                    return self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        return self._send(404, {"error": f"no route for {method} {path}"})

    def _send(self, status: int, content: dict | bytes, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), "X-Request-Id": "1", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    @property
    def _may_write(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    # ------------------------------------------------------------------------------------------ writing

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo = f"{asked.get('organization') or 'someone'}/{asked['name']}"
        if not self._may_write:
            return self._send(401, {"error": "Invalid username or password."})
        if repo in self.server.repositories:
            return self._send(409, {"error": "You already created this model repo", "url": f"{self.server.url}/{repo}"})
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.server.repositories[repo] = {"private": private, "branches": {"main": [{}]}}
        return self._send(200, {"url": f"{self.server.url}/{repo}", "name": repo, "id": repo})

    def _branch(self, body: bytes, repo: str, branch: str) -> None:
        branches = self.server.repositories[repo]["branches"]
        if branch in branches:
            return self._send(409, {"error": "Reference already exists"})
        branches[branch] = list(branches["main"])
        return self._send(201, {})

    def _check_card(self, body: bytes) -> None:
        self._send(200, {"errors": [], "warnings": []})

    def _preupload(self, body: bytes, repo: str, revision: str) -> None:
        modes = [
            {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(WEIGHTS) else "regular", "shouldIgnore": False}
            for f in json.loads(body)["files"]
        ]
        self._send(200, {"files": modes})

    def _batch(self, body: bytes, repo: str) -> None:
        objects = []
        for entry in json.loads(body)["objects"]:
            known = entry["oid"] in self.server.objects
            upload = {"upload": {"href": f"{self.server.url}/lfs/{entry['oid']}", "header": {}}}
            objects.append(entry if known else entry | {"actions": upload})
        self._send(200, {"transfer": "basic", "objects": objects})

    def _put(self, body: bytes, oid: str) -> None:
        self.server.puts += 1
        try:
            self.server.before_put(self.server.puts)
            data = self.rfile.read(int(self.headers["Content-Length"]))
        except ConnectionResetError:
            self.close_connection = True
            self.connection.close()
            return
        assert hashlib.sha256(data).hexdigest() == oid
        self.server.objects[oid] = data
        self._send(200, b"", {"ETag": oid})

    def _commit(self, body: bytes, repo: str, revision: str) -> None:
        commits = self.server.repositories[repo]["branches"][revision]
        files = dict(commits[-1])
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if entry["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        commits.append(files)
        oid = _sha(repo, revision, len(commits))
        self._send(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{repo}/commit/{oid}"})

    # ------------------------------------------------------------------------------------------ reading

    def _info(self, body: bytes, repo: str, revision: str) -> None:
        files = self._at(repo, revision)
        sha = _sha(repo, *self._where(repo, revision))
        siblings = [{"rfilename": name} for name in files]
        self._send(200, {"id": repo, "modelId": repo, "sha": sha, "siblings": siblings, "tags": [], "private": False})

    def _tree(self, body: bytes, repo: str, revision: str) -> None:
        files = self._at(repo, revision)
        entries = [{"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for n, c in files.items()]
        self._send(200, json.dumps(entries).encode())

    def _resolve(self, body: bytes, repo: str, revision: str, name: str) -> None:
        files = self._at(repo, revision)
        if name not in files:
            return self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        commit = _sha(repo, *self._where(repo, revision))
        return self._send(200, files[name], {"ETag": hashlib.sha256(files[name]).hexdigest(), "X-Repo-Commit": commit})

    def _where(self, repo: str, revision: str) -> tuple[str, int]:
        """The branch and the number of commits that a revision (a branch or a commit's id) means."""
        branches = self.server.repositories[repo]["branches"]
        if revision in branches:
            return revision, len(branches[revision])
        places = ((b, n) for b, commits in branches.items() for n in range(1, len(commits) + 1))
        return next((place for place in places if _sha(repo, *place) == revision), (revision, 0))

    def _at(self, repo: str, revision: str) -> dict[str, bytes]:
        branch, count = self._where(repo, revision)
        return self.server.repositories[repo]["branches"][branch][count - 1]


def _sha(repo: str, branch: str, count: int) -> str:
    return hashlib.sha1(f"{repo} {branch} {count}".encode()).hexdigest()


REPO, BELOW = r"([\w.-]+/[\w.-]+)", r"([\w.-]+)"
ROUTES = [
    ("POST", "/api/repos/create", Handler._create),
    ("POST", "/api/validate-yaml", Handler._check_card),
    ("POST", f"/api/models/{REPO}/branch/{BELOW}", Handler._branch),
    ("POST", f"/api/models/{REPO}/preupload/{BELOW}", Handler._preupload),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Handler._batch),
    ("PUT", r"/lfs/(\w+)", Handler._put),
    ("POST", f"/api/models/{REPO}/commit/{BELOW}", Handler._commit),
    ("GET", f"/api/models/{REPO}/revision/{BELOW}", Handler._info),
    ("GET", f"/api/models/{REPO}/tree/{BELOW}", Handler._tree),
    ("GET HEAD", f"/{REPO}/resolve/{BELOW}/(.+)", Handler._resolve),
]
