"""The server: the API, the page at /, and the objects behind them."""

from __future__ import annotations

import logging
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager

from model.app.config import AppConfig
from pipeline.core.devices import choose_device
from pipeline.core.errors import UserError

log = logging.getLogger(__name__)


@contextmanager
def open_server(config: AppConfig) -> Iterator[tuple[object, socket.socket, str]]:
    """Load the models and the build, and bind the port.

    Yields:
        The ASGI application, the bound socket and the URL of the page. All resources are freed at
        the end of the context.

    Raises:
        UserError: If the checkpoint, the build, the device or the port cannot be used, or Gradio
            is not installed.
    """
    with ExitStack() as stack:
        listener = stack.enter_context(bind(config.host, config.port))
        uploads = tempfile.mkdtemp(prefix="sparse3d-uploads-")
        stack.callback(shutil.rmtree, uploads)
        # Gradio reads these when it is imported, and where it stores uploads.
        os.environ |= {
            "GRADIO_ANALYTICS_ENABLED": "False",
            "GRADIO_TEMP_DIR": uploads,
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        try:
            import gradio as gr  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise UserError(
                f'the page needs the library Gradio ({error}): pip install -e ".[app]"'
            ) from error
        from model.app.api import build_server
        from model.app.builds import Builds
        from model.app.page import CSS, HEAD, build_page, theme
        from model.app.service import Service

        service = builds = None
        if config.data is not None:
            builds = stack.enter_context(closing(Builds(config.data)))
        if config.checkpoint is not None:
            from model.config import GenerationOptions
            from model.inference.generator import Generator

            options = GenerationOptions(precision=config.precision, refine=config.refine)
            device = choose_device(config.device)
            generator = Generator.load(
                config.checkpoint,
                device,
                options,
                config.image_encoder,
                low_memory=config.low_memory,
            )
            service = stack.enter_context(closing(Service(config, generator)))
        server = gr.mount_gradio_app(
            build_server(config, service, builds),
            build_page(service, builds),
            path="/",
            theme=theme(),
            css=CSS,
            head=HEAD,
            footer_links=[],
            max_file_size=config.max_upload_bytes,
            ssr_mode=False,
            run_history=False,
            enable_monitoring=False,
        )
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        yield server, listener, f"http://{shown}:{port}/"


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address.

    Raises:
        UserError: If the address cannot be used.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        reason = re.sub(r"^\[Errno -?\d+\] ", "", str(error))
        raise UserError(
            f"{host}:{port} cannot be listened on ({reason}); choose another --host or --port"
        ) from error
    return listener


def serve(config: AppConfig) -> None:
    """Serve the page until the process is stopped.

    Raises:
        UserError: As `open_server`.
    """
    with open_server(config) as (server, listener, url):
        import uvicorn  # pyright: ignore[reportMissingImports]

        log.info("The page is at %s", url)
        if not config.loopback_only:
            log.warning(
                "Everyone who can reach %s can use the page: it has no password.", config.host
            )
        settings = uvicorn.Config(server, log_level="warning", timeout_graceful_shutdown=2)  # pyright: ignore[reportArgumentType]
        uvicorn.Server(settings).run(sockets=[listener])
