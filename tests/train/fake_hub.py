"""A Hugging Face hub on this machine that accepts uploads and remembers them."""

import base64
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_test"


class FakeHub:
    """The state of the hub.

    Attributes:
        url: Its address.
        files: {repository: {path: content}}.
        created: The bodies of the requests that created a repository.
        requests: "METHOD path" of each request.
    """

    def __init__(self):
        self.url = ""
        self.files = {}
        self.created = []
        self.requests = []
        self.objects = {}


def handler_of(hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def answer(self, content, status=200):
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def body(self):
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def handle_request(self):
            data, path = self.body(), self.path.partition("?")[0]
            hub.requests.append(f"{self.command} {path}")
            is_object = path.startswith("/objects/")
            if not is_object and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.answer({"error": "Invalid credentials"}, 401)
            if path == "/api/repos/create":
                wanted = json.loads(data)
                hub.created.append(wanted)
                name = f"{wanted['organization']}/{wanted['name']}"
                hub.files.setdefault(name, {})
                return self.answer({"url": f"{hub.url}/{name}", "id": name})
            if path == "/api/validate-yaml":
                return self.answer({"errors": [], "warnings": []})
            if is_object:
                hub.objects[path.rpartition("/")[2]] = data
                return self.answer({})
            name = "/".join(path.removeprefix("/api/models").split("/")[1:3]).removesuffix(".git")
            if name not in hub.files:
                return self.answer({"error": "Repository not found"}, 404)
            if "/preupload/" in path:
                modes = [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                        "oid": None,
                    }
                    for file in json.loads(data)["files"]
                ]
                return self.answer({"files": modes})
            if path.endswith("/objects/batch"):
                objects = [
                    {
                        **item,
                        "actions": {"upload": {"href": f"{hub.url}/objects/{item['oid']}"}},
                    }
                    for item in json.loads(data)["objects"]
                ]
                return self.answer({"transfer": "basic", "objects": objects})
            if "/commit/" in path:
                for line in data.decode().splitlines():
                    entry = json.loads(line)
                    value = entry["value"]
                    if entry["key"] == "file":
                        hub.files[name][value["path"]] = base64.b64decode(value["content"])
                    elif entry["key"] == "lfsFile":
                        hub.files[name][value["path"]] = hub.objects[value["oid"]]
                url = f"{hub.url}/{name}/commit/1"
                return self.answer({"commitUrl": url, "commitOid": "1" * 40, "success": True})
            return self.answer({"error": f"unexpected {path}"}, 404)

        do_GET = do_POST = do_PUT = handle_request

    return Handler


@contextmanager
def running():
    """Run a hub in a thread and yield it."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
