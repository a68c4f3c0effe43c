# Types for the compiled core, beside split.py, which runs as it is without a compiler.
cimport cython

from . cimport fence
from ...journal cimport Output
from .chain cimport ChainReader, shared16, shared64

cdef unsigned int _NO_INTERRUPT
cdef unsigned int _FLAGS
cdef unsigned int _INDEX
cdef unsigned long long _LOW32


cdef class SplitQueue(ChainReader):
    cdef shared64[::1] _desc
    cdef shared16[::1] _avail
    cdef shared16[::1] _used
    cdef shared64[::1] _elements
    cdef unsigned int _used_event_at
    cdef unsigned int _avail_event_at
    cdef unsigned int _next
    cdef unsigned int _known
    cdef unsigned int _pushed
    cdef unsigned int _published

    cpdef bint ready(self) except *
    @cython.locals(
        avail=shared16[::1],
        desc=shared64[::1],
        elements=shared64[::1],
        source="unsigned char[::1]",
        size=cython.uint,
        start=cython.ulonglong,
        room=cython.longlong,
        largest=cython.longlong,
        position=cython.uint,
        known=cython.uint,
        pushed=cython.uint,
        done=cython.uint,
        head=cython.uint,
        word=cython.ulonglong,
        count=cython.longlong,
        at=cython.longlong,
        moved=cython.longlong,
    )
    cpdef long long _move_direct(self, Output output, long long most, long long limit) except *
    @cython.locals(old=cython.uint, new=cython.uint)
    cpdef _expose(self)
    @cython.locals(event=cython.uint)
    cpdef bint _asks_for_call(self) except *
