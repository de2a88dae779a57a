"""One line and exit code 2 where a mapped file is cut short while it is read, instead of a death by SIGBUS.

The system sends SIGBUS to the thread that reads a page of a memory map which the file no longer has, or which the disk
cannot give. The instruction is repeated when the handler returns, so a handler in Python, which runs only later, would
never run. The handler here is compiled, takes no lock and allocates nothing, so any thread may be interrupted by it,
with or without the GIL: it looks the address up in a table, writes the line of that map and ends the process.
"""

from __future__ import annotations

import ctypes
import signal
import weakref
from functools import cache
from pathlib import Path
from typing import Protocol

import llvmlite.binding as llvm
import numpy as np

from pipelines.printable import printable

EXIT_CODE = 2
_MAX_FILES = 8192  # further files that are open at the same time go without a line

# For each map: addresses of its first byte and of the first one after it, address and length of its line; zeros: free.
_table = np.zeros((_MAX_FILES, 4), np.int64)

# si_addr is at byte 16 of siginfo_t on 64-bit Linux. A SIGBUS that is not ours gets the action that was set before:
# it is set again, and the instruction repeats. Of several threads one writes; the others repeat until the process ends.
_HANDLER = """
@is_reported = internal global i32 0

declare i64 @write(i32, ptr, i64)
declare void @_exit(i32)
declare i32 @sigaction(i32, ptr, ptr)

define void @on_bus_error(i32 %signal, ptr %info, ptr %context) {{
enter:
  %place = getelementptr i8, ptr %info, i64 16
  %address = load i64, ptr %place
  br label %look
look:
  %row = phi i64 [ {table}, %enter ], [ %next, %go_on ]
  %first_ptr = inttoptr i64 %row to ptr
  %stop_ptr = getelementptr i64, ptr %first_ptr, i64 1
  %line_ptr = getelementptr i64, ptr %first_ptr, i64 2
  %length_ptr = getelementptr i64, ptr %first_ptr, i64 3
  %first = load i64, ptr %first_ptr
  %stop = load i64, ptr %stop_ptr
  %is_after_first = icmp uge i64 %address, %first
  %is_before_stop = icmp ult i64 %address, %stop
  %is_found = and i1 %is_after_first, %is_before_stop
  br i1 %is_found, label %report, label %go_on
report:
  %was_reported = atomicrmw xchg ptr @is_reported, i32 1 seq_cst
  %is_second = icmp ne i32 %was_reported, 0
  br i1 %is_second, label %wait, label %write
wait:
  ret void
write:
  %line = load ptr, ptr %line_ptr
  %length = load i64, ptr %length_ptr
  %written = call i64 @write(i32 2, ptr %line, i64 %length)
  call void @_exit(i32 {exit_code})
  unreachable
go_on:
  %next = add i64 %row, 32
  %is_over = icmp eq i64 %next, {table_end}
  br i1 %is_over, label %give_up, label %look
give_up:
  %previous = inttoptr i64 {previous} to ptr
  %done = call i32 @sigaction(i32 %signal, ptr %previous, ptr null)
  ret void
}}
"""


class _Action(ctypes.Structure):
    """glibc's struct sigaction, on x86-64 and on ARM64."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_byte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


_SA_SIGINFO, _SA_ONSTACK = 4, 0x08000000
_previous = _Action()


class MappedFile(Protocol):
    """A file and its memory map, uint8."""

    @property
    def path(self) -> Path: ...
    @property
    def mmap(self) -> np.ndarray: ...


def report_bus_errors(reader: MappedFile) -> None:
    """From now on, while the reader exists, end the process with one line where its map cannot be read."""
    _install_handler()
    first, is_free = reader.mmap.ctypes.data, _table[:, 1] == 0
    if (first == _table[~is_free, 0]).any() or not is_free.any():
        return
    line = f"fastssl: error: {reader.path}: was cut short, or cannot be read any more: restore it, then start again"
    line = ctypes.create_string_buffer(f"{printable(line)} (run.resume=auto resumes a training)\n".encode())
    row = _table[np.flatnonzero(is_free)[0]]
    row[2:] = ctypes.addressof(line), len(line) - 1
    row[0] = first
    row[1] = first + len(reader.mmap)  # written last: an empty range holds no address
    weakref.finalize(reader, _forget, row, line)


def _forget(row: np.ndarray, _line: ctypes.Array) -> None:
    row[1] = 0


@cache
def _install_handler() -> llvm.ExecutionEngine:
    """Compile and install the handler, once per process; returns what keeps its code in memory."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    table = _table.ctypes.data
    code = _HANDLER.format(
        table=table, table_end=table + _table.nbytes, previous=ctypes.addressof(_previous), exit_code=EXIT_CODE
    )
    machine = llvm.Target.from_default_triple().create_target_machine()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(code), machine)
    engine.finalize_object()
    action = _Action(handler=engine.get_function_address("on_bus_error"), flags=_SA_SIGINFO | _SA_ONSTACK)
    sigaction = ctypes.CDLL(None, use_errno=True).sigaction
    if sigaction(signal.SIGBUS, ctypes.byref(action), ctypes.byref(_previous)):
        raise OSError(ctypes.get_errno(), "sigaction")
    return engine
