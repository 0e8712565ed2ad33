"""Raw memory of slots and tensors: mapping descriptors, byte views, copies that leave the GIL to the training thread.

The only place that handles addresses. Knows nothing of steps, daemons or optimizers.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import weakref
from collections.abc import Iterator, Sequence

import torch

from backstay.errors import IntegrityError, InvariantError

_libc = ctypes.CDLL(None, use_errno=True)
_memcmp = _libc.memcmp  # a CDLL function: called without the GIL
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_memcmp.restype = ctypes.c_int
# Not Python's mmap objects: they keep a duplicate of the descriptor, which forked children would inherit, and they unmap
# their range when they die, in a child too, whatever lies there by then.
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
# Not ctypes arrays: each length would make (and keep) a type of its own.
_memoryview_at = ctypes.pythonapi.PyMemoryView_FromMemory
_memoryview_at.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
_memoryview_at.restype = ctypes.py_object
_WRITABLE = 0x200  # PyBUF_WRITE
_MAP_FAILED = ctypes.c_void_p(-1).value


def copy_bytes(destination: int, source: int, count: int) -> None:
    """Copy ``count`` bytes between addresses; the GIL is free meanwhile."""
    ctypes.memmove(destination, source, count)


def is_same_bytes(left: int, right: int, count: int) -> bool:
    """Whether ``count`` bytes at two addresses are equal; the GIL is free meanwhile."""
    return bool(_memcmp(left, right, count) == 0)


def view_at(address: int, count: int) -> memoryview:
    """A writable view of ``count`` bytes at ``address``; the caller keeps that memory alive. Of a tensor: :func:`lent`."""
    if count == 0:
        return memoryview(bytearray())
    return _memoryview_at(address, count, _WRITABLE)


@contextlib.contextmanager
def lent(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor in plain memory, writable: the tensor lives for the block, and the view ends with it."""
    if not is_plain_memory(tensor):
        raise InvariantError(f"a {type(tensor).__name__} on {tensor.device} whose elements are not one run of bytes")
    view = view_at(tensor.data_ptr(), byte_count(tensor))
    try:
        yield view
    finally:
        view.release()


def read_bytes(tensor: torch.Tensor) -> bytes:
    """A copy of the bytes of a tensor in plain memory; ``Tensor.numpy()`` would need numpy, which torch does not install."""
    with lent(tensor) as view:
        return bytes(view)


def byte_count(tensor: torch.Tensor) -> int:
    """Bytes of the elements of ``tensor``, not of its storage."""
    return tensor.numel() * tensor.element_size()


def is_plain_memory(tensor: torch.Tensor) -> bool:
    """Whether the tensor's elements are one run of CPU bytes in row-major order."""
    return tensor.device.type == "cpu" and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def unusual_strides(tensor: torch.Tensor, like: torch.Tensor | None = None) -> list[int] | None:
    """Strides to allocate such a tensor with; None if row-major ones, or those of ``empty_like(like)``, will do."""
    if tensor.is_contiguous() if like is None else tensor.stride() == like.stride():
        return None
    dense = torch.empty_like(tensor, device="meta").stride()
    usual = torch.empty(tensor.shape, device="meta") if like is None else torch.empty_like(like, device="meta")
    return None if is_same_order(tensor.shape, dense, usual.stride()) else list(dense)


def is_same_order(shape: Sequence[int], left: Sequence[int], right: Sequence[int]) -> bool:
    """Whether strides put the elements of ``shape`` at the same places."""
    return all(size <= 1 or a == b for size, a, b in zip(shape, left, right, strict=True))


def why_not_stored(tensor: torch.Tensor) -> str:
    """Empty if the elements are bytes that a capture can copy, else what is in the way."""
    if tensor.device.type == "meta":
        return "is on the meta device: materialise the model first"
    kind: type[object] = type(tensor)
    if hasattr(kind, "__tensor_flatten__"):  # what torch knows wrapper subclasses by
        return (
            f"is a {kind.__name__}, which has no memory of its own: use an optimizer or layer that keeps plain tensors"
        )
    if tensor.device.type not in ("cpu", "cuda"):
        return f"is on {tensor.device}: only CPU and CUDA tensors are stored"
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        quantized = " and is quantized" if tensor.is_quantized else ""
        return f"has layout {tensor.layout}{quantized}: only dense tensors are stored"
    return ""


_open_mappings: weakref.WeakSet[Mapping] = weakref.WeakSet()


class Mapping:
    """A whole file mapped into this process.

    Invariant: never inherited by forked children (MADV_DONTFORK), and not unmapped by them either. ``close`` must not be
    called while a tensor or view made from it is in use.
    """

    def __init__(self, fd: int, *, is_writable: bool, size_bytes: int) -> None:
        """Map ``size_bytes`` of ``fd`` with all pages present; the descriptor stays the caller's.

        Raises:
            IntegrityError: if the file is shorter, because a read past its end would kill the process.
        """
        found = os.fstat(fd).st_size
        if found < size_bytes or size_bytes <= 0:
            raise IntegrityError(f"file to map has {found} bytes, expected {size_bytes}; not used", reason="truncated")
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if is_writable else 0)
        # MAP_POPULATE here, in the background: a page fault per 4 KiB would otherwise be paid inside the first capture.
        flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
        address = _libc.mmap(None, size_bytes, protection, flags, fd, 0)
        if address is None or address == _MAP_FAILED:
            code = ctypes.get_errno()
            raise OSError(code, f"mmap of {size_bytes} bytes: {os.strerror(code)}")
        self.address = int(address)
        _libc.madvise(self.address, size_bytes, mmap.MADV_DONTFORK)
        self.size_bytes = size_bytes
        self.is_writable = is_writable
        self.is_closed = False
        _open_mappings.add(self)

    def view(self, begin: int = 0, end: int | None = None) -> memoryview:
        end = self.size_bytes if end is None else end
        if self.is_closed or not 0 <= begin <= end <= self.size_bytes:
            raise InvariantError(f"bytes {begin} to {end} of a mapping of {self.size_bytes} (closed: {self.is_closed})")
        return view_at(self.address + begin, end - begin)

    def tensor(self, begin: int, end: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor over bytes ``begin`` to ``end``; shares the memory."""
        if begin == end:
            return torch.empty(shape, dtype=dtype, device="cpu")
        raw = torch.frombuffer(self.view(begin, end), dtype=torch.uint8)
        return raw.view(dtype).reshape(shape)

    def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            _libc.munmap(self.address, self.size_bytes)

    def forget(self) -> None:
        """In a forked child: the range is not mapped there and may hold something else by now, so never unmap it."""
        self.is_closed = True


def _forget_in_child() -> None:
    for mapping in list(_open_mappings):
        mapping.forget()


os.register_at_fork(after_in_child=_forget_in_child)
