"""OpenGL contexts without a screen: the EGL device on which they run, and the renderer's name."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import RunError

if TYPE_CHECKING:
    import moderngl

EGL_CUDA_DEVICE_NV = 0x323A  # EGL_NV_device_cuda: the attribute that holds CUDA's device index
PACKAGES = "libegl1 libgl1 libgl1-mesa-dri"  # of Debian and Ubuntu
LIBEGL, LIBGL = "libEGL.so.1", "libGL.so.1"
MAX_DEVICES = 64

_gpu: ContextVar[str | None] = ContextVar("gpu", default=None)


@contextmanager
def on_gpu(gpu: str | None) -> Iterator[None]:
    """Prefer one GPU for the OpenGL contexts that are created inside the block.

    Args:
        gpu: Index of the GPU in CUDA's numbering. None, or an index that no EGL device has, takes
            the first EGL device.
    """
    token = _gpu.set(gpu)
    try:
        yield
    finally:
        _gpu.reset(token)


def cuda_indices() -> list[str | None]:
    """Return CUDA's index of every EGL device as text, None for a device that is not CUDA's.

    Drivers list hardware before Mesa's software renderer.

    Raises:
        OSError: If EGL is not installed.
    """
    egl = ctypes.CDLL(LIBEGL)
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    query_devices = egl.eglGetProcAddress(b"eglQueryDevicesEXT")
    query_attribute = egl.eglGetProcAddress(b"eglQueryDeviceAttribEXT")
    if not query_devices or not query_attribute:
        return []
    devices = (ctypes.c_void_p * MAX_DEVICES)()
    count = ctypes.c_int()
    pointer = ctypes.POINTER
    list_devices = ctypes.CFUNCTYPE(
        ctypes.c_uint, ctypes.c_int, pointer(ctypes.c_void_p), pointer(ctypes.c_int)
    )(query_devices)
    get_attribute = ctypes.CFUNCTYPE(
        ctypes.c_uint, ctypes.c_void_p, ctypes.c_int, pointer(ctypes.c_ssize_t)
    )(query_attribute)
    if not list_devices(MAX_DEVICES, devices, ctypes.byref(count)):
        return []
    indices: list[str | None] = []
    for device in devices[: count.value]:
        index = ctypes.c_ssize_t()
        is_cuda = get_attribute(device, EGL_CUDA_DEVICE_NV, ctypes.byref(index))
        indices.append(str(index.value) if is_cuda else None)
    return indices


def device_order() -> list[int]:
    """Return the numbers of all EGL devices, the preferred GPU first.

    The other devices stay in the list. The choice only balances the load: the images are the same
    picture on any device, and the renderer is recorded.
    """
    indices = cuda_indices()
    if _gpu.get() is None:
        return list(range(len(indices)))
    return sorted(range(len(indices)), key=lambda number: indices[number] != _gpu.get())


@contextmanager
def gl_context() -> Iterator[moderngl.Context]:
    """Create an OpenGL context and make it current. It is freed at the end of the block.

    It is on the first EGL device that supports one.

    Raises:
        RunError: If no device supports a context, or a library is missing.
    """
    import moderngl

    os.environ.setdefault("LP_NUM_THREADS", "0")  # Mesa shall not start threads: one core per asset
    problems: list[str] = []
    settings: dict[str, Any] = {"backend": "egl", "libegl": LIBEGL, "libgl": LIBGL}
    context = None
    try:
        for number in device_order():
            try:
                settings["device_index"] = number
                context = moderngl.create_context(require=330, standalone=True, **settings)
                break
            except Exception as error:  # noqa: BLE001  moderngl has no class for its errors
                problems.append(f"device {number}: {error}")
    except OSError as error:
        problems.append(str(error))
    if context is None:
        cause = "; ".join(problems) or "no device found"
        raise RunError(
            f"cannot render because headless EGL does not start ({cause}); "
            f"on Debian or Ubuntu run: apt install {PACKAGES}"
        )
    try:
        yield context
    finally:
        context.release()


def renderer_string() -> str:
    """Return vendor, renderer and version of the OpenGL in use.

    Images have the same bytes only on the same renderer.

    Raises:
        RunError: If no OpenGL context can be created.
    """
    with gl_context() as context:
        return ", ".join(context.info[f"GL_{name}"] for name in ("VENDOR", "RENDERER", "VERSION"))
