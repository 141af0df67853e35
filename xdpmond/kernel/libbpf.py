"""libbpf.so.1 by ctypes: programs, links, maps, test runs. Errors become `KernelError` with the kernel's own reason.

Nothing here keeps state; a descriptor is an int that the caller owns. Calls release the interpreter's lock, so that long ones (a batch
of a million updates) can run in a thread beside the event loop. The compiler child imports this too, and has no need of numpy.
"""

from __future__ import annotations

import ctypes as c
import errno
import os
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from ..errors import KernelError

if TYPE_CHECKING:
    import numpy as np

BPF_PROG_TYPE_XDP = 6
BPF_XDP = 37
XDP_FLAGS_SKB_MODE = 2
XDP_FLAGS_DRV_MODE = 4
BPF_F_XDP_HAS_FRAGS = 1 << 5
BPF_F_TEST_XDP_LIVE_FRAMES = 1 << 1

XDP_DROP = 1
XDP_PASS = 2


class _ProgLoadOpts(c.Structure):
    _fields_ = [
        ("sz", c.c_size_t), ("attempts", c.c_int), ("expected_attach_type", c.c_uint32), ("prog_btf_fd", c.c_uint32),
        ("prog_flags", c.c_uint32), ("prog_ifindex", c.c_uint32), ("kern_version", c.c_uint32), ("attach_btf_id", c.c_uint32),
        ("attach_prog_fd", c.c_uint32), ("attach_btf_obj_fd", c.c_uint32), ("fd_array", c.c_void_p), ("func_info", c.c_void_p),
        ("func_info_cnt", c.c_uint32), ("func_info_rec_size", c.c_uint32), ("line_info", c.c_void_p), ("line_info_cnt", c.c_uint32),
        ("line_info_rec_size", c.c_uint32), ("log_level", c.c_uint32), ("log_size", c.c_uint32), ("log_buf", c.c_char_p),
    ]  # fmt: skip


class _LinkCreateOpts(c.Structure):
    _fields_ = [("sz", c.c_size_t), ("flags", c.c_uint32), ("iter_info", c.c_void_p), ("iter_info_len", c.c_uint32),
                ("target_btf_id", c.c_uint32), ("cookie", c.c_uint64)]  # fmt: skip


class _TestRunOpts(c.Structure):
    _fields_ = [
        ("sz", c.c_size_t), ("data_in", c.c_void_p), ("data_out", c.c_void_p), ("data_size_in", c.c_uint32), ("data_size_out", c.c_uint32),
        ("ctx_in", c.c_void_p), ("ctx_out", c.c_void_p), ("ctx_size_in", c.c_uint32), ("ctx_size_out", c.c_uint32), ("retval", c.c_uint32),
        ("repeat", c.c_int), ("duration", c.c_uint32), ("flags", c.c_uint32), ("cpu", c.c_uint32), ("batch_size", c.c_uint32),
    ]  # fmt: skip


class _MapCreateOpts(c.Structure):
    _fields_ = [
        ("sz", c.c_size_t), ("btf_fd", c.c_uint32), ("btf_key_type_id", c.c_uint32), ("btf_value_type_id", c.c_uint32),
        ("btf_vmlinux_value_type_id", c.c_uint32), ("inner_map_fd", c.c_uint32), ("map_flags", c.c_uint32), ("map_extra", c.c_uint64),
        ("numa_node", c.c_uint32), ("map_ifindex", c.c_uint32),
    ]  # fmt: skip


class _BatchOpts(c.Structure):
    _fields_ = [("sz", c.c_size_t), ("elem_flags", c.c_uint64), ("flags", c.c_uint64)]


class _XdpQueryOpts(c.Structure):
    _fields_ = [("sz", c.c_size_t), ("prog_id", c.c_uint32), ("drv_prog_id", c.c_uint32), ("hw_prog_id", c.c_uint32),
                ("skb_prog_id", c.c_uint32), ("attach_mode", c.c_uint8)]  # fmt: skip


