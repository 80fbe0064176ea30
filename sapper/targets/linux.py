"""System calls of Linux on processors that share its generic table, by x86-64's numbers.

Leaves: `CALLS`, the number of a call on x86-64 -> its number there, and for each of its arguments which of x86-64's it
is: a place among these, or a number below 0 for itself. Holds: code by hand makes these calls and no others.
Source: Linux, include/uapi/asm-generic/unistd.h; arch/x86/entry/syscalls/syscall_64.tbl; clone(2), "C library/kernel
differences" (CONFIG_CLONE_BACKWARDS); openat(2), readlinkat(2), renameat2(2), unlinkat(2).
"""

from __future__ import annotations

_SAME = (0, 1, 2, 3, 4, 5)
_HERE = (-100, 0, 1, 2, 4, 5)
"""AT_FDCWD first."""

CALLS: dict[int, tuple[int, tuple[int, ...]]] = {
    0: (63, _SAME),             # read
    1: (64, _SAME),             # write
    2: (56, _HERE),             # open: openat
    3: (57, _SAME),             # close
    5: (80, _SAME),             # fstat
    9: (222, _SAME),            # mmap
    11: (215, _SAME),           # munmap
    13: (134, _SAME),           # rt_sigaction
    14: (135, _SAME),           # rt_sigprocmask
    28: (233, _SAME),           # madvise
    56: (220, (0, 1, 2, 4, 3, 5)),      # clone: the thread's own memory before the word of its end
    60: (93, _SAME),            # exit
    74: (82, _SAME),            # fsync
    82: (276, (-100, 0, -100, 1, 3, 5)),    # rename: renameat2, whose flags are the fourth argument here
    87: (35, (-100, 0, 3, 3, 4, 5)),    # unlink: unlinkat, likewise
    89: (78, _HERE),            # readlink: readlinkat
    202: (98, _SAME),           # futex
    203: (122, _SAME),          # sched_setaffinity
    204: (123, _SAME),          # sched_getaffinity
    228: (113, _SAME),          # clock_gettime
    231: (94, _SAME),           # exit_group
    309: (168, _SAME),          # getcpu
}
