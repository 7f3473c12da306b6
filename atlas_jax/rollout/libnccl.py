"""The few calls of NCCL by which this process sends weights as rank 0. Imports no JAX.

The library is the one that JAX for CUDA installs. Calls go to the null stream of the device's
primary context, which JAX uses too, and wait for it: when `broadcast` returns the buffer was sent.
"""

from __future__ import annotations

import ctypes
import importlib.util
import pathlib
from typing import Any

_ID_BYTES = 128
_UINT8 = 1  # of nccl.h, as the next two
_FLOAT32 = 7
_SUM = 0


class NcclError(RuntimeError):
    """A call of NCCL or of the driver that has failed."""


class _UniqueId(ctypes.Structure):
    """`ncclUniqueId`, which calls take by value."""

    _fields_ = [("internal", ctypes.c_byte * _ID_BYTES)]


def find() -> str:
    """Returns the library's path or name.

    Raises:
        ValueError: if it is not installed.
    """
    name = "libnccl.so.2"
    try:
        found = importlib.util.find_spec("nvidia.nccl")
    except ModuleNotFoundError:
        found = None
    for place in (found.submodule_search_locations or ()) if found else ():
        if (path := pathlib.Path(place, "lib", name)).exists():
            return str(path)
    try:
        ctypes.CDLL(name)
    except OSError:
        raise ValueError(
            "rollout.weight_sync=nccl needs NCCL, which is not installed; "
            "pip install 'atlas_jax[cuda]', or use rollout.weight_sync=reload"
        ) from None
    return name


class LibNccl:
    """A communicator of which this process is rank 0."""

    def __init__(self, device: int) -> None:
        """Loads the libraries.

        Args:
            device: CUDA's number of the device that holds the buffers.

        Raises:
            ValueError: if NCCL is not installed.
            NcclError: if there is no driver or no such device.
        """
        self._nccl = ctypes.CDLL(find())
        self._nccl.ncclGetErrorString.restype = ctypes.c_char_p
        self._nccl.ncclCommInitRank.argtypes = [
            ctypes.POINTER(ctypes.c_void_p), ctypes.c_int, _UniqueId, ctypes.c_int,
        ]  # fmt: skip
        at = ctypes.c_void_p
        sent: list[Any] = [at, at, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, at, at]
        self._nccl.ncclAllReduce.argtypes = sent
        self._nccl.ncclBroadcast.argtypes = sent
        self._nccl.ncclCommAbort.argtypes = [at]
        try:
            self._cuda = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise NcclError(f"no NVIDIA driver: {error}") from None
        self._device = device
        self._comm = ctypes.c_void_p()

    def version(self) -> str:
        """Returns the version of NCCL, such as "2.27.7"."""
        number = ctypes.c_int()
        self._check("ncclGetVersion", self._nccl.ncclGetVersion(ctypes.byref(number)))
        return f"{number.value // 10000}.{number.value // 100 % 100}.{number.value % 100}"

    def unique_id(self) -> bytes:
        """Returns the name of a new group, 128 bytes, for all its ranks."""
        made = _UniqueId()
        self._check("ncclGetUniqueId", self._nccl.ncclGetUniqueId(ctypes.byref(made)))
        return bytes(made)

    def connect(self, unique_id: bytes, world_size: int) -> None:
        """Joins a group as rank 0; returns when all ranks have joined.

        vLLM's ranks then add one number together, so this one does too.
        """
        self._use_device()
        comm = ctypes.c_void_p()
        name = _UniqueId.from_buffer_copy(unique_id)
        found = self._nccl.ncclCommInitRank(ctypes.byref(comm), world_size, name, 0)
        self._check("ncclCommInitRank", found)
        self._comm = comm
        number = ctypes.c_void_p()
        self._drive("cuMemAlloc_v2", ctypes.byref(number), ctypes.c_size_t(4))
        try:
            self._drive("cuMemsetD32_v2", number, ctypes.c_uint(0), ctypes.c_size_t(1))
            found = self._nccl.ncclAllReduce(number, number, 1, _FLOAT32, _SUM, comm, None)
            self._check("ncclAllReduce", found)
            self._drive("cuStreamSynchronize", ctypes.c_void_p())
        finally:
            self._drive("cuMemFree_v2", number)

    def broadcast(self, buffer: Any) -> None:
        """Sends a JAX array of bytes on the device to the other ranks."""
        self._use_device()
        # The stream of JAX is another one, so the array must be computed.
        at = ctypes.c_void_p(buffer.block_until_ready().unsafe_buffer_pointer())
        found = self._nccl.ncclBroadcast(at, at, buffer.nbytes, _UINT8, 0, self._comm, None)
        self._check("ncclBroadcast", found)
        self._drive("cuStreamSynchronize", ctypes.c_void_p())

    def abort(self) -> None:
        """Leaves the group; a call in another thread that waits for the others ends in an error."""
        comm, self._comm = self._comm, ctypes.c_void_p()
        if comm:
            self._nccl.ncclCommAbort(comm)

    def _use_device(self) -> None:
        """Makes the device's primary context the one of this thread."""
        device = ctypes.c_int()
        context = ctypes.c_void_p()
        self._drive("cuInit", ctypes.c_uint(0))
        self._drive("cuDeviceGet", ctypes.byref(device), ctypes.c_int(self._device))
        self._drive("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._drive("cuCtxSetCurrent", context)

    def _drive(self, name: str, *arguments: Any) -> None:
        if code := getattr(self._cuda, name)(*arguments):
            raise NcclError(f"{name} fails with CUDA error {code}")

    def _check(self, name: str, code: int) -> None:
        if code:
            reason = self._nccl.ncclGetErrorString(code).decode()
            raise NcclError(f"{name} fails: {reason}")