class _XdpMd(c.Structure):
    _fields_ = [("data", c.c_uint32), ("data_end", c.c_uint32), ("data_meta", c.c_uint32), ("ingress_ifindex", c.c_uint32),
                ("rx_queue_index", c.c_uint32), ("egress_ifindex", c.c_uint32)]  # fmt: skip


class _MapInfo(c.Structure):
    _fields_ = [("type", c.c_uint32), ("id", c.c_uint32), ("key_size", c.c_uint32), ("value_size", c.c_uint32),
                ("max_entries", c.c_uint32), ("map_flags", c.c_uint32), ("name", c.c_char * 16)]  # fmt: skip


class _ProgInfo(c.Structure):
    _fields_ = [("type", c.c_uint32), ("id", c.c_uint32), ("tag", c.c_uint8 * 8), ("jited_prog_len", c.c_uint32),
                ("xlated_prog_len", c.c_uint32), ("jited_prog_insns", c.c_uint64), ("xlated_prog_insns", c.c_uint64),
                ("load_time", c.c_uint64), ("created_by_uid", c.c_uint32), ("nr_map_ids", c.c_uint32), ("map_ids", c.c_uint64)]  # fmt: skip


class _LinkInfo(c.Structure):
    _fields_ = [("type", c.c_uint32), ("id", c.c_uint32), ("prog_id", c.c_uint32), ("pad", c.c_uint32), ("ifindex", c.c_uint32),
                ("rest", c.c_uint32 * 15)]  # fmt: skip


@lru_cache(1)
def _lib() -> c.CDLL:
    try:
        lib = c.CDLL("libbpf.so.1", use_errno=True)
    except OSError as error:
        raise KernelError(f"libbpf.so.1 cannot be loaded: {error}", hint="install the package libbpf1") from None
    lib.libbpf_set_print(None)
    return lib


def _check(result: int, doing: str, hint: str = "") -> int:
    if result < 0:
        raise kernel_error(-result, doing, hint)
    return result


def kernel_error(number: int, doing: str, hint: str = "") -> KernelError:
    error = KernelError(f"{doing}: {os.strerror(number)} ({errno.errorcode.get(number, number)})", hint=hint)
    error.errno = number
    return error


