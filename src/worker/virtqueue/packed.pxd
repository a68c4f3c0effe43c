# Types for the compiled core, beside packed.py, which runs as it is without a compiler.
cimport cython

from . cimport fence
from ...journal cimport Output
from .chain cimport ChainReader, shared32, shared64

cdef unsigned int _LAP
cdef unsigned int _EVENT_DISABLE
cdef unsigned int _EVENT_DESC
cdef unsigned int _FLAGS
cdef unsigned int _WRAP
cdef unsigned int _ENTRY
cdef unsigned long long _INDEX
cdef unsigned long long _LOW32


cdef class PackedQueue(ChainReader):
    cdef shared64[::1] _desc
    cdef object _desc_addr
    cdef shared32[::1] _driver_event
    cdef shared32[::1] _device_event
    cdef long _next
    cdef unsigned int _lap
    cdef long _used
    cdef unsigned int _used_lap
    cdef long _pushed
    cdef shared32[::1] _heads
    cdef shared32[::1] _lengths

    cpdef bint ready(self) except *
    @cython.locals(
        desc=shared64[::1],
        heads=shared32[::1],
        lengths=shared32[::1],
        source="unsigned char[::1]",
        size=cython.long,
        start=cython.ulonglong,
        room=cython.longlong,
        largest=cython.longlong,
        next_=cython.long,
        lap=cython.uint,
        pushed=cython.long,
        word=cython.ulonglong,
        flags=cython.uint,
        count=cython.longlong,
        at=cython.longlong,
        moved=cython.longlong,
    )
    cpdef long long _move_direct(self, Output output, long long most, long long limit) except *
    @cython.locals(
        desc=shared64[::1],
        size=cython.long,
        at=cython.long,
        lap=cython.ulonglong,
        first=cython.ulonglong,
        skipped=cython.long,
        index=cython.long,
        head=cython.ulonglong,
        written=cython.ulonglong,
        word=cython.ulonglong,
        count=cython.long,
    )
    cpdef _expose(self)
    @cython.locals(event=cython.uint, mode=cython.uint, wanted=cython.long)
    cpdef bint _asks_for_call(self) except *
