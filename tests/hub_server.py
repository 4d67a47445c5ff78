"""A small Hugging Face Hub in memory, on loopback, for the real client: repositories with branches and commits.

It implements the calls that `huggingface_hub` makes to create a repository, to commit to it and to load from it, with
the answers that the Hub gives, but for large files: how these travel is the library's affair, so here all are small.
Clients need `HF_ENDPOINT` in their environment before they import the library.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from launching import environment


class Problem(Exception):
    """An answer that is no success: status, message, and the Hub's code for it."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


def blob_id(content: bytes) -> str:
    """Git's name of a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Repository:
    """Branches that name commits, which are dictionaries from path to content."""

    def __init__(self, private: bool):
        self.private = private
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}
        self.messages: list[str] = []
        self.commit("main", {}, "initial commit")

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        """Names a new state of a branch."""
        self.messages.append(message)
        name = hashlib.sha1(repr((len(self.messages), message, sorted(files))).encode()).hexdigest()
        self.commits[name], self.branches[branch] = files, name
        return name

    def resolve(self, revision: str) -> str:
        """The commit that a branch, or itself, names."""
        name = self.branches.get(revision, revision)
        if name not in self.commits:
            raise Problem(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return name

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Content by path."""
        return self.commits[self.resolve(revision)]


class HubServer(ThreadingHTTPServer):
    """
    The server; `tokens` are user and role (`write` or `read`) by token, `calls` the requests so far. `before` is
    called with each handler's name and arguments, and may raise a [`Problem`] or change a repository.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.tokens = {"hf_writer": ("user", "write"), "hf_reader": ("user", "read")}
        self.calls: list[str] = []
        self.before: Callable[[str, dict], None] = lambda name, found: None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def client_environment(self, home: Path) -> dict[str, str]:
        """Variables for a process that is to use this Hub, with its cache in `home`."""
        plain = {name: value for name, value in environment().items() if not name.startswith(("HF_", "HUGGING"))}
        client = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_TOKEN": "hf_writer", "NO_PROXY": "*"}
        # This server stores files itself; xet would ask it for the address of a storage service.
        return plain | client | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


@contextlib.contextmanager
def running_hub():
    """A server that answers within the context."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    """Finds the method for a path; what methods return is sent as JSON."""

    protocol_version = "HTTP/1.1"
    REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
    ROUTES = [
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("GET", rf"/api/models/{REPO}/auth-check(?P<write>/write)?", "auth_check"),
        ("POST", rf"/api/models/{REPO}/branch/(?P<branch>.+)", "branch"),
        ("POST", rf"/api/models/{REPO}/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", rf"/api/models/{REPO}/commit/(?P<revision>[^/]+)", "commit"),
        ("GET", rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)", "tree"),
        ("GET", rf"/api/models/{REPO}(?:/revision/(?P<revision>[^/]+))?", "model_info"),
        ("GET|HEAD", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ]

    def do_GET(self):
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.calls.append(f"{self.command} {url.path}")
        try:
            for methods, pattern, name in self.ROUTES:
                match = re.fullmatch(pattern, url.path)
                if match and self.command in methods.split("|"):
                    found = {key: unquote(value) for key, value in match.groupdict().items() if value}
                    self.server.before(name, found)
                    answer = getattr(self, name)(**found)
                    break
            else:
                raise Problem(501, f"{self.command} {url.path} is not implemented here")
        except Problem as problem:
            headers = {"X-Error-Message": problem.message}
            headers |= {"X-Error-Code": problem.code} if problem.code else {}
            errors = {"error": problem.message, "errors": [{"message": problem.message}]}
            self.send(problem.status, json.dumps(errors).encode(), headers)
        else:
            if answer is not None:
                self.send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *_):
        """Tests are silent; `calls` has it all."""

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def user(self, role: str | None = None) -> str:
        """The user of the request's token, who must have the role if one is named."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in self.server.tokens:
            raise Problem(401, "Invalid username or password.")
        name, has = self.server.tokens[token]
        if role not in (None, has):
            raise Problem(403, f"Forbidden: the token has the role {has}.")
        return name

    def repository(self, name: str) -> Repository:
        """A repository that the request may read."""
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and self.user() != name.partition("/")[0]):
            raise Problem(404, "Repository not found", "RepoNotFound")
        return repository

    def whoami(self):
        name = self.user()
        return {"type": "user", "name": name, "orgs": []}

    def create(self):
        user, asked = self.user(), json.loads(self.body)
        name = f"{asked.get('organization') or user}/{asked['name']}"
        url = {"url": f"{self.server.endpoint}/{name}", "name": name}
        if name in self.server.repositories:
            self.send(409, json.dumps(url | {"error": "You already created this model repo"}).encode(), {})
            return None
        if self.user("write") != name.partition("/")[0]:
            raise Problem(403, f"You don't have the rights to create a model under the namespace {name}.")
        self.server.repositories[name] = Repository(asked.get("visibility") == "private")
        return url

    def auth_check(self, repo: str, write: str | None = None):
        self.repository(repo)
        if self.user("write" if write else None) != repo.partition("/")[0]:
            raise Problem(403, "Forbidden")
        return {}

    def validate_yaml(self):
        return {"errors": [], "warnings": []}

    def branch(self, repo: str, branch: str):
        repository = self.repository(repo)
        self.user("write")
        if branch in repository.branches:
            raise Problem(409, f"Reference already exists: {branch}")
        repository.branches[branch] = repository.resolve("main")
        return {}

    def preupload(self, repo: str, revision: str):
        self.user("write")
        there = self.repository(repo).files(revision)
        answer = []
        for file in json.loads(self.body)["files"]:
            entry = {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
            if file["path"] in there:
                entry["oid"] = blob_id(there[file["path"]])
            answer.append(entry)
        return {"files": answer}

    def commit(self, repo: str, revision: str):
        self.user("write")
        repository = self.repository(repo)
        files, message = dict(repository.files(revision)), ""
        for line in self.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                message = value["summary"]
                if value.get("parentCommit", repository.resolve(revision)) != repository.resolve(revision):
                    raise Problem(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                raise Problem(501, f"{key} is not implemented here")
        name = repository.commit(revision, files, message)
        return {"commitUrl": f"{self.server.endpoint}/{repo}/commit/{name}", "commitOid": name}

    def tree(self, repo: str, revision: str):
        files = self.repository(repo).files(revision).items()
        return [{"type": "file", "path": path, "size": len(file), "oid": blob_id(file)} for path, file in files]

    def model_info(self, repo: str, revision: str = "main"):
        repository = self.repository(repo)
        siblings = [{"rfilename": path} for path in sorted(repository.files(revision))]
        facts = {"id": repo, "modelId": repo, "private": repository.private, "disabled": False, "gated": False}
        facts |= {"tags": [], "downloads": 0, "likes": 0}
        return facts | {"sha": repository.resolve(revision), "siblings": siblings}

    def resolve(self, repo: str, revision: str, path: str):
        repository = self.repository(repo)
        headers = {"X-Repo-Commit": repository.resolve(revision)}
        content = repository.files(revision).get(path)
        if content is None:
            self.send(404, b"", headers | {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
            return
        self.send(200, content, headers | {"ETag": f'"{blob_id(content)}"'})