def load_xdp(instructions: bytes, name: str, *, frags: bool) -> int:
    """Load an XDP program; return its descriptor. `frags`: accept frames of several buffers (kernel 5.18 and later)."""
    flags = BPF_F_XDP_HAS_FRAGS if frags else 0
    arguments = (BPF_PROG_TYPE_XDP, name.encode(), b"GPL", instructions, c.c_size_t(len(instructions) // 8))
    opts = _ProgLoadOpts(sz=c.sizeof(_ProgLoadOpts), expected_attach_type=BPF_XDP, prog_flags=flags)
    fd = _lib().bpf_prog_load(*arguments, c.byref(opts))
    if fd >= 0:
        return fd
    # Once more with a log, which costs the verifier time and us memory that a good program need not spend.
    log = c.create_string_buffer(1 << 20)
    opts.log_level, opts.log_size, opts.log_buf = 1, len(log), c.cast(log, c.c_char_p)
    fd = _lib().bpf_prog_load(*arguments, c.byref(opts))
    tail = " | ".join(log.value.decode(errors="replace").splitlines()[-6:])
    return _check(fd, f"the kernel refuses the program {name}", hint=tail)


def has_frags() -> bool:
    """Does this kernel take XDP programs that accept frames of several buffers? Found by loading a minimal one."""
    mov_pass_exit = bytes([0xB7, 0, 0, 0, XDP_PASS, 0, 0, 0, 0x95, 0, 0, 0, 0, 0, 0, 0])
    try:
        os.close(load_xdp(mov_pass_exit, "probe", frags=True))
    except KernelError:
        return False
    return True


def create_link(program: int, ifindex: int, flags: int) -> int:
    opts = _LinkCreateOpts(sz=c.sizeof(_LinkCreateOpts), flags=flags)
    return _check(_lib().bpf_link_create(program, ifindex, BPF_XDP, c.byref(opts)), "attach")


def update_link(link: int, program: int) -> None:
    _check(_lib().bpf_link_update(link, program, None), "replace the program of a link")


@dataclass(frozen=True, slots=True)
class XdpState:
    """What is attached to an interface: ids by mode, 0 where nothing is."""

    native: int
    generic: int
    offloaded: int


def query_xdp(ifindex: int) -> XdpState:
    opts = _XdpQueryOpts(sz=c.sizeof(_XdpQueryOpts))
    _check(_lib().bpf_xdp_query(ifindex, 0, c.byref(opts)), "query XDP")
    ids = {1: opts.drv_prog_id, 2: opts.skb_prog_id, 3: opts.hw_prog_id}
    # The kernel tells a single program by `prog_id` and the mode it is attached in (enum xdp_attach_mode: 1 driver, 2 skb, 3 hardware).
    if opts.attach_mode in ids and not ids[opts.attach_mode]:
        ids[opts.attach_mode] = opts.prog_id
    return XdpState(native=ids[1], generic=ids[2], offloaded=ids[3])


def _info(fd: int, kind: type, doing: str):
    info = kind()
    size = c.c_uint32(c.sizeof(info))
    _check(_lib().bpf_obj_get_info_by_fd(fd, c.byref(info), c.byref(size)), doing)
    return info


def map_info(fd: int) -> tuple[int, int, int, int, int]:
    """(type, key size, value size, most entries, flags)"""
    info = _info(fd, _MapInfo, "read a map's description")
    return info.type, info.key_size, info.value_size, info.max_entries, info.map_flags


def create_map(kind: int, name: str, *, key_size: int = 4, value_size: int, entries: int, flags: int = 0, inner: int = 0) -> int:
    """Make a map; return its descriptor. `inner` is a map like those that will be in this one."""
    opts = _MapCreateOpts(sz=c.sizeof(_MapCreateOpts), map_flags=flags, inner_map_fd=inner)
    result = _lib().bpf_map_create(kind, name.encode(), key_size, value_size, entries, c.byref(opts))
    hint = "smaller tables need less: see [tables] in xdpmond.toml(5)" if entries > 1 else ""
    return _check(result, f"make the map {name}, {entries} times {value_size} bytes", hint)


def program_by_id(number: int) -> int:
    """A descriptor of a loaded program."""
    return _check(_lib().bpf_prog_get_fd_by_id(number), f"open program {number}")


def program_id(fd: int) -> int:
    return _info(fd, _ProgInfo, "read a program's description").id


def instruction_count(fd: int) -> int:
    """Instructions after the verifier's rewriting."""
    return _info(fd, _ProgInfo, "read a program's description").xlated_prog_len // 8


def program_maps(fd: int) -> set[int]:
    """The ids of the maps that a program uses."""
    count = _info(fd, _ProgInfo, "read a program's description").nr_map_ids
    ids = (c.c_uint32 * count)()
    info = _ProgInfo(nr_map_ids=count, map_ids=c.addressof(ids))
    size = c.c_uint32(c.sizeof(info))
    _check(_lib().bpf_obj_get_info_by_fd(fd, c.byref(info), c.byref(size)), "read a program's maps")
    return set(ids[: info.nr_map_ids])


def map_id(fd: int) -> int:
    return _info(fd, _MapInfo, "read a map's description").id


def link_info(fd: int) -> tuple[int, int, int]:
    """(link id, program id, ifindex); ifindex 0 when the interface has gone."""
    info = _info(fd, _LinkInfo, "read a link's description")
    return info.id, info.prog_id, info.ifindex


@dataclass(frozen=True, slots=True)
class TestRun:
    action: int
    """XDP_DROP, XDP_PASS, …"""
    nanoseconds: int
    """Mean for one run, as measured by the kernel."""


def test_run(program: int, frame: bytes, *, repeat: int = 1, ifindex: int = 0, flags: int = 0) -> TestRun:
    """BPF_PROG_TEST_RUN on one frame, on the calling CPU. `ifindex` becomes ctx->ingress_ifindex (of an existing interface; the kernel
    takes its first receive queue). Frames larger than a page need a program that takes several buffers."""
    opts = _TestRunOpts(sz=c.sizeof(_TestRunOpts), data_size_in=len(frame), repeat=repeat, flags=flags)
    buffer = c.create_string_buffer(frame, len(frame))
    opts.data_in = c.cast(buffer, c.c_void_p)
    if ifindex:
        context = _XdpMd(data_end=len(frame), ingress_ifindex=ifindex)
        opts.ctx_in, opts.ctx_size_in = c.cast(c.byref(context), c.c_void_p), c.sizeof(context)
    _check(_lib().bpf_prog_test_run_opts(program, c.byref(opts)), "test run")
    return TestRun(opts.retval, opts.duration)


@lru_cache(1)
def possible_cpus() -> int:
    """Slices that a per-CPU map has: the kernel's possible CPUs, not those online."""
    return _check(_lib().libbpf_num_possible_cpus(), "count the possible CPUs")


def lookup(map_fd: int, key: np.ndarray, value: np.ndarray) -> bool:
    """Read one element into `value`; False if there is none."""
    result = _lib().bpf_map_lookup_elem(map_fd, _data(key), _data(value))
    if result == -errno.ENOENT:
        return False
    _check(result, "read a map")
    return True


def update(map_fd: int, key: np.ndarray, value: np.ndarray) -> None:
    _check(_lib().bpf_map_update_elem(map_fd, _data(key), _data(value), c.c_uint64(0)), "write a map")


def delete(map_fd: int, key: np.ndarray) -> None:
    _check(_lib().bpf_map_delete_elem(map_fd, _data(key)), "delete from a map")


def update_batch(map_fd: int, keys: np.ndarray, values: np.ndarray) -> None:
    count = c.c_uint32(len(keys))
    if len(keys):
        opts = _BatchOpts(sz=c.sizeof(_BatchOpts))
        result = _lib().bpf_map_update_batch(map_fd, _data(keys), _data(values), c.byref(count), c.byref(opts))
        _check(result, f"write {len(keys)} elements to a map, of which {count.value} went in")


def lookup_batches(map_fd: int, key_type: np.dtype, value_type: np.dtype, batch: int = 65536) -> tuple[np.ndarray, np.ndarray]:
    """All keys and values of a map, in the kernel's order. Not a snapshot if the map is being written."""
    import numpy as np

    # Large enough for the opaque position of any kind of map.
    position = np.zeros(max(key_type.itemsize, 8), "u1")
    first = True
    keys, values = [], []
    while True:
        some_keys, some_values = np.zeros(batch, key_type), np.zeros(batch, value_type)
        count = c.c_uint32(batch)
        opts = _BatchOpts(sz=c.sizeof(_BatchOpts))
        start = None if first else _data(position)
        result = _lib().bpf_map_lookup_batch(map_fd, start, _data(position), _data(some_keys), _data(some_values), c.byref(count),
                                             c.byref(opts))  # fmt: skip
        if result < 0 and result != -errno.ENOENT:
            _check(result, "read a map in batches")
        keys.append(some_keys[: count.value])
        values.append(some_values[: count.value])
        first = False
        if result == -errno.ENOENT:
            return np.concatenate(keys), np.concatenate(values)


def _data(array: np.ndarray) -> c.c_void_p:
    return c.c_void_p(array.ctypes.data)
