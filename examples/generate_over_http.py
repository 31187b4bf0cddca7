"""Generate a mesh with a running `python -m model.app`, using the standard library alone.

python examples/generate_over_http.py chair.png chair.glb
"""

import json
import sys
import time
import urllib.request
import uuid
from pathlib import Path


def request(url, method="GET", body=None, content_type=None):
    """Send a request and return the bytes of the answer."""
    headers = {} if content_type is None else {"Content-Type": content_type}
    asked = urllib.request.Request(url, data=body, headers=headers, method=method)
    with urllib.request.urlopen(asked) as answer:
        return answer.read()


def submit(server, image, **options):
    """Submit an image and return the job."""
    boundary = uuid.uuid4().hex
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in options.items()
    ]
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="images"; filename="{image.name}"'
    parts += [f"{head}\r\n\r\n".encode(), image.read_bytes(), f"\r\n--{boundary}--\r\n".encode()]
    form = f"multipart/form-data; boundary={boundary}"
    return json.loads(request(f"{server}/api/jobs", "POST", b"".join(parts), form))


def main(image, mesh, server="http://127.0.0.1:7860"):
    """Generate the mesh of an image and write it to a file."""
    job = submit(server, Path(image), seed=7)
    while job["state"] in ("queued", "running"):
        print(f"{100 * job['fraction']:3.0f} % {job['stage']}")
        time.sleep(0.5)
        job = json.loads(request(f"{server}/api/jobs/{job['id']}"))
    if job["state"] != "done":
        sys.exit(f"{job['state']}: {job['error']}")
    path = job["files"][Path(mesh).suffix[1:]]
    Path(mesh).write_bytes(request(server + path))
    print(f"{mesh} has {job['mesh']['faces']} faces")


if __name__ == "__main__":
    main(*sys.argv[1:])
