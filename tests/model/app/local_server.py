"""The page and the API on a free port of this machine, served by a thread."""

import threading
import time
from contextlib import contextmanager

import pytest

from model.app.config import AppConfig
from model.app.server import open_server
from model.inference.generator import Generator


@contextmanager
def served(generator=None, **options):
    """Serve the page in a thread and yield its URL. None loads the generator of a checkpoint."""
    import uvicorn  # comes with Gradio

    config = AppConfig(**{"checkpoint": "unused", **options}, port=0, device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        if generator is not None:
            patch.setattr(Generator, "load", lambda *_, **__: generator)
        with open_server(config) as (app, listener, url):
            server = uvicorn.Server(
                uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
            )
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
            thread.start()
            while not server.started:
                time.sleep(0.01)
            try:
                yield url
            finally:
                server.should_exit = True
                thread.join()
