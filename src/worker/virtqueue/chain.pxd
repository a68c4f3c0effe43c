# Types for the compiled core, beside chain.py, which runs as it is without a compiler.
cimport cython

from . cimport fence
from ...journal cimport Output

# What the guest may change at any moment: each access is made once and where it is written.
cdef extern from *:
    """
    typedef volatile unsigned short shared16;
    typedef volatile unsigned int shared32;
    typedef volatile unsigned long long shared64;
    """
    ctypedef unsigned short shared16
    ctypedef unsigned int shared32
    ctypedef unsigned long long shared64

cdef unsigned long long _LOW32
cdef long long _CALL_NS
cdef long long _LIGHT
cdef int _LOOKS
cdef int _PORTION
cdef long long _LARGE
cdef long long _LARGEST


cdef class ChainReader:
    cdef readonly unsigned int size
    cdef readonly long long held
    cdef object _memory
    cdef bint _event_idx
    cdef bint _indirect
    cdef bint _in_batches
    cdef int _portion
    cdef unsigned int _direction
    cdef long long _most_bytes
    cdef long long _inline
    cdef object _log
    cdef object _log_used
    cdef object _noted
    cdef shared64[::1] _word
    cdef Output _output
    cdef object _input
    cdef bint _unmarked
    cdef unsigned long long _unasked
    cdef unsigned long long _start
    cdef long long _room
    cdef object _view
    cdef unsigned char[::1] _bytes

    cpdef bint ready(self) except *
    @cython.locals(taken=cython.longlong, moved=cython.longlong, began=cython.longlong, asleep=cython.bint, before=cython.longlong, size=cython.longlong)
    cpdef long long take(self, Output output, long long most, long long limit, long long linger_ns) except *
    @cython.locals(now=cython.longlong, last=cython.longlong, until=cython.longlong)
    cdef bint _linger(self, long long linger_ns) except *
    @cython.locals(moved=cython.longlong)
    cdef long long _move(self, Output output, long long most, long long limit) except *
    cdef bint _move_next(self, Output output, long long limit) except *
    cpdef long long _move_direct(self, Output output, long long most, long long limit) except *
    cpdef bint publish(self) except *
    @cython.locals(offset=cython.ulonglong)
    cdef _record(self, unsigned long long begin, unsigned long long pushed)
    cdef bint _call_wanted(self) except *
    cpdef _expose(self)
    cpdef bint _asks_for_call(self) except *


@cython.locals(ring=ChainReader, at=cython.int)
cpdef int look(list rings, long long until_ns) except -2
